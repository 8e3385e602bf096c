"""Our tokenizer against its peers, all in one run: training, encoding, worst cases, loading.

    python bench/tokenizer.py ../shared/hub/datasets/local/edu-text-small
    python bench/tokenizer.py FOLDER --vocab 4096 --shards 1 --no-pypi    # a quick look

FOLDER holds parquet shards with a column `text`; the last one, which the trainers do not see, is encoded. Each figure
is taken in a process of its own, and peak memory is that of the process. The package `rustbpe` 0.1.0, whose merges
ours must equal, is fetched by uv into an environment of its own: its name is the same as ours.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PATTERN = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"""
)
PYPI = ("uv", "run", "--no-project", "--isolated", "--with", "rustbpe==0.1.0", "--with", "pyarrow", "python")
REPEATS = 3
WORST_BYTES = 1_000_000
WORST = {
    "one letter": "a",
    "spaces": " ",
    "one emoji": "😀",
    "combining marks": "\u0301",
    "letters without end": "thequickbrownfoxjumpsoverthelazydog",
    "Chinese": "天地玄黄宇宙洪荒日月盈昃辰宿列张",
    "line breaks": "\n",
    "punctuation": "=-",
}


def read(paths: list[Path]) -> Iterator[str]:
    import pyarrow.parquet as pq

    for path in paths:
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                yield from file.read_row_group(group, columns=["text"], use_threads=False).column("text").to_pylist()


def train_rustbpe(texts: Iterator[str], vocab_size: int) -> list[bytes]:
    """Ours, or the package's: whichever the environment has."""
    import rustbpe

    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(texts, vocab_size, pattern=PATTERN)
    return [bytes(token) for token, _ in tokenizer.get_mergeable_ranks()]


def train_huggingface(texts: Iterator[str], vocab_size: int) -> list[bytes]:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    )
    return [token.encode() for token in tokenizer.get_vocab()]


def child_train(task: dict[str, Any]) -> dict[str, Any]:
    trainer = {"ours": train_rustbpe, "rustbpe 0.1.0": train_rustbpe, "Hugging Face": train_huggingface}[task["who"]]
    paths = [Path(path) for path in task["paths"]]
    start = time.perf_counter()
    for _ in read(paths):
        pass
    reading = time.perf_counter() - start
    start = time.perf_counter()
    tokens = trainer(read(paths), task["vocab_size"])
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    digest = hashlib.sha256(b"".join(len(token).to_bytes(4, "big") + token for token in tokens)).hexdigest()
    return {"seconds": seconds, "reading": reading, "peak": peak, "digest": digest, "tokens": len(tokens)}


def encoders(directory: str, threads: int) -> dict[str, Callable[[list[str]], Any]]:
    """name -> encode many texts on so many threads."""
    import tiktoken
    import tokenizers

    from nanochat.tokenizer import Tokenizer
    from nanochat.tokenizer_formats import export_huggingface

    ours = Tokenizer.from_directory(directory)
    ranks = dict(ours.bpe.get_mergeable_ranks())
    openai = tiktoken.Encoding("bench", pat_str=ours.bpe.get_pattern(), mergeable_ranks=ranks, special_tokens={})
    path, _ = export_huggingface(ours, Path(directory) / "hf")
    huggingface = tokenizers.Tokenizer.from_file(str(path))
    if threads == 1:
        return {
            "ours": lambda texts: ours.encode_to_arrays(texts, num_threads=1),
            "ours, lists": lambda texts: [ours.encode(text) for text in texts],
            "tiktoken": lambda texts: [openai.encode_ordinary(text) for text in texts],
            "Hugging Face": lambda texts: [huggingface.encode(text).ids for text in texts],
        }
    return {
        "ours": lambda texts: ours.encode_to_arrays(texts, num_threads=threads),
        "ours, lists": lambda texts: ours.encode(texts, num_threads=threads),
        "tiktoken": lambda texts: openai.encode_ordinary_batch(texts, num_threads=threads),
        "Hugging Face": lambda texts: [encoding.ids for encoding in huggingface.encode_batch(texts)],
    }


def rate(encode: Callable[[list[str]], Any], texts: list[str]) -> float:
    """Best of some tries, MB/s."""
    size = sum(len(text.encode()) for text in texts)
    best = 0.0
    for _ in range(REPEATS):
        start = time.perf_counter()
        encode(texts)
        best = max(best, size / (time.perf_counter() - start) / 1e6)
    return best


