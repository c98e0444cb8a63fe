"""Terminal and dense payment: totals, ends, mixtures, copies, failures."""

import copy
import math
import pickle
import random

import numpy as np
import pytest

from textgym.rewards import (
    Bleu,
    ExactMatch,
    LengthPenalty,
    Reward,
    RewardColumnError,
    RewardError,
    Rouge,
    Schedule,
    TextBatch,
    TextFailure,
    as_reward,
    as_schedule,
    dense,
    terminal,
)

ROW = {"references": ["the cat sat on the mat", "a cat sat, on a mat"]}
PIECES = ["the", " cat", " sat", " on", " a", " mat", ",", " dog", "s", ".", "\n", "-\n", ""]


class Plain(Reward):
    """A cheap reward of the text alone, so that nothing is warned of."""

    cheap = True
    reads_only = True

    def __init__(self, function, name="plain", low=-10.0, high=10.0):
        self.function, self.name, self.low, self.high = function, name, low, high

    def score(self, batch):
        return [self.function(text) for text in batch.texts]


LENGTH = Plain(lambda text: float(len(text)), "length")
WAVE = Plain(lambda text: math.sin(len(text)), "wave")


def run(schedule, texts, end="terminated", row=ROW):
    """Pay an episode whose text grows through `texts`; give the payments of its steps."""
    track, payments = schedule.begin(row, ""), []
    for t, text in enumerate(texts):
        last = t == len(texts) - 1
        if last or schedule.every_step:
            payments.append(
                schedule.pay(
                    [track],
                    TextBatch.from_texts([text], [row]),
                    np.array([last and end == "terminated"]),
                    np.array([last and end == "truncated"]),
                )
            )
    return payments


def rewards(payments):
    return [float(payment.reward[0]) for payment in payments]


def discounted(payments, gamma=1.0):
    return sum(gamma**t * r for t, r in enumerate(rewards(payments)))


def growing(seed, steps=12):
    rng, texts = random.Random(seed), [""]
    for _ in range(steps):
        texts.append(texts[-1] + rng.choice(PIECES))
    return texts[1:]


def outcome(reward, text, row=ROW):
    return float(as_reward(reward).evaluate(TextBatch.from_texts([text], [row])).values[0])


# --- terminal ----------------------------------------------------------------------------------


def test_terminal_pays_finished_rows_only_and_asks_for_nothing_else():
    asked = []
    schedule = terminal(Plain(lambda text: asked.append(text) or 1.5))
    tracks = [schedule.begin({}, "") for _ in range(4)]
    payment = schedule.pay(
        tracks,
        TextBatch.from_texts(["live", "done", "cut", "both"]),
        np.array([False, True, False, True]),
        np.array([False, False, True, True]),
    )
    assert payment.reward.tolist() == [0, 1.5, 0, 1.5]
    assert np.isnan(payment.components["plain"]).tolist() == [True, False, True, False]
    assert payment.status == [None] * 4 and payment.traceback is None
    assert asked == ["done", "both"]
    assert not schedule.every_step and schedule.gamma is None


def test_components_are_unweighted_and_named_without_duplicates():
    schedule = as_schedule(0.5 * LENGTH + LENGTH * 2 + 0 * LENGTH + WAVE - 1 * LENGTH.named("l"))
    assert schedule.names == ("length", "length_2", "length_3", "wave", "l")
    payment = run(schedule, ["abc"])[0]
    assert {k: v[0] for k, v in payment.components.items()} == {
        **{"length": 3.0, "length_2": 3.0, "length_3": 3.0, "wave": math.sin(3), "l": 3.0}
    }
    assert payment.reward[0] == pytest.approx(1.5 + 6 + math.sin(3) - 3)
    taken = as_schedule(LENGTH.named("a_2") + LENGTH.named("a") + WAVE.named("a"))
    assert taken.names == ("a_2", "a", "a_3")


