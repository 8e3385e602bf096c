"""A reward and prompts of one's own: found, named when they cannot be, and held-out conversations kept apart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nanochat.config import InputError
from tasks.customjson import CustomJSON
from tasks.own_reward import choose_tasks, load_reward

SOURCE = "def short(conversation, answer):\n    return -len(answer)\n"


@pytest.fixture
def mine(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(SOURCE)
    return str(tmp_path / "mine.py")


def conversations(path: Path, count: int) -> str:
    lines = [[{"role": "user", "content": str(i)}, {"role": "assistant", "content": "yes"}] for i in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_a_function_of_a_file_is_the_reward_of_a_tasks_examples(mine):
    train, val, _ = choose_tasks("TinyWordProblems", None, f"{mine}:short")
    assert train.reward(train[0], "abc") == -3 == val.reward(val[0], "abc")
    plain, _, digest = choose_tasks("TinyWordProblems", None, None)
    assert digest == "" and train[5] == plain[5] and len(train) == len(plain)
    assert train.parsed("#### 3") is True and train.parsed("three") is False


def test_a_function_of_a_module_is_found_by_its_name():
    assert load_reward("tasks.common:same_number")[0]("3.0", "3") is True


def test_the_hash_of_a_reward_changes_with_its_source(mine):
    before = load_reward(f"{mine}:short")[1]
    assert load_reward(f"{mine}:short")[1] == before
    Path(mine).write_text(SOURCE + "# other")
    assert load_reward(f"{mine}:short")[1] != before


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mine.py", "must be FILE.py:function"),
        (":short", "must be FILE.py:function"),
        ("nowhere.py:short", "there is no file nowhere.py"),
        ("no_such_module:short", "importing no_such_module failed: ModuleNotFoundError"),
        ("{mine}:long", "has no function long"),
        ("{broken}:short", "importing .* failed: NameError: name 'oops'"),
    ],
)
def test_what_is_no_reward_is_refused_by_name(mine, tmp_path, spec, message):
    (tmp_path / "broken.py").write_text("oops\n")
    with pytest.raises(InputError, match=message):
        load_reward(spec.format(mine=mine, broken=tmp_path / "broken.py"))


@pytest.mark.parametrize(("count", "held_out"), [(2, 1), (9, 1), (30, 3)])
def test_the_last_tenth_of_a_file_is_held_out(tmp_path, count, held_out):
    train, val = CustomJSON.split(conversations(tmp_path / "mine.jsonl", count))
    asked = [c["messages"][0]["content"] for c in [*train, *val]]
    assert asked == list(map(str, range(count))) and len(val) == held_out


def test_one_conversation_is_too_few(tmp_path):
    with pytest.raises(InputError, match="at least 2"):
        CustomJSON.split(conversations(tmp_path / "mine.jsonl", 1))
