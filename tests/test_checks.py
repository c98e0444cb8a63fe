"""The conformance kit: every kind of broken reward is found, and nothing that it does stops it."""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from textgym.checks import CHECKS, HOSTILE, FaultyReward, Limits, Report, check_reward
from textgym.checks.guard import guarded
from textgym.cli import main
from textgym.rewards import Bleu, ExactMatch, Example, Reward, TextBatch, as_reward, dense
from textgym.rewards.base import Cursor
from textgym.rewards.errors import TextFailure

ROWS = [{"answer": "four"}, {"answer": "five"}]
ORACLE = [Example(row, row["answer"], 1.0) for row in ROWS]
SHORT = Limits(cpu_seconds=0.1, wall_seconds=3.0)


def right(text: str, answer: str) -> float:
    return float(text == answer)


def test_a_good_callable_passes_and_is_measured() -> None:
    report = check_reward(right, ORACLE)
    assert report.ok, str(report)
    assert [check.name for check in report.checks] == list(CHECKS)
    verdicts = {check.name: check.verdict for check in report.checks}
    skipped = {name for name, verdict in verdicts.items() if verdict == "skip"}
    assert skipped == {"cursor", "hostile cursor"}
    assert report.check("other answers").detail.startswith("0 of 2 answers")
    assert report.statuses == ("ok",)
    assert 0 < report.cost["cpu_us"] < 1e5 and report.cost["memory_mb"] >= 0
    found = json.loads(json.dumps(report.as_dict()))
    assert found["ok"] is True and found["checks"]["oracle"]["verdict"] == "pass"


# ------------------------------------------------------------------ what is broken, and who says so


class Custom(Reward):
    """A right reward, of which each subclass breaks something."""

    name = "custom"

    def score(self, batch: TextBatch) -> list[Any]:
        return [
            float(text == row["answer"]) for text, row in zip(batch.texts, batch.rows, strict=True)
        ]


class Counting:
    def __init__(self, wrong: bool = False, shared: bool = False) -> None:
        self.text, self.wrong, self.shared = "", wrong, shared

    def push(self, piece: str) -> float:
        self.text += piece
        return (len(self.text) % 5 + self.wrong * (len(self.text) > 3)) / 5

    def copy(self) -> Counting:
        if self.shared:
            return self
        twin = Counting(self.wrong)
        twin.text = self.text
        return twin


class WithCursor(Reward):
    judges_content = False

    def __init__(self, **options: bool) -> None:
        self.name, self.options = "with_cursor", options

    def score(self, batch: TextBatch) -> list[float]:
        return [len(text) % 5 / 5 for text in batch.texts]

    def begin(self, row: Any) -> Cursor:
        return Counting(**self.options)


class ChangesItsBatch(Custom):
    reads_only = True  # which is not so

    def score(self, batch: TextBatch) -> list[Any]:
        values = super().score(batch)
        batch.texts[0] = "changed"
        return values


class KeepsWeights(Custom):
    def __init__(self) -> None:
        self.lock = threading.Lock()  # cannot be pickled


class ForgetsItself(Custom):
    def __init__(self) -> None:
        self.answer = True

    def __getstate__(self) -> dict[str, Any]:
        return {"answer": False}

    def score(self, batch: TextBatch) -> list[Any]:
        return super().score(batch) if self.answer else [0.25] * len(batch)


class ByPosition(Custom):
    def score(self, batch: TextBatch) -> list[Any]:
        return [v * (1.0 - 0.1 * i) for i, v in enumerate(super().score(batch))]


class BatchMean(Custom):
    def score(self, batch: TextBatch) -> list[Any]:
        values = super().score(batch)
        return [v / len(values) for v in values]


def _random(text: str, answer: str, draws: Any = np.random.default_rng(0)) -> float:  # noqa: B008
    return float(draws.random())


def _raises_on_nan(text: str, answer: str) -> float:
    return float(int(float(text)) == 4) if text == "nan" else right(text, answer)


UNEQUAL = {"deterministic", "order", "batch", "deepcopy"}
BROKEN: dict[str, tuple[Any, set[str]]] = {
    "pays everything": (lambda text, answer: 1.0, {"empty", "garbage"}),
    "pays nothing": (lambda text, answer: 0.0, {"examples", "oracle"}),
    "pays the empty text": (lambda text, answer: float(text.strip() in ("", answer)), {"empty"}),
    "pays words": (lambda text, answer: float(len(text) > 3), {"garbage"}),
    "pays too much": (lambda text, answer: 2 * right(text, answer), {"examples", "range"}),
    "is random": (_random, {"examples", "oracle", "empty", "garbage", "pickle", *UNEQUAL}),
    "raises": (_raises_on_nan, {"hostile"}),
    "gives NaN": (
        lambda text, answer: float("nan") if text == "inf" else right(text, answer),
        set(),
    ),
    "orders": (ByPosition(), {"examples", "order", "batch"}),
    "averages": (BatchMean(), {"examples", "oracle", "batch"}),
    "changes its batch": (ChangesItsBatch(), {"reads only"}),
    "cannot be pickled": (KeepsWeights(), {"pickle"}),
    "is another after a pickle": (ForgetsItself(), {"pickle"}),
    "cursor is wrong": (WithCursor(wrong=True), {"cursor", "hostile cursor", "columns"}),
    "copies share": (WithCursor(shared=True), {"cursor"}),
}
PICKLED = {"cannot be pickled", "is another after a pickle", "is random"}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_broken_is_found(what: str) -> None:
    reward, expected = BROKEN[what]
    examples = None if isinstance(reward, WithCursor) else ORACLE
    if isinstance(reward, WithCursor):
        examples = [Example({}, "a text of words", 0.0)]
        expected = expected - {"columns"} | {"oracle"}
    skip = {"cost"} if what in PICKLED else {"cost", "pickle"}  # lambdas cannot be pickled
    report = check_reward(reward, examples, limits=SHORT, skip=skip)
    assert {check.name for check in report.failures} >= expected, str(report)
    assert {check.name for check in report.failures} <= expected | {"dense", "range"}, str(report)
    assert not report.ok or not expected


