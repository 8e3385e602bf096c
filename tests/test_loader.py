"""The packing loader: what a row is, which rows come in which order, and that a run can be taken up anywhere."""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.config import InputError
from nanochat.data import loader as loader_module
from nanochat.data.loader import PackingLoader, best_fit, encode_threads, host_rows, pack

BOS = 0
T = 7  # rows of 8 tokens


class Letters:
    """A tokenizer of one token a letter: a = 1."""

    def get_bos_token_id(self) -> int:
        return BOS

    def encode_to_arrays(self, texts: Sequence[str], prepend: int, num_threads: int) -> list[np.ndarray]:
        return [np.array([prepend, *(ord(c) - 96 for c in text)], np.int32) for text in texts]


class Texts:
    """A source of given blocks."""

    name = "texts"

    def __init__(self, train: list[list[str]], val: list[list[str]] | None = None) -> None:
        self.blocks = {"train": train, "val": val or []}

    def num_blocks(self, split: str) -> int:
        return len(self.blocks[split])

    def read_block(self, split: str, i: int) -> list[str]:
        return self.blocks[split][i]

    def texts(self, split: str) -> Iterator[str]:
        return itertools.chain.from_iterable(self.blocks[split])

    def fingerprint(self) -> str:
        return "texts"


def random_source(num_blocks: int = 5, documents: int = 40, longest: int = 12, seed: int = 0) -> Texts:
    rng = np.random.default_rng(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    return Texts(
        [
            ["".join(rng.choice(list(letters), rng.integers(1, longest + 1))) for _ in range(documents)]
            for _ in range(num_blocks)
        ]
    )


def make(source: Any, **kwargs: Any) -> PackingLoader:
    settings = {"batch_size": 2, "sequence_len": T, "repeat": False} | kwargs
    return PackingLoader(source, settings.pop("split", "train"), Letters(), **settings)


def rows_of(batches: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> list[list[int]]:
    """Whole rows of T+1 tokens; -1 where there is no target."""
    rows = []
    for inputs, targets in batches:
        assert torch.equal(inputs[:, 1:][targets[:, :-1] >= 0], targets[:, :-1][targets[:, :-1] >= 0])
        rows += torch.cat([inputs[:, :1], targets], dim=1).tolist()
    return rows


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader_module, "MIN_ROWS", 8)


# --- packing


def slow_best_fit(lengths: list[int], capacity: int, draw: Callable[[], float]) -> list[list[tuple[int, int, int]]]:
    """The definition, word by word; a piece shows BOS in place of its first token."""
    rows, left = [], {}  # document -> (start, stop) of what is left of it
    for i, length in enumerate(lengths):
        left[i] = (0, length)
        if length > capacity:
            rest = (length - 1) % (capacity - 1)
            at_the_beginning = rest > 1 and draw() < 0.5
            start, stop = (rest, length) if at_the_beginning else (0, length - rest)
            while start + 1 < stop:
                rows.append([(i, start, start + capacity)])
                start += capacity - 1
            left[i] = (0, rest + 1) if at_the_beginning else (start, length)
            if rest < 2:
                del left[i]
    while left:
        row, space = [], capacity
        while space and left:
            by_size = sorted(left, key=lambda i: (left[i][1] - left[i][0], -i))
            fitting = [i for i in by_size if left[i][1] - left[i][0] <= space]
            i = fitting[-1] if fitting else by_size[int(draw() * len(by_size))]
            start, stop = left.pop(i)
            end = min(stop, start + space)
            row.append((i, start, end))
            if stop - end > 1:
                left[i] = (end - 1, stop)
            space -= end - start
        rows.append(row)
    return rows


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(2, 60), max_size=40), st.integers(2, 20), st.integers(0, 9))
def test_packing_equals_the_plain_definition_of_best_fit(lengths: list[int], capacity: int, seed: int) -> None:
    draws = np.random.default_rng(seed).random, np.random.default_rng(seed).random
    assert best_fit(lengths, capacity, draws[0]) == slow_best_fit(lengths, capacity, draws[1])


