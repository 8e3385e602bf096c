"""Programs that attack: each is contained, the grader lives and judges the next at once, nothing is left behind.

An attack prints ESCAPED when it has done its harm. It runs on every level that promises to contain it: with all that
works on this machine; the same without the guard (what the kernel alone holds); Landlock and seccomp alone (a
container); namespaces alone; the guard alone (any other system). With nothing at all each does escape.
"""

from __future__ import annotations

import os
import platform
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from nanochat import sandbox
from nanochat.sandbox import MAX_OUTPUT, check_function, execute_code

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the levels are Linux's")

LEVELS = {
    "all": ("guard", "namespaces", "nobody", "landlock", "seccomp"),
    "kernel": ("namespaces", "nobody", "landlock", "seccomp"),
    "container": ("landlock", "seccomp"),
    "namespaces": ("namespaces", "nobody"),
    "guard": ("guard",),
}
SECRET = "hunter2-hunter2"
RESOURCES = {  # these only have to end
    "thread bomb": """
import threading, time
while True:
    threading.Thread(target=time.sleep, args=(60,)).start()""",
    "memory bomb": "x = []\nwhile True: x.append(bytearray(1 << 20))",
    "memory bomb, caught": """
x = []
while True:
    try: x.append(bytearray(1 << 20))
    except MemoryError: pass""",
    "memory bomb, mmap": """
import mmap
maps = []
while True:
    maps.append(mmap.mmap(-1, 1 << 26))
    maps[-1].write(b'x' * (1 << 26))""",
    "big integer": "print(len(str(9 ** 9 ** 9)))",
    "big text": "x = 'a' * 1000\nwhile True: x += x",
    "endless loop": "while True: pass",
    "endless loop that catches": "while True:\n try:\n  while True: pass\n except BaseException: pass",
    "sleep": "import time\ntime.sleep(100)",
    "sleep with all signals blocked": """
import signal, time
signal.pthread_sigmask(signal.SIG_SETMASK, range(1, 65))
time.sleep(100)""",
    "signals ignored": """
import signal
for n in range(1, 65):
    try: signal.signal(n, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True: pass""",
    "endless output": "while True: print('y' * 10000)",
    "endless errors": "import sys\nwhile True: sys.stderr.write('y' * 10000)",
    "endless output, raw": "import os\nwhile True: os.write(1, b'y' * 65536)",
    "huge file": "f = open('big', 'wb', buffering=0)\nwhile True: f.write(bytes(1 << 20))",
    "sparse file": "f = open('big', 'wb')\nf.truncate(1 << 40)",
    "descriptors": "import os\nx = []\nwhile True: x.append(os.pipe())",
    "catastrophic pattern": "import re\nre.match('(a+)+$', 'a' * 40 + 'b')",
    "recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()",
    "recursion in C": """
import sys
sys.setrecursionlimit(10**9)
x = []
for _ in range(10**6): x = [x]
repr(x)""",
    "crash": "import faulthandler\nfaulthandler._read_null()",
    "deep source": "eval('(' * 10**5 + ')' * 10**5)",
}
# What escapes if it works, and the levels that must hold it.
EVERYWHERE = tuple(LEVELS)
NOT_GUARD = ("all", "kernel", "container")
NOT_NAMESPACES = (*NOT_GUARD, "guard")
BORDERS = {
    "fork bomb": (
        EVERYWHERE,
        """
import os, time
n = 0
while n < 20:
    if os.fork() == 0: time.sleep(60)
    n += 1
print('ESCAPED')""",
    ),
    "fork by another name": (EVERYWHERE, "import posix\nposix.forkpty()\nprint('ESCAPED')"),
    "daemon that outlives": (
        ("all", "kernel", "container", "guard"),
        """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(10)  # found among the processes left
    os._exit(0)""",
    ),
    "a program started": (
        EVERYWHERE,
        "import subprocess\nprint(subprocess.run(['/bin/echo', 'ESCAPED'], capture_output=True).stdout)",
    ),
    "exec": (NOT_NAMESPACES, "import os\nos.execv('/bin/echo', ['echo', 'ESCAPED'])"),
    "_posixsubprocess": (
        EVERYWHERE,
        """
import sys
sys.modules.pop('_posixsubprocess', None)
from multiprocessing.util import spawnv_passfds
spawnv_passfds(b'/bin/sh', [b'sh', b'-c', b'true'], [])
print('ESCAPED')""",
    ),
    "what subprocess holds": (
        EVERYWHERE,
        """
import subprocess, sys, types
held = types.ModuleType('_posixsubprocess')
held.fork_exec = getattr(subprocess, '_fork_exec', None) or subprocess._posixsubprocess.fork_exec
sys.modules['_posixsubprocess'] = held
from multiprocessing.util import spawnv_passfds
spawnv_passfds(b'/bin/sh', [b'sh', b'-c', b'true'], [])
print('ESCAPED')""",
    ),
    "writing outside": (EVERYWHERE, "open({canary!r}, 'a').write('x')\nprint('ESCAPED')"),
    "writing outside by ..": (
        EVERYWHERE,
        "open('../' * 30 + {canary!r}, 'a').write('x')\nprint('ESCAPED')",
    ),
    "writing outside, low level": (
        EVERYWHERE,
        "import os\nos.write(os.open({canary!r}, os.O_WRONLY), b'x')\nprint('ESCAPED')",
    ),
    "writing outside by a link": (
        EVERYWHERE,
        "import os\nos.symlink({canary!r}, 'link')\nopen('link', 'a').write('x')\nprint('ESCAPED')",
    ),
    "writing outside by a hard link": (
        EVERYWHERE,
        "import os\nos.link({canary!r}, 'link')\nopen('link', 'a').write('x')\nprint('ESCAPED')",
    ),
    "writing outside by /proc/self": (
        EVERYWHERE,
        "open('/proc/self/root' + {canary!r}, 'a').write('x')\nprint('ESCAPED')",
    ),
    "writing outside from a descriptor of a folder": (
        EVERYWHERE,
        """
import os
d = os.open(os.path.dirname({canary!r}), os.O_RDONLY)
os.write(os.open('canary', os.O_WRONLY, dir_fd=d), b'x')
print('ESCAPED')""",
    ),
    "writing outside with a patched check": (
        EVERYWHERE,
        """
import os, posixpath
for module in (os.path, posixpath):
    module.realpath = module.normpath = module.join = lambda *a, **k: os.devnull
class Path(str):
    def startswith(self, *a): return True
    def split(self, *a): return []
    def __eq__(self, other): return True
    __hash__ = str.__hash__
open(Path({canary!r}), 'a').write('x')
print('ESCAPED')""",
    ),
    "changing the library": (EVERYWHERE, "import os\nopen(os.__file__, 'r+')\nprint('ESCAPED')"),
    "deleting": (EVERYWHERE, "import os\nos.remove({canary!r})\nprint('ESCAPED')"),
    "deleting by pathlib": (EVERYWHERE, "import pathlib\npathlib.Path({canary!r}).unlink()\nprint('ESCAPED')"),
    "deleting a tree": (
        EVERYWHERE,
        "import os, shutil\nshutil.rmtree(os.path.dirname({canary!r}))\nprint('ESCAPED')",
    ),
    "truncating": (EVERYWHERE, "import os\nos.truncate({canary!r}, 0)\nprint('ESCAPED')"),
    "renaming over": (
        EVERYWHERE,
        "import os\nopen('a', 'w')\nos.replace('a', {canary!r})\nprint('ESCAPED')",
    ),
    "making a folder": (
        EVERYWHERE,
        "import os\nos.mkdir({canary!r} + '-folder')\nprint('ESCAPED')",
    ),
    "changing rights": (NOT_NAMESPACES, "import os\nos.chmod({canary!r}, 0o777)\nprint('ESCAPED')"),
    "many files": (
        ("all", "kernel", "namespaces"),
        "for i in range(3000): open(str(i), 'w')\nprint('ESCAPED')",
    ),
    "many big files": (
        ("all", "kernel", "namespaces"),
        "for i in range(20): open(str(i), 'wb').write(bytes(15 << 20))\nprint('ESCAPED')",
    ),
    "reading a secret": (EVERYWHERE, "if 'hunter' in open({canary!r}).read(): print('ESCAPED')"),
    "reading a secret, low level": (
        EVERYWHERE,
        "import os\nif b'hunter' in os.read(os.open({canary!r}, os.O_RDONLY), 99): print('ESCAPED')",
    ),
    "reading the repository": (EVERYWHERE, "if open({repository!r}).read(): print('ESCAPED')"),
    "reading the accounts": (EVERYWHERE, "if 'root' in open('/etc/passwd').read(): print('ESCAPED')"),
    "listing the home": (EVERYWHERE, "import os\nif set(os.listdir({home!r})) - {leads!r}: print('ESCAPED')"),
    "reading the environment": (EVERYWHERE, "import os\nif 'hunter' in str(os.environ): print('ESCAPED')"),
    "reading the parents in /proc": (
        EVERYWHERE,
        """
import os
for pid in ({pid}, os.getppid(), 'self', 1):
    for name in ('environ', 'cmdline', 'maps', 'mem', 'fd', 'status'):
        path = '/proc/%s/%s' % (pid, name)
        try:
            (os.listdir if name == 'fd' else open)(path)
            print('ESCAPED', path)
        except OSError: pass""",
    ),
    "TCP": (EVERYWHERE, "import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)\nprint('ESCAPED')"),
    "TCP, low level": (
        EVERYWHERE,
        "import _socket\n_socket.socket(2, 1).connect(('127.0.0.1', {port}))\nprint('ESCAPED')",
    ),
    "a server": (
        NOT_NAMESPACES,
        "import socket\nsocket.create_server(('127.0.0.1', 0))\nprint('ESCAPED')",
    ),
    "UDP": (
        NOT_NAMESPACES,
        "import socket\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        "s.sendto(b'x', ('127.0.0.1', {port}))\nprint('ESCAPED')",
    ),
    "unix socket": (EVERYWHERE, "import socket\nsocket.socket(socket.AF_UNIX).connect({unix!r})\nprint('ESCAPED')"),
    "abstract socket": (
        EVERYWHERE,
        "import socket\nsocket.socket(socket.AF_UNIX).connect({abstract!r})\nprint('ESCAPED')",
    ),
    "signal to the parent": (
        NOT_NAMESPACES,
        "import os, time\nos.kill(os.getppid(), 9)\ntime.sleep(0.2)\nprint('ESCAPED')",
    ),
    "signal to the grader": (EVERYWHERE, "import os\nos.kill({pid}, 0)\nprint('ESCAPED')"),
    "signal to all": (NOT_NAMESPACES, "import os\nos.kill(-1, 0)\nprint('ESCAPED')"),
    "signal to the group": (NOT_NAMESPACES, "import os\nos.killpg(0, 0)\nprint('ESCAPED')"),
    "signal by a file": (
        NOT_GUARD,
        "import fcntl, os\nr, w = os.pipe()\nfcntl.fcntl(r, fcntl.F_SETOWN, os.getppid())\nprint('ESCAPED')",
    ),
    "raising the limits": (
        EVERYWHERE,
        """
import sys
sys.modules.pop('resource', None)
import resource
for kind in (resource.RLIMIT_AS, resource.RLIMIT_FSIZE, resource.RLIMIT_CPU):
    resource.setrlimit(kind, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print('ESCAPED')""",
    ),
    "ctypes": (
        ("all", "guard"),
        "import sys\nsys.modules.pop('ctypes', None)\nsys.modules.pop('_ctypes', None)\n"
        "import ctypes\nctypes.CDLL(None).getpid()\nprint('ESCAPED')",
    ),
    "raw system calls": (
        NOT_GUARD,
        """
import sys
frame = sys._getframe()
while frame:  # the library that the sandbox itself called, where it is loaded
    kernel = frame.f_locals.get('kernel') or frame.f_globals.get('kernel')
    if kernel: break
    frame = frame.f_back
if not kernel:
    import ctypes, os, platform
call = kernel._libc.syscall
# socket clone fork vfork execve kill ptrace mount setsid setpgid unshare prctl bpf keyctl memfd io_uring userfaultfd ..
for n in (41, 56, 57, 58, 59, 62, 101, 165, 112, 109, 272, 157, 321, 250, 319, 425, 323,
          53, 200, 234, 155, 161, 246, 310, 311, 298, 302, 160, 435, 424, 434, 317, 105, 90, 92, 133, 86, 88, 265, 266):
    if call(n, 0, 0, 0, 0, 0) != -1: print('ESCAPED', n)
    if call(n | 0x40000000, 0, 0, 0, 0, 0) != -1: print('ESCAPED x32', n)
print('tried')""",
    ),
    "the guard taken away": (
        ("all", "guard"),
        """
import gc
for x in gc.get_objects():
    if type(x) is list and any(getattr(f, '__name__', '') == 'hook' for f in x): x.clear()
print(open({canary!r}).read())
print('ESCAPED')""",
    ),
}
# Not to be tried without the sandbox, or held without any of its measures.
HELD_BY_LIMITS = {
    "daemon that outlives",
    "reading the environment",
    "raising the limits",
    "raw system calls",
    "signal to the parent",
    "the guard taken away",
}
CASES = [(name, level) for name, (levels, _) in BORDERS.items() for level in levels]


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """A place with a secret, our temporary files and two listeners; afterwards all of it must be as before."""
    room = tmp_path / "t"
    room.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(room))
    monkeypatch.setenv("A_SECRET", SECRET)
    kept = tmp_path / "kept"
    kept.mkdir()
    canary = kept / "canary"
    canary.write_text(SECRET)
    canary.chmod(0o666)  # nothing but the sandbox forbids it
    before = canary.stat()
    n = len(Path.home().parts)
    ours = children()  # of other tests
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_UNIX) as unix,
        socket.socket(socket.AF_UNIX) as abstract,
    ):
        unix.bind(str(tmp_path / "socket"))
        abstract.bind(f"\0attack-{os.getpid()}")
        for listener in (unix, abstract):
            listener.listen()
        given = {
            "holds": True,
            "canary": str(canary),
            "repository": sandbox.__file__,
            "home": str(Path.home()),
            "leads": {p.split("/")[n] for p in sandbox._libraries()[0] if p.startswith(f"{Path.home()}/")},
            "pid": os.getpid(),
            "port": tcp.getsockname()[1],
            "unix": str(tmp_path / "socket"),
            "abstract": f"\0attack-{os.getpid()}",
        }
        yield given
    if not given["holds"]:
        return
    after = canary.stat()
    assert canary.read_text() == SECRET and (before.st_ino, before.st_mode) == (after.st_ino, after.st_mode)
    assert [p.name for p in kept.iterdir()] == ["canary"]
    assert list(room.iterdir()) == []  # no file left
    assert left_over(str(room), ours) == []  # no process left


