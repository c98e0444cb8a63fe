"""The code runner: outcomes, levels, and who is to blame for what."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest

from textgym.sandbox import runner as runner_module
from textgym.sandbox.__main__ import main
from textgym.sandbox.levels import BREACHES, LAYERS, Level, Report
from textgym.sandbox.plain import to_json
from textgym.sandbox.process import Zygote
from textgym.sandbox.runner import CodeRunner, Job, Outcome, SandboxError, ZygoteDiedError
from textgym.sandbox.syscalls import ARCHITECTURES, MACHINE

SQUARE = "def f(x):\n    return x * x"


@pytest.fixture(scope="module")
def runner():
    made = CodeRunner(require="limited")
    try:
        _ = made.report
    except SandboxError as error:
        pytest.skip(str(error))
    yield made
    made.close()


def calls(code, *arguments, **limits):
    return Job(code=code, calls=[to_json([a]) for a in arguments], **limits)


def test_calls(runner):
    (outcome,) = runner.map([calls(SQUARE, 3, 2**70, 1.5)])
    assert outcome.status == "ok"
    assert outcome.answers == [["ok", 9], ["ok", {"int": hex(2**140)}], ["ok", 2.25]]
    assert 0 < outcome.cpu_seconds < 2 and outcome.memory_mb > 1 and outcome.wall_seconds > 0


def test_what_a_call_raises_does_not_stop_the_others(runner):
    code = "def f(x):\n    if x == 1: raise ValueError\n    return x"
    (outcome,) = runner.map([calls(code, 0, 1, 2)])
    assert outcome.answers == [["ok", 0], ["exception"], ["ok", 2]]


def test_answers_until_the_budget_is_spent_are_kept(runner):
    code = "def f(x):\n    while x: pass\n    return x"
    (outcome,) = runner.map([calls(code, 0, 1, 0, cpu_seconds=0.05)])
    assert outcome.status == "timeout" and outcome.answers == [["ok", 0]]
    assert 0.04 < outcome.cpu_seconds < 0.5


def test_entry_points(runner):
    code = "class A:\n def __init__(s): s.n = 1\n def g(s, x): return x + s.n\ndef h(x): return 7"
    from_last = "from math import floor\ndef f(x): return 1\ndef g(x): return 2\ny = floor"
    jobs = [
        calls(code, 3, entry_point="A.g"),
        calls(code, 3, entry_point="h"),
        calls(code, 3, entry_point="A.k"),
        calls(from_last, 3),
    ]
    outcomes = runner.map(jobs)
    assert [o.answers for o in outcomes] == [[["ok", 4]], [["ok", 7]], [], [["ok", 2]]]
    assert outcomes[2].status == "no entry point"


def test_programs(runner):
    job = Job(code="import sys\nprint(sys.stdin.read()[::-1])", stdin="ab\u00e9\n" * 50_000)
    outcome, quiet = runner.map([job, Job(code="x = 1")])
    assert outcome.status == quiet.status == "ok"
    assert outcome.output.decode() == job.stdin[::-1] + "\n"
    assert quiet.output == b""


def test_a_program_that_reads_nothing_does_not_block_the_scorer(runner):
    (outcome,) = runner.map([Job(code="print(1)", stdin="x" * 10_000_000)])
    assert (outcome.status, outcome.output) == ("ok", b"1\n")


def test_programs_are_deterministic(runner):
    code = "import random\nprint(random.random(), list({'a', 'b', 'c', 'd'}), hash('x'))"
    assert len({o.output for o in runner.map([Job(code=code)] * 6)}) == 1


def test_a_job_finds_nothing_of_the_jobs_before(runner):
    secret = Job(code="x = 'sesame-open'\ndef f(x): return x", calls=[[0]])
    search = """
import gc
def f(x):
    needle = '-'.join(['sesame', 'open'])
    return any(needle in str(o) for o in gc.get_objects() if type(o) in (dict, list, tuple))
