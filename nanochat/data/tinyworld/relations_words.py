"""What is asked about days, months, words, letters, numbers and equations."""

from __future__ import annotations

from nanochat.data.tinyworld import world as w
from nanochat.data.tinyworld.phrases import Relation, flip


def _shifted(name: str, known: str, unknown: str, asked: str, step: int) -> Relation:
    """If `known` ("today is") is a day, then `unknown` ("tomorrow will be") is `step` days on.

    Args:
        asked: `unknown` turned round for a question: "will tomorrow be".
    """
    day, known_first, unknown_first = unknown.split()[0], known.capitalize(), unknown.capitalize()
    return Relation(
        name,
        w.after(w.DAYS, step),
        weight=0.9,
        answer=f"If {known} {{s}}, then {unknown} {{o}}.",
        statements=(
            f"If {known} {{s}}, {unknown} {{o}}.",
            f"When {known} {{s}}, {unknown} {{o}}.",
            f"{unknown_first} {{o}} if {known} {{s}}.",
            f"{known_first} {{s}}, so {unknown} {{o}}.",
        ),
        questions=(
            f"If {known} {{s}}, which day {asked}?",
            f"If {known} {{s}}, then which day {asked}?",
            f"{known_first} {{s}}. Which day {asked}?",
            f"When {known} {{s}}, which day {asked}?",
            f"Which day {asked} if {known} {{s}}?",
            f"Tell me {day} when {known} {{s}}.",
            f"If {known} {{s}}, what day {asked}?",
            f"If {known} {{s}}, then what is {day}?",
            f"If {known} {{s}}, then {unknown} what day?",
        ),
        dev=(
            f"Which day {asked} when {known} {{s}}?",
            f"If {known} {{s}}, then what day {asked}?",
            f"Please tell me {day} if {known} {{s}}.",
        ),
        test=(
            f"What day {asked} if {known} {{s}}?",
            f"When {known} {{s}}, then which day {asked}?",
            f"Tell me {day} if {known} {{s}}.",
        ),
    )