@pytest.mark.parametrize("schedule", [terminal, dense])
def test_sub_goals_are_sums_in_sums_and_all_of_them_are_logged(schedule):
    style = 0.5 * Rouge("rouge1").named("style/words") + 0.25 * Rouge().named("style/order")
    goals = 0.8 * Bleu().named("answer") + 0.2 * style + 0 * style.named("style")
    paid = schedule(goals)
    assert paid.names == ("answer", "style/words", "style/order", "style")
    texts = ["the", "the cat", "the cat sat"]
    payments = run(paid, texts)
    found = {
        name: sum(float(np.nan_to_num(p.components[name][0])) for p in payments)
        for name in paid.names
    }
    words, order = outcome(Rouge("rouge1"), texts[-1]), outcome(Rouge(), texts[-1])
    assert found["answer"] == pytest.approx(outcome(Bleu(), texts[-1]))
    assert (found["style/words"], found["style/order"]) == pytest.approx((words, order))
    assert found["style"] == pytest.approx(0.5 * words + 0.25 * order)
    assert discounted(payments) == pytest.approx(0.8 * found["answer"] + 0.2 * found["style"])


# --- dense -------------------------------------------------------------------------------------

DENSE_REWARDS = {
    "cursor": Bleu(),
    "sum": 0.5 * Bleu() + 0.5 * Rouge(),
    "product": Bleu() * Rouge("rouge1"),
    "named": (Bleu() - 0.5 * Rouge()).named("mix"),
    "rescored": WAVE,
    "mixed": Bleu() - 2 * WAVE,
    "negative": -1 * Bleu(),
}


@pytest.mark.parametrize("gamma", [1.0, 0.99, 0.5])
@pytest.mark.parametrize("reward", DENSE_REWARDS.values(), ids=DENSE_REWARDS)
@pytest.mark.parametrize("potential", [None, Plain(lambda text: len(text) / 7 + 1)])
def test_a_terminated_episode_sums_to_its_outcome(reward, gamma, potential):
    for seed in range(4):
        texts = growing(seed)
        payments = run(dense(reward, potential, gamma), texts)
        assert len(payments) == len(texts)
        expected = gamma ** (len(texts) - 1) * outcome(reward, texts[-1])
        assert discounted(payments, gamma) == pytest.approx(expected, abs=1e-12)
        assert any(abs(r) > 1e-3 for r in rewards(payments)[:-1])


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("reward", DENSE_REWARDS.values(), ids=DENSE_REWARDS)
def test_a_truncated_episode_keeps_its_potential_and_pays_no_outcome(reward, gamma):
    texts = growing(9)
    payments = run(dense(reward, gamma=gamma), texts, end="truncated")
    expected = gamma ** len(texts) * outcome(reward, texts[-1])
    assert discounted(payments, gamma) == pytest.approx(expected, abs=1e-12)


def test_dense_by_hand():
    # phi: 1, 3, 2 and the outcome is 4; gamma 0.5
    phi = Plain(dict(a=1.0, aa=3.0, aaa=2.0).__getitem__, "phi")
    last = Plain(lambda text: 4.0, "last")
    texts = ["a", "aa", "aaa"]
    # 0.5*1 - 0, 0.5*3 - 1, 0 - 3 + 4
    assert rewards(run(dense(last, potential=phi, gamma=0.5), texts)) == [0.5, 0.5, 1.0]
    # ..., 0.5*2 - 3
    assert rewards(run(dense(last, phi, 0.5), texts, "truncated")) == [0.5, 0.5, -2.0]
    # the reward as its own potential: ..., 2 - 3
    assert rewards(run(dense(phi, gamma=0.5), texts)) == [0.5, 0.5, -1.0]


