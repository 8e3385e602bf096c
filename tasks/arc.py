"""ARC: grade-school science questions (Clark et al. 2018, arXiv 1803.05457)."""

from __future__ import annotations

from typing import Any

from nanochat.config import InputError
from tasks.common import Conversation, HubTask, evaluate_letter, mc_conversation

SUBSETS = ("ARC-Easy", "ARC-Challenge")


class ARC(HubTask):
    """Three to five options; a few percent of the rows have 1, 2, 3, 4 for letters."""

    eval_type = "categorical"

    def __init__(self, subset: str, split: str, **slicing: Any) -> None:
        if subset not in SUBSETS:
            raise InputError(f"ARC has no subset {subset!r}; use one of {', '.join(SUBSETS)}")
        super().__init__("allenai/ai2_arc", subset, split, **slicing)

    def get_example(self, index: int) -> Conversation:
        row = self.row(index)
        choices = row["choices"]
        return mc_conversation(row["question"], choices["label"], choices["text"], row["answerKey"])

    def evaluate(self, conversation: Conversation, response: str) -> bool:
        return evaluate_letter(conversation, response)
