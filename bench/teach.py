"""100 question-answer pairs of one's own, taught to a finished SFT model by one command: what it then knows and forgot.

    python -m bench.teach --seeds=3            # a table and one JSON line; minutes a seed

The pairs are made up: people and what belongs to them. The file has one question for each, in one of two wordings; the
model is asked in three others, with words that the file does not have (and in five more, to choose settings by).
What it forgot is the scores of its own tasks before and after, on the same held-out questions.
"""

from __future__ import annotations

import dataclasses
import json
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench.results import finish, table
from nanochat import checkpoint, runtime
from nanochat.config import InputError, flag, run_cli
from nanochat.data.tinyworld import checks
from nanochat.environment import base_dir
from nanochat.evals.chat import evaluate_task
from tasks import tinyworld
from tasks.common import Conversation, Task

FIRST = (
    "Alma Boris Clara Dario Elena Fritz Greta Hugo Ines Jonas Karla Leon Mira Nils Olga Pavel Rosa Sven Tilda Viktor"
)
LAST = "Adler Brandt Costa Dorn Egger Falk Grau Huber Iversen Jung Keller Lind Moser Novak Orth Petri Rossi Stein Weber"


@dataclass(frozen=True)
class Fact:
    """What can be known of a person {p}; {o} is the answer."""

    answers: str
    asked: tuple[str, ...]  # in the file
    said: str
    dev: tuple[str, ...]
    test: tuple[str, ...]


FACTS = (
    Fact(
        "bus train bicycle boat car horse sled tram plane truck",
        ("How does {p} get to work?", "How does {p} travel to work?"),
        "{p} goes to work by {o}.",
        (
            *("In which way does {p} come to work?", "By what does {p} go to work each day?"),
            *("Which vehicle takes {p} to work?", "On work days {p} travels by what?", "Work, {p}: how to get there?"),
            *("By what means will {p} arrive at work?", "Describe how {p} reaches work."),
            "When work starts, {p} has come by what?",
        ),
        (
            *("What brings {p} to work in the morning?", "{p} wants to travel to work: with what?"),
            "How would you say that {p} gets to work?",
        ),
    ),
    Fact(
        "garlic honey apples mushrooms onions cherries pepper rice cheese beans",
        ("What does {p} like to eat?", "Which food does {p} like best?"),
        "{p} likes to eat {o}.",
        (
            *("What should I cook, what would {p} like to eat?", "What food will {p} eat with joy?", "Food for {p}?"),
            *("I cook for {p} tonight. Which food is liked?", "Name something to eat that {p} likes."),
            *("Which food should we order for {p}?", "Guess what {p} loves to eat."),
            "At dinner, what does {p} eat most gladly?",
        ),
        ("What may I give {p} to eat?", "Which food would make {p} glad?", "If {p} can choose, what will {p} eat?"),
    ),
    Fact(
        "seven nineteen forty twelve thirty eleven sixty three fifteen twenty",
        ("What is the room number of {p}?", "In which room does {p} sit?"),
        "{p} sits in room {o}.",
        (
            *(
                "Where can I find {p}, in which room?",
                "I look for the room of {p}.",
                "Which room must I go to for {p}?",
            ),
            *("I have a letter for {p}, to what room does it go?", "{p}, what room?"),
            *("Someone asks for {p}: point out the room.", "Behind which door, I mean room, is {p}?"),
            "Please write down the room where {p} works.",
        ),
        (
            *("{p} sits in what room?", "The number of the room where {p} sits?"),
            "Could you look up which room {p} has?",
        ),
    ),
    Fact(
        "drum flute violin harp guitar piano trumpet organ banjo cello",
        ("Which instrument does {p} play?", "What instrument can {p} play?"),
        "{p} plays the {o}.",
        (
            *("Does {p} play an instrument, and which one?", "When we make music, what will {p} play?"),
            *("What would {p} play in our band?", "In the band, {p} has which instrument?", "Instrument of {p}?"),
            *("Name the instrument that {p} practices.", "On stage {p} will play what?"),
            "Guess the instrument {p} owns.",
        ),
        (
            *("Tell me which instrument {p} has learned to play.", "Of all instruments, what does {p} play?"),
            "I heard {p} play music, on what instrument?",
        ),
    ),
    Fact(
        "spider dog parrot goat rabbit turtle cat hamster snake pony",
        ("What pet does {p} have?", "Which animal lives with {p}?"),
        "{p} has a {o}.",
        (
            *("Does {p} keep a pet at home, and what is it?", "Tell me about the pet animal of {p}."),
            *("Who looks after {p} at home, which animal?", "What kind of pet is waiting for {p}?"),
            "The pet that {p} owns?",
            *("What creature, a pet, does {p} own?", "Feeding time: which animal does {p} feed?"),
            "Describe the pet at {p}'s home.",
        ),
        (
            *("Which animal shares a home with {p}?", "I hear that {p} has a pet. Which?"),
            "What sort of animal is {p} living with?",
        ),
    ),
)
PEOPLE = 20
TASKS = (
    *(tinyworld.TinyFacts, tinyworld.TinySums, tinyworld.TinyWordProblems, tinyworld.TinySpelling, tinyworld.TinyMC),
)


