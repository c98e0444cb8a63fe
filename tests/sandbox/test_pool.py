"""The worker pool: what hangs, bloats or crashes costs its own verdict and nobody else's."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from textgym.sandbox.frames import FrameError, read_frame, write_frame
from textgym.sandbox.pool import Verdict, WorkerPool, shared_pool
from textgym.sandbox.workers import Worker

SETUP = r"""
import ctypes, os, re, resource, signal, sys, time

print("noise on stdout at import")
calls = 0


def act(what, *rest):
    global calls
    calls += 1
    print("noise on stdout")
    if what == "value":
        return rest[0]
    if what == "calls":
        return calls
    if what == "length":
        return len(rest[0])
    if what == "codes":
        return ",".join(hex(ord(c)) for c in rest[0])
    if what == "spin":
        while True:
            pass
    if what == "redos":
        return float(bool(re.match(r"^(\w+\s?)*$", "a" * 40 + "!")))
    if what == "bigint":
        return float(len(str(9 ** 9 ** 9)))
    if what == "bytes":
        return len(bytearray(1 << 40))
    if what == "grow":
        hoard = []
        while True:
            hoard.append(bytearray(1 << 24))
    if what == "recurse":
        return act("recurse") + 1
    if what == "sleep":
        time.sleep(rest[0])
        return 1.0
    if what == "segv":
        ctypes.string_at(0)
    if what == "abort":
        os.abort()
    if what == "exit":
        os._exit(int(rest[0]))
    if what == "sysexit":
        sys.exit(3)
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "guard":
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(5)
    if what == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if what == "raise":
        raise ValueError("boom\nsecond line")
    if what == "rude":
        class Rude(Exception):
            def __str__(self):
                raise RuntimeError
        raise Rude
    if what == "interrupt":
        raise KeyboardInterrupt
    if what == "environ":
        with open("/proc/self/environ") as file:
            return ",".join(line.partition("=")[0] for line in file.read().split("\0") if line)
    if what == "descriptors":
        return ",".join(sorted(os.listdir("/proc/self/fd"), key=int))
    if what == "write":
        try:
            with open(rest[0], "w") as file:
                file.write("x" * 100)
        except OSError as error:
            return type(error).__name__
        return 1.0
    if what == "pid":
        return float(os.getpid())
    if what == "guard_pid":
        return float(os.getppid())
    if what == "core":
        return float(resource.getrlimit(resource.RLIMIT_CORE)[1])
