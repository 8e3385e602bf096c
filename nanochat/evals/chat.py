"""Chat evaluation: how many problems of a task a chat model solves.

Categorical tasks compare the logits of the answer's letters right after the prompt; generative ones sample
answers and let the task judge them. Neither depends on the batch size or the number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from nanochat.config import InputError
from nanochat.engine import Engine
from nanochat.gpt import GPT
from nanochat.runtime import Runtime, all_reduce, together
from nanochat.tokenizer import Tokenizer

Z95 = 1.959964  # two-sided 95% of the normal distribution
MAX_LETTERS = 32
WHOLE_PROMPT = 1 << 30  # no cut from the right in the renderer: we cut from the left


@dataclass(frozen=True)
class ChatResult:
    """Counts over all ranks."""

    num_passed: int
    total: int
    num_lenient: int | None = None  # passed by the task's kinder rule, where it has one
    majority: float | None = None  # accuracy of always choosing the commonest right letter; letters only
    num_cropped: int = 0  # prompts longer than the context, which lost their beginning

    @property
    def accuracy(self) -> float:
        return self.num_passed / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """95% confidence interval of the accuracy (Wilson 1927), from having drawn only `total` problems."""
        n, p = self.total, self.accuracy
        center = (p + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
        half = Z95 / (1 + Z95**2 / n) * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n * n))
        return max(0.0, center - half), min(1.0, center + half)


@dataclass
class Tally:
    """What one rank counts."""

    passed: int = 0
    lenient: int = 0
    cropped: int = 0
    done: int = 0

    def __post_init__(self) -> None:
        self.gold = [0] * MAX_LETTERS  # how often the right letter stands at each place

    def count_gold(self, conversation: Mapping[str, Any]) -> None:
        if "letters" in conversation:
            self.gold[conversation["letters"].index(_gold(conversation))] += 1


def _gold(conversation: Mapping[str, Any]) -> str:
    """The right letter: apart where the answer reasons first, else the whole answer."""
    return conversation.get("answer_letter") or conversation["messages"][-1]["content"]


def evaluate_task(
    task: Any,
    model: GPT,
    tokenizer: Tokenizer,
    rt: Runtime,
    *,
    batch_size: int = 8,
    num_samples: int = 1,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_k: int | None = 50,
    max_problems: int | None = None,
) -> ChatResult:
    """Solve the first `max_problems` problems of a tasks.common.Task. Call it on all ranks.

    Args:
        batch_size: problems at once, on each rank.
        num_samples: answers to each problem of a generative task; one right answer solves it.
        temperature: 0 = the most likely token, always.

    Raises:
        RankInputError: the task is empty, or a letter of it is no single token.
        RankError: it failed otherwise on some rank. Both on every rank.
    """

    def on_this_rank() -> tuple[int, Tally]:
        total = len(task) if max_problems is None else min(len(task), max_problems)
        if total < 1:
            raise InputError(f"{type(task).__name__} has no problem to evaluate; check max_problems and the data")
        solver: Categorical | Generative
        if task.eval_type == "categorical":
            solver = Categorical(task, model, tokenizer)
        else:
            solver = Generative(task, model, tokenizer, num_samples, max_new_tokens, temperature, top_k)
        return total, _solve_mine(solver, total, batch_size, rt)

    total, tally = together(on_this_rank)
    counts = [tally.passed, tally.lenient, tally.cropped, *tally.gold]
    summed = all_reduce(torch.tensor(counts, dtype=torch.int64, device=rt.device)).tolist()
    passed, lenient, cropped, *gold = summed
    return ChatResult(
        num_passed=passed,
        total=total,
        num_lenient=lenient if task.has_lenient_rule else None,
        majority=max(gold) / total if any(gold) else None,
        num_cropped=cropped,
    )


def _solve_mine(solver: Categorical | Generative, total: int, batch_size: int, rt: Runtime) -> Tally:
    """This rank's part of the first `total` problems."""
    task, tally = solver.task, Tally()
    for batch in _my_batches(total, batch_size, rt, type(task).__name__, tally):
        conversations = [task[i] for i in batch]
        prompts = [_prompt(c, solver.model, solver.tokenizer, tally) for c in conversations]
        for conversation in conversations:
            tally.count_gold(conversation)
        solver.solve(conversations, prompts, tally)
        tally.done += len(batch)
    return tally