def children() -> set[int]:
    return {p.pid for p in psutil.Process().children(recursive=True)}


def left_over(room: str, ours: set[int]) -> list[str]:
    """Processes with this place in their environment, as every process of the sandbox has; and new children."""
    found = [str(pid) for pid in children() - ours]
    for entry in Path("/proc").glob("[0-9]*/environ"):
        try:
            if room.encode() in entry.read_bytes():
                found.append(entry.parent.name)
        except OSError:
            continue
    return found


def use(monkeypatch, level: str) -> None:
    """Run on a level, with what of it works here; a level that then equals another is left to that one."""
    chosen = tuple(m for m in LEVELS[level] if m in ("guard", *sandbox.measures()))
    wanted = set(LEVELS[level]) - ({"nobody"} if os.geteuid() else set())
    if level != "all" and not wanted <= set(chosen):
        pytest.skip(f"not on this machine: {sandbox.isolation_level()}")
    monkeypatch.setattr(sandbox, "measures", lambda: chosen)


def assert_alive() -> None:
    start = time.monotonic()
    assert execute_code("print(6 * 7)").stdout == "42\n"
    assert time.monotonic() - start < 10  # "at once"; generous, for machines that are busy


@pytest.mark.parametrize("level", ["all", "guard"])
@pytest.mark.parametrize("name", RESOURCES)
def test_no_program_takes_more_than_its_share(outside, monkeypatch, name, level):
    use(monkeypatch, level)
    start = time.monotonic()
    result = execute_code(RESOURCES[name], timeout=0.5)
    assert not result.success and result.error, result
    assert time.monotonic() - start < 15
    assert len(result.stdout) <= MAX_OUTPUT and len(result.stderr) <= MAX_OUTPUT
    if name.startswith("memory bomb") and not name.endswith("caught"):
        assert result.memory_exceeded or result.timeout or "Cannot allocate memory" in result.error, result
    assert_alive()


