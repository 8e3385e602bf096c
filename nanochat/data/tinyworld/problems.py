"""Sums and word problems, with the calculator's work shown. Operand pairs are kept apart by a fixed rule."""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass

from nanochat.data.tinyworld.phrases import split_of
from nanochat.data.tinyworld.world import BOYS, GIRLS, ITEMS, UNITS

Part = dict[str, str]
ALWAYS_TRAIN = 12  # the small tables up to twelve are for everyone


def split_of_pair(a: int, b: int) -> str:
    """The split that sums of these operands belong to, in any order: about one pair in 16 each to dev and test."""
    low, high = min(a, b), max(a, b)
    if high <= ALWAYS_TRAIN:
        return "train"
    return {0: "dev", 1: "test"}.get((low * 7919 + high * 104_729) % 1_000_003 % 16, "train")


def compute(a: int, op: str, b: int) -> int:
    return a + b if op == "+" else a - b if op == "-" else a * b


def operands(rng: random.Random, op: str, split: str) -> tuple[int, int]:
    """A pair of the split for one sum; differences are never negative."""
    while True:
        if op == "*":
            a, b = rng.randrange(2, rng.choice((13, 100, 1000))), rng.randrange(2, rng.choice((13, 13, 100)))
        else:
            a, b = rng.randrange(1, rng.choice((100, 100, 1000))), rng.randrange(1, rng.choice((100, 100, 1000)))
        if op == "-" and a < b:
            a, b = b, a
        if split_of_pair(a, b) == split:
            return a, b


SUM_FRAMES = (
    "What is {e}?",
    "What's {e}?",
    "Tell me {e}.",
    "Please tell me {e}.",
    "Can you tell me {e}?",
    "How much is {e}?",
    "Calculate {e}.",
    "Please calculate {e}.",
    "{E}?",
    "{E} is what?",
    "{E} = ?",
    "Work out {e}.",
    "Can you work out {e}?",
    "I want to know {e}.",
    "Hello! What is {e}?",
)
INSIDE_OTHERS = ("What is {e}?", "{E}?")  # they stand inside longer ones, so they are never held out
SUM_WORDINGS = {
    "+": ("{a} + {b}", "{a} plus {b}", "{a}+{b}", "the sum of {a} and {b}", "{a} and {b} together"),
    "-": ("{a} - {b}", "{a} minus {b}", "{a}-{b}", "{a} take away {b}", "the difference of {a} and {b}"),
    "*": ("{a} * {b}", "{a} times {b}", "{a}*{b}", "the product of {a} and {b}", "{a} multiplied by {b}"),
}


@functools.cache
def sum_templates(op: str, split: str) -> tuple[str, ...]:
    """All ways to ask for a sum, with {a} and {b} open."""
    grid = ((f, w) for w in range(len(SUM_WORDINGS[op])) for f in range(len(SUM_FRAMES)))
    chosen = [(f, w) for f, w in grid if split_of(f, w) == split]
    if split != "train":
        chosen = [(f, w) for f, w in chosen if SUM_FRAMES[f] not in INSIDE_OTHERS]
    words = SUM_WORDINGS[op]
    return tuple(
        SUM_FRAMES[f].replace("{e}", words[w]).replace("{E}", words[w][:1].upper() + words[w][1:]) for f, w in chosen
    )


def tool_call(expression: str, output: int) -> list[Part]:
    return [{"type": "python", "text": expression}, {"type": "python_output", "text": str(output)}]


def sum_question(rng: random.Random, split: str) -> tuple[str, str, int]:
    """(question, expression, result): "What is 47 + 85?", "47+85", 132."""
    op = rng.choice("++--**")
    a, b = operands(rng, op, split)
    question = rng.choice(sum_templates(op, split)).replace("{a}", str(a)).replace("{b}", str(b))
    return question, f"{a}{op}{b}", compute(a, op, b)


def spaced(expression: str) -> str:
    """'47+85' -> '47 + 85'."""
    for op in "+-*":
        expression = expression.replace(op, f" {op} ")
    return expression


def sum_parts(expression: str, result: int) -> list[Part]:
    """The answer: text, tool call, its output, then the whole equation."""
    final = {"type": "text", "text": f"{spaced(expression)} = {result}."}
    return [{"type": "text", "text": "Let me calculate. "}, *tool_call(expression, result), final]


