"""Writes the checkpoints of one run, beside the training: copied to host memory, then written by a thread.

A write that fails does not end the training: it is reported, and the next one tries again. Only at the end of the run
it counts. State is gathered to the first rank, as full tensors. (torch.distributed.checkpoint writes shards from all
ranks and can use safetensors, but its default metadata is a pickle, and its shards need it to be read.)
"""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import nn

from nanochat import checkpoint
from nanochat.config import InputError
from nanochat.environment import print0
from nanochat.optim import MuonAdamW
from nanochat.resume import LoopState, stored
from nanochat.runtime import Runtime, barrier

KEEP = "keep"  # a file of this name in a checkpoint's directory protects it from keep_last


class Saver:
    """Call every method on all ranks.

    Args:
        meta: the stage's own facts for the manifest; `resume.stored` has the rest.
        state: of the loop as it begins: a step above 0 is resumed from.
        every: steps between checkpoints; None = only at the end.
        keep_last: how many checkpoints to keep, the newest; None = all.
    """

    def __init__(
        self,
        rt: Runtime,
        directory: Path,
        model: nn.Module,
        optimizer: MuonAdamW,
        meta: dict[str, Any],
        state: LoopState,
        every: int | None = None,
        keep_last: int | None = None,
    ) -> None:
        if keep_last is not None and keep_last < 1:
            raise InputError(f"--keep_last {keep_last} must be at least 1, or -1 for all")
        self.rt, self.directory, self.model, self.optimizer, self.meta = rt, directory, model, optimizer, meta
        self.every, self.keep_last = every, keep_last
        self.begun_step = self.saved_step = state.step  # nothing is saved at step 0
        self.last_good = checkpoint.step_path(directory, state.step) if state.step else None
        self.failure: str | None = None  # why the last write failed
        self._thread: threading.Thread | None = None
        self._is_first = True
        self._lock = FileLock(directory.parent / f".{directory.name}.lock")

    def prepare(self) -> None:
        """Before the first step: is the directory ours alone, can it be written to, and does a checkpoint fit?

        Raises:
            InputError: no.
        """
        if not self.rt.is_master:
            return
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            probe = self.directory / f"{checkpoint.STAGING}probe"
            probe.mkdir(exist_ok=True)
            probe.rmdir()
            self._lock.acquire(timeout=0)
            checkpoint.clear_killed(self.directory)
        except Timeout:
            raise InputError(
                f"another run writes to {self.directory}; wait for its end, or give this one a --model_tag"
            ) from None
        except OSError as error:
            raise InputError(
                f"cannot write to {self.directory}: {error.strerror}; make it writable, or set NANOCHAT_BASE_DIR"
            ) from None
        # weights, and two moments for most of them
        checkpoint.require_room(self.directory, 3 * checkpoint.num_bytes(self.model.state_dict()))

    def is_due(self, state: LoopState) -> bool:
        return self.every is not None and state.step % self.every == 0

    def save(self, state: LoopState, cursor: Any) -> None:
        """Returns when all is copied to host memory, after waiting for the write before. A step is saved once."""
        if state.step == self.saved_step:
            return
        self.wait()
        self.saved_step = state.step
        optim_state = self.optimizer.state_dict()  # gathers, on all ranks
        if self.rt.is_master:
            weights = checkpoint.host_copy(self.model.state_dict())
            meta = {**self.meta, **stored(self.rt, state, cursor)}
            self._thread = threading.Thread(
                target=self._write, args=(state.step, weights, optim_state, meta), name="saver"
            )
            self._thread.start()

    def wait(self) -> None:
        """Until what was saved is on the disk."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def finish(self) -> None:
        """The end of the run: wait for the last write.

        Raises:
            InputError: it failed.
        """
        self.wait()
        barrier()  # a launcher may end the ranks that are left once one is through
        if self.failure is not None:
            raise InputError(f"the last checkpoint is not saved: {self.failure}; {self.good()}")

    def close(self) -> None:
        self.wait()
        self._lock.release()

    def good(self) -> str:
        if self.last_good is None:
            return "there is no earlier one"
        return f"the last good one is {self.last_good}: --resume=auto goes on from it"

    def _write(self, step: int, weights: Any, state: Any, meta: dict[str, Any]) -> None:
        try:
            if self._is_first:
                self._set_aside()
                self._is_first = False
            self.last_good = checkpoint.write(self.directory, step, weights, state, meta)
            self.failure = None
            print0(f"Saved {self.last_good}")
            self._remove_old()
        except Exception as error:  # of the disk, mostly: an InputError is one line already
            self.failure = str(error).splitlines()[0] if str(error) else type(error).__name__
            print0(f"warning: step {step} is not saved: {self.failure}; training goes on, {self.good()}")

    def _set_aside(self) -> None:
        """Checkpoints of another run under this tag, or of another try from the step that this one goes on from, must
        not be taken for this run's: they go to <base>/previous/, and replace those of the same steps there."""
        theirs = [step for step in checkpoint.steps(self.directory) if step > self.begun_step or not self.begun_step]
        if theirs:
            previous = self.directory.parent.parent / "previous" / self.directory.parent.name / self.directory.name
            previous.mkdir(parents=True, exist_ok=True)
            for step in theirs:
                path = checkpoint.step_path(self.directory, step)
                shutil.rmtree(previous / path.name, ignore_errors=True)
                shutil.move(path, previous / path.name)  # the folders may be on two disks
            print0(f"Set aside {len(theirs)} checkpoints of an earlier run: they are in {previous}")

    def _remove_old(self) -> None:
        """Beyond the newest keep_last; never the one just written."""
        if self.keep_last is not None:
            paths = [checkpoint.step_path(self.directory, step) for step in checkpoint.steps(self.directory)]
            for path in [p for p in paths if not (p / KEEP).exists()][: -self.keep_last]:
                checkpoint.remove(path)
