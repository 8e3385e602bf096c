"""The inside of the sandbox: a keeper that is confined, its child that runs the program, and a Python-level guard.

sandbox.py starts `main()` in an interpreter of its own; stdin is the job, in two parts. The keeper reads the
first part, confines itself, forks the program's process and only then reads the second, the tests: the program's
process never holds them. The keeper writes the verdict to its stdout, which the program's process does not have.
Only the keeper decides: by the way in which the program ended or, where there are tests, by running them itself on
answers that come to it as plain data.
"""

import builtins
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
import traceback
from typing import Any

OUT_OF_MEMORY = 3  # the program's exit code then
MAX_ANSWER = 8 << 20  # bytes of one answer of a tested function, as JSON
OPEN_FILES = 64

OS_FUNCTIONS = (
    "_exit abort chdir chmod chown chroot execv execve fchdir fchmod fchown fork forkpty getcwd kill killpg "
    "lchflags lchmod lchown posix_spawn posix_spawnp putenv remove removedirs rename renames replace rmdir "
    "pidfd_open setgid setns setpgid setsid setuid system truncate unlink unshare"
).split()
SHUTIL_FUNCTIONS = ("rmtree", "move", "chown")
BLOCKED_MODULES = "ipdb joblib resource psutil tkinter ctypes _ctypes _posixsubprocess sandbox_kernel".split()
# Audit events (PEP 578) are raised below any Python name, and a hook cannot be taken away again. By prefix.
BLOCKED_EVENTS = tuple(
    (
        "ctypes. os.exec os.fork os.kill os.posix_spawn os.spawn os.system pty.spawn subprocess.Popen "
        "shutil.rmtree shutil.move shutil.chown os.chdir os.remove os.rename os.rmdir os.truncate os.chmod os.chown "
        "os.link os.symlink socket.__new__ socket.bind socket.connect socket.getaddrinfo socket.gethostby "
        "gc.get_ sys.settrace sys.setprofile resource."
    ).split()
)
READ_EVENTS = ("os.listdir", "os.scandir")
WRITE_EVENTS = ("os.mkdir", "os.utime")
WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


# -- limits and the guard --------------------------------------------------------------------------------------------


def limit(wanted):
    """Hard limits that the kernel keeps. One that this system does not know or take is left out."""
    import resource

    for name, value in wanted.items():
        try:
            resource.setrlimit(getattr(resource, name), (value, value))
        except (AttributeError, ValueError, OSError):
            continue  # macOS refuses RLIMIT_AS


def refuse(name):
    def refused(*args, **kwargs):
        raise PermissionError(f"{name} is switched off in the sandbox")

    return refused


def switch_off():
    """Take away what no exercise needs: processes, deletion, ownership, leaving the working directory."""
    posix = sys.modules["posix"]
    for name in OS_FUNCTIONS:
        for module in (os, posix):
            if hasattr(module, name):
                setattr(module, name, refuse(f"os.{name}"))
    for name in SHUTIL_FUNCTIONS:
        setattr(shutil, name, refuse(f"shutil.{name}"))
    for name in ("Popen", "_fork_exec", "_posixsubprocess"):
        setattr(subprocess, name, refuse(f"subprocess.{name}"))
    for name in ("exit", "quit", "help"):
        setattr(builtins, name, refuse(name))
    for name in BLOCKED_MODULES:
        sys.modules[name] = None  # type: ignore[assignment]


