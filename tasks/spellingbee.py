"""Spelling: count a letter in a word by hand and with the Python tool, and plainly spell words.

Generated: example i is always the same, and training and test draw from seeds that never meet.
"""

from __future__ import annotations

import functools
import os
import random
import string
from pathlib import Path
from typing import Any

from nanochat.config import InputError
from nanochat.environment import base_dir, hub_dir, print0
from tasks.common import Conversation, Task, evaluate_final_answer, evaluate_final_number, has_final_answer

WORDS_FILE = "words_alpha.txt"
WORDS_URL = "https://raw.githubusercontent.com/dwyl/english-words/refs/heads/master/words_alpha.txt"
MIN_WORDS_BYTES = 1 << 20  # the list has 3.8 MB; less is an error page or half a file
# Added to the index. Not a minus sign: Python seeds with the absolute value, and test would repeat training.
TEST_SEED_OFFSET = 10_000_000

# 30 English, 4 Spanish, 4 Chinese, 4 Korean, 3 French, 3 German, 3 Japanese
TEMPLATES = (
    "Count the letter {letter} in {word}",
    "In the word {word}, how often does {letter} occur",
    "How frequently does {letter} come up in {word}",
    "Tell me how many times {letter} is used in {word}",
    "How many {letter}s can you find in {word}",
    "How many {letter} letters are there in {word}",
    "What number of {letter} does {word} have",
    "I need the number of {letter} in {word}",
    "Number of {letter} in {word}",
    "Can you count every {letter} in {word}",
    "Please count how many {letter} the word {word} has",
    "Look at {word} and count its {letter}",
    "Does {word} contain {letter}, and how many times",
    "Find all {letter} in {word} and give me the total",
    "Give me a count of {letter} in {word}",
    "Letter {letter}, word {word}: how many",
    "If you spell {word}, how many times do you write {letter}",
    "While spelling {word}, how many {letter} do we meet",
    "{word} has how many {letter}",
    "{word}: how many {letter}",
    "How many of the letters of {word} are {letter}",
    "How many letters in {word} equal {letter}",
    "Which count do you get for {letter} in {word}",
    "What's the total of {letter} in the word {word}",
    "Do you know how many {letter} are in {word}",
    "Quick question, how many {letter} in {word}",
    "I wonder how many times {letter} shows up in {word}",
    "Could you work out the number of {letter} inside {word}",
    "Say how often I see {letter} when I read {word}",
    "Help me count {letter} in the word {word}",
    "¿Cuántas {letter} tiene la palabra {word}",
    "Cuenta las letras {letter} de {word}",
    "¿Cuántas veces se escribe {letter} en {word}",
    "Dime el número de {letter} que hay en {word}",
    "{word}里一共有几个{letter}",
    "请数一数单词{word}中的{letter}",
    "单词{word}含有多少个字母{letter}",
    "{letter}在{word}里面出现几次",
    "{word}라는 단어에 {letter}가 몇 번 나오나요",
    "{word}에 들어 있는 {letter}의 개수는",
    "{word}에서 글자 {letter}를 세어 주세요",
    "{word} 안에 {letter}가 몇 개인가요",
    "Combien y a-t-il de {letter} dans le mot {word}",
    "Compte les {letter} du mot {word}",
    "Combien de fois écrit-on {letter} dans {word}",
    "Wie viele {letter} stehen im Wort {word}",
    "Zähle die {letter} in {word}",
    "Wie oft kommt der Buchstabe {letter} in {word} vor",
    "{word}に{letter}はいくつありますか",
    "単語{word}の{letter}を数えてください",
    "{word}の中で{letter}は何回使われていますか",
)


def words_path() -> Path:
    """The word list: in the base directory, else in the hub mirror, else downloaded to the base directory.

    Raises:
        InputError: it cannot be had.
    """
    path, mirror = base_dir() / WORDS_FILE, hub_dir()
    if path.is_file():
        return path
    if mirror is not None:
        mirrored = mirror / "words" / WORDS_FILE
        if not mirrored.is_file():
            raise InputError(f"no word list at {path} or {mirrored}; fetch {WORDS_URL} to one of them")
        return mirrored
    _download(path)
    return path


def _download(path: Path) -> None:
    """Fetch the word list; `path` is whole or absent, also when several ranks fetch at once."""
    import requests

    print0(f"Downloading {WORDS_URL}")
    try:
        response = requests.get(WORDS_URL, timeout=60)
        response.raise_for_status()
    except requests.RequestException as error:
        raise InputError(f"cannot download the word list ({error}); put it at {path} by hand") from None
    if len(response.content) < MIN_WORDS_BYTES:
        raise InputError(f"{WORDS_URL} gave only {len(response.content)} bytes; put the word list at {path}")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(response.content)
    os.replace(temporary, path)


