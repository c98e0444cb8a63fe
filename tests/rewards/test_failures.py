"""What a failing reward does: retried once, then unscored; the text's own fault is the worst."""

from fractions import Fraction

import numpy as np
import pytest

from textgym.rewards import (
    Reward,
    RewardError,
    TextBatch,
    TextFailure,
    as_reward,
    as_schedule,
    dense,
)

NAN, INF = float("nan"), float("inf")
BATCH = TextBatch.from_texts(["good", "bad", "fine"])


def pay(reward, batch=BATCH, **options):
    schedule = as_schedule(reward, **options)
    n = len(batch)
    tracks = [schedule.begin(row, "") for row in batch.rows]
    return schedule.pay(tracks, batch, np.full(n, True), np.full(n, False))


class Flaky:
    """Gives `bad` for the text "bad" the first `times` times."""

    def __init__(self, bad, times=10**9):
        self.bad, self.times, self.calls = bad, times, []

    def item(self, text):
        self.calls.append(text)
        if text == "bad" and self.calls.count("bad") <= self.times:
            if isinstance(self.bad, BaseException):
                raise self.bad
            return self.bad
        return 0.5

    def batch(self, texts):
        self.calls.append(list(texts))
        if len(self.calls) <= self.times:
            if isinstance(self.bad, BaseException):
                raise self.bad
            return self.bad
        return [0.5] * len(texts)


class Unspeakable(Exception):
    def __str__(self):
        raise ValueError("no words")


class Unshowable:
    def __repr__(self):
        raise ValueError("no picture")


ITEM_FAILURES = [
    (ValueError("boom"), "error: ValueError: boom"),
    (MemoryError(), "error: MemoryError"),
    (None, "none"),
    (NAN, "nan"),
    (INF, "inf"),
    (-INF, "inf"),
    (10**400, "inf"),
    (10**5000, "inf"),
    (Unspeakable(), "error: Unspeakable"),
    (Unshowable(), "type: Unshowable"),
    (np.float32("nan"), "nan"),
    ("0.5", "type: str"),
    (1 + 2j, "type: complex"),
    ((0.5,), "type: tuple"),
    ([0.5], "type: list"),
    (np.array([0.5]), "type: ndarray"),
    ({}, "type: dict"),
]


@pytest.mark.parametrize(("bad", "status"), ITEM_FAILURES, ids=[s for _, s in ITEM_FAILURES])
def test_a_failing_item_is_retried_once_and_then_alone_unscored(bad, status):
    flaky = Flaky(bad)
    payment = pay(as_reward(flaky.item))
    assert payment.reward.tolist() == [0.5, 0, 0.5]
    assert payment.status == [None, status, None]
    assert np.isnan(payment.components["item"][1])
    assert payment.components["item"][[0, 2]].tolist() == [0.5, 0.5]
    assert flaky.calls == ["good", "bad", "fine", "bad"]
    assert payment.traceback is not None
    if isinstance(bad, BaseException):
        assert "in item" in payment.traceback and type(bad).__name__ in payment.traceback
    else:
        assert "'item' returned" in payment.traceback and "'bad'" in payment.traceback


@pytest.mark.parametrize(
    "bad", [bad for bad, _ in ITEM_FAILURES], ids=[s for _, s in ITEM_FAILURES]
)
def test_an_item_that_fails_once_is_scored(bad):
    flaky = Flaky(bad, times=1)
    payment = pay(as_reward(flaky.item))
    assert payment.reward.tolist() == [0.5] * 3 and payment.status == [None] * 3
    assert flaky.calls == ["good", "bad", "fine", "bad"]


BATCH_FAILURES = [
    (ValueError("boom\nmore"), "error: ValueError: boom"),
    ([0.5, 0.5], "error: ValueError: a reward returned 2 values for 3 texts"),
    ([0.5] * 4, "error: ValueError: a reward returned 4 values for 3 texts"),
    (0.5, "error: TypeError: a reward over a batch must return a list of 3 values"),
    (None, "error: TypeError: a reward over a batch must return a list of 3 values"),
    ("abc", "error: TypeError: a reward over a batch"),
    ({"a": 1}, "error: TypeError: a reward over a batch"),
    (np.float64(0.5), "error: TypeError: a reward over a batch"),
]


