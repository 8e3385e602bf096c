"""Sources of text: what is a document, which are held out, and what is said when the data is not usable."""

from __future__ import annotations

import json
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat.config import InputError
from nanochat.data import textfiles
from nanochat.data.sources import SHARD_SETS, open_source

REAL = Path(__file__).parents[1] / "../shared/hub/datasets/local/edu-text-small"


@pytest.fixture(autouse=True)
def no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.delenv("NANOCHAT_HUB_DIR", raising=False)


def write_parquet(path: Path, texts: list[str], row_group_size: int = 1024, column: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({column: texts}), path, row_group_size=row_group_size)
    return path


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
    return path


def documents(name: Path | str, split: str) -> list[str]:
    return list(open_source(str(name)).texts(split))


# --- published shards


def shard_folder(tmp_path: Path, indices: list[int]) -> Path:
    folder = tmp_path / "base" / "base_data_climbmix"
    for i in indices:
        write_parquet(folder / f"shard_{i:05d}.parquet", [f"text of shard {i}"])
    return folder


def test_the_published_sets_have_their_known_sizes_and_folders() -> None:
    facts = {s.name: (s.repo, s.directory, s.num_shards, s.val_shard) for s in SHARD_SETS.values()}
    assert facts == {
        "climbmix": ("karpathy/climbmix-400b-shuffle", "base_data_climbmix", 6543, 6542),
        "fineweb-edu": ("karpathy/fineweb-edu-100b-shuffle", "base_data", 1823, 1822),
    }


def test_validation_is_the_last_published_shard_however_many_were_fetched(tmp_path: Path) -> None:
    shard_folder(tmp_path, [0, 6542])
    assert documents("climbmix", "val") == ["text of shard 6542"]
    assert documents("climbmix", "train") == ["text of shard 0"]
    shard_folder(tmp_path, [1, 2, 3])
    assert documents("climbmix", "val") == ["text of shard 6542"]
    assert documents("climbmix", "train") == [f"text of shard {i}" for i in range(4)]


def test_without_the_validation_shard_no_other_shard_takes_its_place(tmp_path: Path) -> None:
    shard_folder(tmp_path, [0, 1])
    with pytest.raises(InputError, match=r"no shard_06542.parquet \(validation\); run python -m nanochat.dataset -n 8"):
        open_source("climbmix")


def test_missing_shards_are_named_with_the_command_that_fetches_them(tmp_path: Path) -> None:
    shard_folder(tmp_path, [0, 6542])
    with pytest.raises(InputError, match=r"shard_00001.parquet, shard_00002.parquet; run .*dataset -n 3$"):
        open_source("climbmix", num_shards=3)
    with pytest.raises(InputError, match=r"run python -m nanochat.dataset -n 8 --dataset=fineweb-edu"):
        open_source("fineweb-edu")


def test_num_shards_takes_the_first_ones(tmp_path: Path) -> None:
    shard_folder(tmp_path, [0, 1, 2, 6542])
    assert list(open_source("climbmix", num_shards=2).texts("train")) == ["text of shard 0", "text of shard 1"]


def test_a_half_downloaded_file_is_not_a_shard(tmp_path: Path) -> None:
    folder = shard_folder(tmp_path, [0, 6542])
    (folder / "shard_00001.parquet.part").write_bytes(b"PAR1")
    assert documents("climbmix", "train") == ["text of shard 0"]


def test_a_damaged_shard_is_named_with_the_way_out(tmp_path: Path) -> None:
    folder = shard_folder(tmp_path, [0, 6542])
    (folder / "shard_00000.parquet").write_bytes(b"PAR1 this is half a shard PAR1")
    with pytest.raises(InputError, match=r"shard_00000.parquet is damaged .* delete it and fetch it again: python -m"):
        open_source("climbmix").num_blocks("train")


