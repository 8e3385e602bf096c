"""AQuA-RAT: algebra word problems with rationales and five options (Ling et al. 2017, arXiv 1705.04146).

Taught and scored alike: reason first, then `Answer: <letter>`. Scoring reads that letter out of the text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nanochat.chat import check_conversation
from nanochat.config import InputError
from nanochat.data import hub
from nanochat.environment import aqua_dir
from tasks.common import Conversation, Task, gold_letter, render_choices

INSTRUCTION = "Solve this problem. Reason briefly, then finish with a last line `Answer: <letter>`."

# After the word "answer": a capital letter, or a small one that ends its line. A capital A before another
# word is more likely the article ("The answer: A train ...").
MARKED = re.compile(
    r"(?i:answer)\s*(?i:is|would be)?\s*[:\-=]?\s*(?i:option\s*)?[*(\[]*"
    r"(?:([B-E])(?!\w)|(A)(?!\w|[ \t]+[A-Za-z])|([a-e])(?=[).\]*]*[ \t]*(?:\n|$)))"
)
BARE = re.compile(r"[(\[]?([A-Ea-e])[)\].]*")
STANDALONE = re.compile(r"(?<![\w'])[A-E](?![\w'])")
STANDALONE_LAST = re.compile(r"(?:^|\s)[(\[]?([A-E])[)\].]*$")


def extract_letter(text: str) -> str | None:
    """The letter A to E that a text gives as its answer, else None.

    The last `answer ...` mark counts; without one, a text that is only a letter, or a last line that ends
    with the only capital letter standing alone in it. The article "a" is no answer.
    """
    marked = list(MARKED.finditer(text))
    if marked:
        return next(letter for letter in marked[-1].groups() if letter).upper()
    text = text.strip()
    bare = BARE.fullmatch(text)
    if bare:
        return bare.group(1).upper()
    last_line = text.rsplit("\n", 1)[-1]
    last = STANDALONE_LAST.search(last_line)
    return last.group(1) if last and len(STANDALONE.findall(last_line)) == 1 else None


def split_option(option: str) -> tuple[str, str]:
    """`A)21` -> ("A", "21"): letter and choice, parted at the first bracket."""
    letter, bracket, choice = option.partition(")")
    if not bracket:
        raise InputError(f"AQuA option {option!r} has no `)`; expected such as `A)21`")
    return letter.strip(), choice.strip()


def render_row(row: dict[str, Any]) -> Conversation:
    """A raw row {question, options, rationale, correct} as a conversation."""
    letters, choices = zip(*map(split_option, row["options"]), strict=True)
    answer = row["correct"].strip()
    messages = [
        {
            "role": "user",
            "content": f"{INSTRUCTION}\n\n{render_choices(row['question'], letters, choices).rstrip()}",
        },
        {"role": "assistant", "content": f"{row['rationale'].strip()}\nAnswer: {answer}"},
    ]
    return {"messages": messages, "letters": list(letters), "answer_letter": answer}


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a local file: raw rows, or conversations with letters and answer_letter.

    Raises:
        InputError: a line is neither; it is named by its number.
    """
    rows = []
    with path.open(encoding="utf-8") as f:
        for number, line in enumerate(f, start=1):
            if not line.strip():
                continue
            where = f"{path} line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"{where}: no JSON ({error})") from None
            if isinstance(row, dict) and "messages" in row:
                check_conversation(row, where)
                needed = {"letters", "answer_letter"}
            else:
                needed = {"question", "options", "rationale", "correct"}
            if not isinstance(row, dict) or not needed <= row.keys():
                raise InputError(f"{where}: an AQuA row must have {', '.join(sorted(needed))}")
            rows.append(row)
    return rows


def load_rows(split: str, data_dir: str | Path | None) -> Sequence[dict[str, Any]]:
    """{folder}/{split}.jsonl where the folder is data_dir or environment.aqua_dir(), else the hub's rows."""
    folder = Path(data_dir) if data_dir is not None else aqua_dir()
    if folder is not None:
        path = folder / f"{split}.jsonl"
        if path.is_file():
            return read_jsonl(path)
        if data_dir is not None:
            raise InputError(f"no AQuA split at {path}; write it, or leave the folder out to use the hub")
    return hub.load_rows("deepmind/aqua_rat", "raw", split)


class AQUA(Task):
    """Splits train, validation, test. Local files and the hub give the same order for the same rows."""

    def __init__(
        self,
        split: str,
        shuffle: bool = True,
        seed: int = 42,
        data_dir: str | Path | None = None,
        **slicing: Any,
    ) -> None:
        super().__init__(**slicing)
        if split not in ("train", "validation", "test"):
            raise InputError(f"AQUA has no split {split!r}; use train, validation or test")
        self.rows = load_rows(split, data_dir)
        n = len(self.rows)
        self.order = hub.shuffled_order(n, seed) if shuffle else np.arange(n)

    def num_examples(self) -> int:
        return len(self.rows)

    def get_example(self, index: int) -> Conversation:
        row = self.rows[int(self.order[index])]
        return row if "messages" in row else render_row(row)

    def evaluate(self, conversation: Conversation, response: str) -> bool:
        return extract_letter(response) == gold_letter(conversation)

    def parsed(self, response: str) -> bool:
        return extract_letter(response) is not None
