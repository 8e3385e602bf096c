"""runs/launch.py: what a user sees of wrong input on several ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

WRONG = """
import sys
from dataclasses import dataclass
from nanochat import runtime
from nanochat.config import InputError, run_cli

@dataclass(frozen=True)
class Config:
    pass

def run(cfg):
    rt = runtime.start("cpu")
    if sys.argv[1] == "all" or rt.rank == 2:
        raise InputError("no such number of ranks; try 2")
    runtime.barrier()

run_cli(Config, run, [])
"""


def launched(folder: Path, *words: str) -> tuple[int, list[str], str]:
    """(exit code, the lines of our errors, all of stderr) of three ranks."""
    (folder / "wrong.py").write_text(WRONG)
    launch = [sys.executable, str(ROOT / "runs" / "launch.py"), "--standalone", "--nproc_per_node=3"]
    done = subprocess.run(
        [*launch, str(folder / "wrong.py"), *words],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode, [line for line in done.stderr.splitlines() if line.startswith("error: ")], done.stderr


def test_an_error_that_all_ranks_have_is_said_once_and_without_torchruns_table(tmp_path):
    code, errors, everything = launched(tmp_path, "all")
    assert code == 2
    assert errors == ["error: rank 0: no such number of ranks; try 2"]
    assert "FAILED" not in everything and "Root Cause" not in everything


def test_an_error_of_one_rank_is_said_by_that_rank(tmp_path):
    code, errors, everything = launched(tmp_path, "one")
    assert code == 2
    assert errors[0] == "error: rank 2: no such number of ranks; try 2"
    assert "FAILED" not in everything