def test_the_components_of_a_potential_of_its_own():
    schedule = dense(WAVE, potential=LENGTH)
    assert schedule.names == ("wave", "length")
    payments = run(schedule, ["a", "ab", "abc"])
    shaping = [float(p.components["length"][0]) for p in payments]
    assert shaping == [1, 1, -2]
    assert [float(p.components["wave"][0]) for p in payments][-1] == math.sin(3)
    assert np.isnan(payments[0].components["wave"][0])
    assert (schedule.low, schedule.high) == (-10, 10)


def test_the_potential_alone_is_not_asked_about_the_last_text():
    asked = []
    phi = Plain(lambda text: asked.append(text) or 1.0)
    run(dense(WAVE, potential=phi), ["a", "ab"])
    assert asked == ["a"]


def test_a_text_that_does_not_extend_the_last_one():
    # Bytes that became a character, a space that was cleaned up, a stop string that was cut off.
    texts = ["the c\ufffd", "the caf", "the", "the cat", "the  cat", "the cat sat", "the cat"]
    for reward in (Bleu(), Rouge(), Bleu() * Rouge()):
        payments = run(dense(reward), texts)
        assert discounted(payments) == pytest.approx(outcome(reward, texts[-1]), abs=1e-12)
        values = np.cumsum(rewards(payments))
        for text, value in zip(texts, values, strict=True):
            assert value == pytest.approx(outcome(reward, text), abs=1e-12)


def test_a_cursor_is_fed_only_what_is_new():
    pushed = []

    class Spy:
        def push(self, piece):
            pushed.append(piece)
            return 0.5

    class Spied(Plain):
        def begin(self, row):
            return Spy()

    run(dense(Spied(None)), ["ab", "ab", "abc", "x", "xy"])
    assert pushed == ["ab", "c", "x", "y"]


def test_rescoring_warns_once_for_a_schedule_and_not_where_it_is_cheap():
    schedule = dense(as_reward(lambda text: len(text), name="slow"))
    with pytest.warns(UserWarning, match="'slow' has no cursor") as caught:
        run(schedule, ["a", "ab"])
        run(schedule, ["a", "ab"])
    assert len(caught) == 1
    run(dense(ExactMatch() + LengthPenalty()), ["a", "ab"])  # warnings are errors here


def test_rows_are_independent_and_in_any_mixture_of_ends():
    schedule = dense(Bleu(), gamma=0.9) + 0.5 * WAVE
    texts = [growing(seed) for seed in range(5)]
    ends = ["terminated", "truncated", "terminated", "truncated", "terminated"]
    alone = [rewards(run(schedule, t, end)) for t, end in zip(texts, ends, strict=True)]
    terminated = np.array([end == "terminated" for end in ends])
    tracks = [schedule.begin(ROW, "") for _ in texts]
    together = []
    for t in range(len(texts[0])):
        last = t == len(texts[0]) - 1
        batch = TextBatch.from_texts([text[t] for text in texts], [ROW] * 5)
        payment = schedule.pay(tracks, batch, terminated & last, ~terminated & last)
        together.append(payment.reward)
    assert np.array(together).T == pytest.approx(np.array(alone), abs=1e-15)


# --- sums and scaling --------------------------------------------------------------------------


def test_a_mixture_of_dense_and_terminal():
    texts = growing(3)
    expected = outcome(Bleu(), texts[-1]) + 0.5 * outcome(LENGTH, texts[-1])
    for schedule in (
        dense(Bleu()) + terminal(0.5 * LENGTH),
        dense(Bleu()) + 0.5 * LENGTH,
        0.5 * LENGTH + dense(Bleu()),
        dense(Bleu()) - -0.5 * LENGTH,
        0.5 * LENGTH - dense(-Bleu()),
        sum([dense(Bleu()), 0.5 * LENGTH]),
        2 * (dense(0.5 * Bleu()) + terminal(LENGTH) / 4),
        dense(Bleu()) - (-dense(0.5 * LENGTH)),
    ):
        assert isinstance(schedule, Schedule) and schedule.every_step
        payments = run(schedule, texts)
        assert discounted(payments) == pytest.approx(expected, abs=1e-12)
        assert (schedule.low, schedule.high) == (-5, 6)
    payments = run(dense(Bleu()) + 0.5 * LENGTH, texts, "truncated")
    assert discounted(payments) == pytest.approx(outcome(Bleu(), texts[-1]), abs=1e-12)
    assert np.isnan(payments[-1].components["length"][0])


