"""Your own conversations: a JSONL file, one conversation a line, in any of three shapes.

[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hello."}]
{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hello."}]}
{"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "Hello."}]}
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nanochat.chat import check_conversation
from nanochat.config import InputError
from tasks.common import Conversation, Task

SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}  # other names stay as they are
FAULTS_SHOWN = 3
HELD_OUT = 10  # every tenth example, at the end, where some are held out


def parse_line(line: str, where: str) -> Conversation:
    """One line's conversation.

    Raises:
        InputError: it is no JSON, or no conversation that ends with an answer to learn.
    """
    value = load_line(line, where)
    if isinstance(value, dict) and "messages" not in value and isinstance(value.get("conversations"), list):
        value = [_from_sharegpt(message) for message in value["conversations"]]
    conversation = {"messages": value} if isinstance(value, list) else value
    check_conversation(conversation, where)
    messages = conversation["messages"]
    if messages[-1]["role"] != "assistant":
        raise InputError(f"{where}: the last message is the {messages[-1]['role']}'s; there is no answer to learn")
    if not any(says_something(m["content"]) for m in messages if m["role"] == "assistant"):
        raise InputError(f"{where}: all that the assistant says is empty; there is no answer to learn")
    return conversation


def load_line(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{where}: no JSON ({error})") from None


def _from_sharegpt(message: Any) -> Any:
    if not isinstance(message, dict) or not {"from", "value"} <= message.keys():
        return message
    role = message["from"]
    return {"role": SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role, "content": message["value"]}


def _some(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:10])) + (", ..." if len(numbers) > 10 else "")


def says_something(content: Any) -> bool:
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return any(part["text"].strip() for part in parts if part["type"] != "python_output")


class CustomJSON(Task):
    """The conversations of a file in its order. Every line is checked at once, and read again when asked
    for, so that a large file does not stay in memory.

    Raises:
        InputError: the file is missing or holds nothing, or lines are malformed (the first ones are named).
    """

    noun, form = "conversation", "one JSON list of messages a line"
    parse: Callable[[str, str], Conversation] = staticmethod(parse_line)

    def __init__(self, path: str | Path, **slicing: Any) -> None:
        super().__init__(**slicing)
        self.path = Path(path)
        if not self.path.is_file():
            raise InputError(f"no {self.noun}s file {self.path}; write {self.form}, or leave it out")
        self.offsets, self.lines = array("q"), array("q")
        faults: list[str] = []
        with self.path.open("rb") as f:
            offset = 0
            for number, line in enumerate(f, start=1):
                if line.strip():
                    self.offsets.append(offset)
                    self.lines.append(number)
                    try:
                        self.parse(self._decode(line, f"line {number}"), f"line {number}")
                    except InputError as error:
                        faults.append(str(error))
                offset += len(line)
        if not self.offsets:
            raise InputError(f"{self.path} holds no {self.noun}; write {self.form}")
        if faults:
            more = f"; and {len(faults) - FAULTS_SHOWN} more" if len(faults) > FAULTS_SHOWN else ""
            total = f" ({len(faults)} of {len(self.offsets)} {self.noun}s are malformed)" if len(faults) > 1 else ""
            raise InputError(f"{self.path} {'; '.join(faults[:FAULTS_SHOWN])}{more}{total}")

    @staticmethod
    def _decode(line: bytes, where: str) -> str:
        try:
            return line.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise InputError(f"{where}: no UTF-8 ({error.reason} at byte {error.start})") from None

    @classmethod
    def split(cls, path: str | Path) -> tuple[CustomJSON, CustomJSON]:
        """(training, held-out) examples.

        Raises:
            InputError: a malformed line, or too few to hold one out.
        """
        n = len(cls(path))
        if n < 2:
            raise InputError(f"{path} holds {n} {cls.noun}; at least 2 are needed, as one is held out")
        cut = n - max(1, n // HELD_OUT)
        return cls(path, stop=cut), cls(path, start=cut)

    def rendered(self, example: Conversation) -> list[Conversation]:
        """What of an example is rendered."""
        return [example]

    def describe_crops(self, tokenizer: Any, max_tokens: int) -> str | None:
        """Which examples have more tokens than a row, as one line; None = none of them."""
        long, lost = [], []
        for number, example in zip(self.lines[self.start : self.stop : self.step], self, strict=True):
            rendered = [tokenizer.render_conversation(c, 1 << 30) for c in self.rendered(example)]
            if any(len(ids) > max_tokens for ids, _ in rendered):
                long.append(number)
                if not any(any(mask[:max_tokens]) for _, mask in rendered):
                    lost.append(number)
        if not long:
            return None
        text = f"{len(long)} of {len(self)} {self.noun}s of {self.path} are longer than the context and are cut there"
        text += f" (lines {_some(long)})"
        return text + (f"; {len(lost)} of them have nothing left to learn (lines {_some(lost)})" if lost else "")

    def num_examples(self) -> int:
        return len(self.offsets)

    def get_example(self, index: int) -> Conversation:
        where = f"{self.path} example {index}"
        with self.path.open("rb") as f:
            f.seek(self.offsets[index])
            return self.parse(self._decode(f.readline(), where), where)
