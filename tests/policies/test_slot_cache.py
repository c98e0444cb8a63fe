"""The slot cache equals the full forward, and computes only what changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from textgym.policies.cache_support import make_slot_decoder
from textgym.policies.slot_cache import PREFILL_TOKENS, SlotDecoder, _batches

VOCAB = 61
COLUMNS = 30


def from_config(config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    return auto.from_config(config)


def make_decoder(model: Any) -> SlotDecoder:
    decoder = make_slot_decoder(model.base_model, VOCAB)
    assert isinstance(decoder, SlotDecoder), decoder
    decoder.prefilled_rows = decoder.prefilled_tokens = 0
    return decoder


@torch.no_grad()
def gap(decoder: SlotDecoder, model: Any, ids: Any, length: Any, rows: Any = None) -> float:
    """Largest difference of logits between the cache and the full forward."""
    hidden = decoder.hidden(ids, length, rows)
    full = model.base_model(input_ids=torch.from_numpy(ids), use_cache=False).last_hidden_state
    full = full[torch.arange(len(ids)), torch.from_numpy(length - 1)]
    head = model.get_output_embeddings()
    return float((head(hidden) - head(full)).abs().max())


class World:
    """Rows that grow, reset, are rewritten and stand still at random."""

    def __init__(self, rows: int, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.ids = self.rng.integers(0, VOCAB, (rows, COLUMNS))
        self.length = self.rng.integers(1, 9, rows)
        self.prompts = self.rng.integers(0, VOCAB, (3, 8))

    def change(self, i: int) -> None:
        rng, event = self.rng, self.rng.random()
        if self.length[i] > COLUMNS - 4 or event < 0.08:  # reset, often to a shared prompt
            self.ids[i] = rng.integers(0, VOCAB, COLUMNS)
            self.length[i] = rng.integers(1, 9)
            if rng.random() < 0.6:
                self.ids[i, :8] = self.prompts[rng.integers(3)]
                self.length[i] = 8
        elif event < 0.15:  # a rewritten prefix
            at = rng.integers(self.length[i])
            self.ids[i, at] = (self.ids[i, at] + 1) % VOCAB
        elif event < 0.22:  # several tokens at once
            self.length[i] += rng.integers(2, 4)
        elif event < 0.27 and self.length[i] > 1:  # cut back
            self.length[i] -= 1
        elif event > 0.33:  # one token; else the same observation again
            self.length[i] += 1


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_equals_the_full_forward_whatever_happens(
    make_model: Callable[..., Any], family: str, attention: str
) -> None:
    model = make_model(family, attention=attention)
    decoder = make_decoder(model)
    for seed in range(2):
        world = World(6, seed)
        for step in range(80):
            rows = None
            if step % 3:  # some of the rows, in any order
                rows = world.rng.permutation(6)[: world.rng.integers(1, 7)]
            some = np.arange(6) if rows is None else rows
            assert gap(decoder, model, world.ids[some], world.length[some], rows) < 1e-4
            for i in some:
                world.change(i)


def test_slots_and_columns_grow_on_demand(make_model: Callable[..., Any]) -> None:
    model, rng = make_model(), np.random.default_rng(0)
    decoder = make_decoder(model)
    ids = rng.integers(0, VOCAB, (9, 40))
    for rows, columns, length in ((2, 10, 6), (5, 10, 7), (5, 40, 8), (9, 40, 9), (3, 12, 10)):
        assert gap(decoder, model, ids[:rows, :columns], np.full(rows, length)) < 1e-4
    decoder.prefilled_tokens = 0
    assert gap(decoder, model, ids[3:5], np.full(2, 9), np.array([3, 4])) < 1e-4
    assert decoder.prefilled_tokens == 0  # what the slots held survived all that growth


def test_prefills_only_what_changed(make_model: Callable[..., Any]) -> None:
    model, rng = make_model(), np.random.default_rng(0)
    decoder = make_decoder(model)
    ids = rng.integers(0, VOCAB, (4, 20))
    length = np.array([5, 5, 7, 3])
    gap(decoder, model, ids, length)
    assert (decoder.prefilled_rows, decoder.prefilled_tokens) == (4, 20)
    gap(decoder, model, ids, length)  # the same observation
    gap(decoder, model, ids, length + 1)  # one token each
    assert decoder.prefilled_tokens == 20
    gap(
        decoder, model, ids, length + np.array([1, 4, 1, 1])
    )  # three more for row 1: two to prefill
    assert (decoder.prefilled_rows, decoder.prefilled_tokens) == (5, 22)
    ids[2, 4] = (ids[2, 4] + 1) % VOCAB  # columns 4 to 6 of 8 held ones; the last is decoded
    gap(decoder, model, ids, length + np.array([1, 4, 1, 1]))
    assert (decoder.prefilled_rows, decoder.prefilled_tokens) == (6, 25)


def test_equal_prompts_are_prefilled_once(make_model: Callable[..., Any]) -> None:
    model, rng = make_model(), np.random.default_rng(0)
    decoder = make_decoder(model)
    ids = np.repeat(rng.integers(0, VOCAB, (2, 20)), 4, 0)
    length = np.repeat([9, 6], 4)
    assert gap(decoder, model, ids, length) < 1e-4
    assert (decoder.prefilled_rows, decoder.prefilled_tokens) == (2, 15)
    ids[:, 6:] = rng.integers(0, VOCAB, (8, 14))
    ids[:4, 6:9] = ids[0, 6:9]
    ids[:4, :6] = ids[4, :6]  # now all eight begin alike; rows 0 to 3 must be computed again, once
    before = decoder.prefilled_tokens
    assert gap(decoder, model, ids, length + 1) < 1e-4
    assert decoder.prefilled_tokens - before == 9


def test_a_prompt_that_another_row_holds_is_copied(make_model: Callable[..., Any]) -> None:
    """Members of a group that begin later, on rows that others have left."""
    model, rng = make_model(), np.random.default_rng(0)
    decoder = make_decoder(model)
    ids = rng.integers(0, VOCAB, (4, 20))
    ids[:2, :7] = ids[0, :7]
    assert gap(decoder, model, ids[:1], np.array([11]), np.array([0])) < 1e-4
    before = decoder.prefilled_tokens
    assert gap(decoder, model, ids[1:2], np.array([7]), np.array([1])) < 1e-4
    assert decoder.prefilled_tokens == before
    assert gap(decoder, model, ids, np.array([12, 8, 5, 6]), np.arange(4)) < 1e-4
    ids[2], ids[3, :11] = ids[1], ids[0, :11]  # at once: from a row that is rewritten meanwhile too
    before = decoder.prefilled_tokens
    ids[0] = ids[3, ::-1]
    assert gap(decoder, model, ids, np.array([9, 9, 9, 12]), np.arange(4)) < 1e-4
    assert decoder.prefilled_tokens - before == 8  # of the first row alone


def test_finished_rows_are_not_computed(make_model: Callable[..., Any]) -> None:
    model = make_model()
    decoder = make_decoder(model)
    seen: list[int] = []
    hook = model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    ids = np.random.default_rng(0).integers(0, VOCAB, (8, 20))
    for step, live in enumerate(([*range(8)], [0, 2, 3, 5, 6, 7], [2, 3, 7], [3], [3])):
        rows = np.array(live)
        decoder.hidden(ids[rows], np.full(len(rows), 5 + step), rows)
    hook.remove()
    assert seen == [8, 6, 3, 1, 1]


def test_holes_are_filled_so_that_reading_needs_no_copy(make_model: Callable[..., Any]) -> None:
    model = make_model()
    decoder = make_decoder(model)
    ids = np.random.default_rng(0).integers(0, VOCAB, (8, 20))
    gap(decoder, model, ids, np.full(8, 5))
    rows = np.array([0, 1, 2, 4, 5, 7])
    assert gap(decoder, model, ids[rows], np.full(6, 6), rows) < 1e-4
    assert decoder.store.plan.start == 0 and decoder.store.plan.column == 5
    # Groups that alternate stay where they are: moving them would never end.
    before = decoder.slot.copy()
    for step in range(3):
        for rows in (np.arange(0, 8, 2), np.arange(1, 8, 2)):
            assert gap(decoder, model, ids[rows], np.full(4, 7 + step), rows) < 1e-4
    assert (decoder.slot == before).all()


def test_nan_left_in_memory_never_comes_back(make_model: Callable[..., Any]) -> None:
    model = make_model()
    decoder = make_decoder(model)
    ids = np.random.default_rng(0).integers(0, VOCAB, (3, 20))
    gap(decoder, model, ids, np.full(3, 9))
    with torch.inference_mode():
        for layer in decoder.store.slot_layers:
            assert layer.values is not None
            layer.values.fill_(float("nan"))  # as after a forward with broken weights
    decoder.clear()
    assert gap(decoder, model, ids, np.array([2, 4, 3])) < 1e-4
    assert gap(decoder, model, ids, np.array([3, 5, 4])) < 1e-4


def test_an_interrupted_forward_leaves_nothing_behind(make_model: Callable[..., Any]) -> None:
    model = make_model()
    decoder = make_decoder(model)
    ids = np.random.default_rng(0).integers(0, VOCAB, (3, 20))
    gap(decoder, model, ids, np.full(3, 5))

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    hook = model.base_model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        decoder.hidden(ids, np.full(3, 6))
    hook.remove()
    assert not decoder.held.any()
    assert gap(decoder, model, ids, np.full(3, 6)) < 1e-4


def test_prefill_forwards_hold_little_padding() -> None:
    counts = np.array([3, 100, 98, 30, 26, 24, 1, 2])
    batches = _batches(counts)
    assert sorted(np.concatenate(batches).tolist()) == list(range(8))
    for part in batches:
        assert counts[part].min() * 4 >= counts[part].max()
    assert len(batches) == 3
    many = _batches(np.full(5000, 100))
    assert max(map(len, many)) * 100 <= PREFILL_TOKENS
    assert sum(map(len, many)) == 5000


class TestSupport:
    """Who gets the cache is asked of the model: of its configuration, then of a trial run."""

    def test_families_of_the_llama_kind(self) -> None:
        import transformers as hf

        small: dict[str, Any] = dict(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
        )
        for config in (
            hf.MistralConfig(**small, sliding_window=None),
            hf.Qwen2Config(**small),
            hf.Qwen3Config(**small, head_dim=8),
        ):
            model: Any = from_config(config)
            decoder = make_decoder(model.eval())
            ids = np.random.default_rng(0).integers(0, VOCAB, (3, 20))
            for length in ([4, 7, 7], [5, 8, 8], [9, 9, 9]):
                assert gap(decoder, model, ids, np.array(length)) < 1e-4

    def test_sliding_windows_and_moving_frequencies_are_refused(self) -> None:
        import transformers as hf

        small: dict[str, Any] = dict(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
        )
        dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
        cases = [
            (hf.MistralConfig(**small, sliding_window=16), "sliding window of 16"),
            (hf.LlamaConfig(**small, rope_parameters=dynamic), "rotary frequencies"),
            (
                hf.Qwen2Config(
                    **small, use_sliding_window=True, sliding_window=8, max_window_layers=1
                ),
                "not all full attention",
            ),
        ]
        for config, reason in cases:
            model: Any = from_config(config)
            refusal = make_slot_decoder(model.eval().base_model, VOCAB)
            assert isinstance(refusal, str) and reason in refusal

    def test_a_model_that_ignores_positions_is_found_out(
        self, make_model: Callable[..., Any]
    ) -> None:
        model = make_model()
        base = model.base_model
        forward = base.forward

        def deaf(**kwargs: Any) -> Any:
            if kwargs.get("position_ids") is not None:
                kwargs["position_ids"] = kwargs["position_ids"] * 0
            return forward(**kwargs)

        base.forward = deaf
        refusal = make_slot_decoder(base, VOCAB)
        assert isinstance(refusal, str) and "differs from the full forward" in refusal

        def broken(**kwargs: Any) -> Any:
            if kwargs.get("past_key_values") is not None:
                raise AttributeError("no such cache")
            return forward(**kwargs)

        base.forward = broken
        refusal = make_slot_decoder(base, VOCAB)
        assert isinstance(refusal, str) and "AttributeError: no such cache" in refusal
