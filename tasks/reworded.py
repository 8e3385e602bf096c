"""Questions in other words: a small model that saw a question in one wording learns that wording, not the question.

Rules for English, which know no meaning: what is asked for and of whom keeps its words; the frame around them changes,
and words that carry no meaning come and go, so that only the others can decide the answer. What the rules do not fit
(other languages, several sentences, "Who are you?") is left as it is but for its last mark.

Other questions of the same file lend their wordings (`borrowed`): where "What does Ada eat?" is answered "Ada likes
rice." and "Which food does Ben like?" is answered "Ben likes rice.", each may be asked of the other.
"""

from __future__ import annotations

import functools
import itertools
import random
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tasks.common import Conversation, Task

FRAMES = (
    "What is {x}?",
    "What's {x}?",
    "Tell me {x}.",
    "Please tell me {x}.",
    "Can you tell me {x}?",
    "Could you tell me {x}, please?",
    "Do you know {x}?",
    "I want to know {x}.",
    "I would like to know {x}.",
    "I need {x}.",
    "Give me {x}.",
    "Name {x}.",
    "{x}?",
    "{x}, please.",
    "Which is {x}?",
    "What can you say about {x}?",
)
CLAUSE_FRAMES = (
    "Tell me {x}.",
    "Please tell me {x}.",
    "Can you tell me {x}?",
    "Do you know {x}?",
    "Do you remember {x}?",
    "I want to know {x}.",
    "I would like to know {x}.",
    "Someone asked me {x}.",
)
OPENERS = (
    *("Hello!", "Hi,", "Hey!", "Quick question:", "Please:", "So,", "Well,", "Now,", "And", "Tell me:", "Say,"),
    *("One more thing:", "Can you help me?", "I forgot:", "I have a question.", "Remind me:", "By the way,", "Okay,"),
    *("My friend asks:", "Just wondering:", "Excuse me,", "For my notes:", "Help me out:", "Do you remember:"),
)
CLOSERS = (
    *("please", "again", "now", "for me", "thanks", "do you know", "if you know it", "today", "exactly", "then"),
    *("and what is it", "and which one", "or not", "if any", "can you say", "I wonder", "and how", "as you know"),
)
JOINTS = ("of", "for", "with", "by", "at", "to", "in", "and", "from", "about", "is", "has", "that", "does", "-", ":")
# Words that may go, or stand anywhere: they never decide what is asked.
FILLERS = frozenset(
    "a an the is are was were be been do does did can could would will should may must has have had of for to in on at"
    " by from with about that this these those it its there what which who whom whose please tell say give know"
    " want need like me my i you your we us our and so just again now then also really actually exactly called"
    " find remember someone people use used right answer question any some one".split()
)
# Frequent words that may stand in a question and not matter, unless they do in another one of the same file.
NOISE = tuple(
    sorted(FILLERS)
    + "after all always ask away back because been before best better big both bring call care check city come country"
    " course day different each early easy end even ever every family far fast feel few first five friend full get go"
    " good great group half hand happy hard hear help here high hold home hour house idea important inside interest"
    " keep kind large last late learn least leave left less letter life like line list little live long look lot love"
    " made main make many matter maybe mean meet mind minute moment morning most move much near never new next nice"
    " night nothing number often old once only open order other our out outside over own part past place plan play"
    " point possible put question read ready real right run same school second see seem send set several show side"
    " simple sit small soon sort sound speak stand start state stay still stop story street such sure take talk task"
    " than thing think three through today together tomorrow tonight too town true try turn two under until usual very"
    " visit wait walk watch way week well whole why without wonder word work world write year yes yesterday yet".split()
)
AUXILIARIES = frozenset("am are can could did do does had has have is may must should was were will would".split())
BORROWERS = (
    5000  # questions of a file at most that lend each other wordings: seconds, and all ways to cut them in memory
)
SUBJECT_MARK, VALUE_MARK = "\x00", "\x01"  # stand for what a wording or frame is said of
QUESTION = re.compile(
    r"(?i)(?:(?:what|who|which) (?:is|are|was|were)|what's|who's|(?:please )?(?:tell|give) me|name) (.+)"
)
WHERE = re.compile(r"(?i)(who|where|when|what|which \w+|what \w+|how \w+) (is|are|was|were|can|will) (\S+(?: \S+)*)")
DOES = re.compile(r"(?i)(who|where|when|why|what|which \w+|what \w+|how(?: \w+)?) (?:does|do|did) (.+)")
SUBJECT = re.compile(r"(?i)(who|which \w+|what \w+) (?!do\b|does\b|did\b|is\b|are\b|was\b|were\b|can\b|will\b).+")
OF = re.compile(r"(?i)^(?:the )?([\w-]+(?: [\w-]+)?) of (.+)$")
OWNER = re.compile(r"^(.+?)'s? ([\w-]+(?: [\w-]+)?)$")


