"""The small true world: every fact that tinyworld knows, as plain tables. No phrasing here."""

from __future__ import annotations

from itertools import pairwise

Pairs = tuple[tuple[str, str], ...]


def pairs(text: str) -> Pairs:
    """Read 'subject answer' lines or comma-separated entries; '_' stands for a space inside a name."""
    entries = [entry.split() for entry in text.replace("\n", ",").split(",") if entry.strip()]
    return tuple((subject.replace("_", " "), answer.replace("_", " ")) for subject, answer in entries)


def grouped(text: str) -> Pairs:
    """Read 'answer: subject subject ...' lines."""
    rows = [line.split(":") for line in text.strip().splitlines()]
    return tuple(
        (subject.replace("_", " "), answer.strip().replace("_", " "))
        for answer, subjects in rows
        for subject in subjects.split()
    )


CAPITALS = pairs("""
France Paris, Germany Berlin, Italy Rome, Spain Madrid, Portugal Lisbon, Greece Athens, Austria Vienna
Poland Warsaw, Sweden Stockholm, Norway Oslo, Finland Helsinki, Denmark Copenhagen, Ireland Dublin
England London, Scotland Edinburgh, Hungary Budapest, Romania Bucharest, Bulgaria Sofia, Belgium Brussels
Switzerland Bern, Iceland Reykjavik, Ukraine Kyiv, Croatia Zagreb, Serbia Belgrade
Japan Tokyo, China Beijing, India New_Delhi, Thailand Bangkok, Vietnam Hanoi, Nepal Kathmandu, Iran Tehran
Iraq Baghdad, Pakistan Islamabad, Bangladesh Dhaka, Jordan Amman, Syria Damascus, Oman Muscat, Qatar Doha
Egypt Cairo, Kenya Nairobi, Nigeria Abuja, Ghana Accra, Morocco Rabat, Libya Tripoli, Uganda Kampala
Senegal Dakar, Angola Luanda, Zambia Lusaka, Mali Bamako, Rwanda Kigali
Canada Ottawa, Mexico Mexico_City, Cuba Havana, Jamaica Kingston
Brazil Brasilia, Argentina Buenos_Aires, Chile Santiago, Peru Lima, Colombia Bogota, Venezuela Caracas
Ecuador Quito, Uruguay Montevideo, Australia Canberra, New_Zealand Wellington, Fiji Suva
""")

CONTINENTS = grouped("""
Europe: France Germany Italy Spain Portugal Greece Austria Poland Sweden Norway Finland Denmark Ireland England \
Scotland Hungary Romania Bulgaria Belgium Switzerland Iceland Ukraine Croatia Serbia
Asia: Japan China India Thailand Vietnam Nepal Iran Iraq Pakistan Bangladesh Jordan Syria Oman Qatar
Africa: Egypt Kenya Nigeria Ghana Morocco Libya Uganda Senegal Angola Zambia Mali Rwanda
North_America: Canada Mexico Cuba Jamaica
South_America: Brazil Argentina Chile Peru Colombia Venezuela Ecuador Uruguay
Oceania: Australia New_Zealand Fiji
""")

# Iodine is left out on purpose: its symbol I cannot be told from the pronoun when an answer is checked.
SYMBOLS = pairs("""
hydrogen H, helium He, lithium Li, carbon C, nitrogen N, oxygen O, fluorine F, neon Ne, sodium Na
magnesium Mg, aluminum Al, silicon Si, phosphorus P, sulfur S, chlorine Cl, argon Ar, potassium K, calcium Ca
titanium Ti, iron Fe, cobalt Co, nickel Ni, copper Cu, zinc Zn, silver Ag, tin Sn, tungsten W, platinum Pt
gold Au, mercury Hg, lead Pb, uranium U
""")