def test_a_row_takes_the_longest_that_fits_and_then_the_beginning_of_any() -> None:
    # 8 slots: 5 fits, then 3 fills the row
    assert best_fit([3, 5], 8, lambda: 0.0) == [[(1, 0, 5), (0, 0, 3)]]
    # 6 fits, then neither 4 nor 5: the first or the second by size is cropped to 2, its rest begins anew behind BOS
    assert best_fit([6, 4, 5], 8, lambda: 0.0) == [[(0, 0, 6), (1, 0, 2)], [(2, 0, 5), (1, 1, 4)]]
    assert best_fit([6, 4, 5], 8, lambda: 0.9) == [[(0, 0, 6), (2, 0, 2)], [(1, 0, 4), (2, 1, 5)]]


def test_a_document_longer_than_a_row_fills_rows_and_leaves_a_rest_at_either_end() -> None:
    # BOS and 17 tokens of text: two rows of 7 behind BOS, and 3
    assert best_fit([18], 8, lambda: 0.9) == [[(0, 0, 8)], [(0, 7, 15)], [(0, 14, 18)]]
    assert best_fit([18], 8, lambda: 0.0) == [[(0, 3, 11)], [(0, 10, 18)], [(0, 0, 4)]]


def test_a_rest_of_one_token_is_dropped() -> None:
    assert best_fit([16], 8, lambda: 0.0) == [[(0, 0, 8)], [(0, 7, 15)]]
    assert best_fit([6, 3], 8, lambda: 0.0) == [[(0, 0, 6), (1, 0, 2)]]
    assert best_fit([6, 4], 8, lambda: 0.0) == [[(0, 0, 6), (1, 0, 2)], [(1, 1, 4)]]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(2, 60), min_size=1, max_size=26), st.integers(2, 20), st.integers(0, 9))
def test_the_pieces_of_a_document_hold_each_token_once_but_at_most_one(
    lengths: list[int], capacity: int, seed: int
) -> None:
    shown: list[list[int]] = [[] for _ in lengths]
    rows = best_fit(lengths, capacity, np.random.default_rng(seed).random)
    for row in rows:
        for i, start, stop in row:
            shown[i] += range(start + 1, stop)  # its first slot shows BOS
    for length, tokens in zip(lengths, shown, strict=True):
        assert len(tokens) == len(set(tokens))
        assert len(tokens) in (length - 2, length - 1) and set(tokens) <= set(range(1, length))
    assert all(sum(stop - start for _, start, stop in row) == capacity for row in rows[:-1])


def test_packed_rows_hold_the_pieces_token_by_token_each_behind_bos() -> None:
    documents = [np.array(d, np.int32) for d in ([0, 1, 2, 3, 4], [0, 5, 6, 7, 8])]
    plan = [[(0, 0, 5), (1, 0, 3)], [(1, 2, 5)]]
    rows = pack(documents, plan, torch.full((2, 8), 99, dtype=torch.int32))
    assert rows.tolist() == [[0, 1, 2, 3, 4, 0, 5, 6], [0, 7, 8, -1, -1, -1, -1, -1]]


@pytest.mark.parametrize("sequence_len", [7, 15, 31])
def test_a_pass_shows_all_documents_but_for_a_few_tokens_in_pieces_behind_bos(sequence_len: int) -> None:
    source = random_source(longest=100)  # 5 x 40 documents of 50 letters on average
    texts = [text for block in source.blocks["train"] for text in block]
    loader = make(source, sequence_len=sequence_len, batch_size=1)
    rows = ["".join(chr(96 + token) for token in row if token >= 0) for row in rows_of(loader)]
    assert all(row[0] == chr(96 + BOS) for row in rows)
    pieces = [piece for row in rows for piece in row.split(chr(96 + BOS)) if piece]
    everything = "\n".join(texts)
    assert all(piece in everything for piece in pieces)
    total = sum(map(len, texts))
    assert loader.tokens_kept == sum(map(len, pieces)) / total  # to the token
    assert 0.94 < loader.tokens_kept < 1  # rests of one token, and an unfilled row a unit


