"""A conversation in a terminal: what it shows, remembers and refuses; and the streaming underneath."""

from __future__ import annotations

import io
import json
import signal
from typing import Any

import pytest

from nanochat.config import InputError
from nanochat.dialogue import AS_TOKENS, StreamingDecoder, fit_prompt, parse_content
from nanochat.terminal import HELP, Chat, Settings
from tasks.customjson import CustomJSON
from tests.tiny_engine import TOKENIZER, engine_that_says, special

START, END = special("assistant_start"), special("assistant_end")


def chat_that_says(*ids: int, sequence_len: int = 64, drops_turns: bool = True, **settings: Any) -> Chat:
    engine = engine_that_says(*ids, sequence_len=sequence_len)
    out = io.StringIO()
    return Chat(engine, Settings(0.0, **settings), out, out, interactive=True, drops_turns=drops_turns)


def said(chat: Chat) -> str:
    return chat.out.getvalue()  # type: ignore[attr-defined]


def contents(chat: Chat, role: str = "user") -> list[Any]:
    return [message["content"] for message in chat.messages if message["role"] == role]


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
    assert parse_content("so <|python_start|>12") == [parts[0], {"type": "python", "text": "12"}]  # cut short


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
    assert said(chat) == "\nAssistant: Yé\n"
    assert chat.messages == [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "Yé"}]


def test_tool_calls_are_shown_legibly_and_remembered_as_calls():
    python = [TOKENIZER.encode_special(f"<|python_{x}|>") for x in ("start", "end")]
    chat = chat_that_says(python[0], *b"6*7", python[1], max_tokens=9)
    chat.answer("6 times 7?")
    assert said(chat).startswith("\nAssistant: [6*7]=[42]")
    python_part, output_part = chat.messages[1]["content"][:2]
    assert python_part == {"type": "python", "text": "6*7"}
    assert output_part == {"type": "python_output", "text": "42"}


def test_a_model_cannot_steer_the_terminal():
    chat = chat_that_says(*b"\x1b[2J\n\tok")
    chat.answer("hello")
    assert said(chat) == "\nAssistant: \ufffd[2J\n\tok\n"


def test_quit_exit_and_clear_are_commands_and_empty_lines_are_nothing():
    chat = chat_that_says(*b"ok")
    chat.talk(["", "  ", "one", "two", "clear", "three", " EXIT ", "four"])
    assert said(chat).count("Assistant: ok") == 3
    assert contents(chat) == ["three"]


def test_an_unknown_command_is_one_line_and_no_message():
    chat = chat_that_says(*b"ok")
    chat.talk(["/hlep me", "/"])
    assert said(chat) == "".join(f"(there is no command {c!r}; /help lists them)\n" for c in ("/hlep", "/"))
    assert not chat.messages


def test_help_names_every_command_and_a_space_sends_what_looks_like_one():
    chat = chat_that_says(*b"ok")
    chat.talk(["/help", " /help", "/quit", "lost"])
    assert said(chat) == HELP + "\n\nAssistant: ok\n"
    assert contents(chat) == ["/help"]


def test_clear_forgets_the_conversation_and_keeps_settings_and_system_message():
    chat = chat_that_says(*b"ok")
    chat.talk(["/system S", "/settings top_p 0.5", "one", "/clear"])
    assert (chat.messages, chat.system, chat.settings.top_p) == ([], "S", 0.5)


def test_the_system_message_reaches_the_model_until_it_is_taken_away():
    chat = chat_that_says(*b"ok")
    prompts: list[str] = []
    submit = chat.engine.submit
    chat.engine.submit = lambda ids, *args: prompts.append(TOKENIZER.decode(ids)) or submit(ids, *args)  # type: ignore
    chat.talk(["/system be kind\nbe brief", "hi", "/system", "/retry"])
    assert [("be kind\nbe brief\n\nhi" in p, "hi" in p) for p in prompts] == [(True, True), (False, True)]


def test_settings_are_shown_and_changed():
    chat = chat_that_says(*b"ok")
    chat.talk(["/settings", "/settings temperature 0.7", "/settings top_k=5", "/settings max_tokens 1", "hi"])
    first, *_ = said(chat).splitlines()
    assert first == ("(temperature 0  top_k 0  top_p 1.0  min_p 0  repetition_penalty 1.0  seed 42  max_tokens 256)")
    assert chat.settings == Settings(0.7, 5, max_tokens=1)
    assert said(chat).endswith("Assistant: o\n(cut short after 1 tokens: max_tokens)\n")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("temperature -1", "temperature must be 0 (greedy) or more, got -1.0"),
        ("temperature nan", "temperature must be 0 (greedy) or more, got nan"),
        ("top_k many", "top_k must be an integer, got 'many'"),
        ("top_p 1.5", "top_p must be above 0 and at most 1 (off), got 1.5"),
        ("max_tokens 0", "max_tokens must be at least 1, got 0"),
        ("heat 1", "there is no setting 'heat'; there are temperature, top_k"),
        ("logprobs 1", "there is no setting 'logprobs'"),
        ("top_p", "/settings takes a name and a value, got 'top_p'"),
    ],
)
def test_a_wrong_setting_is_one_line_and_changes_nothing(words, reason):
    chat = chat_that_says(*b"ok")
    chat.talk([f"/settings {words}"])
    assert said(chat).startswith(f"({reason}") and said(chat).count("\n") == 1
    assert chat.settings == Settings(0.0)