def child_encode(task: dict[str, Any]) -> dict[str, Any]:
    texts = list(read([Path(task["path"])]))
    found = encoders(task["directory"], task["threads"])
    rates = {name: rate(encode, texts) for name, encode in found.items()}
    few = texts[:200]
    expected = [ids.tolist() for ids in found["ours"](few)]
    for name, encode in found.items():
        assert [list(ids) for ids in encode(few)] == expected, name
    if task["threads"] == 1:
        for name, unit in WORST.items():
            text = unit * (WORST_BYTES // len(unit.encode()))
            rates[name] = rate(found["ours"], [text])
    return rates


def child_load(task: dict[str, Any]) -> dict[str, Any]:
    from nanochat.tokenizer import Tokenizer

    start = time.perf_counter()
    tokenizer = Tokenizer.from_directory(task["directory"])
    tokenizer.encode("a")
    return {"milliseconds": 1000 * (time.perf_counter() - start)}


def ask(
    kind: str, task: dict[str, Any], python: tuple[str, ...] = (sys.executable,), **environment: str
) -> dict[str, Any]:
    """The answer of a child process."""
    command = [*python, str(Path(__file__).resolve()), "--child", kind, json.dumps(task)]
    paths = {} if python == PYPI else {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, stdout=subprocess.PIPE, env={**os.environ, **paths, **environment}, check=True, text=True
    )
    return dict(json.loads(done.stdout))


def bench_training(paths: list[Path], vocab_size: int, with_pypi: bool) -> None:
    size = sum(len(text.encode()) for text in read(paths))
    print(f"\n### Training, {vocab_size:,} ids, {size / 1e6:.1f} MB\n")
    print("| trainer | seconds | reading alone | peak MiB | ours is |\n|---|---:|---:|---:|---:|")
    who = ["ours", "rustbpe 0.1.0", "Hugging Face"] if with_pypi else ["ours", "Hugging Face"]
    digests, mine = {}, 0.0
    for name in who:
        task = {"who": name, "paths": [str(path) for path in paths], "vocab_size": vocab_size - 9}
        found = ask("train", task, PYPI if name == "rustbpe 0.1.0" else (sys.executable,))
        mine = mine or found["seconds"]
        digests[name] = found["digest"]
        ratio = f"{found['seconds'] / mine:.1f}x as fast"
        print(
            f"| {name} | {found['seconds']:.1f} | {found['reading']:.1f} | {found['peak']:.0f} | {ratio} |", flush=True
        )
    if with_pypi:
        same = digests["ours"] == digests["rustbpe 0.1.0"]
        print(f"\nThe same tokens as rustbpe 0.1.0, rank for rank: {'yes' if same else 'NO'}")


def bench_encoding(train: list[Path], val: Path, vocab_size: int) -> None:
    from nanochat.tokenizer import Tokenizer

    with tempfile.TemporaryDirectory() as directory:
        Tokenizer.train_from_iterator(read(train), vocab_size).save(directory)
        cores = len(os.sched_getaffinity(0))
        task = {"directory": directory, "path": str(val)}
        one = ask("encode", {**task, "threads": 1}, RAYON_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
        many = ask("encode", {**task, "threads": cores})
        print(f"\n### Encoding, {vocab_size:,} ids, {val.name}, MB/s\n")
        print(
            f"| encoder | 1 thread | ours is | {cores} threads | ours is | {cores} over 1 |\n"
            "|---|---:|---:|---:|---:|---:|"
        )
        for name in many:
            ratios = f"{one['ours'] / one[name]:.1f}x | {many[name]:.1f} | {many['ours'] / many[name]:.1f}x"
            print(f"| {name} | {one[name]:.1f} | {ratios} | {many[name] / one[name]:.2f} |")
        print("\n| a megabyte of | MB/s | English is |\n|---|---:|---:|")
        for name in WORST:
            print(f"| {name} | {one[name]:.1f} | {one['ours'] / one[name]:.2f}x as fast |")
        loads = sorted(ask("load", {"directory": directory})["milliseconds"] for _ in range(5))
        print(f"\nLoading the tokenizer in a new process: {loads[2]:.0f} ms (median of 5)")


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child = {"train": child_train, "encode": child_encode, "load": child_load}[sys.argv[2]]
        print(json.dumps(child(json.loads(sys.argv[3]))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--vocab", type=int, nargs="+", default=[32_768, 65_536], help="vocabulary sizes")
    parser.add_argument("--shards", type=int, help="train on the first so many (default: all but the last)")
    parser.add_argument("--pypi", action=argparse.BooleanOptionalAction, default=True, help="with rustbpe 0.1.0")
    args = parser.parse_args()
    paths = sorted(args.folder.glob("*.parquet"))
    if len(paths) < 2:
        parser.error(f"{args.folder} has {len(paths)} parquet files; two or more are needed")
    sys.path.insert(0, str(ROOT))
    for vocab_size in args.vocab:
        bench_training(paths[:-1][: args.shards], vocab_size, args.pypi)
        bench_encoding(paths[:-1][: args.shards], paths[-1], vocab_size)


if __name__ == "__main__":
    main()
