"""MMLU: four-choice questions on 57 subjects (Hendrycks et al. 2021, arXiv 2009.03300)."""

from __future__ import annotations

from typing import Any

from nanochat.config import InputError
from tasks.common import Conversation, HubTask, evaluate_letter, mc_conversation

LETTERS = ("A", "B", "C", "D")
SUBSETS = ("all", "auxiliary_train")


class MMLU(HubTask):
    """Subset "all" is the benchmark (test, validation, dev); "auxiliary_train" has one split, train."""

    eval_type = "categorical"

    def __init__(self, subset: str, split: str, **slicing: Any) -> None:
        if subset not in SUBSETS:
            raise InputError(f"MMLU has no subset {subset!r}; use one of {', '.join(SUBSETS)}")
        super().__init__("cais/mmlu", subset, split, **slicing)

    def get_example(self, index: int) -> Conversation:
        row = self.row(index)
        row = row.get("train", row)  # on the hub, auxiliary_train nests its rows in a column of that name
        answer = LETTERS[row["answer"]]
        return mc_conversation(row["question"], LETTERS, row["choices"], answer, subject=row["subject"])

    def evaluate(self, conversation: Conversation, response: str) -> bool:
        return evaluate_letter(conversation, response)
