"""The one training loop: accumulation, schedules, timing, checkpoints, stops. Stages bring data, model and evals."""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import shutil
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from nanochat import guards, scaling
from nanochat.config import InputError
from nanochat.environment import print0
from nanochat.gpt import GPT
from nanochat.memory import less_memory
from nanochat.optim import MuonAdamW, build_optimizer
from nanochat.ranks import RankError
from nanochat.resume import SMOOTHING, LoopState
from nanochat.runtime import Runtime, all_reduce, memory_advice, peak_flops, synchronize
from nanochat.saver import Saver
from nanochat.signals import EXIT_STOPPED, StopSignals
from nanochat.tracking import Tracker

WARMUP_STEPS_UNTIMED = 10  # steps that compile and warm caches: not in the training time, as in the reference
SECONDS_PER_LINE = 1.0
CPU = Runtime(torch.device("cpu"), torch.float32)

Batch = tuple[Any, ...]  # (inputs, targets), and whatever else a loss of its own takes


def num_targets(batch: Batch) -> Tensor:
    return (batch[1] != -1).sum()


class Loader(Protocol):
    """What the loop trains on: batches of (inputs, targets), or lists of them, one a step, and a JSON-able cursor that
    resumes after the last."""

    @property
    def cursor(self) -> Any: ...

    def __iter__(self) -> Iterator[Any]: ...


class Loss(Protocol):
    """What takes the place of a model in `accumulate`: the sum over a batch, and () of how many it is."""

    def __call__(self, *batch: Any, **reduction: Any) -> Tensor: ...

    def count(self, batch: Batch) -> Tensor: ...


Evaluation = Callable[[LoopState], None]


def train_loop(
    state: LoopState,
    step_fn: Callable[[LoopState], None],
    is_last: Callable[[LoopState], bool],
    evals: Sequence[tuple[int | None, Evaluation]] = (),
    saver: Saver | None = None,
    cursor: Callable[[], Any] = lambda: None,
    rt: Runtime = CPU,
) -> LoopState:
    """Run optimizer steps until is_last.

    An evaluation has a period in steps (None = never); each also runs once after the last step. What is to be saved at
    a step is on the disk before the first evaluation of that step begins, and one that dies is reported and survived.
    A stop signal saves at the next boundary between two steps.

    Raises:
        SystemExit: with signals.EXIT_STOPPED after a stop signal.
        InputError: the last checkpoint could not be written, or a step refused to go on.
    """
    due = [(every, evaluate) for every, evaluate in evals if every is not None]
    with StopSignals(rt) as stop:
        try:
            if saver is not None:
                saver.prepare()
            while not stop.agreed():
                last = is_last(state)
                if saver is not None and (last or saver.is_due(state)):
                    saver.save(state, cursor())
                for every, evaluate in due:
                    if (last or state.step % every == 0) and not stop.agreed():
                        if saver is not None:
                            saver.wait()
                        stop.run_unless_told(partial(survive, evaluate, state, rt))
                if stop.agreed():
                    break
                if last:
                    if saver is not None:
                        saver.finish()
                    return state
                step_fn(state)
                state.step += 1
            if saver is not None:
                saver.save(state, cursor())
                saver.finish()
            print0(f"Stopped by {stop.name or 'another rank'} after step {state.step}; --resume=auto goes on from here")
            raise SystemExit(EXIT_STOPPED)
        finally:
            if saver is not None:
                saver.close()


def survive(evaluate: Evaluation, state: LoopState, rt: Runtime) -> None:
    """An evaluation that fails must not end the training: it is shown, and counted for the report.

    With several ranks only what failed on all of them (`ranks.together`) can be survived: after any other error they
    may wait for each other at different places.
    """
    try:
        evaluate(state)
        return
    except Exception as error:
        if rt.world_size > 1 and not isinstance(error, RankError):
            raise
        if error.__cause__ is not None or rt.world_size == 1:  # here, and not on another rank
            traceback.print_exc()
        name = evaluate.__name__
        print0(f"warning: the evaluation {name!r} failed at step {state.step}, training goes on: {error}")
        failures = state.outcome.setdefault("Evaluations that failed", {})
        failures[name] = failures.get(name, 0) + 1
    gc.collect()  # what the failed one held on the device goes now that its frames are gone
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def accumulate(
    model: Callable[..., Tensor],
    batches: Iterable[Batch],
    world_size: int = 1,
    device: Any = "cpu",
    count: Callable[[Batch], Tensor] = num_targets,
) -> Tensor:
    """Gradients of the mean loss over all targets, or whatever `count` counts, of all micro-batches of all ranks.

    Each micro-batch adds its sum of losses over the global number of targets, so micro-batches with few targets
    count for little, and one with none for nothing. The optimizer averages over ranks, hence the factor.

    Args:
        model: called with a batch's parts and reduction="sum": a GPT, or a loss around one (policy gradients, DPO).
        batches: (inputs, targets, ...), both (B, T). Ranks may bring different numbers of them.
        count: a batch -> (), how many its loss is the sum of.

    Returns:
        () mean loss per target over all ranks, in nats, on the device. 0 where no target is counted.
    """
    batches = list(batches)
    counted = torch.tensor(0.0, device=device)
    for batch in batches:
        counted += count(batch)
    all_reduce(counted)
    counted.clamp_(min=1)
    total = torch.zeros_like(counted)
    for batch in batches:
        loss = model(*batch, reduction="sum") / counted
        (loss * world_size).backward()
        total += loss.detach()
    return all_reduce(total)


