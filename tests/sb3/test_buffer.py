"""Whole sequences are the same transitions as the stock buffer's prefixes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from textgym.sb3.buffer import SequenceStore

NAMES = ("PPO", "A2C", "TRPO", "MaskablePPO")


@pytest.mark.parametrize("n_steps", [12, 7])  # Echo's episodes take 4 steps: 7 cuts them
@pytest.mark.parametrize("name", NAMES)
def test_what_was_collected_is_what_is_scored(
    make_algorithm: Any, collect_once: Any, name: str, n_steps: int
) -> None:
    algorithm = make_algorithm(name, n_steps=n_steps)
    with torch.no_grad():  # far from uniform
        for parameter in algorithm.policy.parameters():
            parameter.mul_(3.0)
    buffer = collect_once(algorithm)
    seen = 0
    for batch in buffer.get(10):
        masks = {"action_masks": batch.action_masks} if name == "MaskablePPO" else {}
        value, logprob, entropy = algorithm.policy.evaluate_actions(
            batch.observations, batch.actions.long().flatten(), **masks
        )
        torch.testing.assert_close(logprob, batch.old_log_prob, rtol=0, atol=1e-4)
        torch.testing.assert_close(value[:, 0], batch.old_values, rtol=0, atol=1e-4)
        assert entropy.shape == logprob.shape
        seen += len(logprob)
    assert seen == n_steps * algorithm.n_envs
    algorithm.train()


def loss_and_gradient(algorithm: Any, buffer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    (batch,) = buffer.get(None)
    value, logprob, entropy = algorithm.policy.evaluate_actions(
        batch.observations, batch.actions.long().flatten()
    )
    ratio = torch.exp(logprob - batch.old_log_prob)
    loss = -(batch.advantages * ratio).mean() - 0.1 * entropy.mean()
    loss = loss + 0.5 * ((value.flatten() - batch.returns) ** 2).mean()
    algorithm.policy.zero_grad()
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in algorithm.policy.parameters()])


@pytest.mark.filterwarnings("ignore:one forward for each")
def test_loss_and_gradient_are_those_of_the_stock_buffer(
    make_algorithm: Any, collect_once: Any
) -> None:
    found = []
    for stock in (True, False):
        algorithm = make_algorithm(stock=stock, n_steps=11, ent_coef=0.1)
        found.append(loss_and_gradient(algorithm, collect_once(algorithm)))
    (loss, gradient), (ours, our_gradient) = found
    torch.testing.assert_close(ours, loss, rtol=1e-5, atol=1e-8)
    assert gradient.abs().max() > 1e-3
    torch.testing.assert_close(our_gradient, gradient, rtol=1e-5, atol=1e-7)


def test_advantages_are_whitened_over_the_rollout_and_returns_are_not(
    make_algorithm: Any, collect_once: Any
) -> None:
    plain, white = (
        collect_once(make_algorithm(n_steps=11, rollout_buffer_kwargs={"whiten": whiten}))
        for whiten in (False, True)
    )
    np.testing.assert_array_equal(white.returns, plain.returns)
    raw = plain.advantages
    assert raw.std() != pytest.approx(1.0, abs=0.01)
    np.testing.assert_allclose(
        white.advantages, (raw - raw.mean()) / raw.std(), rtol=1e-4, atol=1e-5
    )


def test_minibatches_are_whole_sequences_of_at_least_the_batch_size(
    make_algorithm: Any, collect_once: Any
) -> None:
    buffer = collect_once(make_algorithm(n_steps=13))
    orders = []
    for batch_size in (1, 5, 6, 20, 51, 1000):
        groups = list(buffer.minibatches(batch_size))
        tokens = [int(np.isin(buffer.store.sequence, group).sum()) for group in groups]
        everything = np.concatenate(groups)
        assert sorted(everything) == list(range(len(buffer.store.finished)))
        assert sum(tokens) == buffer.buffer_size * buffer.n_envs
        assert all(size >= batch_size for size in tokens[:-1])
        assert len(tokens) == 1 or 2 * tokens[-1] >= batch_size
        orders.append(everything.tolist())
    assert orders[0] != orders[1]


def test_shuffles_belong_to_the_buffer(make_algorithm: Any, collect_once: Any) -> None:
    orders = []
    for noise in (0, 1):
        buffer = collect_once(make_algorithm())
        np.random.seed(noise)
        before = np.random.get_state()[1].copy()
        orders.append(np.concatenate(list(buffer.minibatches(5))).tolist())
        assert (np.random.get_state()[1] == before).all()
    assert orders[0] == orders[1]


@given(st.data())
@settings(max_examples=30)
def test_every_token_is_found_after_its_own_prefix(data: Any) -> None:
    """Rows that reset, repeat an observation, get several tokens at once, or are rewritten."""
    steps, envs, columns = 8, 3, 12
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    store = SequenceStore(steps, envs, columns)
    ids, length = rng.integers(0, 3, (envs, columns)), rng.integers(1, 4, envs)
    seen = []
    for t in range(steps):
        action = rng.integers(0, 3, envs)
        store.add(t, ids.copy(), length.copy(), action)
        seen.append([(*ids[i, : length[i]], action[i]) for i in range(envs)])
        for i in range(envs):
            kind = rng.choice(["go on", "reset", "again", "reply", "rewrite"])
            if kind == "reset" or length[i] + 3 > columns:
                ids[i], length[i] = rng.integers(0, 3, columns), rng.integers(1, 4)
            elif kind == "rewrite":
                ids[i, 0] = (ids[i, 0] + 1) % 3
            elif kind != "again":
                ids[i, length[i]] = action[i]
                length[i] += 1 + 2 * (kind == "reply")
    store.close()
    for t in range(steps):
        for i in range(envs):
            sequence, column = store.finished[int(store.sequence[t, i])], store.column[t, i]
            assert tuple(sequence[: column + 1]) == seen[t][i]


def test_nothing_of_the_size_of_all_prefixes_is_made(make_algorithm: Any) -> None:
    for name in ("PPO", "MaskablePPO"):
        buffer = make_algorithm(name).rollout_buffer
        rows = buffer.buffer_size * buffer.n_envs
        arrays = [x for x in vars(buffer).values() if isinstance(x, np.ndarray)]
        assert max(x.size for x in arrays) == rows
        assert not buffer.observations


def test_a_reply_lengthens_a_sequence(
    make_algorithm: Any, collect_once: Any, make_vec_env: Any
) -> None:
    """Several turns: the environment answers, and the episode stays one sequence."""
    env = make_vec_env(env="HighLow")
    buffer = collect_once(make_algorithm(env=env, n_steps=30))
    ends = int(buffer.episode_starts[1:].sum()) + buffer.n_envs
    assert len(buffer.store.finished) <= ends
    for numbers in buffer.minibatches(10):
        batch, _ = buffer.sequences(numbers)
        assert (batch.col < batch.lengths[batch.row]).all()


def test_a_truncated_episode_is_worth_what_its_last_state_is(
    make_algorithm: Any, collect_once: Any, make_vec_env: Any
) -> None:
    env = make_vec_env(max_episode_steps=3)  # Echo would end after 4
    algorithm = make_algorithm(env=env, n_steps=9)
    with torch.no_grad():
        algorithm.policy.lm.value_head.weight.normal_(generator=torch.Generator().manual_seed(0))
    buffer = collect_once(algorithm)
    assert (buffer.episode_starts[3] == 1).all() and (buffer.episode_starts[4] == 0).all()
    numbers = np.arange(len(buffer.store.finished))
    batch, (step, row) = buffer.sequences(numbers)
    texts = [buffer.store.finished[int(buffer.store.sequence[2, i])] for i in range(4)]
    obs = {
        "input_ids": torch.tensor(np.array([np.pad(x, (0, 8 - len(x))) for x in texts])),
        "length": torch.tensor([[len(x)] for x in texts]),
    }
    with torch.no_grad():
        worth = algorithm.policy.predict_values(obs)[:, 0].numpy()
    assert np.abs(worth).min() > 1e-3
    np.testing.assert_allclose(buffer.rewards[2], worth, atol=1e-5)  # the reward itself is 0
    assert len(batch.row) == len(step) == len(row) == 36


def test_whitening_has_a_floor(make_algorithm: Any, collect_once: Any) -> None:
    plain, white = (
        collect_once(make_algorithm(n_steps=11, rollout_buffer_kwargs=options))
        for options in ({}, {"whiten": True, "whiten_floor": 7.0})
    )
    expected = (plain.advantages - plain.advantages.mean()) / 7.0
    np.testing.assert_allclose(white.advantages, expected, rtol=1e-4, atol=1e-6)
