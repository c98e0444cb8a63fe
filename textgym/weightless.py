"""Policies whose weights take no memory, and a count of the memory that they would take.

The weights are fake tensors (`torch._subclasses.fake_tensor`): they have a shape, a dtype and a
device, and no numbers behind them. What is computed from them is fake as well. So the very code
that trains can be run in seconds, on a model of any size, to see which tensors it creates and when
it lets them go.
"""

from __future__ import annotations

import itertools
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from textgym.malloc import LARGE

if TYPE_CHECKING:
    from textgym.policies import CausalLMPolicy

FAKE = FakeTensorMode(allow_non_fake_inputs=True)
"""Tensors made under it are fake."""
HOLES = 0.5
"""Bytes that malloc holds on a CPU beside a byte of tensors that come and go: holes that no block
fits into, and what was freed. Measured 0.4 to 0.65 with glibc by `scripts/check_memory.py`."""
_VALUE = torch.ops.aten._local_scalar_dense.default
_EQUALITIES = (torch.ops.aten.allclose.default, torch.ops.aten.equal.default)


class Most(NamedTuple):
    """The most bytes that existed at once."""

    tensors: int
    """Of tensors."""
    ram: int
    """Of tensors, and of the holes between them."""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors, fake or not, that are made while it is on.

    A storage counts once, however many tensors view it, from the operation that makes it until
    nobody holds it. Where code asks for a number that is not there, it gets 0, True or "equal":
    what it looks for (NaN, forbidden tokens, a cache that differs) is never found.

    Args:
        device: Type of the device whose memory is counted.

    Attributes:
        now: Bytes of storages that exist.
    """

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.now = self._small = self._steady = 0
        self._most = Most(0, 0)
        self._held: dict[int, weakref.ref[Any]] = {}

    def note(self, tensor: Tensor) -> None:
        """Count a tensor, if its storage is not known."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._held or tensor.device.type != self.device:
            return

        def dropped(_: weakref.ref[Any]) -> None:
            del self._held[key]
            self._add(-size)

        self._held[key] = weakref.ref(storage, dropped)
        self._add(size)
        self._most = _more(self._most, self._present())

    def _add(self, size: int) -> None:
        self.now += size
        self._small += size if abs(size) < LARGE else 0

    def _present(self) -> Most:
        moving = max(0, self._small - self._steady)
        return Most(self.now, self.now + round(HOLES * moving))

    def take_in(self, module: nn.Module) -> int:
        """Count the weights and buffers of a module; gives the bytes that were not known."""
        before = self.now
        for tensor in itertools.chain(module.parameters(), module.buffers()):
            self.note(tensor)
        return self.now - before

    def settle(self) -> None:
        """Take what exists now for what will stay: there are no holes in it."""
        self._steady = self._small

    def most(self, work: Callable[[], Any]) -> Most:
        """Do something; gives the most bytes that existed while it was done."""
        outer, self._most = self._most, self._present()
        work()
        found, self._most = self._most, _more(outer, self._most)
        return found

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Do an operation, and count what it gives."""
        if func is _VALUE and _has_no_numbers(args[0]):
            return args[0].dtype == torch.bool or torch.zeros((), dtype=args[0].dtype).item()
        if func in _EQUALITIES and _has_no_numbers(args[0]):
            return True
        if torch.is_inference_mode_enabled() and func.namespace == "aten":
            with self:  # there composite operations arrive whole
                out = func.decompose(*args, **(kwargs or {}))
            if out is not NotImplemented:
                return out
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.note(leaf)
        return out


def _more(one: Most, other: Most) -> Most:
    return Most(max(one.tensors, other.tensors), max(one.ram, other.ram))


def _has_no_numbers(tensor: Tensor) -> bool:
    return isinstance(tensor, FakeTensor) or tensor.is_meta


def without_storage(build: Callable[[], CausalLMPolicy], device: torch.device) -> CausalLMPolicy:
    """Make a policy with fake weights.

    Args:
        build: Makes the policy on the device "meta", from a configuration and not from weights.
        device: Where its tensors shall seem to be.
    """
    with LiveBytes(), torch.device("meta"):
        policy = build()
    made: dict[int, Tensor] = {}
    with FAKE:
        for module in policy.modules():
            tensors: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for held in tensors:
                for name, meta in held.items():
                    if meta is None:
                        continue
                    if id(meta) not in made:  # tied weights stay tied
                        fake: Tensor = torch.empty_like(meta, device=device)
                        if isinstance(meta, nn.Parameter):
                            fake = nn.Parameter(fake, requires_grad=meta.requires_grad)
                        made[id(meta)] = fake
                    held[name] = made[id(meta)]
    return policy


@contextmanager
def fake_weights() -> Iterator[None]:
    """Let modules with fake weights be copied and change their dtype.

    torch warns where an address is asked for, which they do not have, and refuses to change them in
    place while its own table of fake tensors refers to them.
    """
    swap = torch.utils.swap_tensors
    torch.utils.swap_tensors = _swap
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
            yield
    finally:
        torch.utils.swap_tensors = swap


def _swap(one: Tensor, other: Tensor) -> None:
    one.__dict__, other.__dict__ = other.__dict__, one.__dict__
    torch._C._swap_tensor_impl(one, other)
