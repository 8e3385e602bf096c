"""Chat evaluation: how many problems of a task a chat model solves.

Categorical tasks compare the logits of the answer's letters right after the prompt; generative ones sample
answers and let the task judge them. Neither depends on the batch size or the number of ranks.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from nanochat.config import InputError
from nanochat.engine import Engine
from nanochat.evals import records
from nanochat.evals.records import EMPTY, GRADER_ERROR, RIGHT, WRONG, Answer, Record
from nanochat.evals.stats import mean_and_error, pass_at_k, wilson
from nanochat.gpt import GPT
from nanochat.ranks import gather, together
from nanochat.runtime import Runtime
from nanochat.tokenizer import Tokenizer

MOST_JUDGES = 8  # sandboxed programs at once: each may take 256 MiB, and its seconds are of wall clock
WHOLE_PROMPT = 1 << 30  # no cut from the right in the renderer: we cut from the left


@dataclass(frozen=True)
class ChatResult:
    """What the records of all ranks come to. A problem is passed when any of its answers is right."""

    num_passed: int
    total: int
    num_lenient: int | None = None  # passed by the task's kinder rule, where it has one
    majority: float | None = None  # accuracy of always giving the commonest right answer
    commonest: str = ""  # that answer
    random: float | None = None  # accuracy of a random letter; letters only
    num_cropped: int = 0  # prompts longer than the context, which lost their beginning
    right_counts: tuple[int, ...] = ()  # right answers to each problem
    num_samples: int = 1  # answers to each problem
    subjects: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # name -> (passed, problems)
    chosen: Mapping[str, int] = field(default_factory=dict)  # letter, or "none" -> answers that gave it
    # Answers, out of total * num_samples:
    num_grader_errors: int = 0
    num_empty: int = 0
    num_limited: int = 0  # had not ended when their tokens were used up
    num_beyond: int = 0  # longer, with the prompt, than the context of training
    first_error: str | None = None

    @property
    def accuracy(self) -> float:
        return self.num_passed / self.total

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.num_passed, self.total)

    def pass_at(self, k: int) -> tuple[float, float]:
        """(pass@k over all problems, its standard error)."""
        return mean_and_error([pass_at_k(self.num_samples, right, k) for right in self.right_counts])


def summarise(solved: Sequence[Record], total: int, has_lenient_rule: bool) -> ChatResult:
    """
    Args:
        total: problems of all ranks, which is more than those solved when there is no process group to gather from.
    """
    answers = [answer for r in solved for answer in r.answers]
    verdicts = Counter(a.verdict for a in answers)
    passed, asked = Counter(r.subject for r in solved if r.passed), Counter(r.subject for r in solved)
    with_letters = [r for r in solved if r.letters]
    commonest, times = max(Counter(r.gold for r in solved).items(), key=lambda item: item[1], default=("", 0))
    return ChatResult(
        num_passed=sum(r.passed for r in solved),
        total=total,
        num_lenient=sum(r.lenient for r in solved) if has_lenient_rule else None,
        majority=times / total,
        commonest=commonest,
        random=sum(1 / len(r.letters) for r in with_letters) / total if with_letters else None,
        num_cropped=sum(r.cropped for r in solved),
        right_counts=tuple(r.num_right for r in solved),
        num_samples=max((len(r.answers) for r in solved), default=1),
        subjects={name: (passed[name], n) for name, n in sorted((s, n) for s, n in asked.items() if s is not None)},
        chosen=dict(sorted(Counter(a.letter or "none" for r in with_letters for a in r.answers).items())),
        num_grader_errors=verdicts[GRADER_ERROR],
        num_empty=verdicts[EMPTY],
        num_limited=sum(a.hit_limit for a in answers),
        num_beyond=sum(a.beyond_context for a in answers),
        first_error=next((a.error for a in answers if a.error), None),
    )


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
    name: str | None = None,
    record_to: Path | None = None,
) -> ChatResult:
    """Solve the first `max_problems` problems of a tasks.common.Task. Call it on all ranks.

    Args:
        batch_size: problems at once, on each rank.
        num_samples: answers to each problem of a generative task; one right answer solves it.
        temperature: 0 = the most likely token, always.
        name: of the task in its records; None = its class's.
        record_to: a file for every prompt, answer and verdict (records.py), written by rank 0; None = none.

    Raises:
        RankInputError: the task is empty, or a letter of it is no single token.
        RankError: it failed otherwise on some rank. Both on every rank.
    """
    name = name or type(task).__name__

    def on_this_rank() -> tuple[int, list[Record]]:
        total = len(task) if max_problems is None else min(len(task), max_problems)
        if total < 1:
            raise InputError(f"{name} has no problem to evaluate; check max_problems and the data")
        solver: Categorical | Generative
        if task.eval_type == "categorical":
            solver = Categorical(task, model, tokenizer)
        else:
            solver = Generative(task, model, tokenizer, num_samples, max_new_tokens, temperature, top_k)
            if task.waits_to_judge:
                solver.num_judges = min(MOST_JUDGES, max(1, (os.cpu_count() or 1) // rt.local_world_size))
        return total, _solve_mine(solver, name, total, batch_size, rt, with_prompts=record_to is not None)

    total, mine = together(on_this_rank)
    solved = sorted(gather(mine), key=lambda record: record.index)
    if record_to is not None:
        together(lambda: records.write(record_to, solved) if rt.is_master else None)
    return summarise(solved, total, task.has_lenient_rule)


def _solve_mine(
    solver: Categorical | Generative, name: str, total: int, batch_size: int, rt: Runtime, with_prompts: bool
) -> list[Record]:
    """This rank's part of the first `total` problems."""
    task, tokenizer, context = solver.task, solver.tokenizer, solver.model.config.sequence_len
    done: list[Record] = []
    for batch in _my_batches(total, batch_size, rt, name, done):
        conversations = [task[i] for i in batch]
        whole = [tokenizer.render_for_completion(c, max_tokens=WHOLE_PROMPT) for c in conversations]
        prompts = [_crop(ids, context) for ids in whole]
        answers = solver.solve(conversations, prompts)
        for index, conversation, ids, prompt, of_one in zip(batch, conversations, whole, prompts, answers, strict=True):
            done.append(
                Record(
                    task=name,
                    index=index,
                    id=records.problem_id(conversation),
                    passed=any(answer.verdict == RIGHT for answer in of_one),
                    gold=_gold(conversation),
                    answers=of_one,
                    prompt=tokenizer.decode(prompt) if with_prompts else "",
                    num_prompt_tokens=len(prompt),
                    cropped=len(ids) > len(prompt),
                    letters=list(conversation.get("letters", ())),
                    subject=conversation.get("subject"),
                )
            )
    return done


