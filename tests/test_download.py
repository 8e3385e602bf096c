"""Downloads against a server on this machine that behaves as badly as real ones do."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import threading
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat import dataset
from nanochat.config import InputError
from nanochat.data import download
from nanochat.data.download import Job, check_parquet, fetch, fetch_all
from nanochat.data.listing import LISTING, read_listing, record
from tests.file_server import Server, serve

CONTENT = bytes(range(256)) * 4096  # 1 MiB


@pytest.fixture
def server() -> Iterator[Server]:
    with serve() as state:
        state.files["a.bin"] = CONTENT
        yield state


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir() if p.name not in (".locks", LISTING)}


def parquet_bytes(tmp_path: Path, text: str = "hello") -> bytes:
    path = tmp_path / "made.parquet"
    pq.write_table(pa.table({"text": [text] * 3}), path)
    content = path.read_bytes()
    path.unlink()
    return content


def test_a_file_arrives_whole_under_its_name_and_is_not_fetched_again(server: Server, tmp_path: Path) -> None:
    job = Job(server.url + "a.bin", tmp_path / "a.bin")
    fetch(job)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert names(tmp_path) == {"a.bin"}
    fetch(job)
    assert len(server.requests) == 1


def test_a_broken_connection_is_taken_up_where_it_broke(server: Server, tmp_path: Path) -> None:
    server.faults = ["break", "break"]
    fetch(Job(server.url + "a.bin", tmp_path / "a.bin"), backoff=0)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert [r for _, r in server.requests] == [None, "bytes=65536-", "bytes=131072-"]


def test_a_part_of_an_earlier_run_is_taken_up(server: Server, tmp_path: Path) -> None:
    (tmp_path / "a.bin.part").write_bytes(CONTENT[:1000])
    fetch(Job(server.url + "a.bin", tmp_path / "a.bin"))
    assert server.requests == [("a.bin", "bytes=1000-")]
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


def test_a_part_that_was_complete_is_only_verified(server: Server, tmp_path: Path) -> None:
    (tmp_path / "a.bin.part").write_bytes(CONTENT)
    fetch(Job(server.url + "a.bin", tmp_path / "a.bin"))
    assert server.requests == [("a.bin", f"bytes={len(CONTENT)}-")]
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


def test_a_part_longer_than_the_file_is_thrown_away(server: Server, tmp_path: Path) -> None:
    (tmp_path / "a.bin.part").write_bytes(CONTENT + b"more")
    fetch(Job(server.url + "a.bin", tmp_path / "a.bin"), backoff=0)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


def test_an_answer_for_another_range_is_not_appended(server: Server, tmp_path: Path) -> None:
    server.faults = ["wrong range"]
    (tmp_path / "a.bin.part").write_bytes(CONTENT[:1000])
    fetch(Job(server.url + "a.bin", tmp_path / "a.bin"), backoff=0)
    assert [r for _, r in server.requests] == ["bytes=1000-"] * 2
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


def test_a_server_without_ranges_gives_the_file_from_its_start(server: Server, tmp_path: Path) -> None:
    server.has_ranges = False
    (tmp_path / "a.bin.part").write_bytes(b"y" * 1000)
    fetch(Job(server.url + "a.bin", tmp_path / "a.bin"))
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


@pytest.mark.parametrize("fault", ["503", "429", "500"])
def test_a_busy_server_is_asked_again(server: Server, tmp_path: Path, fault: str) -> None:
    server.faults = [fault] * 4
    fetch(Job(server.url + "a.bin", tmp_path / "a.bin"), backoff=0)
    assert len(server.requests) == 5


def test_five_failures_in_a_row_end_it_in_one_line_that_names_the_file(server: Server, tmp_path: Path) -> None:
    server.faults = ["503"] * 9
    with pytest.raises(InputError, match=r"a\.bin: the server answered 503; run again") as caught:
        fetch(Job(server.url + "a.bin", tmp_path / "a.bin"), backoff=0)
    assert "\n" not in str(caught.value)
    assert len(server.requests) == 5


def test_progress_starts_the_count_of_failures_again(server: Server, tmp_path: Path) -> None:
    server.faults = ["break"] * 8  # 64 KiB each: slow, but it gets there
    fetch(Job(server.url + "a.bin", tmp_path / "a.bin"), backoff=0)
    assert len(server.requests) == 9


def test_a_missing_file_is_not_asked_for_again(server: Server, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="404"):
        fetch(Job(server.url + "none.bin", tmp_path / "none.bin"), backoff=0)
    assert len(server.requests) == 1
    assert names(tmp_path) == set()


def test_content_that_is_not_what_the_etag_says_is_fetched_once_more(server: Server, tmp_path: Path) -> None:
    server.etag = hashlib.sha256(CONTENT).hexdigest()
    server.faults = ["garbage"]
    fetch(Job(server.url + "a.bin", tmp_path / "a.bin"), backoff=0)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert len(server.requests) == 2


def test_content_that_stays_wrong_is_never_kept(server: Server, tmp_path: Path) -> None:
    job = Job(server.url + "a.bin", tmp_path / "a.bin", sha256="0" * 64)
    with pytest.raises(InputError, match="SHA-256"):
        fetch(job, backoff=0)
    assert names(tmp_path) == set()
    assert len(server.requests) == 2


def test_a_size_that_no_server_tells_is_caught_by_the_parquet_footer(server: Server, tmp_path: Path) -> None:
    server.files["s.parquet"] = parquet_bytes(tmp_path)[:-10]
    server.faults = ["no length", "no length"]
    with pytest.raises(InputError, match="parquet"):
        fetch(Job(server.url + "s.parquet", tmp_path / "s.parquet", check_parquet), backoff=0)
    assert names(tmp_path) == set()


def test_a_damaged_file_on_disk_is_replaced(server: Server, tmp_path: Path) -> None:
    server.files["s.parquet"] = parquet_bytes(tmp_path)
    (tmp_path / "s.parquet").write_bytes(b"PAR1 half a file")
    fetch(Job(server.url + "s.parquet", tmp_path / "s.parquet", check_parquet))
    assert pq.read_table(tmp_path / "s.parquet").num_rows == 3


def test_a_refused_connection_ends_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="ConnectionError") as caught:
        fetch(Job("http://127.0.0.1:9/a.bin", tmp_path / "a.bin"), backoff=0)
    assert "\n" not in str(caught.value)


def test_one_missing_file_does_not_keep_the_others_away(server: Server, tmp_path: Path) -> None:
    jobs = [Job(server.url + name, tmp_path / name) for name in ("none.bin", "a.bin")]
    failed = fetch_all(jobs, workers=2, backoff=0, quiet=True)
    assert list(failed) == [tmp_path / "none.bin"]
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


def test_two_downloads_of_one_file_at_a_time_fetch_it_once(server: Server, tmp_path: Path) -> None:
    job = Job(server.url + "a.bin", tmp_path / "a.bin")
    assert fetch_all([job] * 4, workers=4, quiet=True) == {}
    assert len(server.requests) == 1


def test_a_stopped_download_keeps_its_part(server: Server, tmp_path: Path) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(download.Interrupted):
        fetch(Job(server.url + "a.bin", tmp_path / "a.bin"), stop=stop)
    assert names(tmp_path) == {"a.bin.part"}


# --- python -m nanochat.dataset


@pytest.fixture
def shards(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.delenv("NANOCHAT_HUB_DIR", raising=False)
    for i in (0, 1, 2, 6542):
        server.files[f"shard_{i:05d}.parquet"] = parquet_bytes(tmp_path, f"shard {i}")
    return server


def test_n_2_fetches_shards_0_and_1_and_always_the_validation_shard(shards: Server, tmp_path: Path) -> None:
    dataset.run(dataset.DatasetConfig(num_files=2), shards.url + "{repo}/{file}")
    wanted = {"shard_00000.parquet", "shard_00001.parquet", "shard_06542.parquet"}
    assert names(tmp_path / "base" / "base_data_climbmix") == wanted


def test_a_shard_that_cannot_be_fetched_is_named(shards: Server, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"2 of 6 shards are missing or damaged: shard_00003\.parquet, shard_00004\.parquet"
    ):
        dataset.run(dataset.DatasetConfig(num_files=5), shards.url + "{repo}/{file}", backoff=0)


def test_missing_shards_make_the_exit_code_2(
    shards: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dataset.run, "__defaults__", (shards.url + "{repo}/{file}", 0.0))
    with pytest.raises(SystemExit) as caught:
        dataset.main(["-n", "4", "-w", "2"])
    assert caught.value.code == 2
    assert "shard_00003.parquet" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("argv", [["-n", "0"], ["-n", "6543"], ["-n", "2", "-w", "0"], ["--dataset=x"]])
def test_wrong_flags_end_before_anything_is_fetched(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        dataset.main(argv)
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_shards_of_a_mirror_are_not_fetched_but_named_if_missing(
    shards: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror = tmp_path / "hub" / "datasets" / "karpathy" / "climbmix-400b-shuffle"
    mirror.mkdir(parents=True)
    monkeypatch.setenv("NANOCHAT_HUB_DIR", str(tmp_path / "hub"))
    for i in (0, 6542):
        (mirror / f"shard_{i:05d}.parquet").write_bytes(shards.files[f"shard_{i:05d}.parquet"])
    dataset.run(dataset.DatasetConfig(num_files=1), shards.url + "{repo}/{file}")
    assert shards.requests == []
    with pytest.raises(InputError, match=r"shard_00001\.parquet"):
        dataset.run(dataset.DatasetConfig(num_files=2), shards.url + "{repo}/{file}")


# --- listing.json


def fetch_shards(shards: Server, n: int = 2) -> None:
    dataset.run(dataset.DatasetConfig(num_files=n), shards.url + "{repo}/{file}", backoff=0)


def flip(path: Path, at: int = 10) -> None:
    """Damage of equal size, behind a good footer."""
    raw = bytearray(path.read_bytes())
    raw[at] ^= 255
    path.write_bytes(raw)


def test_what_was_fetched_is_listed_with_size_and_hash(shards: Server, tmp_path: Path) -> None:
    fetch_shards(shards)
    listing = json.loads((tmp_path / "base" / "base_data_climbmix" / LISTING).read_text(encoding="utf-8"))
    wanted = {name: shards.files[name] for name in (f"shard_{i:05d}.parquet" for i in (0, 1, 6542))}
    assert listing == {n: {"bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for n, c in wanted.items()}
    fetch_shards(shards, 3)
    assert read_listing(tmp_path / "base" / "base_data_climbmix").keys() == {*wanted, "shard_00002.parquet"}


def test_run_again_it_names_and_fetches_what_is_damaged_or_gone_and_nothing_else(
    shards: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "base" / "base_data_climbmix"
    fetch_shards(shards, 3)
    flip(folder / "shard_00000.parquet")
    (folder / "shard_00001.parquet").unlink()
    shards.requests.clear()
    fetch_shards(shards, 3)
    assert sorted(name for name, _ in shards.requests) == ["shard_00000.parquet", "shard_00001.parquet"]
    for i in range(3):
        assert (folder / f"shard_{i:05d}.parquet").read_bytes() == shards.files[f"shard_{i:05d}.parquet"]
    out = capsys.readouterr().out
    assert "shard_00000.parquet is damaged (SHA-256 is " in out and "shard_00001.parquet is missing, though" in out


def test_a_file_from_before_there_was_a_listing_needs_the_hash_that_the_server_tells(
    server: Server, tmp_path: Path
) -> None:
    server.etag = hashlib.sha256(CONTENT).hexdigest()
    (tmp_path / "a.bin").write_bytes(CONTENT)
    flip(tmp_path / "a.bin")
    fetch(Job(server.url + "a.bin", tmp_path / "a.bin"))
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert (len(server.requests), server.asked) == (1, ["a.bin"])
    fetch(Job(server.url + "a.bin", tmp_path / "a.bin"))
    assert (len(server.requests), server.asked) == (1, ["a.bin"])  # the listing knows


def test_a_whole_file_without_a_listing_is_listed_also_where_no_server_answers(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(CONTENT)
    fetch(Job("http://127.0.0.1:9/a.bin", tmp_path / "a.bin"), backoff=0)
    assert read_listing(tmp_path)["a.bin"] == (len(CONTENT), hashlib.sha256(CONTENT).hexdigest())


def test_a_damaged_file_stays_until_its_replacement_is_whole(server: Server, tmp_path: Path) -> None:
    fetch(Job(server.url + "a.bin", tmp_path / "a.bin"))
    flip(tmp_path / "a.bin")
    damaged = (tmp_path / "a.bin").read_bytes()
    server.files.clear()
    with pytest.raises(InputError, match="404"):
        fetch(Job(server.url + "a.bin", tmp_path / "a.bin"), backoff=0)
    assert (tmp_path / "a.bin").read_bytes() == damaged


def test_another_version_on_the_server_is_refused_before_it_is_fetched(server: Server, tmp_path: Path) -> None:
    fetch(Job(server.url + "a.bin", tmp_path / "a.bin"))
    (tmp_path / "a.bin").unlink()
    server.files["a.bin"] = CONTENT[::-1]
    server.etag = hashlib.sha256(CONTENT[::-1]).hexdigest()
    with pytest.raises(InputError, match=r"a\.bin has another version now .*delete listing\.json"):
        fetch(Job(server.url + "a.bin", tmp_path / "a.bin"), backoff=0)
    assert names(tmp_path) == set()


def record_many(folder: Path, first: int) -> None:
    for i in range(first, first + 10):
        (folder / f"{i}.bin").write_bytes(b"x" * i)
        record(folder / f"{i}.bin", "0" * 64)


def test_no_process_loses_what_another_lists(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=record_many, args=(tmp_path, 10 * p)) for p in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert read_listing(tmp_path) == {f"{i}.bin": (i, "0" * 64) for i in range(30)}


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"a": 3}', b'{"a": {"bytes": 3}}', b"\xff"])
def test_a_damaged_listing_ends_in_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / LISTING).write_bytes(content)
    with pytest.raises(InputError, match=r"listing\.json is no listing .*; delete it") as caught:
        read_listing(tmp_path)
    assert "\n" not in str(caught.value)
