"""Programs scored by unit tests: what counts, what it costs, whose fault it is."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest

from textgym.rewards import RewardColumnError, TextBatch
from textgym.rewards.registry import make_reward
from textgym.rewards.verifiers import code as code_module
from textgym.rewards.verifiers.code import UnitTests
from textgym.rewards.verifiers.code_task import REMEMBERED, Verdict, Verdicts, find_code
from textgym.sandbox.runner import CodeRunner, Outcome, SandboxError, shared_runner

SQUARES = {"tests": [{"args": [x], "expected": x * x} for x in range(4)]}
ECHO = {"tests": [{"stdin": s, "stdout": s} for s in ("a\n", "b\n", "c\n", "d\n")]}


@pytest.fixture(scope="module", autouse=True)
def _sandbox():
    try:
        _ = shared_runner().report
    except SandboxError as error:
        pytest.skip(str(error))


def evaluate(texts, row, **options):
    texts = [texts] if isinstance(texts, str) else texts
    scores = UnitTests(**options).evaluate(TextBatch.from_texts(texts, [row] * len(texts)))
    return list(zip(scores.values.tolist(), scores.status, strict=True))


def score(text, row, **options):
    ((value, status),) = evaluate(text, row, **options)
    return value, status


def test_functions():
    assert score("def f(x): return x * x", SQUARES) == (1.0, None)
    assert score("def f(x): return x + x", SQUARES) == (0.0, None)
    assert score("def f(x): return x + x", SQUARES, partial=True) == (0.5, None)
    assert score("def f(x): return -1", SQUARES, partial=True) == (0.0, None)
    assert score("def f(x, y): return 1", SQUARES) == (0.0, "text: exception")


def test_programs():
    assert score("print(input())", ECHO) == (1.0, None)
    assert score("print('b')", ECHO) == (0.0, None)
    assert score("print('b')", ECHO, partial=True) == (0.25, None)
    assert score("print(input(", ECHO, partial=True) == (0.0, "text: syntax")


@pytest.mark.parametrize(
    ("written", "right"),
    [
        ("1 2\n3\n", True),
        ("1 2\n3", True),
        ("1 2  \r\n3\t\n\n\n", True),
        ("1  2\n3", False),
        (" 1 2\n3", False),
        ("1 2\n\n3", False),
        ("\n1 2\n3", False),
        ("1 2 3", False),
        ("", False),
    ],
)
def test_lines_are_compared_without_space_at_their_ends(written, right):
    row = {"tests": [{"stdin": "", "stdout": "1 2\n3\n"}]}
    assert score(f"import sys\nsys.stdout.write({written!r})", row) == (float(right), None)


def test_types_and_tolerance():
    def one(expression, expected, **options):
        row = {"tests": [{"args": [], "expected": expected}]}
        return score(f"def f(): return {expression}", row, **options)[0]

    assert one("0.1 + 0.2", 0.3) == one("(1, [2])", [1, [2]]) == one("{1: {2}}", {1: {2}}) == 1
    assert one("1000.5", 1000.0) == one("1", True) == one("1.0", 1) == one("[1]", (1,)) == 0
    assert one("1000.5", 1000.0, tolerance=1e-3) == 1
    assert one("float('nan')", 1.0) == one("float('inf')", 1e300, tolerance=0.5) == 0


def test_the_tests_share_a_budget():
    """A program that is slow, but not too slow for any one test."""
    burn = "import time\nt = time.process_time()\nwhile time.process_time() < t + 0.08: pass\n"
    program = burn + "print(input())"
    assert score(program, ECHO, cpu_seconds=0.2) == (0.0, "text: timeout")
    assert score(program, ECHO, cpu_seconds=2.0) == (1.0, None)
    value, status = score(program, ECHO, cpu_seconds=0.2, partial=True)
    assert value in (0.25, 0.5) and status is None
    function = f"def f(x):\n    if x > 1:\n        while True: pass\n    return x * x\n{burn}"
    assert score(function, SQUARES, cpu_seconds=0.2) == (0.0, "text: timeout")
    assert score(function, SQUARES, cpu_seconds=0.2, partial=True) == (0.5, None)


def test_time_on_the_clock_is_shared_too():
    program = "import time\ntime.sleep(0.4)\nprint(input())"
    assert score(program, ECHO, cpu_seconds=0.3, wall_seconds=0.6) == (0.0, "text: timeout")


def test_entry_point():
    text = "class Solution:\n    def g(self, x): return x * x\ndef f(x): return 0"
    assert score(text, SQUARES)[0] == 0.0
    assert score(text, {**SQUARES, "entry_point": "Solution.g"})[0] == 1.0
    assert score(text, {**SQUARES, "entry_point": "f"}, entry_point="Solution.g")[0] == 1.0
    assert score(text, SQUARES, entry_point="h") == (0.0, "text: no entry point")


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("x = 1", "x = 1"),
        ("So:\n```python\nx = 1\n```\nDone.", "x = 1"),
        ("```python\nx = 1\n```\nBetter:\n```py\nx = 2\ny = 3\n```", "x = 2\ny = 3"),
        ("```\nx = 1\n```", "x = 1"),
        ("```python\nx = 1\n```\nIt prints\n```text\n1\n```", "x = 1"),
        ("```Python  \nx = 1", "x = 1"),
        ("```python\nx = 1\n```\n```python\nx = 2", "x = 2"),
        ("```python\n```", ""),
        ("```rust\nfn main() {}\n```", "```rust\nfn main() {}\n```"),
        ("x = '```'", "x = '```'"),
        ("1. So:\n  ```python\n  if x:\n    y = 1\n  ```", "if x:\n  y = 1"),
        ("~~~python\nx = '```'\n```\n~~~", "x = '```'\n```"),
        ('```Python title="a.py"\nx = 1\n```', "x = 1"),
        ("```{.python}\nx = 1\n```", "x = 1"),
        ("```python3.11\nx = 1\n```", "x = 1"),
        ("```python\nx = 1\n```\nUsage:\n```\nrun x\n```", "x = 1"),
    ],
)
def test_find_code(text, code):
    assert find_code(text) == code


@pytest.mark.parametrize(
    "tests",
    [
        None,
        [],
        "assert f(1) == 1",
        [1],
        [{"args": [1]}],
        [{"args": 1, "expected": 1}],
        [{"args": "abc", "expected": 1}],
        [{"args": [object()], "expected": 1}],
        [{"args": [1], "expected": 1j}],
        [{"stdin": 1, "stdout": ""}],
        [{"args": [1], "expected": 1}, {"stdin": "", "stdout": ""}],
    ],
)
def test_bad_tests_are_no_fault_of_the_text(tests):
    value, status = score("def f(x): return x", {"tests": tests})
    assert value != value and status.startswith("error: ValueError") and "'tests'" in status


def test_a_bad_row_does_not_spoil_the_others():
    batch = TextBatch.from_texts(["def f(x): return x * x"] * 2, [{"tests": []}, SQUARES])
    assert UnitTests().evaluate(batch).values.tolist()[1] == 1.0


def test_too_long():
    assert score("#" * 70_000, SQUARES) == (0.0, "text: too long")


def test_check():
    UnitTests().check(["prompt", "tests"])
    with pytest.raises(RewardColumnError, match="Did you mean 'test'"):
        UnitTests().check(["prompt", "test"])


def test_check_refuses_a_machine_that_is_not_safe(monkeypatch):
    def fail(**options):
        raise SandboxError("no layer 'seccomp'")

    monkeypatch.setattr(code_module, "shared_runner", fail)
    with pytest.raises(SandboxError, match="seccomp"):
        UnitTests().check(["tests"])


@pytest.mark.parametrize(
    "options",
    [
        {"cpu_seconds": 0},
        {"cpu_seconds": 2.0, "wall_seconds": 1.0},
        {"cpu_seconds": float("nan")},
        {"wall_seconds": float("inf")},
        {"memory_mb": 16},
        {"tolerance": -1},
        {"workers": 0},
        {"require": "some"},
    ],
)
def test_bad_arguments(options):
    with pytest.raises(ValueError):
        UnitTests(**options)


class Counting:
    """A runner that counts jobs, and says what it is told to."""

    def __init__(self, outcome=None):
        self.jobs, self.outcome, self.real = [], outcome, shared_runner()

    def map(self, jobs):
        self.jobs += jobs
        return self.real.map(jobs) if self.outcome is None else [self.outcome] * len(jobs)


@pytest.fixture
def counting(monkeypatch):
    counter = Counting()
    monkeypatch.setattr(code_module, "shared_runner", lambda **options: counter)
    return counter


def test_equal_programs_run_once_and_are_remembered(counting):
    reward = UnitTests()
    right, wrong = "def f(x): return x * x", "def f(x): return 1"
    other = {"tests": [{"args": [1], "expected": 1.0}]}
    batch = TextBatch.from_texts([right, wrong, right, f"```\n{right}\n```"], [SQUARES] * 4)
    for _ in range(2):
        assert reward.evaluate(batch).values.tolist() == [1.0, 0.0, 1.0, 1.0]
        assert len(counting.jobs) == 2
    # Other tests are other verdicts, even if they differ in a type only.
    for row in (other, {"tests": [{"args": [1], "expected": 1}]}, {**SQUARES, "entry_point": "f"}):
        reward.evaluate(TextBatch.from_texts([right], [row]))
    assert len(counting.jobs) == 5


def test_a_program_stops_at_its_first_wrong_answer_unless_all_count(counting):
    score("print('a')", ECHO)
    assert [job.stdin for job in counting.jobs] == ["a\n", "b\n"]
    counting.jobs.clear()
    score("print('a')", ECHO, partial=True)
    assert len(counting.jobs) == 4


def test_failures_of_the_sandbox_are_not_verdicts(counting):
    reward = UnitTests()
    batch = TextBatch.from_texts(["def f(x): return x * x"], [SQUARES])
    counting.outcome = SandboxError("the zygote died")
    scores = reward.evaluate(batch)
    assert scores.values[0] != scores.values[0]
    assert scores.status == ["error: SandboxError: the zygote died"]
    assert len(counting.jobs) == 2  # tried once more
    counting.outcome = None
    assert reward.evaluate(batch).values[0] == 1.0


def test_a_timeout_is_remembered_if_it_was_of_cpu_time(counting):
    reward = UnitTests(cpu_seconds=1.0)
    for name, cpu, jobs in (("a", 1.0, 1), ("b", 0.1, 2)):
        counting.jobs.clear()
        counting.outcome = Outcome("timeout", cpu_seconds=cpu)
        for _ in range(2):
            scores = reward.evaluate(TextBatch.from_texts([name], [SQUARES]))
            assert scores.status == ["text: timeout"]
        assert len(counting.jobs) == jobs


@pytest.mark.parametrize(
    "answers",
    [
        [["ok"]] * 4,
        [["ok", 0, 0]] * 4,
        [[["ok"], 0]] * 4,
        [[{}]] * 4,
        [["service down"]] * 4,
        [["ok", {"int": "0x0"}]] * 4,
        [["ok", True]] * 4,
    ],
)
@pytest.mark.parametrize("partial", [False, True])
def test_forged_answers_earn_nothing(counting, answers, partial):
    counting.outcome = Outcome("ok", answers)
    value, status = score("x", SQUARES, partial=partial)
    assert value == 0.0 and status in (None, "text: crash")


def test_from_many_threads():
    reward = UnitTests()
    texts = ["def f(x): return x * x", "def f(x): return 0", "while True: print(1", ""]
    results = []

    def run(n):
        batch = TextBatch.from_texts([f"#{n % 3}\n{text}" for text in texts], [SQUARES] * 4)
        results.append(reward.evaluate(batch).values.tolist())

    threads = [threading.Thread(target=run, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[1.0, 0.0, 0.0, 0.0]] * 8


def test_the_least_recently_used_verdict_is_forgotten(monkeypatch):
    monkeypatch.setattr("textgym.rewards.verifiers.code_task.REMEMBERED", 2)
    verdicts, verdict = Verdicts(), Verdict(1, 1)
    verdicts.put(b"a", verdict)
    verdicts.put(b"b", verdict)
    assert verdicts.get(b"a") is verdict
    verdicts.put(b"c", verdict)
    assert verdicts.get(b"b") is None and verdicts.get(b"a") is verdicts.get(b"c") is verdict
    assert REMEMBERED > 1000


def test_the_last_of_a_budget_is_enough_to_start_a_program():
    """Else a program that spends nearly all on one test would go unscored, and not earn a 0."""
    reward = UnitTests(cpu_seconds=0.5)
    task = reward._task("print(input())", ECHO)
    task.take(task.next(), Outcome("ok", output=b"a\n", cpu_seconds=0.5 - 1e-6))
    (outcome,) = shared_runner().map([task.next()])
    assert isinstance(outcome, Outcome)
    task.take(task.next(), outcome)
    assert task.next() is None and task.verdict().item(False).args == ("timeout",)


def test_copies_and_pickles():
    reward = UnitTests("cases", partial=True, cpu_seconds=1.0)
    assert copy.deepcopy(reward) is reward
    twin = pickle.loads(pickle.dumps(reward))
    row = {"cases": SQUARES["tests"]}
    batch = TextBatch.from_texts(["def f(x): return x + x"], [row])
    assert twin.evaluate(batch).values.tolist() == reward.evaluate(batch).values.tolist() == [0.5]


@pytest.mark.parametrize("partial", [False, True])
def test_examples(partial):
    reward = UnitTests(partial=partial)
    examples = reward.examples()
    batch = TextBatch.from_texts([e.text for e in examples], [e.row for e in examples])
    assert reward.evaluate(batch).values.tolist() == [e.value for e in examples]
    assert examples[0].value == reward.high and examples[-1].value == reward.low


def test_it_is_registered():
    assert isinstance(make_reward("code"), UnitTests)


def test_making_it_starts_nothing(monkeypatch):
    monkeypatch.setattr(CodeRunner, "_start", lambda self: pytest.fail("started"))
    UnitTests(workers=7)
