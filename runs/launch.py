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
from contextlib import suppress
from typing import Any

from torch.distributed.elastic.multiprocessing import PContext
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

STOPPED = 75  # nanochat.signals.EXIT_STOPPED, the code of a rank that was stopped and has saved
WRONG_INPUT = 2  # a rank's own line has said what is wrong
# A rank may hang in a collective behind one that died. torchrun would leave it 30 s; it shall be gone in 30 s, the time
# to notice included.
PATIENCE_SECONDS = 20


def start(context: Any, start: Any = PContext.start) -> None:
    """Start the ranks, then take the signals over from torchrun, which has just asked for them."""

    def pass_on(number: int, frame: Any) -> None:
        for pid in context.pids().values():
            with suppress(ProcessLookupError):  # it has ended
                os.kill(pid, signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)

    start(context)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, pass_on)


def close(context: Any, death_sig: Any = None, timeout: int = 30, close: Any = PContext.close) -> None:
    """End the ranks, as torchrun does when one has failed."""
    close(context, death_sig, min(timeout, PATIENCE_SECONDS))


def main() -> None:
    ranks: Any = PContext
    ranks.start, ranks.close = start, close
    try:
        torchrun(sys.argv[1:])
    except ChildFailedError as error:
        _, first = error.get_first_failure()  # the others failed of it
        if first.exitcode not in (STOPPED, WRONG_INPUT):
            print(error, file=sys.stderr, flush=True)
        sys.exit(first.exitcode if first.exitcode > 0 else 128 - first.exitcode)  # below zero: the signal that ended it


if __name__ == "__main__":
    main()