# Each word stands in one pair only, so "the opposite of" is a function in both directions.
OPPOSITES = pairs("""
hot cold, big small, tall short, fast slow, up down, day night, light dark, new old, happy sad, good bad
open closed, left right, wet dry, full empty, hard soft, high low, near far, strong weak, rich poor
clean dirty, loud quiet, early late, first last, begin end, buy sell, push pull, give take, win lose
yes no, true false, love hate, thick thin, wide narrow, deep shallow, sweet sour, sharp dull, smooth rough
inside outside, above below, always never, more less, many few, friend enemy, question answer, asleep awake
alive dead, easy difficult, sunrise sunset, north south, east west, front back, top bottom, come go
laugh cry, safe dangerous, cheap expensive, tight loose, remember forget, arrive leave, wild tame
polite rude, same different, morning evening
""")

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
# February is left out: its length depends on the year.
MONTH_DAYS = tuple(
    (m, "30" if m in ("April", "June", "September", "November") else "31") for m in MONTHS if m != "February"
)
SEASONS = ("spring", "summer", "autumn", "winter")
MONTH_SEASONS = tuple((m, SEASONS[((i - 2) % 12) // 3]) for i, m in enumerate(MONTHS))  # northern half of the Earth
PLANETS = ("Mercury", "Venus", "Earth", "Mars", "Jupiter", "Saturn", "Uranus", "Neptune")
ORDINALS = (
    *("first", "second", "third", "fourth", "fifth", "sixth"),
    *("seventh", "eighth", "ninth", "tenth", "eleventh", "twelfth"),
)
ALPHABET = tuple("abcdefghijklmnopqrstuvwxyz")
UNITS = tuple(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen".split()
)
TENS = ("", "", *"twenty thirty forty fifty sixty seventy eighty ninety".split())


def number_word(n: int) -> str:
    """English words of 0..100."""
    if n == 100:
        return "one hundred"
    if n < 20:
        return UNITS[n]
    return TENS[n // 10] + (f"-{UNITS[n % 10]}" if n % 10 else "")


COLORS = ("red", "blue", "green", "yellow", "white", "black", "brown", "orange", "pink", "gray")
THING_COLORS = grouped("""
green: grass a_leaf a_frog a_cucumber broccoli spinach
red: blood a_tomato a_strawberry a_fire_truck a_ruby a_cherry
blue: the_sky the_sea a_sapphire a_blueberry
yellow: a_banana a_lemon the_sun corn butter
white: snow milk salt a_swan rice
black: coal a_crow the_night_sky tar
brown: chocolate wood a_potato coffee
orange: a_carrot a_pumpkin
pink: a_flamingo a_pig
gray: an_elephant ash
""")

SOUNDS = pairs("""
dog woof, cat meow, cow moo, sheep baa, horse neigh, pig oink, duck quack, hen cluck, lion roar, bee buzz
snake hiss, frog croak, owl hoot, mouse squeak, wolf howl, crow caw, goose honk, turkey gobble, bird tweet
""")
YOUNG = pairs("""
dog puppy, cat kitten, cow calf, sheep lamb, horse foal, pig piglet, duck duckling, hen chick, lion cub
goat kid, goose gosling, bear cub, deer fawn, frog tadpole, kangaroo joey, swan cygnet, owl owlet, wolf pup
eagle eaglet, elephant calf, whale calf, tiger cub, seal pup, butterfly caterpillar, turkey poult
""")
HOMES = pairs("""
bee hive, bird nest, dog kennel, horse stable, pig sty, spider web, rabbit burrow, bear den, hen coop
cow barn, beaver lodge, snail shell, whale ocean, shark ocean, frog pond, monkey tree, mouse hole, camel desert
penguin colony, fox den
""")
LEGS = grouped("""
zero: snake fish worm whale shark snail
two: bird hen duck owl eagle swan penguin goose crow
four: dog cat cow sheep horse pig lion goat bear deer frog wolf elephant tiger mouse rabbit fox camel donkey turtle
six: bee ant butterfly beetle fly
eight: spider scorpion
""")
ANIMAL_CLASSES = grouped("""
mammal: dog cat cow sheep horse pig lion goat bear deer kangaroo wolf elephant whale tiger seal mouse rabbit beaver \
monkey camel fox donkey
bird: hen duck owl eagle swan goose crow penguin turkey parrot
fish: shark salmon tuna trout
reptile: snake turtle crocodile lizard
insect: bee ant butterfly beetle fly
amphibian: frog toad newt
""")
KINDS_OF_THINGS = grouped("""
fruit: apple banana pear grape cherry lemon peach plum mango
vegetable: carrot potato onion cabbage turnip
tool: hammer saw drill shovel rake
vehicle: car bus train truck bike ship
instrument: piano guitar drum violin flute
color: red blue green yellow
metal: gold silver iron copper
planet: Mars Venus Jupiter Saturn
""")
SIDES = pairs("triangle three, square four, rectangle four, pentagon five, hexagon six, heptagon seven, octagon eight")
WORKERS = (
    ("bakes bread", "baker"),
    ("teaches children", "teacher"),
    ("grows food", "farmer"),
    ("flies planes", "pilot"),
    ("helps sick people", "doctor"),
    ("fixes teeth", "dentist"),
    ("puts out fires", "firefighter"),
    ("catches fish", "fisher"),
    ("cuts hair", "barber"),
    ("paints pictures", "painter"),
    ("writes books", "writer"),
    ("builds houses", "builder"),
    ("sings songs", "singer"),
    ("cooks meals", "cook"),
    ("helps sick animals", "vet"),
    ("brings letters", "mail carrier"),
)
SENSES = (("see", "eyes"), ("hear", "ears"), ("smell", "nose"), ("taste", "tongue"), ("chew", "teeth"))

PLURALS = pairs("""
child children, man men, woman women, mouse mice, foot feet, tooth teeth, goose geese, leaf leaves, wolf wolves
knife knives, wife wives, loaf loaves, person people, sheep sheep, fish fish, deer deer, ox oxen, baby babies
city cities, story stories, berry berries, puppy puppies, fox foxes, box boxes, bus buses, dish dishes
church churches, potato potatoes, tomato tomatoes, cat cats, dog dogs, book books, tree trees, car cars, hat hats
house houses, bird birds, star stars, apple apples, table tables, cup cups, shoe shoes
""")
PASTS = pairs("""
go went, see saw, eat ate, run ran, come came, give gave, take took, make made, find found, get got, have had
say said, tell told, think thought, buy bought, bring brought, catch caught, teach taught, sleep slept, keep kept
feel felt, leave left, lose lost, sing sang, drink drank, swim swam, begin began, write wrote, ride rode
drive drove, break broke, speak spoke, know knew, grow grew, fly flew, draw drew, fall fell, hold held, stand stood
walk walked, play played, jump jumped, look looked, help helped, open opened, call called, ask asked
""")

BOYS = ("Tom", "Ben", "Sam", "Max", "Leo", "Jack", "Paul", "Finn")
GIRLS = ("Anna", "Mia", "Lily", "Emma", "Sara", "Rose", "Nora", "Kate")
PLACES = ("park", "forest", "river", "farm", "garden", "beach", "hill", "lake", "market", "school")
ITEMS = (
    *("apples", "books", "pens", "stones", "shells", "balls", "cards", "coins", "eggs", "flowers"),
    *("cakes", "stamps", "marbles", "nuts", "stickers", "pears", "cookies", "toys"),
)


def after(cycle: tuple[str, ...], step: int) -> Pairs:
    """Every name of a cycle with the one `step` places on."""
    return tuple((name, cycle[(i + step) % len(cycle)]) for i, name in enumerate(cycle))


NEXT_DAY, PREVIOUS_DAY, DAY_AFTER_NEXT = after(DAYS, 1), after(DAYS, -1), after(DAYS, 2)
NEXT_MONTH, PREVIOUS_MONTH, NEXT_SEASON = after(MONTHS, 1), after(MONTHS, -1), after(SEASONS, 1)
NEXT_PLANET = tuple(pairwise(PLANETS))  # the row of planets has ends, unlike the week
NEXT_LETTER = tuple(pairwise(ALPHABET))
PREVIOUS_LETTER = tuple((after, before) for before, after in NEXT_LETTER)
NEXT_NUMBER = tuple((str(n), str(n + 1)) for n in range(50))
PREVIOUS_NUMBER = tuple((str(n), str(n - 1)) for n in range(1, 51))
NUMBER_WORDS = tuple((str(n), number_word(n)) for n in range(101))


def equation_text(a: int, b: int, x: int) -> str:
    return f"{a}*x + {b} = {a * x + b}"


def is_held_out_equation(a: int, b: int, x: int) -> bool:
    return (3 * a + 5 * b + 7 * x) % 4 == 1


_EQUATION_GRID = tuple((a, b, x) for a in range(2, 6) for b in range(1, 4) for x in range(1, 5))
EQUATIONS = tuple((equation_text(*abx), str(abx[2])) for abx in _EQUATION_GRID if not is_held_out_equation(*abx))
HELD_OUT_EQUATIONS = tuple((equation_text(*abx), str(abx[2])) for abx in _EQUATION_GRID if is_held_out_equation(*abx))


def article(noun: str) -> str:
    """'a dog', 'an owl'."""
    return f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"
