"""Write conversations that give a model a name and a character, from a description of one page.

    python -m scripts.make_identity --about=ada.yaml                      # from templates, offline
    python -m scripts.make_identity --about=ada.yaml --endpoint=http://127.0.0.1:8000/v1 --model=NAME

The description is YAML: name, maker, personality, facts (see tasks/identity.py). With --endpoint a larger model writes
them, on any OpenAI-compatible server (key in OPENAI_API_KEY); what it has written is appended at once, and the same
command goes on after an interruption.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat.completions import Completions
from nanochat.config import REQUIRED, InputError, flag, run_cli
from nanochat.environment import endpoint_key, print0
from tasks.customjson import parse_line
from tasks.identity import GREETINGS, About, conversations, pairs

MOST_INVALID = 50  # answers in a row
TALKERS = (
    *(
        "a child of eight",
        "a pupil with homework",
        "a sceptical engineer",
        "someone in a hurry",
        "a friendly neighbour",
    ),
    *("someone who writes in lower case and without punctuation", "an old lady who is polite", "a journalist"),
    *("someone who tests whether it can be confused", "someone who talks to a computer for the first time"),
)
SUBJECTS = (
    *("who it is", "who made it", "what it is like", "what it can and cannot do", "a mix-up with another assistant"),
    *("one of the facts about it", "small talk", "whether it is a person", "its name and where that comes from"),
)
PROMPT = """Write one conversation between a user and a small language model, for the model to learn who it is.

{about}

The user is {talker}. They talk about {subject}. The user begins with words like: {opener}
It has {turns} exchange(s). The model speaks in short plain sentences, in character, and invents no facts about itself.
ASCII only. Answer with nothing but JSON:
{{"messages": [{{"role": "user", "content": "..."}}, {{"role": "assistant", "content": "..."}}]}}"""


@dataclass(frozen=True)
class MakeIdentityConfig:
    about: str = flag(REQUIRED, "the description, a YAML file")
    out: str = flag("identity.jsonl", "where to write, one conversation a line")
    num: int = flag(1000, "conversations")
    seed: int = flag(0, "of the templates and prompts")
    endpoint: str | None = flag(None, "OpenAI-compatible server, such as http://127.0.0.1:8000/v1; None = templates")
    model: str | None = flag(None, "the server's name of the model")
    threads: int = flag(4, "requests at a time")

    def __post_init__(self) -> None:
        for name in ("num", "threads"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)} must be at least 1")
        if not self.out.endswith(".jsonl"):
            raise InputError(f"--out {self.out} must end in .jsonl; try {self.out}.jsonl")
        if (self.endpoint is None) != (self.model is None):
            raise InputError("--endpoint and --model go together: the server, and its name of the model")


def prompt(about: About, seed: int, index: int) -> str:
    """What to ask the larger model for: another talker, subject and opening each time."""
    rng = random.Random(f"{seed} {index}")
    openers = [saying for pair in (GREETINGS, *pairs(about)) for saying in pair[0] if "{x}" not in saying]
    return PROMPT.format(
        about=about.text(),
        talker=rng.choice(TALKERS),
        subject=rng.choice(SUBJECTS),
        opener=rng.choice(openers).replace("{n}", about.name),
        turns=rng.choice((1, 1, 2, 3)),
    )


def parse_answer(text: str) -> list[dict[str, Any]] | None:
    """The messages in an answer, which may have words or a fence around its JSON; None = it is no conversation."""
    first, last = text.find("{"), text.rfind("}")
    try:
        messages = parse_line(text[first : last + 1], "the answer")["messages"]
    except InputError:
        return None
    return [{"role": m["role"], "content": m["content"].strip()} for m in messages if isinstance(m["content"], str)]


def written(path: Path) -> int:
    """Whole lines of a file. Half a line at its end, of a run that was killed, is taken off."""
    if not path.exists():
        return 0
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if whole != text:
        path.write_bytes(whole)
    return sum(bool(line.strip()) for line in whole.splitlines())


def ask_for(cfg: MakeIdentityConfig, about: About, client: Completions) -> None:
    """Append conversations until the file has as many as wanted."""
    path = Path(cfg.out)
    done = written(path)
    invalid = in_a_row = 0
    index = done
    with path.open("a", encoding="utf-8") as f, ThreadPoolExecutor(cfg.threads) as pool:
        while done < cfg.num:
            numbers = range(index, index + min(cfg.threads, cfg.num - done))
            index = numbers.stop
            for answer in pool.map(lambda i: client.ask(prompt(about, cfg.seed, i)), numbers):
                messages = parse_answer(answer)
                if messages is None:
                    invalid, in_a_row = invalid + 1, in_a_row + 1
                    continue
                f.write(json.dumps(messages) + "\n")
                f.flush()
                done, in_a_row = done + 1, 0
            if in_a_row >= MOST_INVALID:
                raise InputError(f"{in_a_row} answers in a row were no conversations; try another --model")
            print0(f"{done:,} of {cfg.num:,} conversations, {invalid:,} invalid answers left out")


def run(cfg: MakeIdentityConfig) -> None:
    about = About.read(cfg.about)
    if cfg.endpoint is not None and cfg.model is not None:
        ask_for(cfg, about, Completions(cfg.endpoint, cfg.model, endpoint_key()))
    else:
        lines = [
            json.dumps(messages, ensure_ascii=False) + "\n" for messages in conversations(about, cfg.num, cfg.seed)
        ]
        Path(cfg.out).write_text("".join(lines), encoding="utf-8")
    print0(f"Wrote {cfg.out}. Teach it: python -m scripts.chat_sft --source=sft --conversations={cfg.out}")


def main(argv: Sequence[str] | None = None) -> None:
    run_cli(MakeIdentityConfig, run, argv, about=__doc__)


if __name__ == "__main__":
    main()
