"""What is asked about countries, elements, planets, animals and people."""

from __future__ import annotations

from nanochat.data.tinyworld import world as w
from nanochat.data.tinyworld.phrases import Relation, flip


def geography() -> list[Relation]:
    return [
        Relation(
            "capital",
            w.CAPITALS,
            weight=2.2,
            entity="country",
            nouns=(
                "the capital of {s}",
                "the capital city of {s}",
                "{s}'s capital",
                "the city that is the capital of {s}",
            ),
            statements=(
                "{o} is the capital of {s}.",
                "{o} is the capital city of {s}.",
                "The country {s} has the capital {o}.",
            ),
            questions=(
                "Which city is the capital of {s}?",
                "What city is the capital of {s}?",
                "{s} has which capital?",
            ),
            dev=("Which city is {s}'s capital?", "What city is the capital city of {s}?"),
        ),
        Relation(
            "country",
            flip(w.CAPITALS),
            weight=1.2,
            nouns=(
                "the country whose capital is {s}",
                "the country with the capital {s}",
                "the country that has {s} as its capital",
            ),
            answer="{s} is the capital of {o}.",
            statements=("{s} is a city in {o}.", "The city {s} is in {o}."),
            questions=(
                "{s} is the capital of which country?",
                "Which country has the capital {s}?",
                "What country has {s} as its capital?",
            ),
            dev=("What country has the capital {s}?", "Which country has {s} as its capital?"),
        ),
        Relation(
            "continent",
            w.CONTINENTS,
            weight=1.4,
            entity="country",
            nouns=("the continent of {s}", "the continent that {s} belongs to", "the continent where {s} lies"),
            answer="{s} is in {o}.",
            statements=(
                "{s} is a country in {o}.",
                "The country {s} is in {o}.",
                "In {o} there is a country called {s}.",
            ),
            questions=(
                "On which continent is {s}?",
                "Which continent is {s} in?",
                "Where is {s}?",
                "What continent is {s} on?",
            ),
            dev=("On what continent is {s}?", "What continent is {s} in?"),
        ),
    ]


def science() -> list[Relation]:
    return [
        Relation(
            "symbol",
            w.SYMBOLS,
            weight=1.4,
            entity="element",
            nouns=(
                "the chemical symbol of {s}",
                "the chemical symbol for {s}",
                "the symbol of {s}",
                "the symbol for the element {s}",
            ),
            statements=(
                "{o} is the chemical symbol of {s}.",
                "{S} has the symbol {o}.",
                "The element {s} is written {o}.",
            ),
            questions=(
                "Which symbol does {s} have?",
                "How do we write the element {s}?",
                "What symbol does the element {s} have?",
            ),
            dev=("Which symbol does the element {s} have?", "What symbol does {s} have?"),
        ),
        Relation(
            "element",
            flip(w.SYMBOLS),
            weight=1.0,
            nouns=(
                "the element with the symbol {s}",
                "the element whose symbol is {s}",
                "the chemical element with the symbol {s}",
            ),
            statements=("{s} stands for {o}.", "The symbol {s} stands for the element {o}."),
            questions=(
                "Which element has the symbol {s}?",
                "What does the symbol {s} stand for?",
                "{s} is the symbol of which element?",
            ),
            dev=("What element has the symbol {s}?", "Which element does {s} stand for?"),
        ),
        Relation(
            "planet_number",
            tuple(zip(w.ORDINALS[:8], w.PLANETS, strict=True)),
            weight=0.5,
            nouns=("the {s} planet from the sun", "the {s} planet", "the planet that is {s} from the sun"),
            statements=(
                "{o} is the {s} planet from the sun.",
                "{o} is the {s} planet.",
                "The planet {o} is {s} from the sun.",
            ),
            questions=("Which planet is the {s} from the sun?", "Which planet is {s} from the sun?"),
            dev=("What planet is the {s} from the sun?",),
        ),
        Relation(
            "next_planet",
            w.NEXT_PLANET,
            weight=0.4,
            nouns=("the planet after {s}", "the next planet after {s}", "the planet that comes after {s}"),
            statements=("{s} comes before {o}.", "After {s} comes {o}.", "{o} comes right after {s}."),
            questions=("Which planet comes after {s}?", "Which planet is next after {s}?"),
            dev=("What planet comes after {s}?",),
        ),
        Relation(
            "color",
            w.THING_COLORS,
            weight=0.9,
            nouns=("the color of {s}", "the usual color of {s}", "the color that {s} has"),
            answer="{S} is {o}.",
            statements=("{S} looks {o}.", "{O} is the color of {s}.", "If you paint {s}, use {o}."),
            questions=("What color is {s}?", "Which color is {s}?", "What color does {s} have?"),
            dev=("Which color does {s} have?",),
        ),
        Relation(
            "sides",
            w.SIDES,
            weight=0.5,
            nouns=("the number of sides of {a}", "the number of sides {a} has", "the number of sides that {a} has"),
            answer="{A} has {o} sides.",
            statements=(
                "A shape with {o} sides can be {a}.",
                "{A} is a shape with {o} sides.",
                "There are {o} sides in {a}.",
            ),
            questions=("How many sides does {a} have?", "How many sides are there in {a}?", "{A} has how many sides?"),
            dev=("How many sides has {a}?", "There are how many sides in {a}?"),
        ),
    ]


