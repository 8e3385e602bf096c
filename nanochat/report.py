"""The training report: every stage logs one section, `generate` joins them into report.md.

    python -m nanochat.report reset      # before the first stage: header with git, hardware and source size
    python -m nanochat.report generate   # after the last one

Lives in <base>/report; report.md is copied to the current directory too.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from nanochat.config import InputError
from nanochat.environment import base_dir, is_master
from nanochat.report_header import format_header
from nanochat.report_scores import format_scores

TIME_FORMAT = "%Y-%m-%d %H:%M:%S"
SECTIONS = (
    "tokenizer-training",
    "tokenizer-evaluation",
    "base-model-training",
    "base-model-loss",
    "base-model-evaluation",
    "midtraining",
    "chat-evaluation-mid",
    "chat-sft",
    "chat-evaluation-sft",
    "chat-rl",
    "chat-evaluation-rl",
)
RL_SECTIONS = ("chat-rl", "chat-evaluation-rl")
NOT_SECTIONS = ("header", "report", "rollouts")
ROLLOUTS = "rollouts.md"  # a page of its own, which chat_rl writes and its section links
COLUMNS = {
    "BASE": "base-model-evaluation",
    "MID": "chat-evaluation-mid",
    "SFT": "chat-evaluation-sft",
    "RL": "chat-evaluation-rl",
}
# Rows of the Summary: report key -> row. The reference's own rows, and those that only our runs add.
CHAT_ROWS = {k: k for k in ("ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K", "HumanEval")}
REFERENCE_ROWS: dict[str, dict[str, str]] = {
    "BASE": {"CORE metric": "CORE"},
    "MID": {**CHAT_ROWS, "ChatCORE metric": "ChatCORE"},
    "SFT": {**CHAT_ROWS, "ChatCORE metric": "ChatCORE"},
    "RL": {"GSM8K": "GSM8K"},
}
TINYWORLD_TASKS = ("TinyFacts", "TinySums", "TinyWordProblems", "TinySpelling", "TinyMC")
OUR_CHAT_ROWS = {
    **REFERENCE_ROWS["SFT"],
    **{k: k for k in ("AQUA", "SpellingBee", *TINYWORLD_TASKS, "ChatCORE tinyworld")},
}
OUR_ROWS: dict[str, dict[str, str]] = {
    "BASE": {"CORE metric": "CORE", "CORE tinyworld": "CORE tinyworld"},
    "MID": OUR_CHAT_ROWS,
    "SFT": OUR_CHAT_ROWS,
    "RL": OUR_CHAT_ROWS,
}
PARTIAL_CORE = re.compile(r"CORE metric \((\d+ of \d+) tasks\)")


def slugify(section: str) -> str:
    return section.lower().replace(" ", "-")


def write_atomically(path: Path, text: str) -> None:
    """The file is the old one or the new one, never half of it. UTF-8, newlines as given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(text.encode("utf-8", errors="replace"))
    os.replace(temporary, path)


def format_value(value: Any) -> str:
    """Floats with 4 decimals, integers from 10,000 on with commas, newlines escaped: an item is one line."""
    if isinstance(value, float):
        return f"{value:.4f}"
    if isinstance(value, int) and value >= 10000:
        return f"{value:,}"
    return str(value).replace("\r", "\\r").replace("\n", "\\n")


def format_section(section: str, timestamp: str, items: Sequence[str | Mapping[str, Any] | None]) -> str:
    """Strings stand as they are, dicts become `- key: value` lines, what is empty is left out."""
    parts = [f"## {section}\ntimestamp: {timestamp}\n\n"]
    for item in items:
        if not item:
            continue
        if isinstance(item, str):
            parts.append(item if item.endswith("\n") else item + "\n")
        else:
            parts.extend(f"- {key}: {format_value(value)}\n" for key, value in item.items())
    return "".join(parts) + "\n"


def parse_items(text: str) -> dict[str, str]:
    """The `- key: value` lines of a section; the key ends at the first `: `."""
    pairs = (line[2:].split(": ", 1) for line in text.splitlines() if line.startswith("- ") and ": " in line)
    return {key: value.strip() for key, value in pairs}


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _find(pattern: str, text: str) -> str | None:
    match = re.search(pattern, text, re.MULTILINE)
    return match.group(1) if match else None


def _time_after(label: str, text: str) -> datetime | None:
    found = _find(rf"^{label}: (\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d)$", text)
    return datetime.strptime(found, TIME_FORMAT) if found else None