def watch(root, readable, blocked=frozenset(BLOCKED_MODULES)):
    """An audit hook: no processes, no sockets, writing only below `root`, reading only there and in `readable`.

    Paths are compared as text, without asking the file system: what the hook would ask with, the program could have
    replaced. No link can be made in `root`, so that a path there means what it says.
    """
    null = os.devnull

    def allowed(path, roots):
        if isinstance(path, int):
            return True  # a descriptor that is open already
        if isinstance(path, bytes):
            path = bytes.decode(path, "utf-8", "surrogateescape")
        if not isinstance(path, str):
            return False
        parts: list[str] = []
        for part in str.split(path if str.startswith(path, "/") else f"{root}/{path}", "/"):
            if part == "..":
                del parts[-1:]
            elif part not in ("", "."):
                parts.append(part)
        plain = "/" + "/".join(parts)
        return plain == null or any(plain == r or plain.startswith(r + "/") for r in roots)

    def hook(event, args):
        if event.startswith(BLOCKED_EVENTS):
            raise PermissionError(f"{event} is switched off in the sandbox")
        if event == "open":
            writes = isinstance(args[2], int) and args[2] & WRITE_FLAGS
            if not allowed(args[0], [root] if writes else [root, *readable]):
                verb = "writing" if writes else "reading"
                raise PermissionError(f"{verb} {args[0]!r} is switched off in the sandbox")
        elif event in READ_EVENTS and args[0] is not None and not allowed(args[0], [root, *readable]):
            raise PermissionError(f"{event} {args[0]!r} is switched off in the sandbox")
        elif event in WRITE_EVENTS and not allowed(args[0], [root]):
            raise PermissionError(f"{event} {args[0]!r} is switched off in the sandbox")
        elif event == "import" and str.rpartition(args[0], ".")[2] in blocked:
            raise ModuleNotFoundError(f"{args[0]} is switched off in the sandbox")

    sys.addaudithook(hook)


# -- values that travel between the program and its tests -------------------------------------------------------------


def encode(value):
    """Plain data as JSON, the types told apart. What compares equal to plain data (a Counter to a dict) becomes that.

    Raises:
        TypeError: a function, an object, a generator: nothing that a test could compare as data.
    """
    if value is None or isinstance(value, (bool, str, float)):
        return value
    if isinstance(value, int):
        return value if value.bit_length() < 1000 else ["int", hex(value)]  # int() has a limit of digits, hex none
    if isinstance(value, complex):
        return ["complex", value.real, value.imag]
    if isinstance(value, (bytes, bytearray)):
        return ["bytes", value.hex()]
    if isinstance(value, dict):
        return ["dict", *([encode(k), encode(v)] for k, v in value.items())]
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return [kind.__name__, *map(encode, value)]
    if getattr(value, "ndim", None) == 0:  # a scalar of numpy
        return encode(value.item())
    raise TypeError(f"a {type(value).__name__} is no plain data")


def decode(value):
    """The inverse of encode; ValueError for anything that it does not make."""
    if not isinstance(value, list):
        if isinstance(value, dict):
            raise ValueError("an answer in an unknown form")
        return value
    kind, *items = value
    if kind == "int":
        return int(items[0], 16)
    if kind == "complex":
        return complex(*items)
    if kind == "bytes":
        return bytes.fromhex(items[0])
    if kind == "dict":
        return {decode(k): decode(v) for k, v in items}
    for make in (list, tuple, set, frozenset):
        if kind == make.__name__:
            return make(map(decode, items))
    raise ValueError("an answer in an unknown form")


def read_line(fd, limit, deadline=None, at_once=65536):
    """One line from a pipe, without its end; b"" at the end of the stream. Read byte by byte (at_once=1) it leaves
    what comes after; else nothing may come before the line is answered.

    Raises:
        TimeoutError: the deadline passed. ValueError: more than `limit` bytes.
    """
    got = bytearray()
    while not got.endswith(b"\n"):
        if deadline is not None and not select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise TimeoutError
        piece = os.read(fd, at_once)
        if not piece:
            return b""
        got += piece
        if len(got) > limit:
            raise ValueError(f"an answer of more than {limit} bytes")
    return bytes(got[:-1])


def write_all(fd, text):
    left = memoryview(text.encode())
    while left:
        left = left[os.write(fd, left) :]


# -- the program's process --------------------------------------------------------------------------------------------


def run_program(source, entry_point, requests, answers):
    """Run the program, then answer calls of its `entry_point`, if there is one. Returns the exit code."""
    try:
        names = {"__name__": "__main__"}
        exec(compile(source, "<program>", "exec"), names)
        if entry_point is not None:
            if not callable(names.get(entry_point)):
                raise NameError(f"name {entry_point!r} is not defined")
            serve(names[entry_point], requests, answers)
        return 0
    except MemoryError:
        sys.stderr.write("MemoryError\n")
        return OUT_OF_MEMORY
    except BaseException:  # SystemExit too: whatever stops the program early, it has not succeeded
        traceback.print_exc()
        return 1


