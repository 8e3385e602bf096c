"""From the tokens of an answer to what is sent of it: pieces of text and tool calls, and their logprobs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from nanochat.dialogue import PartsDecoder, StopStrings
from nanochat.engine import TokenLogprob
from nanochat.tokenizer import Tokenizer

LEAST_LOGPROB = -9999.0  # JSON has no infinity

Piece = tuple[str, str]  # (type of the part, text)


class TokenText(NamedTuple):
    """A token of the text, its logprob and those of the likeliest there; tokens are bytes, maybe of half a character."""

    token: bytes
    logprob: float
    top: list[tuple[bytes, float]]
    offset: int  # characters of the text before it


class ChoiceText:
    """One answer. A stop string is looked for in its text, not in tool calls, and not across them."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], shown: Mapping[str, str] | None = None) -> None:
        self.tokenizer = tokenizer
        self.decoder = PartsDecoder(tokenizer, shown)
        self.stop = StopStrings(stops)
        self.num_tokens = 0
        self.length = 0  # characters of the text, those held back included
        self.shown = 0  # without them
        self.waiting: list[TokenText] = []

    @property
    def stopped(self) -> bool:
        return self.stop.stopped

    def feed(self, ids: Sequence[int], logprobs: Sequence[TokenLogprob] = ()) -> list[Piece]:
        """What these tokens add, a piece each; ends with the token that completes a stop string."""
        pieces = []
        for i, token in enumerate(ids):
            self.num_tokens += 1
            type_, text = self.decoder.feed(token)
            if type_ == "text":
                if logprobs and token not in self.decoder.text.special:
                    self.waiting.append(self._token_text(token, logprobs[i]))
                self.length += len(text)
                text = self.stop.feed(text)
                if self.decoder.type != "text":
                    text += self.stop.flush()
                self.shown += len(text)
            if text:
                pieces.append((type_, text))
            if self.stopped:
                break
        return pieces

    def flush(self) -> list[Piece]:
        """At the end: what was held back, and half a character."""
        type_, text = self.decoder.flush()
        if type_ == "text":
            self.length += len(text)
            text = self.stop.feed(text) + self.stop.flush()
            self.shown += len(text)
        return [(type_, text)] if text else []

    def take_logprobs(self) -> list[TokenText]:
        """Of the tokens that begin in what was shown since the last time."""
        if not self.waiting:
            return []
        whole = not self.stopped and self.shown == self.length
        taken = [token for token in self.waiting if whole or token.offset < self.shown]
        self.waiting = [] if self.stopped else self.waiting[len(taken) :]
        return taken

    def _token_text(self, token: int, logprob: TokenLogprob) -> TokenText:
        top = [(self._bytes(other), max(value, LEAST_LOGPROB)) for other, value in logprob.top]
        return TokenText(self._bytes(token), max(logprob.logprob, LEAST_LOGPROB), top, self.length)

    def _bytes(self, token: int) -> bytes:
        return self.tokenizer.decode_bytes([token])
