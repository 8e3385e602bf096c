"""Messages typed at a terminal: editing, history, several lines."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path


def typed_messages(history_file: Path, note: Callable[[str], None]) -> Iterator[str]:
    """What is typed, until Ctrl-D or a Ctrl-C after another one.

    Enter ends a message; Alt+Enter, or a backslash before Enter, begins another line of it; what is pasted stays whole.

    Args:
        history_file: what was typed, now and before; for its owner's eyes only.
        note: tells the user something.
    """
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory, History, InMemoryHistory

    class Kept(FileHistory):
        def store_string(self, string: str) -> None:
            with suppress(OSError):  # a full disk is no reason to end a conversation
                super().store_string(string)

    history: History
    try:
        os.close(os.open(history_file, os.O_CREAT | os.O_RDWR, 0o600))
        history = Kept(history_file)
    except OSError as error:
        note(f"no history: cannot write {history_file}: {error.strerror}")
        history = InMemoryHistory()

    session: PromptSession[str] = PromptSession("User: ", history=history, multiline=True, key_bindings=_keys())
    interrupted = False
    while True:
        try:
            print()
            text = session.prompt()
        except EOFError:
            return
        except KeyboardInterrupt:
            if interrupted:
                return
            interrupted = True
            note("Ctrl-D leaves, and so does another Ctrl-C")
            continue
        interrupted = False
        yield text


def _keys():  # type: ignore[no-untyped-def]  # of a library that is imported only here
    from prompt_toolkit.enums import DEFAULT_BUFFER
    from prompt_toolkit.filters import has_focus
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()
    typing = has_focus(DEFAULT_BUFFER)  # not searching the history, where Enter takes what was found

    @keys.add("enter", filter=typing)
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter", filter=typing)
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    return keys
