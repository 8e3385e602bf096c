"""A second opinion: EleutherAI's lm-eval (0.4.9 or later) asks our models.

`LanguageModel` answers lm-eval's three kinds of request with code of its own, none of it shared with core_rules.py, and
needs no lm-eval itself; `as_lm()` makes it the class that lm-eval wants. `write_tasks()` puts multiple-choice tasks of
an evaluation bundle into the files that lm-eval reads, with the prompts that core_rules.py renders.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from nanochat.config import InputError
from nanochat.engine import Engine
from nanochat.evals.bundle import CoreTask
from nanochat.evals.core_rules import fewshot_indices, render_prompts, scored_spans
from nanochat.gpt import GPT
from nanochat.tokenizer import Tokenizer

MAX_GEN_TOKS = 256  # lm-eval's own default
WAY_OUT = "install it: uv sync --group lm-eval"


class LanguageModel:
    """A model as lm-eval sees one. A request has `args`; answers come in the order of the requests.

    Args:
        batch_size: rows a forward pass.
        max_length: positions that a prompt may have; a longer one loses its beginning, but not BOS. None = all that
            the model has.
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer, batch_size: int = 8, max_length: int | None = None) -> None:
        super().__init__()
        self.model, self.tokens, self.batch_size = model, tokenizer, batch_size
        self.max_length = max_length or model.config.max_positions
        self.bos = tokenizer.get_bos_token_id()

    def split(self, context: str, continuation: str) -> tuple[list[int], int]:
        """(ids of both after BOS, where the continuation begins): at the first token with a byte of it. A space that
        ends the context so belongs to the continuation where the tokenizer joins them."""
        ids = self.tokens.encode(context + continuation)
        room, start = len(context.encode()), 0
        while start < len(ids) and (room := room - len(self.tokens.decode_bytes(ids[start : start + 1]))) >= 0:
            start += 1
        return [self.bos, *ids], start + 1

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """args = (context, continuation) -> (log-probability of the continuation in nats, is it the greedy one)."""
        return self.score([self.split(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """args = (text,) -> its log-probability in nats, in pieces of the context, each after the one token before."""
        totals = []
        for request in requests:
            ids, T = [self.bos, *self.tokens.encode(request.args[0])], self.model.config.sequence_len
            pieces = [(ids[i : i + T + 1], 1) for i in range(0, len(ids) - 1, T)]
            totals.append(sum(total for total, _ in self.score(pieces)))
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """args = (context, settings) -> what follows the context, before the first of the strings in `until`.

        Raises:
            InputError: a setting that the engine does not have.
        """
        engine, answers = Engine(self.model, self.tokens), []
        for context, settings in (request.args for request in requests):
            until, sampling = generation_settings(settings)
            room = max(1, self.max_length - sampling["max_tokens"])
            ids = _last([self.bos, *self.tokens.encode(context)], room)
            sequences, _, _ = engine.generate_many([ids], **sampling)
            text = self.tokens.decode(sequences[0][len(ids) :])
            answers.append(text[: min((at for stop in until if (at := text.find(stop)) >= 0), default=len(text))])
        return answers

    @torch.inference_mode()
    def score(self, rows: Sequence[tuple[list[int], int]]) -> list[tuple[float, bool]]:
        """(ids, start) -> (log-probability of ids[start:], is each of them the likeliest), `batch_size` at a time."""
        scores: list[Any] = [None] * len(rows)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]), reverse=True)
        for first in range(0, len(rows), self.batch_size):
            chosen = order[first : first + self.batch_size]
            for i, score in zip(chosen, self._score_batch([rows[i] for i in chosen]), strict=True):
                scores[i] = score
        return scores

    def _score_batch(self, rows: Sequence[tuple[list[int], int]]) -> Iterator[tuple[float, bool]]:
        kept = [_last(ids, self.max_length) for ids, _ in rows]
        inputs = torch.full((len(rows), max(map(len, kept))), self.bos, device=self.model.device)  # (B, T)
        for row, ids in zip(inputs, kept, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        x = self.model.features(inputs)  # (B, T, C)
        for (whole, start), ids, features in zip(rows, kept, x, strict=True):
            first = max(1, start - (len(whole) - len(ids)))
            targets = torch.tensor(ids[first:], device=x.device)
            log_probs = self.model.logits(features[first - 1 : len(ids) - 1]).float().log_softmax(-1)  # (S, V)
            total = log_probs.gather(1, targets[:, None]).sum()
            yield float(total), bool((log_probs.argmax(-1) == targets).all())


def _last(ids: list[int], limit: int) -> list[int]:
    """At most `limit` of the ids, the first of all among them."""
    return ids if len(ids) <= limit else [ids[0], *ids[len(ids) - limit + 1 :]]


def generation_settings(settings: Mapping[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """(strings to stop at, arguments of Engine.generate_many) of lm-eval's gen_kwargs."""
    known = dict(settings)
    until = known.pop("until", None) or []
    max_tokens = known.pop("max_gen_toks", None) or known.pop("max_new_tokens", None) or MAX_GEN_TOKS
    temperature = float(known.pop("temperature", None) or 0.0) if known.pop("do_sample", False) else 0.0
    known.pop("temperature", None)
    top_k = known.pop("top_k", None)
    if known:
        raise InputError(f"generation setting {next(iter(known))!r} is not known here; leave it out of the task")
    return [until] if isinstance(until, str) else list(until), {
        "max_tokens": int(max_tokens),
        "temperature": temperature,
        "top_k": top_k,
    }


def require_lm_eval() -> Any:
    """
    Raises:
        InputError: lm-eval is not installed.
    """
    try:
        import lm_eval
    except ImportError as error:
        raise InputError(f"lm-eval cannot be imported ({error}); {WAY_OUT}") from None
    return lm_eval


def as_lm(model: GPT, tokenizer: Tokenizer, batch_size: int = 8, max_length: int | None = None) -> Any:
    """What lm_eval.simple_evaluate(model=...) takes. Raises: InputError: lm-eval is not installed."""
    require_lm_eval()
    from lm_eval.api.model import LM

    class Nanochat(LanguageModel, LM):  # lm-eval accepts nothing but a child of its LM
        pass

    return Nanochat(model, tokenizer, batch_size, max_length)


def choice_row(task: CoreTask, item: Mapping[str, Any], shots: Sequence[Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """One item as lm-eval asks it: `query`, up to where the choices part, then the rest of each choice; `lengths` is
    the tokens of each rest, over which our rule takes the mean."""
    texts = render_prompts(task, dict(item), shots)
    spans = scored_spans(task.kind, tokenizer.encode(texts))
    num_bytes = len(tokenizer.decode_bytes(spans[0].ids[: spans[0].start]))
    head = texts[0].encode()[:num_bytes].decode(errors="ignore")  # choices may part inside a character
    rests = [text[len(head) :] for text in texts]
    lengths = [len(span.ids) - span.start for span in spans]
    return {"query": head, "choices": rests, "gold": item["gold"], "lengths": lengths}


def write_tasks(
    tasks: Sequence[CoreTask],
    folder: Path,
    tokenizer: Tokenizer,
    examples: Mapping[str, Sequence[tuple[Mapping[str, Any], Sequence[Any]]]],
) -> list[str]:
    """A .yaml and a .jsonl for each task; give the folder to lm-eval as include_path.

    Args:
        examples: label -> (item, its shots).

    Returns:
        lm-eval's names of the tasks: nanochat_<label>.

    Raises:
        InputError: a task of another kind than multiple choice.
    """
    names = []
    for task in tasks:
        if task.kind != "multiple_choice":
            raise InputError(f"{task.label} is of type {task.kind}; lm-eval is given multiple_choice tasks alone")
        name, rows = f"nanochat_{task.label}", (folder / f"{task.label}.jsonl").resolve()
        lines = [json.dumps(choice_row(task, item, shots, tokenizer)) for item, shots in examples[task.label]]
        rows.write_text("\n".join(lines) + "\n", encoding="utf-8")
        config = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(rows)}, "cache_dir": str(folder.resolve() / "cache")},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "query",
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
            "target_delimiter": "",  # the rest of a choice begins with what parts it from the query
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
            "metadata": {"version": 1},
        }
        (folder / f"{task.label}.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        names.append(name)
    return names


def draw_examples(task: CoreTask, max_examples: int | None) -> list[tuple[dict[str, Any], list[Any]]]:
    """(item, its shots) of the examples that core.evaluate_task scores, in its order."""
    items = task.read()
    random.Random(1337).shuffle(items)
    n = min(len(items), max_examples or len(items))
    picks = [fewshot_indices(i, task.num_fewshot, n, len(items)) for i in range(n)]
    return [(items[i], [items[j] for j in picked]) for i, picked in enumerate(picks)]


def ask_lm_eval(lm: Any, names: Sequence[str], folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Task -> lm-eval's own samples, in the order of the file: `doc`, `acc`, and `lls`, nats of each choice."""
    lm_eval = require_lm_eval()
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    results = lm_eval.simple_evaluate(
        model=lm, tasks=list(names), task_manager=manager, bootstrap_iters=0, log_samples=True
    )
    asked = {}
    for name in names:
        samples = sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
        asked[name] = [
            {"doc": s["doc"], "acc": s["acc"], "lls": [float(ll) for ll, _ in s["filtered_resps"]]} for s in samples
        ]
    return asked


def chosen(lls: Sequence[float], lengths: Sequence[int] | None = None) -> int:
    """The choice with the highest log-probability (lm-eval's rule), or with lengths the highest mean of one (ours)."""
    values = [ll / n for ll, n in zip(lls, lengths, strict=True)] if lengths else list(lls)
    return values.index(max(values))
