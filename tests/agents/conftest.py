"""A task small enough to train on in a test: write four symbols, the more `a` the better."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from textgym.policies import CausalLMPolicy, random_causal_lm
from textgym.task import Task
from textgym.tokens import symbol_tokenizer
from textgym.vector import TextGenVectorEnv

SYMBOLS = ("a", "b", "c", "d")


def share_of_a(text: str) -> float:
    return text.split().count("a") / 4


@pytest.fixture
def make_envs() -> Callable[..., TextGenVectorEnv]:
    def make(reward: Any = share_of_a, num_envs: int = 8, **kwargs: Any) -> TextGenVectorEnv:
        prompts = [{"prompt": p, "references": [f"{p} a", "a a"]} for p in ("b", "c", "d", "b c")]
        task = Task(
            prompts=kwargs.pop("prompts", prompts),
            tokenizer=symbol_tokenizer(SYMBOLS),
            reward=reward,
            max_new_tokens=kwargs.pop("max_new_tokens", 4),
            **kwargs,
        )
        return TextGenVectorEnv(task, num_envs, autoreset_mode="Disabled")

    return make


@pytest.fixture
def make_policy() -> Callable[..., CausalLMPolicy]:
    def make(seed: int = 0, family: str = "llama", **kwargs: Any) -> CausalLMPolicy:
        model = random_causal_lm(
            len(SYMBOLS) + 2,
            hidden_size=16,
            num_layers=1,
            num_heads=2,
            max_positions=16,
            family=family,  # type: ignore[arg-type]
            seed=seed,
        )
        return CausalLMPolicy(model, device="cpu", seed=seed, **kwargs)

    return make
