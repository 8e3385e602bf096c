"""Chat evaluation: how problems are asked, judged, counted and recorded."""

from __future__ import annotations

import errno
import json
import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat.config import InputError
from nanochat.evals import chat, chat_report, records
from nanochat.evals.chat import ChatResult, evaluate_task
from nanochat.evals.records import Record, problem_id
from nanochat.evals.stats import Paired
from nanochat.gpt import GPT, GPTConfig
from nanochat.runtime import Runtime
from nanochat.tokenizer import Tokenizer
from tasks.common import Task, evaluate_letter, mc_conversation
from tasks.registry import eval_task
from tests.tiny_stages import tiny_chat_model, write_aqua

RT = Runtime(torch.device("cpu"), torch.float32)


@pytest.fixture(autouse=True)
def one_thread():
    """A model this small is slower on several threads, by far when the cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train_from_iterator(["the cat sat on the mat and the dog sat on the cat " * 20], 300)


@pytest.fixture(scope="module")
def model(tokenizer) -> GPT:
    return tiny_chat_model(tokenizer)


class Letters(Task):
    """Multiple choice of differing lengths; the right letter of problem i is letter i mod 3, but C only twice."""

    eval_type = "categorical"

    def __init__(self, size: int = 11, letters: str = "ABCD", **slicing: int) -> None:
        super().__init__(**slicing)
        self.size, self.letters = size, letters
        self.responses: list[str] = []

    def num_examples(self) -> int:
        return self.size

    def get_example(self, index: int) -> dict[str, Any]:
        answer = self.letters[index % 3 if index < 8 else 0]
        return mc_conversation(f"{index} the cat " * (1 + 5 * index % 7), self.letters, ["w", "x", "y", "z"], answer)

    def evaluate(self, conversation: dict[str, Any], response: str) -> bool:
        self.responses.append(response)
        return evaluate_letter(conversation, response)


class Echo(Task):
    """Right: the response contains the problem's number; leniently: any digit."""

    def __init__(self, size: int, **slicing: int) -> None:
        super().__init__(**slicing)
        self.size = size
        self.seen: list[str] = []

    def num_examples(self) -> int:
        return self.size

    def get_example(self, index: int) -> dict[str, Any]:
        messages = [{"role": "user", "content": f"say {index}"}, {"role": "assistant", "content": str(index)}]
        return {"messages": messages}

    def evaluate(self, conversation: dict[str, Any], response: str) -> bool:
        self.seen.append(response)
        return conversation["messages"][1]["content"] in response

    def evaluate_lenient(self, conversation: dict[str, Any], response: str) -> bool:
        return any(c.isdigit() for c in response)


def script_engine(monkeypatch, answers: list[str]) -> list[dict[str, Any]]:
    """An engine that gives these answers in turn; returns the calls that it got."""
    calls: list[dict[str, Any]] = []
    left = iter(answers)

    class Scripted:
        def __init__(self, model, tokenizer) -> None:
            self.tokenizer = tokenizer

        def generate_many(self, prompts, **sampling):
            calls.append({"prompts": len(prompts), **sampling})
            sequences = [[*p, *self.tokenizer.encode(next(left))] for p in prompts]
            return sequences, [[0] * len(s) for s in sequences], [True] * len(prompts)

    monkeypatch.setattr(chat, "Engine", Scripted)
    return calls


# categorical


@torch.no_grad()
def choose_plainly(task: Task, model: GPT, tokenizer: Tokenizer) -> list[str]:
    """One problem at a time, all logits, no padding."""
    chosen = []
    for conversation in task:
        ids = tokenizer.render_for_completion(conversation)
        logits = model(torch.tensor([ids]))[0, -1]
        scores = [float(logits[tokenizer.encode(letter)[0]]) for letter in conversation["letters"]]
        chosen.append(conversation["letters"][scores.index(max(scores))])
    return chosen


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_padded_batches_choose_what_one_problem_at_a_time_chooses(model, tokenizer, batch_size):
    task = Letters()
    chosen = choose_plainly(task, model, tokenizer)
    assert len(set(chosen)) > 1
    result = evaluate_task(task, model, tokenizer, RT, batch_size=batch_size)
    assert task.responses == chosen
    right = sum(c == task[i]["messages"][1]["content"] for i, c in enumerate(chosen))
    assert (result.num_passed, result.total, result.num_cropped) == (right, 11, 0)


