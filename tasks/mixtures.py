"""What each stage trains and validates on: "real" is the reference's mixture, "tinyworld" the embedded corpus's."""

from __future__ import annotations

from tasks import tinyworld
from tasks.aqua import AQUA
from tasks.arc import ARC
from tasks.common import Task, TaskMixture
from tasks.customjson import CustomJSON
from tasks.gsm8k import GSM8K
from tasks.mmlu import MMLU
from tasks.smoltalk import SmolTalk
from tasks.spellingbee import SimpleSpelling, SpellingBee

NAMES = ("real", "tinyworld")
IDENTITY_ROWS = 996  # as many as the reference's identity file has
SFT_METRICS = {"real": ("MMLU", "ARC-Easy"), "tinyworld": ("TinyFacts", "TinyMC")}


def name_for(dataset: str | None) -> str:
    """The mixture that goes with a base model's data set."""
    return "tinyworld" if dataset == "tinyworld" else "real"


def _own(conversations: str | None) -> Task:
    """Your own conversations, else those that say who the model is."""
    return CustomJSON(conversations) if conversations else tinyworld.TinyIdentity("train", stop=IDENTITY_ROWS)


def mid(name: str, conversations: str | None = None) -> tuple[Task, Task]:
    """(training, validation) of midtraining."""
    own = [_own(conversations)] * 2  # twice: few rows that must stick
    if name == "tinyworld":
        train = tinyworld.mid_tasks() + (own if conversations else [])
        return TaskMixture(train), TaskMixture(tinyworld.val_tasks())
    train = [
        SmolTalk("train"),
        MMLU("auxiliary_train", "train"),
        GSM8K("main", "train"),
        *own,
        SimpleSpelling(size=200_000, split="train"),
        SpellingBee(size=80_000, split="train"),
    ]
    val = [SmolTalk("test"), MMLU("all", "test", stop=5200), GSM8K("main", "test", stop=420)]
    return TaskMixture(train), TaskMixture(val)


def sft(
    name: str, conversations: str | None = None, aqua_train: int = 20_000, aqua_val: int = 254
) -> tuple[Task, Task]:
    """(training, validation) of supervised fine-tuning."""
    if name == "tinyworld":
        train = tinyworld.sft_tasks() + ([_own(conversations)] if conversations else [])
        return TaskMixture(train), TaskMixture(tinyworld.val_tasks())
    train = [
        ARC("ARC-Easy", "train"),
        ARC("ARC-Challenge", "train"),
        AQUA("train", stop=aqua_train),
        GSM8K("main", "train"),
        SmolTalk("train", stop=10_000),
        _own(conversations),
    ]
    return TaskMixture(train), TaskMixture([AQUA("validation", stop=aqua_val), SmolTalk("test", stop=2_000)])