def test_a_callable_joins_a_sum_as_a_terminal_reward():
    schedule = dense(Bleu()) + (lambda text: 1.0)
    assert schedule.names == ("bleu", "lambda")
    assert discounted(run(schedule, ["the", "the cat"])) == pytest.approx(
        1 + outcome(Bleu(), "the cat")
    )


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: dense(Bleu()) * ExactMatch(),
        lambda: ExactMatch() * dense(Bleu()),
        lambda: terminal(Bleu()) * terminal(Bleu()),
        lambda: dense(Bleu()) * (lambda text: True),
    ],
)
def test_a_schedule_times_a_reward_says_to_gate_inside(wrong):
    with pytest.raises(TypeError, match=r"put the gate inside, as in dense\(reward \* gate\)"):
        wrong()


def test_other_arithmetic_is_refused():
    for wrong in (lambda: dense(Bleu()) + 1, lambda: dense(Bleu()) / WAVE, lambda: terminal(3)):
        with pytest.raises(TypeError):
            wrong()
    with pytest.raises(ValueError, match="finite"):
        dense(Bleu()) * math.nan


def test_gammas_must_agree():
    assert (dense(Bleu(), gamma=0.9) + dense(WAVE, gamma=0.9) + LENGTH).gamma == 0.9
    with pytest.raises(ValueError, match=r"one gamma, got \[0.9, 1.0\]"):
        dense(Bleu(), gamma=0.9) + dense(WAVE)
    for gamma in (0.0, 1.1, math.nan, "1"):
        with pytest.raises(ValueError, match="gamma must be in"):
            dense(Bleu(), gamma=gamma)


def test_check_reaches_every_part():
    for schedule in (dense(WAVE, potential=Bleu()), LENGTH + terminal(Bleu()), 0 * dense(Bleu())):
        schedule.check(["references"])
        with pytest.raises(RewardColumnError, match="'bleu'"):
            schedule.check(["prompt"])


def test_a_schedule_is_shared_and_pickles():
    schedule = dense(Bleu(), gamma=0.9) + 0.5 * Rouge()
    assert copy.deepcopy(schedule) is schedule
    twin = pickle.loads(pickle.dumps(schedule))
    assert (twin.names, twin.gamma) == (schedule.names, 0.9)
    assert rewards(run(twin, growing(1))) == rewards(run(schedule, growing(1)))


def test_as_schedule():
    schedule = dense(Bleu())
    assert as_schedule(schedule) is schedule
    strict = as_schedule(schedule, strict=True)
    assert strict.strict and not schedule.strict and as_schedule(strict) is strict
    assert as_schedule("rougeL").names == ("rougeL",)
    assert as_schedule(lambda text: 1.0).names == ("lambda",)
    with pytest.raises(TypeError, match="got NoneType"):
        as_schedule(None)
    assert (schedule + WAVE).strict is False and (strict + WAVE).strict is True


def test_the_arguments_of_pay_must_agree():
    schedule = terminal(WAVE)
    with pytest.raises(ValueError, match="1 tracks, 2 and 2 flags for 2 texts"):
        schedule.pay(
            [schedule.begin({}, "")],
            TextBatch.from_texts(["a", "b"]),
            np.full(2, True),
            np.full(2, False),
        )