def summary_rows(sections: Mapping[str, str], ours: bool) -> dict[str, dict[str, str]]:
    """Summary table: row -> column -> value. Only whole keys with a number count, so neither
    `task_name: GSM8K` nor `CORE tinyworld` can pass for a score of that name."""
    rows: dict[str, dict[str, str]] = {}
    wanted = OUR_ROWS if ours else REFERENCE_ROWS
    for column, slug in COLUMNS.items():
        for key, value in parse_items(sections.get(slug, "")).items():
            row = wanted[column].get(key)
            partial = PARTIAL_CORE.fullmatch(key)
            if ours and partial and column == "BASE":
                row = f"CORE ({partial.group(1)})"
            if row and is_number(value):
                rows.setdefault(row, {})[column] = value
    if ours and is_number(bpb := parse_items(sections.get("base-model-loss", "")).get("val bpb", "")):
        rows["val bpb"] = {"BASE": bpb}
    rank = {"val bpb": 0, "CORE": 1, "ChatCORE": 4, "ChatCORE tinyworld": 5}
    return dict(sorted(rows.items(), key=lambda r: (rank.get(r[0], 2 if r[0].startswith("CORE ") else 3), r[0])))


def format_table(rows: Mapping[str, Mapping[str, str]]) -> str:
    width = max(15, *map(len, rows)) if rows else 15
    lines = [
        f"| {'Metric':<{width}} | " + " | ".join(f"{c:<8}" for c in COLUMNS) + " |",
        f"|{'-' * (width + 2)}|" + "|".join("-" * 10 for _ in COLUMNS) + "|",
    ]
    for name, values in rows.items():
        lines.append(f"| {name:<{width}} | " + " | ".join(f"{values.get(c, '-'):<8}" for c in COLUMNS) + " |")
    return "\n".join(lines) + "\n"


def format_duration(duration: timedelta) -> str:
    minutes = int(duration.total_seconds()) // 60
    return f"{minutes // 60}h{minutes % 60}m"


def wall_clock(header: str, sections: Mapping[str, str], with_rl: bool) -> timedelta | None:
    """From the run's start to its latest section. The reference's figure leaves RL out."""
    start = _time_after("Run started", header)
    ends = [_time_after("timestamp", text) for slug, text in sections.items() if with_rl or slug not in RL_SECTIONS]
    known = [end for end in ends if end is not None]
    return max(known) - start if start and known else None


def format_summary(header: str, sections: Mapping[str, str], ours: bool) -> str:
    bloat = re.search(r"^### Bloat\n(.*?)\n\n", header, re.MULTILINE | re.DOTALL)
    text = "## Summary\n\n" + (bloat.group(1) if bloat else "[bloat not measured: no header]") + "\n\n"
    text += format_table(summary_rows(sections, ours)) + "\n"
    main = wall_clock(header, sections, with_rl=False)
    text += f"Total wall clock time: {format_duration(main) if main is not None else 'unknown'}\n"
    if not ours:
        return text
    total = wall_clock(header, sections, with_rl=True)
    if total is not None and "chat-rl" in sections:
        text += f"\nTotal wall clock time including RL: {format_duration(total)}\n"
    rate = _find(r"^- Hourly Rate: \$([\d.]+)/hour$", header)
    if total is not None and rate:
        dollars = float(rate) * total.total_seconds() / 3600
        text += f"\nCost at ${rate}/hour: ${dollars:.2f}\n"
    chat = {column: slug for column, slug in COLUMNS.items() if column != "BASE"}
    return text + format_scores({column: parse_items(sections.get(slug, "")) for column, slug in chat.items()})


