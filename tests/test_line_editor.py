"""Messages typed at a terminal: keys, lines, history."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from nanochat.line_editor import typed_messages


def typed(keys: str, history: Path, note: Callable[[str], None] = print) -> list[str]:
    from prompt_toolkit.application import create_app_session
    from prompt_toolkit.input import create_pipe_input
    from prompt_toolkit.output import DummyOutput

    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
        pipe.send_text(keys)
        return list(typed_messages(history, note))


ENTER, ALT_ENTER, CTRL_C, CTRL_D, UP, LEFT = "\r", "\x1b\r", "\x03", "\x04", "\x1b[A", "\x1b[D"


@pytest.mark.parametrize(
    ("keys", "messages"),
    [
        ("ac" + LEFT + "b" + ENTER, ["abc"]),
        ("a" + ALT_ENTER + "b" + ENTER, ["a\nb"]),
        ("a\\" + ENTER + "b" + ENTER, ["a\nb"]),
        ("\x1b[200~a\r\nb\n\x1b[201~" + ENTER + "c" + ENTER, ["a\nb\n", "c"]),  # a bracketed paste
        ("lost" + CTRL_C + "a" + ENTER + CTRL_C + "b" + ENTER, ["a", "b"]),
        ("a" + ENTER + CTRL_C + CTRL_C + "lost" + ENTER, ["a"]),
    ],
)
def test_keys_make_messages(keys, messages, tmp_path):
    assert typed(keys + CTRL_D, tmp_path / "history") == messages


def test_the_history_is_its_owners_alone(tmp_path):
    typed("a" + ALT_ENTER + "é" + ENTER + CTRL_D, tmp_path / "history")
    assert (tmp_path / "history").read_text(encoding="utf-8").endswith("\n+a\n+é\n")
    assert (tmp_path / "history").stat().st_mode & 0o777 == 0o600


def test_without_a_place_for_the_history_one_can_chat(tmp_path):
    notes: list[str] = []
    assert typed("a" + ENTER + CTRL_D, tmp_path, notes.append) == ["a"]
    assert notes == [f"no history: cannot write {tmp_path}: Is a directory"]
