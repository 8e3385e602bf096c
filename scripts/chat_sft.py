"""Supervised fine-tuning on conversations: loss on what the assistant says only.

    python -m scripts.chat_sft
    torchrun --standalone --nproc_per_node=8 -m scripts.chat_sft -- --num_epochs=1
    python -m scripts.chat_sft --conversations=mine.jsonl      # with conversations of your own

Reads mid_checkpoints/<tag>/ (or base_checkpoints/); writes chatsft_checkpoints/<tag>/.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nanochat import checkpoint, guards, resume, runtime, scaling
from nanochat.checkpoint import Checkpoint
from nanochat.config import InputError, flag, report_config, run_cli
from nanochat.data.conversations import PaddedConversations
from nanochat.environment import print0
from nanochat.evals.chat import evaluate_task
from nanochat.optim import build_optimizer
from nanochat.ranks import together
from nanochat.report import get_report
from nanochat.resume import LoopState
from nanochat.runtime import all_reduce
from nanochat.saver import Saver
from nanochat.tracking import DUMMY, Tracker
from nanochat.trainer import Trainer, muon_dtype
from tasks import mixtures
from tasks.common import Task, fingerprint
from tasks.registry import eval_task


@dataclass(frozen=True)
class ChatSFTConfig:
    run: str = flag(DUMMY, "wandb run name; dummy = no wandb")
    source: str = flag("mid", "stage to start from", choices=("mid", "base"))
    device_type: str | None = flag(None, "cuda, mps or cpu; empty = the best there is", off="")
    dtype: str | None = flag(None, "compute dtype; None = the device's", off="None", choices=tuple(runtime.DTYPES))
    device_batch_size: int = flag(4, "conversations a forward pass and rank")
    num_epochs: int = flag(1, "passes over the training rows")
    num_iterations: int | None = flag(None, "optimizer steps; -1 = num_epochs", off=-1)
    target_examples_per_step: int = flag(32, "conversations per optimizer step over all ranks")
    unembedding_lr: float = flag(0.004, "AdamW learning rate of the output head, at width 768")
    embedding_lr: float = flag(0.2, "AdamW learning rate of the token embedding, at width 768")
    matrix_lr: float = flag(0.02, "Muon learning rate of the matrices")
    weight_decay: float = flag(0.0, "of AdamW")
    init_lr_frac: float = flag(0.02, "all learning rates start at this part of theirs, and fall to 0")
    aqua_train_examples: int = flag(20000, "AQUA training rows; 0 = none")
    aqua_val_examples: int = flag(254, "AQUA validation rows; 0 = none")
    eval_every: int | None = flag(100, "steps between validations; -1 = never", off=-1)
    eval_steps: int = flag(100, "batches of a validation")
    eval_metrics_every: int | None = flag(200, "steps between task metrics; -1 = never", off=-1)
    eval_metrics_max_problems: int = flag(1024, "problems of a task metric")
    mixture: str | None = flag(
        None,
        "what to train on; None = what goes with the base model's data",
        off="None",
        choices=mixtures.NAMES,
        new=True,
    )
    conversations: str | None = flag(None, "your own conversations, a .jsonl file", off="None", new=True)
    model_tag: str | None = flag(None, "checkpoint tag; None = the deepest model", off="None", new=True)
    step: int | None = flag(None, "checkpoint step; None = the last", off="None", new=True)
    save_every: int | None = flag(250, "steps between checkpoints; -1 = only the last", off=-1, new=True)
    keep_last: int | None = flag(2, "how many checkpoints to keep; -1 = all", off=-1, new=True)
    resume: str = flag("none", "go on from a checkpoint: none, auto or a step", new=True)
    accept_changes: bool = flag(False, "resume although tokenizer or data changed", new=True)
    guard_sigma: float | None = flag(
        guards.SIGMA, "skip steps whose loss or gradient is so many sigma off; 0 = only if not finite", off=0, new=True
    )
    seed: int = flag(42, "of torch's generators", new=True)
    deterministic: bool = flag(False, "the same result to the bit, also where that is slower (GPU)", new=True)

    def __post_init__(self) -> None:
        for name in ("device_batch_size", "num_epochs", "target_examples_per_step", "eval_steps"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)} must be at least 1")


def accumulation(cfg: ChatSFTConfig, world_size: int) -> int:
    """Micro-batches of a step.

    Raises:
        InputError: target_examples_per_step does not divide.
    """
    per_pass = cfg.device_batch_size * world_size
    if cfg.target_examples_per_step % per_pass:
        near = max(1, round(cfg.target_examples_per_step / per_pass)) * per_pass
        raise InputError(
            f"--target_examples_per_step {cfg.target_examples_per_step} is no multiple of the {per_pass} conversations "
            f"of one pass ({cfg.device_batch_size} rows x {world_size} ranks); try {near}"
        )
    return cfg.target_examples_per_step // per_pass


@torch.no_grad()
def loss_sums(model: Any, loader: PaddedConversations, steps: int, device: torch.device) -> torch.Tensor:
    """(2,) fp64: nats and supervised tokens of this rank, over `steps` batches."""
    sums = torch.zeros(2, dtype=torch.float64)
    for inputs, targets in itertools.islice(loader, steps):
        sums[0] += model(inputs, targets, reduction="sum").double().cpu()
        sums[1] += (targets != -1).sum().cpu()
    return sums.to(device) if device.type == "cuda" else sums


def build(
    cfg: ChatSFTConfig,
    rt: runtime.Runtime,
    train: Task,
    model: Any,
    tokenizer: Any,
    source: dict[str, Any],
    saved: Checkpoint | None = None,
) -> Trainer:
    """source: the manifest of the checkpoint that `model` is from."""
    accum = accumulation(cfg, rt.world_size)
    steps = cfg.num_iterations or (len(train) // cfg.target_examples_per_step) * cfg.num_epochs
    if steps < 1:
        raise InputError(
            f"--target_examples_per_step {cfg.target_examples_per_step} is more than the {len(train)} training rows"
        )
    optimizer = build_optimizer(
        model,
        unembedding_lr=cfg.unembedding_lr,
        embedding_lr=cfg.embedding_lr,
        matrix_lr=cfg.matrix_lr,
        weight_decay=cfg.weight_decay,
        init_lr_frac=cfg.init_lr_frac,
        muon_dtype=muon_dtype(rt),
    )
    meta = resume.stage_facts(cfg, model, tokenizer, fingerprint(train), source["user_config"].get("dataset"))
    state, cursor = resume.restore(saved, model, optimizer, meta, cfg.accept_changes)
    directory = checkpoint.tag_directory("sft", source["tag"])
    loader = PaddedConversations(train, tokenizer, cfg.device_batch_size, model.config.sequence_len, rt, cursor, accum)

    def schedule(state: LoopState) -> tuple[float, None]:
        return scaling.lr_multiplier(state.step / steps, warmdown=1.0), None

    return Trainer(
        rt=rt,
        stage="sft",
        model=model,
        optimizer=optimizer,
        loader=loader,
        tracker=Tracker("sft", cfg.run, rt, meta["user_config"]),
        saver=Saver(rt, directory, model, optimizer, meta, state, cfg.save_every, cfg.keep_last),
        tokens_per_step=None,
        schedule=schedule,
        grad_accum_steps=accum,
        num_iterations=steps,
        flops_per_token=model.config.shape.flops_per_token,
        guard_sigma=cfg.guard_sigma,
        state=state,
    )


def run(cfg: ChatSFTConfig) -> LoopState:
    rt = runtime.start(cfg.device_type, cfg.seed, cfg.deterministic)
    directory = checkpoint.tag_directory("sft", checkpoint.find(cfg.source, cfg.model_tag, cfg.step).parent.name)
    saved = resume.find(rt, directory, cfg.resume)
    rt = resume.same_dtype(rt, saved) if cfg.dtype is None else dataclasses.replace(rt, dtype=runtime.DTYPES[cfg.dtype])
    model, tokenizer, meta = checkpoint.load_model(cfg.source, rt, cfg.model_tag, cfg.step)
    name = cfg.mixture or mixtures.name_for(meta["user_config"].get("dataset"))
    train, val = mixtures.sft(name, cfg.conversations, cfg.aqua_train_examples, cfg.aqua_val_examples)
    trainer = build(cfg, rt, train, model, tokenizer, meta, saved)
    print0(f"Training rows: {len(train):,}\nNumber of iterations: {trainer.num_iterations:,}")
    losses: list[float] = []

    def validate(state: LoopState) -> None:
        model.eval()
        loader = PaddedConversations(val, tokenizer, cfg.device_batch_size, model.config.sequence_len, rt)
        nats, tokens = all_reduce(together(lambda: loss_sums(model, loader, cfg.eval_steps, rt.device))).tolist()
        losses.append(nats / max(1, tokens))
        print0(f"Step {state.step:05d} | Validation loss: {losses[-1]:.6f}")
        trainer.tracker.log(state.step, val_loss=losses[-1])

    def metrics(state: LoopState) -> None:
        if state.step == 0:
            return
        model.eval()
        for task in mixtures.SFT_METRICS[name]:
            result = evaluate_task(
                eval_task(task),
                model,
                tokenizer,
                rt,
                batch_size=2 * cfg.device_batch_size,
                max_problems=cfg.eval_metrics_max_problems,
            )
            print0(f"Step {state.step:05d} | {task} accuracy: {result.accuracy:.4f}")
            trainer.tracker.log(state.step, **{f"{task}_acc": result.accuracy})

    state = trainer.run([(cfg.eval_every, validate), (cfg.eval_metrics_every, metrics)])
    outcome = {
        "Training rows": len(train),
        "Number of iterations": state.step,
        "Training loss": state.debiased(),
        "Validation loss": losses[-1] if losses else None,
    }
    old, new = report_config(cfg)
    old["dtype"] = str(rt.dtype).removeprefix("torch.")
    new["mixture"] = name
    extra = {"Total training time": f"{state.train_seconds / 60:.2f}m", "MFU %": f"{trainer.mfu:.2f}%"}
    get_report().log("Chat SFT", [old, outcome, new, extra, state.outcome, state.history.facts()])
    trainer.tracker.finish()
    runtime.stop()
    return state


def main(argv: Sequence[str] | None = None) -> None:
    run_cli(ChatSFTConfig, run, argv, about=__doc__)


if __name__ == "__main__":
    main()
