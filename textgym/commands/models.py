"""From a model's name to a policy."""

from __future__ import annotations

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
    return str(folder) if folder.is_dir() else name


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
