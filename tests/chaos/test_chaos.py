"""The short form of the chaos test, and that the harness sees what it is there for."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanochat import checkpoint
from nanochat.config import InputError
from nanochat.optim import build_optimizer
from tests.chaos.checks import differences, good, is_good
from tests.chaos.faults import Disk, damage, litter
from tests.conftest import tiny_gpt

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, process groups and timers of Linux")
ROOT = Path(__file__).parents[2]
SECONDS = 900  # a hang, even where many share the machine; it takes one on two idle cores
LIVES = 40


def chaos(*flags: str, sabotage: str = "") -> tuple[int, str]:
    """(exit code, output) of the command, with code of the product replaced first; nothing is left running."""
    program = f"import os, sys\nfrom tests.chaos import __main__\n{sabotage}\nsys.exit(__main__.main(sys.argv[1:]))"
    started = subprocess.Popen(
        [sys.executable, "-c", program, *flags],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        out, _ = started.communicate(timeout=SECONDS)
    finally:
        if started.poll() is None:
            os.killpg(started.pid, signal.SIGKILL)  # its lives, in groups of their own, die with it
            started.wait()
    return started.returncode, out


def test_a_run_that_is_broken_again_and_again_ends_as_one_that_nobody_disturbed(tmp_path):
    code, out = chaos(f"--lives={LIVES}", f"--dir={tmp_path / 'chaos'}", "--jobs=2")
    assert code == 0, out
    assert "| steps lost | 0 |" in out and "| corrupt loads | 0 |" in out


SABOTAGE = {
    "nothing is synced": "from nanochat import checkpoint; checkpoint._fsync = lambda path: None",
    "the newest is taken unseen": (
        "from nanochat import checkpoint, resume; load = checkpoint.load\n"
        "resume.checkpoint.load = lambda path, with_optimizer=False, verify=True: load(path, with_optimizer, False)"
    ),
    "the cursor is forgotten": (
        "from nanochat.data import loader as m; init = m.PackingLoader.__init__\n"
        "def forgetful(self, *args, cursor=None, **kw): init(self, *args, cursor=None, **kw)\n"
        "m.PackingLoader.__init__ = forgetful"
    ),
    "momentum is forgotten": (
        "from nanochat.optim import MuonAdamW as M; load = M.load_state_dict\n"
        "M.load_state_dict = lambda self, s: load(self, {k: v * ('momentum' not in k) for k, v in s.items()})"
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", SABOTAGE)
def test_the_harness_notices_when(what, tmp_path):
    code, out = chaos("--lives=60", f"--dir={tmp_path / 'chaos'}", sabotage=SABOTAGE[what])
    assert code == 1 and "FAILED (seed 0)" in out, out


def saved(directory: Path, step: int = 3) -> Path:
    model = tiny_gpt()
    optimizer = build_optimizer(model, unembedding_lr=0.004, embedding_lr=0.2, matrix_lr=0.02)
    idx = torch.arange(8)[None]
    model(idx, idx).backward()
    optimizer.step()
    meta = {"loop_state": {"step": step, "train_seconds": 1.0}, "loader_cursor": {"row": 5}}
    return checkpoint.write(directory, step, checkpoint.host_copy(model.state_dict()), optimizer.state_dict(), meta)


def test_whatever_is_damaged_neither_the_harness_nor_the_product_calls_good(tmp_path):
    kinds = set()
    for seed in range(24):
        path = saved(tmp_path / str(seed))
        assert is_good(path) and good(path.parent) == {3: path}
        kinds.add(damage(path, random.Random(seed)).split(":")[0])
        assert not is_good(path) and good(path.parent) == {}
        with pytest.raises(InputError):
            checkpoint.load(path, with_optimizer=True)
    assert len(kinds) == 6


@pytest.mark.parametrize("seed", range(6))
def test_litter_is_no_checkpoint_to_either(tmp_path, seed):
    path = saved(tmp_path)
    litter(tmp_path, path, random.Random(seed))
    assert good(tmp_path) == {3: path} and checkpoint.steps(tmp_path) == [3]


def test_checkpoints_differ_by_a_bit_of_a_tensor_or_by_the_cursor_but_not_by_the_clock(tmp_path):
    ours, theirs = saved(tmp_path / "a"), saved(tmp_path / "b")
    assert differences(ours, theirs) == []
    text = (theirs / "manifest.json").read_text()
    (theirs / "manifest.json").write_text(text.replace('"train_seconds": 1.0', '"train_seconds": 2.0'))
    assert differences(ours, theirs) == []
    (theirs / "manifest.json").write_text(text.replace('"row": 5', '"row": 6'))
    assert differences(ours, theirs) == ["loader_cursor.row: 5 and 6"]
    (theirs / "manifest.json").write_text(text)
    file = theirs / "model.safetensors"
    weights = load_file(file)
    weights["lm_head.weight"][0, 0] += 1e-6
    save_file(weights, file)
    manifest = json.loads(text)
    manifest["files"]["model.safetensors"]["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    (theirs / "manifest.json").write_text(json.dumps(manifest))
    assert differences(ours, theirs) == ["weights lm_head.weight"]


def write(path: Path, content: bytes, sync: bool) -> Path:
    with path.open("wb") as f:
        f.write(content)
        f.flush()
        if sync:
            os.fsync(f.fileno())
    return path


def test_a_power_cut_spares_what_was_there_before_and_what_was_synced(tmp_path, monkeypatch):
    before = write(tmp_path / "before", b"b" * 1000, sync=False)
    disk, fsync = Disk(tmp_path, random.Random(0)), os.fsync

    def watched(fd: int) -> None:
        fsync(fd)
        disk.synced(fd)

    monkeypatch.setattr(os, "fsync", watched)
    synced = write(tmp_path / "synced", b"s" * 1000, sync=True)
    loose = write(tmp_path / "loose", b"l" * 1000, sync=False)
    disk.cut_power()
    assert [p.stat().st_size for p in (before, synced)] == [1000, 1000]
    assert loose.stat().st_size < 1000


def test_a_power_cut_takes_renames_back_from_the_last_one_on_unless_their_directory_was_synced(tmp_path):
    outcomes = set()
    for seed in range(20):
        root = tmp_path / str(seed)
        root.mkdir()
        disk = Disk(root, random.Random(seed))
        for name in ("first", "second", "third"):
            (root / name).write_bytes(b"")
        for name in ("first", "second", "third"):
            os.rename(root / name, root / f"{name}.new")
            disk.renamed(root / name, root / f"{name}.new")
            if name == "first":
                fd = os.open(root, os.O_RDONLY)
                disk.synced(fd)
                os.close(fd)
        disk.cut_power()
        outcomes.add(" ".join(sorted(p.name for p in root.iterdir())))
    assert outcomes == {
        "first.new second third",
        "first.new second.new third",
        "first.new second.new third.new",
    }
