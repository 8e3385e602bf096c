"""The packing loader: what a row is, which rows come in which order, and that a run can be taken up anywhere."""

from __future__ import annotations

import gc
import itertools
import json
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.config import InputError
from nanochat.data import loader as loader_module
from nanochat.data.loader import PackingLoader, best_fit, pack, window

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


def slow_best_fit(lengths: list[int], capacity: int) -> list[list[tuple[int, int]]]:
    """The definition, word by word."""
    left = dict(enumerate(lengths))
    rows = []
    while left:
        row, space = [], capacity
        while space and left:
            fitting = [i for i in left if left[i] <= space]
            i = max(fitting, key=lambda i: (left[i], -i)) if fitting else min(left, key=lambda i: (left[i], -i))
            row.append((i, min(left[i], space)))
            space -= row[-1][1]
            del left[i]
        rows.append(row)
    return rows


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(2, 30), max_size=40), st.integers(2, 20))
def test_packing_equals_the_plain_definition_of_best_fit(lengths: list[int], capacity: int) -> None:
    assert best_fit(lengths, capacity) == slow_best_fit(lengths, capacity)


def test_a_row_takes_the_longest_that_fits_then_crops_the_shortest() -> None:
    # 8 slots: 5 is the longest that fits, then 3 fills the row; in the next only 9 and 10 are left, 9 is cropped
    assert best_fit([9, 3, 5, 10], 8) == [[(2, 5), (1, 3)], [(0, 8)], [(3, 8)]]
    assert best_fit([6, 4], 8) == [[(0, 6), (1, 2)]]


def test_packed_rows_hold_the_documents_token_by_token() -> None:
    documents = [np.array(d, np.int32) for d in ([0, 1, 2, 3, 4], [0, 5, 6], [0, 7, 8])]
    assert pack(documents, 8).tolist() == [[0, 1, 2, 3, 4, 0, 5, 6], [0, 7, 8, -1, -1, -1, -1, -1]]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=26))
def test_rows_begin_with_bos_and_hold_each_document_once_from_its_beginning(lengths: list[int]) -> None:
    texts = [chr(97 + i) * n for i, n in enumerate(lengths)]  # every document its own letter
    rows = rows_of(make(Texts([texts])))
    counted = [[t for t in row if t >= 0] for row in rows]
    assert all(row[0] == BOS for row in rows)
    pieces = [piece for row in counted for piece in "".join(map(chr, row)).split("\0")[1:] if piece]
    assert len({piece[0] for piece in pieces}) == len(pieces) <= len(texts)
    for piece in pieces:
        assert set(piece) == {piece[0]} and len(piece) <= lengths[ord(piece[0]) - 1]
    with_text = [row for row in counted if len(row) > 1]
    assert all(len(row) == T + 1 for row in with_text[:-1])


def test_later_passes_show_what_the_first_one_dropped_of_a_long_document() -> None:
    ids = np.arange(18)  # BOS and 17 tokens of text: pieces of 7, 7 and 3
    assert window(ids, 0, T).tolist() == ids.tolist()
    assert window(ids, 1, T).tolist() == [BOS, *range(8, 18)]
    assert window(ids, 2, T).tolist() == [BOS, 15, 16, 17]
    assert window(ids, 3, T).tolist() == ids.tolist()
    assert window(ids[:3], 5, T).tolist() == [BOS, 1, 2]
    rows = rows_of(itertools.islice(make(Texts([["abcdefghij"]]), batch_size=1, repeat=True), 2))
    assert rows == [[0, 1, 2, 3, 4, 5, 6, 7], [0, 8, 9, 10, -1, -1, -1, -1]]


# --- the stream


def test_inputs_and_targets_are_one_row_shifted_by_one() -> None:
    source = Texts([["abcdefg"] * 4])
    inputs, targets = next(make(source))
    assert inputs.tolist() == [[0, 1, 2, 3, 4, 5, 6]] * 2
    assert targets.tolist() == [[1, 2, 3, 4, 5, 6, 7]] * 2
    assert inputs.dtype == targets.dtype == torch.int64


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


def test_one_pass_takes_at_least_the_beginning_of_every_document_and_ends() -> None:
    texts = [c * n for c, n in zip("abcdefghij", itertools.cycle([1, 2, 3, 4, 7]), strict=False)]
    rows = rows_of(make(Texts([texts])))
    tokens = sorted(t for row in rows for t in row if t > 0)
    starts = sum(t == BOS for row in rows for t in row)
    assert starts >= len(texts)  # and BOS alone in rows without targets
    assert set(tokens) == set(range(1, 11))


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
    thread.join(timeout=5)
    assert not thread.is_alive()