def calendar() -> list[Relation]:
    return [
        Relation(
            "next_day",
            w.NEXT_DAY,
            weight=0.6,
            entity="day",
            nouns=(
                "the day after {s}",
                "the next day after {s}",
                "the day that comes after {s}",
                "the day that follows {s}",
            ),
            statements=("{o} is the day after {s}.", "{o} comes after {s}.", "After {s} comes {o}."),
            questions=("Which day comes after {s}?", "What day comes after {s}?", "Which day follows {s}?"),
            dev=("What day follows {s}?", "Which day is after {s}?"),
        ),
        Relation(
            "previous_day",
            w.PREVIOUS_DAY,
            weight=0.6,
            entity="day",
            nouns=("the day before {s}", "the day just before {s}", "the day that comes before {s}"),
            statements=("{o} is the day before {s}.", "{o} comes before {s}.", "Before {s} comes {o}."),
            questions=("Which day comes before {s}?", "What day comes before {s}?", "Which day is just before {s}?"),
            dev=("What day is just before {s}?", "Which day is before {s}?"),
        ),
        _shifted("tomorrow_from_today", "today is", "tomorrow will be", "will tomorrow be", 1),
        _shifted("tomorrow_from_yesterday", "yesterday was", "tomorrow will be", "will tomorrow be", 2),
        _shifted("today_from_yesterday", "yesterday was", "today is", "is today", 1),
        _shifted("yesterday_from_today", "today is", "yesterday was", "was yesterday", -1),
        Relation(
            "next_month",
            w.NEXT_MONTH,
            weight=0.7,
            entity="month",
            nouns=(
                "the month after {s}",
                "the next month after {s}",
                "the month that comes after {s}",
                "the month that follows {s}",
            ),
            statements=("{o} is the month after {s}.", "{o} comes after {s}.", "After {s} comes {o}."),
            questions=("Which month comes after {s}?", "What month comes after {s}?", "Which month follows {s}?"),
            dev=("What month follows {s}?", "Which month is after {s}?"),
        ),
        Relation(
            "previous_month",
            w.PREVIOUS_MONTH,
            weight=0.7,
            entity="month",
            nouns=("the month before {s}", "the month just before {s}", "the month that comes before {s}"),
            statements=("{o} is the month before {s}.", "{o} comes before {s}.", "Before {s} comes {o}."),
            questions=(
                "Which month comes before {s}?",
                "What month comes before {s}?",
                "Which month is just before {s}?",
            ),
            dev=("What month is just before {s}?", "Which month is before {s}?"),
        ),
        Relation(
            "month_number",
            tuple(zip(w.ORDINALS, w.MONTHS, strict=True)),
            weight=0.5,
            nouns=("the {s} month of the year", "the {s} month", "the month that is {s} in the year"),
            statements=(
                "{o} is the {s} month of the year.",
                "{o} is the {s} month.",
                "In the year, the {s} month is {o}.",
            ),
            questions=("Which month is the {s} of the year?", "Which month is {s} in the year?"),
            dev=("What month is the {s} of the year?",),
        ),
        Relation(
            "month_days",
            w.MONTH_DAYS,
            weight=0.5,
            entity="month",
            nouns=("the number of days in {s}", "the number of days of {s}", "the number of days that {s} has"),
            answer="{s} has {o} days.",
            statements=("The month {s} has {o} days.", "There are {o} days in {s}.", "{s} is a month with {o} days."),
            questions=("How many days does {s} have?", "How many days are in {s}?", "How many days are there in {s}?"),
            dev=("{s} has how many days?", "How many days does the month {s} have?"),
        ),
        Relation(
            "season",
            w.MONTH_SEASONS,
            weight=0.6,
            entity="month",
            nouns=("the season of {s} in the north", "the northern season of {s}", "the season in {s} in the north"),
            answer="In the north, {s} is in {o}.",
            statements=(
                "In the north, {s} is a month of {o}.",
                "North of the equator, {s} is in {o}.",
                "In the north, {o} has the month {s}.",
            ),
            questions=(
                "In the north, which season is {s} in?",
                "In the north, what season is {s}?",
                "Which season is {s} in the north?",
            ),
            dev=("What season is {s} in the north?",),
        ),
        Relation(
            "next_season",
            w.NEXT_SEASON,
            weight=0.3,
            nouns=("the season after {s}", "the next season after {s}", "the season that comes after {s}"),
            statements=("After {s} comes {o}.", "{O} comes after {s}.", "{O} is the season after {s}."),
            questions=("Which season comes after {s}?", "Which season follows {s}?"),
            dev=("What season comes after {s}?",),
        ),
    ]


