"""Tasks: slicing, mixing, the multiple-choice prompt, scoring, and the data sets behind the names."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from nanochat.chat import check_conversation
from nanochat.config import InputError
from tasks import spellingbee
from tasks.arc import ARC
from tasks.common import (
    Task,
    TaskMixture,
    TaskSequence,
    evaluate_final_answer,
    evaluate_final_number,
    final_answer,
    render_mc,
    same_number,
)
from tasks.customjson import CustomJSON
from tasks.gsm8k import GSM8K, answer_parts
from tasks.humaneval import HumanEval, extract_imports, extract_program
from tasks.mmlu import MMLU
from tasks.smoltalk import SmolTalk
from tasks.spellingbee import TEMPLATES, SimpleSpelling, SpellingBee

HUB = Path(__file__).parents[2] / "shared" / "hub"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    if not HUB.is_dir():
        pytest.skip("no real data: ../shared/hub is absent")
    monkeypatch.setenv("NANOCHAT_HUB_DIR", str(HUB))
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))


@pytest.fixture
def words(monkeypatch, tmp_path):
    """A base directory with a small word list, Windows line ends as in the original."""
    monkeypatch.delenv("NANOCHAT_HUB_DIR", raising=False)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    (tmp_path / "words_alpha.txt").write_bytes(b"apple\r\nbanana\r\ncherry\r\nstrawberry\r\n\r\n")
    return ["apple", "banana", "cherry", "strawberry"]


class Numbers(Task):
    def __init__(self, size: int, name: str = "", **slicing: int) -> None:
        super().__init__(**slicing)
        self.size, self.name = size, name

    def num_examples(self) -> int:
        return self.size

    def get_example(self, index: int) -> dict:
        return {"id": (self.name, index)}


def ids(task: Task) -> list:
    return [conversation["id"] for conversation in task]


def answer_text(conversation: dict) -> str:
    content = conversation["messages"][-1]["content"]
    return content if isinstance(content, str) else "".join(p["text"] for p in content)


# slicing and mixing


@pytest.mark.parametrize(
    ("slicing", "expected"),
    [
        ({}, list(range(10))),
        ({"start": 5, "stop": 10}, [5, 6, 7, 8, 9]),
        ({"start": 0, "stop": 10, "step": 3}, [0, 3, 6, 9]),
        ({"stop": 5200}, list(range(10))),
        ({"start": 12}, []),
        ({"start": 4, "stop": 4}, []),
    ],
)
def test_a_slice_is_a_view_and_a_stop_beyond_the_end_means_the_end(slicing, expected):
    task = Numbers(10, **slicing)
    assert len(task) == len(expected)
    assert ids(task) == [("", i) for i in expected]


@pytest.mark.parametrize("slicing", [{"start": -1}, {"stop": -1}, {"step": 0}])
def test_a_negative_slice_is_refused(slicing):
    with pytest.raises(InputError, match="count from 0"):
        Numbers(10, **slicing)


def test_an_index_outside_a_task_is_an_index_error_not_another_example():
    for index in (-1, 3):
        with pytest.raises(IndexError):
            Numbers(10, stop=3)[index]


def test_a_sequence_is_the_tasks_in_order_also_empty_ones():
    task = TaskSequence([Numbers(2, "a"), Numbers(0, "b"), Numbers(9, "c", start=7)])
    assert ids(task) == [("a", 0), ("a", 1), ("c", 7), ("c", 8)]
    assert len(TaskSequence([])) == 0


def test_a_mixture_has_the_order_of_pythons_shuffle_of_task_and_index_pairs():
    parts = [Numbers(50, "a"), Numbers(30, "b", step=2), Numbers(50, "a")]
    pairs = [(t, i) for t, part in enumerate(parts) for i in range(len(part))]
    random.Random(42).shuffle(pairs)
    assert ids(TaskMixture(parts)) == [parts[t][i]["id"] for t, i in pairs]


def test_a_mixture_shows_a_task_listed_twice_twice_and_can_be_sliced():
    twice = ids(TaskMixture([Numbers(4, "a"), Numbers(4, "a")]))
    assert sorted(twice) == sorted([("a", i) for i in range(4)] * 2)
    assert ids(TaskMixture([Numbers(4, "a"), Numbers(4, "a")], start=2, stop=6, step=2)) == twice[2:6:2]


def test_a_mixture_holds_8_bytes_an_example():
    assert TaskMixture([Numbers(100_000)]).order.nbytes == 800_000


# prompts and scoring


def test_the_multiple_choice_prompt_is_the_wire_format():
    assert render_mc("What is 1 + 1?", ["A", "B"], ["one", "two"]) == (
        "Multiple Choice question: What is 1 + 1?\n- one=A\n- two=B\n\n"
        "Respond only with the letter of the correct answer."
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [("so\n#### 1,234", "1234"), ("#### -5 apples", "-5"), ("#### 1 #### 2", "1"), ("#### 10.", "10."), ("10", None)],
)
def test_the_final_answer_is_the_first_number_after_four_hashes(text, expected):
    assert final_answer(text) == expected


@pytest.mark.parametrize(
    ("response", "strict", "lenient"),
    [
        ("#### 18", True, True),
        ("#### 18.00", False, True),
        ("#### 18.", False, True),
        ("#### 1,8", True, True),
        ("#### 19", False, False),
        ("18", False, False),
        ("#### ...", False, False),
    ],
)
def test_strict_scoring_compares_text_and_lenient_scoring_numbers(response, strict, lenient):
    conversation = {"messages": [{}, {"content": [{"type": "text", "text": "so\n#### 18"}]}]}
    assert evaluate_final_answer(conversation, response) is strict
    assert evaluate_final_number(conversation, response) is lenient


def test_no_answer_is_not_the_same_as_no_answer():
    assert not same_number(None, None)


def test_gsm8k_calculations_become_calculator_calls():
    assert answer_parts("He has 48/2=<<48/2=24>>24 and <<7>>.\n#### 24") == [
        {"type": "text", "text": "He has 48/2="},
        {"type": "python", "text": "48/2"},
        {"type": "python_output", "text": "24"},
        {"type": "text", "text": "24 and "},
        {"type": "python", "text": "7"},
        {"type": "python_output", "text": ""},
        {"type": "text", "text": ".\n#### 24"},
    ]
    # the last equals sign parts expression and result
    assert answer_parts("<<x=1+1=2>>")[1:3] == [
        {"type": "python", "text": "x=1+1"},
        {"type": "python_output", "text": "2"},
    ]


def test_a_program_is_the_first_fenced_block_or_all_of_the_text():
    assert extract_program("Sure:\n```python\nx = 1\n```\nor\n```\nx = 2\n```") == "x = 1"
    assert extract_program("```\nx = 2\n```") == "x = 2"
    assert extract_program("  x = 3\n") == "x = 3"


def test_the_imports_of_a_prompt_end_at_its_first_other_line():
    assert extract_imports("# c\nimport a\n\nfrom b import c\ndef f():\n    import d\n") == "import a\nfrom b import c"


# the data sets


@pytest.mark.parametrize(
    ("make", "size"),
    [
        (lambda: ARC("ARC-Easy", "test"), 2376),
        (lambda: ARC("ARC-Challenge", "validation"), 299),
        (lambda: MMLU("all", "validation"), 1531),
        (lambda: MMLU("auxiliary_train", "train"), 8315),
        (lambda: GSM8K("main", "test"), 1319),
        (lambda: HumanEval(), 164),
        (lambda: SmolTalk("test"), 1339),
        (lambda: SpellingBee(256, "test"), 256),
    ],
)
def test_a_real_task_is_whole_well_formed_and_solved_by_its_own_answers(hub, make, size):
    task = make()
    assert len(task) == size
    for i in range(0, size, max(1, size // 40)):
        check_conversation(task[i])
        if not isinstance(task, (SmolTalk, HumanEval)):
            assert task.evaluate(task[i], answer_text(task[i]))
            assert not task.evaluate(task[i], "no idea")
            assert task.reward(task[i], answer_text(task[i])) == 1.0


def test_a_hub_task_is_in_the_order_of_numpys_permutation_with_seed_42(hub):
    task = GSM8K("main", "test")
    first = int(np.random.default_rng(42).permutation(1319)[0])
    assert task[0]["messages"][0]["content"] == task.rows[first]["question"]


def test_humaneval_passes_the_reference_solution_and_fails_an_empty_one(hub):
    task = HumanEval()
    for i in (0, 1, 2):
        solution = answer_text(task[i])
        assert task.evaluate(task[i], solution)
        assert task.evaluate(task[i], f"Here it is:\n```python\n{solution}\n```\nDone.")
        assert not task.evaluate(task[i], f"def {task[i]['entry_point']}(*args): return 'none'")


def test_arc_takes_digits_for_letters(monkeypatch):
    row = {"question": "q", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"}
    monkeypatch.setattr("tasks.common.hub.load_rows", lambda *args: [row])
    task = ARC("ARC-Easy", "test")
    assert task[0]["letters"] == ["1", "2"] and task.evaluate(task[0], "2")
    assert task[0]["messages"][0]["content"].startswith("Multiple Choice question: q\n- x=1\n- y=2\n\n")


def test_smoltalk_says_when_a_mirror_holds_only_the_stand_in(hub, capsys):
    SmolTalk("test", stop=1)
    assert "local/instruct-small" in capsys.readouterr().out


@pytest.mark.parametrize(
    "make", [lambda: ARC("ARC", "test"), lambda: MMLU("some", "test"), lambda: SpellingBee(5, "dev")]
)
def test_an_unknown_subset_or_split_is_refused(words, make):
    with pytest.raises(InputError, match="use"):
        make()


# spelling


def test_spelling_bee_draws_in_the_defined_order(words):
    rng = random.Random(10_000_007)
    word = rng.choice(words)
    letter = rng.choice(word) if rng.random() < 0.9 else rng.choice("abcdefghijklmnopqrstuvwxyz")
    template = rng.choice(TEMPLATES)
    template = template.lower() if rng.random() < 0.3 else template
    quote, word_quote = rng.choice(["", "'", '"']), rng.choice(["", "'", '"'])
    question = template.format(letter=quote + letter + quote, word=word_quote + word + word_quote)
    question += "?" if rng.random() < 0.5 else ""
    conversation = SpellingBee(100, "test")[7]
    assert conversation["messages"][0]["content"] == question
    assert answer_text(conversation).endswith(f"#### {word.count(letter)}")


def test_spelling_bee_counts_by_hand_and_with_the_tool():
    text, _, python, output, end = spellingbee.count_parts("banana", "a")
    assert "banana:b,a,n,a,n,a" in text["text"]
    assert "1:b\n2:a hit! count=1\n3:n\n4:a hit! count=2\n5:n\n6:a hit! count=3\n" in text["text"]
    assert python == {"type": "python", "text": "'banana'.count('a')"}
    assert output == {"type": "python_output", "text": "3"}
    assert end["text"].endswith("#### 3")


def test_spelling_test_examples_are_not_the_training_ones(hub):
    for kind in (SpellingBee, SimpleSpelling):
        train, test = kind(300, "train"), kind(300, "test")
        same = sum(train[i] == test[j] for i in range(300) for j in {i, max(0, i - 1), min(299, i + 1)})
        assert same == 0


def test_there_are_51_ways_to_ask_and_each_names_letter_and_word():
    assert len(TEMPLATES) == len(set(TEMPLATES)) == 51
    for template in TEMPLATES:
        for form in (template, template.lower()):
            assert {"{letter}", "{word}"} <= {form[i : j + 1] for i, j in _braces(form)}


def _braces(text: str) -> list[tuple[int, int]]:
    return [(i, text.index("}", i)) for i, c in enumerate(text) if c == "{"]


def test_simple_spelling_has_no_space_after_the_colon(words):
    conversation = SimpleSpelling(10, "train")[0]
    word = conversation["messages"][0]["content"].removeprefix("Spell the word: ")
    assert word in words
    assert conversation["messages"][1]["content"] == word + ":" + ",".join(word)


def test_the_word_list_is_downloaded_once_whole_and_else_not_left_behind(monkeypatch, tmp_path):
    import requests

    monkeypatch.delenv("NANOCHAT_HUB_DIR", raising=False)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    calls = []

    class Response:
        content = b"short"

        def raise_for_status(self) -> None:
            pass

    def get(url, timeout):
        calls.append(url)
        return Response()

    monkeypatch.setattr(requests, "get", get)
    with pytest.raises(InputError, match="only 5 bytes"):
        spellingbee.words_path()
    assert list(tmp_path.iterdir()) == []
    Response.content = b"ab\r\n" * (1 << 19)
    assert spellingbee.words_path() == spellingbee.words_path() == tmp_path / "words_alpha.txt"
    assert len(calls) == 2
    assert spellingbee.read_words(tmp_path / "words_alpha.txt")[:2] == ("ab", "ab")


# your own conversations

TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hello."}]


def test_own_conversations_may_be_lists_or_objects_and_blank_lines_are_skipped(tmp_path):
    path = tmp_path / "own.jsonl"
    system = [{"role": "system", "content": "é"}, *TALK]
    lines = [json.dumps(TALK), "", json.dumps({"messages": system}, ensure_ascii=False), "  "]
    path.write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    task = CustomJSON(path)
    assert [c["messages"] for c in task] == [TALK, system]
    assert [c["messages"] for c in CustomJSON(path, start=1)] == [system]


def test_sharegpt_is_the_third_shape(tmp_path):
    path = tmp_path / "own.jsonl"
    said = [("system", "Be kind."), ("human", "hi"), ("gpt", "Hello."), ("user", "bye"), ("assistant", "Bye.")]
    path.write_text(json.dumps({"id": 1, "conversations": [{"from": who, "value": text} for who, text in said]}))
    roles = ["system", "user", "assistant", "user", "assistant"]
    assert CustomJSON(path)[0] == {
        "messages": [{"role": r, "content": text} for r, (_, text) in zip(roles, said, strict=True)]
    }


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("[" * 100_000, "no JSON"),
        ('{"conversations": [{"from": "human", "value": "hi"}, {"from": "tool", "value": "x"}]}', "'tool'"),
        ('{"conversations": [{"from": 7, "value": "hi"}]}', "role is 7"),
        ('{"conversations": ["hi"]}', "role and content"),
        (json.dumps([TALK[0], TALK[0], TALK[1]]), "message 1: role is 'user', not 'assistant'"),
        (json.dumps([TALK[0], {"role": "assistant", "content": ""}]), "all that the assistant says is empty"),
        (json.dumps([TALK[0], {"role": "assistant", "content": []}]), "all that the assistant says is empty"),
        (
            json.dumps([TALK[0], {"role": "assistant", "content": [{"type": "python_output", "text": "5"}]}]),
            "a python_output stands without a python part",
        ),
        ("{nonsense", "no JSON"),
        ('{"text": "hi"}', "messages"),
        ("7", "messages"),
        ("[]", "at least one message"),
        (json.dumps(TALK[::-1]), "'user'"),
        (json.dumps(TALK[:1]), "no answer to learn"),
        (json.dumps([TALK[0], {"role": "assistant", "content": 5}]), "content must be"),
        ('["a", "b"]', "role and content"),
    ],
)
def test_a_malformed_line_is_named_with_its_number_and_reason(tmp_path, line, reason):
    path = tmp_path / "own.jsonl"
    path.write_text(f"{json.dumps(TALK)}\n\n{line}\n", encoding="utf-8")
    with pytest.raises(InputError, match=f"own.jsonl line 3: .*{reason}"):
        CustomJSON(path)


def test_of_many_malformed_lines_the_first_are_named_and_all_counted(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(["x", json.dumps(TALK), "", "[]", json.dumps(TALK[:1]), "7", "8"]))
    message = r"own.jsonl line 1: no JSON.*; line 4: .*; line 5: .*; and 2 more \(5 of 6 conversations are malformed\)"
    with pytest.raises(InputError, match=message):
        CustomJSON(path)


def test_conversations_longer_than_the_context_are_counted_with_their_lines(tmp_path):
    class Letters:
        """An id a character; the assistant's are learned."""

        def render_conversation(self, conversation, max_tokens):
            user, assistant = (m["content"] for m in conversation["messages"])
            return [0] * len(user + assistant), [0] * len(user) + [1] * len(assistant)

    path = tmp_path / "own.jsonl"
    lines = [
        [{"role": "user", "content": "q" * q}, {"role": "assistant", "content": "a" * a}]
        for q, a in ((1, 1), (5, 5), (9, 1), (4, 4))
    ]
    path.write_text("\n\n".join(map(json.dumps, lines)))
    assert CustomJSON(path).describe_crops(Letters(), 10) is None
    text = CustomJSON(path).describe_crops(Letters(), 8)
    assert "2 of 4 conversations of" in text and "(lines 3, 5)" in text
    assert text.endswith("1 of them have nothing left to learn (lines 5)")
    assert CustomJSON(path, start=3).describe_crops(Letters(), 8) is None


def test_bytes_that_are_no_utf8_are_named(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_bytes(b'[{"role": "user", "content": "\xff"}]\n')
    with pytest.raises(InputError, match="line 1: no UTF-8"):
        CustomJSON(path)


def test_a_missing_or_empty_file_is_an_error_not_an_empty_task(tmp_path):
    with pytest.raises(InputError, match="no conversations file"):
        CustomJSON(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(InputError, match="holds no conversation"):
        CustomJSON(tmp_path / "empty.jsonl")
