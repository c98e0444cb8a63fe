"""Data parallel on one machine: several processes do one run together.

    torchrun --nproc_per_node 2 -m textgym train ...

Every process has all of the weights. Episodes are sampled in shares and given to everyone, so that
each process computes baselines, advantages and normalisers of the whole batch, with the same
numbers; forwards and backwards are done in shares again, and their gradients summed before the
step, which is then the same everywhere. One process alone does all of it, and nothing here costs
it anything.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

T = TypeVar("T")

BUCKET = 1 << 23
"""Numbers that are summed at a time, 32 MB of them."""


class ProcessError(RuntimeError):
    """Another process of the run has failed. The message says why, where that is known."""


@dataclass(frozen=True)
class World:
    """Which of how many processes this is."""

    rank: int = 0
    """Number of this process, from 0."""
    size: int = 1
    """Number of processes."""

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0


def world() -> World:
    """The processes of this run: those of `torch.distributed`, or this one alone."""
    if dist.is_available() and dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size())
    return World()


def start(
    device: str = "auto", *, init_method: str = "env://", timeout_minutes: float = 30.0
) -> World:
    """Join the processes that `torchrun` (or `accelerate launch`) started; alone, do nothing.

    On CUDA each process takes the device of its number, which is then what `device="auto"` and
    `"cuda"` mean to a policy. Host data goes through gloo, gradients on CUDA through nccl.

    Args:
        device: What the policies are to live on; `"cpu"` leaves CUDA alone.
        init_method: Where the processes find each other; see `init_process_group`.
        timeout_minutes: How long a process waits for the others before it gives up. The slowest
            share of a rollout, its rewards included, must not fall behind by more.

    Raises:
        ValueError: There are fewer CUDA devices than processes.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or dist.is_initialized():
        return world()
    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    cuda = device != "cpu" and torch.cuda.is_available()
    if cuda:
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"process {local} of this machine needs a CUDA device of its own, there are "
                f"{torch.cuda.device_count()}: start as many processes as devices, or train on the "
                "CPU (--device cpu)"
            )
        torch.cuda.set_device(local)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        init_method=init_method,
        rank=rank,
        world_size=size,
        timeout=timedelta(minutes=timeout_minutes),
    )
    return world()


def stop() -> None:
    """Part from the other processes, when all is done. Not for a process that failed: it exits."""
    if world().size > 1:
        dist.destroy_process_group()


# ------------------------------------------------------------------------------------ host data


def gather(thing: T) -> list[T]:
    """What every process has, by rank. All processes must call it; they wait for each other.

    Raises:
        ProcessError: One of them is gone, or does not answer in time.
    """
    here = world()
    if here.size == 1:
        return [thing]
    found: list[Any] = [None] * here.size
    with _together():
        dist.all_gather_object(found, thing)
    return found


def shared(work: Callable[[], T]) -> list[T]:
    """Do a share of some work in every process, and give what each found to all, by rank.

    Raises:
        ProcessError: The work failed elsewhere. Where it failed, the failure itself is raised, so
            that all processes end and none waits for ever.
    """
    here = world()
    if here.size == 1:
        return [work()]
    found: T | None = None
    failure: Exception | None = None
    try:
        found = work()
    except Exception as error:
        failure = error
    said = None if failure is None else f"{type(failure).__name__}: {failure}"
    outcomes = gather((found, said))
    if failure is not None:
        raise failure
    for rank, (_, why) in enumerate(outcomes):
        if why is not None:
            raise ProcessError(f"process {rank} of {here.size} failed: {why}")
    return [one for one, _ in outcomes]  # type: ignore[misc]


def of_leader(thing: T) -> T:
    """What process 0 has, in every process."""
    return gather(thing)[0]


def any_of(flag: bool) -> bool:
    """Whether a flag is up in any process."""
    return any(gather(flag))


def total(values: T) -> T:
    """Sum of numbers or arrays over the processes, in the order of ranks: the same everywhere."""
    summed: Any
    summed, *others = gather(values)
    for other in others:
        summed = summed + other
    whole: T = summed
    return whole


# ------------------------------------------------------------------------------------ shares


def share(count: int) -> slice:
    """This process's stretch of `count` things in a row; stretches differ by one at most."""
    here = world()
    return slice(count * here.rank // here.size, count * (here.rank + 1) // here.size)


def deal(lengths: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    """Which of several sequences are this process's: like numbers of like lengths, like cards.

    Where there are fewer than processes, some get none.
    """
    here = world()
    if here.size == 1:
        return np.arange(len(lengths))
    return np.argsort(-np.asarray(lengths), kind="stable")[here.rank :: here.size]


# ------------------------------------------------------------------------------------ gradients


@torch.no_grad()
def sum_gradients(parameters: Sequence[torch.nn.Parameter], loss: Tensor) -> Tensor:
    """Put the sum over processes in place of each gradient; a sum, since weights know the batch.

    A parameter without a gradient in any process keeps none. The device is not waited for.

    Args:
        parameters: In the same order everywhere.
        loss: 0-d, this process's part.

    Returns:
        Sum of the losses, 0-d.

    Raises:
        ProcessError: As `gather` does.
    """
    if world().size == 1:
        return loss
    owners = gather([p.grad is not None for p in parameters])
    used = [p for p, *has in zip(parameters, *owners, strict=True) if any(has)]
    for parameter in used:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    summed = loss.detach().clone().reshape(1)
    for bucket in _buckets([summed, *(p.grad for p in used if p.grad is not None)]):
        flat = torch.cat([x.reshape(-1).float() for x in bucket])
        with _together():
            dist.all_reduce(flat)
        for x, part in zip(bucket, torch.split(flat, [x.numel() for x in bucket]), strict=True):
            x.copy_(part.view_as(x))
    return summed[0]


@contextmanager
def _together() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ProcessError(
            f"another process of this run is gone, or has not answered in time ({error}); what it "
            "said itself tells why"
        ) from error


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors in groups of at most `BUCKET` numbers, or of one."""
    held: list[Tensor] = []
    for tensor in tensors:
        if held and sum(x.numel() for x in held) + tensor.numel() > BUCKET:
            yield held
            held = []
        held.append(tensor)
    yield held
