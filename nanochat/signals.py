"""Stop signals: a training loop saves at its next step boundary, on all ranks together, and ends with EXIT_STOPPED.

SIGTERM (a scheduler), SIGINT (Ctrl-C), SIGHUP (a terminal that closed) and SIGUSR1 (a cluster's warning) are noted and
not obeyed at once; one that is ignored, as under nohup, stays ignored. A second Ctrl-C ends the process at once,
without saving.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType, TracebackType

import torch

from nanochat.runtime import Runtime, all_reduce

EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: "run it again": --resume=auto goes on from here
EXIT_AT_ONCE = 130  # what shells give for Ctrl-C
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP") if hasattr(signal, name))


class CutShort(BaseException):
    """A stop signal came within StopSignals.run_unless_told(). No Exception: what survives errors must not catch it."""


def _tell(line: str) -> None:
    with contextlib.suppress(OSError):  # the terminal may be what is gone
        os.write(sys.stderr.fileno(), f"\n{line}\n".encode())  # print() might be what was interrupted


class StopSignals:
    """A context in which stop signals are noted: `name` is the first one's, None until then."""

    def __init__(self, rt: Runtime) -> None:
        self.rt = rt
        self.name: str | None = None
        self._times_interrupted = 0
        self._cuts_short = False

    def __enter__(self) -> StopSignals:
        self._before = {}
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread set handlers
            heard = [s for s in SIGNALS if signal.getsignal(s) != signal.SIG_IGN]
            self._before = {s: signal.signal(s, self._note) for s in heard}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._times_interrupted += number == signal.SIGINT
        if self._times_interrupted > 1:
            _tell("stopped at once; what was not saved is lost")
            os._exit(EXIT_AT_ONCE)
        is_first, self.name = self.name is None, self.name or signal.Signals(number).name
        if is_first and self.rt.is_master:
            _tell(f"{self.name}: saving at the end of this step")
        if self._cuts_short:
            self._cuts_short = False
            raise CutShort

    def agreed(self) -> bool:
        """Whether any rank was told to stop: the same answer on all, so call it on all."""
        if self.rt.world_size == 1:
            return self.name is not None
        return bool(all_reduce(torch.tensor([float(self.name is not None)], device=self.rt.device), "max").item())

    def run_unless_told(self, work: Callable[[], None]) -> None:
        """An evaluation: it ends as soon as a signal comes, and nothing of it must be kept. With several ranks it goes
        on to its end, as the others may wait for this one in the middle of it."""
        try:
            try:
                self._cuts_short = self.rt.world_size == 1  # before the look, so that no signal falls between
                if not (self._cuts_short and self.name):
                    work()
            finally:
                self._cuts_short = False
        except CutShort:
            pass