def test_damage_behind_a_good_footer_is_named_when_the_block_is_read(tmp_path: Path) -> None:
    folder = shard_folder(tmp_path, [0, 6542])
    path = write_parquet(folder / "shard_00000.parquet", [f"{i} " * 200 for i in range(500)])
    raw = bytearray(path.read_bytes())
    raw[4:2000] = b"\xff" * 1996
    path.write_bytes(raw)
    with pytest.raises(InputError, match=r"shard_00000.parquet is damaged .*; delete it"):
        open_source("climbmix").read_block("train", 0)


def test_shards_of_a_hub_mirror_are_read_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mirror = tmp_path / "hub" / "datasets" / "karpathy" / "climbmix-400b-shuffle"
    for i in (0, 6542):
        write_parquet(mirror / f"shard_{i:05d}.parquet", [f"mirror {i}"])
    monkeypatch.setenv("NANOCHAT_HUB_DIR", str(tmp_path / "hub"))
    assert documents("climbmix", "train") == ["mirror 0"]


def test_a_data_set_of_the_mirror_is_found_by_owner_and_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(2):
        write_parquet(tmp_path / "hub" / "datasets" / "me" / "mine" / f"{i}.parquet", [f"part {i}"])
    monkeypatch.setenv("NANOCHAT_HUB_DIR", str(tmp_path / "hub"))
    assert documents("me/mine", "val") == ["part 1"]


def test_an_unknown_name_lists_what_there_is() -> None:
    with pytest.raises(InputError, match="no data source 'climmix'; use climbmix, fineweb-edu, tinyworld or a folder"):
        open_source("climmix")


# --- folders of parquet


def test_of_several_parquet_files_the_last_by_name_is_validation(tmp_path: Path) -> None:
    for name in ("b", "c", "a"):
        write_parquet(tmp_path / "d" / f"{name}.parquet", [name])
    (tmp_path / "d" / "README.md").write_text("about the data", encoding="utf-8")
    assert documents(tmp_path / "d", "train") == ["a", "b"]
    assert documents(tmp_path / "d", "val") == ["c"]


def test_a_block_is_a_row_group_without_its_empty_documents(tmp_path: Path) -> None:
    write_parquet(tmp_path / "d" / "0.parquet", ["a", "", "b", "c", "d"], row_group_size=3)
    write_parquet(tmp_path / "d" / "1.parquet", ["v"])
    source = open_source(str(tmp_path / "d"))
    assert [source.read_block("train", i) for i in range(source.num_blocks("train"))] == [["a", "b"], ["c", "d"]]


def test_one_parquet_file_has_held_out_documents_too(tmp_path: Path) -> None:
    texts = [f"document {i}" for i in range(3000)]
    write_parquet(tmp_path / "d" / "all.parquet", texts, row_group_size=500)
    train, val = documents(tmp_path / "d", "train"), documents(tmp_path / "d", "val")
    assert sorted(train + val) == sorted(texts)
    assert 30 <= len(val) <= 90  # 2% of 3,000 is 60, give or take 4 standard deviations
    source = open_source(str(tmp_path / "d"))
    assert (source.num_blocks("train"), source.num_blocks("val")) == (6, 1)


def test_a_parquet_file_without_a_text_column_says_what_it_has(tmp_path: Path) -> None:
    write_parquet(tmp_path / "d" / "a.parquet", ["x", "y"], column="content")
    with pytest.raises(InputError, match=r"no column 'text' \(it has content\)"):
        open_source(str(tmp_path / "d"))


@pytest.mark.skipif(not REAL.is_dir(), reason="the local copy of edu-text-small is not here")
def test_the_real_text_opens_with_its_published_counts() -> None:
    source = open_source(str(REAL))
    assert (source.num_blocks("train"), source.num_blocks("val")) == (62, 3)
    assert len(source.read_block("train", 0)) == 1024
    assert sum(len(source.read_block("val", i)) for i in range(3)) == 2065


# --- your own text


def test_about_2_percent_are_held_out_and_nothing_is_in_both(tmp_path: Path) -> None:
    texts = [f"line {i}" for i in range(5000)]
    write_jsonl(tmp_path / "d" / "a.jsonl", texts)
    train, val = documents(tmp_path / "d", "train"), documents(tmp_path / "d", "val")
    assert sorted(train + val) == sorted(texts)
    assert 60 <= len(val) <= 140


