"""Little stories from a grammar. What animals do in them is true of the world."""

from __future__ import annotations

import random

from nanochat.data.tinyworld.world import BOYS, COLORS, GIRLS, ITEMS, PLACES, SEASONS, SOUNDS, article

BEGIN = (
    "One {season} day, {name} went to the {place}.",
    "One day {name} walked to the {place}.",
    "It was a warm {season} morning, and {name} was at the {place}.",
    "{name} lived near the {place}.",
    "Once there was a {child} called {name} who loved the {place}.",
)
MEET = (
    "There {he} saw {an_animal}.",
    "{He} met {an_animal} there.",
    "{An_animal} came and looked at {him}.",
    "Near the {place} {he} found {an_animal}.",
)
SPEAK = (
    'The {animal} said, "{Sound}!"',
    '"{Sound}, {sound}!" said the {animal}.',
    '"{Sound}," said the {animal} in a {mood} voice.',
)
WANT = (
    "The {animal} was hungry.",
    "The {animal} was {mood} and wanted a friend.",
    "The {animal} had lost its {color} ball.",
    "The {animal} wanted to play.",
    "The {animal} was cold and a little sad.",
)
HELP = (
    "{name} gave it some food, and it ate all of it.",
    '"I will help you," said {name}.',
    "{name} and {friend} helped the {animal}.",
    "{name} gave the {animal} a {color} blanket.",
    "{name} called {friend}, and they played with the {animal}.",
    "{name} sat down and sang a song for it.",
)
FIND = (
    "Then {he} found three {color} {items} under a tree.",
    "{friend} came with two {items} in a {color} bag.",
    "After that they looked for {items} together.",
    "They ran up the hill and back again.",
)
END = (
    "In the evening {name} went home and was very happy.",
    "From that day on they were friends.",
    "Then the sun went down, and {name} went to sleep.",
    '"What a good day!" said {name}.',
    "{name} told the story to {friend}, and they laughed.",
    "The {animal} was happy, and so was {name}.",
)
FAVORITES = (
    "My favorite color is {color}.",
    '"My favorite color is {color}," said {name}.',
    "{name} likes {color} best, and {friend} likes {items}.",
)
MOODS = ("happy", "loud", "quiet", "small", "soft", "brave")
TEXTS = (*BEGIN, *MEET, *SPEAK, *WANT, *HELP, *FIND, *END, *FAVORITES, *MOODS)


def story(rng: random.Random, animal: str | None = None, name: str | None = None, short: bool = False) -> str:
    """A story of four to nine sentences; the animal and the hero may be asked for."""
    is_boy = name in BOYS if name else rng.random() < 0.5
    name = name or rng.choice(BOYS if is_boy else GIRLS)
    friend = rng.choice(GIRLS if is_boy else BOYS)
    animal = animal or rng.choice(SOUNDS)[0]
    sound = dict(SOUNDS)[animal]
    parts = [rng.choice(BEGIN), rng.choice(MEET), rng.choice(SPEAK), rng.choice(HELP), rng.choice(END)]
    if not short:
        parts.insert(3, rng.choice(WANT))
        parts.insert(5, rng.choice(FIND))
        if rng.random() < 0.4:
            parts.insert(6, rng.choice(FAVORITES))
    an_animal = article(animal)
    return " ".join(parts).format(
        name=name,
        friend=friend,
        child="boy" if is_boy else "girl",
        he="he" if is_boy else "she",
        He="He" if is_boy else "She",
        him="him" if is_boy else "her",
        animal=animal,
        an_animal=an_animal,
        An_animal=an_animal.capitalize(),
        sound=sound,
        Sound=sound.capitalize(),
        place=rng.choice(PLACES),
        season=rng.choice(SEASONS),
        color=rng.choice(COLORS),
        items=rng.choice(ITEMS),
        mood=rng.choice(MOODS),
    )