@dataclass(frozen=True)
class Theme:
    """A kind of word problem. `ops` is applied left to right: a ops[0] b, then ops[1] c."""

    name: str
    ops: str
    starts: tuple[str, ...]
    changes: tuple[str, ...]
    questions: tuple[str, ...]


HAVE = (
    "{n} has {a} {x}.",
    "{n} had {a} {x}.",
    "There are {a} {x} in {n}'s box.",
    "In the morning {n} has {a} {x}.",
    "{n} owns {a} {x}.",
)
GAIN = (
    "{He} buys {b} more.",
    "{He} finds {b} more {x}.",
    "{m} gives {n} {b} more {x}.",
    "{He} gets {b} {x} from {m}.",
    "Then {b} more {x} come in the mail.",
)
LOSE = (
    "{He} gives {b} {x} to {m}.",
    "{He} loses {b} of them.",
    "{He} sells {b} {x}.",
    "{m} takes {b} of them away.",
    "Then {b} of the {x} are gone.",
)
LOSE_C = tuple(text.replace("{b}", "{c}") for text in LOSE)
GAIN_C = tuple(text.replace("{b}", "{c}") for text in GAIN)
HOW_MANY = (
    "How many {x} does {n} have now?",
    "How many {x} does {n} have in the end?",
    "What is the number of {x} that {n} has now?",
    "How many {x} are there now?",
)
GROUPS = (
    "{n} has {a} boxes with {b} {x} in each box.",
    "{n} has {a} bags. Each bag has {b} {x} in it.",
    "{n} buys {a} boxes. Each box holds {b} {x}.",
    "{n} puts {b} {x} in each of {a} bags.",
    "There are {b} {x} on each of {n}'s {a} tables.",
)
PRICES = (
    "{n} buys {a} {x}. Each one costs {b} dollars.",
    "{n} wants {a} {x}. One costs {b} dollars.",
    "The {x} cost {b} dollars each. {n} buys {a} of them.",
    "At the market {n} takes {a} {x} for {b} dollars each.",
)
EACH_DAY = (
    "{n} reads {b} pages every day for {a} days.",
    "Every day {n} reads {b} pages. {He} reads for {a} days.",
    "For {a} days {n} reads {b} pages a day.",
    "{n} reads for {a} days, {b} pages each day.",
)
NOTHING = ("",)
THEMES = (
    Theme("gain", "+", HAVE, GAIN, HOW_MANY),
    Theme("lose", "-", HAVE, LOSE, HOW_MANY),
    Theme(
        "groups",
        "*",
        GROUPS,
        NOTHING,
        (*HOW_MANY[::3], "How many {x} are there in all?", "How many {x} does {n} have in all?"),
    ),
    Theme(
        "price",
        "*",
        PRICES,
        NOTHING,
        ("How many dollars does {n} pay?", "How much does {n} pay in all?", "What is the price of all the {x}?"),
    ),
    Theme(
        "pages",
        "*",
        EACH_DAY,
        NOTHING,
        (
            "How many pages does {n} read in all?",
            "How many pages is that?",
            "What is the number of pages that {n} reads?",
        ),
    ),
    Theme(
        "gain_lose",
        "+-",
        HAVE,
        tuple(f"{gain} {lose}" for gain, lose in zip(GAIN, LOSE_C[1:] + LOSE_C[:1], strict=True)),
        HOW_MANY,
    ),
    Theme(
        "lose_gain",
        "-+",
        HAVE,
        tuple(f"{lose} {gain}" for lose, gain in zip(LOSE, GAIN_C[2:] + GAIN_C[:2], strict=True)),
        HOW_MANY,
    ),
    Theme("groups_gain", "*+", GROUPS, GAIN_C, HOW_MANY),
    Theme("groups_lose", "*-", GROUPS, LOSE_C, HOW_MANY),
    Theme(
        "more_than",
        "++",
        HAVE,
        (
            "{m} has {b} more than {n}, and {f} has {c} more than {m}.",
            "{m} has {b} {x} more than {n}. {f} has {c} more than {m}.",
        ),
        ("How many {x} does {f} have?", "What is the number of {x} that {f} has?", "How many {x} are {f}'s?"),
    ),
)
ASIDES = (
    "{n} is {d} years old.",
    "It is day {d} of the month.",
    "{m} lives at number {d}.",
    "{n} also sees {d} birds.",
    "The walk home takes {d} minutes.",
)