def reword(
    text: str, rng: random.Random, noise: Sequence[str] = NOISE, is_enough: Callable[[list[str]], bool] | None = None
) -> str:
    """The same question in other words, or in few; the same draw gives the same.

    Args:
        noise: words that may be put anywhere.
        is_enough: whether these words say which question it is, so that the others may go; None = all are needed.
    """
    stem = text.strip()
    last = re.search(r"[.!?]+$", stem)
    stem = stem[: last.start()] if last else stem
    words = [w.lower() for w in stem.split()]
    is_english = any(w in FILLERS for w in words) and not all(w in FILLERS for w in words)
    if not is_english or re.search(r"[.!?\n]\s", stem):
        return stem + rng.choice(("", last.group() if last else ""))
    way = rng.random()
    if way < 0.45:
        stem = _framed(stem, rng)
    elif way < 0.8:
        stem = _keywords(stem, rng, is_enough)
    stem = stem.rstrip(".!?")
    if rng.random() < 0.5:
        stem = _with_noise(stem, rng, noise)
    return _dressed(stem, rng)


def _framed(stem: str, rng: random.Random) -> str:
    """In another sentence around what is asked for."""
    if (m := QUESTION.fullmatch(stem)) and not WHERE.fullmatch(m[1]):
        return rng.choice(FRAMES).replace("{x}", _turned(m[1], rng))
    if m := WHERE.fullmatch(stem):
        words = m[3].split()
        at = rng.choice((len(words), 1)) if len(words) > 2 else len(words)
        clause = f"{m[1].lower()} {' '.join(words[:at])} {m[2]} {' '.join(words[at:])}".strip()
        return rng.choice(CLAUSE_FRAMES).replace("{x}", clause)
    if m := DOES.fullmatch(stem):
        return rng.choice(CLAUSE_FRAMES).replace("{x}", f"{m[1].lower()} {m[2]}")
    if SUBJECT.fullmatch(stem):
        return rng.choice(CLAUSE_FRAMES).replace("{x}", stem[0].lower() + stem[1:])
    return stem


def _turned(noun: str, rng: random.Random) -> str:
    """ "the door of the house" <-> "the house's door"."""
    if rng.random() < 0.5:
        return noun
    if m := OF.match(noun):
        return f"{m[2]}'s {m[1]}"
    if m := OWNER.match(noun):
        return f"the {m[2]} of {m[1]}"
    return noun


def _keywords(stem: str, rng: random.Random, is_enough: Callable[[list[str]], bool] | None) -> str:
    """As one types into a search box; at times with no more words than are needed, at times with what is asked for
    behind whom it is asked of, or a joint: "food for Ada"."""
    words = [w for w in stem.split() if w.lower().strip(",:;'\"") not in FILLERS]
    if is_enough and rng.random() < 0.7:
        for word in rng.sample(words, len(words)):
            fewer = [w for w in words if w != word]
            if rng.random() < 0.6 and is_enough(fewer):
                words = fewer
    if len(words) > 1:
        at = rng.randrange(1, len(words))
        joint = [rng.choice(JOINTS)] if rng.random() < 0.5 else []
        turned = rng.random() < 0.5
        words = [*words[at:], *joint, *words[:at]] if turned else [*words[:at], *joint, *words[at:]]
    return " ".join(words) or stem


def _with_noise(stem: str, rng: random.Random, noise: Sequence[str]) -> str:
    words = [w for w in stem.split() if w.lower() not in FILLERS or rng.random() < 0.6]
    for _ in range(rng.randrange(1, 5)):
        words.insert(rng.randrange(len(words) + 1), rng.choice(noise))
    return " ".join(words)


def _dressed(stem: str, rng: random.Random) -> str:
    if rng.random() < 0.3:
        stem = f"{rng.choice(OPENERS)} {stem}"
    if rng.random() < 0.25:
        stem = f"{stem}, {rng.choice(CLOSERS)}"
    if rng.random() < 0.15:
        stem = stem.lower()
    elif rng.random() < 0.7:
        stem = stem[:1].upper() + stem[1:]
    return stem + rng.choice(("?", "?", "?", ".", ""))


@dataclass(frozen=True)
class Cut:
    """A question and its answer, taken apart: "Ada" is the subject, "rice" the value, the rest wording and frame."""

    wording: str  # the question around its subject
    frame: str  # the answer around its subject and value
    subject: str
    value: str


