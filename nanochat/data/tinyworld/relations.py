"""Every relation of the world with its phrasings: at least eight in training, and held-out ones (phrases.py)."""

from __future__ import annotations

import functools

from nanochat.data.tinyworld import world as w
from nanochat.data.tinyworld.phrases import Relation


def _flip(facts: w.Pairs) -> w.Pairs:
    return tuple((answer, subject) for subject, answer in facts)


def _geography() -> list[Relation]:
    return [
        Relation(
            "capital", w.CAPITALS, weight=2.2, entity="country",
            nouns=("the capital of {s}", "the capital city of {s}", "{s}'s capital", "the city that is the capital of {s}"),
            statements=("{o} is the capital of {s}.", "{o} is the capital city of {s}.", "The country {s} has the capital {o}."),
            questions=("Which city is the capital of {s}?", "What city is the capital of {s}?", "{s} has which capital?"),
            unseen=("Which city is {s}'s capital?", "What city is the capital city of {s}?"),
        ),
        Relation(
            "country", _flip(w.CAPITALS), weight=1.2,
            nouns=("the country whose capital is {s}", "the country with the capital {s}", "the country that has {s} as its capital"),
            answer="{s} is the capital of {o}.",
            statements=("{s} is a city in {o}.", "The city {s} is in {o}."),
            questions=("{s} is the capital of which country?", "Which country has the capital {s}?", "What country has {s} as its capital?"),
            unseen=("What country has the capital {s}?", "Which country has {s} as its capital?"),
        ),
        Relation(
            "continent", w.CONTINENTS, weight=1.4, entity="country",
            nouns=("the continent of {s}", "the continent that {s} belongs to", "the continent where {s} lies"),
            answer="{s} is in {o}.",
            statements=("{s} is a country in {o}.", "The country {s} is in {o}.", "In {o} there is a country called {s}."),
            questions=("On which continent is {s}?", "Which continent is {s} in?", "Where is {s}?", "What continent is {s} on?"),
            unseen=("On what continent is {s}?", "What continent is {s} in?"),
        ),
    ]  # fmt: skip


def _science() -> list[Relation]:
    return [
        Relation(
            "symbol", w.SYMBOLS, weight=1.4, entity="element",
            nouns=("the chemical symbol of {s}", "the chemical symbol for {s}", "the symbol of {s}", "the symbol for the element {s}"),
            statements=("{o} is the chemical symbol of {s}.", "{S} has the symbol {o}.", "The element {s} is written {o}."),
            questions=("Which symbol does {s} have?", "How do we write the element {s}?", "What symbol does the element {s} have?"),
            unseen=("Which symbol does the element {s} have?", "What symbol does {s} have?"),
        ),
        Relation(
            "element", _flip(w.SYMBOLS), weight=1.0,
            nouns=("the element with the symbol {s}", "the element whose symbol is {s}", "the chemical element with the symbol {s}"),
            statements=("{s} stands for {o}.", "The symbol {s} stands for the element {o}."),
            questions=("Which element has the symbol {s}?", "What does the symbol {s} stand for?", "{s} is the symbol of which element?"),
            unseen=("What element has the symbol {s}?", "Which element does {s} stand for?"),
        ),
        Relation(
            "planet_number", tuple(zip(w.ORDINALS, w.PLANETS)), weight=0.5,
            nouns=("the {s} planet from the sun", "the {s} planet", "the planet that is {s} from the sun"),
            statements=("{o} is the {s} planet from the sun.", "{o} is the {s} planet.", "The planet {o} is {s} from the sun."),
            questions=("Which planet is the {s} from the sun?", "Which planet is {s} from the sun?"),
            unseen=("What planet is the {s} from the sun?",),
        ),
        Relation(
            "next_planet", w.NEXT_PLANET, weight=0.4,
            nouns=("the planet after {s}", "the next planet after {s}", "the planet that comes after {s}"),
            statements=("{s} comes before {o}.", "After {s} comes {o}.", "{o} comes right after {s}."),
            questions=("Which planet comes after {s}?", "Which planet is next after {s}?"),
            unseen=("What planet comes after {s}?",),
        ),
        Relation(
            "color", w.THING_COLORS, weight=0.9,
            nouns=("the color of {s}", "the usual color of {s}", "the color that {s} has"),
            answer="{S} is {o}.",
            statements=("{S} looks {o}.", "{O} is the color of {s}.", "If you paint {s}, use {o}."),
            questions=("What color is {s}?", "Which color is {s}?", "What color does {s} have?"),
            unseen=("Which color does {s} have?",),
        ),
        Relation(
            "sides", w.SIDES, weight=0.5,
            nouns=("the number of sides of {a}", "the number of sides {a} has", "the number of sides that {a} has"),
            answer="{A} has {o} sides.",
            statements=("A shape with {o} sides can be {a}.", "{A} is a shape with {o} sides.", "There are {o} sides in {a}."),
            questions=("How many sides does {a} have?", "How many sides are there in {a}?", "{A} has how many sides?"),
            unseen=("How many sides has {a}?", "There are how many sides in {a}?"),
        ),
    ]  # fmt: skip


