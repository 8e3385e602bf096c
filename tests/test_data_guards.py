"""Damaged, missing and changed data: named, fetched again, refused or left out if asked, never silently shorter."""

from __future__ import annotations

import functools
import hashlib
import json
import random
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from nanochat import dataset
from nanochat.config import InputError
from nanochat.data import download, listing, sources
from nanochat.data.loader import PackingLoader
from nanochat.data.parquet import TAIL_BYTES, tail_hash
from nanochat.data.sources import open_source
from tests.file_server import Server, serve
from tests.test_download import flip
from tests.test_loader import Letters

SHARDS = (0, 1, 2, 6542)


def shard(i: int) -> str:
    return f"shard_{i:05d}.parquet"


@functools.cache
def texts_of(i: int) -> list[str]:
    letters = random.Random(i)
    return ["".join(letters.choices("abcdefgh", k=9)) for _ in range(300)]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Has shards 0, 1, 2 and the one for validation, of 3 row groups each."""
    with serve() as state:
        monkeypatch.setattr(download, "HUB_URL", state.url + "{repo}/{file}")
        for i in SHARDS:
            pq.write_table(pa.table({"text": texts_of(i)}), tmp_path / "made.parquet", row_group_size=100)
            state.files[shard(i)] = (tmp_path / "made.parquet").read_bytes()
        yield state


@pytest.fixture
def folder(server: Server, tmp_path: Path) -> Path:
    """All of it, fetched."""
    dataset.run(dataset.DatasetConfig(num_files=3), download.HUB_URL)
    server.requests.clear()
    return tmp_path / "base_data_climbmix"


@pytest.fixture
def mirror(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same with its listing where nothing is fetched from anywhere."""
    path = tmp_path / "hub" / "datasets" / "karpathy" / "climbmix-400b-shuffle"
    shutil.copytree(folder, path)
    monkeypatch.setenv("NANOCHAT_HUB_DIR", str(tmp_path / "hub"))
    return path


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def break_footer(path: Path) -> None:
    flip(path, -1)


DAMAGE = {"truncated": truncate, "flipped": flip, "footer": break_footer, "missing": Path.unlink}


# --- fetched again


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("bad_shards", ["stop", "skip"])
@pytest.mark.parametrize("i", [1, 6542])
def test_a_damaged_shard_is_named_and_fetched_again(
    server: Server, folder: Path, capsys: pytest.CaptureFixture[str], kind: str, bad_shards: str, i: int
) -> None:
    before = open_source("climbmix").fingerprint()
    capsys.readouterr()
    DAMAGE[kind](folder / shard(i))
    source = open_source("climbmix", bad_shards=bad_shards)
    assert list(source.texts("train")) == [text for j in (0, 1, 2) for text in texts_of(j)]
    assert list(source.texts("val")) == texts_of(6542)
    assert server.requests == [(shard(i), None)]
    assert source.fingerprint() == before
    named = [line for line in capsys.readouterr().out.splitlines() if "fetching it again" in line]
    assert len(named) == 1 and str(folder / shard(i)) in named[0]


def test_a_folder_that_cannot_be_written_into_ends_in_one_line(server: Server, folder: Path) -> None:
    truncate(folder / shard(1))
    shutil.rmtree(folder / ".locks")
    (folder / ".locks").write_text("in the way", encoding="utf-8")
    with pytest.raises(
        InputError, match=rf"{shard(1)} is damaged .*; cannot write .*{shard(1)}: File exists"
    ) as caught:
        open_source("climbmix")
    assert "\n" not in str(caught.value)


def test_several_ranks_that_find_it_fetch_it_once(server: Server, folder: Path) -> None:
    truncate(folder / shard(1))
    with ThreadPoolExecutor(4) as ranks:
        found = list(ranks.map(lambda _: list(open_source("climbmix").texts("train")), range(4)))
    assert found == [[text for j in (0, 1, 2) for text in texts_of(j)]] * 4
    assert len(server.requests) == 1


def test_batches_are_those_of_whole_data_when_damage_is_found_under_way(server: Server, folder: Path) -> None:
    def batches() -> list[torch.Tensor]:
        source = open_source("climbmix")
        loader = PackingLoader(source, "train", Letters(), batch_size=2, sequence_len=15, repeat=False)
        return [inputs for inputs, _ in loader]

    whole = batches()
    flip(folder / shard(1))
    mended = batches()
    assert len(server.requests) == 1
    assert len(whole) == len(mended) and all(map(torch.equal, whole, mended))


