"""listing.json of a data folder: the size and the hash that each fetched file had, by which later damage is found."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock

from nanochat.config import InputError

LISTING = "listing.json"
CHUNK_BYTES = 1 << 20

# (path, bytes, mtime, sha256) of files that had their hash when this process looked: it looks once at each
_verified: set[tuple[Path, int, int, str]] = set()


class Listed(NamedTuple):
    num_bytes: int
    sha256: str  # hex


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file; other threads run meanwhile."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def lock_of(path: Path) -> FileLock:
    """The lock that processes take which write this file."""
    folder = path.parent / ".locks"
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / f"{path.name}.lock")


def read_listing(folder: Path) -> dict[str, Listed]:
    """What is listed by file name; empty where there is no listing."""
    path = folder / LISTING
    try:
        rows = json.loads(path.read_bytes())
        return {name: Listed(int(row["bytes"]), str(row["sha256"])) for name, row in rows.items()}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise InputError(
            f"{path} is no listing ({reason}); delete it, and python -m nanochat.dataset writes it again"
        ) from None


def record(path: Path, sha256: str) -> None:
    """Put a whole file into the listing beside it, safe against kills and other processes that do so too."""
    target = path.with_name(LISTING)
    entry = Listed(path.stat().st_size, sha256)
    with lock_of(target):
        listing = read_listing(path.parent)
        if listing.get(path.name) == entry:
            return
        listing[path.name] = entry
        rows = [
            f"{json.dumps(name)}: " + json.dumps({"bytes": n, "sha256": h}) for name, (n, h) in sorted(listing.items())
        ]
        part = target.with_name(LISTING + ".part")
        with part.open("w", encoding="utf-8") as file:
            file.write("{\n" + ",\n".join(rows) + "\n}\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)


def fault(path: Path, listed: Listed, with_hash: bool = True) -> str | None:
    """What is wrong with a file by its listing; None = nothing. Its hash is computed once a process (0.7 s a GB)."""
    try:
        stat = path.stat()
        if stat.st_size != listed.num_bytes:
            return f"{stat.st_size:,} bytes instead of {listed.num_bytes:,}"
        seen = (path, stat.st_size, stat.st_mtime_ns, listed.sha256)
        if with_hash and seen not in _verified:
            if (got := sha256_of(path)) != listed.sha256:
                return f"SHA-256 is {got[:12]}..., not {listed.sha256[:12]}..."
            _verified.add(seen)
    except FileNotFoundError:
        return "missing, though listed"
    except OSError as error:  # a bad sector
        return f"cannot be read: {error.strerror or error}"
    return None
