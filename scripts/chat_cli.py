"""Talk to a chat model in the terminal.

    python -m scripts.chat_cli                          # the SFT model
    python -m scripts.chat_cli -i rl -p "What is 2+3?"  # one answer
    python -m scripts.chat_cli -p - <letter.txt         # one answer to a whole text
    python -m scripts.chat_cli <questions.txt           # a conversation, one message a line

/help lists the commands; Ctrl-C cuts an answer short, Ctrl-D leaves. Tool calls show as [12/60]=[0.2].
Outside a terminal, answers alone go to the standard output.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from nanochat import runtime
from nanochat.config import InputError, flag, run_cli
from nanochat.dialogue import load_engine
from nanochat.environment import base_dir
from nanochat.line_editor import typed_messages
from nanochat.quantize import QUANTIZED
from nanochat.signals import EXIT_AT_ONCE
from nanochat.terminal import Chat, Settings


@dataclass(frozen=True)
class ChatCliConfig:
    source: str = flag("sft", "stage whose checkpoint to load", choices=("mid", "sft", "rl"), short="-i")
    model_tag: str | None = flag(None, "checkpoint tag; None = the deepest, d4 before d4-own", short="-g")
    step: int | None = flag(None, "checkpoint step; None = the last", short="-s")
    prompt: str | None = flag(None, "answer this and exit; - = all of the standard input", short="-p")
    temperature: float = flag(0.6, "0 = always the most likely token", short="-t")
    top_k: int | None = flag(50, "sample among the k most likely tokens", off=0, short="-k")
    device_type: str | None = flag(None, "cuda, mps or cpu; empty = the best there is", off="")
    dtype: str | None = flag(None, "compute dtype; None = the device's own", choices=tuple(runtime.DTYPES), short="-d")
    max_tokens: int = flag(256, "tokens of an answer at most", new=True)
    seed: int = flag(42, "seed of the sampling", new=True)
    context_limit: str = flag(
        "drop",
        "a conversation longer than the context: drop its oldest turns, or refuse",
        choices=("drop", "refuse"),
        new=True,
    )
    quantize: str | None = flag(None, "weights of 8 bits: twice as fast on a CPU", choices=QUANTIZED, off="", new=True)

    def __post_init__(self) -> None:
        self.settings()  # refuses what is out of range

    def settings(self) -> Settings:
        return Settings(self.temperature, self.top_k, seed=self.seed, max_tokens=self.max_tokens)


def run(cfg: ChatCliConfig) -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # the locale may lack what the model writes
    try:
        _run(cfg)
    except BrokenPipeError:  # whoever read the answers has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still to be flushed
    except UnicodeDecodeError as error:
        raise InputError(f"the standard input is no {error.encoding} text: {error.reason}") from None
    except KeyboardInterrupt:
        raise SystemExit(EXIT_AT_ONCE) from None


def _run(cfg: ChatCliConfig) -> None:
    stdin = sys.stdin or io.StringIO()  # None where it was closed
    prompt = stdin.read() if cfg.prompt == "-" else cfg.prompt
    if prompt is not None and not prompt.strip():
        raise InputError("the prompt is empty; leave out -p to have a conversation")
    interactive = prompt is None and stdin.isatty() and sys.stdout.isatty()
    rt = runtime.start(cfg.device_type)
    engine = load_engine(cfg.source, rt, cfg.model_tag, cfg.step, cfg.dtype, cfg.quantize)
    notes = sys.stdout if interactive else sys.stderr
    chat = Chat(engine, cfg.settings(), sys.stdout, notes, interactive, cfg.context_limit == "drop")
    if prompt is not None:
        chat.answer(prompt)
    elif interactive:
        print("nanochat: type a message, /help for the commands, Ctrl-D to leave.")
        chat.talk(typed_messages(base_dir() / "chat_history", chat.note))
    else:
        chat.talk(stdin)


def main(argv: Sequence[str] | None = None) -> None:
    run_cli(ChatCliConfig, run, argv, about=__doc__)


if __name__ == "__main__":
    main()
