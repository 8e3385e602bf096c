"""What mid and SFT train on: the tables, what flags change of them, and your own conversations among them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from nanochat.config import InputError
from tasks.mixtures import Mixture, Teach, open_mixture, read_table
from tasks.tables import TASKS, Row, own_row, parse_table, with_task


def write(path: Path, questions: list[str]) -> str:
    lines = [[{"role": "user", "content": q}, {"role": "assistant", "content": f"To {q}"}] for q in questions]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def opened(mixture: str = "none", tasks: Any = (), conversations: Any = (), **more: Any) -> Mixture:
    return open_mixture("sft", "tinyworld", mixture, tasks, conversations, **more)


def questions(mixture: Mixture) -> Counter[str]:
    return Counter(c["messages"][0]["content"] for c in mixture.train)


def test_the_real_mixtures_are_the_specs():
    mid = read_table("mid", "real", "real")
    assert [(row.task, row.rows, row.epochs) for row in mid.train] == [
        ("SmolTalk", None, 1),
        ("MMLU", None, 1),
        ("GSM8K", None, 1),
        ("TinyIdentity", 996, 2),
        ("SimpleSpelling", 200_000, 1),
        ("SpellingBee", 80_000, 1),
    ]
    assert mid.validation == (Row("SmolTalk", "test"), Row("MMLU", "test", 5200), Row("GSM8K", "test", 420))
    sft = read_table("sft", "real", "real")
    assert [row.task for row in sft.train] == "ARC-Easy ARC-Challenge AQUA GSM8K SmolTalk TinyIdentity".split()
    assert [row.rows for row in sft.train] == [None, None, 20_000, None, 10_000, 996]


def test_a_file_is_read_as_ours_are(tmp_path: Path):
    path = tmp_path / "mixture.txt"
    path.write_text(
        "# task split rows epochs from\n\nTinySums\nTinyFacts train 1_000 2 50  # half\nvalidation\nTinySums dev 10\n"
    )
    table = read_table("sft", str(path), "real")
    assert table.train == (Row("TinySums"), Row("TinyFacts", "train", 1000, 2, 50))
    assert table.validation == (Row("TinySums", "dev", 10),)


def test_a_file_without_validation_has_that_of_the_base_models_data(tmp_path: Path):
    path = tmp_path / "mixture.txt"
    path.write_text("TinySums train 10\n")
    for default in ("real", "tinyworld"):
        assert read_table("mid", str(path), default).validation == read_table("mid", default, default).validation


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("Chess", "no task 'Chess' to train on; use .*TinySums"),
        ("TinySums train many", "'many' is no whole number"),
        ("TinySums train 5 -1", "'-1' is no whole number"),
        ("TinySums train 5 0", "0 times"),
        ("TinySums train 5 1 0 0", "6 columns"),
        ("validation\nvalidation", "no task 'validation'"),
    ],
)
def test_a_malformed_line_is_named_with_its_number(line: str, reason: str):
    with pytest.raises(InputError, match=f"table line {2 + line.count(chr(10))}: .*{reason}"):
        parse_table(f"TinyFacts train 3\n{line}", "table")


def test_no_such_mixture_and_no_utf8_are_refused_in_one_line(tmp_path: Path):
    with pytest.raises(InputError, match="no such file, and there are real, tinyworld and none"):
        opened("reel")
    (tmp_path / "x.txt").write_bytes(b"\xff")
    with pytest.raises(InputError, match="no UTF-8"):
        opened(str(tmp_path / "x.txt"))


def test_a_task_flag_changes_adds_or_takes_out_a_row():
    rows = [Row("TinyFacts", "train", 5, 1, 7), Row("TinySums", "train", 3)]
    assert with_task(rows, "TinyFacts:2:4") == [Row("TinyFacts", "train", 2, 4, 7), rows[1]]
    assert with_task(rows, "TinyFacts::4") == [Row("TinyFacts", "train", None, 4, 7), rows[1]]
    assert with_task(rows, "TinyMC:9") == [*rows, Row("TinyMC", "train", 9)]
    assert with_task(rows, "TinySums:0") == rows[:1]
    for spec, reason in (("Chess", "no task 'Chess'"), ("TinySums:1:2:3", "NAME:rows"), ("TinySums:x", "whole number")):
        with pytest.raises(InputError, match=f"--task {spec}: .*{reason}"):
            with_task(rows, spec)


def test_each_conversation_is_shown_as_often_as_its_row_says(tmp_path: Path):
    mine = write(tmp_path / "mine.jsonl", ["one?", "two?"])
    mixture = opened(tasks=["TinySums:5:2", "TinyFacts:3"], conversations=[f"{mine}:4"])
    asked = questions(mixture)
    assert asked["one?"] == asked["two?"] == 4 and len(mixture.train) == 5 * 2 + 3 + 2 * 4
    assert mixture.facts == {"TinySums train": "5 rows x 2", "TinyFacts train": "3 rows", mine: "2 rows x 4"}


def test_a_row_from_further_on_has_other_conversations_and_an_own_file_can_be_a_row(tmp_path: Path):
    mine = write(tmp_path / "mine.jsonl", ["one?", "two?", "three?"])
    (tmp_path / "m.txt").write_text(f"TinySums train 2 - 0\nTinySums train 2 - 1\n{mine} - 1 - 1\n")
    asked = questions(opened(str(tmp_path / "m.txt")))
    assert asked.total() == 5 and asked["two?"] == 1 and max(asked.values()) == 2


def test_generated_tasks_want_a_number_and_an_empty_mixture_is_refused():
    with pytest.raises(InputError, match="TinySums: its examples are made when asked for; say how many"):
        opened(tasks=["TinySums"])
    for tasks in ([], ["TinySums:0"]):
        with pytest.raises(InputError, match="the mixture is empty; add rows"):
            opened(tasks=tasks)


def test_own_conversations_are_once_in_sft_and_twice_in_mid_unless_told(tmp_path: Path):
    mine = write(tmp_path / "mine.jsonl", ["one?"])
    assert questions(opened(conversations=[mine]))["one?"] == 1
    assert questions(open_mixture("mid", "tinyworld", "none", (), [mine]))["one?"] == 2
    assert own_row("C:/x.jsonl", 3) == Row("C:/x.jsonl", epochs=3)
    with pytest.raises(InputError, match=r"FILE\.jsonl"):
        own_row("mine.txt", 1)


def test_who_the_model_is_comes_from_your_conversations_if_they_say_it(tmp_path: Path, capsys: Any):
    other, identity = write(tmp_path / "a.jsonl", ["one?"]), write(tmp_path / "b.jsonl", ["Who are you?"])
    assert "TinyIdentity train from 1,200" in opened("tinyworld", conversations=[other]).facts
    assert "left out" not in capsys.readouterr().out
    assert not {f for f in opened("tinyworld", conversations=[identity]).facts if f.startswith("TinyIdentity")}
    assert "TinyIdentity and TinyDialogue are left out" in capsys.readouterr().out


def test_teaching_shows_yours_often_in_other_words_among_as_many_others(tmp_path: Path):
    mine = write(tmp_path / "mine.jsonl", ["What is the color of the old mill?", "Who owns the red boat?"])
    mixture = opened("tinyworld", conversations=[f"{mine}:30"], teach=Teach(replay=0.5))
    own = [c["messages"] for c in mixture.train if str(c["messages"][1]["content"]).startswith("To ")]
    assert len(own) == 60 and len(mixture.train) == 90
    asked = Counter(m[0]["content"] for m in own if "mill" in m[1]["content"])
    assert asked.total() == 30 and len(asked) > 15 and asked["What is the color of the old mill?"] >= 1
    assert {m[1]["content"] for m in own} == {"To What is the color of the old mill?", "To Who owns the red boat?"}
    as_written = questions(opened("none", conversations=[f"{mine}:3"], teach=Teach(reword=False)))
    assert set(as_written.values()) == {3}


def test_teaching_takes_new_examples_of_what_is_made_when_asked_for(tmp_path: Path):
    mine, table = write(tmp_path / "mine.jsonl", ["one?"]), tmp_path / "table.txt"
    table.write_text("TinySums train 40 - 100\nGSM8K train 20\n")
    rows = [row.fresh() for row in read_table("sft", str(table), "tinyworld").train]
    assert rows == [Row("TinySums", rows=40, first=140), Row("GSM8K", rows=20)]
    table.write_text("TinySums train 40 - 100")
    taught = questions(opened(str(table), conversations=[f"{mine}:10"], teach=Teach(replay=4, reword=False)))
    others = Row("TinySums", rows=40, first=140).open()
    assert taught == Counter([*(c["messages"][0]["content"] for c in others), *["one?"] * 10])


@pytest.mark.parametrize(("rows", "epochs"), [(10, 120), (100, 40), (400, 10), (5000, 4)])
def test_few_conversations_are_taught_often_and_many_less_often(rows: int, epochs: int):
    assert Teach.epochs(rows) == epochs


def test_every_task_opens_by_its_name_and_knows_its_splits():
    for name in TASKS:
        if name.startswith("Tiny"):
            assert len(Row(name, "train", 3).open()) == 3
            with pytest.raises(InputError, match=f"{name}: .*no split 'nowhere'"):
                Row(name, "nowhere", 3).open()


def test_the_real_tasks_open_by_their_names(hub: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NANOCHAT_HUB_DIR", str(hub))
    for name in TASKS:
        if not name.startswith("Tiny"):
            task = Row(name, "train", 2, 1, 1).open()
            assert len(task) == 2 and {m["role"] for m in task[0]["messages"]} >= {"user", "assistant"}, name
