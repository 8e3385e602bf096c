"""The head of the report: git state, hardware, software, size of the sources."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

# dollars per GPU and hour by a part of its name: what rented machines cost when the reference was made
HOURLY_RATES = (("H100", 3.0), ("A100", 1.79), ("V100", 0.55))
OTHER_HOURLY_RATE = 2.0
BLOAT_SUFFIXES = ("py", "md", "rs", "html", "toml", "sh")


def _run(*command: str) -> str | None:
    """Output of a command in the repository; None when it fails or does not exist."""
    try:
        done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode("utf-8", errors="replace").strip()


def git_lines() -> list[str]:
    status = _run("git", "status", "--porcelain")
    state = "unknown" if status is None else "dirty" if status else "clean"
    message = _run("git", "log", "-1", "--format=%s")
    return [
        f"- Branch: {_run('git', 'rev-parse', '--abbrev-ref', 'HEAD') or 'unknown'}",
        f"- Commit: {_run('git', 'rev-parse', '--short', 'HEAD') or 'unknown'} ({state})",
        f"- Message: {(message or 'unknown')[:80]}",
    ]


def hourly_rate(gpu_name: str, num_gpus: int) -> float:
    """Dollars per hour of the machine, by its first GPU's name."""
    rates = [rate for part, rate in HOURLY_RATES if part in gpu_name]
    return num_gpus * (rates[0] if rates else OTHER_HOURLY_RATE)


def hardware_lines() -> list[str]:
    import psutil
    import torch

    lines = [
        f"- Platform: {platform.system()}",
        f"- CPUs: {psutil.cpu_count(logical=False)} cores ({psutil.cpu_count()} logical)",
        f"- Memory: {psutil.virtual_memory().total / 2**30:.1f} GB",
    ]
    if not torch.cuda.is_available():
        return [*lines, "- GPUs: None available"]
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    names = list(dict.fromkeys(gpu.name for gpu in gpus))
    return [
        *lines,
        f"- GPUs: {len(gpus)}x {', '.join(names)}",
        f"- GPU Memory: {sum(gpu.total_memory for gpu in gpus) / 2**30:.1f} GB total",
        f"- CUDA Version: {torch.version.cuda or 'unknown'}",
        f"- Hourly Rate: ${hourly_rate(names[0], len(gpus)):.2f}/hour",
    ]


def bloat_lines() -> list[str]:
    """Size of the tracked sources: what a reader of this repository has before them."""
    root = Path(__file__).parents[1]
    listed = _run("git", "ls-files", *(f"*.{suffix}" for suffix in BLOAT_SUFFIXES))
    lock = root / "uv.lock"
    lock_lines = len(lock.read_text(encoding="utf-8").splitlines()) if lock.exists() else 0
    keys = ("Characters", "Lines", "Files", "Tokens (approx)")
    counts: list[str] = ["unknown"] * 4
    if listed is not None:
        paths = [root / name for name in listed.splitlines() if (root / name).is_file()]
        texts = [path.read_text(encoding="utf-8", errors="replace") for path in paths]
        characters, lines = sum(map(len, texts)), sum(text.count("\n") for text in texts)
        counts = [f"{n:,}" for n in (characters, lines, len(texts), characters // 4)]
    return [
        *(f"- {key}: {count}" for key, count in zip(keys, counts, strict=True)),
        f"- Dependencies (uv.lock lines): {lock_lines:,}",
    ]


def format_header(generated: str) -> str:
    """Everything above the `Run started` line."""
    import torch

    lines = [
        "# nanochat training report\n",
        f"Generated: {generated}\n",
        "## Environment\n",
        "### Git Information",
        *git_lines(),
        "\n### Hardware",
        *hardware_lines(),
        "\n### Software",
        f"- Python: {platform.python_version()}",
        f"- PyTorch: {torch.__version__}\n\n",
        "### Bloat",
        *bloat_lines(),
        "\n",
    ]
    return "\n".join(lines)