def serve(function, requests, answers):
    write_all(answers, '"ready"\n')
    while line := read_line(requests, sys.maxsize):
        args, kwargs = decode(json.loads(line))
        try:
            reply = {"value": encode(function(*args, **kwargs))}
            sys.stdout.flush()  # the process is killed when the tests are through
        except MemoryError:
            raise
        except BaseException as error:
            reply = {"raised": f"{type(error).__name__}: {error}"}
        write_all(answers, json.dumps(reply) + "\n")


def become_program(job, source, work, requests, answers):
    """The forked child: the last restrictions, then the program. Never returns.

    Tells the keeper first whether all restrictions hold: null, or what failed.
    """
    leave = os._exit
    code = 1
    try:
        try:
            confine(job["measures"], job["readable"], work)
        except BaseException as error:
            write_all(answers, json.dumps(f"{type(error).__name__}: {error}") + "\n")
            raise
        write_all(answers, "null\n")
        code = run_program(source, job["entry_point"], requests, answers)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        leave(code)  # without the program's own exit handlers


def confine(measures, readable, work):
    """What holds for the program's process alone."""
    kernel: Any = sys.modules.get("sandbox_kernel")
    if kernel is not None:
        kernel.die_with_parent()
    limit({"RLIMIT_NPROC": 0, "RLIMIT_NOFILE": OPEN_FILES})  # no process or thread; root is not held to it
    if "landlock" in measures:
        kernel.landlock(readable, work)  # once more, so that the keeper is beyond the border
    if "seccomp" in measures:
        kernel.seccomp()
    if "guard" in measures:
        switch_off()
        watch(work, readable)


# -- the keeper -------------------------------------------------------------------------------------------------------


class Candidate:
    """The tested function, seen from the keeper: a call goes to the program's process, its answer comes back."""

    def __init__(self, requests, answers, deadline):
        self.requests, self.answers, self.deadline = requests, answers, deadline

    def receive(self):
        line = read_line(self.answers, MAX_ANSWER, self.deadline)
        if not line:
            raise EOFError
        return json.loads(line)

    def __call__(self, *args, **kwargs):
        try:
            text = json.dumps(encode((args, kwargs)))
        except TypeError as error:
            raise BadTest(f"the test hands over what cannot travel: {error}") from None
        try:
            write_all(self.requests, text + "\n")
        except BrokenPipeError:
            raise EOFError from None
        reply = self.receive()
        if not isinstance(reply, dict) or "value" not in reply:
            raise Raised(reply.get("raised") if isinstance(reply, dict) else reply)
        return decode(reply["value"])


class Raised(Exception):
    """The tested function raised; the message names what."""


class BadTest(BaseException):
    """The tests themselves are at fault. No test's own `except Exception` catches it."""


def run_tests(candidate, entry_point, prompt, test):
    """The verdict of `check(candidate)`: None when it passes, else the reason.

    Raises:
        BadTest: prompt or test cannot even be run, or test has no function `check`.
        TimeoutError, EOFError: the program did not answer in time; it ended.
    """
    names: dict[str, Any] = {"__name__": "tests"}
    try:
        exec(compile(f"{prompt}\n\n{test}", "<test>", "exec"), names)  # a test may use the prompt's own functions
        check = names["check"]
        names[entry_point] = candidate  # some call the function by its own name
    except Exception as error:
        raise BadTest(f"the tests cannot be run: {type(error).__name__}: {error}") from None
    try:
        candidate.receive()  # "ready"
        check(candidate)
    except (TimeoutError, EOFError):
        raise
    except Raised as error:
        return str(error)
    except Exception as error:
        return "".join(traceback.format_exception_only(type(error), error)).strip().splitlines()[-1]
    return None


def out_of_time(signum, frame):
    raise TimeoutError


def wait(pid, deadline):
    """The exit code of a child, minus the signal that ended it; None when the deadline came first."""
    pause = 0.0005
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            return None
        time.sleep(pause)
        pause = min(2 * pause, 0.01)