def optimizer_step(
    optimizer: MuonAdamW, loss: Tensor, state: LoopState, grad_clip: float | None, sigma: float | None
) -> Callable[[Saver | None], bool]:
    """Begin a guarded step.

    Args:
        loss: () mean over all ranks, on the device.
        sigma: see guards.History.limits.

    Returns:
        What ends it: waits for the device, puts the loss into the state, says whether the step was taken.
        It raises InputError when too many in a row were not.
    """
    limits = state.history.limits(sigma)
    norm = optimizer.step(grad_clip, loss, limits)
    assert optimizer.taken is not None
    figures = torch.stack([loss.float(), norm.float(), optimizer.taken.float()])

    def end(saver: Saver | None) -> bool:
        history = state.history
        state.loss, grad_norm, taken = figures.tolist()
        if taken:
            history.take(state.loss, grad_norm)
            return True
        optimizer.step_count -= 1
        history.skip(grad_norm)
        why = guards.reason(state.loss, grad_norm, limits)
        print0(f"step {state.step + 1:05d} skipped: {why}; {history.skipped} in all, {history.in_a_row} in a row")
        if history.in_a_row >= guards.MOST_IN_A_ROW:
            good = f"; {saver.good()}" if saver is not None else ""
            raise InputError(
                f"step {state.step + 1}: {history.in_a_row} steps in a row were skipped, the last for {why}; lower the "
                f"learning rates{good}"
            )
        return False

    return end


def compiles(rt: Runtime, wanted: bool | None) -> bool:
    """Whether to compile: on a GPU unless told not to, on a CPU when asked for and a C++ compiler is there."""
    if wanted is None:
        wanted = rt.device.type == "cuda"
    if wanted and rt.device.type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        print0("torch.compile: no C++ compiler found, running eagerly")
        wanted = False
    return wanted


def compiled(model: GPT, rt: Runtime, wanted: bool | None) -> Callable[..., Tensor]:
    """The model's training forward."""
    return torch.compile(model, dynamic=False) if compiles(rt, wanted) else model