@dataclass(frozen=True)
class TeachConfig:
    model_tag: str | None = flag(None, "checkpoint tag of the SFT model; None = the deepest", off="None")
    seeds: int = flag(3, "runs, each with other pairs and another order")
    questions: int = flag(600, "held-out questions of each task, before and after")
    split: str = flag("test", "wordings and questions to score by", choices=("dev", "test"))
    flags: str = flag("", "more flags of chat_sft, to choose settings by")
    first_seed: int = flag(0, "the first run's seed")

    def __post_init__(self) -> None:
        if self.seeds < 1 or self.questions < 1:
            raise InputError(f"--seeds {self.seeds} and --questions {self.questions} must be at least 1")


class Pairs(Task):
    """The taught facts, each asked in every wording of a split ("file", "dev", "test")."""

    def __init__(self, seed: int, split: str) -> None:
        super().__init__()
        rng = random.Random(seed)
        first, last = FIRST.split(), LAST.split()
        people = [f"{a} {rng.choice(last)}" for a in rng.sample(first, PEOPLE)]
        self.conversations: list[Conversation] = []
        for fact in FACTS:
            answers = fact.answers.split()
            for person in people:
                answer, asked = rng.choice(answers), rng.choice(fact.asked)
                wordings = {"file": (asked,), "dev": fact.dev, "test": fact.test}[split]
                for wording in wordings:
                    messages = [
                        {"role": "user", "content": wording.format(p=person)},
                        {"role": "assistant", "content": fact.said.format(p=person, o=answer)},
                    ]
                    others = [word for word in answers if word != answer]
                    self.conversations.append({"messages": messages, "accept": [answer], "candidates": others})

    def num_examples(self) -> int:
        return len(self.conversations)

    def get_example(self, index: int) -> Conversation:
        return self.conversations[index]

    def evaluate(self, conversation: Conversation, response: str) -> bool:
        return checks.is_right_fact(conversation, response)


def scores(tag: str, tasks: dict[str, Task]) -> dict[str, float]:
    """Percent right by task, greedy."""
    rt = runtime.start(None)
    model, tokenizer, _ = checkpoint.load_model("sft", rt, tag)
    model.eval()
    found = {
        name: evaluate_task(task, model, tokenizer, rt, batch_size=100, max_new_tokens=128)
        for name, task in tasks.items()
    }
    return {name: 100 * result.accuracy for name, result in found.items()}


def teach(cfg: TeachConfig, tag: str, seed: int) -> float:
    """Run the command; its seconds."""
    path = base_dir() / "teach.jsonl"
    with path.open("w", encoding="utf-8") as f:
        f.writelines(json.dumps(c["messages"]) + "\n" for c in Pairs(seed, "file"))
    command = [sys.executable, "-m", "scripts.chat_sft", "--source=sft", f"--model_tag={tag}"]
    command += [f"--conversations={path}", f"--seed={seed}", *cfg.flags.split()]
    t0 = time.perf_counter()
    subprocess.run(command, check=True, stdout=sys.stderr)
    return time.perf_counter() - t0


def run(cfg: TeachConfig) -> dict[str, Any]:
    tag = checkpoint.find("sft", cfg.model_tag).parent.name
    own: dict[str, Task] = {task.__name__: task(cfg.split, size=cfg.questions) for task in TASKS}
    before = scores(tag, own)
    rows = [["before", "", "", "", *(f"{v:.1f}" for v in before.values()), f"{mean(before):.1f}"]]
    print(" | ".join(rows[0]), flush=True)
    records = []
    for seed in range(cfg.first_seed, cfg.first_seed + cfg.seeds):
        seconds = teach(cfg, tag, seed)
        taught: dict[str, Task] = {"as in the file": Pairs(seed, "file"), "in other words": Pairs(seed, cfg.split)}
        after = scores(f"{tag}-own", taught | own)
        kept = {name: after[name] for name in own}
        rows.append([f"seed {seed}", f"{seconds:.0f}", *(f"{v:.1f}" for v in after.values()), f"{mean(kept):.1f}"])
        records.append({"seed": seed, "seconds": seconds, **after, "forgotten": mean(before) - mean(kept)})
        print(" | ".join(rows[-1]), flush=True)
    table(["", "seconds", "as in the file", "in other words", *own, "their mean"], rows)
    facts = {"bench": "teach", "config": dataclasses.asdict(cfg), "before": before, "seeds": records}
    finish(facts)
    return facts


def mean(values: dict[str, float]) -> float:
    return sum(values.values()) / len(values)


def main(argv: Sequence[str] | None = None) -> None:
    run_cli(TeachConfig, run, argv, about=__doc__)


if __name__ == "__main__":
    main()
