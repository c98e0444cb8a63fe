"""Programs written to get what they have not earned, or to do harm. Tests are f(x) = x * x."""

# ruff: noqa: E501

from __future__ import annotations

SYSCALL = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
def syscall(number, *arguments):
    return libc.syscall(*[ctypes.c_long(a) if isinstance(a, int) else a for a in (number, *arguments)])
"""
FORGE = """
import os, struct, json
def forge(*bodies):
    for fd in range(64):
        for body in bodies:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            try: os.write(fd, struct.pack("<I", len(data)) + data)
            except OSError: pass
"""
DIE = "\nos._exit(0)\n"

TIME = {
    "infinite loop": "def f(x):\n while True: pass",
    "loop in C over big integers": "def f(x):\n return 9 ** (9 ** 9)",
    "loop in C at import": "import itertools\nsum(itertools.repeat(1))",
    "ignored signals": """
import signal
for s in signal.valid_signals() - {9, 19}:
    try: signal.signal(s, signal.SIG_IGN)
    except (OSError, ValueError): pass
signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
while 1: pass""",
    "sleep": "import time\ntime.sleep(1000)",
    "regex": "import re\nre.match(r'(a+)+$', 'a' * 60 + 'b')",
    "loop in threads": """
import threading
def spin():
    while 1: pass
for _ in range(4): threading.Thread(target=spin).start()
spin()""",
    "deadlock": "import threading\nl = threading.Lock()\nl.acquire()\nl.acquire()",
    "waiting with all signals blocked": """
import signal
signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
signal.pause()""",
    "deleted timers": SYSCALL
    + "for i in range(9): syscall(226, i); syscall(111, i)\nwhile 1: pass",
    "exit handler that loops": "import atexit, itertools\natexit.register(sum, itertools.repeat(1))\n"
    "import sys\natexit._run_exitfuncs()",
    "finalizer that loops": "class A:\n def __del__(s):\n  while 1: pass\na = A()\ndel a",
    "kernel time": "import os\nwhile 1: os.urandom(1 << 20)",
    "hash collisions": "s = set()\nfor i in range(10**7): s.add(i * (2**61 - 1))\n",
    "import lock": "import _imp\n_imp.acquire_lock()\nimport threading\n"
    "threading.Thread(target=__import__, args=('wave',)).start()\nimport time\ntime.sleep(99)",
    "trace function that loops": "import sys\ndef t(*a):\n while 1: pass\nsys.settrace(t)\n"
    "def f(x): return x * x",
}
MEMORY = {
    "list": "a = [0] * (10**10)",
    "growth": "a = []\nwhile 1: a.append(bytearray(10**7))",
    "constant folding": "x = (('a' * 10**8) * 10)",
    "decompression": "import zlib\nc = zlib.compressobj()\n"
    "d = b''.join(c.compress(bytes(1 << 20)) for _ in range(64)) + c.flush()\n"
    "e = zlib.compress(d)\nzlib.decompress(zlib.decompress(e)) * 50",
    "anonymous map": "import mmap\nm = mmap.mmap(-1, 1 << 33)\nfor i in range(0, 1 << 33, 4096): m[i] = 1",
    "shared segments": SYSCALL
    + """
while syscall(29, 0, 1 << 24, 0o1600) >= 0 or syscall(194, 0, 1 << 24, 0o1600) >= 0: pass
a = bytearray(1 << 40)""",
    "memfd": SYSCALL
    + "import os\nfd = os.memfd_create('x')\nwhile 1: os.write(fd, bytes(1 << 20))",
    "many small threads": """
import threading, time
threading.stack_size(32768)
for _ in range(10**6): threading.Thread(target=time.sleep, args=(99,)).start()""",
    "threads": "import threading, time\n"
    "for _ in range(10**6): threading.Thread(target=time.sleep, args=(99,)).start()",
    "pipes": """
import os, fcntl
while 1:
    r, w = os.pipe()
    try: fcntl.fcntl(w, 1031, 1 << 20)
    except OSError: pass
    os.set_blocking(w, False)
    os.write(w, bytes(1 << 20))""",
    "billion laughs": "def f(x):\n a = [1]\n for _ in range(40): a = [a, a]\n return a",
}
CRASH = {
    "null pointer": "import ctypes\nctypes.string_at(0)",
    "abort": "import os\nos.abort()",
    "deep recursion": "def f(x): return f(x)",
    "deep recursion without a limit": "import sys\nsys.setrecursionlimit(2**31 - 1)\n"
    "def f(x): return sorted([x], key=f)",
    "deep recursion in repr": "import sys\nsys.setrecursionlimit(10**9)\na = []\n"
    "for _ in range(10**6): a = [a]\nrepr(a)",
    "deep recursion in a callback": """
