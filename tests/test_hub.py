"""Task data: where it is looked for, in which order its rows come, and what is said when it is nowhere."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat.config import InputError
from nanochat.data import hub

REAL = Path(__file__).parents[1] / "../shared/hub"


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setenv("NANOCHAT_HUB_DIR", str(tmp_path / "hub"))
    folder = tmp_path / "hub" / "datasets" / "me" / "quiz"
    folder.mkdir(parents=True)
    return folder


def write(path: Path, numbers: list[int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"n": n, "choices": ["x", "y"], "answer": {"text": f"é{n}"}} for n in numbers]
    pq.write_table(pa.Table.from_pylist(rows), path)


def test_rows_are_dicts_in_the_order_of_the_files(mirror: Path) -> None:
    write(mirror / "main" / "train-00001-of-00002.parquet", [3, 4])
    write(mirror / "main" / "train-00000-of-00002.parquet", [0, 1, 2])
    write(mirror / "main" / "test-00000-of-00001.parquet", [9])
    rows = hub.load_rows("me/quiz", "main", "train")
    assert len(rows) == 5
    assert [row["n"] for row in rows] == [rows[i]["n"] for i in range(5)] == [0, 1, 2, 3, 4]
    assert rows[-1] == {"n": 4, "choices": ["x", "y"], "answer": {"text": "é4"}}
    assert [row["n"] for row in rows[1:3]] == [1, 2]
    with pytest.raises(IndexError):
        rows[5]


def test_the_default_configuration_may_lie_in_data(mirror: Path) -> None:
    write(mirror / "data" / "test-00000-of-00001.parquet", [7])
    assert hub.load_rows("me/quiz", "default", "test")[0]["n"] == 7


def test_the_mirror_goes_before_the_base_dir(mirror: Path, tmp_path: Path) -> None:
    write(tmp_path / "base" / "task_data" / "me--quiz" / "main" / "train" / "00000.parquet", [1])
    assert hub.load_rows("me/quiz", "main", "train")[0]["n"] == 1
    write(mirror / "main" / "train-00000-of-00001.parquet", [2])
    assert hub.load_rows("me/quiz", "main", "train")[0]["n"] == 2


def test_half_a_split_is_refused(mirror: Path) -> None:
    write(mirror / "main" / "train-00000-of-00002.parquet", [0])
    with pytest.raises(InputError, match="has 1 of 2 files of split train"):
        hub.load_rows("me/quiz", "main", "train")


def test_a_damaged_file_is_named(mirror: Path) -> None:
    (mirror / "main").mkdir()
    (mirror / "main" / "train-00000-of-00001.parquet").write_bytes(b"PAR1 not really PAR1")
    with pytest.raises(InputError, match=r"train-00000-of-00001.parquet is damaged .*delete it"):
        hub.load_rows("me/quiz", "main", "train")


def test_has_tells_whether_a_copy_is_on_disk(mirror: Path) -> None:
    assert not hub.has("me/quiz") and not hub.has("you/quiz")
    write(mirror / "main" / "train-00000-of-00001.parquet", [0])
    assert hub.has("me/quiz")


def fake_datasets(monkeypatch: pytest.MonkeyPatch, load: object) -> None:
    module = types.ModuleType("datasets")
    module.load_dataset = load  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_what_is_not_on_disk_comes_from_the_network(mirror: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_datasets(monkeypatch, lambda repo, config, split: [{"asked": (repo, config, split)}])
    assert hub.load_rows("me/quiz", "main", "dev") == [{"asked": ("me/quiz", "main", "dev")}]


def test_without_a_network_the_way_out_is_one_line(mirror: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: object, **kwargs: object) -> object:
        raise ConnectionError("cannot reach\nthe hub")

    fake_datasets(monkeypatch, load)
    with pytest.raises(InputError, match=r"cannot load me/quiz \(main, dev\): .*set NANOCHAT_HUB_DIR") as caught:
        hub.load_rows("me/quiz", "main", "dev")
    assert "\n" not in str(caught.value)


def test_the_shuffled_order_is_that_of_the_hub_library(monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub.shuffled_order(8).tolist() == np.random.Generator(np.random.PCG64(42)).permutation(8).tolist()
    assert hub.shuffled_order(5).tolist() == [4, 2, 3, 1, 0]


def test_the_shuffled_order_is_that_of_the_library_itself() -> None:
    datasets = pytest.importorskip("datasets")
    for n in (1, 7, 1000):
        shuffled = datasets.Dataset.from_dict({"n": list(range(n))}).shuffle(seed=42)
        assert shuffled["n"][:] == hub.shuffled_order(n).tolist()


@pytest.mark.skipif(not (REAL / "datasets").is_dir(), reason="the local hub mirror is not here")
@pytest.mark.parametrize(
    ("repo", "config", "split", "n"),
    [
        ("openai/gsm8k", "main", "test", 1319),
        ("allenai/ai2_arc", "ARC-Easy", "validation", 570),
        ("cais/mmlu", "all", "dev", 285),
        ("deepmind/aqua_rat", "raw", "test", 254),
        ("openai/openai_humaneval", "openai_humaneval", "test", 164),
        ("local/instruct-small", "default", "test", 1339),
    ],
)
def test_the_real_sets_have_their_published_sizes(
    repo: str, config: str, split: str, n: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setenv("NANOCHAT_HUB_DIR", str(REAL))
    assert len(hub.load_rows(repo, config, split)) == n