def test_ranks_share_the_batches_and_together_count_what_one_counts(model, tokenizer):
    class Recording(Letters):
        def get_example(self, index):
            taken.append(index)
            return super().get_example(index)

    taken: list[int] = []
    shares, passed = [], 0
    for rank in (0, 1):
        taken.clear()
        rt = Runtime(RT.device, RT.dtype, rank=rank, world_size=2)  # no process group: counts stay apart
        passed += evaluate_task(Recording(), model, tokenizer, rt, batch_size=2).num_passed
        shares.append(list(taken))
    assert shares == [[0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 10]]
    assert passed == evaluate_task(Letters(), model, tokenizer, RT).num_passed


def test_max_problems_takes_the_first_ones_and_the_control_is_the_commonest_letter(model, tokenizer):
    # right letters: A B C A B C A B | A A A
    assert evaluate_task(Letters(), model, tokenizer, RT).majority == pytest.approx(6 / 11)
    result = evaluate_task(Letters(), model, tokenizer, RT, max_problems=4)
    assert result.total == 4 and result.majority == pytest.approx(2 / 4)
    assert evaluate_task(Letters(), model, tokenizer, RT, max_problems=99).total == 11


def test_an_empty_task_is_refused(model, tokenizer):
    with pytest.raises(InputError, match="no problem"):
        evaluate_task(Letters(0), model, tokenizer, RT)


def test_a_letter_of_two_tokens_is_refused(model, tokenizer):
    class Wide(Letters):
        def get_example(self, index):
            return mc_conversation("q", ["A", "Ω"], ["x", "y"], "A")

    with pytest.raises(InputError, match=r"^Wide: the letter 'Ω' is 2 tokens in this tokenizer; .* such as A, B"):
        evaluate_task(Wide(), model, tokenizer, RT)


@pytest.mark.parametrize(("extra", "cropped"), [(0, 0), (1, 1), (40, 1)])
def test_a_prompt_beyond_the_context_loses_its_beginning_but_not_bos(model, tokenizer, monkeypatch, extra, cropped):
    seen = []
    monkeypatch.setattr(model, "features", lambda idx, at: seen.append(idx[0].tolist()) or torch.zeros(*at.shape, 32))
    whole = tokenizer.render_for_completion(Letters(1)[0])
    monkeypatch.setattr(model, "config", GPTConfig(len(whole) - extra, 300, 2, 2, 2, 32))
    result = evaluate_task(Letters(1), model, tokenizer, RT)
    assert result.num_cropped == cropped
    assert seen[0] == ([whole[0], *whole[extra + 1 :]] if extra else whole)


# generative


def test_a_problem_is_solved_when_any_of_its_samples_is_right(model, tokenizer, monkeypatch):
    calls = script_engine(monkeypatch, ["no", "it is 0", "7", "no", "no", "no"])
    result = evaluate_task(
        Echo(3), model, tokenizer, RT, batch_size=2, num_samples=2, temperature=0.5, max_new_tokens=9
    )
    assert (result.num_passed, result.total, result.num_lenient, result.random) == (1, 3, 2, None)
    assert result.majority == pytest.approx(1 / 3)  # three problems, three right answers
    assert (result.num_samples, result.right_counts) == (2, (1, 0, 0))
    assert calls == [
        {"prompts": 4, "max_tokens": 9, "temperature": 0.5, "top_k": 50},
        {"prompts": 2, "max_tokens": 9, "temperature": 0.5, "top_k": 50},
    ]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generated_answers_do_not_depend_on_the_batch(model, tokenizer, temperature):
    seen = []
    for batch_size in (1, 4):
        task = Echo(5)
        evaluate_task(task, model, tokenizer, RT, batch_size=batch_size, max_new_tokens=6, temperature=temperature)
        seen.append(task.seen)
    assert seen[0] == seen[1] and len(seen[0]) == 5


class Touchy(Echo):
    """Its rule cannot stand a "!"."""

    def evaluate(self, conversation: dict[str, Any], response: str) -> bool:
        if "!" in response:
            raise KeyError("!")
        return super().evaluate(conversation, response)


