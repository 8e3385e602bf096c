"""Your own conversations: a JSONL file, one conversation a line.

[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hello."}]
{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hello."}]}
"""

from __future__ import annotations

import json
from array import array
from pathlib import Path
from typing import Any

from nanochat.chat import check_conversation
from nanochat.config import InputError
from tasks.common import Conversation, Task


def parse_line(line: str, where: str) -> Conversation:
    """One line's conversation.

    Raises:
        InputError: it is no JSON, or no conversation that ends with the assistant.
    """
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: no JSON ({error})") from None
    conversation = {"messages": value} if isinstance(value, list) else value
    check_conversation(conversation, where)
    roles = [message["role"] for message in conversation["messages"]]
    if roles[-1] != "assistant":
        raise InputError(f"{where}: the last message is the {roles[-1]}'s; there is no answer to learn")
    return conversation


class CustomJSON(Task):
    """The conversations of a file in its order. Every line is checked at once, and read again when asked
    for, so that a large file does not stay in memory.

    Raises:
        InputError: the file is missing or holds nothing, or a line is malformed (named by its number).
    """

    def __init__(self, path: str | Path, **slicing: Any) -> None:
        super().__init__(**slicing)
        self.path = Path(path)
        if not self.path.is_file():
            raise InputError(
                f"no conversations file {self.path}; write one JSON list of messages a line, or leave it out"
            )
        self.offsets = array("q")
        with self.path.open("rb") as f:
            offset = 0
            for number, line in enumerate(f, start=1):
                where = f"{self.path} line {number}"
                if line.strip():
                    parse_line(self._decode(line, where), where)
                    self.offsets.append(offset)
                offset += len(line)
        if not self.offsets:
            raise InputError(f"{self.path} holds no conversation; write one JSON list of messages a line")

    @staticmethod
    def _decode(line: bytes, where: str) -> str:
        try:
            return line.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise InputError(f"{where}: no UTF-8 ({error.reason} at byte {error.start})") from None

    def num_examples(self) -> int:
        return len(self.offsets)

    def get_example(self, index: int) -> Conversation:
        where = f"{self.path} example {index}"
        with self.path.open("rb") as f:
            f.seek(self.offsets[index])
            return parse_line(self._decode(f.readline(), where), where)