def _animals() -> list[Relation]:
    return [
        Relation(
            "sound", w.SOUNDS, weight=0.8, entity="animal",
            nouns=("the sound of {a}", "the sound that {a} makes", "the noise of {a}", "the noise that {a} makes"),
            answer="{A} says {o}.",
            statements=("{O}, says the {s}.", "The {s} says {o}.", "{A} goes {o}.", "When you hear {o}, it is {a}."),
            questions=("What does {a} say?", "What sound does {a} make?", "What noise does {a} make?", "How does {a} sound?"),
            unseen=("Which sound does {a} make?", "What does the {s} say?"),
        ),
        Relation(
            "young", w.YOUNG, weight=0.9, entity="animal", said="{ao}",
            nouns=("the young of {a}", "the baby of {a}", "the name of a young {s}", "the word for a baby {s}"),
            answer="A young {s} is called {ao}.",
            statements=("A baby {s} is called {ao}.", "A young {s} is {ao}.", "{Ao} is a young {s}.", "Look, a young {s}: it is {ao}."),
            questions=("What is a young {s} called?", "What is a baby {s} called?", "What do we call a young {s}?"),
            unseen=("What do we call a baby {s}?",),
        ),
        Relation(
            "home", w.HOMES, weight=0.8, entity="animal", said="{ao}",
            nouns=("the home of {a}", "the place where {a} lives", "the house of {a}"),
            answer="{A} lives in {ao}.",
            statements=("The {s} lives in {ao}.", "You can find {a} in {ao}.", "{Ao} is the home of {a}.", "{A} has its home in {ao}."),
            questions=("Where does {a} live?", "Where do you find {a}?", "Where does the {s} live?", "In what place does {a} live?"),
            unseen=("Where can you find {a}?", "In which place does {a} live?"),
        ),
        Relation(
            "legs", w.LEGS, weight=0.9, entity="animal",
            nouns=("the number of legs of {a}", "the number of legs {a} has", "the number of legs that {a} has"),
            answer="{A} has {o} legs.",
            statements=("The {s} has {o} legs.", "The legs of {a}: {o}.", "There are {o} legs on {a}.", "{A} is an animal with {o} legs."),
            questions=("How many legs does {a} have?", "{A} has how many legs?", "How many legs does the {s} have?"),
            unseen=("How many legs are there on {a}?", "The {s} has how many legs?"),
        ),
        Relation(
            "animal_class", w.ANIMAL_CLASSES, weight=0.9, entity="animal", said="{ao}",
            nouns=("the class of {a}", "the kind of animal that {a} is", "the group of animals that {a} belongs to"),
            answer="{A} is {ao}.",
            statements=("The {s} is {ao}.", "{A} is a kind of {o}.", "Is {a} {ao}? Yes, {a} is {ao}."),
            questions=("What kind of animal is {a}?", "Which kind of animal is {a}?", "What kind of animal is the {s}?", "What class of animal is {a}?"),
            unseen=("Which kind of animal is the {s}?", "Which class of animal is {a}?"),
        ),
        Relation(
            "kind", w.KINDS_OF_THINGS, weight=0.8, said="{ao}",
            nouns=("the kind of thing that {s} is", "the group of things that {s} belongs to"),
            answer="The word {s} names {ao}.",
            statements=("The word {s} is the name of {ao}.", "If you know {s}, then you know {ao}.", "{S} is on the list of things of the kind {o}."),
            questions=("What kind of thing is {s}?", "Which kind of thing is {s}?", "What does the word {s} name?", "The word {s} names what?"),
            unseen=("What kind of thing does the word {s} name?",),
        ),
        Relation(
            "worker", w.WORKERS, weight=0.7, said="{ao}",
            nouns=("the person who {s}", "the worker who {s}", "the name of a person who {s}", "the word for someone who {s}"),
            answer="A person who {s} is {ao}.",
            statements=("{Ao} {s}.", "Someone who {s} is {ao}.", "The {o} {s} every day."),
            questions=("Who {s}?", "Which worker {s}?", "What is a person who {s} called?", "What do we call someone who {s}?"),
            unseen=("What do we call a person who {s}?", "What is someone who {s} called?"),
        ),
        Relation(
            "sense", w.SENSES, weight=0.2,
            nouns=("the part of the body that we {s} with", "the part of the body used to {s}"),
            answer="We {s} with our {o}.",
            statements=("You {s} with your {o}.", "To {s} we use our {o}.", "People {s} with their {o}."),
            questions=("What do we {s} with?", "What do you {s} with?", "With what do we {s}?"),
            unseen=("With what do you {s}?",),
        ),
    ]  # fmt: skip