def test_the_share_kept_counts_what_a_unit_drops_and_no_bos() -> None:
    # units of 8 rows: of the first, 9 documents of 7 letters, all are kept but the letters of a short last row
    source = Texts([["a" * 7] * 8 + ["bbb"], ["c" * 7]])
    loader = make(source, batch_size=1)
    assert loader.tokens_kept == 0
    assert len(rows_of(loader)) == 9
    assert loader.tokens_kept == (8 * 7 + 7) / (8 * 7 + 3 + 7)


def test_each_pass_shows_the_same_text_in_other_rows_the_same_in_each_run() -> None:
    source = random_source(num_blocks=1, documents=100, longest=30)
    loader = make(source, batch_size=1, repeat=True)
    passes: list[list[tuple[int, ...]]] = [[], [], []]
    while loader.cursor["epoch"] < 3:
        (row,) = rows_of(iter([next(loader)]))
        if loader.cursor["epoch"] < 3:
            passes[loader.cursor["epoch"]].append(tuple(row))
    letters = [len([token for row in rows for token in row if token > 0]) for rows in passes]
    assert max(letters) - min(letters) < 0.05 * max(letters)
    for a, b in itertools.combinations(passes, 2):
        assert len(set(a) & set(b)) < 0.8 * len(a)
    again = make(source, batch_size=1, repeat=True, cursor={"epoch": 2, "block": 0, "row": 0})
    assert [tuple(row) for row in rows_of(itertools.islice(again, len(passes[2])))] == passes[2]


# --- the stream


def test_inputs_and_targets_are_one_row_shifted_by_one() -> None:
    source = Texts([["abcdefg"] * 4])
    inputs, targets = next(make(source))
    assert inputs.tolist() == [[0, 1, 2, 3, 4, 5, 6]] * 2
    assert targets.tolist() == [[1, 2, 3, 4, 5, 6, 7]] * 2
    assert inputs.dtype == targets.dtype == torch.int64


def test_a_batch_is_the_callers_to_keep() -> None:
    source = random_source()
    kept = list(itertools.islice(make(source, repeat=True), 30))
    fresh = make(source, repeat=True)
    for inputs, targets in kept:
        assert inputs.is_contiguous() and targets.is_contiguous()
        expected = next(fresh)
        assert torch.equal(inputs, expected[0]) and torch.equal(targets, expected[1])
    storages = [tensor.data_ptr() for batch in kept for tensor in batch]
    assert len(set(storages)) == 60


def test_blocks_come_in_order_and_the_next_pass_begins_with_the_first() -> None:
    source = Texts([["a" * 7] * 8, ["b" * 7] * 8])
    rows = rows_of(itertools.islice(make(source, repeat=True), 12))
    assert [row[1] for row in rows] == [1] * 8 + [2] * 8 + [1] * 8


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("world_size", [2, 3])
def test_the_ranks_share_the_rows_of_a_single_process(batch_size: int, world_size: int) -> None:
    source = random_source()
    alone = rows_of(itertools.islice(make(source, batch_size=1, repeat=True), 60))
    ranks = [make(source, batch_size=batch_size, rank=r, world_size=world_size, repeat=True) for r in range(world_size)]
    steps = 60 // (batch_size * world_size)
    together = []
    for _ in range(steps):
        for rank in ranks:
            together += rows_of(iter([next(rank)]))
    assert together == alone[: len(together)]
    assert len({json.dumps(rank.cursor) for rank in ranks}) == 1


def test_any_cursor_goes_on_exactly_behind_the_batch_taken() -> None:
    source = random_source(num_blocks=4)
    loader = make(source, batch_size=3, repeat=True)
    cursors, batches = [loader.cursor], []
    for _ in range(60):
        batches += [rows_of(iter([next(loader)]))]
        cursors += [json.loads(json.dumps(loader.cursor))]
    assert cursors[-1]["epoch"] >= 1
    for i in range(0, 58, 3):
        resumed = make(source, batch_size=3, repeat=True, cursor=cursors[i])
        assert resumed.cursor == cursors[i]
        assert [rows_of(iter([next(resumed)])) for _ in range(2)] == batches[i : i + 2]
        assert resumed.cursor == cursors[i + 2]
        resumed.close()


