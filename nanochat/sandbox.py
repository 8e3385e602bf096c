"""Running code that a model wrote: a process of its own, as confined as this machine can make it.

Always: an interpreter of its own in a session of its own, killed as a whole; hard limits on memory, CPU time, file
size, open files and (not for root) processes; nothing of our environment; a temporary working directory; stdin
closed; output capped; and the guard of sandbox_guard.py, a Python-level refusal of processes, sockets, deletion and
of files elsewhere. Where Linux allows them, each tried once per process (sandbox_kernel.py):

- namespaces: a file tree that holds the interpreter's libraries, not writable, and a working directory of at most
  64 MB and 1,024 files in memory; no /proc, no home, no repository, no network, no other process, and none left over
- an unprivileged user, when we are root
- Landlock: no path but those libraries (to read) and the working directory; no TCP; no signal to anyone else
- seccomp: 90 system calls that compute; no process, thread, program, socket, signal, limit or mount

`isolation_level()` says which hold. What is not covered: the guard alone (another system, an old kernel) stops
accidents and simple attacks, it is no jail, and neither does it bound the number of files; without namespaces and
Landlock whoever gets past it reads what this user may read. Nothing here hides that a file exists, the time, or
the machine's name and load; nothing keeps out a hole in the kernel.

`check_function` runs the tests in another process than the program: it sees the program's answers as data, so no
program can pass without answering right. `execute_code` has only the program's own end to go by: its `success`
holds against leaving early, not against code that searches the interpreter's frames for the way it reports.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import IO, Any

from nanochat.sandbox_guard import OUT_OF_MEMORY

MAX_OUTPUT = 64 * 1024  # bytes of stdout, and of stderr, that are handed back
MAX_ERROR = 500  # characters of the line that says why
MAX_FILE = 16 << 20  # bytes of any file written, stdout among them
START_SECONDS = 30.0  # for an interpreter to start and confine itself, on a machine that is busy
INSIDE = "import sys; sys.path.append(sys.argv.pop()); import sandbox_guard; sandbox_guard.main()"

# In this order each is kept if a small program still runs with it and those before.
MEASURES = {
    "guard": "guard",
    "namespaces": "namespaces (private file tree, no network, no other process)",
    "nobody": "unprivileged user",
    "landlock": "Landlock",
    "seccomp": "seccomp",
}
PROBE = (
    "import json, math, random, re, typing\nopen('probe', 'w').write('x')\n"
    "assert open('probe').read() == 'x' and json.loads('[1]') == [1]"
)


class SandboxError(RuntimeError):
    """The sandbox or the tests failed, not the program: nothing is known about the program."""


@dataclass(frozen=True)
class ExecutionResult:
    """How a program ended. `success` means that it ran to its end, or passed its tests, without an exception."""

    success: bool
    stdout: str
    stderr: str
    error: str | None = None  # one line: why not, when not
    timeout: bool = False
    memory_exceeded: bool = False


def execute_code(code: str, timeout: float = 5.0, memory_bytes: int = 256 << 20) -> ExecutionResult:
    """Run a Python program and say how it ended. Never raises for what the program does.

    Args:
        timeout: seconds of wall clock from the program's start; then all of it is killed.
        memory_bytes: address space of the program.

    Raises:
        SandboxError: no program can be run here.
    """
    return _execute(code, None, None, timeout, memory_bytes, measures())


def check_function(
    code: str, entry_point: str, test: str, prompt: str = "", timeout: float = 5.0, memory_bytes: int = 256 << 20
) -> ExecutionResult:
    """Whether the function `entry_point` of a program passes `check(candidate)` of a test, HumanEval's form.

    Args:
        test: source that defines check; it runs in a process that the program cannot reach, and there calls of
            candidate send arguments, and bring back results, as plain data (numbers, text, lists, tuples, sets, dicts).
        prompt: source that the test may need, run before it: never the program's.
        timeout: seconds of wall clock for the program and all calls together.

    Raises:
        SandboxError: no program can be run here; prompt or test cannot be run, whatever the program.
    """
    return _execute(code, entry_point, {"prompt": prompt, "test": test}, timeout, memory_bytes, measures())


@functools.cache
def measures() -> tuple[str, ...]:
    """What works on this machine, of MEASURES."""

    def works(chosen: list[str]) -> bool:
        try:
            return _execute(PROBE, None, None, 10.0, 256 << 20, chosen).success
        except SandboxError:
            return False

    if sys.platform != "linux":
        return ("guard",)
    if works(list(MEASURES)):
        return tuple(MEASURES)
    kept = ["guard"]
    for name in list(MEASURES)[1:]:
        if works([*kept, name]):
            kept.append(name)
    return tuple(kept)


def isolation_level() -> str:
    """One line for logs: what keeps a program in, on this machine, and what is lacking."""
    kept = measures()
    there = [text for name, text in MEASURES.items() if name in kept and name != "guard"]
    lacking = [text for name, text in MEASURES.items() if name not in kept]
    if "nobody" not in kept and os.name == "posix" and os.geteuid() != 0:
        lacking.remove(MEASURES["nobody"])  # only root has to become someone else
    line = f"{', '.join(there) or 'no kernel isolation'}; own process, limits, guard"
    return f"{line}; not here: {', '.join(lacking)}" if lacking else line


@functools.cache
def _libraries() -> tuple[list[str], list[str]]:
    """Paths that a program may read: the interpreter's and the system's libraries; and its site-packages."""
    base, paths = Path(sys.base_prefix), sysconfig.get_paths()
    packages = list(dict.fromkeys([paths["purelib"], paths["platlib"]]))
    wanted = [paths["stdlib"], paths["platstdlib"], str(base / "lib"), *packages]
    wanted += ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/usr/share/zoneinfo"]
    readable: list[str] = []
    for path in sorted(p for p in set(wanted) if os.path.exists(p)):  # a folder before what it holds
        if not readable or not path.startswith(readable[-1] + "/"):
            readable.append(path)
    return readable, packages


def _execute(
    code: str,
    entry_point: str | None,
    tests: dict[str, str] | None,
    timeout: float,
    memory_bytes: int,
    chosen: Iterable[str],
) -> ExecutionResult:
    readable, packages = _libraries()
    # Files without a name: no program finds the tests, the verdict or another's output by a path.
    with _room() as outer, TemporaryFile() as request, TemporaryFile() as verdict, TemporaryFile() as errors:
        with TemporaryFile() as stdout, TemporaryFile() as stderr:
            job: dict[str, Any] = {
                "source": code,
                "entry_point": entry_point,
                "measures": list(chosen),
                "readable": readable,
                "paths": packages,
                "mount_point": str(outer / "tree"),
                "timeout": timeout,
                "memory_bytes": memory_bytes,
                "cpu_seconds": math.ceil(timeout) + 1,
                "file_bytes": MAX_FILE,
                "stdout": stdout.fileno(),
                "stderr": stderr.fileno(),
            }
            parts = [json.dumps(part) for part in ([job] if tests is None else [job, tests])]
            request.write("".join(f"{len(part):08x}{part}" for part in parts).encode())
            request.seek(0)
            pass_fds = (stdout.fileno(), stderr.fileno())
            returncode = _run(outer / "work", (request, verdict, errors), pass_fds, timeout + START_SECONDS)
            said_out, said_err, said_here = (_read_capped(f) for f in (stdout, stderr, errors))
        verdict.seek(0)
        lines = verdict.read().splitlines()
    if not lines:
        why = (said_here.strip().splitlines() or [f"exit code {returncode}"])[-1]
        if returncode is None:
            why = f"nothing within {timeout + START_SECONDS:g} s"
        raise SandboxError(f"the sandbox could not start: {why}")
    if len(lines) == 1:  # the keeper started and was brought down by the program: that is no pass
        return _result(1 if returncode == 0 else returncode, None, timeout, said_out, said_err)
    report = json.loads(lines[1])
    if report["fault"]:
        raise SandboxError(report["fault"])
    return _result(report["returncode"], report["error"], timeout, said_out, said_err)


@contextlib.contextmanager
def _room() -> Iterator[Path]:
    """A temporary folder with the program's working directory and a place to mount its file tree on."""
    with TemporaryDirectory(prefix="sandbox-", ignore_cleanup_errors=True) as name:
        outer = Path(os.path.realpath(name))
        outer.chmod(0o711)  # another user finds its working directory, and reads no name
        for folder in ("work", "tree"):
            (outer / folder).mkdir()
        yield outer


