"""Acting: what is drawn is what is scored, and the same keys give the same tokens on every path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from textgym import streams
from textgym.episodes import SequenceBatch
from textgym.policies import CausalLMPolicy, generation
from textgym.policies.generation import ACCELERATOR_STEPS
from textgym.policies.results import Generation
from textgym.policies.slot_cache import SlotDecoder

VOCAB = 61
N, PROMPT, NEW = 6, 9, 16
STOP = (5, 17, 40)


def prompts(n: int = N, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    ids = np.zeros((n, PROMPT + NEW), np.int64)
    ids[:, :PROMPT] = rng.integers(0, VOCAB, (n, PROMPT))
    return ids, rng.integers(2, PROMPT + 1, n)


def stream(n: int = N) -> np.ndarray:
    return streams.mix64(99, np.arange(n))


def step_loop(
    policy: CausalLMPolicy,
    ids: np.ndarray,
    length: np.ndarray,
    keys: np.ndarray,
    index: int = 0,
    rows: np.ndarray | None = None,
) -> Generation:
    """What an environment and `act` do, one token at a time."""
    n = len(ids)
    slots = np.arange(n) if rows is None else rows
    ids, length = ids.copy(), length.copy()
    tokens = np.zeros((n, NEW), np.int64)
    logprob, value = np.zeros((2, n, NEW), np.float32)
    count = np.zeros(n, np.int64)
    live = np.arange(n)
    for step in range(NEW):
        obs = {"input_ids": ids[live], "length": length[live, None]}
        act = policy.act(obs, keys[live], index, rows=slots[live])
        tokens[live, step], logprob[live, step], value[live, step] = act
        ids[live, length[live]] = act.action
        length[live] += 1
        count[live] += 1
        live = live[~np.isin(act.action, STOP)]
        if not len(live):
            break
    longest = count.max()
    return Generation(tokens[:, :longest], logprob[:, :longest], value[:, :longest], count)


def distance_to_boundary(
    policy: CausalLMPolicy, ids: np.ndarray, key: np.ndarray, one: int, other: int
) -> float:
    """How close a draw was to going the other way, from the exact distribution after `ids`."""
    with torch.no_grad():
        hidden = policy._hidden_all(torch.from_numpy(ids[None]))[:, -1]
        logits = policy._logits(hidden)[0].double()
    if policy.sampler.method == "greedy":
        return float((logits[one] - logits[other]).abs())
    if policy.sampler.method == "gumbel":
        from textgym.sampling import gumbel_noise

        noisy = logits + gumbel_noise(torch.tensor([key.view(np.int64)]), VOCAB)[0]
        return float((noisy[one] - noisy[other]).abs())
    cumulated = logits.softmax(0).cumsum(0)
    u = float(streams.uniform53(key))
    return float((cumulated[min(one, other) : max(one, other)] - u).abs().min())


def assert_same(
    policy: CausalLMPolicy,
    first: Generation,
    second: Generation,
    ids: np.ndarray,
    length: np.ndarray,
    keys: np.ndarray,
) -> None:
    """Same tokens; where logits differ in their last bits, the first fork is at a boundary."""
    for i in range(len(ids)):
        shared = min(first.count[i], second.count[i])
        one, other = first.tokens[i, :shared], second.tokens[i, :shared]
        same = shared
        if (one != other).any():
            same = int((one != other).argmax())
            before = np.concatenate([ids[i, : length[i]], one[:same]])
            key = streams.mix64(policy.seed, keys[i], 0, length[i] + same)
            assert distance_to_boundary(policy, before, key, one[same], other[same]) < 1e-5
        else:
            assert first.count[i] == second.count[i]
        np.testing.assert_allclose(first.logprob[i, :same], second.logprob[i, :same], atol=1e-4)
        np.testing.assert_allclose(first.value[i, :same], second.value[i, :same], atol=1e-4)


@pytest.mark.parametrize("sampler", ["inverse_cdf", "gumbel", "greedy"])
class TestPaths:
    def build(self, make_model: Callable[..., Any], family: str, sampler: Any) -> CausalLMPolicy:
        return CausalLMPolicy(
            make_model(family), device="cpu", sampler=sampler, temperature=1.3, seed=4
        )

    def test_generate_equals_a_step_loop(
        self, make_model: Callable[..., Any], family: str, sampler: str
    ) -> None:
        policy = self.build(make_model, family, sampler)
        ids, length = prompts()
        by_step = step_loop(policy, ids, length, stream())
        policy.invalidate_cache()
        whole = policy.generate(
            {"input_ids": ids, "length": length[:, None]},
            stream(),
            max_new_tokens=NEW,
            stop_ids=STOP,
        )
        assert_same(policy, whole, by_step, ids, length, stream())
        if sampler != "greedy":  # ragged ends, or the test shows little
            assert len(set(whole.count.tolist())) > 2
        beyond = np.arange(whole.tokens.shape[1]) >= whole.count[:, None]
        assert not whole.tokens[beyond].any() and not whole.logprob[beyond].any()
        for i in range(N):
            response = whole.tokens[i, : whole.count[i]]
            assert not np.isin(response[:-1], STOP).any()
            assert np.isin(response[-1], STOP) or whole.count[i] == NEW

    def test_two_half_batches_equal_the_whole(
        self, make_model: Callable[..., Any], family: str, sampler: str
    ) -> None:
        policy = self.build(make_model, family, sampler)
        ids, length = prompts()
        whole = step_loop(policy, ids, length, stream())
        for half in (np.arange(0, 3), np.arange(3, 6)):
            part = step_loop(policy, ids[half], length[half], stream()[half], rows=half + 1)
            these = Generation(
                *(getattr(whole, f)[half] for f in ("tokens", "logprob", "value", "count"))
            )
            assert_same(policy, these, part, ids[half], length[half], stream()[half])

    def test_looking_rarely_changes_nothing(
        self,
        make_model: Callable[..., Any],
        family: str,
        sampler: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """The accelerator's loop, on the CPU."""
        policy = self.build(make_model, family, sampler)
        ids, length = prompts()
        obs = {"input_ids": ids, "length": length[:, None]}
        first = policy.generate(obs, stream(), max_new_tokens=NEW, stop_ids=STOP)
        monkeypatch.setattr(generation, "steps_between_looks", lambda device: ACCELERATOR_STEPS)
        policy.invalidate_cache()
        second = policy.generate(obs, stream(), max_new_tokens=NEW, stop_ids=STOP)
        assert_same(policy, first, second, ids, length, stream())
        # The cache now holds the responses: acting on them computes nothing again.
        decoder = policy._slot_decoder()
        assert decoder is not None
        before = decoder.prefilled_tokens
        ids[0, length[0] : length[0] + second.count[0]] = second.tokens[0, : second.count[0]]
        full = {"input_ids": ids[:1], "length": length[:1, None] + second.count[:1]}
        policy.act(full, stream(1))
        assert decoder.prefilled_tokens <= before + 1

    def test_on_a_cpu_no_row_is_forwarded_after_its_end(
        self,
        make_model: Callable[..., Any],
        family: str,
        sampler: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Though what was drawn is written down for several tokens at once."""
        policy = self.build(make_model, family, sampler)
        ids, length = prompts()
        obs = {"input_ids": ids, "length": length[:, None]}
        appended: list[int] = []
        written: list[int] = []
        append, note = SlotDecoder.append, generation._Responses._note

        def counted(self: SlotDecoder, tokens: Any, rows: Any) -> Any:
            appended.append(len(rows))
            return append(self, tokens, rows)

        def noted(self: Any, got: Any, which: Any) -> Any:
            written.append(len(got.action))
            return note(self, got, which)

        monkeypatch.setattr(SlotDecoder, "append", counted)
        monkeypatch.setattr(generation._Responses, "_note", noted)
        made = policy.generate(obs, stream(), max_new_tokens=NEW, stop_ids=STOP)
        assert sum(appended) == int((made.count - 1).sum())
        assert sum(written) == int(made.count.max())
        written.clear()
        policy.invalidate_cache()
        made = policy.generate(obs, stream(), max_new_tokens=20, stop_ids=())
        assert written == [8, 8, 4]
        assert (made.count == 20).all()


class TestKeys:
    def test_the_key_is_seed_stream_sample_and_position(self, policy: CausalLMPolicy) -> None:
        n = 400
        ids = np.zeros((n, 8), np.int64)
        obs = {"input_ids": ids, "length": np.full((n, 1), 4)}
        one = policy.act(obs, stream(n)).action
        assert (policy.act(obs, stream(n)).action == one).all()
        assert (policy.act(obs, stream(n), np.zeros(n, np.int64)).action == one).all()
        assert (policy.act(obs, stream(n), 1).action != one).mean() > 0.5
        assert (policy.act(obs, stream(n) + np.uint64(1)).action != one).mean() > 0.5
        other = CausalLMPolicy(policy.model, device="cpu", seed=1)
        assert (other.act(obs, stream(n)).action != one).mean() > 0.5
        reverse = policy.act(obs, stream(n)[::-1]).action
        assert (reverse[::-1] == one).all()

    def test_what_is_drawn_has_the_scored_distribution(self, policy: CausalLMPolicy) -> None:
        n = 4000
        ids = np.tile(np.arange(1, 7), (n, 1))
        act = policy.act({"input_ids": ids, "length": np.full((n, 1), 6)}, stream(n))
        with torch.no_grad():
            hidden = policy._hidden_all(torch.from_numpy(ids[:1]))[:, -1]
            probs = policy._logits(hidden).softmax(-1)[0].numpy()
        seen = np.bincount(act.action, minlength=VOCAB) / n
        assert np.abs(seen - probs).max() < 5 * np.sqrt(0.25 / n)
        np.testing.assert_allclose(act.logprob, np.log(probs[act.action]), atol=1e-5)

    def test_the_global_generators_are_left_alone(self, policy: CausalLMPolicy) -> None:
        torch.manual_seed(5)
        before = torch.get_rng_state()
        ids, length = prompts()
        obs = {"input_ids": ids, "length": length}
        policy.act(obs, stream())
        policy.generate(obs, stream(), max_new_tokens=3, stop_ids=())
        assert (torch.get_rng_state() == before).all()


class TestScoresEqualDraws:
    @pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
    @pytest.mark.parametrize("masked", [False, True])
    def test_old_logprobs_equal_recomputed_ones(
        self, make_model: Callable[..., Any], family: str, temperature: float, masked: bool
    ) -> None:
        """The ratio of PPO's first minibatch is 1, at any temperature and mask."""
        policy = CausalLMPolicy(
            make_model(family, vocab=VOCAB + 3),
            vocab_size=VOCAB,
            device="cpu",
            temperature=temperature,
        )
        with torch.no_grad():
            assert policy.value_head is not None
            policy.value_head.weight.fill_(0.1)
        ids, length = prompts()
        allowed = np.random.default_rng(1).random((N, VOCAB)) < 0.2
        allowed[:, 0] = True
        made = policy.generate(
            {"input_ids": ids, "length": length},
            stream(),
            max_new_tokens=NEW,
            stop_ids=STOP,
            action_mask=allowed if masked else None,
        )
        row, step = np.nonzero(np.arange(made.tokens.shape[1]) < made.count[:, None])
        ids[row, length[row] + step] = made.tokens[row, step]
        mask = torch.from_numpy(allowed[row]) if masked else None
        if masked:
            assert allowed[row, made.tokens[row, step]].all()
        batch = SequenceBatch(
            ids=torch.from_numpy(ids),
            lengths=torch.from_numpy(length + made.count),
            row=torch.from_numpy(row),
            col=torch.from_numpy(length[row] + step),
            action_mask=mask,
        )
        scored = policy.evaluate(batch)
        np.testing.assert_allclose(scored.logprob.detach(), made.logprob[row, step], atol=1e-4)
        assert scored.value is not None
        np.testing.assert_allclose(scored.value.detach(), made.value[row, step], atol=1e-4)


class TestBadInput:
    def obs(self, **changes: Any) -> dict[str, Any]:
        ids, length = prompts()
        return {"input_ids": ids, "length": length, **changes}

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"length": np.zeros(N, int)}, r"expected lengths in 1..25 \(L\)"),
            ({"length": np.full(N, 99)}, "lengths in"),
            ({"length": np.ones(3, int)}, r"got \[6, 25\] and 3 lengths"),
            ({"input_ids": np.full((N, 25), VOCAB)}, r"expected ids in 0..60 \(V - 1\), got 61"),
            ({"input_ids": np.full((N, 25), -2)}, "expected ids"),
            ({"input_ids": np.zeros((N, 49), int)}, "context holds 48 tokens.*may take 49"),
        ],
    )
    def test_observations(self, policy: CausalLMPolicy, changes: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            policy.act(self.obs(**changes), stream())

    def test_float_ids_and_streams(self, policy: CausalLMPolicy) -> None:
        with pytest.raises(TypeError, match="expected integers"):
            policy.act(self.obs(input_ids=np.zeros((N, 25))), stream())
        with pytest.raises(TypeError, match="stream: expected integers"):
            policy.act(self.obs(), np.zeros(N))
        with pytest.raises(ValueError, match="sample_index: expected one entry or 6, got 2"):
            policy.act(self.obs(), stream(), [0, 1])

    def test_rows(self, policy: CausalLMPolicy) -> None:
        for rows in ([0, 1], [0, 1, 2, 3, 4, 4], [-1, 0, 1, 2, 3, 4]):
            with pytest.raises(ValueError, match="expected 6 different slots"):
                policy.act(self.obs(), stream(), rows=rows)

    def test_masks(self, policy: CausalLMPolicy) -> None:
        mask = np.ones((N, VOCAB), bool)
        mask[2] = False
        with pytest.raises(ValueError, match="row 2 allows no token"):
            policy.act(self.obs(), stream(), action_mask=mask)
        with pytest.raises(ValueError, match=r"expected bool \[6, 61\]"):
            policy.act(self.obs(), stream(), action_mask=mask[:, 1:])

    def test_a_response_longer_than_the_context(self, policy: CausalLMPolicy) -> None:
        with pytest.raises(ValueError, match="context holds 48 tokens"):
            policy.generate(self.obs(), stream(), max_new_tokens=45, stop_ids=())
        with pytest.raises(ValueError, match="max_new_tokens"):
            policy.generate(self.obs(), stream(), max_new_tokens=0, stop_ids=())

    def test_what_padding_holds_does_not_matter(self, policy: CausalLMPolicy) -> None:
        ids, length = prompts()
        expected = policy.act({"input_ids": ids, "length": length}, stream())
        ids[np.arange(ids.shape[1]) >= length[:, None]] = -1
        found = policy.act(
            {"input_ids": torch.from_numpy(ids), "length": length[:, None]}, stream()
        )
        assert (found.action == expected.action).all()

    def test_broken_weights_are_named(self, policy: CausalLMPolicy) -> None:
        with torch.no_grad():
            next(policy.model.parameters())[0] = float("nan")
        with pytest.raises(FloatingPointError, match="weights hold NaN"):
            policy.act({"input_ids": np.zeros((2, 5), int), "length": [3, 3]}, stream(2))
