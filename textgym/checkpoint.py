"""Checkpoints that are whole or not there: one directory each, written beside, synced and renamed.

    <folder>/step-00000040/            a whole checkpoint; a rename at the end names it
        checkpoint.json                step, whether it was the best so far, format
        state.pt                       optimizer, counters, queues: plain values and tensors
        policy/ ...                    whatever the caller wrote (weights as safetensors)
    <folder>/.writing-step-00000060/   left by a killed process; the next save removes it

A process may be killed at any moment, or the power fail: the newest whole checkpoint is never
touched before a newer one is whole on the disk.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

FORMAT = 1
META, STATE = "checkpoint.json", "state.pt"
_NAME = re.compile(r"step-(\d{8,})(?:\.(\d+))?")
_LEFTOVERS = (".writing-", ".deleting-")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read. The message says what is still whole."""


class OtherRunError(CheckpointError, ValueError):
    """A checkpoint is whole, but not of this agent, configuration or starting model."""


def prepare_folder(folder: str | Path) -> Path:
    """Make `folder` and try to write in it, so that a run fails before it trains and not after.

    Returns:
        The folder, as an absolute path.

    Raises:
        CheckpointError: If it cannot be made or written.
    """
    path = Path(folder).expanduser().absolute()
    probe = path / f".writing-probe-{os.getpid()}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        try:
            with probe.open("wb") as file:
                file.write(b"textgym")
                file.flush()
                os.fsync(file.fileno())
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"Cannot write in the output folder {path} ({error.strerror or error}): "
            "choose a folder that you may write, on a disk with space left."
        ) from error
    return path


def save_checkpoint(
    folder: str | Path,
    *,
    step: int,
    write: Callable[[Path], None],
    state: Mapping[str, Any],
    keep: int = 2,
    best: bool = False,
) -> Path:
    """Write a checkpoint whole, then remove those that are no longer needed.

    Every file and directory is synced to the disk before the rename that gives the checkpoint its
    name. A second checkpoint of one step does not replace the first; it is newer.

    Args:
        folder: Holds all checkpoints of one run, of one writer at a time.
        step: Updates done so far, at least 0.
        write: Writes the weights below the directory that it is given.
        state: What else resuming needs: nested dicts, lists and tuples of None, bool, int, float,
            str and tensors, so that `torch.load(weights_only=True)` reads it back.
        keep: How many of the newest to keep, at least 1. The newest with `best` is kept besides.
        best: Whether this is the best so far.

    Returns:
        The directory of the checkpoint.

    Raises:
        CheckpointError: If writing fails (a full disk, say). What was whole before still is, and
            nothing half-written is left.
        TypeError: If `state` holds something else.
        ValueError: If `step` or `keep` is too small.
    """
    if step < 0 or keep < 1:
        raise ValueError(f"expected step >= 0 and keep >= 1, got step={step}, keep={keep}")
    check_state(state)
    folder = Path(folder)
    name = f"step-{step:08d}"
    temporary = folder / f".writing-{name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        temporary.mkdir()
        write(temporary)
        torch.save(dict(state), temporary / STATE)
        meta = {"format": FORMAT, "step": step, "best": best}
        (temporary / META).write_text(json.dumps(meta) + "\n", encoding="utf-8")
        _sync_tree(temporary)
        serials = [serial for at, serial, _ in _listing(folder) if at == step]
        target = folder / (f"{name}.{max(serials) + 1}" if serials else name)
        temporary.rename(target)
        _sync_directory(folder)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, Exception):
            raise CheckpointError(_failure(folder, step, error)) from error
        raise
    _prune(folder, keep)
    return target


def latest_checkpoint(folder: str | Path) -> Path | None:
    """The newest whole checkpoint in `folder`, or None."""
    found = _listing(Path(folder))
    return found[-1][2] if found else None


def best_checkpoint(folder: str | Path) -> Path | None:
    """The newest whole checkpoint in `folder` that was saved as the best so far, or None."""
    best = [path for _, _, path in _listing(Path(folder)) if read_meta(path)["best"]]
    return best[-1] if best else None


