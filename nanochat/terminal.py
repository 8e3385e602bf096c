"""A conversation in a terminal or a pipe: messages and /commands in, answers out."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TextIO

from nanochat.config import InputError
from nanochat.dialogue import AS_BRACKETS, AS_TOKENS, StreamingDecoder, fit_prompt, parse_content
from nanochat.engine import Engine
from nanochat.sampling import Sampling

HELP = """\
/help                   this list
/clear                  begin a new conversation
/retry                  answer the last message anew
/system TEXT            system message of the conversation; without TEXT: none
/settings               how answers are sampled
/settings NAME VALUE    change that
/save FILE              append the conversation to FILE, as --conversations reads it
/quit                   leave; so does Ctrl-D
Alt+Enter, or \\ at the end of a line, begins another line. Ctrl-C cuts an answer short.
A message that begins with a slash needs a space before it."""

# The model's words shall not move the cursor, or set the title, of the terminal that shows them.
CONTROLS = dict.fromkeys([*range(32), *range(127, 160)], "\ufffd")
del CONTROLS[ord("\n")], CONTROLS[ord("\t")]


@dataclass(frozen=True)
class Settings(Sampling):
    """How answers are sampled, and how many tokens they have at most."""

    max_tokens: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_tokens < 1:
            raise InputError(f"max_tokens must be at least 1, got {self.max_tokens}")

    @property
    def kinds(self) -> dict[str, type]:
        """Name -> type of what a user may set."""
        return {f.name: float if type(f.default) is float else int for f in fields(self) if f.name != "logprobs"}

    def changed(self, name: str, text: str) -> Settings:
        """With another value, as typed.

        Raises:
            InputError: no such setting, or a wrong value.
        """
        if name not in self.kinds:
            raise InputError(f"there is no setting {name!r}; there are {', '.join(self.kinds)}")
        kind = self.kinds[name]
        try:
            value = kind(text)
        except ValueError:
            raise InputError(f"{name} must be {'an integer' if kind is int else 'a number'}, got {text!r}") from None
        return replace(self, **{name: value})

    def __str__(self) -> str:
        return "  ".join(f"{name} {getattr(self, name) or 0}" for name in self.kinds)


class Chat:
    """One conversation.

    Args:
        out: for the answers.
        notes: for what else there is to say.
        interactive: a person reads along: answers are announced, wrong input is explained and the talk goes on, Ctrl-C
            ends an answer only.
        drops_turns: what no longer fits the context is forgotten, the oldest turns first; else the message is refused.
    """

    def __init__(
        self,
        engine: Engine,
        settings: Settings,
        out: TextIO,
        notes: TextIO,
        interactive: bool = False,
        drops_turns: bool = True,
    ) -> None:
        self.engine, self.settings = engine, settings
        self.out, self.notes = out, notes
        self.interactive, self.drops_turns = interactive, drops_turns
        self.system = ""
        self.interrupted = False
        self.clear()

    def clear(self) -> None:
        self.messages: list[dict[str, Any]] = []  # without the system message
        self.forgotten = 0  # of them, the oldest: the model does not see these any more
        self.retries = 0  # of the last message

    def say(self, text: str) -> None:
        self.out.write(text.translate(CONTROLS) if self.interactive else text)
        self.out.flush()

    def note(self, text: str) -> None:
        self.notes.write(f"({text})\n")
        self.notes.flush()

    def talk(self, texts: Iterable[str]) -> None:
        """Take messages and commands until there are no more, or one leaves.

        Raises:
            InputError: one is wrong, and nobody is there to see it.
        """
        with self._ctrl_c():
            for text in texts:
                if text.strip().lower() in ("quit", "exit", "/quit"):
                    return
                try:
                    self.take(text)
                except InputError as error:
                    if not self.interactive:
                        raise
                    self.note(str(error))

    @contextmanager
    def _ctrl_c(self) -> Iterator[None]:
        """Let Ctrl-C end an answer between two tokens, so that the engine stays whole; a second one ends all."""

        def interrupt(*_: Any) -> None:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True

        if not self.interactive:
            yield
            return
        before = signal.signal(signal.SIGINT, interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def take(self, text: str) -> None:
        """A message, a command, or nothing.

        Raises:
            InputError: a wrong command, or a message that cannot be answered.
        """
        if text.startswith("/"):
            self._command(*text.split(maxsplit=1))
        elif text.strip().lower() == "clear":
            self._command("/clear")
        elif text.strip():
            self.answer(text)

    def _command(self, name: str, rest: str = "") -> None:
        rest = rest.strip()
        match name:
            case "/help":
                self.notes.write(f"{HELP}\n")
            case "/clear":
                self.clear()
                self.note("new conversation")
            case "/retry":
                self.retry()
            case "/system":
                self.system = rest
                self.note(f"system message: {rest}" if rest else "no system message")
            case "/settings":
                self._set(rest.replace("=", " ").split())
            case "/save":
                self.save(rest)
            case _:
                raise InputError(f"there is no command {name[:40]!r}; /help lists them")

    def _set(self, words: list[str]) -> None:
        if words:
            if len(words) != 2:
                raise InputError(f"/settings takes a name and a value, got {' '.join(words)!r}")
            self.settings = self.settings.changed(*words)
        self.note(str(self.settings))

    def save(self, name: str) -> None:
        """Append the conversation, what was forgotten too, as a line of JSON."""
        if not name:
            raise InputError("/save needs the name of a file")
        if not self.messages:
            raise InputError("there is no conversation to save yet")
        line = json.dumps({"messages": [*self._system, *self.messages]}, ensure_ascii=False)
        try:
            with Path(name).expanduser().open("ab+") as file:
                if file.tell():
                    file.seek(-1, 2)
                    line = line if file.read() == b"\n" else f"\n{line}"  # the file's last line may lack its end
                file.write(f"{line}\n".encode())
        except OSError as error:
            raise InputError(f"cannot write {name}: {error.strerror}") from None
        self.note(f"saved {len(self.messages)} messages to {name}")

    def retry(self) -> None:
        """Answer the last message anew, with other random numbers."""
        if not self.messages:
            raise InputError("there is no message to answer anew yet")
        *before, user, _ = self.messages
        if self.settings.temperature == 0:
            self.note("temperature 0 gives the same answer again; /settings temperature 0.6 gives others")
        self._answer(before, user["content"], self.retries + 1)

    def answer(self, text: str) -> None:
        """Stream the answer to the user's text.

        Raises:
            InputError: it does not fit the context; the conversation is as before.
        """
        self._answer(self.messages, text.strip(), 0)

    @property
    def _system(self) -> list[dict[str, Any]]:
        return [{"role": "system", "content": self.system}] if self.system else []

    def _answer(self, before: list[dict[str, Any]], text: str, sample: int) -> None:
        settings, tokenizer = self.settings, self.engine.tokenizer
        messages = [*before, {"role": "user", "content": text}]
        ids = self._prompt(messages)
        if self.interactive:
            self.say("\nAssistant: ")
        shown = StreamingDecoder(tokenizer, AS_BRACKETS)
        kept = StreamingDecoder(tokenizer, AS_TOKENS)
        reply = ""
        self.interrupted = False
        room = self.engine.model.config.sequence_len - len(ids)
        request = self.engine.submit(ids, min(settings.max_tokens, room), settings, sample)
        while not request.done:
            written = len(request.ids)
            self.engine.step()
            for token in request.ids[written:]:
                reply += kept.feed(token)
                self.say(shown.feed(token))
            if self.interrupted:
                self.engine.cancel(request)  # what has been said stands
        self.say(shown.flush() + "\n")
        if request.finish_reason == "length":
            why = "max_tokens" if len(request.ids) == settings.max_tokens else "the context is full"
            self.note(f"cut short after {len(request.ids)} tokens: {why}")
        reply += kept.flush()
        self.messages = [*messages, {"role": "assistant", "content": parse_content(reply)}]
        self.retries = sample

    def _prompt(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Ids of what the model is to see of the messages, of which a quarter of the context is kept free."""
        context = self.engine.model.config.sequence_len
        seen = [*self._system, *messages[self.forgotten :]]
        ids, dropped = fit_prompt(self.engine.tokenizer, seen, context, min(self.settings.max_tokens, context // 4))
        if dropped and not self.drops_turns:
            raise InputError(
                f"the conversation does not fit into this model's context of {context} tokens; /clear begins a new one"
            )
        if dropped:
            self.forgotten += dropped
            self.note(f"the context of {context} tokens is full: the oldest {self.forgotten} messages are forgotten")
        return ids
