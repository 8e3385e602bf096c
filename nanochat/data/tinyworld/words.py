"""Words to spell: the world's own words, a list of further English words, and made-up words.

About one word in four of the further list is never spelled in training. The world's
own words are all spelled in training: they are frequent, so many are single tokens, and a token's letters
can only be learned where that token is spelled.
"""

from __future__ import annotations

import functools
import random
import re
import zlib

from nanochat.data.tinyworld import stories, world
from nanochat.data.tinyworld.relations import relations

ENGLISH = """
acorn actor adult album alley amber ankle apron arena armor arrow aspen attic autumn award badge baker bamboo
banner barrel basin basket beacon beard belt bench bishop blanket blaze blossom board bonnet border bottle
boulder bowl branch brass breeze brick bridge broom bucket buckle bugle bundle bunny burrow bushel button
cabin cactus camera canal candle candy canoe canvas canyon cape captain carpet cart castle cattle cavern
cedar cellar chain chalk chapel chariot cherish chest chimney circle cider clay cliff clock cloth cloud clover
coast cobble collar comet copper coral cork corner cotton couch cousin cradle crane crayon cream creek crest
cricket crown crumb crystal curtain cushion daisy dance dawn delta dinner dollar dolphin donkey doodle dragon
drawer dream dress drizzle drum dust dwarf eagle easel echo elbow ember engine envelope fabric fairy falcon
farmhouse feather fence fern ferry festival fiddle field finger flame flask fleet flint flock flood flour
flute forest fork fossil fountain frame freckle frost funnel galaxy gallop garlic garment gate gentle giant
ginger glacier glass glider globe glove goblet goggles grain granite gravel grove guard guitar gulf gutter
hammer hammock handle harbor harvest hawk hazel heart hedge helmet herb hermit hinge hollow honey hood horizon
hunter icicle igloo inkwell island ivory jacket jasmine jelly jewel jigsaw jockey journal jug jungle kernel
kettle kingdom kitchen kite ladder lagoon lamp lantern larder lather lavender leather ledge legend lemonade
lentil letter lever library lichen lily linen lizard lobster locket lodge lumber lunch magnet mantle maple
marble margin marsh mask mast meadow medal melody melon merchant meteor mill miner mirror mist mitten moment
moss motor mountain muffin mushroom mustard napkin needle nephew nest nickel noodle notch novel nugget nutmeg
oasis object ocean olive onion orbit orchard organ otter oven oyster paddle palace panther paper parade parcel
parrot pasture patch pavement peanut pearl pebble pedal pelican pencil pepper petal picnic pigeon pillow pilot
pine pirate pistol pitcher plank plaster plate plaza plow pocket poem polish pond pony poplar porch portrait
powder prairie prince print prism pudding puddle pulley pumpkin puppet purple puzzle quarry quartz quill quilt
rabbit raccoon radar radish raft rail rainbow raisin ramp ranch raven ribbon riddle ring ripple river roast
robin rocket roof root rope rudder ruler saddle sailor salad sand sandal satchel saucer scarf scooter scroll
sculpture seaweed seed shadow shed shelf shield shore shoulder shovel shutter signal silk silver skate sketch
sled sleeve slipper smoke snack soap socket sofa soil soldier spark sparrow spice spindle spiral sponge spoon
spring sprout square squirrel stable staff stage stairs stamp statue steam stem stick stocking storm stove
straw stream street string stump sugar summit sunset swamp sweater swing sword syrup tablet tailor tambourine
tangle tank target tavern temple tent thicket thimble thistle thorn thread throne thumb thunder ticket timber
toad toast token torch tornado tower trail tray treasure trellis tribe trumpet trunk tulip tunnel turnip turtle
twig umbrella uncle valley vanilla vase vault velvet village vine violin visitor volcano voyage waffle wagon
waist walnut wander warden water wave wax weaver wedge whale wheat wheel whisker whistle widow willow window
wing winter wizard wonder wool workshop wreath wren yarn yogurt zebra zipper
"""
ONSETS = tuple(
    "b c d f g h j k l m n p r s t v w z bl br ch cl cr dr fl fr gl gr pl pr qu sh sl sp st sw th tr".split()
)
NUCLEI = tuple("a e i o u a e i o u ai ea ee oa oo ou".split())
CODAS = ("", "", "", "", *"b d g k l m n p r s t ck ll nd ng nt rd rt sh ss st".split())
ENDINGS = ("", "", "", "", *"er le ing ed y ow et on el en ish ty".split())