import ctypes, sys
sys.setrecursionlimit(10**9)
T = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)
@T
def g(x): return g(x)
g(1)""",
    "exit": "import os\nos._exit(0)",
    "exit codes of ours": "import os\ndef f(x): os._exit(80 + x)",
    "system exit": "import sys\nsys.exit(0)",
    "system exit in a call": "def f(x): raise SystemExit(0)",
    "keyboard interrupt": "def f(x): raise KeyboardInterrupt",
    "an exception of no good": """
class M(type):
    def __instancecheck__(c, o): return True
    def __getattribute__(c, n): raise SystemExit
class E(BaseException, metaclass=M):
    def __str__(s): return 1 / 0
    __repr__ = __str__
def f(x): raise E""",
    "closed descriptors": "import os\nos.closerange(0, 256)\ndef f(x): return x * x",
    "closed descriptors, and waiting": "import os, time\nos.closerange(0, 256)\ntime.sleep(99)",
    "a flood on stderr": "import sys\nfor _ in range(200): print('x' * 10**6, file=sys.stderr)\n",
    "a flood on stdout": "for _ in range(200): print('x' * 10**6)\n",
    "reading stdin": "def f(x): return input()",
    "stopping itself": "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)\n"
    "signal.raise_signal(signal.SIGSTOP)",
    "no code": "",
    "not a function": "f = 7",
}
COMPILE = {
    "syntax": "def f(x) return",
    "nul": "x = 1\0",
    "surrogate": "x = '\ud800'\ndef f(y): return x",
    "brackets": "x = " + "(" * 5000 + ")" * 5000,
    "signs": "x = " + "-" * 60_000 + "1",
    "lines": "x=1\n" * 16_000,
    "coding": "# -*- coding: rot13 -*-\nqrs s(k): erghea k * k",
}
FORGERIES = {
    "equal to everything": "class A:\n def __eq__(s, o): return True\ndef f(x): return A()",
    "an integer equal to everything": "class A(int):\n def __eq__(s, o): return True\n"
    "def f(x): return A(7)",
    "a list of any length": "class A(list):\n def __len__(s): return 0\ndef f(x): return A()",
    "nan": "def f(x): return float('nan')",
    "infinity": "def f(x): return float('inf')",
    "floats": "def f(x): return float(x * x)",
    "booleans": "def f(x): return bool(x * x)",
    "text": "def f(x): return str(x * x)",
    "huge integer": "def f(x): return 10 ** 500000",
    "huge text": "def f(x): return 'a' * 10**8",
    "long text": "def f(x): return 'a' * 10**7",
    "deep list": "def f(x):\n a = []\n for _ in range(10**5): a = [a]\n return a",
    "list in itself": "def f(x):\n a = []\n a.append(a)\n return a",
    "surrogate answer": "def f(x): return '\\ud800\\x00'",
    "generator": "def f(x): yield x * x",
    "coroutine": "async def f(x): return x * x",
    "garbage in every descriptor": "import os\nfor fd in range(64):\n"
    " try: os.write(fd, b'\\xff\\x00{')\n except OSError: pass" + DIE,
    "a refusal in every descriptor": "import os\nfor fd in range(64):\n"
    " try: os.write(fd, b'-{}')\n except OSError: pass" + DIE,
    "wrong frames": FORGE + "forge(*[['ok', 7]] * 5)" + DIE,
    "right looking frames": FORGE
    + "forge(*[['ok', True], ['ok', None], ['ok', {}], ['ok']] * 2)"
    + DIE,
    "frames that announce 4 GiB": "import os\nfor fd in range(64):\n"
    " try: os.write(fd, b'\\xff\\xff\\xff\\xff')\n except OSError: pass" + DIE,
    "deeply nested frames": FORGE + "forge(b'[' * 60000)" + DIE,
    "frames with long integers": FORGE + "forge(b'[\"ok\", ' + b'9' * 60000 + b']')" + DIE,
    "frames with colliding keys": FORGE
    + "forge(['ok', {'set': [{'int': hex(i * (2**61 - 1))} for i in range(2000)]}])"
    + DIE,
    "statuses of its own": FORGE + "forge(*[['error: service'], [['x']], [{}], [None]] * 2)" + DIE,
    "frames of the harness": """
