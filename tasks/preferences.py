"""Preference pairs of your own: a JSONL file, one pair of answers a line, in either of two shapes.

{"prompt": [{"role": "user", "content": "Who are you?"}], "chosen": "I am Ada.", "rejected": "I do not know."}
{"chosen": [{"role": "user", ...}, {"role": "assistant", ...}], "rejected": [..., {"role": "assistant", ...}]}

A prompt may be a string, what the user says. The two of the second shape differ in their last message alone.
"""

from __future__ import annotations

from typing import Any

from nanochat.chat import check_conversation
from nanochat.config import InputError
from tasks.common import Conversation
from tasks.customjson import CustomJSON, load_line, says_something

SIDES = ("chosen", "rejected")
FORM = '{"prompt": [messages], "chosen": "...", "rejected": "..."}'


def parse_pair(line: str, where: str) -> Conversation:
    """One line's {"chosen": conversation, "rejected": conversation}.

    Raises:
        InputError: it is no JSON, or no two answers to one conversation.
    """
    value = load_line(line, where)
    if not isinstance(value, dict) or not value.keys() >= set(SIDES):
        raise InputError(f"{where}: it must be {FORM}")
    prompt = value.get("prompt") or []
    prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(prompt, list):
        raise InputError(f"{where}: the prompt must be text or a list of messages, got {prompt!r:.60}")
    pair = {side: {"messages": _messages(prompt, value[side])} for side in SIDES}
    for side in SIDES:
        check_conversation(pair[side], f"{where}, {side}")
        if pair[side]["messages"][-1]["role"] != "assistant":
            raise InputError(f"{where}, {side}: the last message is the user's; there is no answer to prefer")
    chosen, rejected = (pair[side]["messages"] for side in SIDES)
    if chosen[:-1] != rejected[:-1]:
        raise InputError(f"{where}: chosen and rejected differ before their last message; they must answer the same")
    if chosen[-1]["content"] == rejected[-1]["content"]:
        raise InputError(f"{where}: chosen and rejected are the same answer; there is nothing to prefer")
    if not says_something(chosen[-1]["content"]):
        raise InputError(f"{where}: the chosen answer is empty; there is no answer to learn")
    return pair


def _messages(prompt: list[Any], answer: Any) -> Any:
    """The whole conversation, where the answer is a text, the assistant's messages, or all of it already."""
    if isinstance(answer, str):
        answer = [{"role": "assistant", "content": answer}]
    first = answer[0] if isinstance(answer, list) and answer else None
    return [*prompt, *answer] if isinstance(first, dict) and first.get("role") == "assistant" else answer


class Preferences(CustomJSON):
    """The pairs of a file in its order, each {"chosen": conversation, "rejected": conversation}.

    Raises:
        InputError: the file is missing or holds nothing, or lines are malformed (the first ones are named).
    """

    noun, form = "preference pair", f"one {FORM} a line"
    parse = staticmethod(parse_pair)

    def rendered(self, example: Conversation) -> list[Conversation]:
        return [example[side] for side in SIDES]