def attack(name: str, outside: dict[str, Any]) -> str:
    code = BORDERS[name][1]
    for key, value in outside.items():
        code = code.replace(f"{{{key}!r}}", repr(value)).replace(f"{{{key}}}", str(value))
    return code


@pytest.mark.parametrize(
    ("name", "level"),
    [  # the levels between the strongest and the weakest take half a minute more
        pytest.param(name, level, id=f"{name}-{level}", marks=[] if level in ("all", "guard") else pytest.mark.slow)
        for name, level in CASES
    ],
)
def test_no_program_crosses_its_borders(outside, monkeypatch, name, level):
    if name == "raw system calls" and platform.machine() != "x86_64":
        pytest.skip("its numbers are x86-64's")
    use(monkeypatch, level)
    result = execute_code(attack(name, outside), timeout=2.0)
    if name == "raw system calls":
        assert result.stdout == "tried\n", result
    assert "ESCAPED" not in result.stdout, result
    assert SECRET not in result.stdout + result.stderr
    assert_alive()


@pytest.mark.parametrize("name", sorted(BORDERS.keys() - HELD_BY_LIMITS))
def test_the_attacks_are_real_with_nothing_to_hold_them_they_escape(outside, monkeypatch, name):
    monkeypatch.setattr(sandbox, "measures", lambda: ())
    outside["holds"] = False
    result = execute_code(attack(name, outside), timeout=5.0)
    assert "ESCAPED" in result.stdout, result


