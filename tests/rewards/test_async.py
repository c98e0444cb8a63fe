"""How async rewards call: pauses, retries, the circuit breaker, counts, limits that are shared."""

import asyncio
import copy
import os
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest

from textgym.rewards import RewardError, TextBatch, TextFailure, as_reward, as_schedule, service
from textgym.rewards.service import CircuitOpenError, Service

ONE = TextBatch.from_texts(["a"])


class Clock:
    """Time that only pauses move."""

    def __init__(self):
        self.now, self.pauses = 100.0, []

    async def sleep(self, seconds):
        self.pauses.append(seconds)
        self.now += seconds

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    fake = Clock()
    monkeypatch.setattr(service, "sleep", fake.sleep)
    monkeypatch.setattr(service, "monotonic", fake.monotonic)
    return fake


class Script:
    """An async callable that gives, or raises, one outcome a call; the last one again and again."""

    def __init__(self, *outcomes):
        self.outcomes, self.calls = list(outcomes), 0

    async def __call__(self, text):
        outcome = self.outcomes[min(self.calls, len(self.outcomes) - 1)]
        self.calls += 1
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome


def ask(how, script, times=1):
    """Make calls one after the other, as values or exceptions."""

    async def main():
        return [await how.call(lambda: script("x")) for _ in range(times)]

    return asyncio.run(main())


def down(after=None):
    error = OSError("down")
    if after is not None:
        error.retry_after = after
    return error


def test_a_failed_call_is_repeated_after_growing_pauses(clock):
    script = Script(down(), down(), down(), 0.5)
    reward = as_reward(script, service=Service(retries=3, backoff=1.0))
    scores = reward.evaluate(ONE)
    assert scores.values.tolist() == [0.5] and scores.status == [None]
    assert script.calls == 4 and len(clock.pauses) == 3
    for pause, longest in zip(clock.pauses, (1, 2, 4), strict=True):
        assert longest / 2 <= pause <= longest
    counts = reward.service.counts
    assert (counts.calls, counts.attempts, counts.retries, counts.failures) == (1, 4, 3, 0)


def test_pauses_have_a_longest_and_are_drawn_from_a_generator_of_the_service(clock):
    def pauses(seed):
        clock.pauses.clear()
        ask(Service(retries=12, backoff=1.0, max_backoff=10.0, seed=seed), Script(down()))
        return list(clock.pauses)

    state = np.random.get_state()[1].copy()
    first, again, other = pauses(0), pauses(0), pauses(1)
    assert first == again != other
    assert max(first) <= 10 and min(first[4:]) >= 5 and len(set(first)) == 12
    assert (np.random.get_state()[1] == state).all()


def test_what_helps_nothing_is_unscored_with_the_last_error():
    script = Script(OSError("first"), OSError("second"))
    reward = as_reward(script, service=Service(retries=1, backoff=0.0))
    scores = reward.evaluate(ONE)
    assert np.isnan(scores.values[0]) and scores.status == ["error: OSError: second"]
    # The protocol's own second try goes through the service as well.
    counts = reward.service.counts
    assert (counts.calls, counts.attempts, counts.failures) == (2, 4, 2)
    schedule = as_schedule(reward)
    payment = schedule.pay([schedule.begin({}, "")], ONE, np.array([True]), np.array([False]))
    assert payment.reward.tolist() == [0.0] and payment.status == ["error: OSError: second"]
    with pytest.raises(RewardError, match="second"):
        reward.evaluate(ONE, strict=True)


def test_only_the_named_exceptions_are_repeated():
    how = Service(retries=3, retry_on=(OSError,), backoff=0.0)
    script = Script(OSError("down"), ValueError("bad"), 1.0)
    outcome = ask(how, script)[0]
    assert isinstance(outcome, ValueError) and script.calls == 2


def test_a_timeout_holds_for_each_attempt_and_is_repeated():
    calls = []

    async def judge(text):
        calls.append(text)
        if len(calls) == 1:
            await asyncio.sleep(60)
        return 1.0

    reward = as_reward(judge, service=Service(timeout=0.05, retries=1, backoff=0.0))
    assert reward.evaluate(ONE).values.tolist() == [1.0] and len(calls) == 2
    assert reward.service.counts.slowest >= 0.05


def test_a_fault_of_the_text_is_an_answer():
    script = Script(TextFailure("does not parse"))
    reward = as_reward(script, low=-1.0, service=Service(retries=5, break_after=1))
    for _ in range(3):
        assert reward.evaluate(ONE).status == ["text: does not parse"]
    assert script.calls == 3 and reward.service.counts.failures == 0


def test_a_service_that_asks_for_patience_gets_it(clock):
    ask(Service(retries=1, backoff=0.5), Script(down(after=7.5), 1.0))
    assert clock.pauses == [7.5]
    # Longer than the longest pause: not repeated, and with a breaker left alone for that long.
    script = Script(down(after=90.0), 1.0)
    how = Service(retries=5, max_backoff=30.0, break_after=100)
    first, second = ask(how, script, times=2)
    assert isinstance(first, OSError) and isinstance(second, CircuitOpenError)
    assert script.calls == 1
    clock.now += 90.0
    assert ask(how, script) == [1.0]


