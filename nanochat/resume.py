"""Going on with a run: which checkpoint, does it fit, and everything that the loop must know of what went before."""

from __future__ import annotations

import base64
import dataclasses
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanochat import checkpoint
from nanochat.checkpoint import Checkpoint
from nanochat.config import InputError, report_config
from nanochat.environment import print0
from nanochat.gpt import GPT
from nanochat.guards import History
from nanochat.optim import MuonAdamW
from nanochat.runtime import DTYPES, Runtime, all_reduce, given_dtype
from nanochat.tokenizer import Tokenizer

SMOOTHING = 0.9  # of the printed loss
# Settings that change nothing of what is trained: a resumed run may have others without a word.
FREE = ("resume", "accept_changes", "run", "save_every", "keep_last")


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
    history: History = field(default_factory=History)
    outcome: dict[str, Any] = field(default_factory=dict)  # lines of the report that are known before the end

    def debiased(self) -> float:
        return self.smooth_loss / (1 - SMOOTHING**self.step) if self.step else float("nan")

    def record_val_bpb(self, bpb: float) -> None:
        self.val_bpb = bpb
        self.min_val_bpb = bpb if self.min_val_bpb is None else min(bpb, self.min_val_bpb)


def find(rt: Runtime, directory: Path, resume: str) -> Checkpoint | None:
    """The checkpoint to go on from, read and verified: "none", "auto" (the last good one, if any) or a step. The first
    rank chooses for all.

    Raises:
        InputError: neither of these, no such step, or one that is damaged or of another version.
    """
    if resume == "none":
        return None
    have = checkpoint.steps(directory)
    if resume != "auto" and not (resume.isdigit() and int(resume) in have):
        listed = ", ".join(map(str, have)) or "none"
        raise InputError(f"--resume {resume}: no such step in {directory} (there are: {listed}); use auto or none")
    found: Checkpoint | None = None
    if rt.is_master:
        if resume != "auto":
            found = checkpoint.load(checkpoint.step_path(directory, int(resume)), with_optimizer=True)
        for step in reversed(have if resume == "auto" else []):
            try:
                found = checkpoint.load(checkpoint.step_path(directory, step), with_optimizer=True)
                break
            except checkpoint.OtherFormat:
                raise
            except InputError as error:
                print0(f"skipping: {error}")
        if found is None and have:
            raise InputError(f"no checkpoint in {directory} is whole; --resume=none starts anew and sets them aside")
    step = int(all_reduce(torch.tensor([found.meta["step"] if found else -1], device=rt.device), "max"))
    if step >= 0 and found is None:
        found = checkpoint.load(checkpoint.step_path(directory, step), with_optimizer=True, verify=False)
    return found


def same_dtype(rt: Runtime, saved: Checkpoint | None) -> Runtime:
    """The runtime with the compute dtype that the run had on this kind of device so far, unless NANOCHAT_DTYPE says
    otherwise. A CPU's is chosen by timing, which another life of the run may find different."""
    if saved is None or saved.meta.get("device_type") != rt.device.type or given_dtype() is not None:
        return rt
    return dataclasses.replace(rt, dtype=DTYPES[saved.meta["compute_dtype"]])


def require_start(digest: str, saved: Checkpoint | None) -> None:
    """Where training compares with the model that it began with.

    Args:
        digest: the hash of that model's weights, as they are now; a checkpoint has it as "start".

    Raises:
        InputError: it is another one than the resumed run began with.
    """
    if saved is not None and saved.meta.get("start") != digest:
        raise InputError(
            f"the start model has changed since {saved.path} was saved; put it back, or start anew with --resume=none"
        )


def restore(
    saved: Checkpoint | None,
    model: GPT,
    optimizer: MuonAdamW,
    meta: dict[str, Any],
    accept_changes: bool = False,
) -> tuple[LoopState, Any]:
    """Load weights, optimizer and random state in place, if there is something to go on from.

    Args:
        meta: what this run would store: "tokenizer", "data" and "user_config" are compared.

    Returns:
        (loop state, loader cursor or None) to go on with.

    Raises:
        InputError: a model of other sizes; another tokenizer or other data, unless these changes are accepted.
    """
    if saved is None:
        return LoopState(), None
    ours, theirs = model.config.to_dict(), saved.meta["model_config"]
    other = {k: v for k, v in theirs.items() if ours.get(k) != v}
    if other:
        asked = {k: ours.get(k) for k in other}
        raise InputError(
            f"checkpoint {saved.path} has {other}, this run {asked}; resume with the same sizes or another --model_tag"
        )
    for key, what in (("tokenizer", "the tokenizer"), ("data", "the training data")):
        if key in saved.meta and key in meta and saved.meta[key] != meta[key]:
            if not accept_changes:
                raise InputError(
                    f"{what} changed since {saved.path} was saved; put it back, start anew with --resume=none, or go "
                    "on with --accept_changes, which is no exact continuation"
                )
            print0(f"warning: {what} changed since the checkpoint was saved")
    model.load_state_dict(saved.model)
    assert saved.optimizer is not None
    optimizer.load_state_dict(saved.optimizer)
    _set_rng(saved.meta.get("rng", {}))
    for line in _changes(saved.meta, meta):
        print0(line)
    print0(f"Resuming from {saved.path}")
    state = LoopState(**saved.meta["loop_state"])
    state.history = History(**saved.meta["loop_state"]["history"])
    return state, saved.meta["loader_cursor"]


def _changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What makes this no exact continuation, in words."""
    lines = []
    old, new = before.get("user_config", {}), now.get("user_config", {})
    changed = [k for k in new if k in old and old[k] != new[k] and k not in FREE]
    if changed:
        lines.append("Settings that changed: " + ", ".join(f"{k} {old[k]} -> {new[k]}" for k in changed))
    old, new = before.get("versions", {}), versions()
    changed = [k for k in new if k in old and old[k] != new[k]]
    if changed:
        lines.append("Versions that changed: " + ", ".join(f"{k} {old[k]} -> {new[k]}" for k in changed))
    return lines


def versions() -> dict[str, str]:
    return {"torch": torch.__version__, "python": platform.python_version()}


def stage_facts(cfg: Any, model: GPT, tokenizer: Tokenizer, data: str, dataset: str | None) -> dict[str, Any]:
    """What a stage's checkpoints say of what made them. data: the fingerprint of what it trains on; dataset: the name
    of its base model's text."""
    settings = {k: v for part in report_config(cfg) for k, v in part.items()}
    return {
        "tokenizer": tokenizer.fingerprint,
        "data": data,
        "model_config": model.config.to_dict(),
        "user_config": {**settings, "dataset": dataset},
    }


def stored(rt: Runtime, state: LoopState, cursor: Any) -> dict[str, Any]:
    """What a checkpoint says besides its stage's own facts."""
    return {
        "loop_state": dataclasses.asdict(state),
        "loader_cursor": cursor,
        "device_type": rt.device.type,
        "compute_dtype": str(rt.dtype).removeprefix("torch."),
        "world_size": rt.world_size,
        "rng": _rng(rt),
        "versions": versions(),
    }


def _rng(rt: Runtime) -> dict[str, str]:
    """torch's generators, of the first rank. Nothing in the loop draws from them; what you add to it may."""
    states = {"cpu": torch.get_rng_state()}
    if rt.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state()
    return {kind: base64.b64encode(state.numpy().tobytes()).decode("ascii") for kind, state in states.items()}


def _set_rng(saved: dict[str, str]) -> None:
    states = {k: torch.from_numpy(np.frombuffer(base64.b64decode(v), np.uint8).copy()) for k, v in saved.items()}
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