# -- passing without being right ---------------------------------------------------------------------------------------

EARLY = {
    "sys.exit": "import sys\nsys.exit(0)",
    "os._exit": "import os\nos._exit(0)",
    "posix._exit": "import posix\nposix._exit(0)",
    "SystemExit": "raise SystemExit(0)",
    "SystemExit, caught": "try:\n raise SystemExit\nfinally:\n import os; os._exit(0)",
    "atexit": "import atexit, os\natexit.register(os._exit, 0)\nraise ValueError",
    "exit by another program": "import os\nos.execv('/bin/true', ['true'])",
    "import hooks": """
import builtins, sys
builtins.__import__ = lambda *a, **k: sys.exit(0)
sys.excepthook = lambda *a: None
sys.modules['traceback'] = None
raise ValueError""",
    "a fake verdict": """
import os
for fd in range(64):
    try: os.write(fd, b'{"started": true}\\n{"returncode": 0, "error": null, "fault": null}\\n')
    except OSError: pass
raise ValueError""",
}


@pytest.mark.parametrize("level", ["all", "guard"])
@pytest.mark.parametrize("name", EARLY)
def test_leaving_early_is_no_success(outside, monkeypatch, name, level):
    use(monkeypatch, level)
    assert not execute_code(f"{EARLY[name]}\nassert False").success
    test = "def check(candidate):\n    assert candidate(1) == 'MAGIC-777'\n"
    assert not check_function(f"{EARLY[name]}\ndef f(x): return x", "f", test).success
    indented = "\n".join(" " + line for line in EARLY[name].splitlines())
    assert not check_function(f"def f(x):\n{indented}\n return x", "f", test).success
    assert_alive()