@pytest.mark.parametrize(
    "asked", [float("nan"), -1, "soon", None, float("inf"), pytest.param(10**400, id="huge")]
)
def test_nonsense_patience_is_harmless(clock, asked):
    how = Service(retries=1, break_after=100)
    ask(how, Script(down(after=asked), 1.0))
    assert sum(clock.pauses) <= service.LONGEST_PAUSE
    clock.now += service.LONGEST_PAUSE
    assert ask(how, Script(1.0)) == [1.0]


def test_the_breaker_opens_probes_and_closes(clock):
    script = Script(*[down()] * 4, 1.0)
    how = Service(break_after=3, break_seconds=20.0)
    outcomes = ask(how, script, times=5)
    assert [type(o) for o in outcomes] == [OSError] * 3 + [CircuitOpenError] * 2
    assert "failed 3 times in a row; it is called again in 20 s" in str(outcomes[-1])
    assert script.calls == 3
    clock.now += 20.0  # half open: one probe, which fails
    assert [type(o) for o in ask(how, script, times=2)] == [OSError, CircuitOpenError]
    clock.now += 20.0  # the next probe succeeds, and all is well
    assert ask(how, script, times=3) == [1.0] * 3
    counts = how.counts
    assert (counts.calls, counts.attempts, counts.refused, counts.failures) == (10, 7, 3, 7)


def test_only_one_call_is_the_probe(clock):
    how = Service(break_after=1, break_seconds=20.0)
    ask(how, Script(down()))
    clock.now += 20.0

    async def main():
        gate = asyncio.Event()

        async def slow():
            await gate.wait()
            return 1.0

        probe = asyncio.ensure_future(how.call(slow))
        await asyncio.sleep(0)
        others = [await how.call(slow) for _ in range(3)]
        gate.set()
        return [await probe, *others]

    outcomes = asyncio.run(main())
    assert outcomes[0] == 1.0 and all(isinstance(o, CircuitOpenError) for o in outcomes[1:])


def test_a_success_in_between_keeps_the_breaker_closed(clock):
    script = Script(down(), down(), 1.0, down(), down(), 1.0)
    assert [isinstance(o, OSError) for o in ask(Service(break_after=3), script, times=6)] == [
        *[True, True, False] * 2
    ]


def test_retries_stop_when_the_breaker_opens_and_keep_the_error(clock):
    script = Script(down())
    (outcome,) = ask(Service(retries=9, break_after=3, break_seconds=1e6), script)
    assert isinstance(outcome, OSError) and script.calls == 3


def test_rewards_may_share_one_service():
    running, most = 0, 0

    async def judge(text):
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.005)
        running -= 1
        return 1.0

    how = Service(max_concurrency=3)
    rewards = [as_reward(judge, name=name, service=how) for name in "ab"]
    batch = TextBatch.from_texts(["x"] * 8)
    threads = [threading.Thread(target=reward.evaluate, args=(batch,)) for reward in rewards]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 3 and how.counts.calls == 16 and how.counts.failures == 0
    assert rewards[0].named("c").service is how and copy.deepcopy(rewards[0]).service is how


def test_a_service_is_pickled_by_recipe():
    how = Service(timeout=2.0, retries=4, break_after=1, seed=3)
    ask(how, Script(down()))
    twin = pickle.loads(pickle.dumps(how))
    assert (twin.timeout, twin.retries, twin.break_after, twin.seed) == (2.0, 4, 1, 3)
    assert twin.counts.calls == 0 and ask(twin, Script(1.0)) == [1.0]


def test_the_limits_hold_after_a_fork_with_pauses_of_its_own():
    script = """
import asyncio, os, sys, warnings
warnings.simplefilter("ignore")  # Python 3.12 warns of any fork beside a thread
from textgym.rewards import TextBatch, as_reward, service
from textgym.rewards.service import Service

drawn = []
async def sleep(seconds):
    drawn.append(seconds)
service.sleep = sleep

async def judge(text):
    await asyncio.sleep(0.001)
    raise OSError("down")

reward = as_reward(judge, service=Service(max_concurrency=2, retries=2))
batch = TextBatch.from_texts(list("abcdef"))
reward.evaluate(batch)
mine = drawn[:12]
drawn.clear()
child = os.fork()
if child == 0:
    reward.evaluate(batch)
    os._exit(0 if len(drawn) == 24 and not set(drawn) & set(mine) else 3)
assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60, env=dict(os.environ))


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: Service(timeout=0), ValueError, "timeout"),
        (lambda: Service(max_concurrency=0), ValueError, "at least 1"),
        (lambda: Service(retries=-1), ValueError, "retries"),
        (lambda: Service(backoff=float("inf")), ValueError, "backoff"),
        (lambda: Service(break_after=0), ValueError, "break_after"),
        (lambda: as_reward(lambda text: 1.0, retries=2), ValueError, "async"),
        (lambda: as_reward(lambda text: 1.0, service=Service()), ValueError, "async"),
        (lambda: as_reward(Script(1.0), retries=1, service=Service()), TypeError, "to the service"),
        (lambda: as_reward("bleu", retries=1), TypeError, "are for callables"),
    ],
)
def test_wrong_limits_are_refused(make, error, says):
    with pytest.raises(error, match=says):
        make()