@pytest.mark.parametrize(("bad", "status"), BATCH_FAILURES)
def test_a_failing_batch_is_retried_once_and_then_unscored_as_a_whole(bad, status):
    flaky = Flaky(bad)
    payment = pay(as_reward(flaky.batch))
    assert payment.reward.tolist() == [0, 0, 0]
    assert all(s.startswith(status) for s in payment.status)
    assert len(flaky.calls) == 2
    assert "Traceback" in payment.traceback
    flaky = Flaky(bad, times=1)
    payment = pay(as_reward(flaky.batch))
    assert payment.reward.tolist() == [0.5] * 3 and payment.status == [None] * 3


def test_a_bad_item_of_a_batch_is_retried_alone():
    calls = []

    def reward(texts):
        calls.append(list(texts))
        return [NAN if text == "bad" else 0.5 for text in texts]

    payment = pay(as_reward(reward))
    assert payment.status == [None, "nan", None] and payment.reward.tolist() == [0.5, 0, 0.5]
    assert calls == [["good", "bad", "fine"], ["bad"]]


@pytest.mark.parametrize(
    "good",
    [True, np.bool_(True), np.float32(1), np.int64(1), np.array(1.0), 1, Fraction(1)],
    ids=lambda value: type(value).__name__,
)
def test_what_counts_as_a_number(good):
    payment = pay(as_reward(lambda text: good))
    assert payment.reward.tolist() == [1, 1, 1] and payment.status == [None] * 3
    assert payment.reward.dtype == np.float64


def test_arrays_tuples_and_tensors_are_batches_of_values():
    torch = pytest.importorskip("torch")
    for made in (np.array, tuple, torch.tensor):
        payment = pay(as_reward(lambda texts, made=made: made([0.0, 1.0, 2.0])))
        assert payment.reward.tolist() == [0, 1, 2]
    assert pay(as_reward(lambda text: torch.tensor(0.5))).reward.tolist() == [0.5] * 3


@pytest.mark.parametrize(
    "bad", [bad for bad, _ in ITEM_FAILURES], ids=[s for _, s in ITEM_FAILURES]
)
def test_strict_raises_at_once(bad):
    flaky = Flaky(bad)
    with pytest.raises(RewardError, match=r"'item' failed \(.*strict=True"):
        pay(as_reward(flaky.item), strict=True)
    assert flaky.calls.count("bad") == 1
    with pytest.raises(RewardError):
        as_reward(Flaky(bad).item, strict=True).evaluate(BATCH)
    with pytest.raises(RewardError):
        pay(dense(Flaky(bad).item), strict=True)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_interrupts_propagate(error):
    for method in (Flaky(error()).item, Flaky(error()).batch):
        with pytest.raises(error):
            pay(as_reward(method))
        with pytest.raises(error):
            pay(dense(as_reward(method)))


def test_a_fault_of_the_text_is_the_worst_value_and_is_not_retried():
    flaky = Flaky(TextFailure("does not parse"))
    payment = pay(as_reward(flaky.item, low=-2.0))
    assert payment.reward.tolist() == [0.5, -2, 0.5] and payment.status == [None] * 3
    assert flaky.calls.count("bad") == 1
    # Under a negative weight the worst is `high`; in a product it is the product's own.
    payment = pay(-1 * as_reward(Flaky(TextFailure("x")).item, low=-2.0, high=3.0))
    assert payment.reward.tolist() == [-0.5, -3, -0.5]
    gate = as_reward(Flaky(TextFailure("x")).item)
    payment = pay(as_reward(lambda text: -0.5, low=-1.0, high=0.0) * gate)
    assert payment.reward.tolist() == [-0.25, -1, -0.25]
    pair = (as_reward(Flaky(TextFailure("x")).item) - as_reward(lambda text: 0.25)).named("pair")
    assert pay(pair).reward.tolist() == [0.25, -1, 0.25]


def test_a_batch_returns_the_fault_of_a_text_as_its_item():
    payment = pay(as_reward(lambda texts: [1, TextFailure("timeout"), 1], low=-1))
    assert payment.reward.tolist() == [1, -1, 1] and payment.status == [None] * 3


def test_a_service_failure_outweighs_a_fault_of_the_text():
    both = as_reward(Flaky(TextFailure("x")).item) * as_reward(Flaky(OSError("down")).item)
    assert pay(both).status == [None, "error: OSError: down", None]