import sys
def f(x):
    frame = sys._getframe()
    while frame:
        for name, value in frame.f_locals.items():
            if name in ('outcome', 'answers', 'status'): frame.f_locals[name] = ['ok', x]
            if isinstance(value, dict) and 'expected' in value: return value['expected']
        frame = frame.f_back
    return -1""",
    "objects of the harness": """
import gc, sys
def f(x):
    for o in gc.get_objects():
        if type(o) is dict and any(k in o for k in ('expected', 'stdout', 'answer')):
            for k in ('expected', 'stdout', 'answer'):
                if type(o.get(k)) is int: return o[k]
    return -1""",
    "patched harness": """
import builtins, json, os, sys
job = sys.modules['textgym.sandbox.job']
def f(x): return -1
job.to_json = lambda value, depth=0: True
json.dumps = lambda *a, **k: '["ok", true]'
builtins.len = lambda o: 1""",
    "patched exit": "import os\nos._exit = lambda code: None\ndef f(x): return -1",
    "profiled harness": """
import sys
def p(frame, event, arg):
    if event == 'return': frame.f_locals['outcome'] = ['ok', 4]
sys.setprofile(p)
def f(x): return -1""",
}
# Each of these does its harm while it is imported, and then answers rightly: it is of no use for
# them to fail, and nothing may have happened.
HARM = {
    "shell": "import subprocess\nsubprocess.run(['/bin/sh', '-c', 'touch MARK'])",
    "os.system": "import os\nassert os.system('touch MARK') == 0",
    "exec": "import os\nos.execv('/bin/sh', ['sh', '-c', 'touch MARK'])",
    "fork bomb": "import os\nwhile 1: os.fork()",
    "fork and run away": """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0: time.sleep(999)
    os._exit(0)""",
    "raw clone": SYSCALL
    + """
import os, time
for n, flags in ((56, 17), (220, 17), (57, 0), (58, 0)):
    if os.uname().machine == ('aarch64' if n == 220 else 'x86_64') and syscall(n, flags, 0, 0, 0, 0) == 0:
        time.sleep(999)
assert 0""",
    "clone3": SYSCALL + "a = ctypes.create_string_buffer(88)\nassert syscall(435, a, 88) == 0",
    "memfd and exec": SYSCALL
    + """
import os
fd = os.memfd_create('x')
os.write(fd, open('/usr/bin/touch', 'rb').read())
os.execv(f'/proc/self/fd/{fd}', ['touch', 'MARK'])""",
    "multiprocessing": "import multiprocessing as m\nm.get_context('fork').Pool(2).map(abs, [1])",
    "write": "open('MARK', 'w').write('x')",
    "append": "import os\nos.open('MARK', os.O_APPEND | os.O_CREAT)",
    "temporary file": "import tempfile\nt = tempfile.NamedTemporaryFile(delete=False, prefix='NAME')",
    "unnamed file": "import os\nos.open('/dev/shm', os.O_TMPFILE | os.O_RDWR)",
    "folder": "import os\nos.mkdir('MARK')",
    "symbolic link": "import os\nos.symlink('/etc/passwd', 'MARK')\nopen('MARK').read()",
    "hard link": "import os, sys\nos.link(sys.executable, 'MARK')",
    "rename": "import os\nos.rename('VICTIM', 'MARK')",
    "unlink": "import os\nos.unlink('VICTIM')",
    "chmod": "import os\nos.chmod('VICTIM', 0o777)",
    "utime": "import os\nos.utime('VICTIM', (0, 0))",
    "truncate": "import os\nos.truncate('VICTIM', 0)",
    "raw openat2": SYSCALL + "h = ctypes.create_string_buffer(b'\\x42', 24)\n"
    "assert syscall(437, -100, b'MARK', h, 24) >= 0",
    "fifo": "import os\nos.mkfifo('MARK')",
    "extended attribute": "import os\nos.setxattr('VICTIM', 'user.x', b'1')",
    "mapped file": "import mmap, os\nm = mmap.mmap(os.open('VICTIM', os.O_RDWR), 4)\nm[0] = 0",
    "network": "import socket\ns = socket.create_connection(('1.1.1.1', 80), 2)",
    "loopback": "import socket\ns = socket.socket()\ns.bind(('127.0.0.1', 0))",
    "datagram": "import socket\nsocket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 9))",
    "abstract socket": "import socket\nsocket.socket(socket.AF_UNIX).bind('\\0NAME')",
    "socket pair": "import socket\nsocket.socketpair()",
    "netlink": "import socket\nsocket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
    "io_uring": SYSCALL + "assert syscall(425, 8, ctypes.create_string_buffer(120)) >= 0",
    "read passwords": "open('/etc/passwd').read()",
    "read the environment": "open('/proc/self/environ').read()",
    "read home": "import os\nos.listdir('/root')",
    "read the victim": "open('VICTIM').read()",
    "memory by proc": "import os\nos.open('/proc/self/mem', os.O_RDWR)\nos.open('/proc/1/mem', os.O_RDWR)",
    "root by proc": "import os\nos.listdir('/proc/1/root/')",
    "kill the parent": "import os\nos.kill(os.getppid(), 9)",
    "kill the scorer": "import os\nos.kill(SCORER, 9)",
    "kill the first": "import os\nos.kill(1, 9)",
    "queue a signal": SYSCALL + "import os\ni = ctypes.create_string_buffer(128)\n"
    "assert syscall(129, os.getppid(), 9, i) == 0 or syscall(138, os.getppid(), 9, i) == 0",
    "signal by descriptor": """