@dataclass
class Trainer:
    """What a stage's steps need. `schedule` gives (learning rate multiplier, Muon momentum or None)."""

    rt: Runtime
    stage: str  # base, mid, sft
    model: GPT
    optimizer: MuonAdamW
    loader: Loader
    tracker: Tracker
    saver: Saver | None  # None = nothing is saved
    tokens_per_step: int | None  # None = counted per step (rows of varying length)
    schedule: Callable[[LoopState], tuple[float, float | None]]
    grad_accum_steps: int | None = 1  # None = the loader gives a step's batches as a list
    num_iterations: int | None = None  # None = until the loader ends
    grad_clip: float | None = None
    guard_sigma: float | None = guards.SIGMA  # None = only what is not finite is skipped
    flops_per_token: int = 0
    compile: bool | None = False
    loss: Loss | None = None  # None = the model's own
    state: LoopState = field(default_factory=LoopState)

    def __post_init__(self) -> None:
        self.forward = self.loss or compiled(self.model, self.rt, self.compile)
        self.count = self.loss.count if self.loss else num_targets
        self.peak = peak_flops(self.rt)
        self.cursor: Any = self.loader.cursor
        self.batches: Iterator[Any] = iter(self.loader)
        self.pending: list[tuple[Tensor, Tensor]] | Exception | None = None
        self.mfu = 0.0
        self.last_line = -math.inf
        self.first_step = self.state.step
        self.steady = 0.0, 0  # when, and after how many steps, this process was warm

    def run(self, evals: Sequence[tuple[int | None, Evaluation]] = ()) -> LoopState:
        """Train to the end."""
        if self.num_iterations is None:
            self._prefetch()
        return train_loop(self.state, self._step, self.is_last, evals, self.saver, lambda: self.cursor, self.rt)

    def is_last(self, state: LoopState) -> bool:
        if self.num_iterations is not None:
            return state.step >= self.num_iterations
        return not self.pending

    def _prefetch(self) -> None:
        """Take the next step's micro-batches; none are left after the loader's end (a short last step is kept). An
        error is the next step's too: this one is whole."""
        try:
            if self.grad_accum_steps is None:
                self.pending = next(self.batches, [])
            else:
                self.pending = list(itertools.islice(self.batches, self.grad_accum_steps))
        except Exception as error:
            self.pending = error

    @contextlib.contextmanager
    def _losing_nothing(self) -> Iterator[None]:
        """Until the update begins, weights, state and cursor are those of the last boundary: an error (damaged text, no
        memory) ends the run, but first they are saved. With several ranks that cannot be: the others may be gone."""
        try:
            yield
        except Exception:
            if self.saver is not None and self.rt.world_size == 1:
                self.saver.save(self.state, self.cursor)
            raise

    def _take(self) -> list[tuple[Tensor, Tensor]]:
        """
        Raises:
            InputError: there is nothing left, or what the loader raised.
        """
        if self.pending is None:
            self._prefetch()
        if isinstance(self.pending, Exception):
            raise self.pending
        if not self.pending:
            raise InputError("the data ended before the training did; lower --num_iterations")
        return self.pending

    def _memory_advice(self, batches: list[Batch]) -> contextlib.AbstractContextManager[None]:
        """By the flags that the stage has."""
        T, n_layer = self.model.config.sequence_len, self.model.config.n_layer
        rows = max(1, max(batch[0].numel() for batch in batches) // T)  # SFT's flag counts rows of full length
        otherwise = {"base": less_memory(T, n_layer, self.model.recompute), "mid": f"--max_seq_len={max(1, T // 2)}"}
        return memory_advice(rows, *([otherwise[self.stage]] if self.stage in otherwise else []))

    def _step(self, state: LoopState) -> None:
        t0 = time.perf_counter()
        with self._losing_nothing():
            batches = self._take()
            behind = self.loader.cursor
            lrm, momentum = self.schedule(state)
            self.optimizer.set_lr(lrm, momentum)
            self.model.train()
            with self._memory_advice(batches):
                loss = accumulate(self.forward, batches, self.rt.world_size, self.rt.device, self.count)
        with self._memory_advice(batches):  # the first update makes the optimizer's state; half an update is not saved
            taken = optimizer_step(self.optimizer, loss, state, self.grad_clip, self.guard_sigma)
        self.cursor = behind
        self._prefetch()  # while the device works
        is_taken = taken(self.saver)  # waits for the device
        synchronize(self.rt.device)
        dt = time.perf_counter() - t0
        tokens = self.tokens_per_step or sum(b[0].numel() for b in batches) * self.rt.world_size
        if state.step >= WARMUP_STEPS_UNTIMED:
            state.train_seconds += dt
            state.timed_tokens += tokens
        recent = state.loss if is_taken else state.debiased() if state.step else 0.0
        state.smooth_loss = SMOOTHING * state.smooth_loss + (1 - SMOOTHING) * recent
        self._log(state, lrm, dt, tokens, is_taken)

    def _log(self, state: LoopState, lrm: float, dt: float, tokens: int, is_taken: bool) -> None:
        """One line and one JSON record; `state.step` is the step that just ran, counted from 0."""
        mfu = self._mfu(tokens, dt)
        self.mfu = self._mfu(state.timed_tokens, state.train_seconds) if state.train_seconds else mfu
        done, total = state.step + 1, self.num_iterations
        now = time.perf_counter()
        history = state.history
        new = {"loss": state.loss, "grad_norm": history.norms[-1]} if is_taken else {"skipped": history.skipped}
        self.tracker.log(done, **new, lrm=lrm, dt=dt, tok_per_sec=tokens / dt, mfu=mfu)
        if done - self.first_step <= WARMUP_STEPS_UNTIMED:
            self.steady = now, done
        if now - self.last_line < SECONDS_PER_LINE and done != total and state.step > 0:
            return
        self.last_line = now
        smooth = state.smooth_loss / (1 - SMOOTHING**done)
        line = f"step {done:05d}"
        if total is not None:
            line += f"/{total:05d} ({100 * done / total:.2f}%)"
        line += (
            f" | loss: {smooth:.6f} | lrm: {lrm:.2f} | dt: {dt * 1000:.2f}ms | tok/sec: {int(tokens / dt):,}"
            f" | mfu: {mfu:.2f} | total time: {state.train_seconds / 60:.2f}m"
        )
        if total is not None and done - self.first_step > 1:  # the first step compiles
            since, after = self.steady  # evaluations since then count, they come again
            per_step = (now - since) / (done - after) if done > after else dt
            line += f" | eta: {per_step * (total - done) / 60:.1f}m"
        print0(line)

    def _mfu(self, tokens: int, seconds: float) -> float:
        """Percent of peak FLOP/s reached over all ranks."""
        return 100 * self.flops_per_token * tokens / seconds / (self.peak * self.rt.world_size)


def make_optimizer(model: GPT, settings: Any, rt: Runtime, compile: bool = False) -> MuonAdamW:
    """The optimizer that a stage's flags ask for. Muon works in bf16 on a GPU, elsewhere in the compute dtype.

    Args:
        settings: anything with the rates of scaling.RATES and weight_decay; init_lr_frac is 1 where it has none.
    """
    names = (*scaling.RATES, "weight_decay", "init_lr_frac")
    rates = {name: getattr(settings, name) for name in names if hasattr(settings, name)}
    muon_dtype = torch.bfloat16 if rt.device.type == "cuda" else rt.dtype
    return build_optimizer(model, **rates, muon_dtype=muon_dtype, compile=compile)