@functools.cache
def world_words() -> tuple[str, ...]:
    """Lower-case single words of the world's tables, phrases and stories, at least three letters long."""
    tables = (
        *(world.OPPOSITES, world.SOUNDS, world.YOUNG, world.HOMES, world.LEGS, world.ANIMAL_CLASSES),
        *(world.KINDS_OF_THINGS, world.SIDES, world.WORKERS, world.SENSES, world.PLURALS, world.PASTS),
        *(world.SYMBOLS, world.MONTH_SEASONS, world.THING_COLORS, world.NUMBER_WORDS[:21], world.CAPITALS),
    )
    text = " ".join(word for table in tables for pair in table for word in pair)
    text += " " + " ".join((*world.DAYS, *world.MONTHS, *world.ITEMS, *world.PLACES, *world.ORDINALS))
    phrases = [p for r in relations() for p in (*r.nouns, *r.statements, *r.questions)]
    text += " " + re.sub(r"{\w+}", " ", " ".join((*stories.TEXTS, *phrases)))
    return tuple(sorted(set(re.findall(r"\b[a-z]{3,}\b", text))))


def split_of_word(word: str) -> str:
    """The split that spells this word: one in twelve in dev only, two in test only, no word of the world."""
    if word in _world_set():
        return "train"
    return {0: "dev", 1: "test", 2: "test"}.get(zlib.crc32(word.encode()) % 12, "train")


@functools.cache
def _world_set() -> frozenset[str]:
    return frozenset(world_words())


@functools.cache
def real_words(split: str) -> tuple[str, ...]:
    """English words spelled in a split (dev and test: from the further list only)."""
    further = sorted(set(ENGLISH.split()) - _world_set())
    chosen = tuple(word for word in further if split_of_word(word) == split)
    return (*world_words(), *chosen) if split == "train" else chosen


def made_up_word(rng: random.Random) -> str:
    """A word that is none: one to three pronounceable syllables ("glanter"), or the beginning of a real training word
    with the end of another ("jacom"), which has the letters, and the tokens, of English."""
    while True:
        if rng.random() < 0.4:
            parts = [rng.choice(ONSETS) + rng.choice(NUCLEI) + rng.choice(CODAS) for _ in range(rng.choice((1, 1, 2)))]
            word = "".join(parts) + rng.choice(ENDINGS)
        else:
            first, second = rng.choice(real_words("train")), rng.choice(real_words("train"))
            word = first[: rng.randrange(1, len(first))] + second[rng.randrange(1, len(second)) :]
        if 3 <= len(word) <= 12 and split_of_word(word) == "train" and word not in _english_set():
            return word


@functools.cache
def _english_set() -> frozenset[str]:
    return frozenset(ENGLISH.split()) | _world_set()


def word_to_spell(rng: random.Random, split: str, made_up: float = 0.8) -> str:
    """A real word, or a made-up one with this probability: those cannot be known by heart, so they teach to copy."""
    if rng.random() < made_up:
        return made_up_word(rng)
    return rng.choice(real_words(split))


def spell(word: str, quote: str = "") -> str:
    """'apple' -> 'The letters of apple:a,p,p,l,e', the word written as in the question, so that it has the same tokens
    as there. No space after the colon and the commas: each letter is one token with its separator."""
    return f"The letters of {quote}{word}{quote}:{','.join(word)}"
