"""SmolTalk: general conversations (Allal et al. 2025, arXiv 2502.02737), the small models' version."""

from __future__ import annotations

from typing import Any

from nanochat.chat import check_conversation
from nanochat.data import hub
from nanochat.environment import hub_dir, print0
from tasks.common import Conversation, HubTask

REPO = "HuggingFaceTB/smol-smoltalk"
STAND_IN = "local/instruct-small"


def choose_repo() -> str:
    """The real data set, unless there is a hub mirror that holds only its small stand-in."""
    if hub_dir() is None or hub.has(REPO) or not hub.has(STAND_IN):
        return REPO
    print0(f"SmolTalk: the hub mirror has no {REPO}; using {STAND_IN}, a small stand-in, instead")
    return STAND_IN


class SmolTalk(HubTask):
    """Splits train and test. For training only: an open conversation has no right answer."""

    def __init__(self, split: str, **slicing: Any) -> None:
        super().__init__(choose_repo(), "default", split, **slicing)

    def get_example(self, index: int) -> Conversation:
        conversation = {"messages": self.row(index)["messages"]}
        check_conversation(conversation, where=f"SmolTalk row {index}")
        return conversation
