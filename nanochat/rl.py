"""A step and an evaluation of reinforcement learning: rollouts, rewards, updates, and what is said of them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from nanochat import rollout_page
from nanochat.config import InputError
from nanochat.engine import Engine
from nanochat.environment import print0
from nanochat.evals.stats import pass_at_k
from nanochat.gpt import GPT
from nanochat.optim import MuonAdamW
from nanochat.policy_gradient import Batch, PolicyLoss, advantages, batches, divergence, is_equal, logprobs
from nanochat.ranks import gather, together
from nanochat.resume import LoopState
from nanochat.rollouts import RewardTask, Rollouts, Sampling, figures, roll_out
from nanochat.runtime import Runtime, all_reduce, memory_advice
from nanochat.saver import Saver
from nanochat.tokenizer import Tokenizer
from nanochat.tracking import Tracker
from nanochat.trainer import accumulate, optimizer_step

MUON_MOMENTUM = 0.95  # constant: the run is too short for a warm-up to matter
EQUAL_GROUPS = "Groups with equal rewards, skipped"
LOST_GROUPS = "Groups left out, their reward failed"
IDLE_STEPS = "Steps without an update, no group had differing rewards"
FAULTS = "Rewards that failed"
FAULTS_SHOWN = 3
# What the report says of the last step's answers.
REPORTED = {
    "answer_length": "Mean answer length, tokens",
    "stopped": "Share of answers that stopped by themselves",
    "tool_call": "Share of answers with a tool call",
    "parsed": "Share of answers that could be parsed",
    "kl": "KL to the start model, nats per token",
}


@dataclass(frozen=True)
class RLSettings:
    """How a run learns. Counts of prompts are over all ranks."""

    num_iterations: int
    examples_per_step: int
    num_samples: int
    batch_size: int  # rows a forward pass and rank; also the answers to each prompt of an evaluation
    sampling: Sampling
    eval_examples: int
    seed: int
    baseline: str = "mean"
    updates: int = 1  # optimizer steps per batch of rollouts
    clip: float = 0.2
    kl: float = 0.0


def step_seed(seed: int, step: int, rank: int) -> int:
    """Another seed for each step and rank, the same on every machine (no Python hash)."""
    return (seed * 1_000_003 + step * 1_009 + rank) % (2**31)


def _add(state: LoopState, line: str, count: int) -> None:
    state.outcome[line] = state.outcome.get(line, 0) + count


@dataclass
class RLTrainer:
    """What a step, a checkpoint and an evaluation need. `start`: the frozen start model, where there is a KL term."""

    rt: Runtime
    settings: RLSettings
    model: GPT
    tokenizer: Tokenizer
    start: GPT | None
    optimizer: MuonAdamW
    task_name: str
    train_task: RewardTask
    val_task: RewardTask
    tracker: Tracker
    saver: Saver
    page: Path

    def __post_init__(self) -> None:
        self.engine = Engine(self.model, self.tokenizer)
        self.pad = self.tokenizer.encode_special("<|assistant_end|>")
        self.tool = self.tokenizer.encode_special("<|python_start|>")
        self.loss = PolicyLoss(self.model, self.settings.clip, self.settings.kl)

    def step(self, state: LoopState) -> None:
        """One batch of rollouts, and the updates on it."""
        s, rt = self.settings, self.rt
        t0 = time.perf_counter()
        per_rank = s.examples_per_step // rt.world_size
        first = state.step * s.examples_per_step + rt.rank * per_rank
        indices = [i % len(self.train_task) for i in range(first, first + per_rank)]
        rollouts = self._roll_out(self.train_task, indices, s.num_samples, step_seed(s.seed, state.step, rt.rank))
        equal = self._count_groups(rollouts, state)
        lrm = 1 - state.step / s.num_iterations
        self.optimizer.set_lr(lrm, MUON_MOMENTUM)
        self.model.train()
        with memory_advice(s.batch_size):
            kl = self._learn(rollouts, state)
        dt = time.perf_counter() - t0
        state.train_seconds += dt
        means = {**figures(rollouts, self.tool, rt.device), "equal_groups": equal / s.examples_per_step}
        self._log(state, means if kl is None else {**means, "kl": kl}, lrm, dt)

    def _roll_out(self, task: RewardTask, indices: list[int], num_samples: int, seed: int) -> Rollouts:
        self.model.eval()
        return roll_out(self.engine, task, indices, num_samples, self.settings.sampling, seed)

    def _learn(self, rollouts: Rollouts, state: LoopState) -> float | None:
        """Returns the KL to the start model before the updates, in nats per sampled token, where it is wanted."""
        s, rt = self.settings, self.rt
        micro = batches(rollouts, s.baseline, s.batch_size, self.pad, rt.device)
        if not all_reduce(torch.tensor([len(micro)], device=rt.device)):  # momentum alone would move the weights
            _add(state, IDLE_STEPS, 1)
            return None
        if s.updates > 1 or self.start is not None:
            micro = [self._with_logprobs(batch) for batch in micro]
        for _ in range(s.updates):
            loss = accumulate(self.loss, micro, rt.world_size, rt.device, PolicyLoss.count)
            # rewards make the loss jump about 0: only what is not finite is skipped
            optimizer_step(self.optimizer, loss, state, grad_clip=None, sigma=None)(self.saver)
        return None if self.start is None else self._mean_divergence(micro)

    @torch.no_grad()
    def _with_logprobs(self, batch: Batch) -> Batch:
        start = None if self.start is None else logprobs(self.start, batch.inputs, batch.targets)
        return batch._replace(old=logprobs(self.model, batch.inputs, batch.targets), start=start)

    def _mean_divergence(self, micro: list[Batch]) -> float:
        sums = torch.zeros(2, device=self.rt.device)
        for batch in micro:
            assert batch.old is not None and batch.start is not None
            total = (batch.counts * divergence(batch.old, batch.start)).sum()
            sums += torch.stack([total, batch.counts.sum()])
        total, count = all_reduce(sums).tolist()
        return total / count

    def _count_groups(self, rollouts: Rollouts, state: LoopState) -> int:
        """Counts the groups that teach nothing, and names the examples whose reward failed.

        Returns:
            How many groups of all ranks have equal rewards.

        Raises:
            InputError: none has a reward.
        """
        known = rollouts.is_known()
        counts = [(known & is_equal(rollouts.rewards)).sum(), (~known).sum()]
        equal, lost = map(int, all_reduce(torch.tensor(counts, device=self.rt.device)))
        _add(state, EQUAL_GROUPS, equal)
        if lost:
            _add(state, LOST_GROUPS, lost)
            self._tell_faults(rollouts, state, lost)
        if lost == self.settings.examples_per_step:
            self.saver.save(state, None)
            self.saver.wait()
            raise InputError(
                f"step {state.step + 1}: the reward failed for every prompt ({state.outcome[FAULTS]}); mend it; "
                f"{self.saver.good()}"
            )
        return equal

    def _tell_faults(self, rollouts: Rollouts, state: LoopState, lost: int) -> None:
        faults = gather(rollouts.faults)
        more = f" and {len(faults) - FAULTS_SHOWN} more" if len(faults) > FAULTS_SHOWN else ""
        text = "; ".join(f"{self.task_name} {fault}" for fault in faults[:FAULTS_SHOWN]) + more
        print0(f"warning: {lost} groups are left out, their reward failed: {text}")
        state.outcome[FAULTS] = text

    def _log(self, state: LoopState, means: dict[str, float], lrm: float, dt: float) -> None:
        done, total = state.step + 1, self.settings.num_iterations
        state.outcome |= {f"{text} (last step)": means[name] for name, text in REPORTED.items() if name in means}
        shown = [f"{name.replace('_', ' ')}: {value:.4g}" for name, value in means.items()]
        print0(
            f"step {done:05d}/{total:05d} | {' | '.join(shown)} | lrm: {lrm:.2f} | dt: {dt:.2f}s"
            f" | eta: {dt * (total - done) / 60:.1f}m"
        )
        self.tracker.log(done, lrm=lrm, **means)

    def evaluate(self, state: LoopState) -> None:
        """pass@k (a reward above 0 passes) and the mean reward over the first held-out examples."""
        s, rt = self.settings, self.rt
        mine = list(range(rt.rank, min(s.eval_examples, len(self.val_task)), rt.world_size))
        seed = step_seed(s.seed, -1, rt.rank)
        rollouts = together(lambda: self._roll_out(self.val_task, mine, s.batch_size, seed))
        ks = [k for k in (1 << i for i in range(32)) if k <= s.batch_size]
        known = rollouts.rewards[rollouts.is_known()]  # (prompts, batch_size)
        scores = [[pass_at_k(s.batch_size, int((row > 0).sum()), k) for k in ks] + [float(row.mean())] for row in known]
        sums = torch.tensor([sum(column) for column in zip(*scores, strict=True)] or [0.0] * (len(ks) + 1))
        counts = torch.tensor([len(known), len(mine) - len(known)])
        *totals, count, lost = all_reduce(torch.cat([sums, counts]).to(rt.device)).tolist()
        if lost:
            self._tell_faults(rollouts, state, int(lost))
        if not count:
            return
        *passes, reward = (total / count for total in totals)
        named = {f"pass_at_{k}": p for k, p in zip(ks, passes, strict=True)}
        shown = ", ".join(f"Pass@{k}: {p:.4f}" for k, p in zip(ks, passes, strict=True))
        print0(f"Step {state.step:05d} | {shown} | reward: {reward:.4f}")
        self.tracker.log(state.step, val_reward=reward, **named)
        if state.step == 0:
            state.outcome |= {"Pass@1 at step 0": passes[0], "Reward at step 0": reward}
        last = {"Pass@1 at the end": passes[0], f"Pass@{ks[-1]} at the end": passes[-1], "Reward at the end": reward}
        state.outcome |= last
        if rt.is_master:
            values = advantages(rollouts.rewards, s.baseline)
            part = rollout_page.page(rollouts, values, self.tokenizer, state.step)
            rollout_page.write(self.page, part, state.step)
