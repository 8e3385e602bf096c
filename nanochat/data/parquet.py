"""Parquet files of text: one row group at a time, and what is said when that cannot be done."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.config import InputError

TAIL_BYTES = 1 << 16


class Damaged(InputError):
    """A file that cannot be used as it is; `reason` is what is wrong with it."""

    def __init__(self, path: Path, reason: str, way_out: str) -> None:
        super().__init__(f"{path} is damaged ({reason}); {way_out}")
        self.reason = reason


def _undecodable(path: Path, error: Exception, refetch: str) -> Damaged:
    return Damaged(path, str(error).splitlines()[0][:200], f"delete it and {refetch}")


def row_groups(path: Path, refetch: str = "fetch it again") -> int:
    """The number of row groups, from the footer.

    Raises:
        InputError: the footer cannot be read (Damaged), or there is no string column `text`.
    """
    try:
        with pq.ParquetFile(path) as file:
            schema, n = file.schema_arrow, file.num_row_groups
    except (pa.ArrowException, OSError) as error:
        raise _undecodable(path, error, refetch) from None
    if "text" not in schema.names:
        raise InputError(f"{path} has no column 'text' (it has {', '.join(schema.names)}); rename the text column")
    kind = schema.field("text").type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise InputError(f"column 'text' of {path} holds {kind}, not strings; convert it")
    return n


def num_rows(path: Path) -> int:
    """The number of documents, empty ones too, of a file whose footer is good."""
    return int(pq.read_metadata(path).num_rows)


def read_row_group(path: Path, group: int, refetch: str = "fetch it again") -> list[str]:
    """The documents of one row group; empty ones are left out."""
    try:
        # opened each time: a footer costs about a millisecond, and no state is shared between threads
        with pq.ParquetFile(path) as file:
            column = file.read_row_group(group, columns=["text"], use_threads=False).column("text")
            return [text for text in column.to_pylist() if text]
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _undecodable(path, error, refetch) from None


def tail_hash(path: Path) -> str:
    """sha256 (hex) of the footer and what lies before it, 64 KiB or more in all; of a smaller file, all of it.

    Other text is seen by it: the footer has the compressed size of each row group and its first and last text.
    """
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 8))
        footer = int.from_bytes(file.read(4), "little") + 8
        file.seek(max(0, size - max(footer, TAIL_BYTES)))
        return hashlib.sha256(file.read()).hexdigest()