# --- tracks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("reward", DENSE_REWARDS.values(), ids=DENSE_REWARDS)
def test_a_copied_track_is_exact_and_independent(reward):
    schedule = dense(reward, gamma=0.9) + LENGTH

    def step(track, text, last=False):
        batch = TextBatch.from_texts([text], [ROW])
        return schedule.pay([track], batch, np.array([last]), np.array([False])).reward[0]

    track = schedule.begin(ROW, "")
    for text in ("the", "the cat"):
        step(track, text)
    twin = track.copy()
    left = [step(track, "the cat sat"), step(track, "the cat sat on a mat", True)]
    assert step(twin.copy(), "a dog", True) != left[1]
    right = [step(twin, "the cat sat"), step(twin, "the cat sat on a mat", True)]
    assert left == right


# --- failures in dense schedules ---------------------------------------------------------------


class Scripted(Reward):
    """Gives what the script says, push by push, or score by score."""

    cheap = True

    def __init__(self, script, *, cursor):
        self.script, self.cursor, self.name = list(script), cursor, "scripted"

    def next(self, *_):
        item = self.script.pop(0)
        if isinstance(item, BaseException):
            raise item
        return item

    def score(self, batch):
        try:
            return [self.next()]
        except TextFailure as fault:
            return [fault]

    def begin(self, row):
        return self if self.cursor else None

    push = next

    def copy(self):
        return self


@pytest.mark.parametrize("cursor", [True, False])
class TestDenseFailures:
    def test_one_failure_is_retried(self, cursor):
        for bad in (OSError("down"), math.nan, None):
            reward = Scripted([1.0, bad, 2.0, 5.0], cursor=cursor)
            payments = run(dense(reward), ["a", "b", "c"])
            assert rewards(payments) == [1, 1, 3]
            assert [p.status[0] for p in payments] == [None] * 3
            assert [p.traceback for p in payments] == [None] * 3

    def test_an_episode_that_failed_stays_unscored(self, cursor):
        for bad, status in ((OSError("down"), "error: OSError: down"), (None, "none")):
            reward = Scripted([1.0, bad, bad, "never asked again"], cursor=cursor)
            payments = run(dense(reward), ["a", "b", "c"])
            assert rewards(payments) == [1, 0, 0]
            assert [p.status[0] for p in payments] == [None, status, status]
            assert payments[1].traceback is not None
            assert reward.script == ["never asked again"]
            assert np.isnan(payments[1].components["scripted"][0])
            assert np.isnan(payments[2].components["scripted"][0])

    def test_the_failure_is_in_the_copy_of_the_track(self, cursor):
        schedule = dense(Scripted([OSError()] * 2, cursor=cursor))
        track = schedule.begin({}, "")
        no = np.array([False])
        schedule.pay([track], TextBatch.from_texts(["a"]), no, no)
        assert track.copy().failed == "error: OSError"

    def test_a_fault_of_the_text_is_the_worst_potential(self, cursor):
        for weight, worst in ((1.0, 0.0), (-1.0, -1.0)):
            reward = Scripted([0.5, TextFailure("x"), 0.75], cursor=cursor)
            payments = run(weight * dense(reward), ["a", "b", "c"])
            assert [p.status[0] for p in payments] == [None] * 3
            values = np.cumsum(rewards(payments)).tolist()
            assert values == [weight * 0.5, worst, weight * 0.75]

    def test_strict_raises_at_once(self, cursor):
        reward = Scripted([1.0, OSError("down"), 2.0], cursor=cursor)
        with pytest.raises(RewardError, match="down"):
            run(as_schedule(dense(reward), strict=True), ["a", "b", "c"])
        assert reward.script == [2.0]

    def test_an_outcome_that_no_part_gives_is_unscored(self, cursor):
        parts = [Scripted([1.0, None], cursor=cursor) for _ in range(2)]
        payments = run(dense(parts[0]) + dense(parts[1]), ["a", "b"])
        assert rewards(payments) == [2, 0]
        assert [p.status[0] for p in payments] == [None, "none"]
        assert "No part" in payments[-1].traceback

    def test_none_in_a_sum_counts_as_no_potential(self, cursor):
        reward = Scripted([None, 1.0, None, 4.0], cursor=cursor)
        payments = run(dense(reward) + WAVE, ["a", "b", "c", "d"])
        paid = [float(p.components["scripted"][0]) for p in payments]
        assert math.isnan(paid[0]) and paid[1:] == [1, -1, 4]

    def test_interrupts_propagate(self, cursor):
        with pytest.raises(KeyboardInterrupt):
            run(dense(Scripted([KeyboardInterrupt()], cursor=cursor)), ["a"])