def test_a_run_of_one_process_is_taken_up_by_two() -> None:
    source = random_source()
    expected = rows_of(itertools.islice(make(source, batch_size=2, repeat=True), 20))
    first = make(source, batch_size=2, repeat=True)
    rows = rows_of(itertools.islice(first, 6))
    ranks = [make(source, rank=r, world_size=2, repeat=True, cursor=first.cursor) for r in range(2)]
    for _ in range(7):
        rows += rows_of(iter([next(ranks[0]), next(ranks[1])]))
    assert rows == expected


def test_a_cursor_of_other_data_is_refused() -> None:
    with pytest.raises(InputError, match="does not fit the data"):
        next(make(random_source(), cursor={"epoch": 0, "block": 0, "row": 10_000}))
    with pytest.raises(InputError, match="does not fit the data"):
        next(make(random_source(), cursor={"epoch": 3, "block": 99, "row": 1}, repeat=True))


def test_validation_is_the_same_each_time_it_is_built() -> None:
    val = random_source(seed=1).blocks["train"]
    few, many = Texts(random_source(1).blocks["train"], val), Texts(random_source(4).blocks["train"], val)
    first = rows_of(itertools.islice(make(few, split="val", repeat=True), 5))
    assert first == rows_of(itertools.islice(make(many, split="val", repeat=True), 5))


# --- ends and small texts


def test_a_text_shorter_than_a_row_trains_with_the_rest_of_the_row_uncounted() -> None:
    inputs, targets = next(make(Texts([["abc"]]), batch_size=1))
    assert inputs.tolist() == [[0, 1, 2, 3, 0, 0, 0]]
    assert targets.tolist() == [[1, 2, 3, -1, -1, -1, -1]]


def test_small_blocks_are_packed_together() -> None:
    source = Texts([["abc"], ["def"]] * 8)  # 4 tokens a block, two of which make a row
    rows = rows_of(make(source, batch_size=1))
    assert len(rows) == 8 and all(t >= 0 for row in rows for t in row)
    documents = [tuple(row[i : i + 4]) for row in rows for i in (0, 4)]
    assert sorted(documents) == [(0, 1, 2, 3)] * 8 + [(0, 4, 5, 6)] * 8


def test_rows_of_long_and_of_short_documents_are_mixed() -> None:
    texts = ["a" * T] * 40 + ["b"] * 160  # 40 rows of one long document, then 40 of four short ones
    first = [row[1] for row in rows_of(make(Texts([texts]), batch_size=1))]
    assert len(first) == 80
    assert 10 <= first[:40].count(first[0]) <= 30  # in the packer's order it would be 40


def test_only_the_last_row_of_a_pass_is_not_full() -> None:
    source = random_source(num_blocks=6, documents=13, longest=5)
    rows = rows_of(make(source, batch_size=1))
    assert all(-1 not in row for row in rows[:-1])


def test_the_last_batch_of_a_pass_is_filled_with_rows_that_count_nothing() -> None:
    source = Texts([["abcdefg"] * 5])
    ranks = [make(source, batch_size=2, rank=r, world_size=2) for r in range(2)]
    batches = [list(rank) for rank in ranks]
    assert [len(b) for b in batches] == [2, 2]
    assert sum(int((t[:, 0] >= 0).sum()) for b in batches for _, t in b) == 5
    assert batches[1][1][1].tolist() == [[-1] * T] * 2


def test_a_split_without_text_is_refused() -> None:
    with pytest.raises(InputError, match="the val split of texts has no text"):
        next(make(Texts([["a"]], [[], [""]]), split="val", repeat=True))


def test_a_row_without_room_for_a_token_is_refused() -> None:
    with pytest.raises(InputError, match="a sequence length of 0 holds no token; the shortest is 1"):
        make(Texts([["a"]]), sequence_len=0)
    inputs, targets = next(make(Texts([["aa"]]), sequence_len=1, batch_size=1))
    assert (inputs.tolist(), targets.tolist()) == ([[BOS]], [[1]])


