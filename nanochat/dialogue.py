"""What every chat window needs: text that arrives in whole characters, and a prompt that fits the context."""

from __future__ import annotations

import codecs
import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from nanochat.checkpoint import load_model
from nanochat.config import InputError
from nanochat.engine import CACHE_BYTES, TOOL, Engine
from nanochat.quantize import quantize_int8
from nanochat.runtime import DTYPES, Runtime, available_memory
from nanochat.tokenizer import Tokenizer

# How a tool call reads in a stream: by its tokens' names, from which parse_content() makes it a call again ...
AS_TOKENS = {name: name for name in TOOL}
# ... or for people: [12/60]=[0.2]
AS_BRACKETS = dict(zip(TOOL, ("[", "]", "=[", "]"), strict=True))

_TOOL_PART = re.compile(
    r"<\|(python)_start\|>(.*?)(?:<\|python_end\|>|\Z)|<\|(output)_start\|>(.*?)(?:<\|output_end\|>|\Z)", re.DOTALL
)


class ContextError(InputError):
    """The prompt is too long for the model's context."""


class StreamingDecoder:
    """Tokens in, text out, never half a character: bytes wait for the rest of theirs.

    Special tokens are hidden, but for those that `shown` gives a text.
    """

    def __init__(self, tokenizer: Tokenizer, shown: Mapping[str, str] | None = None) -> None:
        self.tokenizer = tokenizer
        shown = shown or {}
        self.special = {tokenizer.encode_special(name): shown.get(name, "") for name in tokenizer.get_special_tokens()}
        self.bytes = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        """The text that this token completes; "" while a character is unfinished."""
        if token in self.special:
            return self.flush() + self.special[token]
        return self.bytes.decode(self.tokenizer.decode_bytes([token]))

    def flush(self) -> str:
        """At the end: bytes that never became a character, as U+FFFD."""
        return self.bytes.decode(b"", final=True)


class PartsDecoder:
    """Tokens in, pieces of a message's parts out (see chat.PARTS): tool calls and their outputs apart from the text,
    or within it, if `shown` gives their tokens a text.
    """

    def __init__(self, tokenizer: Tokenizer, shown: Mapping[str, str] | None = None) -> None:
        self.text = StreamingDecoder(tokenizer, shown)
        self.type = "text"
        specials = tokenizer.get_special_tokens()
        types = zip(TOOL, ("python", "text", "python_output", "text"), strict=True)
        self.begins = {tokenizer.encode_special(name): type_ for name, type_ in types if name in specials and not shown}

    def feed(self, token: int) -> tuple[str, str]:
        """(type of the part, the text that this token adds to it, which may be "")."""
        piece = self.type, self.text.feed(token)  # a tool's token first completes what stood before it
        self.type = self.begins.get(token, self.type)
        return piece

    def flush(self) -> tuple[str, str]:
        return self.type, self.text.flush()


class StopStrings:
    """Cuts a streamed text before the stop string that is complete first (of two that end together, the longer one).

    What may be the beginning of a stop string is held back until the text shows whether it is.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if "" in stops:
            raise InputError("a stop string must not be empty")
        self.stops = tuple(stops)
        self.held = ""
        self.stopped = False

    def feed(self, text: str) -> str:
        """What may be shown; once `stopped`, nothing more."""
        if self.stopped or not self.stops:
            return "" if self.stopped else text
        text = self.held + text
        found = [(at + len(stop), at) for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self.held = True, ""
            return text[: min(found)[1]]
        longest = min(len(text), max(map(len, self.stops)) - 1)
        keep = next(
            (n for n in range(longest, 0, -1) if text.endswith(tuple(s[:n] for s in self.stops if len(s) > n))), 0
        )
        shown, self.held = text[: len(text) - keep], text[len(text) - keep :]
        return shown

    def flush(self) -> str:
        """At the end: what was held back for nothing."""
        held, self.held = self.held, ""
        return held


def parse_content(text: str) -> str | list[dict[str, str]]:
    """An assistant's streamed text as a message content: its tool calls become parts again, an unfinished one too."""
    parts: list[dict[str, str]] = []
    at = 0
    for match in _TOOL_PART.finditer(text):
        if match.start() > at:
            parts.append({"type": "text", "text": text[at : match.start()]})
        if match[1]:
            parts.append({"type": "python", "text": match[2]})
        else:
            parts.append({"type": "python_output", "text": match[4]})
        at = match.end()
    if not parts:
        return text
    return [*parts, {"type": "text", "text": text[at:]}] if text[at:] else parts


def fit_prompt(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], context: int, reserve: int
) -> tuple[list[int], int]:
    """Ids that ask for the next assistant message, and how many of the oldest messages had to go.

    The oldest turns (a user's message and its answer) are dropped whole until `reserve` of the `context` tokens
    are left for the answer; a system message stays, and so does the last user message, for which one
    token to spare is enough.

    Args:
        messages: role and content each, taking turns, the last one the user's.

    Raises:
        InputError: the messages are malformed; ContextError: the last one alone does not fit.
    """
    if not messages or messages[-1]["role"] != "user":
        raise InputError("the last message must be the user's")
    system = list(messages[:1]) if messages[0]["role"] == "system" else []
    turns = list(messages[len(system) :])

    def render(dropped: int) -> list[int]:
        kept = [*system, *turns[2 * dropped :], {"role": "assistant", "content": ""}]
        return tokenizer.render_for_completion({"messages": kept}, max_tokens=1 << 40)

    last = len(turns) // 2  # the number of turns before the last message
    drop = bisect_left(range(last), True, key=lambda n: len(render(n)) <= context - reserve)
    ids = render(drop)
    if len(ids) >= context:
        raise ContextError(
            f"the message makes a prompt of {len(ids)} tokens, but this model's context is {context}; shorten it"
        )
    return ids, 2 * drop


def load_engine(
    source: str,
    rt: Runtime,
    tag: str | None = None,
    step: int | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
) -> Engine:
    """An engine for a checkpoint whose weights, no longer to be trained, are kept in the compute dtype, or quantized.

    Raises:
        InputError: no such checkpoint, or a damaged one.
    """
    if dtype is not None:
        rt = replace(rt, dtype=DTYPES[dtype])
    model, tokenizer, _ = load_model(source, rt, tag, step)
    if quantize:
        quantize_int8(model)
    for parameter in model.requires_grad_(False).parameters():  # not the buffers: scales of integers stay fp32
        parameter.data = parameter.data.to(rt.dtype)
    cache_bytes = min(CACHE_BYTES, int(available_memory(rt) // 2))  # the rest is for whatever else runs here
    return Engine(model.eval(), tokenizer, cache_bytes)
