"""From the messages of a request to the prompt's ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nanochat.config import InputError
from nanochat.dialogue import ContextError, fit_prompt, parse_content
from nanochat.server.errors import ApiError
from nanochat.server.schemas import CompletionRequest, Message, PlainMessage
from nanochat.tokenizer import Tokenizer

MAX_MESSAGES = 500  # these three: of the reference's endpoint
MAX_MESSAGE_CHARS = 8_000
MAX_CONVERSATION_CHARS = 32_000

Turn = dict[str, Any]  # role and content, as nanochat/chat.py has them


def chat_ids(
    tokenizer: Tokenizer, turns: Sequence[Turn], context: int, max_tokens: int, drops: bool
) -> tuple[list[int], int]:
    """(the prompt, how many of the oldest messages were left out of it).

    A quarter of the context, or `max_tokens` if that is less, is kept free for the answer.

    Raises:
        ApiError: the conversation is malformed or, if nothing may be dropped, too long.
    """
    try:
        ids, dropped = fit_prompt(tokenizer, take_turns(turns), context, min(max_tokens, context // 4))
    except ContextError as error:
        raise too_long(str(error), "messages") from None
    except InputError as error:
        raise ApiError(400, str(error), param="messages", code="invalid_messages") from None
    if dropped and not drops:
        raise too_long(
            f"the conversation does not fit into this model's context of {context} tokens; leave out the oldest "
            f"{dropped} messages",
            "messages",
        )
    return ids, dropped


def completion_ids(tokenizer: Tokenizer, prompt: CompletionRequest, context: int) -> list[list[int]]:
    """The prompts of a completion: text behind <|bos|>, ids as they are.

    Raises:
        ApiError: an id that the tokenizer does not have, or a prompt that leaves no room for a token.
    """
    given: Any = prompt.prompt
    if isinstance(given, str) or isinstance(given[0], int):
        given = [given]
    bos = tokenizer.get_bos_token_id()
    prompts = [[bos, *tokenizer.encode(one)] if isinstance(one, str) else one for one in given]
    for ids in prompts:
        if max(ids) >= tokenizer.get_vocab_size():
            raise ApiError(400, f"prompt: there is no token {max(ids)}", param="prompt", code="invalid_prompt")
        if len(ids) >= context:
            raise too_long(
                f"the prompt has {len(ids)} tokens, but this model's context is {context}; shorten it", "prompt"
            )
    return prompts


def too_long(message: str, param: str) -> ApiError:
    return ApiError(400, message, param=param, code="context_length_exceeded")


def turns_of(messages: Sequence[Message]) -> list[Turn]:
    """Messages of /v1/chat/completions as the conversation format has them.

    Raises:
        ApiError: one is empty, or has parts that its role cannot have.
    """
    turns: list[Turn] = []
    for i, message in enumerate(messages):
        role = "system" if message.role == "developer" else message.role
        parts = message.content if message.parts is None or role != "assistant" else message.parts
        if role == "system" and any(turn["role"] != "system" for turn in turns):
            raise ApiError(
                400,
                f"messages.{i}: a system message stands before all others",
                param=f"messages.{i}.role",
                code="invalid_messages",
            )
        content: Any = parts
        if isinstance(parts, list):
            content = [{"type": part.type, "text": part.text} for part in parts]
            if role != "assistant":
                if any(part.type != "text" for part in parts):
                    raise ApiError(
                        400,
                        f"messages.{i}: only an assistant's message has tool calls",
                        param=f"messages.{i}.content",
                        code="invalid_messages",
                    )
                content = "".join(part.text for part in parts)
        if content is None or (role != "assistant" and not content):
            raise ApiError(400, f"messages.{i} is empty", param=f"messages.{i}.content", code="invalid_messages")
        turns.append({"role": role, "content": content})
    return turns


def plain_turns(messages: Sequence[PlainMessage]) -> list[Turn]:
    """Messages of the reference's endpoint, with its limits.

    Raises:
        InputError: what it refuses.
    """
    if not 1 <= len(messages) <= MAX_MESSAGES:
        raise InputError(f"there must be 1 to {MAX_MESSAGES} messages, got {len(messages)}")
    for i, message in enumerate(messages):
        if message.role not in ("user", "assistant") and (message.role, i) != ("system", 0):
            raise InputError(
                f"message {i} has role {message.role!r}; roles are user and assistant, and system for the first message"
            )
        if not message.content:
            raise InputError(f"message {i} is empty")
        if len(message.content) > MAX_MESSAGE_CHARS:
            raise InputError(
                f"message {i} has {len(message.content)} characters; at most {MAX_MESSAGE_CHARS} are allowed"
            )
    total = sum(len(message.content) for message in messages)
    if total > MAX_CONVERSATION_CHARS:
        raise InputError(f"the conversation has {total} characters; at most {MAX_CONVERSATION_CHARS} are allowed")
    return [
        {"role": m.role, "content": parse_content(m.content) if m.role == "assistant" else m.content} for m in messages
    ]


def take_turns(messages: Sequence[Turn]) -> list[Turn]:
    """Messages that take turns, user first, as the model was trained: neighbours of one role are joined by an
    empty line, and what an assistant said before the first user message is left out."""
    joined: list[Turn] = []
    for message in messages:
        role, content = message["role"], message["content"]
        if joined and joined[-1]["role"] == role:
            joined[-1]["content"] = _join(joined[-1]["content"], content)
        elif role != "assistant" or (joined and joined[-1]["role"] == "user"):
            joined.append({"role": role, "content": content})
    return joined


def _join(a: str | list[Turn], b: str | list[Turn]) -> str | list[Turn]:
    if isinstance(a, str) and isinstance(b, str):
        return f"{a}\n\n{b}"
    joined: list[Turn] = []
    for part in [*_parts(a), {"type": "text", "text": "\n\n"}, *_parts(b)]:
        if joined and joined[-1]["type"] == part["type"] == "text":  # encoded as one text, as it would be if it came so
            joined[-1] = {"type": "text", "text": joined[-1]["text"] + part["text"]}
        else:
            joined.append(part)
    return joined


def _parts(content: str | list[Turn]) -> list[Turn]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content