def _my_batches(total: int, batch_size: int, rt: Runtime, name: str, done: list[Record]) -> Iterator[Sequence[int]]:
    """Batch i goes to rank i mod world size. Rank 0 shows progress: rate, time left, accuracy so far."""
    batches = [range(first, min(first + batch_size, total)) for first in range(0, total, batch_size)]
    mine = batches[rt.rank :: rt.world_size]
    size, passed = sum(map(len, mine)), 0
    with tqdm(total=size, desc=name, unit="problem", mininterval=1.0, disable=not rt.is_master) as bar:
        for batch in mine:
            yield batch
            passed += sum(record.passed for record in done[-len(batch) :])
            bar.set_postfix_str(f"{passed}/{len(done)} right", refresh=False)
            bar.update(len(batch))


def _crop(ids: list[int], context: int) -> list[int]:
    """At most a context of ids: the end of the question matters more than its beginning. BOS stays."""
    cut = len(ids) - context
    return ids if cut <= 0 else [ids[0], *ids[cut + 1 :]]


def _gold(conversation: Mapping[str, Any]) -> str:
    """The reference: a letter or the fact `answer`, or what stands after `#### `, or else all of the last message."""
    for key in ("answer_letter", "answer"):
        if conversation.get(key):
            return str(conversation[key])
    content = conversation["messages"][-1]["content"]
    if not isinstance(content, str):
        content = "".join(part["text"] for part in content if part["type"] == "text")
    _, mark, answer = content.rpartition("#### ")
    return answer.strip() if mark else content