def test_retry_answers_anew_with_other_random_numbers():
    chat = chat_that_says()  # after the assistant's end any token may come
    chat.engine.model.table[:] = 0  # type: ignore[attr-defined]
    chat.settings = Settings(1.0, max_tokens=8)
    chat.talk(["/retry", "hi"])
    answers = [chat.messages[-1]["content"]]
    assert "no message to answer anew" in said(chat)
    for _ in range(2):
        chat.take("/retry")
        answers.append(chat.messages[-1]["content"])
    assert len(set(map(str, answers))) == 3
    assert contents(chat) == ["hi"]
    chat.talk(["/clear", "hi"])
    assert chat.messages[-1]["content"] == answers[0]


def test_saved_conversations_can_be_trained_on(tmp_path):
    python = [TOKENIZER.encode_special(f"<|python_{x}|>") for x in ("start", "end")]
    chat = chat_that_says(python[0], *b"6*7", python[1], max_tokens=9)
    file = tmp_path / "my chats.jsonl"
    file.write_text('[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]')  # no end of line
    chat.talk(["/system S", "é?", f"/save {file}", "/clear", "/system", "two", f"/save {file}"])
    assert said(chat).count(f"(saved 2 messages to {file})") == 2
    saved = [conversation["messages"] for conversation in CustomJSON(file)]
    assert [m["content"] for m in saved[1]][:2] == ["S", "é?"]
    assert saved[2] == chat.messages
    assert saved[2][1]["content"][0] == {"type": "python", "text": "6*7"}


def test_what_cannot_be_saved_is_said_in_a_line(tmp_path):
    chat = chat_that_says(*b"ok")
    chat.talk(["/save", f"/save {tmp_path}/x", "hi", f"/save {tmp_path}"])
    lines = said(chat).splitlines()
    assert lines[:2] == ["(/save needs the name of a file)", "(there is no conversation to save yet)"]
    assert lines[-1] == f"(cannot write {tmp_path}: Is a directory)"


def test_a_full_context_forgets_the_oldest_turns_and_says_so(tmp_path):
    chat = chat_that_says(*b"ok", sequence_len=32)
    chat.talk(["x" * 12, "y" * 12, "z" * 12, f"/save {tmp_path}/all"])
    assert "the context of 32 tokens is full: the oldest 2 messages are forgotten" in said(chat)
    assert "the oldest 4 messages are forgotten" in said(chat)
    assert len(json.loads((tmp_path / "all").read_text())["messages"]) == 6  # what one has read, one can save


def test_a_full_context_can_be_refused_and_the_conversation_stays():
    chat = chat_that_says(*b"ok", sequence_len=32, drops_turns=False)
    chat.talk(["x" * 12, "y" * 12])
    assert "does not fit into this model's context of 32 tokens; /clear begins a new one" in said(chat)
    assert contents(chat) == ["x" * 12]


def test_a_message_too_long_alone_is_refused_in_one_line_and_the_chat_goes_on():
    chat = chat_that_says(*b"ok", sequence_len=32)
    chat.talk(["z" * 40, "hi"])
    assert "this model's context is 32; shorten it" in said(chat)
    assert said(chat).endswith("Assistant: ok\n")


def test_half_a_surrogate_pair_is_refused_in_a_message_and_in_a_system_message():
    chat = chat_that_says(*b"ok")
    chat.talk(["\udc80", "/system \udc80", "hi"])
    assert said(chat).count("it is no text)") == 2
    assert not chat.messages


def test_ctrl_c_cuts_the_answer_short_and_the_chat_goes_on():
    chat = chat_that_says(*b"okay")

    class Interrupting(io.StringIO):
        def write(self, text: str) -> int:
            if text == "k" and len(contents(chat)) == 0:
                signal.raise_signal(signal.SIGINT)
            return super().write(text)

    chat.out = Interrupting()
    before = signal.getsignal(signal.SIGINT)
    chat.talk(["one", "two"])
    assert said(chat) == "\nAssistant: ok\n\nAssistant: okay\n"
    assert contents(chat, "assistant") == ["ok", "okay"]
    assert chat.engine.stats()["running"] == 0
    assert signal.getsignal(signal.SIGINT) is before