def _calendar() -> list[Relation]:
    def shifted(name: str, known: str, unknown: str, step: int) -> Relation:
        """If `known` is a day, which day is `unknown`: both are phrases such as "tomorrow will be"."""
        day, verb = unknown.split(" ", 1)
        asked = f"which day {'is today' if unknown == 'today is' else f'{verb.split()[0]} {day}' + (' be' if 'will' in verb else '')}"
        return Relation(
            name, w._after(w.DAYS, step), weight=0.45,
            answer=f"If {known} {{s}}, then {unknown} {{o}}.",
            statements=(
                f"If {known} {{s}}, {unknown} {{o}}.", f"When {known} {{s}}, {unknown} {{o}}.",
                f"{unknown.capitalize()} {{o}} if {known} {{s}}.", f"{known.capitalize()} {{s}}, so {unknown} {{o}}.",
            ),
            questions=(
                f"If {known} {{s}}, {asked}?", f"If {known} {{s}}, then {asked}?", f"{known.capitalize()} {{s}}. {asked.capitalize()}?",
                f"When {known} {{s}}, {asked}?", f"{asked.capitalize()} if {known} {{s}}?", f"Tell me {day} if {known} {{s}}.",
                f"If {known} {{s}}, what day {asked[10:]}?", f"If {known} {{s}}, then what is {day}?",
                f"If {known} {{s}}, then {unknown} what day?",
            ),
            unseen=(
                f"{asked.capitalize()} when {known} {{s}}?", f"If {known} {{s}}, then what day {asked[10:]}?",
                f"Please tell me {day} if {known} {{s}}.",
            ),
        )  # fmt: skip

    return [
        Relation(
            "next_day", w.NEXT_DAY, weight=0.6, entity="day",
            nouns=("the day after {s}", "the next day after {s}", "the day that comes after {s}", "the day that follows {s}"),
            statements=("{o} is the day after {s}.", "{o} comes after {s}.", "After {s} comes {o}."),
            questions=("Which day comes after {s}?", "What day comes after {s}?", "Which day follows {s}?"),
            unseen=("What day follows {s}?", "Which day is after {s}?"),
        ),
        Relation(
            "previous_day", w.PREVIOUS_DAY, weight=0.6, entity="day",
            nouns=("the day before {s}", "the day just before {s}", "the day that comes before {s}"),
            statements=("{o} is the day before {s}.", "{o} comes before {s}.", "Before {s} comes {o}."),
            questions=("Which day comes before {s}?", "What day comes before {s}?", "Which day is just before {s}?"),
            unseen=("What day is just before {s}?", "Which day is before {s}?"),
        ),
        shifted("tomorrow_from_today", "today is", "tomorrow will be", 1),
        shifted("tomorrow_from_yesterday", "yesterday was", "tomorrow will be", 2),
        shifted("today_from_yesterday", "yesterday was", "today is", 1),
        shifted("yesterday_from_today", "today is", "yesterday was", -1),
        Relation(
            "next_month", w.NEXT_MONTH, weight=0.7, entity="month",
            nouns=("the month after {s}", "the next month after {s}", "the month that comes after {s}", "the month that follows {s}"),
            statements=("{o} is the month after {s}.", "{o} comes after {s}.", "After {s} comes {o}."),
            questions=("Which month comes after {s}?", "What month comes after {s}?", "Which month follows {s}?"),
            unseen=("What month follows {s}?", "Which month is after {s}?"),
        ),
        Relation(
            "previous_month", w.PREVIOUS_MONTH, weight=0.7, entity="month",
            nouns=("the month before {s}", "the month just before {s}", "the month that comes before {s}"),
            statements=("{o} is the month before {s}.", "{o} comes before {s}.", "Before {s} comes {o}."),
            questions=("Which month comes before {s}?", "What month comes before {s}?", "Which month is just before {s}?"),
            unseen=("What month is just before {s}?", "Which month is before {s}?"),
        ),
        Relation(
            "month_number", tuple(zip(w.ORDINALS, w.MONTHS)), weight=0.5,
            nouns=("the {s} month of the year", "the {s} month", "the month that is {s} in the year"),
            statements=("{o} is the {s} month of the year.", "{o} is the {s} month.", "In the year, the {s} month is {o}."),
            questions=("Which month is the {s} of the year?", "Which month is {s} in the year?"),
            unseen=("What month is the {s} of the year?",),
        ),
        Relation(
            "month_days", w.MONTH_DAYS, weight=0.5, entity="month",
            nouns=("the number of days in {s}", "the number of days of {s}", "the number of days that {s} has"),
            answer="{s} has {o} days.",
            statements=("The month {s} has {o} days.", "There are {o} days in {s}.", "{s} is a month with {o} days."),
            questions=("How many days does {s} have?", "How many days are in {s}?", "How many days are there in {s}?"),
            unseen=("{s} has how many days?", "How many days does the month {s} have?"),
        ),
        Relation(
            "season", w.MONTH_SEASONS, weight=0.6, entity="month",
            nouns=("the season of {s} in the north", "the northern season of {s}", "the season in {s} in the north"),
            answer="In the north, {s} is in {o}.",
            statements=("In the north, {s} is a month of {o}.", "North of the equator, {s} is in {o}.", "In the north, {o} has the month {s}."),
            questions=("In the north, which season is {s} in?", "In the north, what season is {s}?", "Which season is {s} in the north?"),
            unseen=("What season is {s} in the north?",),
        ),
        Relation(
            "next_season", w.NEXT_SEASON, weight=0.3,
            nouns=("the season after {s}", "the next season after {s}", "the season that comes after {s}"),
            statements=("After {s} comes {o}.", "{O} comes after {s}.", "{O} is the season after {s}."),
            questions=("Which season comes after {s}?", "Which season follows {s}?"),
            unseen=("What season comes after {s}?",),
        ),
    ]  # fmt: skip