class Report:
    """Sections in `report_dir`, joined by generate().

    Args:
        report_dir: holds header.md, one file a section, curves/, plots/ and report.md.
        copy_to: where generate() puts a second report.md; its plots go to report/plots beside it.
        clock: the time, for the timestamps.
    """

    def __init__(
        self,
        report_dir: str | Path,
        copy_to: str | Path | None = None,
        clock: Callable[[], datetime] = datetime.now,
    ) -> None:
        self.report_dir = Path(report_dir)
        self.copy_to = Path(copy_to) if copy_to is not None else None
        self.clock = clock

    def _now(self) -> str:
        return self.clock().strftime(TIME_FORMAT)

    def log(self, section: str, data: Sequence[str | Mapping[str, Any] | None]) -> Path:
        """Write a section over its previous version.

        Args:
            data: strings (verbatim) and dicts (`- key: value` lines); falsy items are skipped.
        """
        path = self.report_dir / f"{slugify(section)}.md"
        write_atomically(path, format_section(section, self._now(), data))
        return path

    def _section_paths(self) -> dict[str, Path]:
        """Section files by slug: the reference's in its order, then any others by name."""
        found = {p.stem: p for p in sorted(self.report_dir.glob("*.md")) if p.stem not in NOT_SECTIONS}
        found = {s: p for s, p in found.items() if p.read_text(encoding="utf-8").startswith("## ")}
        order = [s for s in SECTIONS if s in found] + [s for s in found if s not in SECTIONS]
        return {slug: found[slug] for slug in order}

    def sections(self) -> dict[str, str]:
        """The text of each section that has been logged, by slug."""
        return {slug: path.read_bytes().decode("utf-8") for slug, path in self._section_paths().items()}

    def reset(self) -> None:
        """Start a new run: drop the old run's sections, curves and plots, write the header."""
        self.report_dir.mkdir(parents=True, exist_ok=True)
        for path in self._section_paths().values():
            path.unlink()
        for name in ("report.md", ROLLOUTS):
            (self.report_dir / name).unlink(missing_ok=True)
        if self.copy_to is not None:
            self.copy_to.unlink(missing_ok=True)
        for folder in ("curves", "plots"):
            shutil.rmtree(self.report_dir / folder, ignore_errors=True)
        header = format_header(self._now())
        started = self._now()
        write_atomically(self.report_dir / "header.md", f"{header}Run started: {started}\n\n---\n\n")
        # marks the run as ours: the Summary then says more than the reference's
        write_atomically(self.report_dir / "run.json", json.dumps({"started": started}) + "\n")

    def generate(self) -> Path:
        """Join header, sections and Summary into report.md. Returns its path.

        Raises:
            InputError: there is nothing to report.
        """
        header_path, sections = self.report_dir / "header.md", self.sections()
        if not header_path.exists() and not sections:
            raise InputError(f"no report sections in {self.report_dir}; run a stage first")
        header = ""
        if header_path.exists():
            header = header_path.read_bytes().decode("utf-8")
        else:
            print("warning: no header.md; run `python -m nanochat.report reset` before the first stage")
        missing = [slug for slug in SECTIONS if slug not in sections]
        if missing:
            print(f"warning: no section yet: {', '.join(missing)}")
        # a header that no reset() of ours wrote is another run's: its report keeps the reference's form
        ours = (self.report_dir / "run.json").exists() or not header_path.exists()
        text = header + "".join(section + "\n" for section in sections.values())
        text += format_summary(header, sections, ours)
        plots: list[Path] = []
        try:
            plots = self._draw_plots(sections)
        except ImportError as error:
            missing_plots = f"Plots are missing: {error}; install matplotlib and generate the report again"
            print(f"warning: {missing_plots}")
            text += f"\n\n{missing_plots}\n"
        path = self.report_dir / "report.md"
        write_atomically(path, text + format_plots(plots, "plots"))
        if self.copy_to is not None and self.copy_to.resolve() != path.resolve():
            text = text.replace(f"]({ROLLOUTS})", f"](report/{ROLLOUTS})")
            write_atomically(self.copy_to, text + format_plots(plots, "report/plots"))
            self._copy(plots, "report/plots")
            self._copy([p for p in [self.report_dir / ROLLOUTS] if p.exists()], "report")
        return path

    def _draw_plots(self, sections: Mapping[str, str]) -> list[Path]:
        """
        Raises:
            ImportError: matplotlib is not installed, or does not work here.
        """
        if not any((self.report_dir / "curves").glob("*.jsonl")):
            return []
        from nanochat.plots import draw_all  # matplotlib is slow to import

        scores = summary_rows(sections, ours=True)
        return draw_all(self.report_dir / "curves", scores, self.report_dir / "plots")

    def _copy(self, files: Sequence[Path], to: str) -> None:
        """Put files of the report beside its copy, where its links look for them."""
        assert self.copy_to is not None
        folder = self.copy_to.parent / to
        for file in files:
            if folder.resolve() != file.parent.resolve():
                folder.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, folder / file.name)


class NoReport(Report):
    """What ranks other than 0 hold: it writes nothing."""

    def log(self, section: str, data: Sequence[str | Mapping[str, Any] | None]) -> Path:
        return self.report_dir / f"{slugify(section)}.md"

    def generate(self) -> Path:
        return self.report_dir / "report.md"

    def reset(self) -> None:
        pass


def get_report() -> Report:
    """The report of the base directory; on ranks other than 0 one that writes nothing."""
    return (Report if is_master() else NoReport)(base_dir() / "report", copy_to="report.md")


def format_plots(plots: Sequence[Path], folder: str) -> str:
    """The Plots section: one image a line, linked relative to the report."""
    if not plots:
        return ""
    return "\n\n## Plots\n\n" + "\n".join(f"![{p.stem.replace('_', ' ')}]({folder}/{p.name})" for p in plots) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="?", default="generate", choices=("generate", "reset"))
    command = parser.parse_args(argv).command
    try:
        if command == "reset":
            get_report().reset()
        else:
            print(f"report written to {get_report().generate()} and ./report.md")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
