"""Notice that weights have changed, so that keys and values of the old ones are never used.

Token ids cannot tell. An in-place update raises a tensor's version (`optimizer.step`,
`load_state_dict`, `copy_`), and a replaced parameter is another object: both are read before each
use of the cache. Fused optimizers and writes through `.data` leave the version as it was, so every
step of every torch optimizer is watched too. What remains (a write through `.data` outside an
optimizer, adapters switched by hand) needs `invalidate_cache()`.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

_watches: weakref.WeakSet[WeightWatch] = weakref.WeakSet()


class WeightWatch:
    """Watch the parameters of a module.

    `changed()` is true once after each change; the first call is such a change.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._places: list[tuple[dict[str, Any], str]] = []
        self._seen: tuple[tuple[int, int, int], ...] | None = None
        _watches.add(self)

    def changed(self) -> bool:
        """Whether any weight may have changed since the last call."""
        if self._seen is None:
            self._places = [
                (module._parameters, name)
                for module in self._module.modules()
                for name, parameter in module._parameters.items()
                if parameter is not None
            ]
        now = tuple(
            (id(held[name]), held[name]._version, held[name].data_ptr())
            for held, name in self._places
        )
        if now == self._seen:
            return False
        self._seen = now
        return True

    def invalidate(self) -> None:
        """Make the next `changed()` true."""
        self._seen = None

    def _owns(self, parameters: set[int]) -> bool:
        return any(id(held[name]) in parameters for held, name in self._places)


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    stepped: set[int] | None = None
    for watch in list(_watches):
        if watch._seen is not None:
            if stepped is None:
                stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
            if watch._owns(stepped):
                watch.invalidate()


register_optimizer_step_post_hook(_after_step)