def test_the_split_depends_on_the_text_alone_not_on_files_or_their_order(tmp_path: Path) -> None:
    texts = [f"line {i}" for i in range(500)]
    write_jsonl(tmp_path / "one" / "a.jsonl", texts)
    for i in range(5):
        write_jsonl(tmp_path / "many" / "sub" / f"{9 - i}.jsonl", texts[i * 100 : i * 100 + 100][::-1])
    write_parquet(tmp_path / "parquet" / "a.parquet", texts)
    val = set(documents(tmp_path / "one", "val"))
    assert val and val == set(documents(tmp_path / "many", "val")) == set(documents(tmp_path / "parquet", "val"))


def test_more_text_moves_no_document_out_of_the_held_out_ones(tmp_path: Path) -> None:
    texts = [f"line {i}" for i in range(2000)]
    write_jsonl(tmp_path / "d" / "a.jsonl", texts[:1000])
    before = documents(tmp_path / "d", "val")
    write_jsonl(tmp_path / "d" / "b.jsonl", texts[1000:])
    assert set(before) <= set(documents(tmp_path / "d", "val"))


def test_copies_of_one_document_are_on_the_same_side(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "d" / "a.jsonl", [f"line {i % 100}" for i in range(300)])
    assert not set(documents(tmp_path / "d", "train")) & set(documents(tmp_path / "d", "val"))


@pytest.mark.parametrize("n", [2, 3, 10])
def test_a_tiny_folder_holds_out_one_document_and_trains_on_the_others(tmp_path: Path, n: int) -> None:
    for i in range(n):
        (tmp_path / "d").mkdir(exist_ok=True)
        (tmp_path / "d" / f"{i}.txt").write_text(f"note {i}", encoding="utf-8")
    assert len(documents(tmp_path / "d", "val")) == 1
    assert len(documents(tmp_path / "d", "train")) == n - 1


@pytest.mark.parametrize(("texts", "found"), [([], 0), (["a"], 1), (["a", "a"], 1)])
def test_fewer_than_two_different_documents_are_refused(tmp_path: Path, texts: list[str], found: int) -> None:
    write_jsonl(tmp_path / "d" / "a.jsonl", texts)
    with pytest.raises(InputError, match=f"{found} different documents; it takes 2"):
        open_source(str(tmp_path / "d"))


def test_documents_are_shuffled_the_same_way_each_time(tmp_path: Path) -> None:
    texts = [f"line {i}" for i in range(300)]
    write_jsonl(tmp_path / "d" / "a.jsonl", texts)
    first, second = documents(tmp_path / "d", "train"), documents(tmp_path / "d", "train")
    assert first == second != [t for t in texts if t in first]


def test_a_block_has_1024_documents(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "d" / "a.jsonl", [f"line {i}" for i in range(3000)])
    source = open_source(str(tmp_path / "d"))
    sizes = [len(source.read_block("train", i)) for i in range(source.num_blocks("train"))]
    assert sizes[:2] == [1024, 1024] and len(sizes) == 3