# --- the thread


def test_an_error_in_the_background_is_raised_where_the_batch_is_taken() -> None:
    class Broken(Texts):
        def read_block(self, split: str, i: int) -> list[str]:
            if i == 1:
                raise InputError("shard 1 is damaged")
            return super().read_block(split, i)

    loader = make(Broken([["a" * 7] * 8] * 2), batch_size=4)
    assert len(rows_of(itertools.islice(loader, 2))) == 8
    with pytest.raises(InputError, match="shard 1 is damaged"):
        next(loader)


def test_the_text_is_read_only_a_little_ahead() -> None:
    read = []

    class Watched(Texts):
        def read_block(self, split: str, i: int) -> list[str]:
            read.append(i)
            return super().read_block(split, i)

    loader = make(Watched([["a" * 7] * 8] * 50), batch_size=1, repeat=True)
    next(loader)
    time.sleep(0.2)
    assert len(read) <= 1 + loader_module.UNITS_AHEAD + 1
    assert loader.cursor == {"epoch": 0, "block": 0, "row": 1}  # of the batch taken, not of those ahead
    loader.close()


@pytest.mark.parametrize("how", ["close", "forget"])
def test_the_thread_ends_with_its_loader(how: str) -> None:
    before = set(threading.enumerate())
    loader = make(random_source(), repeat=True)
    next(loader)
    (thread,) = set(threading.enumerate()) - before
    if how == "close":
        loader.close()
        assert list(loader) == []
    del loader
    gc.collect()
    assert not thread.is_alive()


def test_a_program_that_ends_while_its_loader_encodes_does_not_abort() -> None:
    program = """
from nanochat.data import loader
from nanochat.tokenizer import Tokenizer

class Words(loader.Source):
    name = "words"
    def num_blocks(self, split):
        return 10**6
    def read_block(self, split, i):
        return ["the quick brown fox jumps over the lazy dog " * 20_000]  # long in Rust, short in Python

loader.UNITS_AHEAD = 1000  # it is never idle
tokenizer = Tokenizer.train_from_iterator(["the quick brown fox"], 300)
next(loader.PackingLoader(Words(), "train", tokenizer, batch_size=1, sequence_len=2048))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("world_size", "threads"), [(1, 24), (4, 6), (8, 4), (1000, 4)])
def test_ranks_share_the_cores_but_have_a_few_threads_each(
    world_size: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(24)), raising=False)
    assert encode_threads(world_size) == threads
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1})
    assert encode_threads(world_size) == 2


# --- the device


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1", "cpu", "mps"])
def test_rows_for_any_gpu_are_pinned_in_its_own_context(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    contexts, pinned = [], []

    @contextlib.contextmanager
    def context(device: torch.device) -> Iterator[None]:
        contexts.append(str(device))
        yield
        contexts.append("left")

    def empty(shape: tuple[int, int], dtype: torch.dtype, pin_memory: bool = False) -> torch.Tensor:
        pinned.append((pin_memory, list(contexts)))
        return torch.zeros(shape, dtype=dtype)

    monkeypatch.setattr(torch.cuda, "device", context)
    monkeypatch.setattr(torch, "empty", empty)
    assert host_rows(2, 8, torch.device(device)).shape == (2, 8)
    assert pinned == ([(True, [device])] if device.startswith("cuda") else [(False, [])])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("device", ["cuda", f"cuda:{max(0, torch.cuda.device_count() - 1)}"])
def test_a_gpu_gets_the_batches_of_the_cpu(device: str) -> None:
    source = random_source(num_blocks=20, documents=200)
    on_gpu = list(make(source, batch_size=3, device=device))  # all are on their way before one is read
    on_cpu = list(make(source, batch_size=3))
    assert len(on_gpu) == len(on_cpu) > 50
    for a, b in zip(on_gpu, on_cpu, strict=True):
        assert torch.equal(a[0].cpu(), b[0]) and torch.equal(a[1].cpu(), b[1])
