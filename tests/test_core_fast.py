"""CORE in batches against one example at a time: the same prediction on every example."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from nanochat import runtime
from nanochat.evals import core_fast, core_requests
from nanochat.evals.bundle import Bundle, CoreTask
from nanochat.evals.core import evaluate_core
from nanochat.evals.core_fast import Plan, Row, batches, plan, shares_of
from nanochat.evals.core_identity import make_example, score_example
from nanochat.evals.core_requests import get_requests, make_requests
from nanochat.evals.core_rules import Example, Prompt, Score, difference, margin, select_items
from nanochat.gpt import GPT, GPTConfig
from nanochat.runtime import Runtime

CPU = Runtime(torch.device("cpu"), torch.float32)
BOS = 256


class Bytes:
    """One token a byte, and BOS."""

    fingerprint = "bytes"

    def get_bos_token_id(self) -> int:
        return BOS

    def get_vocab_size(self) -> int:
        return 257

    def encode(self, texts: list[str], prepend: int) -> list[list[int]]:
        return [[prepend, *text.encode()] for text in texts]

    def encode_to_arrays(self, texts: list[str], prepend: int) -> list[np.ndarray]:
        return [np.array(ids, np.int32) for ids in self.encode(texts, prepend)]


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    return tmp_path / "base"


def make_model(arch: str, dtype: torch.dtype = torch.float32, sequence_len: int = 32) -> GPT:
    """Random weights everywhere, windows shorter than the prompts."""
    torch.manual_seed(1)
    pattern = "SSL" if arch == "modern" else "L"
    config = GPTConfig(sequence_len, 257, 3, 2, 2, 32, arch=arch, window_pattern=pattern, short_window=10)
    model = GPT(config)
    model.init_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2 and not parameter.any():
                parameter.normal_(0.0, 0.3)
        unlikely = [i for i in range(257) if i not in list(b"abcdefghij")]  # so that some continuations are guessed
        model.lm_head.weight[unlikely] = 0
    return model.prepare("cpu", dtype).eval()


def random_items(kind: str, n: int, seed: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)

    def word() -> str:
        return "".join(rng.choice("abc ") for _ in range(rng.randint(1, 9))).strip() or "a"

    if kind == "language_modeling":
        return [{"context": word(), "continuation": rng.choice("abcdefghij ")[:1].strip() or "a"} for _ in range(n)]
    items = []
    for _ in range(n):
        options, gold = [word() for _ in range(rng.randint(2, 5))], rng.randrange(2)
        if kind == "multiple_choice":
            items.append({"query": word(), "choices": options, "gold": gold})
        else:
            items.append({"context_options": options, "continuation": word(), "gold": gold})
    return items


def greedy_items(model: GPT) -> list[dict[str, Any]]:
    """Continuations that the model expects, but for each third."""
    items = []
    for i in range(24):
        context = "abcdefghij"[: 1 + i % 9] + str(i)
        letter = chr(int(model(torch.tensor([[BOS, *context.encode()]]))[0, -1].argmax()))
        items.append({"context": context, "continuation": letter if i % 3 else "z"})
    return items


def a_bundle(model: GPT | None = None, n: int = 24) -> Bundle:
    tasks = []
    if model is not None:
        found = greedy_items(model)
        tasks.append(CoreTask("greedy", "language_modeling", 0, "", 0.0, lambda: list(found)))
    for i, kind in enumerate(("multiple_choice", "schema", "language_modeling")):
        for shots in (0, 3):
            items = random_items(kind, n, seed=10 * i + shots)
            tasks.append(CoreTask(f"{kind}_{shots}", kind, shots, " ", 0.0, lambda items=items: list(items)))  # type: ignore
    letters = [{"query": f"is {i} a number?", "choices": ["y", "n"], "gold": i % 2} for i in range(n)]
    tasks.append(CoreTask("letters", "multiple_choice", 2, ": ", 0.5, lambda: list(letters)))
    same = [{"query": "q" * 40, "choices": ["same", "same", "other"], "gold": 1}] * 3  # an exact tie
    tasks.append(CoreTask("same", "multiple_choice", 0, " ", 0.5, lambda: list(same)))
    return Bundle("test", tuple(tasks))


def predictions(model: Any, mode: str, **kwargs: Any) -> dict[str, tuple[int, ...]]:
    result = evaluate_core(model, Bytes(), CPU, a_bundle(model), mode=mode, **kwargs)
    return {task.label: task.predictions for task in result.tasks}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("arch", ["plain", "modern"])
def test_batches_predict_as_one_example_at_a_time(arch, dtype, monkeypatch):
    model = make_model(arch, dtype)
    plain = predictions(model, "identity")
    varied = {label for label, of_task in plain.items() if len(set(of_task)) > 1}
    assert varied >= {"greedy", "multiple_choice_0", "multiple_choice_3", "schema_0", "schema_3"}, "too easy a test"
    for rows in (1, 32):
        assert predictions(model, "fast", device_batch_size=rows) == plain
    monkeypatch.setattr(core_fast, "MAX_TOKENS_ELSEWHERE", 150)
    assert predictions(model, "fast") == plain


@pytest.mark.parametrize("arch", ["plain", "modern"])
def test_scores_of_batches_are_those_of_single_examples_up_to_rounding(arch):
    model, tasks = make_model(arch), a_bundle().tasks
    requests = [make_requests(t, *select_items(t.read(), None), Bytes()) for t in tasks]
    run = core_fast.FastRun(model, CPU, requests, 10_000, 32)
    run.score_all()
    assert sorted(run.scores) == list(range(sum(map(len, requests))))
    for place, scores in run.scores.items():
        for fast, slow in zip(scores, score_example(model, run.example(place), CPU.device), strict=True):
            if np.isnan(fast.loss):
                assert (fast.greedy, fast.lead) == (slow.greedy, pytest.approx(slow.lead, abs=1e-4))
            else:
                assert fast.loss == pytest.approx(slow.loss, abs=1e-4)


@pytest.mark.parametrize("arch", ["plain", "modern"])
def test_prompts_beyond_the_context_are_cropped_alike(arch):
    model = make_model(arch)
    model.max_context = 20  # type: ignore[assignment]
    plain = evaluate_core(model, Bytes(), CPU, a_bundle(), mode="identity")
    fast = evaluate_core(model, Bytes(), CPU, a_bundle())
    assert fast == plain
    assert sum(task.num_cropped for task in plain.tasks) > 50


def test_what_differs_between_the_two_ways_within_rounding_is_scored_again(monkeypatch, capsys):
    """A fast way that is off by up to 0.1 at random, as in a coarse dtype, changes no prediction."""
    rng = np.random.default_rng(0)
    add = core_fast.Sums.add

    def off(self: Any, option: int, values: np.ndarray) -> None:
        add(self, option, values + rng.uniform(-0.1, 0.1))

    model = make_model("plain")
    plain = predictions(model, "identity")
    assert predictions(model, "fast") == plain
    told = int(capsys.readouterr().out.split("CORE: ")[-1].split()[0])
    assert told < 60  # only what measures, and exact ties of equal options
    monkeypatch.setattr(core_fast.Sums, "add", off)
    assert predictions(model, "fast") == plain
    assert told < int(capsys.readouterr().out.split("CORE: ")[-1].split()[0]) < 150  # of 195
    monkeypatch.setattr(core_fast, "SAFETY", 0.0)
    assert predictions(model, "fast") != plain


def test_the_typical_difference_is_a_tasks_own_beside_that_of_its_kind():
    seen = np.array([[2.0, 1000, 4], [2 * 0.04, 1000 * 0.01, 4 * 9.0]])
    choice, large, lead = core_fast.typical_difference(seen, [False, False, True])
    common = (0.08 + 10) / 1002
    assert choice == pytest.approx(((0.08 + 8 * common) / 10) ** 0.5)
    assert large == pytest.approx(0.1, rel=0.01) and lead == pytest.approx(3)


def test_a_model_of_nan_is_right_about_nothing_and_that_is_said(capsys):
    model = make_model("plain")
    torch.nn.init.constant_(model.lm_head.weight, torch.nan)
    result = evaluate_core(model, Bytes(), CPU, a_bundle())
    assert all(task.num_correct == 0 and task.num_unscored == task.num_examples for task in result.tasks)
    assert "24 without a score, counted as wrong" in capsys.readouterr().out


# plans


def example(*prompts: tuple[list[int], int]) -> Example:
    return Example("multiple_choice", tuple(Prompt(np.array(ids), start) for ids, start in prompts), 0)


def plain(p: Plan) -> list[Any]:
    """With lists for arrays."""

    def of(row: Row) -> Any:
        return list(row.ids), [(s.option, s.first, list(s.targets)) for s in row.spans]

    return [[of(r) for r in p.rows], [of(r) for r in p.rests]]


def test_a_single_prompt_is_one_row_without_its_last_token():
    assert plain(plan(example(([9, 1, 2, 3], 2)))) == [[([9, 1, 2], [(0, 1, [2, 3])])], []]


def test_options_of_one_token_are_all_read_off_the_shared_row():
    assert plain(plan(example(([9, 1, 2], 2), ([9, 1, 3], 2)))) == [[([9, 1], [(0, 1, [2]), (1, 1, [3])])], []]


def test_what_options_share_is_a_row_and_the_rests_follow_the_longest_first(monkeypatch):
    monkeypatch.setattr(core_fast, "MIN_SAVED_TOKENS", 1)
    got = plain(plan(example(([9, 1, 2, 3], 2), ([9, 1, 4, 5, 6], 2), ([9, 1, 7], 2))))
    head = ([9, 1], [(0, 1, [2]), (1, 1, [4]), (2, 1, [7])])
    assert got == [[head], [([4, 5], [(1, 0, [5, 6])]), ([2], [(0, 0, [3])])]]


def test_a_scored_end_may_begin_later_than_the_rest(monkeypatch):
    monkeypatch.setattr(core_fast, "MIN_SAVED_TOKENS", 1)
    got = plain(plan(example(([9, 1, 2, 5, 6], 3), ([9, 1, 3, 5, 6], 3))))
    assert got == [[([9, 1], [])], [([2, 5], [(0, 0, [5, 6])]), ([3, 5], [(1, 0, [5, 6])])]]


def test_too_little_to_share_makes_separate_rows():
    got = plan(example(([9, 1, 2, 5], 3), ([9, 3, 2, 5], 3)))
    assert len(got.rows) == 2 and not got.rests and got.num_tokens == 6


@pytest.mark.parametrize("limit", [1, 50, 300])
def test_every_example_is_in_one_batch_of_its_kind_within_the_limit(limit):
    rng = random.Random(3)
    shapes = [(rng.choice([0, 1, 1, 3]), rng.randint(1, 60), rng.randint(1, 9)) for _ in range(200)]
    shapes = [(rows, longest, rest * (rows == 0)) for rows, longest, rest in shapes]
    found = batches(shapes, limit, 100)
    assert sorted(place for b in found for place in b.places) == list(range(200))
    for b in found:
        assert {shapes[place][0] == 0 for place in b.places} == {b.shares}
        width = max(sum(shapes[place][1:]) for place in b.places)
        assert b.tokens == width * sum(max(1, shapes[place][0]) for place in b.places)
        assert len(b.places) == 1 or b.tokens <= (min(limit, 100) if b.shares else limit)


def test_work_is_dealt_by_cost_the_costliest_first():
    assert shares_of([3, 1, 1, 5, 2], 2) == [[3, 1], [0, 4, 2]]  # 6 and 6
    hands = shares_of([random.Random(1).random() for _ in range(1000)], 8)
    assert sorted(i for hand in hands for i in hand) == list(range(1000))


def test_margins_and_differences_are_those_of_the_decision():
    a = [Score(1.0, False, -2.0), Score(1.5, False, -1.0), Score(3.0, False, 0.0)]
    b = [Score(1.1, False, -2.0), Score(1.5, False, -1.5), Score(2.9, False, 0.0)]
    assert margin("schema", a) == 0.5 and margin("language_modeling", a) == 2.0
    assert difference("schema", a, b) == pytest.approx(0.2)  # option 2 came 0.2 nearer to option 0
    assert difference("language_modeling", a[1:], b[1:]) == 0.5


# requests


def as_lists(e: Example) -> Any:
    return e.kind, e.gold, [(list(p.ids), p.start) for p in e.prompts]


@pytest.mark.parametrize("t", a_bundle().tasks, ids=lambda t: t.label)
def test_requests_hold_the_examples_that_are_made_one_at_a_time(t, monkeypatch):
    monkeypatch.setattr(core_requests, "EXAMPLES_AT_ONCE", 7)
    items, n = select_items(t.read(), 20)
    requests = make_requests(t, items, n, Bytes())
    expected = [make_example(t, items, i, n, Bytes()) for i in range(n)]
    assert [as_lists(requests.example(i)) for i in range(n)] == [as_lists(e) for e in expected]
    longest, answer = requests.sizes()
    assert longest.tolist() == [max(len(p.ids) for p in e.prompts) for e in expected]
    assert answer.tolist() == [max(len(p.ids) - p.start for p in e.prompts) for e in expected]


class Untouched(Bytes):
    def encode_to_arrays(self, texts: list[str], prepend: int) -> list[np.ndarray]:
        raise AssertionError("tokenized again")


def test_requests_are_tokenized_once_and_again_when_anything_changes(base):
    t = a_bundle().tasks[1]
    items, n = select_items(t.read(), 20)
    first = get_requests(t, items, n, Bytes())
    again = get_requests(t, items, n, Untouched())
    assert [as_lists(first.example(i)) for i in range(n)] == [as_lists(again.example(i)) for i in range(n)]
    other = Untouched()
    other.fingerprint = "another"  # type: ignore[misc]
    changed = [*items[:-1], {**items[-1], "query": "changed"}]
    for arguments in ((items, n, other), (changed, n, Untouched()), (items, n - 1, Untouched())):
        with pytest.raises(AssertionError, match="tokenized again"):
            get_requests(t, *arguments)
    (file,) = (base / "core_requests").iterdir()
    whole = file.read_bytes()
    for damaged in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
        file.write_bytes(damaged)
        with pytest.raises(AssertionError, match="tokenized again"):
            get_requests(t, items, n, Untouched())


def test_only_the_last_used_files_of_a_task_are_kept(base):
    t = a_bundle().tasks[0]
    items, _ = select_items(t.read(), None)
    for n in range(1, 9):
        get_requests(t, items, n, Bytes())
        for age, path in enumerate(sorted((base / "core_requests").iterdir(), key=lambda p: p.stat().st_mtime)):
            os.utime(path, (age, age))  # the clock of a file system may be too coarse to tell them apart
    assert len(list((base / "core_requests").iterdir())) == core_requests.FILES_KEPT
    get_requests(t, items, 8, Untouched())


def test_a_place_that_cannot_be_written_costs_time_only(base, capsys):
    base.mkdir()
    (base / "core_requests").write_text("a file")
    t = a_bundle().tasks[0]
    assert len(get_requests(t, *select_items(t.read(), None), Bytes())) == 24
    assert "could not be kept" in capsys.readouterr().out


# ranks


def one_rank(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    rt = Runtime(CPU.device, CPU.dtype, rank=rank, world_size=2)
    model = make_model("modern")
    result = evaluate_core(model, Bytes(), rt, a_bundle(model))
    plain = evaluate_core(model, Bytes(), rt, a_bundle(model), mode="identity")
    assert result == plain
    Path(folder, f"{rank}.txt").write_text(repr([task.predictions for task in result.tasks]), encoding="utf-8")
    runtime.stop()


def test_one_rank_and_two_agree(tmp_path):
    mp.spawn(one_rank, args=(str(tmp_path),), nprocs=2)
    alone = repr(list(predictions(make_model("modern"), "fast").values()))
    assert [(tmp_path / f"{r}.txt").read_text(encoding="utf-8") for r in range(2)] == [alone, alone]
