"""From the tokens of an answer to what is sent of it: pieces of text and tool calls, and their logprobs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from nanochat.dialogue import PartsDecoder, StopStrings
from nanochat.sampling import TokenLogprobs
from nanochat.tokenizer import Tokenizer

LEAST_LOGPROB = -9999.0  # JSON has no infinity

Piece = tuple[str, str]  # (type of the part, text)


class TokenText(NamedTuple):
    """A token of the text, its logprob and those of the likeliest; a token is bytes, maybe half a character."""

    token: bytes
    logprob: float
    top: list[tuple[bytes, float]]
    offset: int  # characters of the text before it


class Choice:
    """One answer as it is written. A stop string is looked for in its text, not in tool calls, and not across them."""

    def __init__(
        self, tokenizer: Tokenizer, index: int, stops: Sequence[str], shown: Mapping[str, str] | None = None
    ) -> None:
        self.tokenizer, self.index = tokenizer, index
        self.decoder = PartsDecoder(tokenizer, shown)
        self.stop = StopStrings(stops)
        self.reason: str | None = None  # why it has ended: "stop" or "length"
        self.num_tokens = self.cached_tokens = 0
        self.pieces: list[Piece] = []  # not yet taken
        self.length = 0  # characters of the text, those held back included
        self.shown = 0  # without them
        self.logprobs: list[TokenText] = []  # of tokens whose text is not yet taken

    def feed(self, ids: Sequence[int], logprobs: Sequence[TokenLogprobs] = (), reason: str | None = None) -> None:
        """Tokens, and why they are the last. What comes behind a stop string is ignored."""
        for i, token in enumerate(ids):
            if self.stop.stopped:
                break
            self.num_tokens += 1
            at = self.length
            type_ = self._add(*self.decoder.feed(token))
            if logprobs and type_ == "text" and token not in self.decoder.text.special:
                self.logprobs.append(self._token_text(token, logprobs[i], at))
            if self.decoder.type != type_ == "text":
                self._show(self.stop.flush())  # a tool call begins
        if reason and not self.stop.stopped:
            self._add(*self.decoder.flush())
            self._show(self.stop.flush())
        self.reason = "stop" if self.stop.stopped else reason

    def take(self) -> tuple[list[Piece], list[TokenText]]:
        """What came since the last time: pieces, a token each, and the logprobs of tokens that begin in them."""
        pieces, self.pieces = self.pieces, []
        whole = not self.stop.stopped and self.shown == self.length
        taken = [token for token in self.logprobs if whole or token.offset < self.shown]
        self.logprobs = self.logprobs[len(taken) :]
        return pieces, taken

    def _add(self, type_: str, text: str) -> str:
        if type_ == "text":
            self.length += len(text)
            self._show(self.stop.feed(text))
        elif text:
            self.pieces.append((type_, text))
        return type_

    def _show(self, text: str) -> None:
        if text:
            self.pieces.append(("text", text))
            self.shown += len(text)

    def _token_text(self, token: int, logprob: TokenLogprobs, at: int) -> TokenText:
        top = [(self._bytes(other), max(value, LEAST_LOGPROB)) for other, value in logprob.top]
        return TokenText(self._bytes(token), max(logprob.logprob, LEAST_LOGPROB), top, at)

    def _bytes(self, token: int) -> bytes:
        return self.tokenizer.decode_bytes([token])
