"""torchrun, with two things that it lacks; the arguments are its own.

    python runs/launch.py --standalone --nproc_per_node=8 -m scripts.base_train -- --depth=20

A signal goes to the ranks, which end when they have saved: torchrun would kill them half a minute later, saved or not.
The exit code is the ranks' own, so that 75 (stopped and saved) reaches whoever started them: torchrun's is always 1.
SIGINT stays what it is; SIGTERM, SIGHUP and SIGUSR1, a cluster's warning, reach the ranks as SIGTERM.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from torch.distributed.elastic.multiprocessing import PContext
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

STOPPED = 75  # nanochat.signals.EXIT_STOPPED
# A rank may hang in a collective behind one that died. torchrun leaves it 30 s; with the time to notice, all must be
# gone in 30.
PATIENCE_SECONDS = 20


def pass_signals_on(context: Any, close: Any = PContext.close, start: Any = PContext.start) -> None:
    """Start the ranks, then take the signals over from torchrun, which has just asked for them."""

    def send(number: int, frame: Any) -> None:
        for pid in context.pids().values():
            with suppress(ProcessLookupError):  # it has ended
                os.kill(pid, signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)

    start(context)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, send)


def close_soon(context: Any, death_sig: Any = None, timeout: int = 30, close: Any = PContext.close) -> None:
    close(context, death_sig, min(timeout, PATIENCE_SECONDS))


def exit_code(codes: Iterable[int]) -> int:
    """One code for those of the ranks that failed, the first one first; below zero stands the signal that ended one.

    75 if one has saved and the others did too, or were ended afterwards. Otherwise that of the first.
    """
    codes = list(codes)
    if STOPPED in codes and all(code == STOPPED or code < 0 for code in codes):
        return STOPPED
    return codes[0] if codes[0] > 0 else 128 - codes[0]


def main() -> None:
    PContext.start, PContext.close = pass_signals_on, close_soon  # type: ignore[method-assign]
    try:
        torchrun(sys.argv[1:])
    except ChildFailedError as error:
        failures = sorted(error.failures.values(), key=lambda failure: failure.timestamp)
        code = exit_code(failure.exitcode for failure in failures)
        if code != STOPPED:
            print(error, file=sys.stderr, flush=True)
        sys.exit(code)


if __name__ == "__main__":
    main()