def test_other_episodes_go_on_when_one_has_failed():
    def reward(text):
        if text.startswith("x"):
            raise OSError("down")
        return float(len(text))

    schedule = dense(Plain(reward)) + LENGTH
    tracks = [schedule.begin({}, "") for _ in range(3)]
    for t in range(1, 4):
        batch = TextBatch.from_texts(["a" * t, "x" * t, "b" * t])
        payment = schedule.pay(tracks, batch, np.full(3, t == 3), np.full(3, False))
        # A batch whose scoring fails cannot say which text was to blame: it fails as a whole.
        assert payment.status == ["error: OSError: down"] * 3
    schedule = dense(as_reward(reward, name="items"))
    tracks = [schedule.begin({}, "") for _ in range(3)]
    with pytest.warns(UserWarning, match="cursor"):
        for t in range(1, 4):
            batch = TextBatch.from_texts(["a" * t, "x" * t, "b" * t])
            payment = schedule.pay(tracks, batch, np.full(3, t == 3), np.full(3, False))
            assert payment.status == [None, "error: OSError: down", None]
            assert payment.reward.tolist() == [1, 0, 1]


# --- what density does to learning -------------------------------------------------------------


def expected_gradient(schedule, horizon=4, symbols="ab."):
    """E[Σ_t ∇ log π(a_t | s_t) G_t] of a softmax table over states, by enumeration.

    An episode ends with "." or at the horizon; G_t is the undiscounted return-to-go.
    """
    rng = np.random.default_rng(0)
    logits: dict[str, np.ndarray] = {}
    gradient: dict[str, np.ndarray] = {}

    def visit(state, path, probability):
        if state.endswith(".") or len(state) == horizon:
            texts = [state[: t + 1] for t in range(len(state))]
            paid = rewards(run(schedule, texts))
            paid = [0.0] * (len(texts) - len(paid)) + paid  # terminal: one payment, the last
            for t, (before, action) in enumerate(path):
                policy = np.exp(logits[before]) / np.exp(logits[before]).sum()
                score = np.eye(len(symbols))[action] - policy
                gradient[before] = gradient.get(before, 0.0) + probability * sum(paid[t:]) * score
            return
        if state not in logits:
            logits[state] = rng.normal(size=len(symbols))
        policy = np.exp(logits[state]) / np.exp(logits[state]).sum()
        for action, symbol in enumerate(symbols):
            visit(state + symbol, [*path, (state, action)], probability * policy[action])

    visit("", [], 1.0)
    return np.array([gradient[state] for state in sorted(gradient)])


def test_density_leaves_the_expected_policy_gradient_as_it_is():
    reward = Plain(lambda text: text.count("ab") - 0.3 * text.count("b") + 0.1, "score")
    potential = Plain(lambda text: math.sin(3 * len(text)) + text.count("a"), "potential")
    true = expected_gradient(terminal(reward))
    assert np.abs(true).max() > 0.01
    assert expected_gradient(dense(reward)) == pytest.approx(true, abs=1e-12)
    assert expected_gradient(dense(reward, potential)) == pytest.approx(true, abs=1e-12)
    # A bonus that does not telescope is another task.
    other = expected_gradient(terminal(reward + 0.5 * potential))
    assert np.abs(other - true).max() > 0.01