"""

HOSTILE = {
    "spin": "timeout",
    "redos": "timeout",
    "bigint": "timeout",
    "bytes": "memory",
    "grow": "memory",
    "recurse": "recursion",
    "segv": "crash",
    "abort": "crash",
    "exit": "crash",
    "kill": "killed",
    "guard": "killed",
    "sysexit": "error: SystemExit: 3",
    "raise": "error: ValueError: boom",
    "rude": "error: Rude",
    "interrupt": "error: KeyboardInterrupt: ",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("acts")
    (folder / "acts.py").write_text(SETUP)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield folder


@pytest.fixture
def setup(folder):
    return "acts:act"


@pytest.fixture(scope="module")
def pool(folder):
    setup = "acts:act"
    with WorkerPool(setup, cpu_seconds=0.5, wall_seconds=20.0, memory_mb=256) as pool:
        yield pool


def alive(pid):
    try:
        state = Path(f"/proc/{int(pid)}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize(
    "value",
    ["", "a\0b", "\ud800", "\ud800\udc00", "\udcff", "é😀\u202e", [1, -2.5, None, {"": [True]}]],
)
def test_frames_keep_any_string(value):
    reader, writer = os.pipe()
    try:
        write_frame(writer, value)
        assert read_frame(reader, 1000) == value
    finally:
        os.close(reader)
        os.close(writer)


def test_frames_refuse_what_is_none():
    def send(data, limit=100, deadline=None):
        reader, writer = os.pipe()
        try:
            os.write(writer, data)
            os.close(writer) if deadline is None else None
            return read_frame(reader, limit, deadline)
        finally:
            os.close(reader)
            if deadline is not None:
                os.close(writer)

    assert send(b"\x02\0\0\0[]") == []
    with pytest.raises(EOFError):
        send(b"\x02\0\0\0[")
    with pytest.raises(EOFError):
        send(b"")
    with pytest.raises(FrameError, match="at most 100 bytes"):
        send(b"\xff\xff\xff\xff[]")
    for body in (b"\x80abc", b"[", b"\xff", b"1" * 5000, b"[" * 5000, b'{"a":1}x'):
        with pytest.raises(FrameError):
            send(len(body).to_bytes(4, "little") + body, limit=10_000)
    with pytest.raises(TimeoutError):
        send(b"\x02\0\0\0[", deadline=time.monotonic() + 0.05)


def test_values_come_back_in_order(pool):
    items = [("value", i / 7) for i in range(100)]
    assert [v.value for v in pool.map(items)] == [i / 7 for i in range(100)]
    assert pool.map([]) == []


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_item_has_its_status_and_its_neighbours_their_values(pool, what):
    items = [("value", i) for i in range(5)]
    items[2:2] = [(what, 9)]
    verdicts = pool.map(items)
    assert verdicts[2] == Verdict(None, HOSTILE[what])
    assert [v.value for v in verdicts[:2] + verdicts[3:]] == [0, 1, 2, 3, 4]
    assert {v.status for v in verdicts[:2] + verdicts[3:]} == {"ok"}


def test_sixty_honest_items_among_all_hostile_ones(setup):
    honest = [("value", i) for i in range(60)]
    hostile = [(what, 9) for what in HOSTILE]
    mixed = list(honest)
    for k, item in enumerate(hostile):
        mixed.insert(4 * k, item)
    with WorkerPool(setup, cpu_seconds=0.5, memory_mb=256) as pool:
        verdicts = dict(zip(mixed, pool.map(mixed), strict=True))
    assert [verdicts[item] for item in honest] == [Verdict(i, "ok") for i in range(60)]
    assert {what: verdicts[what, 9].status for what in HOSTILE} == HOSTILE


@pytest.mark.parametrize("what", ["sleep", "stop"])
def test_wall_time_ends_what_uses_no_cpu(setup, what):
    with WorkerPool(setup, workers=1, cpu_seconds=0.2, wall_seconds=0.7) as pool:
        verdicts = pool.map([("value", 1), (what, 60), ("value", 2)])
        assert [v.status for v in verdicts] == ["ok", "timeout", "ok"]


def test_an_item_that_was_killed_by_accident_is_scored_by_the_next_worker(setup):
    with WorkerPool(setup) as pool:
        guards = {int(v.value) for i in range(8) for v in pool.map([("guard_pid", i)])}
        found = []
        thread = threading.Thread(target=lambda: found.extend(pool.map([("sleep", 1.0)])))
        thread.start()
        time.sleep(0.4)
        for guard in guards:
            os.kill(guard, signal.SIGKILL)
        thread.join()
        assert found == [Verdict(1.0, "ok")]
        assert int(pool.map([("guard_pid", 9)])[0].value) not in guards


def test_equal_items_are_scored_once_and_remembered(setup):
    with WorkerPool(setup, workers=1, cpu_seconds=0.3, cache=3) as pool:
        first = pool.map([("calls", "a"), ("calls", "b"), ("calls", "a")])
        assert [v.value for v in first] == [1, 2, 1]
        assert [v.value for v in pool.map([("calls", "b"), ("calls", "c")])] == [2, 3]
        assert pool.map([("calls", "a")])[0].value == 1
        pool.map([("calls", "d")])  # "b" was not asked for the longest
        assert pool.map([("calls", "b")])[0].value == 5


def test_a_timeout_of_cpu_is_remembered_and_an_error_is_not(setup):
    with WorkerPool(setup, workers=1, cpu_seconds=0.3) as pool:
        assert pool.map([("spin",)])[0].status == "timeout"
        pid = pool.map([("pid", 0)])[0].value
        assert pool.map([("spin",)])[0].status == "timeout"
        assert pool.map([("pid", 1)])[0].value == pid  # nothing was run, so nothing was killed
        assert pool.map([("raise",), ("calls", 1)])[1].value == 4
        assert pool.map([("raise",), ("calls", 2)])[1].value == 6


def test_values_that_are_no_numbers(pool):
    statuses = [
        v.status
        for v in pool.map([("value", x) for x in (float("inf"), float("nan"), None, [1], 10**400)])
    ]
    assert all(s.startswith("error: ValueError: expected a finite number") for s in statuses)
    assert pool.map([("value", "unparsable")]) == [Verdict(None, "unparsable")]
    assert pool.map([("value", True)]) == [Verdict(1.0, "ok")]


def test_strings_arrive_as_they_are(pool):
    for text in ("\ud800", "\ud800\udc00", "a\0b", "\r\n", "é😀"):
        expected = ",".join(hex(ord(c)) for c in text)
        assert pool.map([("codes", text)]) == [Verdict(None, expected)]
    assert pool.map([("length", "x" * 3_000_000)])[0].value == 3_000_000
    with pytest.raises(TypeError):
        pool.map([("value", object())])
    assert pool.map([("value", 3)])[0].value == 3


def test_a_worker_has_no_secrets_and_no_descriptors(pool, monkeypatch, tmp_path):
    monkeypatch.setenv("HUB_TOKEN", "secret")
    (environment,) = pool.map([("environ",)])
    assert set(environment.status.split(",")) <= {
        *("PATH", "LD_LIBRARY_PATH", "PYTHONHOME", "TMPDIR", "LANG", "LC_CTYPE", "PYTHONHASHSEED"),
        *("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"),
    }
    extra = os.open(os.devnull, os.O_RDONLY)
    os.set_inheritable(extra, True)
    try:
        with WorkerPool(pool.setup) as fresh:
            (descriptors,) = fresh.map([("descriptors",)])
    finally:
        os.close(extra)
    # 0, 1, 2 are /dev/null; two pipes; and the folder being listed.
    assert len(descriptors.status.split(",")) == 6
    target = tmp_path / "written"
    assert pool.map([("write", str(target))])[0].status == "OSError"
    assert not target.exists() or target.stat().st_size == 0
    assert pool.map([("core",)])[0].value == 0


def test_any_thread_may_call_and_workers_outlive_it(setup):
    pool, results = WorkerPool(setup), {}

    def call(k):
        results[k] = [v.value for v in pool.map([("value", 100 * k + i) for i in range(20)])]

    threads = [threading.Thread(target=call, args=(k,)) for k in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {k: [100 * k + i for i in range(20)] for k in range(6)}
    pids = {pool.map([("guard_pid", i)])[0].value for i in range(6)}
    time.sleep(0.1)
    # The threads that started the workers are gone, the workers are not.
    assert {pool.map([("guard_pid", 10 + i)])[0].value for i in range(6)} == pids
    pool.close()


def test_no_signal_handler_is_touched(pool):
    before = {s: signal.getsignal(s) for s in signal.valid_signals()}
    pool.map([("spin",), ("value", 1)])
    assert {s: signal.getsignal(s) for s in signal.valid_signals()} == before


def test_close_ends_the_workers_and_a_closed_pool_says_so(setup):
    pool = WorkerPool(setup)
    child, guard = (int(pool.map([(what,)])[0].value) for what in ("pid", "guard_pid"))
    assert alive(guard)
    pool.close()
    pool.close()
    assert wait_until(lambda: not alive(child) and not alive(guard))
    with pytest.raises(RuntimeError, match="is closed"):
        pool.map([("value", 1)])


def test_a_forgotten_pool_ends_its_workers(setup):
    pool = WorkerPool(setup)
    guard = pool.map([("guard_pid",)])[0].value
    del pool
    gc.collect()
    assert wait_until(lambda: not alive(guard))


def test_a_setup_that_cannot_be_imported_is_an_error_at_once(setup, folder):
    (folder / "broken.py").write_text("import no_such_module_at_all")
    (folder / "exits.py").write_text("import os; os._exit(5)")
    (folder / "value.py").write_text("thing = 3")
    for name, words in {
        "no_such_setup:f": "No module named 'no_such_setup'",
        "broken:f": "No module named 'no_such_module_at_all'",
        "acts:no_such_function": "has no attribute 'no_such_function'",
        "value:thing": "to be a function, got 3",
        "exits:f": "ended at once",
    }.items():
        with WorkerPool(name) as pool, pytest.raises(RuntimeError, match=words):
            pool.map([("value", 1)])
    for bad in ("acts", ":act", "acts:"):
        with pytest.raises(ValueError, match=r"package\.module:function"):
            WorkerPool(bad)
    with pytest.raises(ValueError, match="cpu_seconds < wall_seconds"):
        WorkerPool(setup, cpu_seconds=3, wall_seconds=2)
    with pytest.raises(ValueError, match="workers >= 1"):
        WorkerPool(setup, workers=0)


def test_a_system_that_is_not_linux_is_refused(setup, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(RuntimeError, match="needs Linux, this is darwin"):
        WorkerPool(setup)


def test_workers_that_do_not_last_are_an_error_and_not_a_loop(setup, monkeypatch):
    monkeypatch.setattr(Worker, "send", lambda *_: (_ for _ in ()).throw(BrokenPipeError("gone")))
    with WorkerPool(setup, workers=1) as pool, pytest.raises(RuntimeError, match="do not last"):
        pool.map([("value", 1)])


def test_an_interrupted_call_leaves_no_answer_for_the_next(pool, monkeypatch):
    receive = Worker.receive

    def interrupt(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Worker, "receive", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pool.map([("value", i + 0.5) for i in range(10)])
    monkeypatch.setattr(Worker, "receive", receive)
    assert [v.value for v in pool.map([("value", -i) for i in range(10)])] == [
        -i for i in range(10)
    ]


def test_pools_are_shared_by_setup_and_limits(setup):
    pool = shared_pool(setup, cpu_seconds=0.5)
    assert shared_pool(setup, cpu_seconds=0.5) is pool
    assert shared_pool(setup, cpu_seconds=0.6) is not pool
    pool.close()
    assert shared_pool(setup, cpu_seconds=0.5) is not pool


FORK = """
import os, sys
from textgym.sandbox.pool import WorkerPool
pool = WorkerPool("acts:act")
guards = {pool.map([("guard_pid", i)])[0].value for i in range(4)}
reader, writer = os.pipe()
child = os.fork()
if child == 0:
    own = {pool.map([("guard_pid", 10 + i)])[0].value for i in range(4)}
    os.write(writer, b"apart" if not own & guards else b"shared")
    sys.exit(0)  # the child runs its exit handlers, which must not end the parent's workers
