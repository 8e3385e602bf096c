"""Running code that a model wrote: a fresh interpreter with limits, in namespaces where Linux allows them.

Always: its own session, killed as a whole; hard limits on memory, CPU time, file size and (not for root)
processes; nothing of our environment; a temporary working directory; stdin closed; output capped; and the
guard of sandbox_guard.py, which refuses processes, sockets, deletion and writing elsewhere. The guard stops
accidents and simple attacks from inside the same interpreter: it is no jail. With namespaces the kernel also
takes away the network and every process left over. Not covered: reading what this user may read.
`isolation_level()` says what holds here.
"""

from __future__ import annotations

import functools
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from nanochat.sandbox_guard import OUT_OF_MEMORY

GUARD = Path(__file__).with_name("sandbox_guard.py")
MAX_OUTPUT = 64 * 1024  # bytes of stdout, and of stderr, that are handed back
MAX_FILE = 16 << 20  # bytes of any file written, stdout among them
NAMESPACES = ("--user", "--map-root-user", "--net", "--pid", "--fork", "--kill-child", "--")


@dataclass(frozen=True)
class ExecutionResult:
    """How a program ended. `success` means that it ran to its end without an exception."""

    success: bool
    stdout: str
    stderr: str
    error: str | None = None  # one line: why not, when not
    timeout: bool = False
    memory_exceeded: bool = False


@functools.cache
def _prefix() -> tuple[str, ...]:
    """What stands before the interpreter's command: an unshare that works here, or nothing."""
    unshare = shutil.which("unshare") if sys.platform.startswith("linux") else None
    if unshare is None:
        return ()
    command = (unshare, *NAMESPACES)
    try:
        probe = subprocess.run([*command, "true"], capture_output=True, stdin=subprocess.DEVNULL, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return command if probe.returncode == 0 else ()


def isolation_level() -> str:
    """One line for logs: what keeps a program in, on this machine."""
    if _prefix():
        return "own process, limits, guard; kernel namespaces: no network, no process outlives it"
    return "own process, limits, guard; no kernel namespaces here, so only the guard stands before the network"


def execute_code(code: str, timeout: float = 5.0, memory_bytes: int = 256 << 20) -> ExecutionResult:
    """Run a Python program and say how it ended. Never raises for what the program does.

    Args:
        timeout: seconds of wall clock; then the whole process group is killed.
        memory_bytes: address space of the program.
    """
    with tempfile.TemporaryDirectory(prefix="sandbox-", ignore_cleanup_errors=True) as name:
        outer = Path(name)
        work = outer / "work"
        work.mkdir()
        (outer / "program.py").write_text(code, encoding="utf-8", errors="replace")
        limits = [memory_bytes, math.ceil(timeout) + 1, MAX_FILE]
        command = [
            *_prefix(),
            sys.executable,
            "-I",
            "-B",
            str(GUARD),
            str(outer / "program.py"),
            *map(str, limits),
        ]
        returncode = _run(command, outer, work, timeout)
        stdout, stderr = (_read_capped(outer / stream) for stream in ("stdout", "stderr"))
    timed_out = returncode is None or returncode in (-signal.SIGXCPU, 128 + signal.SIGXCPU)
    memory_exceeded = returncode == OUT_OF_MEMORY or "MemoryError" in stderr
    return ExecutionResult(
        success=returncode == 0,
        stdout=stdout,
        stderr=stderr,
        error=_error(returncode, stderr, timeout if timed_out else None),
        timeout=timed_out,
        memory_exceeded=memory_exceeded,
    )


def _run(command: list[str], outer: Path, work: Path, timeout: float) -> int | None:
    """The exit code; None when the time was up. Output goes to outer/stdout and outer/stderr."""
    env = {
        "PATH": os.defpath,
        "HOME": str(work),
        "TMPDIR": str(work),
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    with (outer / "stdout").open("wb") as stdout, (outer / "stderr").open("wb") as stderr:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            cwd=work,
            env=env,
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


def _read_capped(path: Path) -> str:
    with path.open("rb") as f:
        return f.read(MAX_OUTPUT).decode("utf-8", errors="replace")


def _error(returncode: int | None, stderr: str, timeout: float | None) -> str | None:
    if returncode == 0:
        return None
    if timeout is not None:
        return f"timed out after {timeout:g} s"
    lines = stderr.strip().splitlines()
    return lines[-1] if lines else f"ended with exit code {returncode}"
