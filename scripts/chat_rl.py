"""Reinforcement learning on a task with a reward: group-relative policy gradients on fresh rollouts.

    python -m scripts.chat_rl --task=GSM8K
    torchrun --standalone --nproc_per_node=8 -m scripts.chat_rl -- --task=GSM8K

Each step samples num_samples answers to each of examples_per_step prompts. An answer's advantage is its reward minus
its group's mean (Shao et al. 2024, arXiv 2402.03300, without the standard deviation: Liu et al. 2025, arXiv
2503.20783), the loss is averaged over tokens (Yu et al. 2025, arXiv 2503.14476). On-policy, so there is no ratio to
clip and no reference model. Reads chatsft_checkpoints/<tag>/; writes chatrl_checkpoints/<tag>/.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanochat import checkpoint, resume, runtime
from nanochat.checkpoint import Checkpoint
from nanochat.config import InputError, flag, report_config, run_cli
from nanochat.engine import Engine
from nanochat.environment import print0
from nanochat.optim import MuonAdamW, build_optimizer
from nanochat.ranks import together
from nanochat.report import get_report
from nanochat.resume import LoopState
from nanochat.runtime import all_reduce
from nanochat.saver import Saver
from nanochat.tracking import DUMMY, Tracker
from nanochat.trainer import accumulate, muon_dtype, optimizer_step, train_loop
from tasks.common import Task, fingerprint
from tasks.registry import rl_tasks

EQUAL_GROUPS = "Groups with equal rewards, skipped"
MUON_MOMENTUM = 0.95  # constant: the run is too short for a warm-up to matter


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
    task: str = flag("GSM8K", "what to learn: a task with a reward", new=True)
    num_iterations: int | None = flag(None, "optimizer steps; -1 = num_epochs", off=-1, new=True)
    model_tag: str | None = flag(None, "checkpoint tag; None = the deepest model", off="None", new=True)
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
        ):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)} must be at least 1")
        if self.num_samples < 2:
            raise InputError(f"--num_samples {self.num_samples} must be at least 2: an advantage needs a group")
        if self.temperature <= 0:
            raise InputError(f"--temperature {self.temperature} must be above 0: equal answers teach nothing")


@dataclass
class Rollouts:
    """Answers to one rank's prompts of a step, rows grouped by prompt."""

    sequences: list[list[int]]
    masks: list[list[int]]  # 1 = sampled by the model
    rewards: Tensor  # (prompts, num_samples) fp32


