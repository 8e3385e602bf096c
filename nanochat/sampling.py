"""Draws the next token of each row of a batch, every row by its own settings.

# B rows, V ids of the tokenizer
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.config import InputError

GREEDY_BELOW = 1e-5  # a smaller temperature would overflow fp32; it means argmax anyway
NUCLEUS = 1024  # the likeliest ids, which hold a nucleus nearly always: sorting 65,536 takes ten times as long


@dataclass(frozen=True)
class Sampling:
    """How a row's tokens are drawn. Filters work in this order: repetition penalty, temperature, top_k, top_p, min_p.

    temperature: 0 = the likeliest token, whatever the seed.
    top_k: among the k likeliest; None or 0 = all.
    top_p: among the fewest likeliest that have this probability together (Holtzman et al. 2020, arXiv 1904.09751).
    min_p: among those at least this times as likely as the likeliest (Nguyen et al. 2024, arXiv 2407.01082).
    repetition_penalty: logits of ids in prompt and answer are divided by it where positive and multiplied by it where
        negative (Keskar et al. 2019, arXiv 1909.05858).
    logprobs: None = none; n = of the chosen token and the n likeliest, before any of the above.

    Raises:
        InputError: a value out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 42
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature must be 0 (greedy) or more, got {self.temperature}")
        if self.top_k is not None and self.top_k < 0:
            raise InputError(f"top_k must be 0 (off) or more, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be above 0 and at most 1 (off), got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise InputError(f"min_p must be from 0 (off) to 1, got {self.min_p}")
        if not 0.1 <= self.repetition_penalty <= 10:  # near 0 it overflows the logits
            raise InputError(f"repetition_penalty must be from 0.1 to 10; 1 is off, got {self.repetition_penalty}")
        if self.logprobs is not None and self.logprobs < 0:
            raise InputError(f"logprobs must be 0 or more, got {self.logprobs}")

    def candidates(self, V: int) -> tuple[int, bool]:
        """Of how many ids the token is drawn, and whether those must be in order, the likeliest first."""
        if self.temperature < GREEDY_BELOW:
            return 1, False
        if self.top_k:
            return min(self.top_k, V), True
        return (min(NUCLEUS, V), True) if self.top_p < 1 else (V, False)


class TokenLogprobs(NamedTuple):
    """Natural logarithms of probabilities, the likeliest first in `top`."""

    logprob: float
    top: list[tuple[int, float]]


def sample(logits: Tensor, settings: Sequence[Sampling], uniforms: Sequence[float]) -> Tensor:
    """Draw one token a row: (B, V) logits -> (B,) int64. A row's token does not depend on the other rows.

    By the inverse of the cumulative distribution, which needs a single random number in [0, 1) a row: noise for each
    of 65,536 logits of 256 rows would cost more than a small model's forward.
    """
    kinds = [s.candidates(logits.size(-1)) for s in settings]
    if len(set(kinds)) == 1:
        return _draw(logits, settings, uniforms, *kinds[0])
    tokens = logits.new_empty(len(kinds), dtype=torch.int64)
    for kind in set(kinds):
        places = [i for i, other in enumerate(kinds) if other == kind]
        rows = torch.tensor(places, device=logits.device)
        tokens[rows] = _draw(logits[rows], [settings[i] for i in places], [uniforms[i] for i in places], *kind)
    return tokens


def _draw(
    logits: Tensor, settings: Sequence[Sampling], uniforms: Sequence[float], width: int, is_sorted: bool
) -> Tensor:
    """Draw one token a row, of `width` candidates in each; see Sampling.candidates()."""
    if width == 1:
        return logits.argmax(dim=-1)
    temperature = _column([s.temperature for s in settings], logits)
    weights = (logits - logits.amax(dim=-1, keepdim=True)).div_(temperature).exp_()  # 1 for the likeliest
    if not is_sorted:
        return _pick(_above_min_p(weights, settings), uniforms)
    if width < weights.size(-1):
        kept, ids = weights.topk(width, dim=-1)
    else:
        kept, ids = weights.sort(dim=-1, descending=True, stable=True)
    cumulative = kept.to(_sum_dtype(kept)).cumsum(dim=-1)
    # A nucleus is a share of what top_k leaves, else of everything.
    everything = weights.sum(dim=-1, keepdim=True, dtype=cumulative.dtype)
    has_top_k = _column([float(bool(s.top_k)) for s in settings], cumulative) > 0
    nucleus = _column([s.top_p for s in settings], cumulative) * torch.where(has_top_k, cumulative[:, -1:], everything)
    kept = kept.masked_fill(F.pad(cumulative[:, :-1], (1, 0)) >= nucleus, 0)
    choice = _pick(_above_min_p(kept, settings), uniforms)
    tokens = ids.gather(-1, choice[:, None])[:, 0]
    if width < weights.size(-1) and not all(s.top_k for s in settings):
        short = ((cumulative[:, -1:] < nucleus) & ~has_top_k)[:, 0].nonzero()[:, 0]
        if places := short.tolist():
            redone = [settings[i] for i in places], [uniforms[i] for i in places]
            tokens[short] = _draw(logits[short], *redone, logits.size(-1), True)
    return tokens


def _above_min_p(weights: Tensor, settings: Sequence[Sampling]) -> Tensor:
    if not any(s.min_p > 0 for s in settings):
        return weights
    return weights.masked_fill(weights < _column([s.min_p for s in settings], weights), 0)


def _pick(weights: Tensor, uniforms: Sequence[float]) -> Tensor:
    """(B, V) weights -> (B,): the first index whose cumulative weight reaches a share in (0, 1] of the sum.

    Such an index there always is, and never one of weight 0.
    """
    cumulative = weights.to(_sum_dtype(weights)).cumsum(dim=-1)
    share = _column([1 - u for u in uniforms], cumulative)
    return torch.searchsorted(cumulative, share * cumulative[:, -1:])[:, 0]


def _sum_dtype(x: Tensor) -> torch.dtype:
    """fp32 sums of 65,536 terms are off by about the weight of a rare token; Apple's GPUs have no fp64."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    """(B, 1)"""
    return torch.tensor(values, dtype=like.dtype).to(like.device)[:, None]


def penalise(logits: Tensor, tokens: Tensor, lengths: Sequence[int], settings: Sequence[Sampling]) -> Tensor:
    """Logits after the repetition penalty.

    Args:
        logits: (B, V).
        tokens: (B, S) ids of each row's prompt and answer; anything behind its length.
    """
    is_held = torch.arange(tokens.size(1)) < torch.tensor(lengths)[:, None]
    ids = torch.where(is_held.to(tokens.device), tokens, tokens[:, :1])  # one id twice does no harm
    seen, penalty = logits.gather(-1, ids), _column([s.repetition_penalty for s in settings], logits)
    return logits.scatter(-1, ids, torch.where(seen > 0, seen / penalty, seen * penalty))


def logprobs(logits: Tensor, tokens: Sequence[int], counts: Sequence[int]) -> list[TokenLogprobs]:
    """Of each row's token, and of its `counts` likeliest: (B, V) logits."""
    values = torch.log_softmax(logits.float(), dim=-1)
    chosen = values.gather(-1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    top, ids = (x.tolist() for x in values.topk(min(max(counts), values.size(-1)), dim=-1))
    return [
        TokenLogprobs(of_token, list(zip(row_ids[:n], row[:n], strict=True)))
        for of_token, row_ids, row, n in zip(chosen, ids, top, counts, strict=True)
    ]
