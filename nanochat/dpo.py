"""Direct preference optimization: the better of two answers becomes likelier than the other, compared with the start.

# P pairs, N of all of them; in the rows of a batch each chosen answer stands before its rejected one
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from nanochat.data.conversations import ConversationSteps, Rendered
from nanochat.gpt import GPT
from nanochat.policy_gradient import Logprobs, logprobs
from nanochat.ranks import together
from nanochat.runtime import Runtime, all_reduce
from nanochat.tokenizer import Tokenizer

PAIRS_AT_ONCE = 256  # that are sorted by length before they are cut into batches


class PairSteps(ConversationSteps):
    """Steps of pairs {"chosen": conversation, "rejected": conversation}; a batch is (inputs, targets, numbers), the
    last (P,) int64, which pair it is; -1 stands for none."""

    def rows(self, number: int) -> list[Rendered]:
        pair = self.conversations[number]
        return [self.render(pair[side]) for side in ("chosen", "rejected")]

    def nothing(self) -> list[Rendered]:
        return [*super().nothing(), *super().nothing()]

    def batch(self, examples: Sequence[tuple[int, list[Rendered]]]) -> tuple[Tensor, ...]:
        return *super().batch(examples), torch.tensor([n for n, _ in examples], device=self.rt.device)


def pair_logprobs(model: Logprobs, inputs: Tensor, targets: Tensor) -> Tensor:
    """(P, 2) log-probabilities of the chosen and the rejected answers: sums over their supervised tokens. What the two
    share cancels in their difference."""
    return logprobs(model, inputs, targets).sum(dim=1).view(-1, 2)


@torch.no_grad()
def all_logprobs(model: GPT, pairs: Any, tokenizer: Tokenizer, batch_size: int, rt: Runtime) -> Tensor:
    """(N, 2) of all pairs, on every rank, each having computed a share."""
    model.eval()
    T, total = model.config.sequence_len, len(pairs)

    def share() -> Tensor:
        found = torch.zeros(total + 1, 2, device=rt.device)  # the last for number -1
        steps = PairSteps(pairs, tokenizer, PAIRS_AT_ONCE, batch_size, T, rt, total=total)
        for inputs, targets, numbers in itertools.chain.from_iterable(steps):
            found[numbers] = pair_logprobs(model, inputs, targets)
        return found[:-1].contiguous()

    return all_reduce(together(share))


def margins(logp: Tensor, start: Tensor, beta: float) -> Tensor:
    """(P,) by how much the chosen answer's reward is above the other's; a reward is beta log(pi(y|x) / pi_start(y|x))
    (Rafailov et al. 2023, arXiv 2305.18290, eq. 5)."""
    chosen, rejected = (logp - start).unbind(dim=1)
    return beta * (chosen - rejected)


@dataclass(frozen=True)
class PreferenceLoss:
    """What `trainer.accumulate` takes for a model: -log sigmoid(margin), summed over pairs (the same paper, eq. 7)."""

    model: GPT
    start: Tensor  # (N, 2) log-probabilities under the start model
    beta: float

    def __call__(self, inputs: Tensor, targets: Tensor, numbers: Tensor, reduction: str = "sum") -> Tensor:
        assert reduction == "sum"
        gaps = margins(pair_logprobs(self.model, inputs, targets), self.start[numbers], self.beta)
        return -(logsigmoid(gaps) * (numbers >= 0)).sum()

    @staticmethod
    def count(batch: tuple[Tensor, ...]) -> Tensor:
        """() pairs of a batch, for the mean."""
        return (batch[2] >= 0).sum()

    def figures(self, pairs: Any, tokenizer: Tokenizer, batch_size: int, rt: Runtime) -> dict[str, float]:
        """Means over all pairs, the same whose `start` this is. Accuracy: the share whose chosen answer has the higher
        reward; equal ones, as all are at the start, count half."""
        gaps = margins(all_logprobs(self.model, pairs, tokenizer, batch_size, rt), self.start, self.beta)
        accuracy = (gaps > 0).double() + (gaps == 0).double() / 2
        means = {"val_loss": -logsigmoid(gaps), "preference_accuracy": accuracy, "margin": gaps}
        return {name: float(values.mean()) for name, values in means.items()}


def compare(model: GPT, pairs: Any, tokenizer: Tokenizer, batch_size: int, rt: Runtime, beta: float) -> PreferenceLoss:
    """The loss of these pairs, with the model as it is now for the start: it is not kept, only what it says of them."""
    return PreferenceLoss(model, all_logprobs(model, pairs, tokenizer, batch_size, rt), beta)