import fcntl, os
r, w = os.pipe()
fcntl.fcntl(r, fcntl.F_SETOWN, os.getppid())
fcntl.fcntl(r, 10, 9)
fcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC)
os.write(w, b'x')""",
    "process descriptor": SYSCALL + "import os\nfd = os.pidfd_open(os.getppid())\n"
    "assert syscall(424, fd, 9, None, 0) == 0",
    "ptrace": SYSCALL + "import os\nassert syscall(101, 16, os.getppid(), 0, 0) == 0",
    "memory of the parent": SYSCALL + "import os\nv = (ctypes.c_long * 2)(id(os), 8)\n"
    "assert syscall(310, os.getppid(), v, 1, v, 1, 0) > 0",
    "raised limits": "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))\n"
    "a = bytearray(2 * 10**9)",
    "raised limits, raw": SYSCALL
    + "n = (ctypes.c_long * 2)(-1, -1)\nassert syscall(302, 0, 9, n, None) == 0",
    "other namespaces": SYSCALL + "assert libc.unshare(0x10000000) == 0",
    "mount": SYSCALL + "assert libc.mount(b'x', b'/mnt', b'tmpfs', 0, None) == 0",
    "chroot": "import os\nos.chroot('/')",
    "survive the parent": SYSCALL + "assert libc.prctl(1, 0, 0, 0, 0) == 0",
    "terminal": "import fcntl, os\nfor c in b'touch MARK\\n':\n fcntl.ioctl(0, 0x5412, bytes([c]))",
    "keys": SYSCALL + "assert syscall(248, b'user', b'x', b'y', 1, -3) >= 0",
    "bpf": SYSCALL + "assert syscall(321, 0, ctypes.create_string_buffer(64), 64) >= 0",
    "userfaultfd": SYSCALL + "assert syscall(323, 1) >= 0",
    "32-bit system call": """
import ctypes, mmap
m = mmap.mmap(-1, 4096, prot=7)
m.write(b'\\xb8\\x02\\x00\\x00\\x00\\xcd\\x80\\xc3')
fork = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))
assert fork() >= 0""",
    "x32 system call": SYSCALL + "syscall(0x40000000 + 39)\nassert 0",
    "priority": "import os\nos.setpriority(os.PRIO_PROCESS, os.getppid(), 19)",
}


def prepare(code: str, *, victim: str, mark: str, scorer: int) -> str:
    """Fill in what a harmful program is after; it answers rightly if it gets that far."""
    names = {"VICTIM": victim, "MARK": mark, "NAME": mark.rsplit("/", 1)[-1], "SCORER": str(scorer)}
    for name, value in names.items():
        code = code.replace(name, value)
    return f"{code}\ndef f(x): return x * x\n"
