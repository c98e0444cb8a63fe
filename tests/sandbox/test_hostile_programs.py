"""Programs that want to hang, crash, forge or harm, among honest ones, in one batch."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import time
from pathlib import Path

import pytest

from textgym.rewards import TextBatch
from textgym.rewards.verifiers.code import UnitTests
from textgym.sandbox.levels import Level
from textgym.sandbox.runner import CodeRunner, Job, SandboxError, shared_runner

from .hostile_programs import COMPILE, CRASH, FORGE, FORGERIES, HARM, MEMORY, TIME, prepare

ROW = {"tests": [{"args": [x], "expected": x * x} for x in range(5)], "entry_point": "f"}
BUDGET = {"cpu_seconds": 0.25, "wall_seconds": 4.0, "memory_mb": 256}
HONEST = 60
PROGRAMS = TIME | MEMORY | CRASH | COMPILE | FORGERIES | HARM


@pytest.fixture(scope="module")
def level():
    try:
        return CodeRunner(require="limited").report.level
    except SandboxError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def place():
    folder = Path(tempfile.mkdtemp(prefix="textgym-"))
    (folder / "victim").write_text("untouched")
    (folder / "victim").chmod(0o666)
    os.utime(folder / "victim", (1e9, 1e9))
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def scores(level, place):
    """The score of every program: honest ones and hostile ones in turn, in one batch."""
    if level < Level.CONTAINED:
        pytest.skip(f"programs can do harm here: the sandbox reaches {level.name.lower()} only")
    victim, mark, scorer = str(place / "victim"), str(place / "mark"), os.getpid()
    texts = {
        name: prepare(code, victim=victim, mark=mark, scorer=scorer) if name in HARM else code
        for name, code in PROGRAMS.items()
    }
    for i in range(HONEST):
        texts[f"honest {i}"] = f"def f(x):\n    return x * x + {i} - {i}"
    order = sorted(texts, key=lambda name: hash_of(name))
    reward = UnitTests(**BUDGET)
    result = reward.evaluate(
        TextBatch.from_texts([texts[name] for name in order], [ROW] * len(order))
    )
    return {
        name: (value, status)
        for name, value, status in zip(order, result.values, result.status, strict=True)
    }


def hash_of(name: str) -> int:
    return sum((i + 1) * ord(c) for i, c in enumerate(name)) * 2654435761 % 2**32


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_hostile_program_earns_nothing_and_is_the_one_to_blame(scores, level, name):
    if name.startswith("read ") and level < Level.FULL:
        pytest.skip(f"programs may read files here: the sandbox reaches {level.name.lower()} only")
    value, status = scores[name]
    assert value == 0.0 and math.isfinite(value)
    assert status is None or status.startswith("text: "), status


@pytest.mark.parametrize("name", TIME)
def test_time_runs_out(scores, name):
    assert scores[name][1] == "text: timeout"


@pytest.mark.parametrize("name", MEMORY)
def test_memory_runs_out(scores, name):
    known = ("memory", "timeout", "exception", "crash")
    assert scores[name][1] in [f"text: {status}" for status in known]


def test_statuses_say_what_happened(scores):
    expected = {
        "list": "memory",
        "growth": "memory",
        "null pointer": "crash",
        "exit": "crash",
        "deep recursion": "recursion",
        "system exit": "exception",
        "no code": "no entry point",
        "not a function": "no entry point",
        "syntax": "syntax",
        "nul": "syntax",
        "surrogate": "syntax",
        "coding": "syntax",
        "equal to everything": "not plain",
        "an integer equal to everything": "not plain",
        "list in itself": "not plain",
        "long text": "output",
        "shell": "exception",
    }
    assert {name: scores[name][1] for name in expected} == {
        name: f"text: {status}" for name, status in expected.items()
    }
    assert scores["floats"] == scores["booleans"] == scores["nan"] == (0.0, None)


def test_every_honest_program_is_scored(scores):
    assert [scores[f"honest {i}"] for i in range(HONEST)] == [(1.0, None)] * HONEST


def test_no_file_was_touched(scores, place):
    victim = place / "victim"
    assert victim.read_text() == "untouched"
    assert victim.stat().st_mtime == 1e9 and victim.stat().st_mode & 0o777 == 0o666
    assert sorted(p.name for p in place.iterdir()) == ["victim"]
    for folder in (Path.cwd(), Path.home(), Path("/"), Path("/dev/shm"), place.parent):
        assert not list(folder.glob("mark*"))


def test_no_process_is_left(scores):
    """Of every descendant of this process that is a zygote's, two a zygote are left, at rest."""
    runner = shared_runner()
    wanted = {z.process.pid for z in runner._state.zygotes}
    deadline = time.monotonic() + 5.0
    while True:
        parents = dict(processes())
        found = {pid for pid in parents if wanted & set(ancestors(pid, parents))}
        if len(found) == 2 * len(wanted) or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    assert len(found) == 2 * len(wanted)