def _language() -> list[Relation]:
    return [
        Relation(
            "opposite", w.OPPOSITES + _flip(w.OPPOSITES), weight=2.0, entity="word",
            nouns=("the opposite of {s}", "the opposite word of {s}", "the word that is the opposite of {s}", "the word that means the opposite of {s}"),
            statements=("{O} is the opposite of {s}.", "If it is not {s}, maybe it is {o}.", "{S} and {o} are opposites.", "Not {s} but {o}."),
            questions=("Which word is the opposite of {s}?", "What word means the opposite of {s}?", "{S} is the opposite of what?"),
            unseen=("Which word means the opposite of {s}?", "What word is the opposite of {s}?"),
        ),
        Relation(
            "plural", w.PLURALS, weight=1.0, entity="word",
            nouns=("the plural of {s}", "the plural form of {s}", "the word for more than one {s}"),
            statements=("One {s}, two {o}.", "One {s}, many {o}.", "{O} is the plural of {s}.", "I see one {s} here and three {o} there."),
            questions=("One {s}, two what?", "Which word is the plural of {s}?", "What do we say for more than one {s}?"),
            unseen=("What word is the plural of {s}?", "One {s}, many what?"),
        ),
        Relation(
            "past", w.PASTS, weight=1.2, entity="word",
            nouns=("the past tense of {s}", "the past form of {s}", "the past of {s}"),
            statements=("Today I {s}, yesterday I {o}.", "Today they {s}, yesterday they {o}.", "{O} is the past tense of {s}."),
            questions=("Today I {s}, yesterday I what?", "Which word is the past tense of {s}?", "What word is the past form of {s}?"),
            unseen=("What word is the past tense of {s}?", "Today they {s}, yesterday they what?"),
        ),
        Relation(
            "next_letter", w.NEXT_LETTER, weight=0.6,
            nouns=("the letter after {s}", "the next letter after {s}", "the letter that comes after {s}", "the letter that follows {s}"),
            statements=("After {s} comes {o}.", "The letter {o} comes after {s}.", "The letter {s} comes before {o}."),
            questions=("Which letter comes after {s}?", "Which letter follows {s}?"),
            unseen=("What letter comes after {s}?",),
        ),
        Relation(
            "previous_letter", w.PREVIOUS_LETTER, weight=0.5,
            nouns=("the letter before {s}", "the letter just before {s}", "the letter that comes before {s}"),
            statements=("Before {s} comes {o}.", "The letter {o} comes before {s}."),
            questions=("Which letter comes before {s}?", "Which letter is just before {s}?"),
            unseen=("What letter comes before {s}?",),
        ),
    ]  # fmt: skip


