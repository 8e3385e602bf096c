"""The one training loop: accumulation, schedules, timing, checkpoints, resume. Stages bring data, model and evals."""

from __future__ import annotations

import dataclasses
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from nanochat import checkpoint
from nanochat.config import InputError
from nanochat.environment import print0
from nanochat.gpt import GPT
from nanochat.optim import MuonAdamW
from nanochat.runtime import Runtime, all_reduce, memory_advice, peak_flops, synchronize
from nanochat.tracking import Tracker

WARMUP_STEPS_UNTIMED = 10  # steps that compile and warm caches: not in the training time, as in the reference
SECONDS_PER_LINE = 1.0
SMOOTHING = 0.9  # of the printed loss


Batch = tuple[Tensor, ...]  # (inputs, targets) or (inputs, targets, weights)


class Loader(Protocol):
    """What the loop trains on: batches of (inputs, targets), and a JSON-able cursor that resumes after the last."""

    @property
    def cursor(self) -> Any: ...

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...


@dataclass
class LoopState:
    """All that a resumed run must know of the loop; a checkpoint stores exactly these fields."""

    step: int = 0
    train_seconds: float = 0.0  # without the untimed first steps
    timed_tokens: int = 0  # tokens of the timed steps
    loss: float = float("nan")  # nats per target, last step
    smooth_loss: float = 0.0  # biased moving average; debiased() corrects it
    val_bpb: float | None = None
    min_val_bpb: float | None = None

    def debiased(self) -> float:
        return self.smooth_loss / (1 - SMOOTHING**self.step) if self.step else float("nan")

    def record_val_bpb(self, bpb: float) -> None:
        self.val_bpb = bpb
        self.min_val_bpb = bpb if self.min_val_bpb is None else min(bpb, self.min_val_bpb)


Hook = Callable[[LoopState], None]


def train_loop(
    state: LoopState,
    step_fn: Callable[[LoopState], None],
    is_last: Callable[[LoopState], bool],
    hooks: Sequence[tuple[int | None, Hook]] = (),
) -> LoopState:
    """Run optimizer steps until is_last. A hook has a period in steps (None = never); each also runs once after
    the last step. Hooks run in order, so the one that saves comes first: an eval that dies loses nothing, and runs
    again when the run is resumed from that save."""
    active = [(every, hook) for every, hook in hooks if every is not None]
    while True:
        last = is_last(state)
        for every, hook in active:
            if last or state.step % every == 0:
                hook(state)
        if last:
            return state
        step_fn(state)
        state.step += 1


