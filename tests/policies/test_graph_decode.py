"""Decoding by graphs: the step that a GPU captures, run on the CPU as it is.

It draws what the ordinary path draws, whatever the rows do; it has static shapes and no look of the
host; and what was computed ahead is used for the rows that went on, and for them only.
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from textgym import streams
from textgym.policies import CausalLMPolicy, generation, graph_decode, graph_step
from textgym.policies.graph_decode import GraphDecode
from textgym.policies.results import ActResult
from textgym.policies.slot_store import SlotStore
from textgym.policies.slot_window import window_attention
from textgym.sampling import Method, Sampler

VOCAB = 61
COLUMNS = 30


@pytest.fixture(autouse=True)
def graphs_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_decode, "DEVICES", ("cuda", "cpu"))


def build(model: Any, **settings: Any) -> CausalLMPolicy:
    policy = CausalLMPolicy(model, device="cpu", seed=4, temperature=1.3, **settings)
    if policy.value_head is not None:
        with torch.no_grad():
            policy.value_head.weight.normal_(generator=torch.Generator().manual_seed(3))
    return policy


def graphs_of(policy: CausalLMPolicy) -> GraphDecode:
    assert policy._decoder is not None and policy._decoder.graphs is not None
    return policy._decoder.graphs


class Forwards:
    """How many rows each forward of a policy's model reads, and how many tokens of each."""

    def __init__(self, policy: CausalLMPolicy) -> None:
        self.seen: list[tuple[int, ...]] = []
        policy.model.base_model.register_forward_pre_hook(
            lambda module, args, kwargs: self.seen.append(tuple(kwargs["input_ids"].shape)),
            with_kwargs=True,
        )

    def take(self) -> list[tuple[int, ...]]:
        seen, self.seen = self.seen, []
        return seen


