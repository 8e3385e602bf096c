"""Reinforcement learning on a task with a reward: group-relative policy gradients on fresh rollouts.

    python -m scripts.chat_rl --task=GSM8K
    python -m scripts.chat_rl --conversations=mine.jsonl --reward=mine.py:reward     # your own prompts and reward
    torchrun --standalone --nproc_per_node=8 -m scripts.chat_rl -- --task=GSM8K

Each step samples num_samples answers to each of examples_per_step prompts and makes those likelier that did better than
their group, the loss averaged over tokens. nanochat/policy_gradient.py has the equations. Reads
chatsft_checkpoints/<tag>/; writes chatrl_checkpoints/<tag>/, and the page of sampled answers report/rollouts.md.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nanochat import checkpoint, resume, runtime
from nanochat.checkpoint import Checkpoint
from nanochat.config import InputError, flag, report_config, run_cli
from nanochat.environment import base_dir
from nanochat.gpt import GPT
from nanochat.policy_gradient import BASELINES
from nanochat.report import ROLLOUTS, get_report
from nanochat.resume import LoopState
from nanochat.rl import RLSettings, RLTrainer
from nanochat.rollouts import Sampling
from nanochat.saver import Saver
from nanochat.tracking import DUMMY, Tracker
from nanochat.trainer import make_optimizer, train_loop
from tasks.common import fingerprint
from tasks.own_reward import choose_tasks

DEFAULT_TASK = "GSM8K"


@dataclass(frozen=True)
class ChatRLConfig:
    run: str = flag(DUMMY, "wandb run name; dummy = no wandb")
    source: str = flag("sft", "stage to start from", choices=("sft", "mid", "rl"))
    dtype: str | None = flag(None, "compute dtype; None = the device's", off="None", choices=tuple(runtime.DTYPES))
    device_batch_size: int = flag(8, "answers a forward pass and rank")
    examples_per_step: int = flag(16, "prompts per optimizer step over all ranks")
    num_samples: int = flag(16, "answers sampled to each prompt")
    max_new_tokens: int = flag(256, "longest answer")
    temperature: float = flag(1.0, "of sampling")
    top_k: int | None = flag(50, "sample among the k likeliest tokens; 0 = all", off=0)
    unembedding_lr: float = flag(0.004, "AdamW learning rate of the output head, at width 768")
    embedding_lr: float = flag(0.2, "AdamW learning rate of the token embedding, at width 768")
    matrix_lr: float = flag(0.02, "Muon learning rate of the matrices")
    weight_decay: float = flag(0.0, "of AdamW")
    init_lr_frac: float = flag(0.05, "all learning rates start at this part of theirs, and fall to 0")
    num_epochs: int = flag(1, "passes over the task's training examples")
    save_every: int | None = flag(60, "steps between checkpoints; -1 = only the last", off=-1)
    eval_every: int | None = flag(60, "steps between evaluations; -1 = never", off=-1)
    eval_examples: int = flag(400, "held-out examples of an evaluation")
    task: str | None = flag(None, f"what to learn: a task with a reward; None = {DEFAULT_TASK}", off="None", new=True)
    conversations: str | None = flag(None, "prompts of your own, a .jsonl file; the last tenth is held out", new=True)
    reward: str | None = flag(None, "reward of your own, FILE.py:function of (conversation, answer)", new=True)
    advantage: str = flag("mean", "what a reward is compared with in its group", choices=BASELINES, new=True)
    kl: float = flag(0.0, "weight of the KL to the start model, which is then kept in memory; 0 = none", new=True)
    updates_per_batch: int = flag(1, "optimizer steps on each batch of rollouts", new=True)
    clip: float = flag(0.2, "how far a token's probability may move in them, as a share", new=True)
    num_iterations: int | None = flag(None, "optimizer steps; -1 = num_epochs", off=-1, new=True)
    model_tag: str | None = flag(None, "checkpoint tag; None = the deepest, d4 before d4-own", off="None", new=True)
    model_step: int | None = flag(None, "checkpoint step; None = the last", off="None", new=True)
    device_type: str | None = flag(None, "cuda, mps or cpu; empty = the best there is", off="", new=True)
    keep_last: int | None = flag(2, "how many checkpoints to keep; -1 = all", off=-1, new=True)
    resume: str = flag("none", "go on from a checkpoint: none, auto or a step", new=True)
    accept_changes: bool = flag(False, "resume although tokenizer or data changed", new=True)
    seed: int = flag(42, "of the rollouts", new=True)
    deterministic: bool = flag(False, "the same result to the bit, also where that is slower (GPU)", new=True)

    def __post_init__(self) -> None:
        for name in (
            "device_batch_size",
            "examples_per_step",
            "max_new_tokens",
            "num_epochs",
            "eval_examples",
            "updates_per_batch",
        ):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)} must be at least 1")
        if self.num_samples < 2:
            raise InputError(f"--num_samples {self.num_samples} must be at least 2: an advantage needs a group")
        if self.temperature <= 0:
            raise InputError(f"--temperature {self.temperature} must be above 0: equal answers teach nothing")
        if not 0 < self.clip < 1:
            raise InputError(f"--clip {self.clip} must lie between 0 and 1; 0.2 is usual")
        if self.kl < 0:
            raise InputError(f"--kl {self.kl} must be at least 0; 0 = no KL term")
        if self.kl and self.source == "rl":  # they move to previous/, and a resumed run would not find its start
            raise InputError("--kl needs a start model that stays: a run from --source=rl sets those checkpoints aside")
        if self.conversations is not None and self.reward is None:
            raise InputError("--conversations has prompts without a reward; add --reward=FILE.py:function")
        if self.conversations is not None and self.task is not None:
            raise InputError(f"--task {self.task} and --conversations are two sets of prompts; give one")

    @property
    def task_name(self) -> str:
        return self.conversations or self.task or DEFAULT_TASK


def num_iterations(cfg: ChatRLConfig, num_examples: int) -> int:
    steps = cfg.num_iterations or (num_examples // cfg.examples_per_step) * cfg.num_epochs
    if steps < 1:
        raise InputError(
            f"--examples_per_step {cfg.examples_per_step} is more than the {num_examples} examples of {cfg.task_name}"
        )
    return steps


def start_model(model: GPT, digest: str, saved: Checkpoint | None) -> GPT:
    """A frozen copy of the model that the run began with.

    Args:
        model: as the stage before left it, with the hash of its weights' file.

    Raises:
        InputError: it is another one than the resumed run began with.
    """
    resume.require_start(digest, saved)
    return copy.deepcopy(model).eval().requires_grad_(False)


def build(cfg: ChatRLConfig, rt: runtime.Runtime, saved: Checkpoint | None) -> tuple[RLTrainer, LoopState]:
    if cfg.examples_per_step % rt.world_size:
        near = -(-cfg.examples_per_step // rt.world_size) * rt.world_size
        raise InputError(
            f"--examples_per_step {cfg.examples_per_step} is no multiple of the {rt.world_size} ranks; try {near}"
        )
    model, tokenizer, source = checkpoint.load_model(cfg.source, rt, cfg.model_tag, cfg.model_step)
    digest = source["files"]["model.safetensors"]["sha256"]
    start = start_model(model, digest, saved) if cfg.kl else None
    train_task, val_task, reward_digest = choose_tasks(cfg.task or DEFAULT_TASK, cfg.conversations, cfg.reward)
    optimizer = make_optimizer(model, cfg, rt)
    meta: dict[str, Any] = {
        **resume.stage_facts(
            cfg, model, tokenizer, fingerprint(train_task) + reward_digest, source["user_config"].get("dataset")
        ),
        "start": digest,
    }
    state, _ = resume.restore(saved, model, optimizer, meta, cfg.accept_changes)
    directory = checkpoint.tag_directory("rl", source["tag"])
    trainer = RLTrainer(
        rt=rt,
        settings=RLSettings(
            num_iterations=num_iterations(cfg, len(train_task)),
            examples_per_step=cfg.examples_per_step,
            num_samples=cfg.num_samples,
            batch_size=cfg.device_batch_size,
            sampling=Sampling(cfg.max_new_tokens, cfg.temperature, cfg.top_k),
            eval_examples=cfg.eval_examples,
            seed=cfg.seed,
            baseline=cfg.advantage,
            updates=cfg.updates_per_batch,
            clip=cfg.clip,
            kl=cfg.kl,
        ),
        model=model,
        tokenizer=tokenizer,
        start=start,
        optimizer=optimizer,
        task_name=cfg.task_name,
        train_task=train_task,
        val_task=val_task,
        tracker=Tracker("rl", cfg.run, rt, meta["user_config"]),
        saver=Saver(rt, directory, model, optimizer, meta, state, cfg.save_every, cfg.keep_last),
        page=base_dir() / "report" / ROLLOUTS,
    )
    return trainer, state


def run(cfg: ChatRLConfig) -> LoopState:
    rt = runtime.start(cfg.device_type, cfg.seed, cfg.deterministic)
    directory = checkpoint.tag_directory("rl", checkpoint.find(cfg.source, cfg.model_tag, cfg.model_step).parent.name)
    saved = resume.find(rt, directory, cfg.resume)
    rt = resume.same_dtype(rt, saved) if cfg.dtype is None else dataclasses.replace(rt, dtype=runtime.DTYPES[cfg.dtype])
    trainer, state = build(cfg, rt, saved)
    steps = trainer.settings.num_iterations
    evals = [(cfg.eval_every, trainer.evaluate)]
    state = train_loop(state, trainer.step, lambda s: s.step >= steps, evals, trainer.saver, rt=rt)
    outcome = {
        "Number of iterations": state.step,
        "DDP world size": rt.world_size,
        **state.outcome,
        **state.history.facts(),
        "Total training time": f"{state.train_seconds / 60:.2f}m",
    }
    old, new = report_config(cfg)
    old["dtype"] = str(rt.dtype).removeprefix("torch.")
    new["task"] = cfg.task_name
    page = None if cfg.eval_every is None else f"\n[Sampled rollouts]({ROLLOUTS}), best and worst\n"
    get_report().log("Chat RL", [old, new, outcome, page])
    trainer.tracker.finish()
    runtime.stop()
    return state


def main(argv: Sequence[str] | None = None) -> None:
    run_cli(ChatRLConfig, run, argv, about=__doc__)


if __name__ == "__main__":
    main()
