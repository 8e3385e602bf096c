"""Talk to a chat model in the terminal.

    python -m scripts.chat_cli                        # the SFT model
    python -m scripts.chat_cli -i rl -p "What is 2+3?"  # one answer

"clear" begins a new conversation; "quit", "exit" or the end of input leaves; Ctrl-C cuts an answer short.
Tool calls show as [12/60]=[0.2].
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from nanochat import runtime
from nanochat.config import InputError, flag, run_cli
from nanochat.dialogue import AS_BRACKETS, AS_TOKENS, StreamingDecoder, fit_prompt, load_engine, parse_content
from nanochat.engine import Engine


@dataclass(frozen=True)
class ChatCliConfig:
    source: str = flag("sft", "stage whose checkpoint to load", choices=("mid", "sft", "rl"), short="-i")
    model_tag: str | None = flag(None, "checkpoint tag; None = the deepest", short="-g")
    step: int | None = flag(None, "checkpoint step; None = the last", short="-s")
    prompt: str | None = flag(None, "answer this and exit", off="", short="-p")
    temperature: float = flag(0.6, "0 = always the most likely token", short="-t")
    top_k: int | None = flag(50, "sample among the k most likely tokens", off=0, short="-k")
    device_type: str | None = flag(None, "cuda, mps or cpu; empty = the best there is", off="")
    dtype: str | None = flag(None, "compute dtype; None = the device's own", choices=tuple(runtime.DTYPES), short="-d")
    max_tokens: int = flag(256, "tokens of an answer at most", new=True)
    seed: int = flag(42, "seed of the sampling", new=True)

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"--temperature must be 0 or more, got {self.temperature}")
        if self.top_k is not None and self.top_k < 0:
            raise InputError(f"--top_k must be 0 (off) or more, got {self.top_k}")
        if self.max_tokens < 1:
            raise InputError(f"--max_tokens must be at least 1, got {self.max_tokens}")


class Chat:
    """One conversation in a terminal."""

    def __init__(self, engine: Engine, cfg: ChatCliConfig, out: TextIO) -> None:
        self.engine, self.cfg, self.out = engine, cfg, out
        self.messages: list[dict[str, Any]] = []

    def say(self, text: str) -> None:
        self.out.write(text)
        self.out.flush()

    def answer(self, text: str) -> None:
        """Stream the answer to the user's text; what does not fit the context leaves the conversation.

        Raises:
            InputError: the text alone is too long for the context; the conversation is as before.
        """
        cfg, tokenizer = self.cfg, self.engine.tokenizer
        context = self.engine.model.config.sequence_len
        messages: list[dict[str, Any]] = [*self.messages, {"role": "user", "content": text}]
        ids, dropped = fit_prompt(tokenizer, messages, context, min(cfg.max_tokens, context // 4))
        if dropped:
            self.say(f"(the context of {context} tokens is full: the oldest {dropped} messages are forgotten)\n")
        shown = StreamingDecoder(tokenizer, AS_BRACKETS)
        kept = StreamingDecoder(tokenizer, AS_TOKENS)
        reply = ""
        try:
            stream = self.engine.generate(
                ids,
                max_tokens=min(cfg.max_tokens, context - len(ids)),
                temperature=cfg.temperature,
                top_k=cfg.top_k,
                seed=cfg.seed,
            )
            for (token,), _ in stream:
                reply += kept.feed(token)
                self.say(shown.feed(token))
        except KeyboardInterrupt:
            pass  # what has been said stands
        self.say(shown.flush() + "\n")
        reply += kept.flush()
        self.messages = [*messages[dropped:], {"role": "assistant", "content": parse_content(reply)}]

    def talk(self, lines: Iterable[str]) -> None:
        for line in lines:
            text = line.strip()
            if text.lower() in ("quit", "exit"):
                break
            if text.lower() == "clear":
                self.messages = []
                self.say("(new conversation)\n")
            elif text:
                try:
                    self.say("\nAssistant: ")
                    self.answer(text)
                except InputError as error:
                    self.say(f"({error})\n")


def _typed_lines() -> Iterable[str]:
    """Lines from the terminal until its end or Ctrl-C."""
    while True:
        try:
            yield input("\nUser: ")
        except (EOFError, KeyboardInterrupt):
            print()
            return


def run(cfg: ChatCliConfig) -> None:
    rt = runtime.start(cfg.device_type)
    chat = Chat(load_engine(cfg.source, rt, cfg.model_tag, cfg.step, cfg.dtype), cfg, sys.stdout)
    if cfg.prompt is not None:
        chat.answer(cfg.prompt)
        return
    print('nanochat: type a message, "clear" for a new conversation, "quit" to leave.')
    chat.talk(_typed_lines())


def main(argv: Sequence[str] | None = None) -> None:
    run_cli(ChatCliConfig, run, argv, about=__doc__)


if __name__ == "__main__":
    main()