def judge(task: Any, conversation: Mapping[str, Any], text: str, **facts: Any) -> Answer:
    """An answer with its verdict. A rule that raises has given none: the answer counts as not right, and as that."""
    if not text.strip():
        return Answer(text, EMPTY, lenient=False if task.has_lenient_rule else None, **facts)
    try:
        is_right = bool(task.evaluate(conversation, text))
        lenient = bool(task.evaluate_lenient(conversation, text)) if task.has_lenient_rule else None
        if facts.get("letter") is None and "letters" in conversation:
            facts["letter"] = _read_letter(task, conversation, text)
    except Exception as error:  # it reads what a model wrote: any fault of it shows here first
        return Answer(text, GRADER_ERROR, error=f"{type(error).__name__}: {error}", **facts)
    return Answer(text, RIGHT if is_right else WRONG, lenient=lenient, **facts)


def _read_letter(task: Any, conversation: Mapping[str, Any], text: str) -> str | None:
    """The letter that the task's rule reads in a text: the one for which the text would be right."""
    fits = (x for x in conversation["letters"] if task.evaluate({**conversation, "answer_letter": x}, text))
    return next(fits, None)


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
                    f"{type(self.task).__name__}: the letter {letter!r} is {len(ids)} tokens in this tokenizer; a "
                    "categorical task needs letters of one token, such as A, B, C, D"
                )
            self.letter_ids[letter] = ids[0]
        return self.letter_ids[letter]

    @torch.inference_mode()
    def solve(self, conversations: Sequence[Mapping[str, Any]], prompts: Sequence[list[int]]) -> list[list[Answer]]:
        """One answer to each."""
        lengths = torch.tensor([len(p) for p in prompts], device=self.model.device)
        T, pad = int(lengths.max()), self.tokenizer.get_bos_token_id()
        rows = [p + [pad] * (T - len(p)) for p in prompts]  # at the end, where causal attention ignores it
        x = self.model.features(torch.tensor(rows, device=self.model.device), at=lengths[:, None] - 1)[:, 0]  # (B, C)
        logits = self.model.logits(x).float().cpu()  # (B, V): only where an answer is read, not (B, T, V)
        return [[self.choose(c, row)] for c, row in zip(conversations, logits, strict=True)]

    def choose(self, conversation: Mapping[str, Any], row: torch.Tensor) -> Answer:
        """Args: row: (V,) logits after the prompt."""
        letters = conversation["letters"]
        scores = row[[self.letter_id(letter) for letter in letters]]
        if not bool(scores.isfinite().all()):  # argmax would take the NaN for the choice
            return Answer("", EMPTY, error="the logits are not finite")
        letter = letters[int(scores.argmax())]
        probs = {name: round(p, 4) for name, p in zip(letters, scores.softmax(0).tolist(), strict=True)}
        return judge(self.task, conversation, letter, letter=letter, letter_probs=probs)


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
        self.num_judges = 1
        self.engine = Engine(model, tokenizer)
        self.sampling: dict[str, Any] = {"max_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k}

    def solve(self, conversations: Sequence[Mapping[str, Any]], prompts: Sequence[list[int]]) -> list[list[Answer]]:
        """num_samples answers to each."""
        rows = [(c, p) for c, p in zip(conversations, prompts, strict=True) for _ in range(self.num_samples)]
        sequences, _, ends = self.engine.generate_many([prompt for _, prompt in rows], **self.sampling)

        def answer(row: tuple[Mapping[str, Any], list[int]], ids: list[int], end: int | None) -> Answer:
            conversation, prompt = row
            return judge(
                self.task,
                conversation,
                self.tokenizer.decode(ids[len(prompt) :]),
                num_tokens=len(ids) - len(prompt),
                hit_limit=end is None,
                beyond_context=len(ids) > self.model.config.sequence_len,
            )

        with ThreadPoolExecutor(self.num_judges) as judges:  # in the order of the rows, whoever is done first
            answers = list(judges.map(answer, rows, sequences, ends))
        return [answers[i : i + self.num_samples] for i in range(0, len(answers), self.num_samples)]


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
