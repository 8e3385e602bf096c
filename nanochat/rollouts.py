"""Rollouts: answers that a model samples to prompts, what a reward says of them, and how they look as a whole."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from nanochat.chat import Conversation
from nanochat.engine import Engine
from nanochat.runtime import all_reduce

FAULT_CHARS = 200  # of an error that a reward raised


class RewardTask(Protocol):
    """Prompts with a reward: a tasks.common.Task."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...

    def reward(self, conversation: Any, response: str) -> float: ...

    def parsed(self, response: str) -> bool | None: ...


@dataclass(frozen=True)
class Sampling:
    max_new_tokens: int
    temperature: float
    top_k: int | None


@dataclass
class Rollouts:
    """num_samples answers to each of some prompts; rows are grouped by prompt."""

    indices: list[int]  # of the prompts in their task
    conversations: list[Conversation]
    prompt_lengths: list[int]  # one a prompt, in tokens
    sequences: list[list[int]]  # one a row: prompt and answer, with the token that ended it
    masks: list[list[int]]  # 1 = sampled by the model
    stopped: list[bool]  # it ended by itself, not for want of room
    answers: list[str]  # as the reward saw them: special tokens by name
    parsed: list[bool | None]
    rewards: Tensor  # (prompts, num_samples) fp64; NaN where the reward failed
    faults: list[str]  # an example's number and why it has no reward, once an example

    @property
    def num_samples(self) -> int:
        return self.rewards.size(1)

    def is_known(self) -> Tensor:
        """(prompts,) whether all answers of a group have a reward."""
        return self.rewards.isfinite().all(dim=1)

    def answer_ids(self, row: int) -> list[int]:
        return self.sequences[row][self.prompt_lengths[row // self.num_samples] :]


def score(task: RewardTask, conversation: Conversation, answer: str) -> tuple[float, str | None]:
    """(reward, None), or (NaN, why there is none). A reward may be anybody's function, so nothing of it is trusted."""
    try:
        value = task.reward(conversation, answer)
    except Exception as error:
        return math.nan, " ".join(f"{type(error).__name__}: {error}".split())[:FAULT_CHARS]
    if not isinstance(value, numbers.Real):
        return math.nan, f"the reward is a {type(value).__name__}, not a number"
    if not math.isfinite(value):
        return math.nan, f"the reward is {value}"
    return float(value), None


@torch.no_grad()
def roll_out(
    engine: Engine, task: RewardTask, indices: Sequence[int], num_samples: int, sampling: Sampling, seed: int
) -> Rollouts:
    """Sample num_samples answers to each of the task's examples, all in one batch, and score them."""
    conversations = [task[i] for i in indices]
    longest = engine.model.config.sequence_len
    prompts = [engine.tokenizer.render_for_completion(c, max_tokens=longest) for c in conversations]
    sequences, masks, ends = engine.generate_many(
        [prompt for prompt in prompts for _ in range(num_samples)],
        max_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        seed=seed,
    )
    rewards = torch.full((len(prompts), num_samples), math.nan, dtype=torch.float64)
    answers: list[str] = []
    faults: dict[int, str] = {}
    for row, (ids, mask, end) in enumerate(zip(sequences, masks, ends, strict=True)):
        group, sample = divmod(row, num_samples)
        answers.append(engine.tokenizer.decode(ids[len(prompts[group]) :]))
        rewards[group, sample], fault = score(task, conversations[group], answers[-1])
        if fault is not None:
            faults.setdefault(indices[group], fault)
        if end is not None:  # it was sampled too: stopping in time is part of what is learnt
            ids.append(end)
            mask.append(1)
    return Rollouts(
        indices=list(indices),
        conversations=conversations,
        prompt_lengths=[len(prompt) for prompt in prompts],
        sequences=sequences,
        masks=masks,
        stopped=[end is not None for end in ends],
        answers=answers,
        parsed=[task.parsed(answer) for answer in answers],
        rewards=rewards,
        faults=[f"example {index}: {fault}" for index, fault in faults.items()],
    )


def figures(rollouts: Rollouts, python_start: int, device: Any = "cpu") -> dict[str, float]:
    """Means over the rollouts of all ranks: reward (of the groups whose rewards are all known), lengths in tokens, the
    shares of answers that stopped by themselves, called a tool, and could be parsed. Left out: what has no value."""
    rows = range(len(rollouts.sequences))
    values: dict[str, Sequence[float]] = {
        "reward": rollouts.rewards[rollouts.is_known()].flatten().tolist(),
        "sequence_length": [len(ids) for ids in rollouts.sequences],
        "answer_length": [len(rollouts.answer_ids(row)) for row in rows],
        "stopped": rollouts.stopped,
        "tool_call": [python_start in rollouts.answer_ids(row) for row in rows],
        "parsed": [p for p in rollouts.parsed if p is not None],
    }
    sums = torch.tensor([[float(sum(v)), len(v)] for v in values.values()], device=device)
    return {
        name: total / count for name, (total, count) in zip(values, all_reduce(sums).tolist(), strict=True) if count
    }