def test_a_rule_that_raises_has_not_judged_and_its_answer_is_named_not_wrong(model, tokenizer, monkeypatch, tmp_path):
    script_engine(monkeypatch, ["0!", "0", "no", "no", "2!", "2!"])
    result = evaluate_task(Touchy(3), model, tokenizer, RT, num_samples=2, record_to=tmp_path / "a.jsonl")
    assert (result.num_passed, result.num_grader_errors, result.first_error) == (1, 3, "KeyError: '!'")
    verdicts = [[a.verdict for a in r.answers] for r in records.read(tmp_path / "a.jsonl")]
    assert verdicts == [["grader error", "right"], ["wrong", "wrong"], ["grader error", "grader error"]]
    assert chat_report.details(result, 0.0)["answers that the grader failed on (of 6)"] == 3


class Patient(Echo):
    """Judges in pairs: one alone waits in vain. The first answer of a pair is judged last."""

    waits_to_judge = True

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.pair, self.second_is_done = threading.Barrier(2), threading.Event()

    def evaluate(self, conversation: dict[str, Any], response: str) -> bool:
        self.pair.wait(timeout=20)
        if "first" in response:
            assert self.second_is_done.wait(timeout=20)
        is_right = super().evaluate(conversation, response)
        self.second_is_done.set()
        return is_right


def test_a_task_that_waits_for_its_judges_has_one_a_core_and_keeps_the_order(model, tokenizer, monkeypatch, tmp_path):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    rt = replace(RT, local_world_size=2)
    script_engine(monkeypatch, ["first 0", "1"])
    task = Patient(2)
    assert evaluate_task(task, model, tokenizer, rt, record_to=tmp_path / "a.jsonl").num_passed == 2
    assert task.seen == ["1", "first 0"]
    assert [r.answers[0].text for r in records.read(tmp_path / "a.jsonl")] == ["first 0", "1"]


def test_a_model_that_writes_nothing_is_not_asked_about_and_counted(model, tokenizer, monkeypatch):
    script_engine(monkeypatch, ["", " \n", "2"])
    task = Echo(3)
    result = evaluate_task(task, model, tokenizer, RT)
    assert task.seen == ["2"]  # the others have no verdict of the rule
    assert (result.num_passed, result.num_empty, result.num_lenient) == (1, 2, 1)
    assert chat_report.details(result, 0.0)["empty answers (of 3)"] == 2


def test_answers_that_hit_the_limit_or_leave_the_context_are_counted(model, tokenizer, monkeypatch):
    prompt = len(tokenizer.render_for_completion(Echo(1)[0]))
    monkeypatch.setattr(model, "config", GPTConfig(prompt + 4, 300, 2, 2, 2, 32))  # the rest is the untouched model's
    for budget, beyond in ((4, 0), (5, 1)):
        result = evaluate_task(Echo(1), model, tokenizer, RT, max_new_tokens=budget)
        assert (result.num_limited, result.num_beyond) == (1, beyond)


def test_logits_that_are_not_finite_choose_no_letter(model, tokenizer, monkeypatch):
    monkeypatch.setattr(model, "logits", lambda x: torch.full((*x.shape[:-1], 300), torch.nan))
    result = evaluate_task(Letters(4), model, tokenizer, RT)
    assert (result.num_passed, result.num_empty, result.first_error) == (0, 4, "the logits are not finite")
    assert dict(result.chosen) == {"none": 4}


class Reasoned(Task):
    """Five letters, right is always B; the letter is the answer's last character."""

    def num_examples(self) -> int:
        return 3

    def get_example(self, index: int) -> dict[str, Any]:
        conversation = mc_conversation(f"{index}", "ABCDE", "vwxyz", "so B", subject=f"s{index % 2}")
        return {**conversation, "answer_letter": "B"}

    def evaluate(self, conversation: dict[str, Any], response: str) -> bool:
        return response[-1] == conversation["answer_letter"]


def test_always_the_same_letter_shows_beside_the_controls(model, tokenizer, monkeypatch):
    script_engine(monkeypatch, ["so B", "thus B", "B"])
    result = evaluate_task(Reasoned(), model, tokenizer, RT)
    assert (result.accuracy, result.majority, result.random) == (1.0, 1.0, pytest.approx(0.2))
    lines = chat_report.details(result, 0.0)
    assert lines["letters chosen"] == "B 3 (always the same)" and lines["better than guessing"].startswith("no")
    script_engine(monkeypatch, ["so A", "thus B", "?"])
    result = evaluate_task(Reasoned(), model, tokenizer, RT)
    assert chat_report.details(result, 0.0)["letters chosen"] == "A 1, B 1, none 1"
    assert dict(result.subjects) == {"s0": (0, 2), "s1": (1, 1)}