@functools.cache
def theme_templates(theme: Theme, split: str) -> list[tuple[str, str, str]]:
    """(start, change, question) triples of the split: held-out triples are new combinations of known parts."""
    result = []
    for i, start in enumerate(theme.starts):
        for j, change in enumerate(theme.changes):
            for k, question in enumerate(theme.questions):
                if split_of(i + j, k) == split:
                    result.append((start, change, question))
    return result


def _numbers(rng: random.Random, ops: str, split: str) -> list[int]:
    """Operands a, b (and c) whose pairs, first and second step's, belong to the split. Results stay positive."""
    while True:
        if ops[0] == "*":
            numbers = [rng.randrange(2, 13), rng.randrange(2, 25)]
        else:
            numbers = [rng.randrange(3, 61), rng.randrange(2, 61)]
        if split_of_pair(*numbers) != split:
            continue
        result = compute(numbers[0], ops[0], numbers[1])
        if result < 1:
            continue
        if len(ops) == 2:
            numbers.append(rng.randrange(2, 31))
            if split_of_pair(result, numbers[2]) != split:
                continue
            if compute(result, ops[1], numbers[2]) < 1:
                continue
        return numbers


def word_problem(rng: random.Random, split: str) -> tuple[str, list[Part], int]:
    """(question, answer parts, result). One or two steps; a third of them with a number that does not matter."""
    theme = rng.choice(THEMES)
    start, change, question = rng.choice(theme_templates(theme, split))
    numbers = _numbers(rng, theme.ops, split)
    sentences = [start, change, question] if change else [start, question]
    if rng.random() < 0.33:
        sentences.insert(rng.randrange(len(sentences)), rng.choice(ASIDES))
    boy_first = rng.random() < 0.5
    n, m = rng.choice(BOYS if boy_first else GIRLS), rng.choice(GIRLS if boy_first else BOYS)
    f = rng.choice([name for name in BOYS + GIRLS if name not in (n, m)])
    shown = [UNITS[v] if v <= 12 and rng.random() < 0.2 else str(v) for v in numbers] + [""]
    slots = {"{n}": n, "{m}": m, "{f}": f, "{x}": rng.choice(ITEMS), "{d}": str(rng.randrange(5, 30))}
    slots |= {"{He}": "He" if boy_first else "She", "{a}": shown[0], "{b}": shown[1], "{c}": shown[2]}
    text = " ".join(sentences)
    for slot, value in slots.items():
        text = text.replace(slot, value)
    return text, _work(numbers, theme.ops), _result(numbers, theme.ops)


LETTERS = ("A", "B", "C", "D", "E")
ASK_LETTER = "Solve this problem. Reason briefly, then finish with a last line `Answer: <letter>`."


def choice_problem(rng: random.Random, split: str) -> tuple[str, list[Part], str]:
    """(prompt, answer parts, letter): a word problem with five options, in the form of tasks/aqua.py. The work is
    shown first, then the option's line as it stands in the list, then the letter."""
    question, parts, result = word_problem(rng, split)
    steps = [int(part["text"]) for part in parts if part["type"] == "python_output"]
    near = [result + d for d in (-10, -3, -2, -1, 1, 2, 3, 10)] + [int(str(result)[::-1]), 2 * result, *steps[:-1]]
    choices = [result, *rng.sample(sorted({n for n in near if n > 0} - {result}), len(LETTERS) - 1)]
    rng.shuffle(choices)
    letter = LETTERS[choices.index(result)]
    listing = "\n".join(f"- {choice}={name}" for choice, name in zip(choices, LETTERS, strict=True))
    last = {"type": "text", "text": f"{result}.\nIt is {result}={letter}\nAnswer: {letter}"}
    return f"{ASK_LETTER}\n\nMultiple Choice question: {question}\n{listing}", [*parts[:-1], last], letter


def _result(numbers: list[int], ops: str) -> int:
    result = numbers[0]
    for op, number in zip(ops, numbers[1:], strict=True):
        result = compute(result, op, number)
    return result


def _work(numbers: list[int], ops: str) -> list[Part]:
    """GSM8K's form: every step is text, a tool call and its output; the last line is `#### result`."""
    parts: list[Part] = []
    total, lead = numbers[0], ""
    for op, number in zip(ops, numbers[1:], strict=True):
        step = compute(total, op, number)
        parts.append({"type": "text", "text": f"{lead}{total} {op} {number} = "})
        parts += tool_call(f"{total}{op}{number}", step)
        total, lead = step, f"{step}. Then "
    return [*parts, {"type": "text", "text": f"{total}.\n#### {total}"}]