class World:
    """Rows that mostly go on with their token, and now and then do anything else."""

    def __init__(self, rows: int, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.ids = self.rng.integers(0, VOCAB, (rows, COLUMNS))
        self.length = self.rng.integers(1, 9, rows)
        self.stream = streams.mix64(seed, np.arange(rows))

    def step(self, rows: np.ndarray, action: np.ndarray) -> None:
        for i, token in zip(rows, action, strict=True):
            rng, event, length = self.rng, self.rng.random(), self.length[i]
            if length >= COLUMNS - 3 or event < 0.06:  # another episode
                self.ids[i] = rng.integers(0, VOCAB, COLUMNS)
                self.length[i], self.stream[i] = rng.integers(1, 9), rng.integers(2**63)
            elif event < 0.1:  # the environment writes something else in its place
                self.ids[i, length] = (token + 1) % VOCAB
                self.length[i] += 1
            elif event < 0.14:  # it answers: several tokens at once
                self.ids[i, length] = token
                self.length[i] += 3
            elif event < 0.18:  # a rewritten prefix
                self.ids[i, length] = token
                self.ids[i, rng.integers(length)] = rng.integers(VOCAB)
                self.length[i] += 1
            elif event < 0.2 and length > 1:  # cut back
                self.length[i] -= 1
            elif event > 0.25:  # else the same observation again
                self.ids[i, length] = token
                self.length[i] += 1


class TestAct:
    @pytest.mark.parametrize(
        ("sampler", "attention"),
        [
            ("inverse_cdf", "sdpa"),
            ("inverse_cdf", "eager"),
            ("gumbel", "sdpa"),
            ("greedy", "sdpa"),
        ],
    )
    def test_draws_what_the_ordinary_path_draws_whatever_the_rows_do(
        self,
        make_model: Callable[..., Any],
        family: str,
        attention: str,
        sampler: Method,
        assert_same_draws: Callable[..., Any],
    ) -> None:
        model = make_model(family, attention=attention)
        fast = build(model, sampler=sampler)
        slow = build(copy.deepcopy(model), sampler=sampler, cuda_graphs=False)
        world = World(6, 0)
        for step in range(40):
            rows = np.arange(6)
            if step % 5 == 4:  # some of the rows, in any order
                rows = world.rng.permutation(6)[: world.rng.integers(1, 7)]
            ids, length, stream = world.ids[rows], world.length[rows], world.stream[rows]
            obs = {"input_ids": ids, "length": length[:, None]}
            one = fast.act(obs, stream, step % 2, rows=rows)
            other = slow.act(obs, stream, step % 2, rows=rows)
            keys = streams.mix64(4, stream, step % 2, length)
            assert_same_draws(slow, ids, length, keys, one, other)
            world.step(rows, one.action)

    def test_one_forward_a_token_that_starts_before_it_is_asked_for(
        self, make_model: Callable[..., Any]
    ) -> None:
        policy, n = build(make_model()), 6
        rng = np.random.default_rng(0)
        ids, length = rng.integers(0, VOCAB, (n, COLUMNS)), np.full(n, 5)
        stream, rows = streams.mix64(1, np.arange(n)), np.arange(n)

        def act(rows: np.ndarray) -> np.ndarray:
            obs = {"input_ids": ids[rows], "length": length[rows]}
            return policy.act(obs, stream[rows], rows=rows).action

        policy.act({"input_ids": ids, "length": length}, stream)
        policy.invalidate_cache()
        forwards = Forwards(policy)
        action = act(rows)
        assert forwards.take() == [(n, 5), (n, 1)]  # the prompts, and the step ahead
        for _ in range(4):
            ids[rows, length[rows]] = action
            length[rows] += 1
            action = act(rows)
            assert forwards.take() == [(n, 1)]  # only the next step ahead
        # Two rows end; one of them gets a new prompt, which alone is prefilled.
        ids[rows, length] = action
        length += 1
        ids[2], length[2], stream[2] = rng.integers(0, VOCAB, COLUMNS), 4, np.uint64(77)
        rows = np.array([0, 1, 2, 3, 5])
        action = act(rows)
        assert forwards.take() == [(1, 4), (n, 1)]
        ids[rows, length[rows]] = action
        length[rows] += 1
        act(rows)
        assert forwards.take() == [(n, 1)]

    def test_what_was_computed_ahead_is_not_used_for_anything_else(
        self, make_model: Callable[..., Any], assert_same_draws: Callable[..., Any]
    ) -> None:
        """Another stream, sample, sampler or weight: the same ids, but another draw."""
        model, n = make_model(), 64
        fast, slow = build(model), build(copy.deepcopy(model), cuda_graphs=False)
        ids = np.random.default_rng(0).integers(0, VOCAB, (n, 12))
        stream = streams.mix64(1, np.arange(n))

        def both(length: int, stream: Any, sample: int = 0, **settings: Any) -> ActResult:
            obs = {"input_ids": ids, "length": np.full(n, length)}
            one, other = (p.act(obs, stream, sample, **settings) for p in (fast, slow))
            keys = streams.mix64(4, stream, sample, length)
            same = assert_same_draws(slow, ids, np.full(n, length), keys, one, other)
            assert same.mean() > 0.95
            return one

        ids[:, 5] = both(5, stream).action
        ids[:, 6] = both(6, stream + np.uint64(1)).action
        ids[:, 7] = both(7, stream + np.uint64(1), 1).action
        ids[:, 8] = both(8, stream, 1, deterministic=True).action
        before = both(9, stream, 1, deterministic=True)
        with torch.no_grad():
            for policy in (fast, slow):
                policy.model.base_model.layers[0].mlp.down_proj.weight.neg_()
        # The keys of the new weights are held, and the draw was made with the old ones.
        with torch.no_grad():
            fast.logits({"input_ids": ids, "length": np.full(n, 9)})
        after = both(9, stream, 1, deterministic=True)
        assert (before.action != after.action).mean() > 0.2

    def test_more_rows_and_columns_later(
        self, make_model: Callable[..., Any], assert_same_draws: Callable[..., Any]
    ) -> None:
        model, rng = make_model(), np.random.default_rng(0)
        fast, slow = build(model), build(copy.deepcopy(model), cuda_graphs=False)
        ids = rng.integers(0, VOCAB, (20, 40))
        for n, columns, at in ((2, 10, 6), (2, 10, 7), (20, 10, 8), (20, 40, 9), (3, 12, 10)):
            length, stream = np.full(n, at), streams.mix64(1, np.arange(n))
            obs = {"input_ids": ids[:n, :columns], "length": length}
            one, other = fast.act(obs, stream), slow.act(obs, stream)
            assert_same_draws(slow, ids, length, streams.mix64(4, stream, 0, at), one, other)
            ids[:n, at] = one.action

    def test_rows_at_the_last_column(self, make_model: Callable[..., Any]) -> None:
        """Nothing can follow, so nothing is computed ahead; the others go on."""
        policy = build(make_model())
        ids = np.random.default_rng(0).integers(0, VOCAB, (3, 12))
        obs = {"input_ids": ids, "length": np.array([12, 11, 12])}
        first = policy.act(obs, np.arange(3))
        ids[1, 11] = first.action[1]
        forwards = Forwards(policy)
        obs["length"] = np.array([12, 12, 12])
        again = policy.act(obs, np.arange(3))
        assert forwards.take() == [(2, 1)]  # the same observations again: rows 0 and 2
        assert (again.action[[0, 2]] == first.action[[0, 2]]).all()

    def test_another_key_or_mask_draws_from_what_was_forwarded_ahead(
        self, make_model: Callable[..., Any], assert_same_draws: Callable[..., Any]
    ) -> None:
        """A learner with a generator of its own, and masks that only the environment knows."""
        model, n, rng = make_model(), 6, np.random.default_rng(0)
        fast, slow = build(model), build(copy.deepcopy(model), cuda_graphs=False)
        ids, rows = rng.integers(0, VOCAB, (n, 20)), np.arange(n)
        length = rng.integers(3, 9, n)
        forwards, expected = Forwards(fast), [(n, 1)]
        for step in range(8):
            stream = rng.integers(2**63, size=n).astype(np.uint64)
            mask = rng.random((n, VOCAB)) < 0.3 if step % 2 else None
            obs = {"input_ids": ids, "length": length}
            one = fast.act(obs, stream, action_mask=mask, deterministic=step == 5)
            assert forwards.take() == expected or step == 0
            other = slow.act(obs, stream, action_mask=mask, deterministic=step == 5)
            assert mask is None or mask[rows, one.action].all()
            if mask is None:
                keys = streams.mix64(4, stream, 0, length)
                assert_same_draws(slow, ids, length, keys, one, other)
            else:
                assert (one.action == other.action).all()
                np.testing.assert_allclose(one.logprob, other.logprob, atol=1e-4)
            ids[rows, length] = one.action
            length += 1
            expected = [(n, 1)]
            if step in (2, 3):  # one row begins again: it is prefilled, the others are ahead
                ids[1], length[1] = rng.integers(0, VOCAB, 20), 4
                expected = [(1, 4), (n, 1)]

    def test_cut_distributions_take_the_ordinary_path(self, make_model: Callable[..., Any]) -> None:
        policy = build(make_model(), top_k=3)
        obs = {"input_ids": np.ones((2, 8), np.int64), "length": np.array([4, 5])}
        policy.act(obs, np.arange(2))
        assert policy._decoder is not None and policy._decoder.graphs is None
        policy.act(obs, np.arange(2), deterministic=True)
        assert {sampler.method for _, _, sampler in graphs_of(policy).steps._programs} == {"greedy"}

    def test_broken_weights_are_named(self, make_model: Callable[..., Any]) -> None:
        policy = build(make_model())
        ids = np.random.default_rng(0).integers(0, VOCAB, (3, 8))
        policy.act({"input_ids": ids, "length": np.full(3, 4)}, np.arange(3))
        with torch.no_grad():
            policy.model.base_model.norm.weight.fill_(float("nan"))
        for length in (5, 5):
            with pytest.raises(FloatingPointError, match="weights hold NaN"):
                policy.act({"input_ids": ids, "length": np.full(3, length)}, np.arange(3))


class TestGenerate:
    @pytest.mark.parametrize("num_rows", [None, 5])
    @pytest.mark.parametrize("every", [1, 8])
    def test_writes_what_the_ordinary_path_writes(
        self,
        make_model: Callable[..., Any],
        family: str,
        every: int,
        num_rows: int | None,
        monkeypatch: pytest.MonkeyPatch,
        assert_same_responses: Callable[..., None],
    ) -> None:
        """Ragged prompts and ends, one or several looks a response, rows that are refilled."""
        monkeypatch.setattr(generation, "steps_between_looks", lambda device: every)
        model, n = make_model(family), 12
        fast, slow = build(model), build(copy.deepcopy(model), cuda_graphs=False)
        rng = np.random.default_rng(0)
        ids, length = rng.integers(0, VOCAB, (n, 9)), rng.integers(1, 10, n)
        stream, obs = streams.mix64(1, np.arange(n)), {"input_ids": ids, "length": length}
        settings: dict[str, Any] = {"max_new_tokens": 21, "stop_ids": (5, 17, 40)}
        found = fast.generate(obs, stream, num_rows=num_rows, **settings)
        expected = slow.generate(obs, stream, num_rows=num_rows, **settings)
        assert len(set(found.count.tolist())) > 3
        assert_same_responses(slow, ids, length, stream, found, expected)
        # The slots hold what was written: to act on it, only the last ids are forwarded.
        if num_rows is None:
            longest = int(found.count.max())
            full = np.zeros((n, 9 + longest), np.int64)
            full[:, :9] = ids
            row, step = np.nonzero(np.arange(longest) < found.count[:, None])
            full[row, length[row] + step] = found.tokens[row, step]
            forwards = Forwards(fast)
            fast.act({"input_ids": full, "length": length + found.count}, stream)
            assert forwards.take()[0] == (n, 1)

    def test_looks_once_for_several_tokens(
        self, make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(generation, "steps_between_looks", lambda device: 8)
        policy = build(make_model())
        obs = {"input_ids": np.ones((4, 6), int), "length": np.array([4, 6, 5, 4])}
        policy.generate(obs, np.arange(4), max_new_tokens=1, stop_ids=())
        graphs, taken = graphs_of(policy), []
        write = graphs.write
        monkeypatch.setattr(
            graphs,
            "write",
            lambda *arguments: taken.append(arguments[3].shape) or write(*arguments),
        )
        policy.generate(obs, np.arange(4), max_new_tokens=21, stop_ids=())
        assert taken == [(4, 8), (4, 8), (4, 5)]

    def test_masks_take_the_ordinary_path(self, make_model: Callable[..., Any]) -> None:
        policy = build(make_model())
        mask = np.zeros((2, VOCAB), bool)
        mask[:, [3, 7]] = True
        obs = {"input_ids": np.ones((2, 6), int), "length": np.array([4, 6])}
        made = policy.generate(obs, np.arange(2), max_new_tokens=9, stop_ids=(), action_mask=mask)
        assert np.isin(made.tokens, [3, 7]).all()
        assert policy._decoder is not None and policy._decoder.graphs is None


class TestSizes:
    def test_rows_are_brought_together_when_half_of_the_places_are_empty(
        self, make_model: Callable[..., Any], assert_same_draws: Callable[..., Any]
    ) -> None:
        model = make_model()
        fast, slow = build(model), build(copy.deepcopy(model), cuda_graphs=False)
        ids = np.random.default_rng(0).integers(0, VOCAB, (40, 20))
        stream = streams.mix64(1, np.arange(40))
        fast.act({"input_ids": ids, "length": np.full(40, 4)}, stream)
        forwards, sizes = Forwards(fast), []
        for at, live in enumerate(
            (range(40), range(5, 40), range(19, 40), range(1, 40, 2), [7]), 5
        ):
            rows = np.array(live)
            length = np.full(len(rows), at)
            obs = {"input_ids": ids[rows], "length": length}
            one = fast.act(obs, stream[rows], rows=rows)
            sizes.append(forwards.take()[-1][0])
            other = slow.act(obs, stream[rows], rows=rows)
            keys = streams.mix64(4, stream[rows], 0, at)
            assert_same_draws(slow, ids[rows], length, keys, one, other)
            ids[rows, at] = one.action
        assert sizes == [40, 40, 40, 20, 5]

    def test_columns_read_are_few_sizes_and_little_more_than_needed(
        self, make_model: Callable[..., Any]
    ) -> None:
        policy = build(make_model())
        policy.act({"input_ids": np.ones((2, 8), int), "length": np.full(2, 4)}, np.arange(2))
        steps = graphs_of(policy).steps
        steps.decoder.store.num_columns = 5000
        widths = [steps._width(needed) for needed in range(1, 5001)]
        assert all(width >= needed for needed, width in enumerate(widths, 1))
        assert all(width < 1.25 * needed for needed, width in enumerate(widths, 1) if needed > 256)
        assert len(set(widths)) < 30
        assert widths[0] == 64 and widths[-1] == 5000


class TestTheStep:
    """What a graph needs of the step that it captures."""

    def inputs(self, policy: CausalLMPolicy) -> tuple[Any, ...]:
        """A policy that has acted on 3 rows, and the arguments of its next step."""
        ids = np.random.default_rng(0).integers(0, VOCAB, (3, COLUMNS))
        policy.act({"input_ids": ids, "length": np.array([5, 8, 3])}, np.arange(3))
        steps = graphs_of(policy).steps
        return (
            policy,
            steps.decoder,
            steps._window,
            steps._inputs[:, :3],
            steps._turn,
            steps._log[:, :, :3],
            steps._columns[:20],
        )

    @pytest.mark.parametrize("compute_dtype", [None, "bfloat16"])
    @pytest.mark.parametrize("method", ["inverse_cdf", "gumbel", "greedy"])
    def test_asks_nothing_of_the_data(
        self, make_model: Callable[..., Any], family: str, method: Method, compute_dtype: str | None
    ) -> None:
        """With tensors that have a shape and no content, any look at what they hold is an error."""
        policy = build(make_model(family), compute_dtype=compute_dtype)
        arguments = self.inputs(policy)
        *objects, inputs, turn, log, columns = arguments
        with torch.inference_mode(), window_attention(objects[1].base):
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                fakes = [mode.from_tensor(x.clone()) for x in (inputs, turn, log, columns)]
                hidden = graph_step.decode_step(*objects, *fakes, Sampler(method, 1.3))
                assert tuple(hidden.shape) == (3, 32)
                with pytest.raises(DataDependentOutputException):  # such a step would be found out
                    int(fakes[0][0, 0])

    @pytest.mark.parametrize("method", ["inverse_cdf", "gumbel", "greedy"])
    def test_makes_no_tensor_of_the_hosts(
        self, make_model: Callable[..., Any], family: str, method: Method
    ) -> None:
        """A tensor made of Python numbers would be sent to the device, for which a graph waits."""

        class Record(TorchDispatchMode):
            def __init__(self) -> None:
                super().__init__()
                self.names: set[str] = set()

            def __torch_dispatch__(
                self, func: Any, types: Any, args: Any = (), kwargs: Any = None
            ) -> Any:
                self.names.add(func.name())
                return func(*args, **(kwargs or {}))

        *objects, inputs, turn, log, columns = self.inputs(build(make_model(family)))
        forbidden = {
            "aten::lift_fresh",
            "aten::_local_scalar_dense",
            "aten::nonzero",
            "aten::masked_select",
            "aten::equal",
            "aten::is_nonzero",
            "aten::_unique2",
        }
        with torch.inference_mode(), window_attention(objects[1].base), Record() as record:
            graph_step.decode_step(*objects, inputs, turn, log, columns, Sampler(method, 1.3))
            assert not record.names & forbidden
            assert "aten::index_copy_" in record.names  # it does record
            torch.tensor(1)
            assert record.names & forbidden == {"aten::lift_fresh"}

    def test_k_steps_are_k_times_one(
        self, make_model: Callable[..., Any], assert_same_draws: Callable[..., Any]
    ) -> None:
        """What is drawn becomes the next input without the host, with the key of its position."""
        model = make_model()
        fast, slow = build(model), build(copy.deepcopy(model), cuda_graphs=False)
        n, steps = 5, graph_step.STEPS
        ids, length = np.zeros((n, COLUMNS), np.int64), np.array([5, 8, 3, 1, 6])
        ids[:, :8] = np.random.default_rng(0).integers(0, VOCAB, (n, 8))
        rows, stream = np.arange(n), streams.mix64(1, np.arange(n))
        fast.act({"input_ids": ids, "length": length}, stream)
        decoder, graphs = fast._decoder, graphs_of(fast)
        assert decoder is not None
        for _ in range(2):
            decoder.fill(ids, length, rows)
            key = streams.mix64(4, stream[:, None], 0, length[:, None] + np.arange(steps))
            made = graphs.write(rows, ids[rows, length - 1], length - 1, key, fast.sampler)
            assert (decoder.held == length - 1 + steps).all()
            for k in range(steps):
                obs = {"input_ids": ids, "length": length}
                one = ActResult(*(field[k] for field in made))
                other = slow.act(obs, stream)
                assert_same_draws(slow, ids, length, key[:, k], one, other)
                ids[rows, length] = one.action
                length += 1
            assert (decoder.agreeing(ids, length, rows) == length - 1).all()

    def test_rows_that_go_beyond_the_last_column_harm_nobody(
        self, make_model: Callable[..., Any], assert_same_draws: Callable[..., Any]
    ) -> None:
        model = make_model()
        fast, slow = build(model), build(copy.deepcopy(model), cuda_graphs=False)
        ids = np.random.default_rng(0).integers(0, VOCAB, (3, 12))
        length, rows, stream = np.array([12, 4, 11]), np.arange(3), streams.mix64(1, np.arange(3))
        fast.act({"input_ids": ids, "length": length}, stream)
        decoder, graphs = fast._decoder, graphs_of(fast)
        assert decoder is not None
        decoder.fill(ids, length, rows)
        key = streams.mix64(4, stream[:, None], 0, length[:, None] + np.arange(8))
        made = graphs.write(rows, ids[rows, length - 1], length - 1, key, fast.sampler)
        for k in range(8):
            at = length[1] + k
            other = slow.act({"input_ids": ids[[1]], "length": [at]}, stream[[1]], rows=[1])
            one = ActResult(*(field[k, [1]] for field in made))
            assert_same_draws(slow, ids[[1]], np.array([at]), key[[1], k], one, other)
            ids[1, at] = one.action[0]
        assert decoder.held.tolist() == [12, 11, 12]
        assert (decoder.tokens[1, :11] == ids[1, :11]).all()

    def test_is_one_graph_for_torch_compile_whatever_its_size(
        self,
        make_model: Callable[..., Any],
        monkeypatch: pytest.MonkeyPatch,
        assert_same_draws: Callable[..., Any],
    ) -> None:
        graphs: list[Any] = []

        def backend(module: Any, example: Any) -> Any:
            graphs.append(module)
            return module.forward

        compiled = torch.compile
        monkeypatch.setattr(torch, "compile", lambda f, **kw: compiled(f, backend=backend, **kw))
        model = make_model(num_layers=1)
        fast = build(copy.deepcopy(model), cuda_graphs="compile")
        slow = build(model, cuda_graphs=False)
        ids = np.random.default_rng(0).integers(0, VOCAB, (40, 20))
        stream = streams.mix64(1, np.arange(40))
        for at, n in enumerate((40, 20, 3), 8):
            obs = {"input_ids": ids[:n], "length": np.full(n, at)}
            one, other = fast.act(obs, stream[:n]), slow.act(obs, stream[:n])
            keys = streams.mix64(4, stream[:n], 0, at)
            assert_same_draws(slow, ids, np.full(n, at), keys, one, other)
            ids[:n, at] = one.action
        assert len(graphs_of(fast).steps._programs) == 3
        assert len(graphs) == 1


class TestWhenToMakeGraphsAgain:
    def test_weights_updated_in_place_change_no_address(
        self, make_model: Callable[..., Any]
    ) -> None:
        policy = build(make_model(), compute_dtype="bfloat16")
        obs = {"input_ids": np.ones((2, 8), int), "length": np.full(2, 4)}
        before = policy.act(obs, np.arange(2))
        steps = graphs_of(policy).steps
        addresses = steps._addresses()
        optimizer = torch.optim.AdamW(policy.parameters(), lr=0.5)
        for parameter in policy.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        policy.load_state_dict(copy.deepcopy(policy.state_dict()))
        assert (policy.act(obs, np.arange(2)).logprob != before.logprob).all()
        assert graphs_of(policy).steps is steps and steps._addresses() == addresses

    def test_moved_weights_heads_and_adapters_do(self, make_model: Callable[..., Any]) -> None:
        policy = build(make_model(), lora=2)
        obs = {"input_ids": np.ones((2, 8), int), "length": np.full(2, 4)}
        policy.act(obs, np.arange(2))
        steps = graphs_of(policy).steps
        seen = [steps._addresses()]
        norm = policy._core.base_model.norm
        norm.weight.data = norm.weight.data.clone()
        seen.append(steps._addresses())
        policy.value_head = torch.nn.Linear(32, 1)
        seen.append(steps._addresses())
        with policy.model.disable_adapter():
            seen.append(steps._addresses())
        assert len(set(seen)) == 4
        before = steps._made_for
        policy.act(obs, np.arange(2))
        assert steps._made_for != before

    def test_the_cache_stays_where_it_is_when_graphs_refer_to_it(self) -> None:
        store = SlotStore(1)
        store.grow(2, 5)
        layer = store.slot_layers[0]
        layer.lazy_initialization(torch.ones(1, 3, 1, 4), torch.ones(1, 3, 1, 4))
        assert layer.keys is not None
        store.stays, version, address = True, store.version, layer.keys.data_ptr()
        layer.keys.fill_(float("nan"))
        store.forget()
        assert layer.keys is not None and layer.keys.data_ptr() == address
        assert not layer.keys.any() and store.version == version
        store.grow(3, 5)
        assert store.version > version
        store.stays, version = False, store.version
        store.forget()
        assert layer.keys is None and store.version > version


class TestRefusal:
    def obs(self) -> dict[str, Any]:
        return {"input_ids": np.ones((2, 8), int), "length": np.full(2, 4)}

    @pytest.mark.parametrize(
        ("wrong", "reason"),
        [
            (lambda out: torch.zeros_like(out), "differs from the ordinary one"),
            (lambda out: out * float("nan"), "differs from the ordinary one by inf"),
            (lambda out: out.reshape(1, 2, 3), "cannot be captured: RuntimeError"),
        ],
    )
    def test_a_model_that_does_something_else_is_found_out(
        self,
        make_model: Callable[..., Any],
        monkeypatch: pytest.MonkeyPatch,
        wrong: Callable[[Any], Any],
        reason: str,
    ) -> None:
        step = graph_step.decode_step
        monkeypatch.setattr(graph_step, "decode_step", lambda *args: wrong(step(*args)))
        model = make_model()
        policy, plain = build(model), build(model, cuda_graphs=False)
        with pytest.warns(UserWarning, match=f"LlamaForCausalLM.*without CUDA graphs: .*{reason}"):
            found = policy.act(self.obs(), np.arange(2))
        assert (found.action == plain.act(self.obs(), np.arange(2)).action).all()
        policy.act(self.obs(), np.arange(2))  # says so once
        with pytest.raises(RuntimeError, match=reason):
            build(make_model(), cuda_graphs=True).act(self.obs(), np.arange(2))

    def test_settings(
        self, make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with pytest.raises(ValueError, match=r"cuda_graphs: expected.*got 'yes'"):
            build(make_model(), cuda_graphs="yes")
        monkeypatch.setattr(graph_decode, "DEVICES", ("cuda",))
        with pytest.raises(ValueError, match=r'needs a policy on a CUDA device, .* on "cpu"'):
            build(make_model(), cuda_graphs=True)


def test_nothing_of_it_is_copied_or_outlives_the_policy(make_model: Callable[..., Any]) -> None:
    policy = build(make_model())
    obs = {"input_ids": np.ones((2, 8), int), "length": np.full(2, 4)}
    before = policy.act(obs, np.arange(2))
    twin = copy.deepcopy(policy)
    assert twin._decoder is None
    assert (twin.act(obs, np.arange(2)).action == before.action).all()
    assert graphs_of(twin).steps.policy is twin
    steps = graphs_of(policy).steps
    steps._programs.clear()  # on a CPU they hold the policy; a captured graph does not
    keys = weakref.ref(steps.decoder.store.slot_layers[0].keys)
    assert keys() is not None
    del steps
    gc.disable()
    try:
        del policy
        assert keys() is None
    finally:
        gc.enable()