def _my_batches(total: int, batch_size: int, rt: Runtime, name: str, tally: Tally) -> Iterator[Sequence[int]]:
    """Batch i goes to rank i mod world size. Rank 0 shows progress: rate, time left, accuracy so far."""
    batches = [range(first, min(first + batch_size, total)) for first in range(0, total, batch_size)]
    mine = batches[rt.rank :: rt.world_size]
    size = sum(map(len, mine))
    with tqdm(total=size, desc=name, unit="problem", mininterval=1.0, disable=not rt.is_master) as bar:
        for batch in mine:
            yield batch
            bar.set_postfix_str(f"{tally.passed}/{tally.done} right", refresh=False)
            bar.update(len(batch))


def _prompt(conversation: Mapping[str, Any], model: GPT, tokenizer: Tokenizer, tally: Tally) -> list[int]:
    """The prompt's ids, at most a context of them: the end of the question matters more than its beginning."""
    ids = tokenizer.render_for_completion(conversation, max_tokens=WHOLE_PROMPT)
    cut = len(ids) - model.config.sequence_len
    if cut <= 0:
        return ids
    tally.cropped += 1
    return [ids[0], *ids[cut + 1 :]]  # BOS stays


class Categorical:
    """Which of the letters is likeliest right after the prompt."""

    def __init__(self, task: Any, model: GPT, tokenizer: Tokenizer) -> None:
        self.task, self.model, self.tokenizer = task, model, tokenizer
        self.letter_ids: dict[str, int] = {}

    def letter_id(self, letter: str) -> int:
        if letter not in self.letter_ids:
            ids = self.tokenizer.encode(letter)
            if len(ids) != 1:
                raise InputError(
                    f"the letter {letter!r} is {len(ids)} tokens in this tokenizer; a categorical task needs one"
                )
            self.letter_ids[letter] = ids[0]
        return self.letter_ids[letter]

    @torch.no_grad()
    def solve(self, conversations: Sequence[Mapping[str, Any]], prompts: Sequence[list[int]], tally: Tally) -> None:
        lengths = torch.tensor([len(p) for p in prompts], device=self.model.device)
        T, pad = int(lengths.max()), self.tokenizer.get_bos_token_id()
        rows = [p + [pad] * (T - len(p)) for p in prompts]  # at the end, where causal attention ignores it
        x = self.model.features(torch.tensor(rows, device=self.model.device))  # (B, T, C)
        last = x[torch.arange(len(rows), device=x.device), lengths - 1]  # (B, C)
        logits = self.model.logits(last).cpu()  # (B, V): only where an answer is read, not (B, T, V)
        for conversation, row in zip(conversations, logits, strict=True):
            letters = conversation["letters"]
            scores = row[[self.letter_id(letter) for letter in letters]]
            tally.passed += self.task.evaluate(conversation, letters[int(scores.argmax())])


class Generative:
    """Sampled answers; special tokens stay in the text as their names."""

    def __init__(
        self,
        task: Any,
        model: GPT,
        tokenizer: Tokenizer,
        num_samples: int,
        max_new_tokens: int,
        temperature: float,
        top_k: int | None,
    ) -> None:
        self.task, self.model, self.tokenizer, self.num_samples = task, model, tokenizer, num_samples
        self.engine = Engine(model, tokenizer)
        self.sampling: dict[str, Any] = {"max_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k}

    def solve(self, conversations: Sequence[Mapping[str, Any]], prompts: Sequence[list[int]], tally: Tally) -> None:
        rows = [prompt for prompt in prompts for _ in range(self.num_samples)]
        sequences, _, _ = self.engine.generate_many(rows, **self.sampling)
        answers = [self.tokenizer.decode(s[len(p) :]) for s, p in zip(sequences, rows, strict=True)]
        for i, conversation in enumerate(conversations):
            mine = answers[i * self.num_samples : (i + 1) * self.num_samples]
            tally.passed += any(self.task.evaluate(conversation, answer) for answer in mine)
            if self.task.has_lenient_rule:
                tally.lenient += any(self.task.evaluate_lenient(conversation, answer) for answer in mine)


def chat_core(accuracies: Mapping[str, float], baselines: Mapping[str, float]) -> float:
    """Mean over tasks of (accuracy - b) / (1 - b), b = the accuracy of guessing (0 where none is listed):
    0 = guessing everywhere, 1 = all right.

    Raises:
        ValueError: there is no task to average over.
    """
    if not accuracies:
        raise ValueError("no task to average over")
    guess = {name: baselines.get(name, 0.0) for name in accuracies}
    return sum((a - guess[name]) / (1 - guess[name]) for name, a in accuracies.items()) / len(accuracies)
