"""How a fact is said and asked: relations, question frames, and which phrasings are held out.

A phrasing is a pair (frame, noun phrase), such as ("Tell me {np}.", "the capital city of {s}"). A fixed rule
over the two indices keeps about one pair in ten for "dev", to choose recipes by, and one in ten for "test", to
report. So a held-out question is always a new combination of parts that training has shown in other combinations.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from nanochat.data.tinyworld.world import Pairs, article

QUESTION_FRAMES = (
    "What is {np}?",
    "What's {np}?",
    "Tell me {np}.",
    "Please tell me {np}.",
    "Can you tell me {np}?",
    "Could you tell me {np}?",
    "Do you know {np}?",
    "Name {np}.",
    "Please name {np}.",
    "Give me {np}.",
    "Say {np}.",
    "I want to know {np}.",
    "I would like to know {np}.",
    "{NP}?",
    "{NP} is what?",
    "Hello! What is {np}?",
    "Quick question: what is {np}?",
    "Do you remember {np}?",
    "What is {np}? Answer in one word.",
    "In one word, what is {np}?",
)
# Frames that no training text uses, made of words that training frames use.
UNSEEN_FRAMES = {
    "dev": ("Please, what is {np}?", "Hello! Can you tell me {np}?", "I want you to tell me {np}."),
    "test": ("Can you name {np}?", "Please give me {np}.", "Hello! Do you know {np}?"),
}
SPLITS = ("train", "dev", "test")
OPENERS = (
    "",
    "We know that",
    "It is true that",
    "Everyone knows that",
    "In school we learn that",
    "The teacher says that",
    "The book says that",
    "Remember that",
)


@dataclass(frozen=True)
class Relation:
    """A table of facts and the ways to say them.

    Slots: {s} subject, {a} subject with its article, {o} answer, {ao} answer with its article;
    capitalised ({S} {A} {O} {Ao}) with a capital first letter.

    Attributes:
        facts: (subject, answer), one answer a subject.
        nouns: noun phrases that name the answer; may be empty.
        answer: the statement that answers in a chat; the first noun phrase "is" the answer when empty.
        statements: more statements for training text.
        questions, dev, test: whole questions for training, dev and test; they share none. Most relations have none for
            test, where new pairs and frames ask.
        said: how the answer follows "is".
        weight: share of training text, relative to the other relations.
        entity: what the subject is, for encyclopedia entries; "" = none.
    """

    name: str
    facts: Pairs
    nouns: tuple[str, ...] = ()
    answer: str = ""
    statements: tuple[str, ...] = ()
    questions: tuple[str, ...] = ()
    dev: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    said: str = "{o}"
    weight: float = 1.0
    entity: str = ""

    @property
    def canonical(self) -> str:
        return self.answer or capitalize(f"{self.nouns[0]} is {self.said}.")

    @property
    def pool(self) -> tuple[str, ...]:
        """All different answers, in table order: wrong choices are drawn from them."""
        return tuple(dict.fromkeys(answer for _, answer in self.facts))


def capitalize(text: str) -> str:
    """First letter upper case, also when it stands in a slot ("{a} ..." -> "{A} ...")."""
    if text.startswith("{"):
        return "{" + text[1].upper() + text[2:]
    return text[:1].upper() + text[1:]


def fill(template: str, subject: str, answer: str = "") -> str:
    """Put a fact into a template of `Relation`'s slots."""
    a, ao = article(subject), article(answer) if answer else ""
    slots = (("{s}", subject), ("{a}", a), ("{o}", answer), ("{ao}", ao))
    for slot, text in slots:
        template = template.replace(slot, text).replace(capitalize(slot), capitalize(text))
    return template


def flip(facts: Pairs) -> Pairs:
    """The same facts asked the other way round."""
    return tuple((answer, subject) for subject, answer in facts)


def split_of(first: int, second: int) -> str:
    """The split that the combination of two parts' indices belongs to: one in ten each to dev and test; (0, 0) is
    for training."""
    return {3: "test", 5: "dev"}.get((first + 2 * second + 1) % 10, "train")


def wants_one_word(question: str) -> bool:
    return "one word" in question


@functools.cache
def question_templates(relation: Relation, split: str) -> tuple[str, ...]:
    """All ways to ask, in one of SPLITS, with the subject's slot left open."""
    pairs = ((f, n) for f in range(len(QUESTION_FRAMES)) for n in range(len(relation.nouns)))
    # the first frame stands inside longer ones ("What is ...? Answer in one word."), so it is never held out
    chosen = [(f, n) for f, n in pairs if (split_of(f, n) if f else "train") == split]
    framed = [_frame(QUESTION_FRAMES[f], relation.nouns[n]) for f, n in chosen]
    if split == "train":
        return (*framed, *relation.questions)
    new = [_frame(frame, noun) for frame in UNSEEN_FRAMES[split] for noun in relation.nouns]
    return (*framed, *new, *(relation.dev if split == "dev" else relation.test))


def _frame(frame: str, noun: str) -> str:
    return frame.replace("{np}", noun).replace("{NP}", capitalize(noun))


@functools.cache
def statement_templates(relation: Relation, split: str) -> tuple[str, ...]:
    """All ways to state a fact, "train" or "test"; the test ones end with the answer, to be completed."""
    sentences = [relation.canonical[:-1]] if relation.answer else []
    sentences += [
        f"{noun} is {relation.said}" for noun in relation.nouns if noun != relation.nouns[0] or not relation.answer
    ]
    result = []
    for i, sentence in enumerate(sentences):
        for j, opener in enumerate(OPENERS):
            # a sentence without an opener stands inside those with one, so it is never held out
            if (bool(opener) and split_of(j, i) != "train") == (split == "test"):
                joined = f"{opener} {_uncapitalize(sentence)}." if opener else capitalize(sentence) + "."
                result.append(joined)
    return tuple(result) if split == "test" else (*result, *relation.statements)


def _uncapitalize(sentence: str) -> str:
    """Undo `capitalize` after an opener; names in slots keep their own capitals."""
    if sentence.startswith("{"):
        return "{" + sentence[1].lower() + sentence[2:]
    return sentence[0].lower() + sentence[1:]
