"""GSM8K: grade-school word problems with worked answers (Cobbe et al. 2021, arXiv 2110.14168).

The data mark every calculation as <<48/2=24>>; the model learns it as a call of the calculator.
"""

from __future__ import annotations

import re
from typing import Any

from tasks.common import Conversation, HubTask, evaluate_final_answer, evaluate_final_number, has_final_answer

CALCULATION = re.compile(r"<<(.*?)>>", re.DOTALL)


def answer_parts(answer: str) -> list[dict[str, str]]:
    """Text parts, and for each <<expression=result>> a python part and the tool's output."""
    parts = []
    for i, piece in enumerate(CALCULATION.split(answer)):  # every second piece is a calculation
        if i % 2 == 0:
            parts.append({"type": "text", "text": piece})
            continue
        expression, equals, result = piece.rpartition("=")
        parts.append({"type": "python", "text": expression if equals else piece})
        parts.append({"type": "python_output", "text": result if equals else ""})
    return parts


class GSM8K(HubTask):
    """Right is the same text after `#### ` as in the reference (without commas), as in published figures. The
    lenient rule is the same number, so that "18.00" answers 18."""

    def __init__(self, subset: str, split: str, **slicing: Any) -> None:
        super().__init__("openai/gsm8k", subset, split, **slicing)

    def get_example(self, index: int) -> Conversation:
        row = self.row(index)
        messages = [
            {"role": "user", "content": row["question"]},
            {"role": "assistant", "content": answer_parts(row["answer"])},
        ]
        return {"messages": messages}

    def evaluate(self, conversation: Conversation, response: str) -> bool:
        return evaluate_final_answer(conversation, response)

    def evaluate_lenient(self, conversation: Conversation, response: str) -> bool:
        return evaluate_final_number(conversation, response)

    def parsed(self, response: str) -> bool:
        return has_final_answer(response)
