"""The terminal chat: what it prints, what it remembers, what it refuses; and the streaming underneath."""

from __future__ import annotations

import io

import pytest

from nanochat.config import InputError
from nanochat.dialogue import AS_TOKENS, StreamingDecoder, fit_prompt, parse_content
from scripts import chat_cli
from scripts.chat_cli import Chat, ChatCliConfig
from tests.tiny_engine import scripted_engine, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
START, END = (TOKENIZER.encode_special(f"<|assistant_{x}|>") for x in ("start", "end"))


def chat_that_says(*ids: int, sequence_len: int = 64, **settings) -> Chat:
    engine = scripted_engine(TOKENIZER, START, *ids, END, sequence_len=sequence_len)
    return Chat(engine, ChatCliConfig(temperature=0.0, **settings), io.StringIO())


def said(chat: Chat) -> str:
    return chat.out.getvalue()  # type: ignore[attr-defined]


def test_characters_of_several_tokens_come_out_whole():
    decoder = StreamingDecoder(TOKENIZER)
    pieces = [decoder.feed(byte) for byte in "é🦜!".encode()]
    assert pieces == ["", "é", "", "", "", "🦜", "!"]


def test_bytes_that_never_become_a_character_show_as_a_replacement_mark():
    decoder = StreamingDecoder(TOKENIZER)
    assert [decoder.feed(b) for b in (0xC3, 65)] == ["", "\ufffdA"]
    assert decoder.feed(0xF0) == ""
    assert decoder.feed(END) == "\ufffd"  # a special token ends the character and is itself hidden
    assert decoder.flush() == ""


def test_streamed_tool_calls_become_parts_again():
    parts = [
        {"type": "text", "text": "so "},
        {"type": "python", "text": "12/60"},
        {"type": "python_output", "text": "0.2"},
        {"type": "text", "text": " hours"},
    ]
    conversation = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": parts}]}
    ids, _ = TOKENIZER.render_conversation(conversation)
    decoder = StreamingDecoder(TOKENIZER, AS_TOKENS)
    answer = ids[ids.index(START) :]
    text = "".join(map(decoder.feed, answer))
    assert parse_content(text) == parts
    assert parse_content("plain") == "plain"


def test_the_oldest_turns_are_dropped_whole_and_the_system_message_stays():
    turns = [("user", "a" * 20), ("assistant", "b" * 20), ("user", "c" * 20)]
    messages = [{"role": "system", "content": "S"}] + [{"role": r, "content": c} for r, c in turns]
    full, dropped = fit_prompt(TOKENIZER, messages, context=500, reserve=10)
    assert dropped == 0
    ids, dropped = fit_prompt(TOKENIZER, messages, context=len(full) + 9, reserve=10)
    assert dropped == 2
    assert TOKENIZER.decode(ids) == "<|bos|><|user_start|>S\n\n" + "c" * 20 + "<|user_end|><|assistant_start|>"
    assert fit_prompt(TOKENIZER, messages, context=len(full) + 10, reserve=10)[1] == 0


def test_a_message_that_fills_the_context_is_refused_and_one_token_less_is_not():
    message = [{"role": "user", "content": "hi"}]
    size = len(fit_prompt(TOKENIZER, message, 64, 1)[0])
    assert len(fit_prompt(TOKENIZER, message, size + 1, reserve=8)[0]) == size
    with pytest.raises(InputError, match=f"context is {size}"):
        fit_prompt(TOKENIZER, message, size, reserve=8)


def test_an_answer_is_streamed_without_special_tokens():
    chat = chat_that_says(*"Yé".encode())
    chat.answer("hello")
    assert said(chat) == "Yé\n"
    assert chat.messages == [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "Yé"}]


def test_tool_calls_are_shown_legibly_and_remembered_as_calls():
    python = [TOKENIZER.encode_special(f"<|python_{x}|>") for x in ("start", "end")]
    chat = chat_that_says(python[0], *b"6*7", python[1], max_tokens=9)
    chat.answer("6 times 7?")
    assert said(chat).startswith("[6*7]=[42]")
    python_part, output_part = chat.messages[1]["content"][:2]
    assert python_part == {"type": "python", "text": "6*7"}
    assert output_part == {"type": "python_output", "text": "42"}


def test_quit_exit_and_clear_are_commands_and_empty_lines_are_nothing():
    chat = chat_that_says(*b"ok")
    chat.talk(["", "  ", "one", "two", "clear", "three", " EXIT ", "four"])
    assert said(chat).count("Assistant: ok") == 3
    assert [m["content"] for m in chat.messages] == ["three", "ok"]


def test_a_full_context_forgets_the_oldest_turns_and_says_so():
    chat = chat_that_says(*b"ok", sequence_len=32)
    chat.talk(["x" * 12, "y" * 12])
    assert "the context of 32 tokens is full: the oldest 2 messages are forgotten" in said(chat)
    assert [m["content"] for m in chat.messages] == ["y" * 12, "ok"]


def test_a_message_too_long_alone_is_refused_in_one_line_and_the_chat_goes_on():
    chat = chat_that_says(*b"ok", sequence_len=32)
    chat.talk(["z" * 40, "hi"])
    assert "this model's context is 32; shorten it" in said(chat)
    assert said(chat).endswith("Assistant: ok\n")


def test_p_prints_one_answer_and_exits(monkeypatch, capsys):
    engine = scripted_engine(TOKENIZER, START, *b"ok", END)
    monkeypatch.setattr(chat_cli, "load_engine", lambda *args: engine)
    chat_cli.main(["-p", "hello", "-t", "0", "--device_type=cpu"])
    assert capsys.readouterr().out == "ok\n"


def test_the_end_of_input_ends_the_chat(monkeypatch, capsys):
    engine = scripted_engine(TOKENIZER, START, *b"ok", END)
    monkeypatch.setattr(chat_cli, "load_engine", lambda *args: engine)
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    chat_cli.main(["-t", "0", "--device_type", "cpu"])
    assert "Assistant: ok\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "wrong", [["-t", "-1"], ["-k", "-1"], ["--max_tokens", "0"], ["-i", "nowhere"], ["-d", "int8"]]
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