def load_state(checkpoint: str | Path) -> dict[str, Any]:
    """Read the `state` of a checkpoint, with tensors on the CPU.

    Raises:
        CheckpointError: If it is missing or damaged.
    """
    path = Path(checkpoint) / STATE
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"Cannot read {path} ({error}): choose another checkpoint."
        ) from error
    return state


def read_meta(checkpoint: str | Path) -> dict[str, Any]:
    """Read what a checkpoint says of itself: `format`, `step` and `best`.

    Raises:
        CheckpointError: If it is missing, damaged or of a newer format.
    """
    path = Path(checkpoint) / META
    try:
        meta: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        newer = meta["format"] > FORMAT
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"Cannot read {path} ({error}): choose another checkpoint."
        ) from error
    if newer:
        raise CheckpointError(
            f"{path} has format {meta['format']}, this textgym reads up to {FORMAT}: update it."
        )
    return meta


def generator_state(generator: np.random.Generator) -> str:
    """The state of a NumPy generator as JSON, for the `state` of a checkpoint."""
    return json.dumps(generator.bit_generator.state)


def set_generator_state(generator: np.random.Generator, state: str) -> None:
    """Put a NumPy generator of the same kind back into a state from `generator_state`."""
    generator.bit_generator.state = json.loads(state)


def check_state(state: Any, path: str = "state") -> None:
    """Check that `torch.load(weights_only=True)` will read `state` back.

    Raises:
        TypeError: Naming the first value that it would refuse.
    """
    if isinstance(state, Mapping):
        for key, value in state.items():
            if not isinstance(key, (str, int)):
                raise TypeError(f"keys of {path} must be str or int, got {key!r}")
            check_state(value, f"{path}[{key!r}]")
    elif isinstance(state, (list, tuple)):
        for index, value in enumerate(state):
            check_state(value, f"{path}[{index}]")
    elif type(state) not in (type(None), bool, int, float, str) and not torch.is_tensor(state):
        raise TypeError(
            f"{path} is {type(state).__name__}: a checkpoint holds dicts, lists, tuples, None, "
            "bool, int, float, str and tensors (convert NumPy scalars and arrays)"
        )


def _listing(folder: Path) -> list[tuple[int, int, Path]]:
    """(step, serial, path) of the whole checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    found = []
    for path in folder.iterdir():
        match = _NAME.fullmatch(path.name)
        if match and (path / META).is_file():
            found.append((int(match[1]), int(match[2] or 0), path))
    return sorted(found)


def _prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` and the best, by a rename first: none is ever half there."""
    paths = [path for _, _, path in _listing(folder)]
    best = best_checkpoint(folder)
    for path in paths[:-keep]:
        if path != best:
            path.rename(folder / f".deleting-{path.name}")
    _remove_leftovers(folder)


def _remove_leftovers(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name.startswith(_LEFTOVERS) and path.is_dir():
            shutil.rmtree(path, ignore_errors=True)


def _sync_tree(root: Path) -> None:
    for folder, _, files in os.walk(root, topdown=False):
        for file in files:
            descriptor = os.open(os.path.join(folder, file), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        _sync_directory(Path(folder))


def _sync_directory(folder: Path) -> None:
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return  # a platform that cannot open directories has nothing to sync
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems refuse, harmlessly
            raise
    finally:
        os.close(descriptor)


def _failure(folder: Path, step: int, error: Exception) -> str:
    """What failed, why as far as we know, what is still whole, and what to do."""
    reason = f"{type(error).__name__}: {error}"
    # Rust's and C++'s writers report a full disk in words of their own, so ask the disk as well.
    full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
    try:
        free = shutil.disk_usage(folder).free
    except OSError:
        free = None
    if full or (free is not None and free < 2**20):
        reason = f"the disk is full ({reason})"
    kept = latest_checkpoint(folder)
    rest = f"The last whole checkpoint is {kept}." if kept else "There is no earlier checkpoint."
    return (
        f"Could not save the checkpoint of step {step} in {folder}: {reason}. {rest} "
        "Make room or choose another folder, then resume."
    )