def accumulate(
    model: Callable[..., Tensor], batches: Iterable[Batch], world_size: int = 1, device: Any = "cpu"
) -> Tensor:
    """Gradients of the mean loss over all targets of all micro-batches of all ranks.

    Each micro-batch adds its sum of losses over the global number of targets, so micro-batches with few targets
    count for little, and one with none for nothing. The optimizer averages over ranks, hence the factor.

    Args:
        batches: (inputs, targets), both (B, T), or with weights (B, T) on the losses (policy gradients). Ranks
            may bring different numbers of them.

    Returns:
        () mean loss per target over all ranks, in nats, on the device. 0 where no target is counted.
    """
    batches = list(batches)
    num_targets = torch.zeros((), device=device)
    for _, targets, *_ in batches:
        num_targets += (targets != -1).sum()
    all_reduce(num_targets)
    num_targets.clamp_(min=1)
    total = torch.zeros_like(num_targets)
    for inputs, targets, *weights in batches:
        if weights:
            loss = (model(inputs, targets, reduction="none") * weights[0].reshape(-1)).sum() / num_targets
        else:
            loss = model(inputs, targets, reduction="sum") / num_targets
        (loss * world_size).backward()
        total += loss.detach()
    return all_reduce(total)


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
    directory: Path  # of the checkpoints
    meta: dict[str, Any]  # stored with each checkpoint
    tokens_per_step: int | None  # None = counted per step (rows of varying length)
    schedule: Callable[[LoopState], tuple[float, float | None]]
    grad_accum_steps: int = 1
    num_iterations: int | None = None  # None = until the loader ends
    grad_clip: float | None = None
    flops_per_token: int = 0
    compile: bool | None = False
    state: LoopState = field(default_factory=LoopState)

    def __post_init__(self) -> None:
        self.forward = compiled(self.model, self.rt, self.compile)
        self.peak = peak_flops(self.rt)
        self.cursor: Any = self.loader.cursor
        self.batches: Iterator[tuple[Tensor, Tensor]] = iter(self.loader)
        self.pending: list[tuple[Tensor, Tensor]] | None = None
        self.mfu = 0.0
        self.last_line = -math.inf
        self.begun = time.perf_counter()
        self.begun_step = self.state.step

    def run(self, hooks: Sequence[tuple[int | None, Hook]] = ()) -> LoopState:
        """Train to the end. Every checkpoint is written before the evals of its step."""
        if self.num_iterations is None:
            self._prefetch()
        return train_loop(self.state, self._step, self.is_last, hooks)

    def is_last(self, state: LoopState) -> bool:
        if self.num_iterations is not None:
            return state.step >= self.num_iterations
        return not self.pending

    def save(self, state: LoopState) -> None:
        if state.step and state.step == self.begun_step:
            return  # resumed from this very checkpoint
        path = checkpoint.save(
            self.rt,
            self.directory,
            state.step,
            self.model,
            self.optimizer,
            {**self.meta, "loop_state": dataclasses.asdict(state), "loader_cursor": self.cursor},
        )
        print0(f"Saved {path}")

    def _prefetch(self) -> None:
        """Take the next step's micro-batches; none are left after the loader's end (a short last step is kept)."""
        taken: list[tuple[Tensor, Tensor]] = []
        for _ in range(self.grad_accum_steps):
            batch = next(self.batches, None)
            if batch is None:
                break
            taken.append(batch)
        self.pending = taken

    def _step(self, state: LoopState) -> None:
        t0 = time.perf_counter()
        if self.pending is None:
            self._prefetch()
        batches = self.pending
        if not batches:
            raise InputError("the data ended before the training did; lower --num_iterations")
        self.cursor = self.loader.cursor  # a checkpoint after this step goes on behind these batches
        lrm, momentum = self.schedule(state)
        self.optimizer.set_lr(lrm, momentum)
        self.model.train()
        with memory_advice(batches[0][0].size(0)):
            loss = accumulate(self.forward, batches, self.rt.world_size, self.rt.device)
            grad_norm = self.optimizer.step(self.grad_clip)
        self._prefetch()  # while the device works
        state.loss = loss.item()  # waits for the device
        if not math.isfinite(state.loss + grad_norm.item()):  # the weights are lost: nothing may be saved from here on
            raise InputError(
                f"step {state.step}: loss {state.loss}, gradient norm {grad_norm.item()}; lower the learning rates, "
                f"and go on from the last checkpoint with --resume=auto"
            )
        synchronize(self.rt.device)
        dt = time.perf_counter() - t0
        tokens = self.tokens_per_step or sum(b[0].numel() for b in batches) * self.rt.world_size
        if state.step >= WARMUP_STEPS_UNTIMED:
            state.train_seconds += dt
            state.timed_tokens += tokens
        state.smooth_loss = SMOOTHING * state.smooth_loss + (1 - SMOOTHING) * state.loss
        self._log(state, lrm, dt, tokens)

    def _log(self, state: LoopState, lrm: float, dt: float, tokens: int) -> None:
        """One line and one JSON record; `state.step` is the step that just ran, counted from 0."""
        mfu = self._mfu(tokens, dt)
        self.mfu = self._mfu(state.timed_tokens, state.train_seconds) if state.train_seconds else mfu
        done, total = state.step + 1, self.num_iterations
        now = time.perf_counter()
        self.tracker.log(done, loss=state.loss, lrm=lrm, dt=dt, tok_per_sec=tokens / dt, mfu=mfu)
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
        if total is not None:
            eta = (now - self.begun) / (done - self.begun_step) * (total - done)
            line += f" | eta: {eta / 60:.1f}m"
        print0(line)

    def _mfu(self, tokens: int, seconds: float) -> float:
        """Percent of peak FLOP/s reached over all ranks."""
        return 100 * self.flops_per_token * tokens / seconds / (self.peak * self.rt.world_size)


def muon_dtype(rt: Runtime) -> torch.dtype:
    """bf16 on a GPU and wherever we compute in it; fp32 elsewhere."""
    return torch.bfloat16 if rt.device.type == "cuda" else rt.dtype


def resume_path(directory: Path, resume: str) -> Path | None:
    """The checkpoint to go on from: "none", "auto" (the last whole one, if any) or a step.

    Raises:
        InputError: neither of these, or no such step.
    """
    have = checkpoint.steps(directory)
    if resume == "none":
        return None
    if resume == "auto":
        for step in reversed(have):
            path = checkpoint.step_path(directory, step)
            try:
                checkpoint.load(path, with_optimizer=True)
                return path
            except InputError as error:
                print0(f"skipping: {error}")
        return None
    if not resume.isdigit() or int(resume) not in have:
        listed = ", ".join(map(str, have)) or "none"
        raise InputError(f"--resume {resume}: no such step in {directory} (there are: {listed}); use auto or none")
    return checkpoint.step_path(directory, int(resume))


def restore(path: Path, model: GPT, optimizer: MuonAdamW) -> tuple[LoopState, Any]:
    """Load weights and optimizer state in place; returns (loop state, loader cursor) to go on with.

    Raises:
        InputError: the checkpoint is damaged, or of a model of other sizes.
    """
    saved = checkpoint.load(path, with_optimizer=True)
    ours, theirs = model.config.to_dict(), saved.meta["model_config"]
    other = {k: v for k, v in theirs.items() if ours.get(k) != v}
    if other:
        asked = {k: ours.get(k) for k in other}
        raise InputError(f"checkpoint {path} has {other}, this run {asked}; resume with the same sizes or another tag")
    model.load_state_dict(saved.model)
    assert saved.optimizer is not None
    optimizer.load_state_dict(saved.optimizer)
    print0(f"Resuming from {path}")
    return LoopState(**saved.meta["loop_state"]), saved.meta["loader_cursor"]
