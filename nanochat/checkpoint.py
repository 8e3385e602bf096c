"""One checkpoint format for all stages: a directory a step, staged, hashed, its manifest last, then renamed.

    <base>/base_checkpoints/d20/step_021400/{model.safetensors, optim.safetensors, manifest.json}

A directory is a checkpoint only when its manifest verifies. Weights and optimizer state are full tensors under the
parameters' names, so that any number of ranks can load what any other saved. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanochat.config import InputError
from nanochat.environment import base_dir
from nanochat.gpt import GPT, GPTConfig
from nanochat.runtime import Runtime
from nanochat.tokenizer import Tokenizer, get_tokenizer

FORMAT = 1
DIRECTORIES = {
    "base": "base_checkpoints",
    "mid": "mid_checkpoints",
    "sft": "chatsft_checkpoints",
    "rl": "chatrl_checkpoints",
}
TRAINED_BY = {"base": "base_train", "mid": "mid_train", "sft": "chat_sft", "rl": "chat_rl"}
OLD = ".old"  # a checkpoint that is being replaced by another of the same step
STAGING = ".staging-"  # what is being written or removed
MANIFEST_ROOM = 1 << 20  # bytes
STEP_NAME = re.compile(r"step_(\d{6,})(\.old)?")


class OtherFormat(InputError):
    """A checkpoint that is not damaged, but not for this version either."""


@dataclass
class Checkpoint:
    path: Path
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor] | None
    meta: dict[str, Any]


def tag_directory(source: str, tag: str) -> Path:
    if not re.fullmatch(r"[\w.+-]+", tag) or tag.startswith("."):
        raise InputError(f"tag {tag!r} is no plain directory name; use letters, digits, '.', '_', '+', '-'")
    return base_dir() / DIRECTORIES[source] / tag


def host_copy(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies in host memory, to be written while training goes on."""
    return {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}


def write(
    directory: Path,
    step: int,
    weights: dict[str, Tensor],
    optim_state: dict[str, Tensor] | None,
    meta: dict[str, Any],
) -> Path:
    """Write directory/step_NNNNNN; returns when it is whole and in place, for one process at a time.

    Args:
        meta: JSON-able; stored in the manifest beside step, sizes and hashes.

    Raises:
        InputError: weights that are not finite, or too little room on the disk. Nothing is left behind.
        OSError, SafetensorError: the disk failed. Nothing is left behind.
    """
    broken = [name for name, w in weights.items() if not torch.linalg.vector_norm(w.float()).isfinite()]
    if broken:
        raise InputError(f"{', '.join(broken[:3])} hold values that are not finite")
    directory.mkdir(parents=True, exist_ok=True)
    clear_killed(directory)
    require_room(directory, num_bytes(weights) + num_bytes(optim_state or {}))
    staging = Path(tempfile.mkdtemp(prefix=STAGING, dir=directory))
    try:
        _write(staging, step, weights, optim_state, meta)
        path = directory / _step_name(step)
        _put_in_place(staging, path)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return path


def clear_killed(directory: Path) -> None:
    """Remove what a process that was killed left half-written or half-removed."""
    for killed in directory.glob(f"{STAGING}*"):
        shutil.rmtree(killed, ignore_errors=True)


def num_bytes(tensors: dict[str, Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())


def require_room(directory: Path, wanted: int) -> None:
    """
    Raises:
        InputError: fewer bytes are free there than a checkpoint takes.
    """
    free, wanted = shutil.disk_usage(directory).free, wanted + MANIFEST_ROOM
    if free < wanted:
        raise InputError(
            f"a checkpoint takes {wanted / 2**20:,.0f} MiB and {directory} has {free / 2**20:,.0f} MiB free; "
            "make room, or set NANOCHAT_BASE_DIR to another disk"
        )


def _put_in_place(staging: Path, path: Path) -> None:
    """Rename. A checkpoint of the same step stays loadable under its old name until the new one is there."""
    old = path.with_name(path.name + OLD)
    if path.exists():
        remove(old)
        path.rename(old)
    staging.rename(path)
    _fsync(path.parent)
    remove(old)


def remove(path: Path) -> None:
    """Delete a checkpoint, if it is one: what is not ours stays. It is out of sight before its first file goes."""
    if (path / "manifest.json").exists():
        doomed = path.with_name(f"{STAGING}{path.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _write(
    staging: Path,
    step: int,
    weights: dict[str, Tensor],
    optim_state: dict[str, Tensor] | None,
    meta: dict[str, Any],
) -> None:
    staging.chmod(0o755)  # mkdtemp makes it private
    contents = {"model.safetensors": weights}
    if optim_state is not None:
        contents["optim.safetensors"] = optim_state
    files = {}
    for name, tensors in contents.items():
        save_file(tensors, staging / name)
        _fsync(staging / name)
        files[name] = {"bytes": (staging / name).stat().st_size, "sha256": _sha256(staging / name)}
    manifest = {"format": FORMAT, "step": step, "files": files, **meta}
    with (staging / "manifest.json").open("w", encoding="utf-8") as f:
        json.dump(manifest, f, indent=2)
        f.flush()
        os.fsync(f.fileno())
    _fsync(staging)


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint directory.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"no checkpoint at {path}: it has no manifest.json") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"damaged checkpoint {path}: manifest.json: {error}; delete the directory") from None
    if not isinstance(manifest, dict) or "format" not in manifest:
        raise InputError(f"damaged checkpoint {path}: manifest.json is not ours; delete the directory")
    if manifest["format"] != FORMAT:
        raise OtherFormat(
            f"checkpoint {path} has format {manifest['format']}; this version reads {FORMAT}: use the version of "
            "nanochat that wrote it"
        )
    if not isinstance(manifest.get("files"), dict):
        raise InputError(f"damaged checkpoint {path}: manifest.json lists no files; delete the directory")
    return manifest