def test_none_in_a_sum_means_does_not_apply():
    def sometimes(text):
        return None if text == "bad" else 1.0

    payment = pay(as_reward(sometimes) + 0.5 * as_reward(lambda text: 1.0, name="always"))
    assert payment.reward.tolist() == [1.5, 0.5, 1.5] and payment.status == [None] * 3
    assert np.isnan(payment.components["sometimes"][1])
    assert payment.components["always"].tolist() == [1, 1, 1]
    # ... but where nothing applies, there is no score.
    payment = pay(as_reward(sometimes) + as_reward(sometimes))
    assert payment.status == [None, "none", None] and payment.reward.tolist() == [2, 0, 2]
    # A metric does not count as a value.
    payment = pay(as_reward(sometimes) + 0 * as_reward(lambda text: 1.0))
    assert payment.status == [None, "none", None]
    with pytest.raises(RewardError, match="No part of the reward gave a value"):
        pay(as_reward(sometimes) + as_reward(sometimes), strict=True)


def test_nan_in_a_sum_is_a_failure():
    payment = pay(as_reward(Flaky(NAN).item) + as_reward(lambda text: 1.0))
    assert payment.status == [None, "nan", None] and payment.reward.tolist() == [1.5, 0, 1.5]


def test_a_failing_metric_warns_and_keeps_the_reward():
    flaky = Flaky(OSError("down"))
    schedule = as_schedule(as_reward(lambda text: 1.0) + 0 * as_reward(flaky.item, name="metric"))
    tracks = [schedule.begin({}, "") for _ in range(3)]
    ended = np.full(3, True)
    with pytest.warns(UserWarning, match="'metric'.*down"):
        payment = schedule.pay(tracks, BATCH, ended, ~ended)
    assert payment.reward.tolist() == [1, 1, 1] and payment.status == [None] * 3
    assert np.isnan(payment.components["metric"][1])
    assert schedule.pay(tracks, BATCH, ended, ~ended).status == [None] * 3  # warned once only


def test_totals_are_finite():
    huge = as_reward(lambda text: 1e308 if text == "bad" else 1.0)
    payment = pay(huge + huge)
    assert payment.status == [None, "inf", None] and payment.reward.tolist() == [2, 0, 2]


class Rude(Reward):
    def score(self, batch):
        batch.texts.clear()
        batch.token_ids.append([])
        for row in batch.rows:
            row["references"].clear()
        return [1.0] * len(batch.rows)


def test_a_reward_class_that_changes_its_batch_changes_a_copy():
    batch = TextBatch.from_texts(["a", "b"], [{"references": ["x"]}, {"references": ["y"]}])
    payment = pay(Rude() + Rude(), batch)
    assert payment.reward.tolist() == [2, 2]
    assert batch.texts == ["a", "b"] and batch.rows[0]["references"] == ["x"]


def test_a_reward_class_without_score_says_so():
    assert "Reward does not implement score" in pay(Reward()).status[0]


def test_compositions_inside_compositions_follow_the_same_rules():
    def sometimes(text):
        return None if text == "bad" else 1.0

    # None in a part of a named sum does not apply; None in all of it is no value.
    total = (as_reward(sometimes) + 0.5 * as_reward(lambda text: 1.0)).named("total")
    assert pay(total).reward.tolist() == [1.5, 0.5, 1.5]
    assert pay(total, strict=True).status == [None] * 3
    assert pay((as_reward(sometimes) + as_reward(sometimes)).named("x")).status[1] == "none"
    # A fault of the text in a factor of a part: the worst of the whole, scored by hand as well.
    gated = as_reward(lambda text: -0.5, low=-1.0) * as_reward(Flaky(TextFailure("x")).item)
    scores = (gated - as_reward(lambda text: 1.0)).named("x").evaluate(BATCH)
    assert scores.values.tolist() == [-1.25, -2, -1.25]
    assert scores.status == [None, "text: x", None]


@pytest.mark.parametrize("texts", ["abc", ["a", None], [b"a"], [1]])
def test_texts_that_are_no_strings_are_refused_where_they_come_in(texts):
    with pytest.raises(TypeError, match="expected texts as a list of strings, got"):
        TextBatch.from_texts(texts)