@dataclass
class Policy:
    """The model with its tokenizer and engine, and how it samples."""

    cfg: ChatRLConfig
    rt: runtime.Runtime
    model: Any
    tokenizer: Any

    def __post_init__(self) -> None:
        self.engine = Engine(self.model, self.tokenizer)
        self.end = self.tokenizer.encode_special("<|assistant_end|>")

    def roll_out(self, task: Task, indices: Sequence[int], num_samples: int, seed: int) -> Rollouts:
        """Sample num_samples answers to each example and score them."""
        self.model.eval()
        conversations = [task[i] for i in indices]
        prompts = [
            self.tokenizer.render_for_completion(c, max_tokens=self.model.config.sequence_len) for c in conversations
        ]
        rows = [p for p in prompts for _ in range(num_samples)]
        sequences, masks, ends = self.engine.generate_many(
            rows,
            max_tokens=self.cfg.max_new_tokens,
            temperature=self.cfg.temperature,
            top_k=self.cfg.top_k,
            seed=seed,
        )
        rewards = torch.zeros(len(prompts), num_samples)
        for row, (ids, mask, end) in enumerate(zip(sequences, masks, ends, strict=True)):
            group, sample = divmod(row, num_samples)
            answer = self.tokenizer.decode(ids[len(prompts[group]) :])
            rewards[group, sample] = task.reward(conversations[group], answer)
            if end is not None:  # it was sampled too: stopping in time is part of what is learnt
                ids.append(end)
                mask.append(1)
        return Rollouts(sequences, masks, rewards)

    def batches(self, rollouts: Rollouts) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(inputs, targets, advantages) of the answers in groups whose rewards differ; the others teach nothing."""
        advantages = rollouts.rewards - rollouts.rewards.mean(dim=1, keepdim=True)
        num_samples = advantages.size(1)
        rows = [r for r in range(advantages.numel()) if advantages[r // num_samples].any()]
        rows.sort(key=lambda r: len(rollouts.sequences[r]))  # little padding
        size = self.cfg.device_batch_size
        return [self._batch(rollouts, advantages.flatten(), rows[i : i + size]) for i in range(0, len(rows), size)]

    def _batch(self, rollouts: Rollouts, advantages: Tensor, rows: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        width = max(len(rollouts.sequences[r]) for r in rows)
        ids = torch.full((len(rows), width), self.end)
        mask = torch.zeros(len(rows), width, dtype=torch.int64)
        for i, r in enumerate(rows):
            ids[i, : len(rollouts.sequences[r])] = torch.tensor(rollouts.sequences[r])
            mask[i, : len(rollouts.masks[r])] = torch.tensor(rollouts.masks[r])
        targets = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -1)
        weights = advantages[rows][:, None].expand_as(targets)
        device = self.rt.device
        return ids[:, :-1].to(device), targets.to(device), weights.to(device)


def step_seed(seed: int, step: int, rank: int) -> int:
    """Another seed for each step and rank, the same on every machine (no Python hash)."""
    return (seed * 1_000_003 + step * 1_009 + rank) % (2**31)


def pass_at_k(policy: Policy, task: Task, cfg: ChatRLConfig) -> list[float]:
    """Share of held-out examples with a right answer among the first k of device_batch_size samples, for each k."""
    rt, k = policy.rt, cfg.device_batch_size
    n = min(cfg.eval_examples, len(task))
    mine = range(rt.rank, n, rt.world_size)

    def solved() -> Tensor:
        """(k,) of this rank's examples."""
        rewards = (
            policy.roll_out(task, mine, k, step_seed(cfg.seed, -1, rt.rank)).rewards if mine else torch.zeros(0, k)
        )
        return (rewards > 0).cummax(dim=1).values.sum(dim=0).double().to(rt.device)

    return [float(x) / n for x in all_reduce(together(solved))]


@dataclass
class RLTrainer:
    """What a step, a checkpoint and an evaluation need."""

    policy: Policy
    optimizer: MuonAdamW
    train_task: Task
    val_task: Task
    tracker: Tracker
    saver: Saver
    num_iterations: int

    def step(self, state: LoopState) -> None:
        cfg, rt = self.policy.cfg, self.policy.rt
        t0 = time.perf_counter()
        per_rank = cfg.examples_per_step // rt.world_size
        first = state.step * cfg.examples_per_step + rt.rank * per_rank
        indices = [i % len(self.train_task) for i in range(first, first + per_rank)]
        seed = step_seed(cfg.seed, state.step, rt.rank)
        with torch.no_grad():
            rollouts = self.policy.roll_out(self.train_task, indices, cfg.num_samples, seed)
        self.policy.model.train()
        lrm = 1 - state.step / self.num_iterations
        self.optimizer.set_lr(lrm, MUON_MOMENTUM)
        with runtime.memory_advice(cfg.device_batch_size):
            loss = accumulate(self.policy.model, self.policy.batches(rollouts), rt.world_size, rt.device)
        # rewards make the loss jump about 0: only what is not finite is skipped, and a step whose groups all agree
        optimizer_step(self.optimizer, loss, state, grad_clip=None, sigma=None)(self.saver)
        state.train_seconds += time.perf_counter() - t0
        self._log(state, rollouts, lrm, time.perf_counter() - t0)

    def _log(self, state: LoopState, rollouts: Rollouts, lrm: float, dt: float) -> None:
        rewards = rollouts.rewards
        equal = (rewards == rewards[:, :1]).all(dim=1).float().mean()
        length = sum(map(len, rollouts.sequences)) / len(rollouts.sequences)
        means = torch.tensor([rewards.mean(), length, equal], device=self.policy.rt.device)
        reward, length, equal_share = all_reduce(means, "mean").tolist()
        state.outcome[EQUAL_GROUPS] += round(equal_share * self.policy.cfg.examples_per_step)
        done, total = state.step + 1, self.num_iterations
        print0(
            f"step {done:05d}/{total:05d} | reward: {reward:.4f} | sequence length: {length:.1f} | "
            f"equal groups: {equal_share:.2f} | lrm: {lrm:.2f} | dt: {dt:.2f}s | eta: {dt * (total - done) / 60:.1f}m"
        )
        self.tracker.log(done, reward=reward, sequence_length=length, lrm=lrm, equal_groups=equal_share)

    def evaluate(self, state: LoopState) -> None:
        with torch.no_grad():
            passes = pass_at_k(self.policy, self.val_task, self.policy.cfg)
        shown = ", ".join(f"Pass@{k}: {p:.4f}" for k, p in enumerate(passes, 1))
        print0(f"Step {state.step:05d} | {shown}")
        self.tracker.log(state.step, **{"pass_at_1": passes[0], f"pass_at_{len(passes)}": passes[-1]})
        if state.step == 0:
            state.outcome["Pass@1 at step 0"] = passes[0]
        state.outcome["Pass@1 at the end"] = passes[0]
        state.outcome[f"Pass@{len(passes)} at the end"] = passes[-1]


