"""Downloads that may be interrupted at any point: resumed, verified, and under their name only when whole.

A file arrives as NAME.part and is renamed once its size, its hash (where the server tells one) and its
content are right; then listing.json gets its size and hash. A file that is there is verified by that listing, and
fetched again if it is damaged. A lock per file lets several processes fetch into one folder.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import requests
from filelock import Timeout
from tqdm import tqdm

from nanochat.config import InputError
from nanochat.data.listing import LISTING, lock_of, read_listing, record, sha256_of

HUB_URL = "https://huggingface.co/datasets/{repo}/resolve/main/{file}"
ATTEMPTS = 5  # in a row without a new byte; an attempt that got further starts the count again
BACKOFF_SECONDS = 2.0  # before attempt n: BACKOFF_SECONDS ** n
TIMEOUT_SECONDS = 30.0  # to connect, and between two reads
ASK_SECONDS = 5.0  # the same for a hash, which we can do without
CHUNK_BYTES = 1 << 16  # what a broken connection loses at most
RETRY_STATUS = (408, 425, 429, 500, 502, 503, 504)

Report = Callable[[int, int | None], None]  # (bytes received, or taken back if negative; size of the file if known)


class Interrupted(Exception):
    """Another download of the batch was stopped by the user, so this one stops too."""


class _Retry(Exception):
    """This attempt failed; the next may not."""


@dataclass(frozen=True)
class Job:
    """One file to fetch. `check` raises ValueError when the whole file is not what it should be."""

    url: str
    path: Path
    check: Callable[[Path], None] | None = None
    sha256: str | None = None  # hex; None = as listing.json or else the server tells, if they do


def check_parquet(path: Path) -> None:
    """Raises ValueError unless the file has a parquet footer."""
    try:
        with pq.ParquetFile(path):
            pass
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"no whole parquet file: {str(error).splitlines()[0][:200]}") from None


def _told_sha256(response: requests.Response) -> str | None:
    """The content's hash where the hub tells one: a 64-digit (linked) etag, also of a redirect."""
    for r in [*response.history, response]:
        for name in ("X-Linked-Etag", "ETag"):
            value = r.headers.get(name, "").removeprefix("W/").strip('"').lower()
            if re.fullmatch(r"[0-9a-f]{64}", value):
                return value
    return None


def _ask_sha256(url: str, timeout: float) -> str | None:
    """The hash that the server tells of a file that we have; None = it tells none, or does not answer."""
    try:
        with requests.head(url, allow_redirects=True, timeout=timeout) as response:
            return _told_sha256(response) if response.ok else None
    except requests.RequestException:
        return None


def _whole_size(response: requests.Response, start: int) -> int | None:
    """Bytes of the whole file, as the answer to a request from `start` on tells."""
    if response.status_code == 206:
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
        if match is None or int(match[1]) != start:
            raise _Retry(f"asked from byte {start} on, got {response.headers.get('Content-Range')!r}")
        return int(match[2])
    length = response.headers.get("Content-Length", "")
    return int(length) if length.isdigit() else None


def _attempt(job: Job, part: Path, report: Report, stop: threading.Event, timeout: float) -> str | None:
    """Bring `part` to its full size, going on where it ends; the hash that the server tells.

    Raises:
        _Retry: the connection broke, the server is busy, or the size is not what it said.
        InputError: the server will not give the file.
    """
    start = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    try:
        with requests.get(job.url, headers=headers, stream=True, timeout=timeout) as response:
            if response.status_code == 416:  # nothing after `start`: a part of another version, or whole already
                told = re.fullmatch(r"bytes \*/(\d+)", response.headers.get("Content-Range", ""))
                if told and int(told[1]) == start:
                    return _told_sha256(response)
                _discard(part, report)
                raise _Retry("the part on disk does not fit; starting again")
            if response.status_code in RETRY_STATUS:
                raise _Retry(f"the server answered {response.status_code}")
            if response.status_code not in (200, 206):
                raise InputError(f"{job.url} answered {response.status_code} {response.reason}; check the name")
            told_hash = _told_sha256(response)
            if job.sha256 and told_hash and told_hash != job.sha256.lower():
                raise InputError(
                    f"{job.url} has another version now (SHA-256 {told_hash[:12]}..., not {job.sha256[:12]}...); "
                    f"to take that of all files, delete {LISTING} in {part.parent}"
                )
            if start and response.status_code == 200:  # no ranges here
                _discard(part, report)
                start = 0
            size = _whole_size(response, start)
            report(0, size)
            with part.open("ab") as file:
                for chunk in response.iter_content(CHUNK_BYTES):
                    file.write(chunk)
                    report(len(chunk), None)
                    if stop.is_set():
                        raise Interrupted
    except requests.RequestException as error:
        raise _Retry(f"{type(error).__name__}: {str(error)[:200]}") from None
    got = part.stat().st_size
    if size is not None and got != size:
        raise _Retry(f"got {got:,} of {size:,} bytes")
    return told_hash


def _discard(part: Path, report: Report) -> None:
    report(-part.stat().st_size, None)
    part.unlink()


def _verify(job: Job, path: Path, told: str | None) -> str:
    """The hash of the content. Raises ValueError when it, or the content, is wrong."""
    got, expected = sha256_of(path), job.sha256 or told
    if expected is not None and got != expected.lower():
        raise ValueError(f"SHA-256 is {got[:12]}..., not {expected[:12]}...")
    if job.check is not None:
        job.check(path)
    return got