def test_a_text_file_is_a_document_in_utf8_with_plain_line_ends(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.txt").write_bytes("\ufeffGrüße,\r\nzwei Zeilen.\r\n".encode())
    (tmp_path / "d" / "b.md").write_text("# 題\n\n本文", encoding="utf-8")
    (tmp_path / "d" / "c.txt").write_text(" \n\n", encoding="utf-8")
    both = documents(tmp_path / "d", "train") + documents(tmp_path / "d", "val")
    assert sorted(both) == sorted(["Grüße,\nzwei Zeilen.", "# 題\n\n本文"])


def test_a_large_text_file_is_cut_at_blank_lines_and_loses_nothing(tmp_path: Path) -> None:
    paragraphs = [f"{i} " + "word " * 100 for i in range(200)]  # 100 kB
    (tmp_path / "book.txt").write_text("\n\n".join(paragraphs), encoding="utf-8")
    both = documents(tmp_path / "book.txt", "train") + documents(tmp_path / "book.txt", "val")
    assert sorted(p for d in both for p in d.split("\n\n")) == sorted(paragraphs)
    assert 20 <= len(both) <= 25  # 4,096 bytes and up to one paragraph more each


@pytest.mark.parametrize("separator", ["\n", " ", ""])
def test_text_without_blank_lines_is_cut_too_and_never_inside_a_character(separator: str) -> None:
    raw = separator.join(["длинноеслово語"] * 10_000).encode()
    pieces = textfiles.cut_text(raw)
    assert b"".join(raw[o : o + n] for o, n in pieces) == raw
    assert max(n for _, n in pieces) <= 2 * textfiles.MAX_PIECE_BYTES
    for offset, length in pieces:
        raw[offset : offset + length].decode()


def test_a_jsonl_error_names_file_line_and_reason(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for line, reason in [
        (b'{"text": "a"', "is no JSON"),
        (b'{"body": "a"}', "keys body"),
        (b'["a"]', "list"),
        (b'{"text": 3}', 'no string under "text"'),
        (b'{"text": "\xff"}', "not UTF-8"),
    ]:
        path.write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
        with pytest.raises(InputError, match=f"a.jsonl:3 .*{reason}") as caught:
            open_source(str(path))
        assert "\n" not in str(caught.value)


def test_a_text_file_in_another_encoding_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(InputError, match=r"latin.txt is not UTF-8 at byte 3"):
        open_source(str(tmp_path / "latin.txt"))


def test_an_empty_folder_and_a_mixed_one_are_refused(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    with pytest.raises(InputError, match=r"no .parquet, .jsonl, .txt or .md file"):
        open_source(str(tmp_path / "d"))
    (tmp_path / "d" / ".hidden.txt").write_text("x", encoding="utf-8")
    write_jsonl(tmp_path / "d" / "a.jsonl", ["a", "b"])
    assert len(documents(tmp_path / "d", "train")) == 1
    (tmp_path / "d" / "b.txt").write_text("x", encoding="utf-8")
    with pytest.raises(InputError, match=r"mixes kinds of files"):
        open_source(str(tmp_path / "d"))


def test_a_fingerprint_follows_the_text_not_the_place(tmp_path: Path) -> None:
    for name in ("jsonl", "parquet"):
        folder = tmp_path / name
        if name == "jsonl":
            write_jsonl(folder / "a.jsonl", ["a", "b", "c"])
        else:
            write_parquet(folder / "a.parquet", ["a", "b"])
            write_parquet(folder / "b.parquet", ["c"])
        shutil.copytree(folder, tmp_path / "elsewhere" / name)
        first = open_source(str(folder)).fingerprint()
        assert first == open_source(str(tmp_path / "elsewhere" / name)).fingerprint()
        if name == "jsonl":
            write_jsonl(folder / "a.jsonl", ["a", "b", "d"])
        else:
            write_parquet(folder / "a.parquet", ["a", "b", "and more"])
        assert first != open_source(str(folder)).fingerprint()


def test_tinyworld_comes_from_its_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    world = types.ModuleType("nanochat.data.tinyworld")
    world.NUM_BLOCKS = {"train": 2, "val": 1}  # type: ignore[attr-defined]
    world.documents = lambda split, block: [f"{split} {block}", ""]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nanochat.data.tinyworld", world)
    monkeypatch.setattr("nanochat.data.tinyworld", world, raising=False)
    assert documents("tinyworld", "train") == ["train 0", "train 1"]
    assert documents("tinyworld", "val") == ["val 0"]
    assert len(open_source("tinyworld").fingerprint()) == 64


def test_the_cut_holds_out_at_least_one_and_never_all() -> None:
    assert textfiles.hash_cut(np.array([5, 6], np.uint64), "x") == 5  # both under 2%
    assert textfiles.hash_cut(np.array([2**64 - 1, 2**63], np.uint64), "x") == 2**63  # none under 2%
