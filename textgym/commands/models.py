"""From a model's name to a policy."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from textgym.tokens import EMBEDDED, assets_folder

if TYPE_CHECKING:
    from textgym.policies import CausalLMPolicy
    from textgym.task import Task

RANDOM = "random"
"""Name of a small model of random weights, as large as the task's vocabulary."""


def find_model(name: str) -> str:
    """Folder or hub name that transformers can load.

    Args:
        name: A folder or hub name, `"embedded"`, the folder of a run (its best checkpoint, else its
            newest), or a checkpoint.

    Raises:
        ValueError: The folder is none of these, or the name can only be that of a folder and there
            is none.
    """
    if name == EMBEDDED:
        return str(assets_folder())
    folder = Path(name)
    if (folder / "checkpoints").is_dir():
        from textgym.checkpoint import best_checkpoint, latest_checkpoint

        checkpoints = folder / "checkpoints"
        found = best_checkpoint(checkpoints) or latest_checkpoint(checkpoints)
        if found is None:
            raise ValueError(f"the run in {folder} holds no checkpoint")
        folder = found
    if (folder / "policy").is_dir():
        folder = folder / "policy"
    if folder.is_dir():
        if not any((folder / file).is_file() for file in ("config.json", "adapter_config.json")):
            raise ValueError(f"the folder {name} holds neither a model (config.json) nor a run")
        return str(folder)
    _check_hub_name(name)
    return name


def _check_hub_name(name: str) -> None:
    """Say that a folder is missing before the hub is asked for it, which takes long offline."""
    folder = Path(name)
    parent = folder.parent
    siblings = [p.name for p in parent.iterdir() if p.is_dir()] if parent.is_dir() else []
    beside_runs = any((parent / sibling / "checkpoints").is_dir() for sibling in siblings)
    if name[:1] not in (".", "/", "~") and (
        len(folder.parts) == 1 or (len(folder.parts) == 2 and not beside_runs)
    ):
        return
    near = difflib.get_close_matches(folder.name, siblings, n=1)
    hint = f"; did you mean {parent / near[0]}?" if near else ""
    raise ValueError(f"there is no model folder {name}{hint}")


SMALL = 10_000_000
"""Parameters below which one CPU thread is as fast as several, and much faster on a busy machine:
threads that wait for each other at every small product spin."""


def load_policy(name: str, task: Task, *, seed: int = 0, **settings: Any) -> CausalLMPolicy:
    """Make a policy for a task; a `SMALL` one is given a single CPU thread.

    Args:
        name: As in `find_model`, or `"random"`.
        task: Gives the vocabulary, and the length that a random model must take.
        seed: Of the policy's draws, and of a random model's weights.
        **settings: Arguments of `CausalLMPolicy.from_pretrained` (`device`, `dtype`, `lora`,
            `temperature`, ...).

    Raises:
        ValueError: The model does not fit the task.
        OSError: There is no such model.
    """
    import torch
    from transformers.utils import logging

    from textgym.policies import CausalLMPolicy, random_causal_lm

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if name == RANDOM:
        model = random_causal_lm(task.vocab_size, max_positions=task.max_length, seed=seed)
        policy = CausalLMPolicy(model, vocab_size=task.vocab_size, seed=seed, **settings)
    else:
        policy = CausalLMPolicy.from_pretrained(
            find_model(name), vocab_size=task.vocab_size, seed=seed, **settings
        )
    if sum(p.numel() for p in policy.parameters()) < SMALL:
        torch.set_num_threads(1)
    return policy