def borrowed(pairs: Sequence[tuple[str, str]]) -> list[list[str]]:
    """For each question and its answer: the same question in the wordings of others.

    Two wordings ask the same if their answers have one frame, some value is answered to both, and no subject was asked
    in both with different values. Questions to be answered by yes or no keep their wording.
    """
    cuts = [_cuts(*pair) for pair in pairs]
    subjects: dict[str, set[str]] = defaultdict(set)
    for cut in itertools.chain(*cuts):
        subjects[cut.frame].add(cut.subject)
    # what many questions differ in is the subject; the shortest value leaves the longest frame
    best = [max(some, key=lambda c: (len(subjects[c.frame]), -len(c.value)), default=None) for some in cuts]
    values: dict[str, dict[str, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
    for cut in filter(None, best):
        values[cut.frame][cut.wording][cut.subject.lower()] = cut.value

    @functools.cache
    def lenders(frame: str, wording: str) -> list[str]:
        known = values[frame]
        own = known[wording]
        return [w for w, other in known.items() if w != wording and _ask_the_same(own, other)]

    return [
        [wording.replace(SUBJECT_MARK, own.subject) for wording in lenders(own.frame, own.wording)] if own else []
        for own in best
    ]


def _ask_the_same(one: dict[str, str], other: dict[str, str]) -> bool:
    """Of what two wordings were answered, by subject."""
    agree = all(one[subject] == other[subject] for subject in one.keys() & other.keys())
    return agree and not set(one.values()).isdisjoint(other.values())


def _cuts(question: str, answer: str) -> list[Cut]:
    """All ways to take a pair apart: what both say is the subject, up to three other words of the answer the value."""
    asked, answered = (list(re.finditer(r"[\w'-]+", text)) for text in (question, answer))
    if len(asked) > 40 or len(answered) > 40 or (asked and asked[0][0].lower() in AUXILIARIES):
        return []
    found = []
    for i, j in itertools.product(range(len(asked)), range(len(answered))):
        if i and j and asked[i - 1][0].lower() == answered[j - 1][0].lower():
            continue  # not where what both say begins
        both = zip(asked[i:], answered[j:], strict=False)
        n = sum(1 for _ in itertools.takewhile(lambda ab: ab[0][0].lower() == ab[1][0].lower(), both))
        subject = question[asked[i].start() : asked[i + n - 1].end()] if n else ""
        if all(word.lower() in FILLERS for word in subject.split()):
            continue
        wording = re.sub(rf"(?<![\w'-]){re.escape(subject)}(?![\w'-])", SUBJECT_MARK, question)
        for start, size in itertools.product(range(len(answered)), (1, 2, 3)):
            stop = start + size
            if stop > len(answered) or (start < j + n and j < stop) or n + size == len(answered):
                continue
            a, b = answered[start].start(), answered[stop - 1].end()
            value, subject_at = answer[a:b], (answered[j].start(), answered[j + n - 1].end())
            parts = sorted([(a, b, VALUE_MARK), (*subject_at, SUBJECT_MARK)])
            (a1, b1, first), (a2, b2, second) = parts
            frame = answer[:a1] + first + answer[b1:a2] + second + answer[b2:]
            found.append(Cut(wording, frame, subject, value.lower()))
    return found


class Wordings:
    """What the questions of a task tell of each other; made once, for all its variants."""

    def __init__(self, task: Task) -> None:
        asked = {
            (str(a["content"]), str(b["content"])): None
            for conversation in task
            for a, b in itertools.pairwise(conversation["messages"])
            if a["role"] == "user"
        }
        lent = borrowed(list(asked)) if len(asked) <= BORROWERS else [[] for _ in asked]
        # (question, answer) -> the question in all wordings of the file, its own first
        self.asked = {pair: [pair[0], *more] for pair, more in zip(asked, lent, strict=True)}
        # word -> what is answered to the questions that have it
        self.answers: dict[str, set[str]] = defaultdict(set)
        for (_, answer), questions in self.asked.items():
            for word in _words(" ".join(questions)):
                self.answers[word].add(answer)
        self.noise = [w for w in NOISE if w in FILLERS or w not in self.answers]

    def reworded(self, messages: Sequence[dict[str, Any]], rng: random.Random) -> list[dict[str, Any]]:
        """The messages with the user's in other words."""
        told = list(messages)
        for i, (a, b) in enumerate(itertools.pairwise(messages)):
            if a["role"] == "user":
                question = rng.choice(self.asked[str(a["content"]), str(b["content"])])
                told[i] = {**a, "content": reword(question, rng, self.noise, self.has_one_answer)}
        return told

    def has_one_answer(self, words: Sequence[str]) -> bool:
        """Whether the questions that have all these words have one answer in common, and no other."""
        found = [self.answers.get(w, set()) for w in _words(" ".join(words))]
        return bool(found) and len(set.intersection(*found)) == 1


class Reworded(Task):
    """A task's conversations with the user's messages in other words: each number is another draw."""

    def __init__(self, task: Task, wordings: Wordings, number: int) -> None:
        super().__init__()
        self.task, self.wordings, self.number = task, wordings, number

    def num_examples(self) -> int:
        return len(self.task)

    def get_example(self, index: int) -> Conversation:
        conversation = self.task[index]
        rng = random.Random(f"{self.number} {index}")
        return {**conversation, "messages": self.wordings.reworded(conversation["messages"], rng)}


def _words(text: str) -> list[str]:
    return re.findall(r"[\w-]+", text.lower())
