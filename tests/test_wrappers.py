"""Wrappers: text, attention masks, action masks in the info."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from textgym import vector_wrappers
from textgym.env import TextGenEnv
from textgym.mdp import Task
from textgym.policies import CausalLMPolicy, random_causal_lm
from textgym.rollout import collect
from textgym.tokens import load_tokenizer, symbol_tokenizer
from textgym.wrappers import (
    ActionMaskInfo,
    AllowedTokens,
    AttentionMask,
    ForcedPrefix,
    TextObservation,
)

A, B, C, EOS, BOS = range(5)
WRAPPERS = [TextObservation, AttentionMask, ActionMaskInfo]


def make(**arguments: Any) -> TextGenEnv:
    given = {
        "prompts": [{"prompt": "a b"}],
        "tokenizer": symbol_tokenizer(["a", "b", "c"]),
        "reward": lambda text: 1.0,
        "max_new_tokens": 4,
    }
    return TextGenEnv(Task(**{**given, **arguments}))


class EvenOnly(TextGenEnv):
    """Allows even ids only."""

    masks_actions = True

    def action_masks(self) -> Any:
        return np.arange(self.task.vocab_size) % 2 == 0


def test_text_observation() -> None:
    env = TextObservation(make())
    observation, _ = env.reset(seed=0)
    assert observation == "a b"
    assert env.step(np.int64(C))[0] == "a b c"
    assert env.step(np.int64(EOS))[0] == "a b c", "special tokens are skipped"
    assert env.observation_space.contains(observation)


def test_text_observation_keeps_the_end_of_a_long_text() -> None:
    env = TextObservation(make(), max_length=3)
    env.reset(seed=0)
    observation = env.step(np.int64(C))[0]
    assert observation == "b c" and env.observation_space.contains(observation)
    with pytest.raises(ValueError, match="max_length must be a positive integer, got 0"):
        TextObservation(make(), max_length=0)


def test_text_observation_of_any_token_is_in_its_space() -> None:
    tokenizer = load_tokenizer("embedded")
    env = TextObservation(make(prompts=[{"prompt": "é ☃ 𝄞 \u2028"}], tokenizer=tokenizer))
    observation, _ = env.reset(seed=0)
    assert "☃ ?" in observation, "characters outside the space are replaced"
    for token in range(0, tokenizer.vocab_size, 7):
        assert env.observation_space.contains(env.reset()[0])
        assert env.observation_space.contains(env.step(np.int64(token))[0])


def test_attention_mask() -> None:
    env = AttentionMask(make())
    observation, _ = env.reset(seed=0)
    assert observation["attention_mask"].tolist() == [1, 1, 0, 0, 0, 0]
    observation = env.step(np.int64(A))[0]
    assert observation["attention_mask"].tolist() == [1, 1, 1, 0, 0, 0]
    assert observation["attention_mask"].dtype == np.int8
    assert env.observation_space.contains(observation)


def test_action_mask_in_the_info() -> None:
    task = make().task
    env = ActionMaskInfo(EvenOnly(task))
    _, info = env.reset(seed=0)
    assert info["action_mask"].tolist() == [1, 0, 1, 0, 1]
    assert {int(env.action_space.sample(info["action_mask"])) for _ in range(40)} == {0, 2, 4}
    info = env.step(np.int64(A))[4]
    assert info["action_mask"].tolist() == [1, 0, 1, 0, 1]
    assert ActionMaskInfo(make()).reset(seed=0)[1]["action_mask"].tolist() == [1] * 5


@pytest.mark.filterwarnings("ignore:.*is different from the unwrapped version")
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_environments_pass_the_check(wrapper: Any) -> None:
    check_env(wrapper(gym.make("textgym/Echo-v0").unwrapped), skip_render_check=True)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_are_part_of_the_spec(wrapper: Any) -> None:
    env = wrapper(gym.make("textgym/Echo-v0"))
    again = gym.make(env.spec)
    assert isinstance(again, wrapper)
    assert again.observation_space == env.observation_space


def test_wrappers_stack() -> None:
    env = ActionMaskInfo(AttentionMask(gym.make("textgym/Echo-v0")))
    observation, info = env.reset(seed=0)
    assert "attention_mask" in observation and "action_mask" in info


@pytest.mark.parametrize("num_envs", [None, 3])
def test_masks_narrow_what_is_written(num_envs: int | None) -> None:
    """Both at once: two tokens to begin with, then three of the vocabulary."""
    allowed, prefix = [2, 3, 5], [5, 2]
    if num_envs is None:
        single = ForcedPrefix(AllowedTokens(gym.make("textgym/Echo-v0"), allowed), prefix)
        env = ActionMaskInfo(single)
        _, info = env.reset(seed=0)
        for step in range(4):
            mask = info["action_mask"]
            assert set(np.flatnonzero(mask)) == ({prefix[step]} if step < 2 else set(allowed))
            *_, info = env.step(env.action_space.sample(mask))  # type: ignore[call-arg]
        return
    envs: Any = gym.make_vec(
        "textgym/Echo-v0",
        num_envs,
        vectorization_mode="vector_entry_point",
        autoreset_mode="Disabled",
    )
    masked: Any = vector_wrappers.ForcedPrefix(vector_wrappers.AllowedTokens(envs, allowed), prefix)
    policy = CausalLMPolicy(random_causal_lm(envs.task.vocab_size), device="cpu")
    episodes = collect(policy, masked, 6, seed=0)
    for b in range(6):
        written = episodes.sequence(b)[episodes.prompt_length[b] :]
        assert written[:2].tolist() == prefix
        assert set(written) <= set(allowed)
    assert len({tuple(episodes.sequence(b)[-2:]) for b in range(6)}) > 1
    scored = policy.evaluate(episodes.batch(range(6)))  # under the same masks
    np.testing.assert_allclose(scored.logprob.detach(), episodes.logprob, atol=1e-5)


def test_a_mask_that_cannot_be_is_refused() -> None:
    env = gym.make("textgym/Echo-v0")
    for ids in ([], [99], [-1]):
        with pytest.raises(ValueError, match="expected token ids in 0"):
            AllowedTokens(env, ids)
    with pytest.raises(ValueError, match="5 tokens does not fit into 4 new ones"):
        ForcedPrefix(env, [1] * 5)
    assert ForcedPrefix(env, "a b").prefix == env.get_wrapper_attr("task").tokenizer.encode_plain(
        "a b"
    )
