"""Curves that the stages log, and their pictures in the report."""

import math
import re
import sys
from pathlib import Path

import pytest

from nanochat import curves, report
from nanochat.report import get_report


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "base"


def test_a_resumed_stage_replaces_the_points_after_its_checkpoint(base):
    for step, loss in [(1, 9.0), (2, 8.0), (3, 7.0), (2, 5.0)]:
        curves.log_curve("base", step, loss=loss)
    curves.log_curve("base", 2, val_bpb=1.5)
    path = base / "report" / "curves" / "base.jsonl"
    with path.open("a") as f:
        f.write('{"step": 3, "lo')  # a crash in the middle of a line
    assert curves.read_curve(path) == [{"step": 1, "loss": 9.0}, {"step": 2, "loss": 5.0, "val_bpb": 1.5}]


def test_plots_are_linked_from_both_reports(base):
    for step in range(30):
        curves.log_curve("base", step, loss=9.0 - step / 10, lrm=1.0)
    curves.log_curve("base", 30, loss=math.nan)
    get_report().log("Chat evaluation sft", [{"GSM8K": 0.5}])
    get_report().generate()
    for markdown in (Path("report.md"), base / "report" / "report.md"):
        links = re.findall(r"!\[.*\]\((.*)\)", markdown.read_text())
        assert [Path(link).name for link in links] == ["base_loss.png", "base_lr.png", "scores.png"]
        for link in links:
            assert (markdown.parent / link).read_bytes().startswith(b"\x89PNG")


def test_a_report_is_written_where_there_is_no_matplotlib_and_says_that_plots_are_missing(base, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # its import then fails
    monkeypatch.delitem(sys.modules, "nanochat.plots", raising=False)
    curves.log_curve("base", 1, loss=9.0)
    get_report().log("Chat SFT", [{"Training rows": 3}])
    report.main(["generate"])
    said = [line for line in capsys.readouterr().out.splitlines() if "Plots are missing" in line]
    assert len(said) == 1 and "install matplotlib" in said[0]
    for path in (Path("report.md"), base / "report" / "report.md"):
        text = path.read_text()
        assert "- Training rows: 3" in text and said[0].removeprefix("warning: ") in text.splitlines()
    assert not (base / "report" / "plots").exists()


def test_all_that_reinforcement_learning_logs_is_drawn_with_units_and_legends(base, monkeypatch):
    from matplotlib.colors import to_hex

    from nanochat import plots

    drawn = {}
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.setdefault(path.stem, figure.axes[0]) and path)
    for step in (0, 4):
        passes = {f"pass_at_{k}": k / 100 for k in (16, 1, 2, 4, 8)}
        curves.log_curve("rl", step, reward=0.5, val_reward=0.4, sequence_length=90, answer_length=40, **passes)
    paths = plots.draw_all(base / "report" / "curves", {}, base / "plots")
    assert [p.stem for p in paths] == ["rl_reward", "rl_length", "rl_pass"]
    labels = {name: [line.get_label() for line in ax.get_lines()] for name, ax in drawn.items()}
    assert labels["rl_reward"] == ["training", "validation"]
    assert labels["rl_length"] == ["answer", "prompt and answer"]
    assert labels["rl_pass"] == ["pass@1", "pass@2", "pass@4", "pass@8", "pass@16"]
    assert len({to_hex(line.get_color()) for line in drawn["rl_pass"].get_lines()}) == 5
    for ax in drawn.values():
        assert ax.get_legend() and ax.get_xlabel() == "optimizer step" and ax.get_ylabel()


def test_the_smoothed_curve_keeps_a_trend_in_its_place_and_averages_noise():
    from nanochat.plots import smooth

    assert smooth([3.0] * 50) == pytest.approx([3.0] * 50)
    falling = [float(100 - i) for i in range(100)]
    assert smooth(falling)[:-5] == pytest.approx(falling[:-5])
    assert smooth([0.0, 1.0, 5.0]) == pytest.approx([0.0, 2.0, 2.0])
    assert max(smooth([(-1.0) ** i for i in range(1000)])[25:-25]) < 0.03
