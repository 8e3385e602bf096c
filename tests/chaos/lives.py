"""Lives: forks of a process that has imported everything. No torch work is done before a fork, so there is no pool of
threads that a child would lack. Linux only."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import random
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

LIMIT = 240.0  # seconds of a life, and of the ranks that outlive one: a hang, even on a machine with much else to do
GRACE = 3.0  # seconds from a rank's death until the launcher ends the others, where they had not met yet
MET = "number of iterations"  # the first line that a run prints when its ranks have met
EXIT_STOPPED = 75  # a run that a signal stopped
LIBC = ctypes.CDLL(None, use_errno=True)
PR_SET_PDEATHSIG = 1
CLONE_NEWNS, MS_REC, MS_PRIVATE = 0x20000, 0x4000, 0x40000
CLOCK_PROCESS_CPUTIME_ID = 2


@dataclass(frozen=True)
class Death:
    """How a life ended. Exit codes by rank; negative = by that signal."""

    codes: list[int]
    logs: list[Path]
    seconds: float
    cpu_seconds: float  # of the first rank
    lingered: float  # seconds from the first rank's end to the last one's


def die_with_parent(parent: int) -> None:
    """However the parent ends, this process ends too."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def kill_after_cpu_seconds(seconds: float) -> None:
    """Let the kernel send kill -9 to this process when it has used so much CPU time."""
    event = (ctypes.c_int * 16)(0, 0, signal.SIGKILL, 0)  # struct sigevent: value, signo, notify = SIGEV_SIGNAL
    timer = ctypes.c_void_p()
    if LIBC.timer_create(CLOCK_PROCESS_CPUTIME_ID, ctypes.byref(event), ctypes.byref(timer)):
        raise OSError(ctypes.get_errno(), "timer_create")
    now = time.process_time()
    whole = max(0.001, seconds - now)
    when = (ctypes.c_long * 4)(0, 0, int(whole), int(whole % 1 * 1e9))  # interval, value
    if LIBC.timer_settime(timer, 0, ctypes.byref(when), None):
        raise OSError(ctypes.get_errno(), "timer_settime")


def free_port(rng: random.Random) -> int:
    """A port that nobody listens on; below those that the kernel gives to outgoing connections."""
    while True:
        port = rng.randrange(20_000, 32_000)
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port


def exit_code(main: Callable[[], object]) -> int:
    """Run main as a program of its own would be run and ended; its exit code."""
    try:
        main()
        code: object = 0
    except SystemExit as stop:
        code = stop.code
    except BaseException as error:
        traceback.print_exc()
        code = 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads that are no daemons
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code if isinstance(code, int) else int(code is not None)


def fork(run: Callable[[], int], log: Path | None = None, group: int | None = None) -> int:
    """A child that runs and exits with what it returns. group: the process group to join; 0 = a new one."""
    parent = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        if group is not None:
            with contextlib.suppress(OSError):  # the child does the same; whoever is first
                os.setpgid(pid, group)
        return pid
    code = 1
    try:
        if group is not None:
            os.setpgid(0, group)
        die_with_parent(parent)
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if log is not None:
            fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(fd, 1)
            os.dup2(fd, 2)
        code = run()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _kill(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # all of it has ended
        os.killpg(group, signal.SIGKILL)


def live(
    main: Callable[[int], object],
    world: int,
    base: Path,
    log: Path,
    rng: random.Random,
    kill_after: float | None = None,
    whole: bool = True,
    victim: int = 0,
) -> Death:
    """One life: `main(rank)` in a process a rank, until all have ended.

    We are no launcher: ranks must notice by themselves that one of them is gone. Only before they have met none can
    know of another (the store of a dead rank 0 is waited for), so there we do what torchrun does and end them.

    Args:
        kill_after: seconds after which the victim, or the whole, is killed.
        whole: when one rank was killed, kill the others.

    Raises:
        TimeoutError: some rank was still there after LIMIT seconds. None is left behind.
    """
    port = free_port(rng)
    logs = [log.with_suffix(f".rank{rank}.log") for rank in range(world)]

    def rank_main(rank: int) -> int:
        os.environ["NANOCHAT_BASE_DIR"] = str(base)
        if world > 1:
            local = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
            os.environ.update({k: str(v) for k, v in local.items()})
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
        return exit_code(lambda: main(rank))

    begun = time.monotonic()
    group = 0
    pids: list[int] = []
    codes: dict[int, int] = {}
    first_end = cpu = 0.0
    have_met = True
    try:
        for rank in range(world):
            pids.append(fork(lambda rank=rank: rank_main(rank), logs[rank], group))  # type: ignore[misc]
            group = pids[0]
        limit = LIMIT
        while len(codes) < world:
            for rank, pid in enumerate(pids):
                if rank in codes:
                    continue
                done, status, usage = os.wait4(pid, os.WNOHANG)
                if not done:
                    continue
                codes[rank] = os.waitstatus_to_exitcode(status)
                cpu = usage.ru_utime + usage.ru_stime if rank == 0 else cpu
                if len(codes) == 1:
                    first_end = time.monotonic()
                    limit = first_end - begun + LIMIT
                    if codes[rank] and MET not in logs[0].read_text():
                        limit = first_end - begun + GRACE
                        have_met = False
                if codes[rank] == -signal.SIGKILL and whole:
                    _kill(group)
            now = time.monotonic() - begun
            if kill_after is not None and now >= kill_after:
                kill_after = None
                if whole:
                    _kill(group)
                elif victim not in codes:
                    os.kill(pids[victim], signal.SIGKILL)
            if now > limit and not have_met:
                _kill(group)
            elif now > limit:
                left = [rank for rank in range(world) if rank not in codes]
                raise TimeoutError(f"ranks {left} of {world} still there after {now:.0f} s; the others: {codes}")
            time.sleep(0.005)
    finally:
        if len(codes) < len(pids):
            _kill(group)
        for rank, pid in enumerate(pids):
            if rank not in codes:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, 0)
    end = time.monotonic()
    return Death([codes[rank] for rank in range(world)], logs, end - begun, cpu, end - first_end)


@contextlib.contextmanager
def small_disk(path: Path, num_bytes: int) -> Iterator[bool]:
    """A tmpfs of that size at `path`, which only this process and its children see; False where it may not be made."""
    path.mkdir(parents=True, exist_ok=True)

    def call(function: str, *args: object) -> bool:
        return getattr(LIBC, function)(*args) == 0

    made = (
        call("unshare", CLONE_NEWNS)
        and call("mount", None, b"/", None, MS_REC | MS_PRIVATE, None)
        and call("mount", b"tmpfs", os.fsencode(path), b"tmpfs", 0, f"size={num_bytes}".encode())
    )
    try:
        yield made
    finally:
        if made:
            call("umount2", os.fsencode(path), 2)  # MNT_DETACH