FORGERIES = {
    "equal to all": """
class Any(str):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    __hash__ = str.__hash__
def f(x): return Any('no')""",
    "an object equal to all": """
class Any:
    def __eq__(self, other): return True
def f(x): return Any()""",
    "the checker patched": """
import builtins, json, sys
def check(candidate): pass
for name in ('AssertionError', 'Exception', 'BaseException'): setattr(builtins, name, type(name, (Warning,), {}))
json.dumps = json.loads = lambda *a, **k: '{"value": true}'
def f(x):
    frame = sys._getframe()
    while frame:
        frame.f_globals['check'] = frame.f_globals['run_tests'] = frame.f_globals['encode'] = lambda *a: None
        frame = frame.f_back
    return 'no'""",
    "all of the sandbox's own code replaced": """
import sys
def f(x):
    frame = sys._getframe()
    while frame:
        job = frame.f_locals.get('job')
        if job: job['entry_point'] = None; job['timeout'] = 0
        frame = frame.f_back
    return 'no'""",
    "reading the tests": """
import os
found = ''
def look():
    global found
    wanted = 'MAGIC' + '-'
    import sys
    frame = sys._getframe()
    seen = []
    while frame:
        seen += [repr(frame.f_locals), repr(frame.f_globals)]
        frame = frame.f_back
    for fd in range(64):
        try:
            os.lseek(fd, 0, 0)
            seen.append(os.read(fd, 1 << 20).decode('latin1'))
        except OSError: pass
    try:
        import gc
        for module in list(__import__('sys').modules.values()): seen.append(repr(getattr(module, '__dict__', '')))
        seen += [x for x in gc.get_objects() if isinstance(x, str)]
    except BaseException: pass
    for text in seen:
        at = text.find(wanted)
        if at >= 0 and text[at + 6:at + 9].isdigit(): found = text[at:at + 9]
look()
def f(x):
    look()
    return found or 'no'""",
    "killing the keeper": "import os\ndef f(x):\n try: os.kill(os.getppid(), 9)\n finally: return 'no'",
    "answers in advance": """
import os
def f(x):
    for fd in range(3, 64):
        try: os.write(fd, b'{"value": true}\\n{"returncode": 0}\\n' * 10)
        except OSError: pass
    return 'no'""",
    "no answer": "import time\ndef f(x): time.sleep(60)",
    "an endless answer": """
import os
def f(x):
    while True:
        for fd in range(3, 64):
            try: os.write(fd, b'[' * 65536)
            except OSError: pass""",
    "a deep answer": "def f(x):\n r = []\n for _ in range(10**5): r = [r]\n return r",
    "no JSON": """
import os
def f(x):
    for fd in range(3, 64):
        try: os.write(fd, b'\\xff{]\\n')
        except OSError: pass""",
    "a generator": "def f(x): yield 'MAGIC' + '-777'",
    "itself": "def f(x): return f",
}


@pytest.mark.parametrize("level", ["all", "guard"])
@pytest.mark.parametrize("name", FORGERIES)
def test_only_a_right_answer_passes(outside, monkeypatch, name, level):
    use(monkeypatch, level)
    test = "def check(candidate):\n    assert candidate(1) == 'MAGIC-777'\n    assert candidate(1) != 'other'\n"
    assert check_function("def f(x): return 'MAGIC-777'", "f", test).success
    result = check_function(FORGERIES[name], "f", test, timeout=1.5)
    assert not result.success and result.error, result
    assert_alive()


def test_many_programs_at_once_do_not_disturb_each_other(outside):
    codes = ["while True: pass", "print(1)", "x = []\nwhile True: x.append(bytearray(1 << 20))", "print(2)"]
    results: dict[int, sandbox.ExecutionResult] = {}

    def work(i: int) -> None:
        results[i] = execute_code(codes[i], timeout=3.0)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(codes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [results[i].stdout for i in range(4)] == ["", "1\n", "", "2\n"]
    assert [results[i].success for i in range(4)] == [False, True, False, True]