def _numbers() -> list[Relation]:
    return [
        Relation(
            "next_number", w.NEXT_NUMBER, weight=0.8, entity="number",
            nouns=("the number after {s}", "the next number after {s}", "the number that comes after {s}", "the number that follows {s}"),
            statements=("After {s} comes {o}.", "{o} comes after {s}.", "{o} is one more than {s}."),
            questions=("Which number comes after {s}?", "What number comes after {s}?", "Which number follows {s}?"),
            unseen=("What number follows {s}?",),
        ),
        Relation(
            "previous_number", w.PREVIOUS_NUMBER, weight=0.8, entity="number",
            nouns=("the number before {s}", "the number just before {s}", "the number that comes before {s}"),
            statements=("Before {s} comes {o}.", "{o} comes before {s}.", "{o} is one less than {s}."),
            questions=("Which number comes before {s}?", "What number comes before {s}?", "Which number is just before {s}?"),
            unseen=("What number is just before {s}?",),
        ),
        Relation(
            "number_word", w.NUMBER_WORDS, weight=0.8, entity="number",
            nouns=("{s} in words", "the number {s} in words", "the word for {s}", "the word for the number {s}"),
            statements=("{s} is {o}.", "We write {s} as {o}.", "{O} is {s}.", "The number {s} is called {o}."),
            questions=("How do you write {s} in words?", "How do we write the number {s} in words?", "What is the number {s} called?"),
            unseen=("How do we write {s} in words?", "How do you write the number {s} in words?"),
        ),
        Relation(
            "equation", w.EQUATIONS, weight=1.2,
            nouns=("x if {s}", "the value of x if {s}", "the value of x in {s}"),
            answer="If {s}, then x is {o}.",
            statements=("If {s}, then x = {o}.", "When {s}, x is {o}.", "We know that {s}, so x is {o}."),
            questions=("If {s}, what is x?", "If {s}, then what is x?", "Solve {s}.", "Find x if {s}."),
            unseen=("Find the value of x if {s}.", "When {s}, what is x?"),
        ),
    ]  # fmt: skip


@functools.cache
def relations() -> tuple[Relation, ...]:
    """All relations, in a fixed order."""
    return (*_geography(), *_science(), *_animals(), *_calendar(), *_language(), *_numbers())


@functools.cache
def relation(name: str) -> Relation:
    """The relation of this name; KeyError when there is none."""
    return {r.name: r for r in relations()}[name]