def hostile_to(text: str) -> float:
    if text == "nan":
        os.kill(os.getpid(), signal.SIGSEGV)
    if text == "-inf":
        time.sleep(100)
    if text == "1/0":
        while True:
            pass
    if text == "True":
        sys.exit(3)
    if text == "1+1j":
        raise TextFailure("complex")
    if text == "a":
        raise ZeroDivisionError("of my own")
    return 0.0


def test_hanging_crashing_and_exiting_are_told_apart_and_nothing_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    children: list[int] = []
    fork = os.fork
    monkeypatch.setattr(os, "fork", lambda: children.append(fork()) or children[-1])
    began = time.monotonic()
    report = check_reward(hostile_to, limits=SHORT, skip={"cost"})
    assert time.monotonic() - began < 30.0
    (failure,) = report.failures
    assert failure.name == "hostile" and failure.detail.startswith(f"5 of {len(HOSTILE)} texts")
    for said in (
        "killed (SIGSEGV): not a number",
        "timeout (no answer within 3 s): infinity",
        "timeout (more than 0.1 s of CPU): division by zero",
        "raised (error: SystemExit: 3): boolean",
        "error: ZeroDivisionError: one letter",
    ):
        assert said in failure.detail
    assert "text: complex" in report.statuses
    assert len(children) == 4  # one, and another after each of three that were lost
    for child in children:
        with pytest.raises(ChildProcessError):  # waited for
            os.waitpid(child, os.WNOHANG)


def test_a_reward_that_hangs_on_everything_is_reported() -> None:
    report = check_reward(
        lambda text: time.sleep(100),
        limits=Limits(cpu_seconds=0.1, wall_seconds=0.02),
        skip={"hostile", "hostile cursor"},
    )
    assert {"empty", "garbage", "deterministic", "dense", "cost", "range"} <= {
        check.name for check in report.failures
    }


def test_what_judges_form_and_what_looks_at_the_batch_say_so() -> None:
    class Form(Custom):
        judges_content = False

        def score(self, batch: TextBatch) -> list[Any]:
            return [1.0] * len(batch)

    class Batch(BatchMean):
        per_text = False

        def score(self, batch: TextBatch) -> list[Any]:
            return [value * 2 for value in super().score(batch)]

    hostile = {"hostile", "hostile cursor", "cost", "pickle"}
    assert check_reward(Form(), ORACLE, skip=hostile).check("garbage").verdict == "skip"
    report = check_reward(Batch(), ORACLE, skip={*hostile, "dense"})
    assert report.check("batch").verdict == "skip"
    assert report.check("examples").verdict == "pass" and report.check("order").verdict == "pass"


def test_limits_on_cost_fail_where_they_are_passed() -> None:
    def slow(text: str) -> float:
        time.sleep(0.01)
        sum(range(100_000))
        return 0.0

    hostile = {"hostile", "hostile cursor", "pickle"}
    assert check_reward(slow, skip=hostile).check("cost").verdict == "note"
    assert check_reward(slow, skip=hostile, max_cpu_us=1.0).check("cost").verdict == "fail"
    assert check_reward(slow, skip=hostile, max_cpu_us=1e9).check("cost").verdict == "pass"
    assert check_reward(slow, skip=hostile, max_memory_mb=-1.0).check("cost").verdict == "fail"


def test_wrong_arguments_say_what_is_right() -> None:
    with pytest.raises(ValueError, match="no check 'hostle' to skip; there are columns, examples"):
        check_reward(right, ORACLE, skip={"hostle"})
    with pytest.raises(ValueError, match=r"column 'answer'.*Give examples"):
        check_reward(right)
    with pytest.raises(TypeError, match="A schedule says when"):
        check_reward(dense(Bleu()))
    bad = check_reward(ExactMatch("solution"), ORACLE, skip={"hostile", "hostile cursor", "cost"})
    assert "needs the column 'solution'" in bad.check("columns").detail


def test_a_guarded_job_has_a_limit_of_memory() -> None:
    outcomes = guarded(
        [lambda: len(bytearray(1 << 30)), lambda: 7, lambda: {1, 2}], Limits(memory_mb=256)
    )
    assert [outcome.status for outcome in outcomes[:2]] == ["raised", "ok"]
    assert "MemoryError" in outcomes[0].detail and outcomes[1].value == 7
    assert outcomes[2].status == "killed"  # what JSON cannot hold


