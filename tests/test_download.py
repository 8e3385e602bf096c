"""Downloads against a server on this machine that behaves as badly as real ones do."""

from __future__ import annotations

import hashlib
import http.server
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat import dataset
from nanochat.config import InputError
from nanochat.data import download
from nanochat.data.download import Job, check_parquet, fetch, fetch_all

CONTENT = bytes(range(256)) * 4096  # 1 MiB


@dataclass
class Server:
    """What the server has, how it misbehaves, and what it was asked."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)  # one is used up by each request
    etag: str | None = None
    has_ranges: bool = True
    requests: list[tuple[str, str | None]] = field(default_factory=list)  # (name, Range)


def handler_of(state: Server) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            name, asked = self.path.rsplit("/", 1)[-1], self.headers.get("Range")
            state.requests.append((name, asked))
            fault = state.faults.pop(0) if state.faults else ""
            content = state.files.get(name)
            if content is None or fault.isdigit():
                self.send_error(int(fault) if fault else 404)
                return
            if fault == "garbage":
                content = b"x" * len(content)
            start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and state.has_ranges else 0
            if start >= len(content) > 0:
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.end_headers()
                return
            self.send_response(206 if start else 200)
            if start:
                told = start - 10 if fault == "wrong range" else start
                self.send_header("Content-Range", f"bytes {told}-{len(content) - 1}/{len(content)}")
            if fault != "no length":
                self.send_header("Content-Length", str(len(content) - start))
            if state.etag:
                self.send_header("X-Linked-Etag", f'"{state.etag}"')
            self.end_headers()
            body = content[start:]
            self.wfile.write(body[:65536] if fault == "break" else body)

    return Handler


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler_of(state)) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        state.url = f"http://127.0.0.1:{httpd.server_address[1]}/"
        state.files["a.bin"] = CONTENT
        yield state
        httpd.shutdown()
        thread.join()


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir() if p.name != ".locks"}


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
    with pytest.raises(InputError, match=r"2 of 6 shards are missing: shard_00003\.parquet, shard_00004\.parquet"):
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