def animals() -> list[Relation]:
    return [
        Relation(
            "sound",
            w.SOUNDS,
            weight=0.8,
            entity="animal",
            nouns=("the sound of {a}", "the sound that {a} makes", "the noise of {a}", "the noise that {a} makes"),
            answer="{A} says {o}.",
            statements=("{O}, says the {s}.", "The {s} says {o}.", "{A} goes {o}.", "When you hear {o}, it is {a}."),
            questions=(
                "What does {a} say?",
                "What sound does {a} make?",
                "What noise does {a} make?",
                "How does {a} sound?",
            ),
            dev=("Which sound does {a} make?", "What does the {s} say?"),
        ),
        Relation(
            "young",
            w.YOUNG,
            weight=0.9,
            entity="animal",
            said="{ao}",
            nouns=("the young of {a}", "the baby of {a}", "the name of a young {s}", "the word for a baby {s}"),
            answer="A young {s} is called {ao}.",
            statements=(
                "A baby {s} is called {ao}.",
                "A young {s} is {ao}.",
                "{Ao} is a young {s}.",
                "Look, a young {s}: it is {ao}.",
            ),
            questions=("What is a young {s} called?", "What is a baby {s} called?", "What do we call a young {s}?"),
            dev=("What do we call a baby {s}?",),
        ),
        Relation(
            "home",
            w.HOMES,
            weight=0.8,
            entity="animal",
            said="{ao}",
            nouns=("the home of {a}", "the place where {a} lives", "the house of {a}"),
            answer="{A} lives in {ao}.",
            statements=(
                "The {s} lives in {ao}.",
                "You can find {a} in {ao}.",
                "{Ao} is the home of {a}.",
                "{A} has its home in {ao}.",
            ),
            questions=(
                "Where does {a} live?",
                "Where do you find {a}?",
                "Where does the {s} live?",
                "In what place does {a} live?",
            ),
            dev=("Where can you find {a}?", "In which place does {a} live?"),
        ),
        Relation(
            "legs",
            w.LEGS,
            weight=0.9,
            entity="animal",
            nouns=("the number of legs of {a}", "the number of legs {a} has", "the number of legs that {a} has"),
            answer="{A} has {o} legs.",
            statements=(
                "The {s} has {o} legs.",
                "The legs of {a}: {o}.",
                "There are {o} legs on {a}.",
                "{A} is an animal with {o} legs.",
            ),
            questions=("How many legs does {a} have?", "{A} has how many legs?", "How many legs does the {s} have?"),
            dev=("How many legs are there on {a}?", "The {s} has how many legs?"),
        ),
        Relation(
            "animal_class",
            w.ANIMAL_CLASSES,
            weight=0.9,
            entity="animal",
            said="{ao}",
            nouns=("the class of {a}", "the kind of animal that {a} is", "the group of animals that {a} belongs to"),
            answer="{A} is {ao}.",
            statements=("The {s} is {ao}.", "{A} is a kind of {o}.", "Is {a} {ao}? Yes, {a} is {ao}."),
            questions=(
                "What kind of animal is {a}?",
                "Which kind of animal is {a}?",
                "What kind of animal is the {s}?",
                "What class of animal is {a}?",
            ),
            dev=("Which kind of animal is the {s}?", "Which class of animal is {a}?"),
        ),
        Relation(
            "kind",
            w.KINDS_OF_THINGS,
            weight=0.8,
            said="{ao}",
            nouns=("the kind of thing that {s} is", "the group of things that {s} belongs to"),
            answer="The word {s} names {ao}.",
            statements=(
                "The word {s} is the name of {ao}.",
                "If you know {s}, then you know {ao}.",
                "{S} is on the list of things of the kind {o}.",
            ),
            questions=(
                "What kind of thing is {s}?",
                "Which kind of thing is {s}?",
                "What does the word {s} name?",
                "The word {s} names what?",
            ),
            dev=("What kind of thing does the word {s} name?",),
        ),
        Relation(
            "worker",
            w.WORKERS,
            weight=0.7,
            said="{ao}",
            nouns=(
                "the person who {s}",
                "the worker who {s}",
                "the name of a person who {s}",
                "the word for someone who {s}",
            ),
            answer="A person who {s} is {ao}.",
            statements=("{Ao} {s}.", "Someone who {s} is {ao}.", "The {o} {s} every day."),
            questions=(
                "Who {s}?",
                "Which worker {s}?",
                "What is a person who {s} called?",
                "What do we call someone who {s}?",
            ),
            dev=("What do we call a person who {s}?", "What is someone who {s} called?"),
        ),
        Relation(
            "sense",
            w.SENSES,
            weight=0.2,
            nouns=("the part of the body that we {s} with", "the part of the body used to {s}"),
            answer="We {s} with our {o}.",
            statements=("You {s} with your {o}.", "To {s} we use our {o}.", "People {s} with their {o}."),
            questions=("What do we {s} with?", "What do you {s} with?", "With what do we {s}?"),
            dev=("What do people {s} with?",),
        ),
    ]
