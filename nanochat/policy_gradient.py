"""Group-relative policy gradients: from rewards to advantages, from rollouts to batches, and the loss of a batch.

# B rows, T positions
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nanochat.rollouts import Rollouts

BASELINES = ("mean", "leave_one_out")
Logprobs = Callable[..., Tensor]  # a model: forward(inputs, targets, reduction="none") gives minus those of the targets


def advantages(rewards: Tensor, baseline: str) -> Tensor:
    """How much better each answer is than its group, (prompts, num_samples) like the rewards.

    mean: A_i = r_i - mean(r) (Shao et al. 2024, arXiv 2402.03300, without the standard deviation: Liu et al. 2025,
    arXiv 2503.20783). leave_one_out: A_i = r_i - mean of the others (Kool et al. 2019; Ahmadian et al. 2024,
    arXiv 2402.14740), which is unbiased and n/(n-1) times the first.
    """
    n = rewards.size(1)
    centered = rewards - rewards.mean(dim=1, keepdim=True)
    return centered * (n / (n - 1)) if baseline == "leave_one_out" else centered


def is_equal(rewards: Tensor) -> Tensor:
    """(prompts,) whether a group's rewards are all the same. By comparing them: their mean may be rounded."""
    return (rewards == rewards[:, :1]).all(dim=1)


class Batch(NamedTuple):
    """Some rows of the rollouts, padded on the right. A row stands for all equal answers to its prompt."""

    inputs: Tensor  # (B, T) int64
    targets: Tensor  # (B, T) int64, -1 where nothing was sampled
    counts: Tensor  # (B, T) fp32, how many answers have the row's target; 0 where nothing was sampled
    advantages: Tensor  # (B, T) fp32, of one of them
    old: Tensor | None = None  # (B, T) log-probabilities of the targets before the first update
    start: Tensor | None = None  # (B, T) those of the start model


def batches(rollouts: Rollouts, baseline: str, batch_size: int, pad: int, device: torch.device) -> list[Batch]:
    """The answers of the groups that teach something: whose rewards are all known, and differ.

    Equal answers to a prompt have one forward pass: a model that is nearly sure of itself gives the same few again and
    again (of 16 about 3 different ones after fine-tuning on tinyworld).
    """
    teaches = rollouts.is_known() & ~is_equal(rollouts.rewards)
    alike: dict[tuple[int, float, tuple[int, ...]], list[int]] = {}
    for row in range(rollouts.rewards.numel()):
        group, sample = divmod(row, rollouts.num_samples)
        if teaches[group]:
            reward = float(rollouts.rewards[group, sample])
            alike.setdefault((group, reward, tuple(rollouts.sequences[row])), []).append(row)
    rows = sorted(alike.values(), key=lambda equal: len(rollouts.sequences[equal[0]]))  # little padding
    values = advantages(rollouts.rewards, baseline).float().flatten()
    return [_batch(rollouts, values, rows[i : i + batch_size], pad, device) for i in range(0, len(rows), batch_size)]


def _batch(rollouts: Rollouts, values: Tensor, rows: Sequence[list[int]], pad: int, device: torch.device) -> Batch:
    first = [equal[0] for equal in rows]
    width = max(len(rollouts.sequences[r]) for r in first)
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, r in enumerate(first):
        ids[i, : len(rollouts.sequences[r])] = torch.tensor(rollouts.sequences[r])
        mask[i, : len(rollouts.masks[r])] = torch.tensor(rollouts.masks[r]) == 1
    inputs, mask = ids[:, :-1], mask[:, 1:]
    targets = ids[:, 1:].masked_fill(~mask, -1)
    counts = torch.tensor([float(len(equal)) for equal in rows])[:, None] * mask
    weights = values[first][:, None] * mask
    return Batch(inputs.to(device), targets.to(device), counts.to(device), weights.to(device))


def logprobs(model: Logprobs, inputs: Tensor, targets: Tensor) -> Tensor:
    """(B, T) log-probabilities of the targets, 0 where there is none."""
    return -model(inputs, targets, reduction="none").view_as(targets)


@dataclass(frozen=True)
class PolicyLoss:
    """What `trainer.accumulate` takes for a model: the summed loss of a batch, to be averaged over all sampled tokens
    of a step (Yu et al. 2025, arXiv 2503.14476).

    With the ratio p = exp(logp - old) of a token's probability now to that before the first update, it is
    -min(p A, clip(p, 1 - clip, 1 + clip) A) (Schulman et al. 2017, arXiv 1707.06347, eq. 7). In the first update p is
    1, and the gradient -A grad(logp). kl adds kl/2 (logp - start)^2, whose gradient is on average that of
    KL(policy || start) in the state of each token; the usual exp(d) - d - 1 has another one's (Tang and Munos 2025,
    arXiv 2506.09477).
    """

    model: Logprobs
    clip: float
    kl: float = 0.0

    def __call__(
        self,
        inputs: Tensor,
        targets: Tensor,
        counts: Tensor,
        advantages: Tensor,
        old: Tensor | None,
        start: Tensor | None,
        reduction: str = "sum",
    ) -> Tensor:
        """Args: a Batch's fields. Returns: ()."""
        assert reduction == "sum"
        logp = logprobs(self.model, inputs, targets)
        ratio = (logp - (logp.detach() if old is None else old)).exp()
        gain = torch.minimum(ratio * advantages, ratio.clamp(1 - self.clip, 1 + self.clip) * advantages)
        loss = -gain if start is None else self.kl * divergence(logp, start) - gain
        return (counts * loss).sum()

    @staticmethod
    def count(batch: tuple[Tensor, ...]) -> Tensor:
        """() sampled tokens of a batch, for the mean."""
        return batch[2].sum()


def divergence(logp: Tensor, start: Tensor) -> Tensor:
    """KL(policy || start) estimated from each sampled token: half the squared log-ratio (Schulman 2020, "k2")."""
    return 0.5 * (logp - start) ** 2