@functools.cache
def read_words(path: Path) -> tuple[str, ...]:
    """The words of a file, one a line; line ends of any kind, blank lines skipped."""
    words = tuple(path.read_text(encoding="utf-8").split())
    if not words:
        raise InputError(f"the word list {path} is empty; delete it and it is fetched again")
    return words


@functools.cache
def shuffled_words(path: Path) -> tuple[str, ...]:
    words = list(read_words(path))
    random.Random(42).shuffle(words)
    return tuple(words)


def spell(word: str) -> str:
    """`cat:c,a,t`, without spaces: so that each letter is the token that it is alone."""
    return f"{word}:{','.join(word)}"


class GeneratedTask(Task):
    """`size` examples of a split, drawn from the word list with a seed each."""

    def __init__(self, size: int, split: str, **slicing: Any) -> None:
        super().__init__(**slicing)
        if split not in ("train", "test"):
            raise InputError(f"{type(self).__name__} has no split {split!r}; use train or test")
        if not 0 <= size <= TEST_SEED_OFFSET:
            raise InputError(f"{type(self).__name__} of {size} examples; use 0 to {TEST_SEED_OFFSET:,}")
        self.size, self.split, self.path = size, split, words_path()

    def num_examples(self) -> int:
        return self.size

    def rng(self, index: int) -> random.Random:
        return random.Random(index if self.split == "train" else TEST_SEED_OFFSET + index)


class SpellingBee(GeneratedTask):
    """How often is a letter in a word? The answer counts by hand, then checks itself with the tool."""

    def __init__(self, size: int = 1000, split: str = "train", **slicing: Any) -> None:
        super().__init__(size, split, **slicing)

    def get_example(self, index: int) -> Conversation:
        rng = self.rng(index)
        word = rng.choice(read_words(self.path))
        letter = rng.choice(word) if rng.random() < 0.9 else rng.choice(string.ascii_lowercase)
        messages = [
            {"role": "user", "content": ask_count(rng, word, letter)},
            {"role": "assistant", "content": count_parts(word, letter)},
        ]
        return {"messages": messages}

    def evaluate(self, conversation: Conversation, response: str) -> bool:
        return evaluate_final_answer(conversation, response)

    def evaluate_lenient(self, conversation: Conversation, response: str) -> bool:
        return evaluate_final_number(conversation, response)

    def parsed(self, response: str) -> bool:
        return has_final_answer(response)


def ask_count(rng: random.Random, word: str, letter: str) -> str:
    """One of many ways to ask; the order of the draws is part of the data's definition."""
    template = rng.choice(TEMPLATES)
    if rng.random() < 0.3:
        template = template.lower()
    quotes = ("", "'", '"')
    letter_quote, word_quote = rng.choice(quotes), rng.choice(quotes)
    question = template.format(letter=f"{letter_quote}{letter}{letter_quote}", word=f"{word_quote}{word}{word_quote}")
    return question + ("?" if rng.random() < 0.5 else "")


def count_parts(word: str, letter: str) -> list[dict[str, str]]:
    """The worked answer: spelling, a line a letter, a tool call that checks, `#### count`."""
    total = word.count(letter)
    lines, count = [], 0
    for i, character in enumerate(word, start=1):
        count += character == letter
        lines.append(f"{i}:{character}" + (f" hit! count={count}" if character == letter else ""))
    by_hand = (
        f"We count the letter '{letter}' in the word '{word}', first by hand.\n\n"
        f"The word letter by letter:\n{spell(word)}\n\n"
        f"Each '{letter}' adds one:\n" + "\n".join(lines) + f"\n\nBy hand that makes {total}."
    )
    return [
        {"type": "text", "text": by_hand},
        {"type": "text", "text": "\n\nNow the same in Python, to be sure:\n\n"},
        {"type": "python", "text": f"'{word}'.count('{letter}')"},
        {"type": "python_output", "text": str(total)},
        {"type": "text", "text": f"\n\nPython counts {total} too, so this is the answer.\n\n#### {total}"},
    ]


class SimpleSpelling(GeneratedTask):
    """Spell a word: what counting letters starts from."""

    def __init__(self, size: int = 1000, split: str = "train", **slicing: Any) -> None:
        super().__init__(size, split, **slicing)

    def get_example(self, index: int) -> Conversation:
        word = self.rng(index).choice(shuffled_words(self.path))
        messages = [
            {"role": "user", "content": f"Spell the word: {word}"},
            {"role": "assistant", "content": spell(word)},
        ]
        return {"messages": messages}

    def evaluate(self, conversation: Conversation, response: str) -> bool:
        return response.strip() == conversation["messages"][-1]["content"]
