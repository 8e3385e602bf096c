"""What the environment says without torch: directories, and whether this is the first rank.

Stages that compute nothing with tensors start seconds sooner for it.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from nanochat.config import InputError


def is_master() -> bool:
    """Whether this is rank 0, or the only process."""
    return int(os.environ.get("RANK", 0)) == 0


def print0(*args: Any, **kwargs: Any) -> None:
    """print on rank 0. A run goes on when its terminal is gone."""
    if is_master():
        with contextlib.suppress(OSError):
            # one write, so that lines of two threads do not mix
            print(" ".join(map(str, args)) + "\n", end="", flush=True, **kwargs)


def base_dir() -> Path:
    """Root of all artefacts: NANOCHAT_BASE_DIR, else ~/.cache/nanochat. Created on demand."""
    path = Path(os.environ.get("NANOCHAT_BASE_DIR") or Path.home() / ".cache" / "nanochat")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise InputError(f"cannot make the base directory {path}: {reason}; set NANOCHAT_BASE_DIR") from None
    return path


def hub_dir() -> Path | None:
    """A folder laid out like the hub (datasets/OWNER/NAME/...), from NANOCHAT_HUB_DIR; None = use the network."""
    name = os.environ.get("NANOCHAT_HUB_DIR")
    if not name:
        return None
    if not Path(name).is_dir():
        raise InputError(f"NANOCHAT_HUB_DIR={name} is no folder; unset it or point it at a hub mirror")
    return Path(name)


def api_key() -> str | None:
    """The key that clients of the chat server must have: NANOCHAT_API_KEY; None = none."""
    return os.environ.get("NANOCHAT_API_KEY") or None


def of_local_rank(local_rank: int) -> dict[str, str]:
    """For a process of ours: by it runtime.start() takes that GPU."""
    return {**os.environ, "LOCAL_RANK": str(local_rank)}


def offer_tiktoken_cache() -> None:
    """Let tiktoken read its vocabularies from the hub mirror, unless TIKTOKEN_CACHE_DIR says where."""
    hub = hub_dir()
    if hub is not None and (hub / "tiktoken_cache").is_dir():
        os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(hub / "tiktoken_cache"))


def aqua_dir() -> Path | None:
    """A folder that may hold AQuA splits as {split}.jsonl: NANOCHAT_AQUA_DIR, AQUA_DATA_DIR, else <base>/aqua
    if it exists; None = use the hub."""
    for variable in ("NANOCHAT_AQUA_DIR", "AQUA_DATA_DIR"):
        name = os.environ.get(variable)
        if name:
            if not Path(name).is_dir():
                raise InputError(f"{variable}={name} is no folder; unset it or point it at the AQuA files")
            return Path(name)
    folder = base_dir() / "aqua"
    return folder if folder.is_dir() else None


def endpoint_key() -> str | None:
    """The key of an OpenAI-compatible server, from OPENAI_API_KEY; None = the server wants none."""
    return os.environ.get("OPENAI_API_KEY") or None
