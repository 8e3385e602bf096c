"""Whether a response is right. Any text may come; what a model wrote is never an error."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_TOOL_BLOCKS = re.compile(
    r"<\|python_start\|>.*?(<\|python_end\|>|$)|<\|output_start\|>.*?(<\|output_end\|>|$)", re.DOTALL
)
_SPECIAL = re.compile(r"<\|\w+\|>")


def has_word(text: str, word: str) -> bool:
    """Whether `word` stands in `text` whole ("one" is not in "twenty-one"). Words of up to two letters, such as
    the symbols of elements, must match in case too."""
    flags = 0 if len(word) <= 2 else re.IGNORECASE
    return re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", text, flags) is not None


def is_right_fact(conversation: Mapping[str, Any], response: str) -> bool:
    """Whether the response gives an accepted answer and names none of the other candidates."""
    accepted = [word for word in conversation["accept"] if has_word(response, word)]
    if not accepted:
        return False
    rest = response
    for word in accepted:  # so that "one hundred" does not also count as "one"
        rest = re.sub(rf"(?<![\w-]){re.escape(word)}(?![\w-])", " ", rest, flags=0 if len(word) <= 2 else re.IGNORECASE)
    # A longer name around an accepted one ("Mexico City" for "Mexico") is another answer.
    return not any(
        has_word(rest, other) or (any(has_word(other, word) for word in accepted) and has_word(response, other))
        for other in conversation["candidates"]
    )


def visible_text(response: str) -> str:
    """The response without tool calls, their output and special tokens."""
    return _SPECIAL.sub(" ", _TOOL_BLOCKS.sub(" ", response))


def is_right_sum(conversation: Mapping[str, Any], response: str) -> bool:
    """Whether the last number outside tool calls is the result."""
    numbers = re.findall(r"-?\d+", visible_text(response).replace(",", ""))
    return bool(numbers) and numbers[-1] == conversation["answer"]


def is_right_choice(conversation: Mapping[str, Any], response: str) -> bool:
    """Whether the response ends with the right letter behind a "=", as the choices are listed."""
    letters = re.findall(r"=([A-Z])(?![A-Za-z])", visible_text(response))
    return bool(letters) and letters[-1] == conversation["answer_letter"]


def is_right_spelling(conversation: Mapping[str, Any], response: str) -> bool:
    """Whether what follows the last colon is the word's letters, separated by commas."""
    tail = visible_text(response).rsplit(":", 1)[-1].strip().rstrip(".")
    return [letter.strip() for letter in tail.split(",")] == list(conversation["answer"])


def is_right_talk(conversation: Mapping[str, Any], response: str) -> bool:
    """Whether the response has one of the intent's keywords."""
    return any(has_word(response, word) for word in conversation["keywords"])
