"""Conversations to token ids and loss mask: the one renderer for mid-training, SFT, RL, engine and server.

A conversation is {"messages": [{"role": ..., "content": ...}, ...]}. Roles take turns, user first; one system
message may stand before them. A content is a string; an assistant's may be a list of parts
{"type": "text" | "python" | "python_output", "text": ...}. Other keys of a conversation belong to its task.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nanochat.config import InputError

if TYPE_CHECKING:
    from nanochat.tokenizer import Tokenizer

Conversation = Mapping[str, Any]

# Part type -> (the special tokens around it, does the model learn to write it). Output comes from the tool.
PARTS: dict[str, tuple[tuple[str, str] | None, int]] = {
    "text": (None, 1),
    "python": (("<|python_start|>", "<|python_end|>"), 1),
    "python_output": (("<|output_start|>", "<|output_end|>"), 0),
}


def check_conversation(conversation: Any, where: str = "") -> None:
    """Refuse what cannot be rendered.

    Args:
        where: names the place for the reader of the error, such as "chats.jsonl line 3".

    Raises:
        InputError: no messages, roles out of turn, or a content of the wrong type.
    """

    def refuse(reason: str) -> None:
        raise InputError(f"{where or 'conversation'}: {reason}")

    messages = conversation.get("messages") if isinstance(conversation, Mapping) else None
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        refuse('it must be {"messages": [...]} with at least one message')
    assert messages is not None
    for message in messages:
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            refuse(f"a message must have role and content, got {_brief(message)}")
    turns = messages[1:] if messages[0]["role"] == "system" else messages
    if not turns:
        refuse("the system message must be followed by a user message")
    if turns is not messages and (reason := _content_fault(messages[0]["content"], parts_allowed=False)):
        refuse(f"message 0 (system): {reason}")
    offset = len(messages) - len(turns)
    for i, message in enumerate(turns):
        expected = "assistant" if i % 2 else "user"
        name = f"message {i + offset}"
        if message["role"] != expected:
            refuse(f"{name}: role is {message['role']!r}, not {expected!r} (they take turns, user first)")
        reason = _content_fault(message["content"], parts_allowed=expected == "assistant")
        if reason:
            refuse(f"{name} ({expected}): {reason}")


def _content_fault(content: Any, parts_allowed: bool) -> str | None:
    """Why a content cannot be rendered; None when it can."""
    if isinstance(content, str):
        return _text_fault(content)
    if not parts_allowed:
        return f"content must be a string, got {_brief(content)}"
    if not isinstance(content, Sequence):
        return f"content must be a string or a list of parts, got {_brief(content)}"
    before = None
    for part in content:
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            return f'a part must be {{"type": ..., "text": string}}, got {_brief(part)}'
        if part.get("type") not in PARTS:
            return f"part type {part.get('type')!r} is not known; use {', '.join(PARTS)}"
        if part["type"] == "python_output" and before != "python":
            return f"a python_output stands without a python part, its call, right before it: {_brief(part['text'])}"
        if fault := _text_fault(part["text"]):
            return fault
        before = part["type"]
    return None


def _text_fault(text: str) -> str | None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"half a surrogate pair, {text[error.start]!r}, stands at character {error.start}; it is no text"
    return None


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _turns(conversation: Conversation) -> list[Mapping[str, Any]]:
    """The messages, a leading system message put in front of the user's words; the input is left alone."""
    messages = list(conversation["messages"])
    if messages[0]["role"] == "system":
        system, user, *rest = messages
        messages = [{**user, "content": f"{system['content']}\n\n{user['content']}"}, *rest]
    return messages


def render_conversation(
    tokenizer: Tokenizer, conversation: Conversation, max_tokens: int = 2048
) -> tuple[list[int], list[int]]:
    """Token ids of a conversation and, for each, 1 where the assistant is to learn it.

    Learned: what the assistant writes, its tool calls and its closing token. Not learned: all that a user, a
    tool or the frame supplies. Both lists are cut to `max_tokens`, which may cost the closing token. No white
    space is added anywhere, and special-token strings inside texts stay plain text.

    Raises:
        InputError: the conversation is malformed (see check_conversation).
    """
    check_conversation(conversation)
    special = tokenizer.encode_special
    ids, mask = [tokenizer.get_bos_token_id()], [0]

    def add(new_ids: Sequence[int], learned: int) -> None:
        ids.extend(new_ids)
        mask.extend([learned] * len(new_ids))

    for message in _turns(conversation):
        content = message["content"]
        if message["role"] == "user":
            frame = special("<|user_start|>"), special("<|user_end|>")
            add([frame[0], *tokenizer.encode(content), frame[1]], 0)
            continue
        add([special("<|assistant_start|>")], 0)
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        for part in parts:
            around, learned = PARTS[part["type"]]
            text_ids = tokenizer.encode(part["text"])
            add([special(around[0]), *text_ids, special(around[1])] if around else text_ids, learned)
        add([special("<|assistant_end|>")], 1)
    return ids[:max_tokens], mask[:max_tokens]


def render_for_completion(tokenizer: Tokenizer, conversation: Conversation, max_tokens: int = 2048) -> list[int]:
    """The ids up to where the last assistant message would begin: the prompt that asks the model for it.

    The prompt is cut to `max_tokens` before `<|assistant_start|>` is appended.

    Raises:
        InputError: malformed, or the last message is not the assistant's.
    """
    check_conversation(conversation)
    *prompt, last = conversation["messages"]
    if last["role"] != "assistant":
        raise InputError(f"the last message must be the assistant's, which is left out, not {last['role']!r}'s")
    ids, _ = render_conversation(tokenizer, {"messages": prompt}, max_tokens)
    return [*ids, tokenizer.encode_special("<|assistant_start|>")]


def visualize_tokenization(
    tokenizer: Tokenizer, ids: Iterable[int], mask: Iterable[int], with_token_id: bool = False
) -> str:
    """Tokens joined by "|" for a terminal: green where learned, red elsewhere, the id in grey on request."""
    red, green, grey, plain = "\033[91m", "\033[92m", "\033[90m", "\033[0m"
    tokens = []
    for token_id, learned in zip(ids, mask, strict=True):
        token = f"{green if learned else red}{tokenizer.decode([token_id])}{plain}"
        tokens.append(token + (f"{grey}({token_id}){plain}" if with_token_id else ""))
    return "|".join(tokens)