# ------------------------------------------------------------------------------- FaultyReward


def test_faults_are_those_asked_for_and_the_same_for_a_seed() -> None:
    def made(seed: int) -> tuple[list[float], list[str | None], dict[str, int]]:
        faulty = FaultyReward(as_reward(lambda text: 1.0), seed, raise_=0.3, nan=0.2)
        found = faulty.evaluate(TextBatch.from_texts(["a"] * 200))
        return found.values.tolist(), found.status, dict(faulty.met)

    values, status, met = made(0)
    assert [np.isnan(v) for v in values] == [s is not None for s in status]
    assert set(status) == {None, "nan", "error: InjectedFault: raised"}
    assert abs(sum(s is not None for s in status) / 200 - 0.25) < 0.1  # 0.5 squared
    assert set(met) == {"raise", "nan"}
    assert repr(made(0)) == repr((values, status, met)) != repr(made(1))


def test_faults_that_need_a_worker_are_bounded() -> None:
    for kind, verdict in (("hang", "timeout"), ("spin", "timeout"), ("kill", "killed")):
        faulty = FaultyReward(as_reward(lambda text: 1.0), timeout=1.0, **{kind: 1.0})
        (status,) = faulty.evaluate(TextBatch.from_texts(["a"])).status
        assert status == f"error: InjectedFault: the worker's verdict is {verdict!r}"
        assert faulty.met == {kind: 2}  # tried twice


def test_a_wrong_length_and_type_are_faults_of_the_service() -> None:
    batch = TextBatch.from_texts(["a", "b"])
    faulty = FaultyReward(as_reward(lambda text: 1.0), wrong_length=1.0)
    assert (
        faulty.evaluate(batch).status
        == ["error: ValueError: a reward returned 1 values for 2 texts"] * 2
    )
    faulty = FaultyReward(as_reward(lambda text: 1.0), wrong_type=1.0)
    assert faulty.evaluate(batch).status == ["type: str"] * 2
    with pytest.raises(ValueError, match="at most 1 in all"):
        FaultyReward(Bleu(), nan=0.6, raise_=0.6)


# ------------------------------------------------------------------------------- the command


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "graders.py").write_text(
        "def right(text, answer):\n    return float(text == answer)\n"
        "def halting(text, answer):\n    return float(bool(text) == bool(answer))\n"
    )
    rows = [{"question": f"{i} + {i}", "answer": str(2 * i)} for i in range(40)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    yield tmp_path  # type: ignore[misc]
    sys.modules.pop("graders", None)


DATA = ["--data", "sums.jsonl", "--prompt", "question"]


def test_the_command_prints_a_table_or_json(
    module: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", "reward", "bleu"]) == 0
    out = capsys.readouterr().out
    assert "bleu in [0, 1]" in out and "cursor" in out and "failed" not in out
    assert main(["check", "reward", "graders:right", *DATA, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["reward"] == "right" and found["ok"] is True
    assert found["checks"]["examples"]["detail"] == "16 earn what is stated"
    assert found["checks"]["other answers"]["detail"].startswith("0 of 16")


def test_the_command_fails_with_the_reward(
    module: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", "reward", "graders:halting", *DATA, "--json", "--count", "3"]) == 1
    found = json.loads(capsys.readouterr().out)
    failed = {name for name, check in found["checks"].items() if check["verdict"] == "fail"}
    assert failed == {"empty", "garbage"}  # of the empty texts the one with a space
    assert found["checks"]["other answers"]["detail"].startswith("3 of 3")
    assert main(["check", "reward", "graders:halting", *DATA, "--skip", "empty", "garbage"]) == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["blue"], "write `textgym check reward blue`"),
        (["reward", "blue"], "Did you mean 'bleu'?"),
        (["reward", "graders:wrong"], "'graders' has no 'wrong'"),
        (["reward", "graders:right"], "needs the column 'answer'"),
        (["reward", "graders:right", *DATA, "--answer", "solution"], "no column 'solution'"),
        (["reward", "graders:right", "--data", "none.jsonl"], "none.jsonl"),
        (["reward", "bleu", "--skip", "nothing"], "there is no check 'nothing'"),
    ],
)
def test_the_command_says_what_is_wrong(
    arguments: list[str], says: str, module: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", *arguments]) == 2
    assert says in capsys.readouterr().err


def test_a_report_reads_as_text() -> None:
    report = check_reward(right, ORACLE, skip=set(CHECKS) - {"examples", "range"})
    assert isinstance(report, Report)
    lines = str(report).splitlines()
    assert lines[0] == "right in [0, 1]" and len(lines) == 3
    assert [line.split()[0] for line in lines[1:]] == ["pass", "pass"]


def test_hostile_texts_are_many_and_different() -> None:
    assert len(HOSTILE) >= 60 and len(set(HOSTILE.values())) == len(HOSTILE)
    assert all(a != b for a, b in itertools.pairwise(HOSTILE))
