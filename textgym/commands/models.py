"""From a model's name to a policy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from textgym.policies import CausalLMPolicy
    from textgym.task import Task

RANDOM = "random"
"""Name of a small model of random weights, as large as the task's vocabulary."""


SMALL = 10_000_000
"""Parameters below which one CPU thread is as fast as several, and much faster on a busy machine:
threads that wait for each other at every small product spin."""


def load_policy(name: str, task: Task, *, seed: int = 0, **settings: Any) -> CausalLMPolicy:
    """Make a policy for a task; a `SMALL` one is given a single CPU thread.

    Args:
        name: As in `textgym.policies.loading.find_model`, or `"random"`.
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
            name, vocab_size=task.vocab_size, seed=seed, **settings
        )
    if sum(p.numel() for p in policy.parameters()) < SMALL:
        torch.set_num_threads(1)
    return policy
