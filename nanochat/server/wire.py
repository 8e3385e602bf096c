"""Answers as bytes: OpenAI's chat and completion objects and chunks, and the reference's events.

A chunk is put together from texts made once per answer and one dump: with many clients that is what streaming costs.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

from nanochat.server.pool import Generation
from nanochat.server.text import Choice, Piece, TokenText

dumps = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


class ChatWire:
    prefix, chunk_object, whole_object = "chatcmpl", "chat.completion.chunk", "chat.completion"

    def __init__(self, model: str, with_logprobs: bool = False, with_usage: bool = False, dropped: int = 0) -> None:
        self.id, self.created, self.model = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time()), model
        self.with_logprobs, self.with_usage, self.dropped = with_logprobs, with_usage, dropped
        self.head = self._chunk_head()
        self.tail = ',"usage":null}\n\n' if with_usage else "}\n\n"

    def _fields(self, object_: str) -> dict[str, Any]:
        return {"id": self.id, "object": object_, "created": self.created, "model": self.model}

    def _chunk_head(self) -> str:
        return "data: " + dumps(self._fields(self.chunk_object))[:-1] + ',"choices":['

    def begin(self, choices: int) -> str:
        dropped = f',"dropped_messages":{self.dropped}' if self.dropped else ""
        chunks = [self._chunk(i, '"delta":{"role":"assistant","content":""}') for i in range(choices)]
        return chunks[0].removesuffix(self.tail) + dropped + self.tail + "".join(chunks[1:])

    def _chunk(self, index: int, content: str, logprobs: str = "null", reason: str = "null") -> str:
        return f'{self.head}{{"index":{index},{content},"logprobs":{logprobs},"finish_reason":{reason}}}]{self.tail}'

    def pieces(self, choice: Choice) -> str:
        """What is new of a choice, maybe nothing."""
        chunks, index = [], choice.index
        pieces, tokens = choice.take()
        logprobs = dumps(self._logprobs(tokens)) if tokens else "null"
        for type_, text in _joined(pieces):
            text = dumps(text)
            if type_ == "text":
                chunks.append(self._chunk(index, f'"delta":{{"content":{text}}}', logprobs))
                logprobs = "null"
            else:
                chunks.append(self._chunk(index, f'"delta":{{"parts":[{{"type":"{type_}","text":{text}}}]}}'))
        if logprobs != "null":  # tokens of half a character, so far without text
            chunks.append(self._chunk(index, '"delta":{}', logprobs))
        return "".join(chunks)

    def finish(self, choice: Choice) -> str:
        return self._chunk(choice.index, '"delta":{}', reason=f'"{choice.reason}"')

    def close(self, usage: dict[str, Any]) -> str:
        last = self.head + "]," + f'"usage":{dumps(usage)}}}\n\n' if self.with_usage else ""
        return last + "data: [DONE]\n\n"

    def error(self, body: dict[str, Any]) -> str:
        return f"data: {dumps(body)}\n\n"

    def whole(self, choices: Iterable[Choice], usage: dict[str, Any]) -> dict[str, Any]:
        """The object of an answer that is not streamed."""
        dropped = {"dropped_messages": self.dropped} if self.dropped else {}
        return {
            **self._fields(self.whole_object),
            "choices": [self._choice(choice) for choice in choices],
            "usage": usage,
            **dropped,
        }

    def _choice(self, choice: Choice) -> dict[str, Any]:
        pieces, tokens = choice.take()
        return {
            "index": choice.index,
            **self._content(pieces),
            "logprobs": self._logprobs(tokens) if self.with_logprobs else None,
            "finish_reason": choice.reason,
        }

    def _content(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        parts = [{"type": type_, "text": text} for type_, text in _joined(pieces)]
        content = "".join(text for type_, text in pieces if type_ == "text")
        return {"message": {"role": "assistant", "content": content, "parts": parts}}

    def _logprobs(self, tokens: Sequence[TokenText]) -> dict[str, Any]:
        content = [
            {**_likely(t.token, t.logprob), "top_logprobs": [_likely(token, value) for token, value in t.top]}
            for t in tokens
        ]
        return {"content": content, "refusal": None}


class CompletionWire(ChatWire):
    prefix, chunk_object, whole_object = "cmpl", "text_completion", "text_completion"

    def begin(self, choices: int) -> str:
        return ""

    def pieces(self, choice: Choice) -> str:
        pieces, tokens = choice.take()
        if not pieces and not tokens:
            return ""
        text = dumps("".join(text for _, text in pieces))
        return self._chunk(choice.index, f'"text":{text}', dumps(self._logprobs(tokens)) if tokens else "null")

    def finish(self, choice: Choice) -> str:
        return self._chunk(choice.index, '"text":""', reason=f'"{choice.reason}"')

    def _content(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        return {"text": "".join(text for _, text in pieces)}

    def _logprobs(self, tokens: Sequence[TokenText]) -> dict[str, Any]:
        return {
            "tokens": [_text(t.token) for t in tokens],
            "token_logprobs": [t.logprob for t in tokens],
            "top_logprobs": [{_text(token): value for token, value in t.top} for t in tokens],
            "text_offset": [t.offset for t in tokens],
        }


class PlainWire(ChatWire):
    """The reference's events, a token each."""

    def __init__(self, generation: Generation) -> None:
        super().__init__("")
        self.generation = generation

    def begin(self, choices: int) -> str:
        return ""

    def pieces(self, choice: Choice) -> str:
        pieces, _ = choice.take()
        events = [
            json.dumps({"token": text, "gpu": self.generation.worker_id}, ensure_ascii=False) for _, text in pieces
        ]
        return "".join(f"data: {event}\n\n" for event in events)

    def finish(self, choice: Choice) -> str:
        return ""

    def close(self, usage: dict[str, Any]) -> str:
        return 'data: {"done": true}\n\n'


def _joined(pieces: Sequence[Piece]) -> list[Piece]:
    """Neighbours of one type as one."""
    return [(type_, "".join(text for _, text in group)) for type_, group in groupby(pieces, key=lambda piece: piece[0])]


def usage(prompt: int, completion: int, cached: int) -> dict[str, Any]:
    """Token counts; `completion` has the token that ends an answer too."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def _text(token: bytes) -> str:
    return token.decode("utf-8", "replace")


def _likely(token: bytes, logprob: float) -> dict[str, Any]:
    return {"token": _text(token), "logprob": logprob, "bytes": list(token)}
