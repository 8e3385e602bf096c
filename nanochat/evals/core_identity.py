"""CORE one example at a time, by the plain rule: what core_fast.py must agree with, example for example."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from nanochat.evals.bundle import CoreTask
from nanochat.evals.core_rules import (
    Example,
    Item,
    Score,
    fewshot_indices,
    render_prompts,
    right_answer,
    scored_spans,
)


def make_example(task: CoreTask, items: Sequence[Item], index: int, num_examples: int, tokenizer: Any) -> Example:
    """Item `index` of the shuffled items, with its shots, tokenized; not cropped."""
    shots = [items[i] for i in fewshot_indices(index, task.num_fewshot, num_examples, len(items))]
    texts = render_prompts(task, items[index], shots)
    sequences = tokenizer.encode(texts, prepend=tokenizer.get_bos_token_id())
    prompts = scored_spans(task.kind, sequences)
    return Example(task.kind, tuple(prompts), right_answer(task.kind, items[index]))


@torch.inference_mode()
def score_example(model: Any, example: Example, device: torch.device) -> list[Score]:
    """One forward pass over all options, and all logits of it."""
    T = max(len(p.ids) for p in example.prompts)
    bos = int(example.prompts[0].ids[0])
    rows = [[*map(int, p.ids), *[bos] * (T - len(p.ids))] for p in example.prompts]  # padded at the end: causal
    idx = torch.tensor(rows, dtype=torch.long, device=device)  # (B, T)
    logits = model(idx)  # (B, T, V)
    scores = []
    for row, p in enumerate(example.prompts):
        span = logits[row, p.start - 1 : len(p.ids) - 1].float()  # (S, V): position t - 1 predicts token t
        targets = idx[row, p.start : len(p.ids)]  # (S,)
        loss = F.cross_entropy(span, targets)
        is_greedy = bool((span.argmax(-1) == targets).all())
        of_target = span.gather(1, targets[:, None]).squeeze(1)
        of_best_other = span.scatter(1, targets[:, None], -torch.inf).amax(1)
        scores.append(Score(loss.item(), is_greedy, (of_target - of_best_other).min().item()))
    return scores