def keep(job, source, work):
    """Fork the program's process, hold the tests against it, report the verdict."""
    verdict = os.dup(1)
    limit({"RLIMIT_AS": job["memory_bytes"], "RLIMIT_DATA": job["memory_bytes"]})
    limit({"RLIMIT_CPU": job["cpu_seconds"], "RLIMIT_FSIZE": job["file_bytes"], "RLIMIT_CORE": 0})
    requests, answers = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        null = os.open(os.devnull, os.O_RDONLY)
        for fd, target in ((null, 0), (job["stdout"], 1), (job["stderr"], 2)):
            os.dup2(fd, target)
        for fd in (verdict, requests[1], answers[0], null, job["stdout"], job["stderr"]):
            os.close(fd)
        become_program(job, source, work, requests[0], answers[1])
    os.dup2(2, 1)  # what a test prints is no verdict
    for fd in (requests[0], answers[1]):
        os.close(fd)
    failed = json.loads(read_line(answers[0], MAX_ANSWER, at_once=1) or '"nothing heard"')
    if failed is not None:
        raise OSError(f"the program could not be confined: {failed}")
    write_all(verdict, '{"started": true}\n')
    deadline = time.monotonic() + job["timeout"]
    report: dict[str, Any] = {"returncode": None, "error": None, "fault": None}
    ended = False
    try:
        if job["entry_point"] is not None:
            tests = read_part()
            signal.signal(signal.SIGALRM, out_of_time)  # an answer may keep a test busy for ever: range(answer)
            signal.setitimer(signal.ITIMER_REAL, job["timeout"])
            candidate = Candidate(requests[1], answers[0], deadline)
            report["error"] = run_tests(candidate, job["entry_point"], tests["prompt"], tests["test"])
            report["returncode"] = 0 if report["error"] is None else 1
        else:
            report["returncode"] = wait(pid, deadline)
            ended = report["returncode"] is not None
    except TimeoutError:
        pass
    except EOFError:  # to end before the tests did is no pass, whatever the exit code
        returncode = wait(pid, deadline)
        ended = returncode is not None
        report["returncode"] = returncode or 1
    except BadTest as error:
        report["fault"] = str(error)
    if not ended:
        os.kill(pid, signal.SIGKILL)
    write_all(verdict, json.dumps(report) + "\n")


def read_part():
    """The next part of the job: 8 hexadecimal digits of length, then JSON. Unbuffered: the rest is not for all."""
    size = int(os.read(0, 8), 16)
    got = b""
    while len(got) < size:
        piece = os.read(0, size - len(got))
        if not piece:
            raise EOFError("the job ends early")
        got += piece
    return json.loads(got)


def main():
    """Confine this process as the job says, then keep. A failure before the program has started is exit code 1.

    The working directory is the program's; sys.path ends with the folder of this file.
    """
    job = read_part()
    source = job.pop("source")
    measures, work, readable = job["measures"], os.getcwd(), job["readable"]
    kernel: Any = None
    if not {"namespaces", "nobody", "landlock", "seccomp"}.isdisjoint(measures):
        # Only then: a program that finds ctypes loaded could call with it what the guard alone does not see.
        import sandbox_kernel as kernel  # type: ignore[import-not-found, no-redef]
    sys.path.pop()
    sys.path += job["paths"]
    if "namespaces" in measures:
        kernel.unshare()
        pid = os.fork()  # the first process of the new pid namespace; when it ends, the kernel ends the others
        if pid:
            os._exit(abs(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])))
    uid, gid = (kernel.NOBODY, kernel.NOBODY) if "nobody" in measures else (os.getuid(), os.getgid())
    if "namespaces" in measures:
        kernel.private_tree(job["mount_point"], readable, uid, gid)
        work = kernel.WORK
        os.environ["HOME"] = os.environ["TMPDIR"] = work
    elif "nobody" in measures:
        os.chown(work, uid, gid)
    if "nobody" in measures:
        kernel.become_nobody()
        open(os.__file__, "rb").close()  # an interpreter that nobody may read is of no use: let the probe see it
    if kernel is not None:
        kernel.drop_privileges()
    if "landlock" in measures:
        kernel.landlock(readable, work)
    keep(job, source, work)
    os._exit(0)
