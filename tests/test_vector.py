"""The native vector environment equals `SyncVectorEnv`, in every autoreset mode."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.error import ResetNeeded
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import TimeLimit
from hypothesis import given, settings
from hypothesis import strategies as st

from textgym.env import TextGenEnv
from textgym.mdp import Reply, Task
from textgym.rewards import as_reward, dense
from textgym.streams import mix64
from textgym.tokens import symbol_tokenizer
from textgym.vector import TextGenVectorEnv

A, B, C, EOS, BOS = range(5)
TOKENS = symbol_tokenizer(["a", "b", "c"])  # eos 3, bos 4
ROWS = [{"prompt": p, "references": ["a b c", "c b a"]} for p in ("a", "b c", "c c c", "a b a b")]


def share_of_a(text: str) -> float | None:
    """Share of words that are `a`; fails for `b b`, and has no value for `c`."""
    if text == "b b":
        raise RuntimeError("no service")
    return None if text == "c" else text.count("a") / max(1, len(text.split()))


def nod(row: Mapping[str, Any], ids: Sequence[int]) -> Reply | None:
    return Reply([C], end=len(ids) >= 3) if ids[-1] == B else None


TASKS: dict[str, dict[str, Any]] = {
    "terminal": {"reward": as_reward(share_of_a)},
    "two parts": {"reward": as_reward("bleu") + 0.5 * as_reward(share_of_a)},
    "dense": {"reward": dense("bleu") + 0.1 * as_reward("rougeL")},
    "replies": {"reward": "bleu", "respond": nod, "stop": (EOS, "a a")},
    "time limit": {"reward": "bleu", "budget": "truncate"},
}
BUILT = {
    name: Task(prompts=ROWS, tokenizer=TOKENS, max_new_tokens=5, **arguments)
    for name, arguments in TASKS.items()
}


def pair(
    name: str, mode: AutoresetMode, number: int = 3, limit: int | None = None
) -> tuple[SyncVectorEnv, TextGenVectorEnv]:
    def single() -> Any:
        env: Any = TextGenEnv(BUILT[name])
        return env if limit is None else TimeLimit(env, limit)

    sync = SyncVectorEnv([single] * number, autoreset_mode=mode)
    native = TextGenVectorEnv(
        BUILT[name], number, autoreset_mode=mode.value, max_episode_steps=limit
    )
    return sync, native


def assert_same(got: Any, expected: Any, where: str = "") -> None:
    """Equal in type, dtype, shape and every element, at any depth."""
    assert type(got) is type(expected), where
    if isinstance(expected, dict):
        assert got.keys() == expected.keys(), where
        for key in expected:
            assert_same(got[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, np.ndarray):
        assert (got.dtype, got.shape) == (expected.dtype, expected.shape), where
        if expected.dtype == object:
            for i, (g, e) in enumerate(zip(got, expected, strict=True)):
                assert_same(g, e, f"{where}[{i}]")
        else:
            assert np.array_equal(got, expected), f"{where}: {got} is not {expected}"
    else:
        assert got == expected, where


def assert_same_begin(native: tuple[Any, ...], sync: tuple[Any, ...]) -> None:
    for name, got, expected in zip(("obs", "info"), native, sync, strict=True):
        assert_same(got, expected, name)


def assert_same_step(native: tuple[Any, ...], sync: tuple[Any, ...]) -> None:
    """Equal steps; where TimeLimit sets both flags, the native environment says terminated."""
    observation, reward, terminated, truncated, info = sync
    tracebacks = {"reward_traceback"}  # of a batch there is one, of single rows there are several
    for infos in (info, native[4], info.get("final_info", {}), native[4].get("final_info", {})):
        for key in tracebacks & infos.keys():
            infos[key] = np.array([t is not None for t in infos[key]])
    expected = (observation, reward, terminated, truncated & ~terminated, info)
    for name, g, e in zip(
        ("obs", "reward", "terminated", "truncated", "info"), native, expected, strict=True
    ):
        assert_same(g, e, name)


def steps_alike(
    sync: SyncVectorEnv, native: TextGenVectorEnv, actions: Iterator[Any], seed: int
) -> Iterator[tuple[Any, ...]]:
    """Step both through `actions`, refilling finished rows where nothing resets by itself."""
    expected, got = sync.reset(seed=seed), native.reset(seed=seed)
    assert_same_begin(got, expected)
    for chosen in actions:
        result = native.step(np.array(chosen))
        assert_same_step(result, sync.step(np.array(chosen)))
        yield result
        ended = result[2] | result[3]
        if native.metadata["autoreset_mode"] is AutoresetMode.DISABLED and ended.any():
            options = {"reset_mask": ended}
            assert_same_begin(native.reset(options=options), sync.reset(options={**options}))
            assert options["reset_mask"] is ended, "the mask is never popped"


@pytest.mark.parametrize("limit", [None, 3])
@pytest.mark.parametrize("mode", list(AutoresetMode))
@pytest.mark.parametrize("name", list(TASKS))
def test_rows_equal_single_environments(name: str, mode: AutoresetMode, limit: int | None) -> None:
    rng = np.random.default_rng(7)
    actions = (rng.choice(5, size=3, p=[0.3, 0.25, 0.2, 0.15, 0.1]) for _ in range(60))
    ended = 0
    for _, reward, terminated, truncated, _ in steps_alike(
        *pair(name, mode, limit=limit), actions, 11
    ):
        ended += int((terminated | truncated).sum())
        assert np.isfinite(reward).all()
    assert ended > 15, "episodes end"


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(sorted(TASKS)),
    st.sampled_from(list(AutoresetMode)),
    st.lists(st.lists(st.integers(0, 4), min_size=2, max_size=2), max_size=15),
    st.integers(0, 2**32 - 2),
)
def test_any_actions_step_alike(
    name: str, mode: AutoresetMode, actions: list[list[int]], seed: int
) -> None:
    for _ in steps_alike(*pair(name, mode, number=2), iter(actions), seed):
        pass


def test_failures_are_reported_row_by_row() -> None:
    env = TextGenVectorEnv(BUILT["terminal"], 3, autoreset_mode="Disabled")
    env.reset(seed=0)
    for chosen in ([B, C, A], [B, EOS, EOS], [EOS, 0, 0]):
        _, reward, _, _, info = env.step(np.array(chosen))
        if chosen[0] == B and "_reward_status" in info:
            # "c" has no value, where one is due; "a" is scored.
            assert info["_reward_status"].tolist() == [False, True, False]
            assert info["reward_status"].tolist() == [None, "none", None]
            assert info["reward"]["share_of_a"].tolist() == [0.0, 0.0, 1.0]
            assert info["reward"]["_share_of_a"].tolist() == [False, False, True]
            assert info["_reward"].tolist() == [False, False, True]
            assert reward.tolist() == [0.0, 0.0, 1.0]
    assert info["reward_status"].tolist() == ["error: RuntimeError: no service", None, None]
    assert "RuntimeError: no service" in info["reward_traceback"][0]
    assert "reward" not in info, "no part applies to an episode that could not be scored"


# --- what differs from SyncVectorEnv: frozen rows


def test_disabled_freezes_finished_rows_and_reports_their_ends_once() -> None:
    env = TextGenVectorEnv(BUILT["terminal"], 2, autoreset_mode="Disabled")
    env.reset(seed=0)
    first = env.step(np.array([EOS, A]))
    assert first[2].tolist() == [True, False]
    frozen = {k: v[0].copy() for k, v in first[0].items()}
    for action in (EOS, 99):  # the actions of a frozen row are ignored
        observation, reward, terminated, truncated, info = env.step(np.array([action, A]))
        assert all(np.array_equal(observation[k][0], frozen[k]) for k in frozen)
        assert (reward[0], terminated[0], truncated[0]) == (0.0, False, False)
        assert "text" not in info or not info["_text"][0]
    env.reset(options={"reset_mask": np.array([True, False])})
    assert env.step(np.array([EOS, A]))[2].tolist() == [True, False]


def test_all_rows_may_be_frozen() -> None:
    env = TextGenVectorEnv(BUILT["terminal"], 2, autoreset_mode="Disabled")
    env.reset(seed=0)
    env.step(np.array([EOS, EOS]))
    _, reward, terminated, _, info = env.step(np.array([A, A]))
    assert not reward.any() and not terminated.any() and info == {}


# --- seeds, streams, options


def test_row_i_uses_seed_plus_i_and_goes_on_to_its_next_episode() -> None:
    env = TextGenVectorEnv(BUILT["terminal"], 3)
    _, info = env.reset(seed=20)
    assert info["stream"].dtype == np.uint64
    assert info["stream"].tolist() == [int(mix64(20 + i, 0)) for i in range(3)]
    _, info = env.reset()
    assert info["stream"].tolist() == [int(mix64(20 + i, 1)) for i in range(3)]
    _, info = env.reset(seed=[5, None, 9])
    assert info["stream"].tolist() == [int(mix64(5, 0)), int(mix64(21, 2)), int(mix64(9, 0))]
    _, info = env.reset(seed=2**64 - 2)
    assert info["stream"].tolist() == [int(mix64(s, 0)) for s in (2**64 - 2, 2**64 - 1, 0)]


def test_without_a_seed_environments_differ() -> None:
    env = TextGenVectorEnv(BUILT["terminal"], 4)
    streams = env.reset()[1]["stream"].tolist()
    other = TextGenVectorEnv(BUILT["terminal"], 4).reset()[1]["stream"].tolist()
    assert len({*streams, *other}) == 8


def test_prompt_rows_and_streams_are_given_by_row() -> None:
    env = TextGenVectorEnv(BUILT["terminal"], 3, autoreset_mode="Disabled")
    streams = np.array([1, 2**64 - 1, 3], np.uint64)
    observation, info = env.reset(
        seed=0, options={"prompt_row": np.array([2, 0, 1]), "stream": streams}
    )
    assert info["prompt_row"].tolist() == [2, 0, 1]
    assert info["stream"].tolist() == streams.tolist()
    assert observation["prompt_length"][:, 0].tolist() == [3, 1, 2]
    # Only the entries of rows that are reset count; the others may be anything.
    mask = np.array([False, True, False])
    options = {"reset_mask": mask, "prompt_row": np.array([-7, 3, 99]), "stream": streams}
    observation, info = env.reset(options=options)
    assert info["_prompt_row"].tolist() == info["_stream"].tolist() == mask.tolist()
    assert info["prompt_row"].tolist() == [0, 3, 0]
    assert observation["prompt_length"][:, 0].tolist() == [3, 4, 2]
    _, info = env.reset(options={"prompt_row": 1, "stream": 5})
    assert (info["prompt_row"].tolist(), info["stream"].tolist()) == ([1] * 3, [5] * 3)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"reset_mask": [True, False]}, TypeError, "must be a bool array, got list"),
        ({"reset_mask": np.array([1, 0])}, TypeError, "must be a bool array, got int64"),
        ({"reset_mask": np.array([True])}, ValueError, r"must have shape \(2,\), got \(1,\)"),
        ({"reset_mask": np.zeros(2, bool)}, ValueError, "must select at least one row"),
        ({"prompt_row": np.array([0, 4])}, ValueError, r"prompt_row must be in \[0, 4\)"),
        ({"prompt_row": np.array([0.0, 1.0])}, TypeError, "prompt_row must be integers"),
        ({"prompt_row": [0, 1, 2]}, ValueError, r"must be one number or 2, got shape \(3,\)"),
        ({"stream": [0.5, 1.0]}, TypeError, "must hold 64-bit integers"),
        ({"promt_row": 1}, ValueError, "unknown reset option 'promt_row'; the options are"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TextGenVectorEnv(BUILT["terminal"], 2).reset(seed=0, options=options)


@pytest.mark.parametrize("seed", [[1], [1, 2, 3]])
def test_bad_seeds(seed: list[int | None]) -> None:
    with pytest.raises(ValueError, match="expected 2 seeds"):
        TextGenVectorEnv(BUILT["terminal"], 2).reset(seed=seed)


# --- construction, copies, rendering, states


def test_autoreset_modes_are_strings_or_the_enum() -> None:
    for mode in AutoresetMode:
        for given_mode in (mode, mode.value):
            env = TextGenVectorEnv(BUILT["terminal"], 2, autoreset_mode=given_mode)
            assert env.metadata["autoreset_mode"] is mode
    assert "autoreset_mode" not in TextGenVectorEnv.metadata, "it is set on the instance"
    with pytest.raises(ValueError, match=r"one of \['NextStep', .*got 'Always'"):
        TextGenVectorEnv(BUILT["terminal"], 2, autoreset_mode="Always")


@pytest.mark.parametrize("arguments", [{"num_envs": 0}, {"max_episode_steps": 0}])
def test_bad_sizes(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be a positive integer"):
        TextGenVectorEnv(BUILT["terminal"], **arguments)


def test_a_task_and_knobs_are_one_too_many() -> None:
    with pytest.raises(TypeError, match=r"the arguments \['budget'\] have no place"):
        TextGenVectorEnv(BUILT["terminal"], 2, budget="truncate")
    with pytest.raises(TypeError, match="maks"):
        TextGenVectorEnv(None, 2, maks=1, prompts=ROWS, reward="bleu")


def test_copies_last_and_views_do_not() -> None:
    env = TextGenVectorEnv(BUILT["terminal"], 2)
    before = env.reset(seed=0)[0]
    kept = {k: v.copy() for k, v in before.items()}
    env.step(np.array([B, B]))
    assert all(np.array_equal(before[k], kept[k]) for k in kept)
    env = TextGenVectorEnv(BUILT["terminal"], 2, copy=False)
    before = env.reset(seed=0)[0]
    after = env.step(np.array([B, B]))[0]
    assert np.shares_memory(before["input_ids"], after["input_ids"])


def test_final_observations_are_copies_even_without_copy() -> None:
    env = TextGenVectorEnv(BUILT["terminal"], 2, copy=False, autoreset_mode="SameStep")
    env.reset(seed=0)
    info = env.step(np.array([EOS, A]))[4]
    last = info["final_obs"][0]["input_ids"]
    kept = last.copy()
    env.step(np.array([B, B]))
    assert np.array_equal(last, kept)


def test_observations_are_in_the_spaces() -> None:
    env = TextGenVectorEnv(BUILT["replies"], 3)
    observation, _ = env.reset(seed=0)
    for _ in range(12):
        assert env.observation_space.contains(observation)
        observation = env.step(env.action_space.sample())[0]
    assert env.action_masks().shape == (3, 5)


def test_rendering_shows_every_row_as_the_single_environment_does() -> None:
    singles = [TextGenEnv(BUILT["dense"], render_mode="ansi") for _ in range(2)]
    env = TextGenVectorEnv(BUILT["dense"], 2, render_mode="ansi", autoreset_mode="Disabled")
    env.reset(seed=4)
    for i, single in enumerate(singles):
        single.reset(seed=4 + i)
    assert env.render() == tuple(single.render() for single in singles)
    for chosen in ([A, B], [B, EOS]):
        env.step(np.array(chosen))
        for single, action in zip(singles, chosen, strict=True):
            single.step(action)
        assert env.render() == tuple(single.render() for single in singles)
    assert TextGenVectorEnv(BUILT["dense"], 2).render() is None
    with pytest.raises(ValueError, match=r"render_mode must be None or one of \['ansi'\]"):
        TextGenVectorEnv(BUILT["dense"], 2, render_mode="human")


def test_step_before_reset_is_an_error() -> None:
    for mode in AutoresetMode:
        with pytest.raises(ResetNeeded, match="never reset"):
            TextGenVectorEnv(BUILT["terminal"], 2, autoreset_mode=mode).step(np.array([A, A]))


@pytest.mark.parametrize(
    ("actions", "error"),
    [([5, 0], ValueError), ([0.0, 1.0], TypeError), ([[0], [0]], ValueError), ([0], ValueError)],
)
def test_bad_actions(actions: Any, error: type[Exception]) -> None:
    env = TextGenVectorEnv(BUILT["terminal"], 2)
    env.reset(seed=0)
    with pytest.raises(error, match="action"):
        env.step(np.array(actions))


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_a_row_goes_on_as_another_row_of_another_environment(mode: AutoresetMode) -> None:
    source = TextGenVectorEnv(BUILT["dense"], 3, autoreset_mode=mode)
    target = TextGenVectorEnv(BUILT["dense"], 2, autoreset_mode=mode)
    source.reset(seed=5)
    source.step(np.array([A, B, C]))
    target.reset(seed=77)
    target.set_state(0, source.get_state(2))
    observation = target.set_state(1, source.get_state(0))
    assert np.array_equal(observation["input_ids"][1], source.mdp.ids[0])
    for chosen in ([C, A, A], [A, A, C], [EOS, B, EOS], [A, A, A]):
        expected = source.step(np.array(chosen))
        got = target.step(np.array([chosen[2], chosen[0]]))
        for k in range(4):
            for there, here in ((2, 0), (0, 1)):
                if k == 0:
                    for name, values in got[0].items():
                        assert np.array_equal(values[here], expected[0][name][there])
                else:
                    assert got[k][here] == expected[k][there]


def test_a_state_goes_from_a_single_environment_to_a_row_and_back() -> None:
    single, vector = TextGenEnv(BUILT["dense"]), TextGenVectorEnv(BUILT["dense"], 2)
    single.reset(seed=3)
    single.step(A)
    vector.reset(seed=0)
    vector.set_state(1, single.get_state())
    expected = [single.step(a)[1] for a in (B, C, EOS)]
    assert [vector.step(np.array([A, a]))[1][1] for a in (B, C, EOS)] == expected


def test_a_state_in_an_environment_that_was_never_reset() -> None:
    """The other rows begin episodes of their own, each from another seed."""
    source, fresh = TextGenVectorEnv(BUILT["dense"], 1), TextGenVectorEnv(BUILT["dense"], 4)
    source.reset(seed=1)
    source.step(np.array([A]))
    fresh.set_state(1, source.get_state(0))
    _, _, _, _, info = fresh.step(np.array([A] * 4))
    assert info["_stream"].tolist() == [True, False, True, True]
    assert len(set(info["stream"].tolist())) == 4
    assert fresh.mdp.length[1] == source.mdp.length[0] + 1


def test_statistics_wrapper_of_gymnasium() -> None:
    env = gym.wrappers.vector.RecordEpisodeStatistics(TextGenVectorEnv(BUILT["terminal"], 2))
    env.reset(seed=0)
    env.step(np.array([A, A]))
    info = env.step(np.array([EOS, A]))[4]
    assert info["_episode"].tolist() == [True, False]
    assert (info["episode"]["r"][0], info["episode"]["l"][0]) == (1.0, 2)