def _result(returncode: int | None, error: str | None, timeout: float, stdout: str, stderr: str) -> ExecutionResult:
    timed_out = returncode in (None, -signal.SIGXCPU)
    if timed_out:
        error = f"timed out after {timeout:g} s"
    elif returncode != 0 and error is None:
        lines = stderr.strip().splitlines()
        error = lines[-1] if lines else f"ended with exit code {returncode}"
    if error is not None:
        error = (error.splitlines() or ["failed without a reason"])[0][:MAX_ERROR]
    return ExecutionResult(
        success=returncode == 0,
        stdout=stdout,
        stderr=stderr,
        error=error,
        timeout=timed_out,
        memory_exceeded=returncode == OUT_OF_MEMORY or "MemoryError" in f"{stderr}{error}",
    )


def _run(work: Path, streams: tuple[IO[bytes], ...], pass_fds: tuple[int, ...], timeout: float) -> int | None:
    """Start the keeper and wait for its end: the exit code; None when the time was up.

    Args:
        streams: its stdin, stdout and stderr.
    """
    env = {
        "PATH": os.defpath,
        "HOME": str(work),
        "TMPDIR": str(work),
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    # -S: no .pth files of the site-packages; they cost time and may name the repository
    command = [sys.executable, "-I", "-B", "-S", "-c", INSIDE, str(Path(__file__).parent)]
    stdin, stdout, stderr = streams
    process = subprocess.Popen(
        command,
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        cwd=work,
        env=env,
        pass_fds=pass_fds,
        start_new_session=True,
    )
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        return None
    finally:
        _kill_group(process)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """End whatever is left of the session, and reap its leader."""
    deadline = time.monotonic() + 1
    while time.monotonic() < deadline:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):  # nobody left (macOS says so with a permission error)
            break
        if process.poll() is not None:
            break
        time.sleep(0.005)
    process.wait()


def _read_capped(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read(MAX_OUTPUT).decode("utf-8", errors="replace")