def num_iterations(cfg: ChatRLConfig, num_examples: int) -> int:
    steps = cfg.num_iterations or (num_examples // cfg.examples_per_step) * cfg.num_epochs
    if steps < 1:
        raise InputError(
            f"--examples_per_step {cfg.examples_per_step} is more than the {num_examples} examples of {cfg.task}"
        )
    return steps


def build(cfg: ChatRLConfig, rt: runtime.Runtime, saved: Checkpoint | None) -> tuple[RLTrainer, LoopState]:
    if cfg.examples_per_step % rt.world_size:
        near = -(-cfg.examples_per_step // rt.world_size) * rt.world_size
        raise InputError(
            f"--examples_per_step {cfg.examples_per_step} is no multiple of the {rt.world_size} ranks; try {near}"
        )
    model, tokenizer, source = checkpoint.load_model(cfg.source, rt, cfg.model_tag, cfg.model_step)
    train_task, val_task = rl_tasks(cfg.task)
    steps = num_iterations(cfg, len(train_task))
    optimizer = build_optimizer(
        model,
        unembedding_lr=cfg.unembedding_lr,
        embedding_lr=cfg.embedding_lr,
        matrix_lr=cfg.matrix_lr,
        weight_decay=cfg.weight_decay,
        init_lr_frac=cfg.init_lr_frac,
        muon_dtype=muon_dtype(rt),
    )
    meta = resume.stage_facts(cfg, model, tokenizer, fingerprint(train_task), source["user_config"].get("dataset"))
    state, _ = resume.restore(saved, model, optimizer, meta, cfg.accept_changes)
    state.outcome.setdefault(EQUAL_GROUPS, 0)
    directory = checkpoint.tag_directory("rl", source["tag"])
    trainer = RLTrainer(
        policy=Policy(cfg, rt, model, tokenizer),
        optimizer=optimizer,
        train_task=train_task,
        val_task=val_task,
        tracker=Tracker("rl", cfg.run, rt, meta["user_config"]),
        saver=Saver(rt, directory, model, optimizer, meta, state, cfg.save_every, cfg.keep_last),
        num_iterations=steps,
    )
    return trainer, state


def run(cfg: ChatRLConfig) -> LoopState:
    rt = runtime.start(cfg.device_type, cfg.seed, cfg.deterministic)
    directory = checkpoint.tag_directory("rl", checkpoint.find(cfg.source, cfg.model_tag, cfg.model_step).parent.name)
    saved = resume.find(rt, directory, cfg.resume)
    rt = resume.same_dtype(rt, saved) if cfg.dtype is None else dataclasses.replace(rt, dtype=runtime.DTYPES[cfg.dtype])
    trainer, state = build(cfg, rt, saved)
    evals = [(cfg.eval_every, trainer.evaluate)]
    state = train_loop(state, trainer.step, lambda s: s.step >= trainer.num_iterations, evals, trainer.saver, rt=rt)
    outcome = {
        "Number of iterations": state.step,
        "DDP world size": rt.world_size,
        **state.outcome,
        **state.history.facts(),
        "Total training time": f"{state.train_seconds / 60:.2f}m",
    }
    old, new = report_config(cfg)
    old["dtype"] = str(rt.dtype).removeprefix("torch.")
    get_report().log("Chat RL", [old, new, outcome])
    trainer.tracker.finish()
    runtime.stop()
    return state


def main(argv: Sequence[str] | None = None) -> None:
    run_cli(ChatRLConfig, run, argv, about=__doc__)


if __name__ == "__main__":
    main()
