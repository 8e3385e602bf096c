"""Midtraining: the base model learns conversations, tool use and multiple choice, loss on all tokens.

    python -m scripts.mid_train --num_iterations=400
    torchrun --standalone --nproc_per_node=8 -m scripts.mid_train

One pass over the mixture, or --num_iterations optimizer steps. Reads base_checkpoints/<tag>/; writes
mid_checkpoints/<tag>/.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nanochat import checkpoint, guards, resume, runtime, scaling
from nanochat.checkpoint import Checkpoint
from nanochat.config import InputError, flag, report_config, run_cli
from nanochat.data.conversations import PackedConversations
from nanochat.environment import print0
from nanochat.evals.bpb import evaluate_bpb
from nanochat.gpt import GPTConfig
from nanochat.report import get_report
from nanochat.resume import LoopState
from nanochat.saver import Saver
from nanochat.tracking import DUMMY, Tracker
from nanochat.trainer import Trainer, make_optimizer
from tasks import mixtures
from tasks.common import Task, fingerprint


@dataclass(frozen=True)
class MidTrainConfig:
    run: str = flag(DUMMY, "wandb run name; dummy = no wandb")
    device_type: str | None = flag(None, "cuda, mps or cpu; empty = the best there is", off="")
    dtype: str | None = flag(None, "compute dtype; None = the device's", off="None", choices=tuple(runtime.DTYPES))
    num_iterations: int | None = flag(None, "optimizer steps; -1 = one pass over the mixture", off=-1)
    max_seq_len: int = flag(2048, "context length in tokens")
    device_batch_size: int = flag(32, "rows a forward pass and rank")
    unembedding_lr: float = flag(0.004, "AdamW learning rate of the output head, at width 768")
    embedding_lr: float = flag(0.2, "AdamW learning rate of the token embedding, at width 768")
    matrix_lr: float = flag(0.02, "Muon learning rate of the matrices")
    init_lr_frac: float = flag(1.0, "all learning rates start at this part of theirs")
    weight_decay: float = flag(0.0, "of AdamW")
    eval_every: int | None = flag(150, "steps between validations; -1 = never", off=-1)
    eval_tokens: int = flag(20 * 524288, "tokens of a validation")
    total_batch_size: int = flag(524288, "tokens per optimizer step over all ranks")
    dry_run: int = flag(0, "1 = write no checkpoint and no report")
    mixture: str | None = flag(
        None,
        "real, tinyworld, none or a file (tasks/mixtures.py); None = what goes with the base model's data",
        off="None",
        new=True,
    )
    task: tuple[str, ...] = flag(
        (), "NAME[:rows[:epochs]]: change or add this row of the mixture", off="None", new=True
    )
    conversations: tuple[str, ...] = flag((), "FILE.jsonl[:epochs]: your own conversations", off="None", new=True)
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
    compile: bool | None = flag(None, "torch.compile; default: on a GPU", off="None", new=True)

    def __post_init__(self) -> None:
        for name in ("max_seq_len", "device_batch_size", "total_batch_size", "eval_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)} must be at least 1")
        if self.num_iterations is not None and self.num_iterations < 1:
            raise InputError(f"--num_iterations {self.num_iterations} must be at least 1, or -1 for one pass")


def build(
    cfg: MidTrainConfig,
    rt: runtime.Runtime,
    train: Task,
    model: Any,
    tokenizer: Any,
    source: dict[str, Any],
    saved: Checkpoint | None = None,
) -> Trainer:
    """source: the manifest of the checkpoint that `model` is from."""
    accum = scaling.grad_accum_steps(cfg.total_batch_size, cfg.device_batch_size, cfg.max_seq_len, rt.world_size)
    optimizer = make_optimizer(model, cfg, rt)
    meta = resume.stage_facts(cfg, model, tokenizer, fingerprint(train), source["user_config"].get("dataset"))
    state, cursor = resume.restore(saved, model, optimizer, meta, cfg.accept_changes)
    directory = checkpoint.tag_directory("mid", source["tag"])
    steps = cfg.num_iterations
    loader = PackedConversations(
        train, tokenizer, cfg.device_batch_size, cfg.max_seq_len, rt, cursor=cursor, repeat=steps is not None
    )

    saver = Saver(rt, directory, model, optimizer, meta, state, cfg.save_every, cfg.keep_last)

    def schedule(state: LoopState) -> tuple[float, float]:
        progress = loader.progress if steps is None else state.step / steps
        return scaling.lr_multiplier(progress), scaling.muon_momentum(state.step)

    return Trainer(
        rt=rt,
        stage="mid",
        model=model,
        optimizer=optimizer,
        loader=loader,
        tracker=Tracker("mid", cfg.run, rt, meta["user_config"]),
        saver=None if cfg.dry_run else saver,
        tokens_per_step=cfg.total_batch_size,
        schedule=schedule,
        grad_accum_steps=accum,
        num_iterations=steps,
        flops_per_token=model.config.shape.flops_per_token,
        compile=cfg.compile,
        guard_sigma=cfg.guard_sigma,
        state=state,
    )


def run(cfg: MidTrainConfig) -> LoopState:
    rt = runtime.start(cfg.device_type, cfg.seed, cfg.deterministic)
    directory = checkpoint.tag_directory("mid", checkpoint.find("base", cfg.model_tag, cfg.step).parent.name)
    saved = resume.find(rt, directory, cfg.resume)
    rt = resume.same_dtype(rt, saved) if cfg.dtype is None else dataclasses.replace(rt, dtype=runtime.DTYPES[cfg.dtype])
    model, tokenizer, meta = checkpoint.load_model("base", rt, cfg.model_tag, cfg.step)
    rows = meta.get("device_batch_size")
    if rows is not None and cfg.device_batch_size > rows:
        print0(f"warning: --device_batch_size {cfg.device_batch_size} is more than the {rows} of the base run")
    if cfg.max_seq_len != model.config.sequence_len:
        model.resize(GPTConfig(**{**model.config.to_dict(), "sequence_len": cfg.max_seq_len}))
    name = mixtures.name_for(meta["user_config"].get("dataset"))
    mixture = mixtures.open_mixture("mid", name, cfg.mixture, cfg.task, cfg.conversations)
    train, val = mixture.train, mixture.open_validation()
    print0(f"Mixture: {mixture.describe()}")
    trainer = build(cfg, rt, train, model, tokenizer, meta, saved)
    token_bytes = tokenizer.token_bytes().to(rt.device)
    eval_steps = max(1, cfg.eval_tokens // (cfg.device_batch_size * cfg.max_seq_len * rt.world_size))

    def validate(state: LoopState) -> None:
        model.eval()
        rows, T = cfg.device_batch_size, cfg.max_seq_len
        with contextlib.closing(PackedConversations(val, tokenizer, rows, T, rt)) as loader:
            bpb = evaluate_bpb(model, loader, token_bytes, eval_steps)
        state.record_val_bpb(bpb)
        print0(f"Step {state.step:05d} | Validation bpb: {bpb:.4f}")
        trainer.tracker.log(state.step, val_bpb=bpb)

    state = trainer.run([(cfg.eval_every, validate)])
    print0(f"Total training time: {state.train_seconds / 60:.2f}m")
    if not cfg.dry_run:
        outcome = {
            "Number of iterations": state.step,
            "DDP world size": rt.world_size,
            "Minimum validation bpb": state.min_val_bpb,
        }
        old, new = report_config(cfg)
        old["dtype"] = str(rt.dtype).removeprefix("torch.")
        new["mixture"] = cfg.mixture or name
        extra = {
            **mixture.facts,
            "Training rows": len(train),
            "MFU %": f"{trainer.mfu:.2f}%",
            "Total training time": f"{state.train_seconds / 60:.2f}m",
        }
        get_report().log("Midtraining", [old, outcome, new, extra, state.outcome, state.history.facts()])
    trainer.tracker.finish()
    runtime.stop()
    return state


def main(argv: Sequence[str] | None = None) -> None:
    run_cli(MidTrainConfig, run, argv, about=__doc__)


if __name__ == "__main__":
    main()