@pytest.mark.parametrize(
    ("passed", "controls", "words"),
    [
        (70, {"majority": 70 / 254, "commonest": "A"}, "no: no better than always answering A (0.2756)"),
        (80, {"majority": 70 / 254, "commonest": "A"}, "no: not shown to be better than always answering A (0.2756)"),
        (90, {"majority": 70 / 254, "commonest": "A"}, "yes"),
        (40, {"majority": 0.1, "random": 0.2}, "no: no better than guessing (0.2000)"),
        (
            0,
            {"majority": 0.01, "commonest": "x" * 40},
            "no: no better than always giving the commonest answer (0.0100)",
        ),
        (0, {"majority": 0.01, "commonest": "18"}, "no: no better than always answering 18 (0.0100)"),
    ],
)
def test_a_score_is_better_than_guessing_when_its_interval_lies_above_both_controls(passed, controls, words):
    assert chat_report.better_than_guessing(ChatResult(passed, 254, **controls), 0.0) == words


def test_the_letters_of_real_tasks_are_those_that_their_rules_read(model, tokenizer, monkeypatch, tmp_path):
    write_aqua(tmp_path)
    script_engine(monkeypatch, ["9 = 9\nAnswer: A", "the answer is (B).", "A man, a plan"])
    result = evaluate_task(eval_task("AQUA"), model, tokenizer, RT)
    assert dict(result.chosen) == {"A": 1, "B": 1, "none": 1} and result.num_passed == 1
    gold = eval_task("TinyMC")[0]["answer_letter"]
    script_engine(monkeypatch, [f"It is x={gold}", "x=E"])
    result = evaluate_task(eval_task("TinyMC"), model, tokenizer, RT, max_problems=2)
    assert dict(result.chosen) == {gold: 1, "none": 1} and result.num_passed == 1


def test_the_majority_control_counts_answers_not_the_sentences_around_them(model, tokenizer, monkeypatch):
    class Facts(Echo):
        def get_example(self, index):
            return {**super().get_example(index), "answer": "Venus" if index else "Mars"}

    script_engine(monkeypatch, ["no"] * 4)
    result = evaluate_task(Facts(4), model, tokenizer, RT)
    assert (result.majority, result.commonest) == (0.75, "Venus")


def test_subjects_follow_with_their_mean_and_pass_at_k_with_its_error():
    result = ChatResult(
        3, 4, right_counts=(4, 1, 1, 0), num_samples=4, subjects={"art": (3, 3), "war": (0, 1)}, majority=0.25
    )
    lines = chat_report.details(result, 0.1)
    assert lines["mean over 2 subjects"] == 0.5 and lines["subject art"].startswith("1.0000 (3 of 3, 0.4385 to 1.0000")
    # pass@1: 1, 1/4, 1/4, 0; pass@2: 1, 1/2, 1/2, 0; pass@4: 1, 1, 1, 0
    assert lines["pass@1"] == "0.3750 +- 0.2165 (of 4 samples)"
    assert [lines[f"pass@{k}"][:6] for k in (2, 4)] == ["0.5000", "0.7500"]
    assert lines["random guess"] == 0.1 and lines["always the commonest answer"] == 0.25
    assert chat_report.powers_of_2(6) == [1, 2, 4, 6] and chat_report.powers_of_2(1) == [1]


# records


def test_every_prompt_answer_and_verdict_is_a_line_that_a_person_can_read(model, tokenizer, monkeypatch, tmp_path):
    script_engine(monkeypatch, ["it is 0", "\u2028é", "no", "2"])
    path = tmp_path / "deep" / "Echo.jsonl"
    result = evaluate_task(Echo(2), model, tokenizer, RT, batch_size=1, num_samples=2, name="Echo one", record_to=path)
    lines = [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]
    assert [(r["task"], r["index"], r["passed"], r["gold"]) for r in lines] == [
        ("Echo one", 0, True, "0"),
        ("Echo one", 1, False, "1"),
    ]
    assert lines[0]["prompt"] == "<|bos|><|user_start|>say 0<|user_end|><|assistant_start|>"
    assert [a["text"] for a in lines[0]["answers"]] == ["it is 0", "\u2028é"] and "é" in path.read_text("utf-8")
    first = lines[0]["answers"][0]
    assert (first["verdict"], first["lenient"], first["num_tokens"]) == (
        "right",
        True,
        len(tokenizer.encode("it is 0")),
    )
    assert result.num_passed == sum(r.passed for r in records.read(path))
    assert [p.name for p in path.parent.iterdir()] == ["Echo.jsonl"]