def fetch(
    job: Job,
    *,
    report: Report = lambda received, size: None,
    stop: threading.Event | None = None,
    timeout: float = TIMEOUT_SECONDS,
    backoff: float = BACKOFF_SECONDS,
) -> Path:
    """Fetch one file, unless it is there and right already. An interrupted download goes on where it ended.

    A damaged file is named in a printed line, and stays until the one that takes its place is whole. One that is not
    in listing.json yet has to have the hash that the server tells, if it does.

    Args:
        report: called with (bytes received, file size if known) as they come.
        stop: ends the download between two chunks, with Interrupted.
        backoff: seconds of wait are backoff ** failures; 0 = none.

    Raises:
        InputError: the server does not have it, gives up five times in a row, or gives wrong content twice; the
            folder cannot be written into.
    """
    path = job.path
    stop = stop or threading.Event()
    with _system_errors(path), _locked(path, stop):
        listed = read_listing(path.parent).get(path.name)
        if job.sha256 is None and listed is not None:
            job = replace(job, sha256=listed.sha256)
        digest = None
        if path.exists():
            try:
                digest = _verify(job, path, None if job.sha256 else _ask_sha256(job.url, ASK_SECONDS))
            except (ValueError, OSError) as error:  # OSError: a bad sector
                print(f"{path} is damaged ({error}); fetching it again", flush=True)
        elif listed is not None:
            print(f"{path} is missing, though listed; fetching it again", flush=True)
        record(path, digest or _download(job, report, stop, timeout, backoff))
    return path


def _download(job: Job, report: Report, stop: threading.Event, timeout: float, backoff: float) -> str:
    """Bring the file under its name, as often as it takes; its hash."""
    path, part = job.path, job.path.with_name(job.path.name + ".part")
    report(part.stat().st_size if part.exists() else 0, None)
    failures = mismatches = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            told = _attempt(job, part, report, stop, timeout)
            digest = _verify(job, part, told)
            _finish(part, path)
            return digest
        except _Retry as error:
            grew = part.exists() and part.stat().st_size > before
            failures = 1 if grew else failures + 1
            reason = str(error)
        except ValueError as error:
            if isinstance(error, InputError):
                raise
            _discard(part, report)  # wrong bytes cannot be built upon
            mismatches += 1
            reason = str(error)
        if failures >= ATTEMPTS or mismatches >= 2:
            raise InputError(f"cannot fetch {job.url}: {reason}; run again to go on")
        if stop.wait(backoff ** (failures + mismatches) if backoff else 0):
            raise Interrupted


@contextmanager
def _system_errors(path: Path) -> Iterator[None]:
    """What the disk says against writing a file, as a line of ours."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise InputError(f"the disk of {path.parent} is full; free some space and run again") from None
        raise InputError(f"cannot write {path}: {error.strerror or error}; see to {path.parent}") from None


@contextmanager
def _locked(path: Path, stop: threading.Event) -> Iterator[None]:
    """Hold the lock of a file, waiting for other processes as long as it takes or until `stop`."""
    lock = lock_of(path)
    while not lock.is_locked:
        try:
            lock.acquire(timeout=1)
        except Timeout:
            if stop.is_set():
                raise Interrupted from None
    try:
        yield
    finally:
        lock.release()


def _finish(part: Path, path: Path) -> None:
    with part.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(part, path)


class _Progress:
    """One bar for all files: bytes, rate and ETA; the total is extrapolated from the sizes known so far."""

    def __init__(self, num_files: int, disable: bool) -> None:
        is_terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=0,
            unit="B",
            unit_scale=True,
            desc=f"{num_files} files",
            disable=disable,
            mininterval=0.5 if is_terminal else 30,  # a log file wants a line now and then
        )
        self._num_files = num_files
        self._sizes: dict[Path, int] = {}
        self._lock = threading.Lock()

    def of(self, path: Path) -> Report:
        def report(received: int, size: int | None) -> None:
            with self._lock:
                if size is not None:
                    self._sizes[path] = size
                    mean = sum(self._sizes.values()) / len(self._sizes)
                    self._bar.total = round(mean * self._num_files)
                self._bar.update(received)

        return report

    def close(self) -> None:
        self._bar.close()


def fetch_all(
    jobs: Sequence[Job], workers: int = 4, *, backoff: float = BACKOFF_SECONDS, quiet: bool = False
) -> Mapping[Path, str]:
    """Fetch many files side by side; returns why each failed one did. One failure stops no other file.

    Ctrl-C stops all at the next chunk; what has arrived stays as .part files for the next time.
    """
    stop = threading.Event()
    progress = _Progress(len(jobs), disable=quiet)
    failed: dict[Path, str] = {}
    executor = ThreadPoolExecutor(max_workers=workers)
    try:
        futures = [
            executor.submit(fetch, job, report=progress.of(job.path), stop=stop, backoff=backoff) for job in jobs
        ]
        for job, future in zip(jobs, futures, strict=True):
            try:
                future.result()
            except InputError as error:
                failed[job.path] = str(error)
    finally:
        stop.set()  # no effect once all are done
        executor.shutdown(wait=True, cancel_futures=True)
        progress.close()
    return failed