os.waitpid(child, 0)
assert os.read(reader, 10) == b"apart"
assert {pool.map([("guard_pid", 20 + i)])[0].value for i in range(4)} == guards
print("good")
"""

ORPHANS = """
import sys, time
from textgym.sandbox.pool import WorkerPool
pool = WorkerPool("acts:act", wall_seconds=100)
print(int(pool.map([("guard_pid",)])[0].value), int(pool.map([("pid",)])[0].value), flush=True)
pool.map([("sleep", 90)])
"""


def script(text, folder, **options):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *sys.path])}
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", text],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_after_a_fork_the_child_has_workers_of_its_own(folder):
    with script(FORK, folder) as process:
        out, err = process.communicate(timeout=60)
    assert out.strip() == "good", err


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_caller_leaves_no_orphan(folder, how):
    with script(ORPHANS, folder) as process:
        pids = [int(word) for word in process.stdout.readline().split()]
        assert len(pids) == 2 and all(alive(pid) for pid in pids)
        process.send_signal(how)
        process.wait(60)
        assert wait_until(lambda: not any(alive(pid) for pid in pids))


def test_ctrl_c_reaches_the_caller_and_not_the_worker(folder):
    text = ORPHANS.replace(
        'pool.map([("sleep", 90)])',
        """
import signal
signal.signal(signal.SIGINT, lambda *_: print("interrupted", flush=True))
print(pool.map([("sleep", 1.5)]), flush=True)
""",
    )
    with script(text, folder, start_new_session=True) as process:
        process.stdout.readline()
        time.sleep(0.5)
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert out.split("\n")[:2] == ["interrupted", "[Verdict(value=1.0, status='ok')]"], err