def test_a_file_is_hashed_once_a_process(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed = []
    monkeypatch.setattr(listing, "sha256_of", lambda path: hashed.append(path.name) or sha256_of(path))
    sha256_of = download.sha256_of
    for _ in range(2):
        list(open_source("climbmix").texts("train"))
        list(open_source("climbmix", bad_shards="skip").texts("val"))
    assert sorted(hashed) == sorted(map(shard, SHARDS))


# --- stopped


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_cannot_be_fetched_again_stops_with_both_reasons(server: Server, folder: Path, kind: str) -> None:
    DAMAGE[kind](folder / shard(1))
    server.files.clear()
    wanted = rf"{shard(1)} is damaged \(.*; http.*{shard(1)} answered 404.*\); fetch it again: .* -n 8"
    with pytest.raises(InputError, match=wanted) as caught:
        list(open_source("climbmix").texts("train"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "why"), [("truncated", "bytes instead of"), ("flipped", "SHA-256 is"), ("missing", "missing, though")]
)
def test_a_mirror_is_never_written_into(server: Server, mirror: Path, kind: str, why: str) -> None:
    DAMAGE[kind](mirror / shard(1))
    with pytest.raises(InputError, match=rf"{shard(1)} is damaged \(.*{why}.*; copy it into {mirror} again"):
        list(open_source("climbmix").texts("train"))
    assert server.requests == []


def test_the_loader_ends_with_the_name_of_what_stays_damaged(mirror: Path) -> None:
    flip(mirror / shard(1))
    loader = PackingLoader(open_source("climbmix"), "train", Letters(), batch_size=2, sequence_len=15)
    with pytest.raises(InputError, match=shard(1)):
        for _ in loader:
            pass


def test_all_damaged_shards_are_counted_and_skipping_is_offered(mirror: Path) -> None:
    truncate(mirror / shard(0))
    truncate(mirror / shard(2))
    with pytest.raises(InputError, match=rf"{shard(0)} .*--bad_shards=skip \(1 more are damaged too\)"):
        open_source("climbmix")


def test_another_policy_is_refused() -> None:
    with pytest.raises(InputError, match="bad_shards 'ignore' is not one of stop, skip"):
        open_source("tinyworld", bad_shards="ignore")


# --- left out


@pytest.mark.parametrize("kind", DAMAGE)
def test_skipping_trains_on_what_a_set_without_the_shard_has(
    mirror: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    before = open_source("climbmix").fingerprint()
    num_bytes = (mirror / shard(1)).stat().st_size
    DAMAGE[kind](mirror / shard(1))
    source = open_source("climbmix", bad_shards="skip")
    out = capsys.readouterr().out
    assert f"Left out: {mirror / shard(1)} (" in out
    assert f"1 of 3 training files of climbmix are left out: {num_bytes:,} bytes, about 300 documents" in out
    assert list(source.texts("train")) == texts_of(0) + texts_of(2)
    assert list(source.texts("val")) == texts_of(6542)
    (mirror / shard(1)).unlink(missing_ok=True)
    (mirror / listing.LISTING).unlink()
    assert source.fingerprint() == open_source("climbmix").fingerprint() != before


def test_what_is_left_out_is_decided_once_a_process(mirror: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = (mirror / shard(1)).read_bytes()
    flip(mirror / shard(1))
    first = open_source("climbmix", bad_shards="skip").fingerprint()
    capsys.readouterr()
    (mirror / shard(1)).write_bytes(whole)
    assert open_source("climbmix", bad_shards="skip").fingerprint() == first
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("damaged", [[6542], [0, 1, 2]])
def test_neither_validation_nor_all_of_training_can_be_left_out(mirror: Path, damaged: list[int]) -> None:
    for i in damaged:
        flip(mirror / shard(i))
    with pytest.raises(InputError, match=rf"{shard(damaged[0])} is damaged .*; copy it") as caught:
        open_source("climbmix", bad_shards="skip")
    assert "--bad_shards" not in str(caught.value)


@pytest.mark.parametrize("kind", ["truncated", "flipped"])
def test_files_of_a_folder_without_a_listing_are_decoded_before_they_are_trusted(
    folder: Path, tmp_path: Path, kind: str
) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(folder, mine, ignore=shutil.ignore_patterns("*.json"))
    raw = bytearray((mine / shard(1)).read_bytes())
    raw[4:40] = b"\xff" * 36  # the first page's header
    (mine / shard(1)).write_bytes(raw if kind == "flipped" else raw[:-100])
    with pytest.raises(InputError, match=rf"{shard(1)} is damaged \(.*\); .*write it again"):
        list(open_source(str(mine)).texts("train"))
    assert list(open_source(str(mine), bad_shards="skip").texts("train")) == texts_of(0) + texts_of(2)


# --- changed


def test_the_fingerprint_sees_other_text_of_equal_size(tmp_path: Path) -> None:
    def opened(name: str, texts: list[str], suffix: str, parts: int) -> sources.Source:
        for part in range(parts):
            path = tmp_path / name / f"{part}{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            if suffix == ".parquet":
                pq.write_table(pa.table({"text": texts}), path, row_group_size=10, compression="none")
            elif suffix == ".jsonl":
                path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
            else:
                path.write_text("\n\n".join(texts), encoding="utf-8")
        return open_source(str(tmp_path / name))

    texts = [f"{i:03d} " + "a" * 996 for i in range(50)]
    other = [*texts[:20], "020 " + "b" * 996, *texts[21:]]
    for suffix, parts in ((".parquet", 1), (".parquet", 2), (".jsonl", 1), (".txt", 1)):
        prints = {opened(f"{suffix}{parts}{n}", t, suffix, parts).fingerprint() for n, t in enumerate((texts, other))}
        assert len(prints) == 2, suffix


def test_of_a_large_file_the_footer_tells_what_changed_far_before_it(tmp_path: Path) -> None:
    def written(texts: list[str]) -> str:
        pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=20, write_statistics=False)
        raw = (tmp_path / "a.parquet").read_bytes()
        assert len(raw) > 2 * TAIL_BYTES
        assert tail_hash(tmp_path / "a.parquet") == hashlib.sha256(raw[-TAIL_BYTES:]).hexdigest()
        return tail_hash(tmp_path / "a.parquet")

    letters = random.Random(0)
    texts = ["".join(letters.choices("abcdefgh ", k=2000)) for _ in range(100)]
    assert written(texts) != written([texts[0] + "x", *texts[1:]])


def test_a_footer_longer_than_the_usual_tail_is_seen_whole(tmp_path: Path) -> None:
    raw = bytearray(b"x" * 4 * TAIL_BYTES + (2 * TAIL_BYTES).to_bytes(4, "little") + b"PAR1")
    prints = set()
    for at in (2 * TAIL_BYTES, 2 * TAIL_BYTES - 1):  # the footer's first byte, and the one before it
        (tmp_path / "a").write_bytes(raw[:at] + b"?" + raw[at + 1 :])
        prints.add(tail_hash(tmp_path / "a"))
    (tmp_path / "a").write_bytes(raw)
    assert len(prints) == 2 and tail_hash(tmp_path / "a") in prints


def test_a_small_file_s_tail_is_all_of_it(folder: Path) -> None:
    assert tail_hash(folder / shard(0)) == listing.sha256_of(folder / shard(0))
    for content in (b"", b"PAR1", b"\xff" * 9):
        (folder / "x.parquet").write_bytes(content)
        assert tail_hash(folder / "x.parquet") == listing.sha256_of(folder / "x.parquet")


@pytest.mark.parametrize("suffix", [".jsonl", ".txt"])
def test_text_that_changes_under_an_open_source_is_not_trained_on(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "d").mkdir()
    for i in range(3):
        text = f"note {i}"
        content = json.dumps({"text": text}) if suffix == ".jsonl" else text
        (tmp_path / "d" / f"{i}{suffix}").write_text(content, encoding="utf-8")
    source = open_source(str(tmp_path / "d"))
    assert len(source.read_block("train", 0)) == 2
    for path in (tmp_path / "d").iterdir():
        path.write_text(path.read_text(encoding="utf-8").replace("note", "nope"), encoding="utf-8")
    with pytest.raises(InputError, match=rf"{suffix} has changed since it was opened"):
        source.read_block("train", 0)


# --- one file


def one_file(path: Path, texts: list[str]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": texts}), path, row_group_size=7)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
    else:  # pieces of 4,096 bytes and up to the next blank line
        path.write_text("\n\n".join(texts), encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".txt"])
@pytest.mark.parametrize(("n", "seed"), [(2, 0), (2, 1), (5, 2), (30, 3)])
def test_one_file_has_held_out_text_that_is_not_trained_on(tmp_path: Path, suffix: str, n: int, seed: int) -> None:
    letters = random.Random(seed)
    texts = ["".join(letters.choices("abcdefgh ", k=9000)).strip() for _ in range(n)]
    source = open_source(str(one_file(tmp_path / f"all{suffix}", texts)))
    train, val = list(source.texts("train")), list(source.texts("val"))
    assert train and val and not set(train) & set(val)
    assert sorted(train + val) == sorted(texts)
    assert all(source.read_block("val", i) for i in range(source.num_blocks("val")))


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".txt"])
@pytest.mark.parametrize("texts", [["only one"], []])
def test_one_file_of_one_document_or_none_is_refused(tmp_path: Path, suffix: str, texts: list[str]) -> None:
    path = tmp_path / f"all{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), path)
    else:
        one_file(path, texts)
    with pytest.raises(InputError, match=f"has {len(texts)} different documents; it takes 2"):
        open_source(str(path))