def test_a_letters_record_has_the_chances_of_the_letters(model, tokenizer, tmp_path):
    evaluate_task(Letters(3), model, tokenizer, RT, record_to=tmp_path / "a.jsonl")
    for record in records.read(tmp_path / "a.jsonl"):
        probs = record.answers[0].letter_probs
        assert record.letters == list(probs) == list("ABCD") and sum(probs.values()) == pytest.approx(1, abs=2e-4)
        assert max(probs, key=probs.get) == record.answers[0].letter == record.answers[0].text


def test_a_file_that_cannot_be_written_whole_leaves_the_old_one(model, tokenizer, monkeypatch, tmp_path):
    path = tmp_path / "a.jsonl"
    evaluate_task(Letters(3), model, tokenizer, RT, record_to=path)
    before = path.read_bytes()

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"cannot write the answers to .*: No space left on device; make room"):
        evaluate_task(Letters(2), model, tokenizer, RT, record_to=path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def ranks_record(rt: Runtime, path: Path) -> None:
    words = Tokenizer.train_from_iterator(["the cat sat on the mat and the dog sat on the cat " * 20], 300)
    result = evaluate_task(Letters(), tiny_chat_model(words), words, rt, batch_size=2, record_to=path)
    path.with_name(f"{rt.rank}.txt").write_text(repr(result))


def test_two_ranks_write_the_file_that_one_writes(two_ranks, model, tokenizer, tmp_path):
    two_ranks(ranks_record, tmp_path / "two.jsonl")
    alone = evaluate_task(Letters(), model, tokenizer, RT, record_to=tmp_path / "one.jsonl")
    together = [_without_probs(records.read(tmp_path / f"{name}.jsonl")) for name in ("two", "one")]
    assert together[0] == together[1] and [r.index for r in together[0]] == list(range(11))
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)] == [repr(alone)] * 2


def _without_probs(lines: list[Record]) -> list[Record]:
    """Chances may differ in the last digit with the batch's padding."""
    return [replace(r, answers=[replace(a, letter_probs=None) for a in r.answers]) for r in lines]


def record(index: int, passed: bool, **changes: Any) -> Record:
    return Record(
        **{"task": "T", "index": index, "id": f"p{index}", "passed": passed, "gold": "", "answers": []} | changes
    )


def test_two_models_are_compared_on_the_problems_that_both_have():
    first = [record(i, passed) for i, passed in enumerate([True, True, False, False, True])]
    second = [record(i, passed) for i, passed in reversed(list(enumerate([True, False, True, False])))]
    assert records.compare(first, second) == Paired(both=1, only_first=1, only_second=1, neither=1)
    with pytest.raises(InputError, match="share no problem"):
        records.compare(first, [record(9, True)])
    with pytest.raises(InputError, match="problem 1 of T is p1 in one evaluation and other in the other"):
        records.compare(first, [record(1, True, id="other")])


def test_a_problems_name_changes_with_the_problem_alone():
    a, b = Letters(3)[0], Letters(3)[1]
    assert problem_id(a) == problem_id(dict(reversed(a.items()))) == problem_id(Letters(9)[0]) != problem_id(b)


@pytest.mark.parametrize("line", ["{", "3", '{"task": "T"}', '{"answers": [{"no": 1}]}'])
def test_a_line_that_is_no_record_is_named(tmp_path, line):
    path = tmp_path / "a.jsonl"
    records.write(path, [record(0, True)])
    path.write_text(path.read_text() + "\n" + line + "\n")
    with pytest.raises(InputError, match=r"a\.jsonl line 3: no record"):
        records.read(path)
    with pytest.raises(InputError, match="no answers to read"):
        records.read(tmp_path / "none.jsonl")
