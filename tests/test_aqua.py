"""AQuA: what is asked, what is taught, and which letter is read out of an answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nanochat.chat import check_conversation
from nanochat.config import InputError
from tasks.aqua import AQUA, extract_letter, render_row, split_option

HUB = Path(__file__).parents[2] / "shared" / "hub"
ROW = {
    "question": "What is 2 + 2?",
    "options": ["A)3", "B) 4 ", "C)f(x)", "D)5", "E)6"],
    "rationale": "2 + 2 = 4",
    "correct": "B",
}


@pytest.fixture
def base(monkeypatch, tmp_path):
    for name in ("NANOCHAT_AQUA_DIR", "AQUA_DATA_DIR", "NANOCHAT_HUB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    return tmp_path / "base"


@pytest.fixture
def hub(base, monkeypatch):
    if not HUB.is_dir():
        pytest.skip("no real data: ../shared/hub is absent")
    monkeypatch.setenv("NANOCHAT_HUB_DIR", str(HUB))


def rows(n: int) -> list[dict]:
    return [{**ROW, "question": f"question {i}"} for i in range(n)]


def write(folder: Path, split: str, items: list) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in items), encoding="utf-8")
    return folder


def questions(task: AQUA) -> list[str]:
    return [c["messages"][0]["content"].split("Multiple Choice question: ")[1].split("\n")[0] for c in task]


def test_the_prompt_asks_for_reasoning_and_nothing_in_it_contradicts_that():
    prompt = render_row(ROW)["messages"][0]["content"]
    assert "`Answer: <letter>`" in prompt and "Respond only" not in prompt
    assert prompt.endswith("\n\nMultiple Choice question: What is 2 + 2?\n- 3=A\n- 4=B\n- f(x)=C\n- 5=D\n- 6=E")


def test_the_answer_is_the_rationale_a_newline_and_the_letter():
    conversation = render_row(ROW)
    check_conversation(conversation)
    assert conversation["messages"][1]["content"] == "2 + 2 = 4\nAnswer: B"
    assert conversation["letters"] == list("ABCDE") and conversation["answer_letter"] == "B"


def test_an_option_is_parted_at_its_first_bracket():
    assert split_option("C)f(x) = 2)") == ("C", "f(x) = 2)")
    with pytest.raises(InputError, match="has no `\\)`"):
        split_option("C 5")


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("540 / 60 = 9\nAnswer: B", "B"),
        ("answer: c", "C"),
        ("ANSWER:D", "D"),
        ("Answer - A", "A"),
        ("The answer is option E.", "E"),
        ("The correct answer is (A).", "A"),
        ("**Answer: C**", "C"),
        ("Answer: A) 21 apples", "A"),
        ("Answer: B because it is 4", "B"),
        ("Answer: A\nNo, wait.\nAnswer: D", "D"),
        ("E", "E"),
        (" (b) ", "B"),
        ("it must be\nC.", "C"),
        ("so we choose D", "D"),
    ],
)
def test_a_letter_is_read_after_the_word_answer_alone_or_at_the_end(text, letter):
    assert extract_letter(text) == letter


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a train travels 60 km",
        "A train travels 60 km",
        "The answer is a number",
        "Answer: a train",
        "The answer: A train leaves",
        "we get a",
        "from A to B",
        "Answer: F",
        "Answer: 5",
        "ABCDE",
        "it's plan B'",
        "A man, a plan",
    ],
)
def test_an_article_or_an_ambiguous_letter_is_no_answer(text):
    assert extract_letter(text) is None


def test_a_letter_that_the_task_does_not_have_is_wrong(base, tmp_path):
    task = AQUA("test", data_dir=write(tmp_path / "own", "test", rows(1)))
    assert task.eval_type == "generative"
    assert task.evaluate(task[0], "so 4.\nAnswer: B") and task.reward(task[0], "Answer: B") == 1.0
    assert not task.evaluate(task[0], "Answer: C") and task.reward(task[0], "a banana") == 0.0


def test_local_files_have_the_order_that_the_hub_has(base, monkeypatch, tmp_path):
    local = AQUA("train", data_dir=write(tmp_path / "own", "train", rows(40)))
    monkeypatch.setattr("tasks.aqua.hub.load_rows", lambda *args: rows(40))
    assert questions(local) == questions(AQUA("train")) != questions(AQUA("train", shuffle=False))
    assert questions(AQUA("train", shuffle=False))[:2] == ["question 0", "question 1"]


def test_folders_are_tried_in_order_argument_variables_base_then_hub(base, monkeypatch, tmp_path):
    def tagged(name: str) -> list[dict]:
        return [{**ROW, "question": name}]

    monkeypatch.setattr("tasks.aqua.hub.load_rows", lambda *args: tagged("hub"))
    assert questions(AQUA("test")) == ["hub"]
    write(base / "aqua", "test", tagged("base"))
    assert questions(AQUA("test")) == ["base"]
    assert questions(AQUA("train")) == ["hub"]  # the folder has no such split
    monkeypatch.setenv("AQUA_DATA_DIR", str(write(tmp_path / "second", "test", tagged("second"))))
    assert questions(AQUA("test")) == ["second"]
    monkeypatch.setenv("NANOCHAT_AQUA_DIR", str(write(tmp_path / "first", "test", tagged("first"))))
    assert questions(AQUA("test")) == ["first"]
    assert questions(AQUA("test", data_dir=write(tmp_path / "own", "test", tagged("own")))) == ["own"]


def test_a_folder_that_is_not_there_is_refused(base, monkeypatch, tmp_path):
    with pytest.raises(InputError, match="no AQuA split"):
        AQUA("test", data_dir=tmp_path / "none")
    monkeypatch.setenv("NANOCHAT_AQUA_DIR", str(tmp_path / "none"))
    with pytest.raises(InputError, match="NANOCHAT_AQUA_DIR="):
        AQUA("test")


def test_local_rows_may_be_conversations_already(base, tmp_path):
    folder = write(tmp_path / "own", "train", [render_row(ROW)])
    assert AQUA("train", data_dir=folder)[0] == render_row(ROW)


@pytest.mark.parametrize("line", ["{", '{"question": "q"}', '{"messages": []}', "3"])
def test_a_malformed_local_line_is_named(base, tmp_path, line):
    folder = write(tmp_path / "own", "train", rows(1))
    with (folder / "train.jsonl").open("a") as f:
        f.write("\n" + line + "\n")
    with pytest.raises(InputError, match=r"train\.jsonl line 3"):
        AQUA("train", data_dir=folder)


@pytest.mark.parametrize(("split", "size"), [("train", 2724), ("validation", 254), ("test", 254)])
def test_every_real_answer_is_read_as_the_right_letter(hub, split, size):
    task = AQUA(split, shuffle=False)
    assert len(task) == size
    for conversation in task:
        check_conversation(conversation)
        assert task.evaluate(conversation, conversation["messages"][1]["content"])


def test_where_the_writers_own_ending_gives_a_letter_it_is_the_right_one(hub):
    task = AQUA("test", shuffle=False)
    read = [(extract_letter(row["rationale"]), row["correct"]) for row in task.rows]
    found = [(letter, gold) for letter, gold in read if letter is not None]
    assert len(found) == 229 and all(letter == gold for letter, gold in found)