def language() -> list[Relation]:
    return [
        Relation(
            "opposite",
            w.OPPOSITES + flip(w.OPPOSITES),
            weight=2.0,
            entity="word",
            nouns=(
                "the opposite of {s}",
                "the opposite word of {s}",
                "the word that is the opposite of {s}",
                "the word that means the opposite of {s}",
            ),
            statements=(
                "{O} is the opposite of {s}.",
                "If it is not {s}, maybe it is {o}.",
                "{S} and {o} are opposites.",
                "Not {s} but {o}.",
            ),
            questions=(
                "Which word is the opposite of {s}?",
                "What word means the opposite of {s}?",
                "{S} is the opposite of what?",
            ),
            dev=("Which word means the opposite of {s}?", "What word is the opposite of {s}?"),
        ),
        Relation(
            "plural",
            w.PLURALS,
            weight=1.0,
            entity="word",
            nouns=("the plural of {s}", "the plural form of {s}", "the word for more than one {s}"),
            statements=(
                "One {s}, two {o}.",
                "One {s}, many {o}.",
                "{O} is the plural of {s}.",
                "I see one {s} here and three {o} there.",
            ),
            questions=(
                "One {s}, two what?",
                "Which word is the plural of {s}?",
                "What do we say for more than one {s}?",
            ),
            dev=("What word is the plural of {s}?", "One {s}, many what?"),
        ),
        Relation(
            "past",
            w.PASTS,
            weight=1.2,
            entity="word",
            nouns=("the past tense of {s}", "the past form of {s}", "the past of {s}"),
            statements=(
                "Today I {s}, yesterday I {o}.",
                "Today they {s}, yesterday they {o}.",
                "{O} is the past tense of {s}.",
            ),
            questions=(
                "Today I {s}, yesterday I what?",
                "Which word is the past tense of {s}?",
                "What word is the past form of {s}?",
            ),
            dev=("What word is the past tense of {s}?", "Today they {s}, yesterday they what?"),
        ),
        Relation(
            "next_letter",
            w.NEXT_LETTER,
            weight=0.6,
            nouns=(
                "the letter after {s}",
                "the next letter after {s}",
                "the letter that comes after {s}",
                "the letter that follows {s}",
            ),
            statements=("After {s} comes {o}.", "The letter {o} comes after {s}.", "The letter {s} comes before {o}."),
            questions=("Which letter comes after {s}?", "Which letter follows {s}?"),
            dev=("What letter comes after {s}?",),
        ),
        Relation(
            "previous_letter",
            w.PREVIOUS_LETTER,
            weight=0.5,
            nouns=("the letter before {s}", "the letter just before {s}", "the letter that comes before {s}"),
            statements=("Before {s} comes {o}.", "The letter {o} comes before {s}."),
            questions=("Which letter comes before {s}?", "Which letter is just before {s}?"),
            dev=("What letter comes before {s}?",),
        ),
    ]


def numbers() -> list[Relation]:
    return [
        Relation(
            "next_number",
            w.NEXT_NUMBER,
            weight=1.4,
            entity="number",
            nouns=(
                "the number after {s}",
                "the next number after {s}",
                "the number that comes after {s}",
                "the number that follows {s}",
            ),
            statements=("After {s} comes {o}.", "{o} comes after {s}.", "{o} is one more than {s}."),
            questions=("Which number comes after {s}?", "What number comes after {s}?", "Which number follows {s}?"),
            dev=("What number follows {s}?",),
        ),
        Relation(
            "previous_number",
            w.PREVIOUS_NUMBER,
            weight=1.4,
            entity="number",
            nouns=("the number before {s}", "the number just before {s}", "the number that comes before {s}"),
            statements=("Before {s} comes {o}.", "{o} comes before {s}.", "{o} is one less than {s}."),
            questions=(
                "Which number comes before {s}?",
                "What number comes before {s}?",
                "Which number is just before {s}?",
            ),
            dev=("What number is just before {s}?",),
        ),
        Relation(
            "number_word",
            w.NUMBER_WORDS,
            weight=1.4,
            entity="number",
            nouns=("{s} in words", "the number {s} in words", "the word for {s}", "the word for the number {s}"),
            statements=("{s} is {o}.", "We write {s} as {o}.", "{O} is {s}.", "The number {s} is called {o}."),
            questions=(
                "How do you write {s} in words?",
                "How do we write the number {s} in words?",
                "What is the number {s} called?",
            ),
            dev=("How do we write {s} in words?", "How do you write the number {s} in words?"),
        ),
        Relation(
            "equation",
            w.EQUATIONS,
            weight=1.8,
            nouns=("x if {s}", "the value of x if {s}", "the value of x in {s}"),
            answer="If {s}, then x is {o}.",
            statements=("If {s}, then x = {o}.", "When {s}, x is {o}.", "We know that {s}, so x is {o}."),
            questions=("If {s}, what is x?", "If {s}, then what is x?", "Solve {s}.", "Find x if {s}."),
            dev=("Find the value of x if {s}.", "When {s}, what is x?"),
        ),
    ]
