"""Supervised fine-tuning on conversations: loss on what the assistant says only.

    python -m scripts.chat_sft
    torchrun --standalone --nproc_per_node=8 -m scripts.chat_sft -- --num_epochs=1
    python -m scripts.chat_sft --conversations=mine.jsonl      # with conversations of your own
    python -m scripts.chat_sft --source=sft --conversations=mine.jsonl   # taught to a model that is through with it
    python -m scripts.chat_sft --source=sft --dpo=pairs.jsonl  # which of two answers is better (nanochat/dpo.py)

Reads mid_checkpoints/<tag>/ (or base_checkpoints/); writes chatsft_checkpoints/<tag>/.

--source=sft goes on from the SFT model, and writes <tag>-own beside it. Settings that are left out are those of the
run that made it, learning rates 1.25 times its; your conversations are shown many times, in other words each time,
among four times as many others. With --dpo it writes <tag>-dpo at a quarter of its rates, and a tenth of the pairs is
held out.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanochat import checkpoint, dpo, guards, resume, runtime, scaling
from nanochat.checkpoint import Checkpoint
from nanochat.config import InputError, flag, is_given, report_config, run_cli
from nanochat.data.conversations import ConversationSteps, padded
from nanochat.environment import print0
from nanochat.evals.chat import evaluate_task
from nanochat.ranks import together
from nanochat.report import get_report
from nanochat.resume import LoopState
from nanochat.runtime import all_reduce
from nanochat.saver import Saver
from nanochat.tokenizer import Tokenizer
from nanochat.tracking import DUMMY, Tracker
from nanochat.trainer import Trainer, make_optimizer
from tasks import mixtures
from tasks.common import Task, fingerprint
from tasks.mixtures import Mixture
from tasks.preferences import Preferences
from tasks.registry import eval_task

TAUGHT, PREFERS = "-own", "-dpo"  # behind the tag of a model that learned more after its SFT


@dataclass(frozen=True)
class ChatSFTConfig:
    run: str = flag(DUMMY, "wandb run name; dummy = no wandb")
    source: str = flag("mid", "stage to start from", choices=("mid", "base", "sft"))
    device_type: str | None = flag(None, "cuda, mps or cpu; empty = the best there is", off="")
    dtype: str | None = flag(None, "compute dtype; None = the device's", off="None", choices=tuple(runtime.DTYPES))
    device_batch_size: int = flag(4, "conversations of full length that fit a forward pass and rank")
    num_epochs: int = flag(1, "passes over the training rows")
    num_iterations: int | None = flag(None, "optimizer steps; -1 = num_epochs", off=-1)
    target_examples_per_step: int = flag(32, "conversations per optimizer step over all ranks")
    unembedding_lr: float = flag(0.004, "AdamW learning rate of the output head, at width 768")
    embedding_lr: float = flag(0.2, "AdamW learning rate of the token embedding, at width 768")
    matrix_lr: float = flag(0.02, "Muon learning rate of the matrices")
    weight_decay: float = flag(0.0, "of AdamW")
    init_lr_frac: float = flag(0.02, "all learning rates start at this part of theirs, and fall to 0")
    aqua_train_examples: int = flag(20000, "AQUA training rows of the mixture real; 0 = none")
    aqua_val_examples: int = flag(254, "AQUA validation rows of the mixture real; 0 = none")
    eval_every: int | None = flag(100, "steps between validations; -1 = never", off=-1)
    eval_steps: int = flag(100, "batches of a validation")
    eval_metrics_every: int | None = flag(200, "steps between task metrics; -1 = never", off=-1)
    eval_metrics_max_problems: int = flag(1024, "problems of a task metric")
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
    replay: float = flag(4.0, "after --source=sft, other conversations for each showing of one of yours", new=True)
    reword: bool = flag(True, "after --source=sft, ask in other words each time (English)", new=True)
    dpo: str | None = flag(
        None, "FILE.jsonl of preference pairs (tasks/preferences.py), after --source=sft", off="None", new=True
    )
    dpo_beta: float = flag(0.1, "how much a reward weighs a step away from the start model", new=True)
    warm_start: bool = flag(False, "begin with the optimizer's state that the checkpoint has, not anew", new=True)
    model_tag: str | None = flag(None, "checkpoint tag; None = the deepest, d4 before d4-own", off="None", new=True)
    step: int | None = flag(None, "checkpoint step; None = the last", off="None", new=True)
    save_tag: str | None = flag(
        None, "tag to write; None = the one read, with -own or -dpo behind it after --source=sft", off="None", new=True
    )
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
        if not 0 <= self.replay < float("inf"):
            raise InputError(f"--replay {self.replay} must be 0 or more")
        if not 0 < self.dpo_beta < float("inf"):
            raise InputError(f"--dpo_beta {self.dpo_beta} must be above 0; 0.1 is usual")
        if self.dpo is not None and self.source != "sft":
            raise InputError("--dpo compares with a model that answers already; add --source=sft")
        if self.dpo is not None and (self.conversations or self.task or self.mixture):
            raise InputError(
                "--dpo trains on its pairs alone; teach --conversations, --task or --mixture in another run"
            )


# What an SFT run has settled for its model, which going on from it takes over where the command says nothing.
SETTLED = (
    *("device_batch_size", "target_examples_per_step", "unembedding_lr", "embedding_lr", "matrix_lr", "weight_decay"),
    *("init_lr_frac", "eval_steps", "eval_metrics_every"),
    *(OF_THE_MIXTURE := ("mixture", "task", "aqua_train_examples", "aqua_val_examples")),
)

# Parts of SFT's learning rates. At SFT's own, words that the file does not have are taken for other questions; at more
# than this, other tasks are forgotten.
TEACHING_RATES = 1.25
PREFERENCE_RATES = 0.25  # at all of them the wanted form is learned, and what is right forgotten


def part_of_rates(settings: dict[str, Any]) -> float:
    """Of SFT's learning rates, by a run's `source`, `dpo` and `conversations`."""
    if settings.get("source") != "sft":
        return 1.0
    dpo, own = (settings.get(name) not in (None, (), "None") for name in ("dpo", "conversations"))
    return PREFERENCE_RATES if dpo else TEACHING_RATES if own else 1.0


def settled(cfg: ChatSFTConfig, before: dict[str, Any]) -> ChatSFTConfig:
    """The config with the settings of the run that made an SFT model, `before`, wherever it was given none."""
    taken: dict[str, Any] = {}
    names = [name for name in SETTLED if name in before and not (cfg.dpo and name in OF_THE_MIXTURE)]
    for f in dataclasses.fields(cfg):
        if f.name in names and not is_given(cfg, f.name):
            value = before[f.name]
            if value == f.metadata["off"]:
                value = f.default if f.name == "task" else None
            elif f.name == "task":
                value = tuple(value.split(", "))
            if value != f.default:
                taken[f.name] = value
    if taken:
        print0("As in the run before: " + ", ".join(f"--{name}={value}" for name, value in taken.items()))
    result = dataclasses.replace(cfg, **taken)
    factor = part_of_rates(vars(cfg)) / part_of_rates(before)
    if factor != 1 and not is_given(cfg, "init_lr_frac"):
        result = dataclasses.replace(result, init_lr_frac=factor * result.init_lr_frac)
        print0(f"Learning rates of its own: --init_lr_frac={result.init_lr_frac:g}")
    return result


def tags(cfg: ChatSFTConfig) -> tuple[str, str]:
    """(tag to read, tag to write).

    Raises:
        InputError: there is nothing to read, or it would be written over.
    """
    tag = checkpoint.find(cfg.source, cfg.model_tag, cfg.step).parent.name
    if cfg.source != "sft":
        return tag, cfg.save_tag or tag
    suffix = TAUGHT if cfg.dpo is None else PREFERS
    save_tag = cfg.save_tag or tag.removesuffix(suffix) + suffix
    if save_tag == tag:
        raise InputError(f"--model_tag={tag} would be written over; name what comes out, such as --save_tag={tag}-2")
    return tag, save_tag


def open_data(cfg: ChatSFTConfig, default: str) -> tuple[Mixture, Task]:
    """What to train on, conversations or pairs, and what to validate on."""
    if cfg.dpo is not None:
        train, val = Preferences.split(cfg.dpo)
        return Mixture(train, [train, val], {cfg.dpo: f"{len(train):,} pairs, {len(val):,} held out"}, ()), val
    mixture = mixtures.open_mixture(
        "sft",
        default,
        cfg.mixture,
        cfg.task,
        cfg.conversations,
        {"AQUA train": cfg.aqua_train_examples, "AQUA validation": cfg.aqua_val_examples},
        mixtures.Teach(replay=cfg.replay, reword=cfg.reword) if cfg.source == "sft" else None,
    )
    return mixture, mixture.open_validation()


@torch.no_grad()
def loss_sums(model: Any, batches: Iterable[tuple[Tensor, ...]], token_bytes: Tensor) -> Tensor:
    """(4,) fp64 of this rank: nats and number of all supervised tokens; nats and bytes of those that stand for text."""
    sums = torch.zeros(4, dtype=torch.float64)
    for inputs, targets in batches:
        nats = model(inputs, targets, reduction="none").double().cpu()
        targets = targets.view(-1).cpu()
        num_bytes = token_bytes[targets.clamp(min=0)] * (targets != -1)
        sums += torch.stack([nats.sum(), (targets != -1).sum(), nats[num_bytes > 0].sum(), num_bytes.sum()])
    return sums


def build(
    cfg: ChatSFTConfig,
    rt: runtime.Runtime,
    train: Task,
    model: Any,
    tokenizer: Any,
    source: dict[str, Any],
    saved: Checkpoint | None = None,
    preference: dpo.PreferenceLoss | None = None,
) -> Trainer:
    """source: the manifest of the checkpoint that `model` is from. preference: of the pairs in train."""
    total = None if cfg.num_iterations else len(train) * cfg.num_epochs
    steps = cfg.num_iterations or -(-len(train) * cfg.num_epochs // cfg.target_examples_per_step)
    optimizer = make_optimizer(model, cfg, rt)
    meta = resume.stage_facts(cfg, model, tokenizer, fingerprint(train), source["user_config"].get("dataset"))
    if preference is not None:
        meta["start"] = source["files"]["model.safetensors"]["sha256"]
        resume.require_start(meta["start"], saved)
    if cfg.warm_start and saved is None:
        start = checkpoint.load(Path(source["path"]), with_optimizer=True).optimizer
        assert start is not None
        optimizer.load_state_dict(start)
    state, cursor = resume.restore(saved, model, optimizer, meta, cfg.accept_changes)
    directory = checkpoint.tag_directory("sft", source["tag"])
    examples, rows, T = cfg.target_examples_per_step, cfg.device_batch_size, model.config.sequence_len
    loader_of = ConversationSteps if preference is None else dpo.PairSteps
    loader = loader_of(train, tokenizer, examples, rows, T, rt, cursor, total)

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
        grad_accum_steps=None,
        num_iterations=steps,
        flops_per_token=model.config.shape.flops_per_token,
        guard_sigma=cfg.guard_sigma,
        loss=preference,
        state=state,
    )


@dataclass
class Evaluations:
    """What is measured while it trains; preferred: of the held-out pairs, where it learns preferences."""

    cfg: ChatSFTConfig
    rt: runtime.Runtime
    trainer: Trainer
    tokenizer: Tokenizer
    val: Task
    tasks: Sequence[str]
    preferred: dpo.PreferenceLoss | None
    loss: float | None = None  # the last one

    def validate(self, state: LoopState) -> None:
        figures = self._supervised(state) if self.preferred is None else self._preferences(state, self.preferred)
        self.loss = figures["val_loss"]
        self.trainer.tracker.log(state.step, **figures)

    def _supervised(self, state: LoopState) -> dict[str, float]:
        model, rt = self.trainer.model.eval(), self.rt
        batches = padded(self.val, self.tokenizer, self.cfg.device_batch_size, model.config.sequence_len, rt)
        token_bytes = self.tokenizer.token_bytes().cpu()
        sums = together(lambda: loss_sums(model, itertools.islice(batches, self.cfg.eval_steps), token_bytes))
        sums = sums.to(rt.device) if rt.device.type == "cuda" else sums
        nats, tokens, text_nats, num_bytes = all_reduce(sums).tolist()
        loss, bpb = nats / max(1, tokens), text_nats / math.log(2) / max(1, num_bytes)
        state.record_val_bpb(bpb)
        print0(f"Step {state.step:05d} | Validation loss: {loss:.6f}")
        print0(f"Step {state.step:05d} | Validation bpb: {bpb:.4f}")
        return {"val_loss": loss, "val_bpb": bpb}

    def _preferences(self, state: LoopState, preferred: dpo.PreferenceLoss) -> dict[str, float]:
        figures = preferred.figures(self.val, self.tokenizer, self.cfg.device_batch_size, self.rt)
        state.outcome |= {"Preference accuracy": figures["preference_accuracy"], "Preference margin": figures["margin"]}
        print0(f"Step {state.step:05d} | " + ", ".join(f"{name}: {value:.4f}" for name, value in figures.items()))
        return figures

    def metrics(self, state: LoopState) -> None:
        if state.step == 0:
            return
        for name in self.tasks:
            result = evaluate_task(
                eval_task(name),
                self.trainer.model.eval(),
                self.tokenizer,
                self.rt,
                batch_size=2 * self.cfg.device_batch_size,
                max_problems=self.cfg.eval_metrics_max_problems,
            )
            print0(f"Step {state.step:05d} | {name} accuracy: {result.accuracy:.4f}")
            self.trainer.tracker.log(state.step, **{f"{name}_acc": result.accuracy})


def run(cfg: ChatSFTConfig) -> LoopState:
    rt = runtime.start(cfg.device_type, cfg.seed, cfg.deterministic)
    tag, save_tag = tags(cfg)
    saved = resume.find(rt, checkpoint.tag_directory("sft", save_tag), cfg.resume)
    rt = resume.same_dtype(rt, saved) if cfg.dtype is None else dataclasses.replace(rt, dtype=runtime.DTYPES[cfg.dtype])
    model, tokenizer, meta = checkpoint.load_model(cfg.source, rt, tag, cfg.step)
    meta["tag"] = save_tag
    if cfg.source == "sft":
        cfg = settled(cfg, meta["user_config"])
    name = mixtures.name_for(meta["user_config"].get("dataset"))
    mixture, val = open_data(cfg, name)
    train = mixture.train
    print0(f"Mixture: {mixture.describe()}")
    for own in mixture.own:
        if cut := own.describe_crops(tokenizer, model.config.sequence_len + 1):
            print0(f"warning: {cut}")
    preference, preferred = None, None
    if cfg.dpo is not None:  # before a resumed run's weights take the place of the start model's
        preference, preferred = (
            dpo.compare(model, pairs, tokenizer, cfg.device_batch_size, rt, cfg.dpo_beta) for pairs in (train, val)
        )
    trainer = build(cfg, rt, train, model, tokenizer, meta, saved, preference)
    print0(f"Training rows: {len(train):,}\nNumber of iterations: {trainer.num_iterations:,}")
    evaluations = Evaluations(cfg, rt, trainer, tokenizer, val, mixtures.SFT_METRICS[name], preferred)
    state = trainer.run([(cfg.eval_every, evaluations.validate), (cfg.eval_metrics_every, evaluations.metrics)])
    outcome = {
        "Training rows": len(train),
        "Number of iterations": state.step,
        "Training loss": state.debiased(),
        "Validation loss": evaluations.loss,
    }
    old, new = report_config(cfg)
    old["dtype"] = str(rt.dtype).removeprefix("torch.")
    new["mixture"] = cfg.mixture or name
    extra = {
        **mixture.facts,
        "Validation bpb": state.val_bpb,
        "Total training time": f"{state.train_seconds / 60:.2f}m",
        "MFU %": f"{trainer.mfu:.2f}%",
    }
    get_report().log("Chat SFT", [old, outcome, new, extra, state.outcome, state.history.facts()])
    if save_tag != tag:
        print0(f"Talk to it: python -m scripts.chat_cli -g {save_tag}")
    trainer.tracker.finish()
    runtime.stop()
    return state


def main(argv: Sequence[str] | None = None) -> None:
    run_cli(ChatSFTConfig, run, argv, about=__doc__)


if __name__ == "__main__":
    main()