"""
    single = CodeRunner(workers=1, require="limited")
    try:
        limits = {"cpu_seconds": 20.0, "wall_seconds": 60.0}
        first, second = single.map([secret, calls(search, 0, **limits)])
        (both,) = single.map([calls(f"y = ['sesame-open']\n{search}", 0, **limits)])
    finally:
        single.close()
    assert first.status == "ok" and second.answers == [["ok", False]]
    assert both.answers == [["ok", True]]  # the search does find


def test_from_many_threads(runner):
    results = {}

    def ask(n):
        results[n] = [o.answers[0][1] for o in runner.map([calls(SQUARE, n), calls(SQUARE, -n)])]

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {n: [n * n, n * n] for n in range(12)}


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_fork_has_zygotes_of_its_own(runner):
    assert runner.map([calls(SQUARE, 3)])[0].status == "ok"
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            answers = runner.map([calls(SQUARE, 5)])[0].answers
            os.write(write, pickle.dumps(answers))
            runner.close()
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        assert pickle.loads(pipe.read()) == [["ok", 25]]
    os.waitpid(child, 0)
    assert runner.map([calls(SQUARE, 3)])[0].answers == [["ok", 9]]


def test_a_fork_in_the_middle_of_a_job_does_not_hold_its_stdin_open():
    single = CodeRunner(workers=1, require="limited")
    _ = single.report
    code = "import sys, time\ntime.sleep(0.5)\nprint(len(sys.stdin.read()))"
    job = Job(code=code, stdin="x" * 1_000_000, wall_seconds=5.0)
    found = []
    thread = threading.Thread(target=lambda: found.extend(single.map([job])))
    thread.start()
    time.sleep(0.25)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks where there are threads
        child = os.fork()
    if child == 0:
        time.sleep(20)
        os._exit(0)
    try:
        thread.join()
        assert found[0].status == "ok" and found[0].output == b"1000000\n"
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        single.close()


def test_a_killed_zygote_is_no_fault_of_the_program():
    single = CodeRunner(workers=1, require="limited")
    zygote = single._ready().zygotes[0]
    killer = threading.Timer(0.3, os.killpg, (zygote.process.pid, signal.SIGKILL))
    killer.start()
    try:
        (outcome,) = single.map([calls("import time\ntime.sleep(0.6)\n" + SQUARE, 4)])
        assert outcome.answers == [["ok", 16]] and zygote.starts == 2
    finally:
        killer.join()
        single.close()


class Fragile:
    """A zygote that dies of some jobs."""

    def __init__(self, deadly):
        self.deadly, self.restarts = deadly, 0

    def run(self, job):
        if self.deadly in job.code:
            raise ZygoteDiedError("dead")
        return Outcome("ok")

    def restart(self):
        self.restarts += 1

    def kill(self):
        pass


@pytest.mark.parametrize("deadly", ["bomb", ""])
def test_what_kills_two_zygotes_is_to_blame_if_harmless_code_does_not(deadly):
    runner = CodeRunner(workers=1)
    zygote = Fragile(deadly)
    state = runner_module._State(
        Report({}, frozenset()), runner_module.queue.SimpleQueue(), [], None
    )
    state.idle.put(zygote)
    outcome = runner._run(state, Job(code="bomb"))
    assert zygote.restarts == 2
    if deadly:
        assert outcome == Outcome("crash")
    else:
        assert isinstance(outcome, SandboxError)


def test_what_was_interrupted_does_not_speak_for_the_next_job(monkeypatch):
    single = CodeRunner(workers=1, require="limited")
    _ = single.report
    real = Zygote._receive

    def interrupted(zygote, deadline):
        monkeypatch.setattr(Zygote, "_receive", real)
        raise KeyboardInterrupt

    monkeypatch.setattr(Zygote, "_receive", interrupted)
    try:
        with pytest.raises(KeyboardInterrupt):
            single.map([calls(SQUARE, 2)])
        time.sleep(0.2)  # the end of that job is told meanwhile
        for x in (3, 4):
            (outcome,) = single.map([calls(SQUARE, x)])
            assert isinstance(outcome, Outcome) and outcome.answers == [["ok", x * x]]
    finally:
        single.close()


@pytest.mark.parametrize("loop", ["print(1)", "while True: pass"])
def test_a_budget_too_small_for_a_start_is_no_failure_of_the_sandbox(runner, loop):
    """A program could sleep until next to nothing is left for its next test."""
    outcomes = runner.map([Job(code=loop, wall_seconds=1e-6)] * 8)
    assert {outcome.status for outcome in outcomes} <= {"ok", "timeout"}


def test_nothing_runs_where_a_layer_is_lost(runner):
    """A layer that the self-test saw and a job has not: the service failed, and the code waits."""
    missing = runner.report.missing
    if not missing:
        pytest.skip("every layer is there")
    zygote = Zygote()
    try:
        assert zygote.missing == ()
        with pytest.raises(SandboxError, match=next(iter(missing))):
            zygote.run(calls(SQUARE, 1))
        zygote.missing = tuple(missing)
        assert zygote.run(calls(SQUARE, 1)).status == "ok"
    finally:
        zygote.kill()


def test_a_zygote_that_could_not_be_restarted_is_started_by_the_next_job(monkeypatch):
    single = CodeRunner(workers=1, require="limited")
    (zygote,) = single._ready().zygotes
    try:
        with monkeypatch.context() as broken:
            broken.setattr("textgym.sandbox.process.BOOT", "raise SystemExit('not now')")
            os.killpg(zygote.process.pid, signal.SIGKILL)
            (outcome,) = single.map([calls(SQUARE, 2)])
            assert isinstance(outcome, SandboxError) and "not now" in str(outcome)
        assert single.map([calls(SQUARE, 2)])[0].answers == [["ok", 4]]
    finally:
        single.close()


def test_descriptors_that_others_have_closed_are_borne():
    single = CodeRunner(workers=1, require="limited")
    (zygote,) = single._ready().zygotes
    old = zygote.process
    try:
        os.close(zygote.control.fileno())
        os.close(old.stderr.fileno())
        assert single.map([calls(SQUARE, 3)])[0].answers == [["ok", 9]]
        assert old.poll() is not None and zygote.starts == 2
    finally:
        single.close()


def test_a_long_temporary_folder(runner, monkeypatch, tmp_path):
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    single = CodeRunner(workers=1, require="limited")
    assert single.report == runner.report
    single.close()


def test_a_broken_start_says_why(monkeypatch):
    monkeypatch.setattr("textgym.sandbox.process.BOOT", "raise SystemExit('no such thing')")
    with pytest.raises(SandboxError, match="did not start: no such thing"):
        _ = CodeRunner().report


@pytest.mark.parametrize(
    ("missing", "breaches", "level"),
    [
        ([], [], Level.FULL),
        (["unprivileged user"], [], Level.FULL),
        (["landlock"], ["read"], Level.CONTAINED),
        (["process namespace"], [], Level.CONTAINED),
        (["no new privileges"], [], Level.LIMITED),
        *((["seccomp"], [b], Level.LIMITED) for b in ("write", "network", "processes", "signals")),
        ([], ["write", "memory"], Level.NONE),
        ([], ["time"], Level.NONE),
    ],
)
def test_levels(missing, breaches, level):
    report = Report(dict.fromkeys(missing, "forbidden"), frozenset(breaches))
    assert report.level is level
    for name in missing:
        assert f"no layer {name!r}: forbidden" in report.shortfall()
        assert f"{name:<20} absent: forbidden" in report.table()
    for name in breaches:
        assert BREACHES[name] in report.shortfall()


def test_it_refuses_below_the_level_required(monkeypatch):
    report = Report({"seccomp": "not in this container"}, frozenset({"write", "network"}))
    monkeypatch.setattr(runner_module, "self_test", lambda zygote: report)
    for _ in range(2):
        with pytest.raises(SandboxError) as error:
            CodeRunner().map([calls(SQUARE, 1)])
    said = str(error.value)
    assert "'limited' here, below 'contained'" in said and "changes files" in said
    assert "'seccomp': not in this container" in said and "allow_unsandboxed_code=True" in said


def test_allowed_to_it_warns_once(monkeypatch, runner):
    report = Report(dict.fromkeys(LAYERS, "not here"), frozenset({"write"}))
    monkeypatch.setattr(runner_module, "self_test", lambda zygote: report)
    monkeypatch.setattr(runner_module, "_WARNED", set())
    with pytest.warns(UserWarning, match="changes files") as caught:
        for _ in range(2):
            unsafe = CodeRunner(workers=1, allow_unsandboxed_code=True)
            assert unsafe.map([calls(SQUARE, 3)])[0].answers == [["ok", 9]]
            unsafe.close()
    assert len(caught) == 1


@pytest.mark.parametrize("options", [{"workers": 0}, {"require": "none"}, {"require": "best"}])
def test_bad_arguments(options):
    with pytest.raises(ValueError, match="must be"):
        CodeRunner(**options)


def test_closing_ends_the_zygotes_and_a_later_job_starts_new_ones():
    runner = CodeRunner(workers=1, require="limited")
    assert runner.map([calls(SQUARE, 2)])[0].status == "ok"
    first = runner._state.zygotes[0].process
    runner.close()
    runner.close()
    assert first.returncode is not None
    assert runner.map([calls(SQUARE, 2)])[0].status == "ok"
    runner.close()


def test_a_layer_that_the_machine_offers_is_used(runner):
    """So that a layer that broke is a failure, and not a skipped test; asked of other tools."""
    missing = runner.report.missing
    if "Seccomp:" in Path("/proc/self/status").read_text() and MACHINE in ARCHITECTURES:
        assert "seccomp" not in missing and "no new privileges" not in missing
        assert runner.report.level >= Level.CONTAINED
    lsm = Path("/sys/kernel/security/lsm")
    if lsm.is_file() and "landlock" in lsm.read_text():
        assert "landlock" not in missing
    tool = shutil.which("unshare")
    options = ["--user", "--pid", "--net", "--ipc", "--fork", "true"]
    if tool and subprocess.run([tool, *options], capture_output=True, check=False).returncode == 0:
        assert not [layer for layer in missing if layer.endswith("namespace")]


def test_the_table(runner, capsys):
    assert main() == 0
    out = capsys.readouterr().out
    assert all(f"\n{layer} " in out for layer in LAYERS)
    assert f"level: {runner.report.level.name.lower()}" in out


ORPHAN = """
import sys
from textgym.sandbox.runner import CodeRunner, Job
runner = CodeRunner(workers=1, require="limited")
runner.report
print(runner._state.zygotes[0].process.pid, flush=True)
runner.map([Job(code="import time\\ntime.sleep(300)", wall_seconds=600.0)])
"""


@pytest.mark.parametrize("thread", [False, True])
def test_a_scorer_that_is_killed_leaves_no_orphan(runner, thread):
    code = ORPHAN
    if thread:  # the thread that starts the zygote is not the one that lives on
        code = code.replace(
            "runner.report\n",
            "import threading\nt = threading.Thread(target=lambda: runner.report)"
            "\nt.start(); t.join()\n",
        )
    scorer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    guard = int(scorer.stdout.readline())
    deadline = time.monotonic() + 30
    while len(family := session_of(guard)) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(family) == 3  # the guard, the server and the program
    scorer.kill()
    scorer.wait()
    scorer.stdout.close()
    deadline = time.monotonic() + 30
    while any(map(alive, family)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, family))


def session_of(pid):
    """Give a process and its descendants."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:
                continue
            parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
    family = [pid]
    for member in family:
        family += [child for child, parent in parents.items() if parent == member]
    return family


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_importing_it_is_cheap():
    code = "import sys, textgym.sandbox.runner; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_warning_at_the_end_of_a_process(runner):
    code = (
        "from textgym.sandbox.runner import CodeRunner, Job\n"
        "print(CodeRunner(workers=1, require='limited').map([Job(code='print(1)')])[0].output)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("b'1\\n'\n", "")
