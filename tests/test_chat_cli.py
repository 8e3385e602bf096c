"""The chat_cli command: flags, pipes, scripts, and a whole talk at a terminal."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import select
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest

from nanochat.engine import Engine
from scripts import chat_cli
from tests.tiny_engine import engine_that_says


@pytest.fixture
def scripted(monkeypatch, tmp_path):
    """chat_cli with an engine that says ok, and a standard input."""

    def run(*argv: str, stdin: str | bytes = "", **engine: Any) -> None:
        text = stdin if isinstance(stdin, bytes) else stdin.encode()
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text), encoding="utf-8"))
        chat_cli.main(["-t", "0", "--device_type=cpu", *argv])

    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setattr(chat_cli, "load_engine", lambda *args: engine_that_says(*b"ok"))
    return run


def test_p_prints_one_answer_and_nothing_else(scripted, capsys, tmp_path):
    scripted("-p", "hello")
    assert capsys.readouterr() == ("ok\n", "")
    assert not list(tmp_path.iterdir())  # no history


def test_a_prompt_of_a_dash_is_the_whole_standard_input(scripted, capsys):
    scripted("-p", "-", stdin="/two\nquit\n")
    assert capsys.readouterr() == ("ok\n", "")


def test_each_line_of_a_pipe_is_a_message_and_only_answers_are_printed(scripted, capsys, tmp_path):
    scripted(stdin="hello\n\n/settings max_tokens 1\nagain")
    assert capsys.readouterr().out == "ok\no\n"
    assert not list(tmp_path.iterdir())


def test_a_pipe_says_on_stderr_what_it_dropped(scripted, capsys):
    scripted(stdin="x" * 30 + "\n" + "y" * 30)
    out, err = capsys.readouterr()
    assert out == "ok\nok\n"
    assert err == "(the context of 64 tokens is full: the oldest 2 messages are forgotten)\n"


def test_a_closed_standard_input_is_an_empty_one(scripted, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    chat_cli.main(["--device_type=cpu"])
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("argv", "stdin", "reason"),
    [
        (["-p", ""], "", "the prompt is empty"),
        (["-p", "  "], "", "the prompt is empty"),
        (["-p", "-"], "\n", "the prompt is empty"),
        (["-p", "x" * 100], "", "context is 64; shorten it"),
        (["-p", "\udc80"], "", "half a surrogate pair"),
        ([], "x" * 100, "context is 64; shorten it"),
        ([], "/hlep\n", "no command '/hlep'"),
        ([], b"caf\xe9\n", "no utf-8 text"),
        (["--context_limit=refuse"], "x" * 30 + "\n" + "y" * 30, "does not fit"),
    ],
)
def test_wrong_input_of_a_script_ends_in_one_line_and_exit_code_2(scripted, capsys, argv, stdin, reason):
    with pytest.raises(SystemExit) as error:
        scripted(*argv, stdin=stdin)
    assert error.value.code == 2
    line = capsys.readouterr().err
    assert reason in line and line.count("\n") == 1


def test_a_reader_that_has_seen_enough_ends_it_quietly(scripted, monkeypatch):
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "w", encoding="utf-8") as broken:
        monkeypatch.setattr("sys.stdout", broken)
        scripted("-p", "hello")


def test_ctrl_c_in_a_script_ends_it_as_shells_expect(scripted, monkeypatch):
    def interrupted(*_: Any) -> Engine:
        raise KeyboardInterrupt

    monkeypatch.setattr(chat_cli, "load_engine", interrupted)
    with pytest.raises(SystemExit) as error:
        scripted("-p", "hello")
    assert error.value.code == 130


@pytest.mark.parametrize(
    "wrong",
    [
        *(["-t", "-1"], ["-k", "-1"], ["--max_tokens", "0"], ["-i", "nowhere"], ["-d", "int8"]),
        *(["--context_limit=forget"], ["--quantize=int3"]),
    ],
)
def test_wrong_flags_end_in_one_line_and_exit_code_2(wrong, capsys):
    with pytest.raises(SystemExit) as error:
        chat_cli.main(wrong)
    assert error.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_without_a_checkpoint_the_way_out_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    with pytest.raises(SystemExit):
        chat_cli.main(["-p", "hello", "--device_type", "cpu"])
    assert "python -m scripts.chat_sft" in capsys.readouterr().err


ENTER, CTRL_D, UP = "\r", "\x04", "\x1b[A"
CHILD = """
from scripts import chat_cli
from tests.tiny_engine import engine_that_says
chat_cli.load_engine = lambda *args: engine_that_says(*b"ok")
chat_cli.main(["-t", "0", "--device_type=cpu"])
"""


def test_a_terminal_from_the_banner_to_ctrl_d(tmp_path):
    ours, theirs = pty.openpty()

    def in_its_terminal() -> None:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    (tmp_path / "chat_history").write_text("\n# then\n+of old\n")
    environment = {**os.environ, "NANOCHAT_BASE_DIR": str(tmp_path), "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD],
        stdin=theirs, stdout=theirs, stderr=theirs,
        env=environment,
        cwd=Path(__file__).parent.parent,
        preexec_fn=in_its_terminal,
    )  # fmt: skip
    os.close(theirs)
    screen = ""

    def wait_for(text: str, *, since: int) -> None:
        nonlocal screen
        deadline = time.monotonic() + 120
        while text not in screen[since:]:
            assert time.monotonic() < deadline, f"no {text!r} in {screen!r}"
            if select.select([ours], [], [], 1)[0]:
                screen += os.read(ours, 65536).decode(errors="replace")

    def type_(keys: str, expected: str) -> None:
        since = len(screen)
        os.write(ours, keys.encode())
        wait_for(expected, since=since)
        wait_for("User:", since=screen.index(expected, since))

    try:
        wait_for("User:", since=0)
        assert "/help for the commands" in screen
        type_("hello" + ENTER, "Assistant: ok")
        type_(UP + UP + ENTER, "Assistant: ok")
        type_("/help" + ENTER, "/save FILE")
        type_(f"/save {tmp_path}/saved" + ENTER, "(saved 4 messages")
        os.write(ours, CTRL_D.encode())
        assert child.wait(60) == 0
    finally:
        child.kill()
        child.wait()
        os.close(ours)
    saved = json.loads((tmp_path / "saved").read_text())["messages"]
    assert [m["content"] for m in saved] == ["hello", "ok", "of old", "ok"]
    assert "+hello" in (tmp_path / "chat_history").read_text()
