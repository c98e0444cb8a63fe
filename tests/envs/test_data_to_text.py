"""Data to text: the grammar states the facts, references differ, and splits do not leak."""

from __future__ import annotations

import itertools
import re
from typing import Any

import numpy as np
import pytest

from textgym.envs.data_to_text import (
    HELDOUT_PAIRS,
    NAMES,
    PHRASES,
    PORTS,
    SLOTS,
    VALUES,
    WORDINGS,
    DataToTextEnv,
    draw_facts,
    ferry_row,
    linearise,
    phrase,
    say,
    split_of,
)
from textgym.envs.splits import SIZES, SPLITS, table
from textgym.rewards import Bleu, TextBatch
from textgym.streams import generator

FIRST_PROMPT = "name Falcon | kind barge | time dawn | trip 60 | fare free ="
FIRST_REFERENCE = "The barge Falcon departs at dawn, takes 60 minutes and is free."


def all_phrases(slot: str, value: str) -> set[str]:
    """Every wording of a fact in any form."""
    templates = PHRASES.get(f"{slot}={value}", PHRASES.get(slot, {}))
    words = WORDINGS.get(value, (value,)) if slot == "trip" else (value,)
    return {
        template.format(*(value.split() if slot == "route" else (word,)))
        for form in templates.values()
        for template in form
        for word in words
    }


@pytest.mark.parametrize("variety", [1, 2, 3])
def test_a_reference_states_every_fact_and_no_other(variety: int) -> None:
    for i in range(200):
        rng = generator(3, i)
        facts = draw_facts(rng, min_facts=1, max_facts=len(SLOTS))
        text = say(rng, facts, variety=variety)
        assert facts["name"] in text
        assert not (set(NAMES) - {facts["name"]}) & set(re.findall(r"\w+", text)), text
        lower = text.lower()
        for slot in SLOTS:
            if slot in facts:
                stated = {p.lower() for p in all_phrases(slot, facts[slot])}
                if slot == "kind":
                    stated.add(f"{facts['kind']} {facts['name']}".lower())
                assert any(p in lower for p in stated), (slot, facts, text)
            for value in VALUES[slot] if slot in ("kind", "season", "time") else ():
                if value != facts.get(slot):
                    assert value not in lower, (slot, value, text)
        assert re.fullmatch(r"([A-Z][^.]*\.)( [A-Z][^.]*\.)*", text), text


def test_rows_are_a_function_of_the_seed() -> None:
    first = [ferry_row(generator(5, i)) for i in range(20)]
    again = [ferry_row(generator(5, i)) for i in range(20)]
    other = [ferry_row(generator(6, i)) for i in range(20)]
    assert first == again
    assert first != other


def test_the_grammar_has_not_changed() -> None:
    """The default table is part of the environment's version."""
    row = table(ferry_row, "train")[0]
    assert row["prompt"] == FIRST_PROMPT
    assert row["references"][0] == FIRST_REFERENCE


def test_splits_share_no_input_whatever_the_seed_and_knobs() -> None:
    seen: dict[str, set[str]] = {split: set() for split in SPLITS}
    for split, seed, most in itertools.product(SPLITS, (0, 1), (2, 8)):
        for i in range(300):
            row = ferry_row(generator(seed, i), split=split, max_facts=most, references=1)
            seen[split].add(row["prompt"])
    for a, b in itertools.combinations(SPLITS, 2):
        assert not seen[a] & seen[b]


def test_test_inputs_combine_values_that_training_never_combines() -> None:
    def pairs(rows: Any) -> set[tuple[str, str]]:
        items = ([f"{s}={v}" for s, v in row["facts"].items()] for row in rows)
        return {pair for row in items for pair in itertools.combinations(row, 2)}

    train, test = table(ferry_row, "train"), table(ferry_row, "test")
    known = pairs(train)
    assert all(pairs([row]) - known for row in test)
    values = {f"{s}={v}" for row in train for s, v in row["facts"].items()}
    unknown = {f"{s}={v}" for row in test for s, v in row["facts"].items()} - values
    assert not unknown, "values themselves must be known; only their combination is new"
    share = np.mean([split_of(draw_facts(generator(9, i))) == "test" for i in range(2000)])
    # With 2 to 4 facts beside the name there are 3 to 10 pairs.
    assert 1 - (1 - 1 / HELDOUT_PAIRS) ** 3 < share < 1 - (1 - 1 / HELDOUT_PAIRS) ** 10