def test_the_zygotes_survived(scores):
    """Not one program reached the process that started it."""
    runner = shared_runner()
    assert all(z.starts == 1 for z in runner._state.zygotes)


def processes():
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:
                continue
            yield int(entry.name), int(stat.rpartition(")")[2].split()[1])


def ancestors(pid, parents):
    while pid in parents:
        yield pid
        pid = parents[pid]


@pytest.mark.parametrize("code", ["x = " + "-" * 1_000_000 + "1", "x=1\n" * 2_000_000])
def test_what_is_too_long_for_the_reward_is_none_for_the_runner(level, code):
    (outcome,) = shared_runner().map([Job(code=code, **BUDGET)])
    assert outcome.status in ("timeout", "memory", "syntax", "recursion", "crash")


def test_to_forge_the_right_answers_is_to_know_them(level):
    """The one forgery that pays is the one that does what was asked."""
    if level < Level.CONTAINED:
        pytest.skip(f"programs can do harm here: the sandbox reaches {level.name.lower()} only")
    right = FORGE + "forge(*[['ok', x * x] for x in range(5)])\nos._exit(0)\n"
    twice = right.replace("range(5)", "[0, 1, 4, 9, 16, 25]")
    reward = UnitTests(**BUDGET)
    scores = reward.evaluate(TextBatch.from_texts([right, twice], [ROW] * 2))
    assert scores.values.tolist() == [1.0, 0.0]


STDIN_ROW = {"tests": [{"stdin": "3\n", "stdout": "9\n"}, {"stdin": "4\n", "stdout": "16\n"}]}
SQUARE = "print(int(input()) ** 2)\n"
STDIN_PROGRAMS = {
    "honest": (SQUARE, 1.0, None),
    "exit with success": (SQUARE + "import sys\nsys.exit()", 1.0, None),
    "trailing space": ("print(int(input()) ** 2, '  \\n\\n')", 1.0, None),
    "daemon thread": (
        "import threading, time\nthreading.Thread(target=time.sleep, args=(99,), daemon=True)"
        ".start()\n" + SQUARE,
        1.0,
        None,
    ),
    "exit handler": ("import atexit\natexit.register(lambda: print(int(input()) ** 2))", 1.0, None),
    "main": ("def main():\n    " + SQUARE + "if __name__ == '__main__':\n    main()", 1.0, None),
    "thread that outlives": (
        SQUARE + "import threading, time\nthreading.Thread(target=time.sleep, args=(99,)).start()",
        0.0,
        "text: timeout",
    ),
    "flood": ("while 1: print('x' * 10**6)", 0.0, "text: output"),
    "flood, unbuffered": ("import os\nwhile 1: os.write(1, bytes(65536))", 0.0, "text: output"),
    "failure after output": (SQUARE + "import sys\nsys.exit(1)", 0.0, "text: exception"),
    "raise after output": (SQUARE + "raise ValueError", 0.0, "text: exception"),
    "crash after output": (
        SQUARE + "import sys, ctypes\nsys.stdout.flush()\nctypes.string_at(0)",
        0.0,
        "text: crash",
    ),
    "reading on": ("print(len(open(0).read()))", 0.0, None),
    "nothing read": ("print(9)", 0.0, None),
    "all answers": ("for i in range(9): print(i * i)", 0.0, None),
    "no utf-8": ("import os\nos.write(1, b'\\xff9')", 0.0, None),
    "surrogates": ("print('\\ud800')", 0.0, "text: exception"),
    "closed stdout": ("import os\nos.close(1)\n" + SQUARE, 0.0, "text: exception"),
    "state of the run before": (
        "import sys\nsys.modules['textgym.sandbox.job'].n = getattr(sys.modules["
        "'textgym.sandbox.job'], 'n', 0) + 1\nassert sys.modules['textgym.sandbox.job'].n > 1",
        0.0,
        "text: exception",
    ),
}


@pytest.fixture(scope="module")
def stdin_scores(level):
    if level < Level.CONTAINED:
        pytest.skip(f"programs can do harm here: the sandbox reaches {level.name.lower()} only")
    texts = [code for code, _, _ in STDIN_PROGRAMS.values()]
    result = UnitTests(**BUDGET).evaluate(TextBatch.from_texts(texts, [STDIN_ROW] * len(texts)))
    return dict(zip(STDIN_PROGRAMS, zip(result.values, result.status, strict=True), strict=True))


@pytest.mark.parametrize("name", STDIN_PROGRAMS)
def test_programs_of_stdin_and_stdout(stdin_scores, name):
    assert stdin_scores[name] == STDIN_PROGRAMS[name][1:]