def load(path: Path, with_optimizer: bool = False, verify: bool = True) -> Checkpoint:
    """Read a checkpoint, every file verified by size and hash, unless another rank did it.

    Raises:
        InputError: it is missing or damaged.
    """
    manifest = read_manifest(path)
    wanted = ["model.safetensors"] + (["optim.safetensors"] if with_optimizer else [])
    tensors = {}
    for name in wanted:
        expected, file = manifest["files"].get(name), path / name
        if expected is None:
            raise InputError(f"checkpoint {path} holds no {name}; it cannot be resumed from")
        is_whole = file.exists() and file.stat().st_size == expected["bytes"]
        if not is_whole or (verify and _sha256(file) != expected["sha256"]):
            raise InputError(f"damaged checkpoint {path}: {name} does not match its manifest; delete the directory")
        tensors[name] = load_file(file)
    return Checkpoint(path, tensors["model.safetensors"], tensors.get("optim.safetensors"), manifest)


def steps(directory: Path) -> list[int]:
    """Steps of the whole checkpoints in a tag directory, rising."""
    found = set()
    for path in directory.glob("step_*"):
        match = STEP_NAME.fullmatch(path.name)
        if match and (path / "manifest.json").exists():
            found.add(int(match[1]))
    return sorted(found)


def _step_name(step: int) -> str:
    return f"step_{step:06d}"


def step_path(directory: Path, step: int) -> Path:
    """Where the checkpoint of a step is: under its name, or its old one when a run was killed replacing it."""
    path = directory / _step_name(step)
    return path if path.exists() else path.with_name(path.name + OLD)


def _depth(tag: str) -> int:
    match = re.match(r"d(\d+)", tag)
    return int(match[1]) if match else -1


def find(source: str, tag: str | None = None, step: int | None = None) -> Path:
    """A stage's checkpoint directory: of the given tag, else of the deepest d<depth>; the given step, else the last.

    Of tags of one depth the plain one comes before those with something behind it (d4 before d4-own: what you tried
    beside a model does not take its place), and the newest of these. Without any d<depth> it is the newest tag.

    Raises:
        InputError: there is none; the message lists what is there.
    """
    root = base_dir() / DIRECTORIES[source]
    tags = sorted(p.name for p in root.glob("*") if p.is_dir() and steps(p))
    train = f"python -m scripts.{TRAINED_BY[source]}"
    if not tags:
        raise InputError(f"no {source} checkpoint in {root}; train one: {train}")
    if tag is None:
        tag = max(tags, key=lambda t: (_depth(t), t == f"d{_depth(t)}", (root / t).stat().st_mtime))
    if tag not in tags:
        raise InputError(f"no {source} checkpoint with tag {tag!r} in {root}; there are: {', '.join(tags)}")
    have = steps(root / tag)
    if step is not None and step not in have:
        listed = ", ".join(map(str, have))
        raise InputError(f"no step {step} of {source} checkpoint {tag!r}; there are: {listed}")
    return step_path(root / tag, have[-1] if step is None else step)


def build_model(config: GPTConfig, rt: Runtime) -> GPT:
    """A freshly initialised model on the device."""
    model = GPT(config)
    model.init_weights()
    return model.prepare(rt.device, rt.dtype)


def load_model(
    source: str, rt: Runtime, tag: str | None = None, step: int | None = None
) -> tuple[GPT, Tokenizer, dict[str, Any]]:
    """(model, its tokenizer, the checkpoint's manifest with "path" and "tag" added).

    Raises:
        InputError: no such checkpoint, a damaged one, or one trained with another tokenizer.
    """
    path = find(source, tag, step)
    checkpoint = load(path)
    meta = {**checkpoint.meta, "path": str(path), "tag": path.parent.name}
    tokenizer = get_tokenizer()
    config = GPTConfig(**meta["model_config"])
    trained_with = meta.get("tokenizer", tokenizer.fingerprint)
    if trained_with != tokenizer.fingerprint or tokenizer.get_vocab_size() > config.vocab_size:
        raise InputError(
            f"checkpoint {path} was trained with another tokenizer than the one in {base_dir() / 'tokenizer'}; "
            "put that one back, or train the stage again"
        )
    with torch.device("meta"):
        model = GPT(config)
    model = model.to_empty(device="cpu")
    model.load_state_dict(checkpoint.model)
    model.fill_buffers()
    return model.prepare(rt.device, rt.dtype), tokenizer, meta