def test_tables_are_large_and_distinct() -> None:
    for split in SPLITS:
        rows = table(ferry_row, split)
        assert len(rows) == len({row["prompt"] for row in rows}) == SIZES[split]
        assert all(split_of(row["facts"]) == split for row in rows)
        assert all(row["prompt"] == linearise(row["facts"]) for row in rows)


def test_references_differ_really() -> None:
    rows = table(ferry_row, "test")
    assert np.mean([len(row["references"]) for row in rows]) > 7.9
    assert all(len(set(row["references"])) == len(row["references"]) for row in rows)
    firsts = [row["references"][0] for row in rows]
    one = [[row["references"][1]] for row in rows]
    rest = [row["references"][1:] for row in rows]
    assert mean_bleu(firsts, one) < 0.5, "one reference should say little about another"
    assert 0.6 < mean_bleu(firsts, rest) < 0.8, "the ceiling in the documentation"
    orders = [len({_order(row["facts"], text) for text in row["references"]}) for row in rows]
    counts = [len({text.count(".") for text in row["references"]}) for row in rows]
    assert np.mean(orders) > 2
    assert np.mean(counts) > 1.5


def test_variety_is_a_knob() -> None:
    spread = []
    for variety in (1, 2, 3):
        rows = [
            ferry_row(generator(1, i), min_facts=3, max_facts=3, references=4, variety=variety)
            for i in range(150)
        ]
        spread.append(
            mean_bleu([r["references"][0] for r in rows], [r["references"][1:] for r in rows])
        )
        if variety == 1:
            assert all(
                len({_order(r["facts"], t) for t in r["references"]}) == 1
                for r in rows
                if "route" not in r["facts"]
            )
    assert spread[0] > spread[1] > spread[2]


def test_number_of_facts_is_a_knob() -> None:
    for count in (1, 4, 8):
        row = ferry_row(generator(0, count), min_facts=count, max_facts=count)
        assert len(row["facts"]) == count + 1
        assert list(row["facts"]) == ["name", *(s for s in SLOTS if s in row["facts"])]


@pytest.mark.parametrize(
    "knobs",
    [
        {"min_facts": 0},
        {"min_facts": 5},
        {"max_facts": 9},
        {"references": 0},
        {"variety": 4},
        {"split": "dev"},
    ],
)
def test_knobs_out_of_range_are_refused(knobs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"expected|split must be"):
        DataToTextEnv(**knobs)


def test_prompts_and_references_are_short_in_the_embedded_tokenizer() -> None:
    task = DataToTextEnv(split="test").task
    longest = max(
        len(task.tokenizer.backend.encode(text, add_special_tokens=False).ids)
        for row in task.prompts
        for text in row["references"]
    )
    assert task.prompt_length.max() <= task.max_prompt_tokens <= 40
    assert longest < task.max_new_tokens <= 40
    assert DataToTextEnv(split="train").observation_space == DataToTextEnv().observation_space
    for i in range(500):
        prompt = linearise(draw_facts(generator(1, i), min_facts=8, max_facts=8))
        assert len(task.tokenizer.encode(prompt)) <= 4 + 4 * 8


def test_phrases_fit_their_slots() -> None:
    for slot, values in VALUES.items():
        for value in values[:20]:
            for form in ("verb", "ing", "clause"):
                text = phrase(generator(0), slot, value, form)
                assert "{" not in text
                assert text[0].islower() or text.split()[0] in PORTS


def _order(facts: dict[str, str], text: str) -> tuple[str, ...]:
    """Slots in the order in which a text mentions them."""
    lower = text.lower()
    at = {}
    for slot, value in facts.items():
        if slot in ("name", "kind"):
            continue
        found = [lower.find(p.lower()) for p in all_phrases(slot, value)]
        at[slot] = min(i for i in found if i >= 0)
    return tuple(sorted(at, key=at.__getitem__))


def mean_bleu(texts: list[str], references: list[list[str]]) -> float:
    batch = TextBatch.from_texts(texts, [{"references": r} for r in references])
    return float(np.mean(np.asarray(Bleu().score(batch), float)))
