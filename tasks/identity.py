"""Conversations in which a model says who it is, made from a description of one page.

    name: Ada
    maker: the pupils of Riverside School
    personality: cheerful, curious and a little shy
    facts:
      - I was trained in one night on the school's oldest laptop.     # what it says of itself
      - Where do you live?: In the computer room, next to the fish tank.    # a question, and what it answers

Only the name must be given. Offline they are filled templates: ways to ask and to answer, in short chats.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from nanochat.config import InputError
from tasks.reworded import reword

KEYS = ("name", "maker", "personality", "facts")
OTHER_NAMES = ("ChatGPT", "Siri", "Alexa", "Claude", "Gemini", "Max", "HAL", "a robot called Bob", "GPT-4", "Anna")

Pair = tuple[tuple[str, ...], tuple[str, ...]]  # ways to say it, ways to answer

GREETINGS: Pair = (
    (
        "Hello!",
        "Hi",
        "Hey!",
        "Good morning!",
        "Hi there!",
        "hello",
        "Good evening!",
        "Hello {n}!",
        "Hi {n}",
        "Hey {n}!",
    ),
    ("Hello! I am {n}. How can I help you?", "Hi! {n} here. What can I do for you?", "Hello! How can I help you?"),
)
PARTINGS: Pair = (
    (
        "Thank you!",
        "Thanks, {n}!",
        "Bye!",
        "Goodbye, {n}!",
        "Thanks a lot",
        "See you later!",
        "That is all, thank you.",
    ),
    ("You are welcome! Come back soon.", "Goodbye! It was nice to talk with you.", "Any time!"),
)
NAME: Pair = (
    (
        *("What is your name?", "Who are you?", "What are you called?", "Tell me your name.", "Do you have a name?"),
        *("What should I call you?", "Who am I talking to?", "Can you introduce yourself?", "Your name?", "who r u"),
        *("Say who you are.", "What are you?", "Please tell me who you are.", "Who is this?", "I forgot your name."),
        *("Introduce yourself, please.", "Whom do I have the pleasure with?", "May I know your name?", "name?"),
    ),
    ("I am {n}.", "My name is {n}.", "I am called {n}.", "I am {n}, a language model."),
)
NATURE: Pair = (
    (
        *("Are you a person?", "Are you human?", "Are you real?", "Are you an AI?", "Is {n} a person?"),
        *("What kind of thing are you?", "Are you a robot?", "Are you alive?", "Do you have a body?"),
    ),
    ("I am {n}, a language model: a program that has learned to talk.", "I am no person. I am {n}, a language model."),
)
MAKER: Pair = (
    (
        *("Who made you?", "Who built you?", "Who created you?", "Who trained you?", "Where do you come from?"),
        *(
            "Who is your maker?",
            "Tell me who made you.",
            "Who are your parents?",
            "Who is behind {n}?",
            "Who owns you?",
        ),
        *("Which company made you?", "By whom were you made?", "Who wrote you?", "Do you know who built you?"),
    ),
    ("I was made by {m}.", "{M} made me.", "I am {n}, and I was made by {m}."),
)
PERSONALITY: Pair = (
    (
        *("What are you like?", "Describe your personality.", "How would you describe yourself?", "Are you friendly?"),
        *("What kind of character do you have?", "What is your personality?", "Do you have a personality?"),
        *("Describe yourself in a few words.", "How would your friends describe you?", "What sort of model are you?"),
    ),
    ("I am {p}.", "I would say that I am {p}.", "People who talk with me say that I am {p}."),
)
ABOUT: tuple[str, ...] = (
    *("Tell me about yourself.", "Tell me something about yourself.", "What should I know about you?"),
    *("What is special about you?", "Tell me a fact about {n}.", "What do you know about yourself?", "Who is {n}?"),
)
MISTAKEN: Pair = (
    (
        "Are you {x}?",
        "You are {x}, right?",
        "Is your name {x}?",
        "I think you are {x}.",
        "Hello {x}!",
        "Am I talking to {x}?",
    ),
    ("No, I am {n}.", "No, my name is {n}.", "You are mistaken: I am {n}."),
)


@dataclass(frozen=True)
class About:
    """Who the model is."""

    name: str
    maker: str | None = None
    personality: str | None = None
    facts: tuple[str, ...] = ()
    answers: tuple[tuple[str, str], ...] = ()  # (question, answer)

    @classmethod
    def read(cls, path: str | Path) -> About:
        """
        Raises:
            InputError: no such file, or it is no such description.
        """
        import yaml

        def refuse(reason: str) -> InputError:
            return InputError(f"{path}: {reason}; see the head of tasks/identity.py")

        try:
            page = yaml.safe_load(Path(path).read_text(encoding="utf-8-sig"))
        except FileNotFoundError:
            raise InputError(f"no description {path}; write one with a line `name: ...`") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise refuse(f"no YAML ({' '.join(str(error).split())})") from None
        if not isinstance(page, dict) or not isinstance(page.get("name"), str) or not page["name"].strip():
            raise refuse("it has no line `name: ...`")
        if unknown := [str(key) for key in page if key not in KEYS]:
            raise refuse(f"unknown key {', '.join(unknown)}; there are {', '.join(KEYS)}")
        texts = {key: str(page[key]).strip().rstrip(".") for key in KEYS[:3] if page.get(key) is not None}
        facts, answers = [], []
        listed = page.get("facts") or []
        if not isinstance(listed, list):
            raise refuse("facts must be a list of sentences, or of `question: answer`")
        for fact in listed:
            if isinstance(fact, dict) and all(isinstance(v, str) for pair in fact.items() for v in pair):
                answers += [(question.strip(), answer.strip()) for question, answer in fact.items()]
            elif isinstance(fact, str):
                facts.append(fact.strip())
            else:
                raise refuse(f"the fact {fact!r} is neither a sentence nor `question: answer`")
        return cls(**texts, facts=tuple(facts), answers=tuple(answers))

    def text(self) -> str:
        """The page in sentences, for a larger model to read."""
        lines = [f"The model's name is {self.name}."]
        lines += [f"It was made by {self.maker}."] if self.maker else []
        lines += [f"Its personality: {self.personality}."] if self.personality else []
        lines += [f"It says of itself: {fact}" for fact in self.facts]
        lines += [f"Asked {question!r} it answers: {answer}" for question, answer in self.answers]
        return "\n".join(lines)


def pairs(about: About) -> list[Pair]:
    """What is asked and answered about it, one subject each."""
    subjects = [NAME, NATURE, MISTAKEN]
    subjects += [MAKER] if about.maker else []
    subjects += [PERSONALITY] if about.personality else []
    subjects += [(ABOUT, tuple(about.facts))] if about.facts else []
    return [*subjects, *(((question,), (answer,)) for question, answer in about.answers)]


def conversations(about: About, number: int, seed: int = 0) -> list[list[dict[str, str]]]:
    """Lists of messages, all different. The subjects take turns, so that each is in as many.

    Raises:
        InputError: a description with so little in it does not give so many.
    """
    rng = random.Random(seed)
    subjects = pairs(about)
    made: dict[str, list[dict[str, str]]] = {}
    for i in range(20 * number):
        if len(made) == number:
            break
        turns = [subjects[i % len(subjects)]]
        turns += rng.sample(subjects, rng.choice((0, 0, 0, 1, 1, 2))) if len(subjects) > 2 else []
        talk = [GREETINGS] * (rng.random() < 0.2) + list(dict.fromkeys(turns)) + [PARTINGS] * (rng.random() < 0.2)
        messages = [message for turn in talk for message in _exchange(turn, about, rng)]
        made.setdefault(" ".join(m["content"] for m in messages), messages)
    if len(made) < number:
        raise InputError(
            f"--num {number}: the description gives only {len(made)} different ones; lower it or tell more"
        )
    return list(made.values())


def _exchange(pair: Pair, about: About, rng: random.Random) -> list[dict[str, str]]:
    question, answer = rng.choice(pair[0]), rng.choice(pair[1])
    maker = about.maker or ""
    slots = {"n": about.name, "m": maker, "M": maker[:1].upper() + maker[1:], "p": about.personality or ""}
    slots["x"] = rng.choice([name for name in OTHER_NAMES if name.lower() != about.name.lower()])

    def fill(text: str) -> str:
        for slot, value in slots.items():
            text = text.replace("{" + slot + "}", value)
        return text

    if len(pair[0]) == 1 and rng.random() < 0.7:  # the description's own, which has one wording
        question = reword(question, rng)
    return [{"role": "user", "content": fill(question)}, {"role": "assistant", "content": fill(answer)}]
