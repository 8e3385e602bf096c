"""Command-line configs: one frozen dataclass a stage, each field one flag.

@dataclass(frozen=True)
class Config:
    depth: int = flag(12, "transformer layers")
    num_iterations: int | None = flag(None, "optimizer steps", off=-1)

def main(argv=None):
    run_cli(Config, run, argv, about=__doc__)
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import re
import sys
import time
import types
import typing
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

C = TypeVar("C")

SECONDS_BEHIND_FIRST = 1.0  # that the first rank may need for an error that all have


class InputError(ValueError):
    """Wrong input from outside. The message is one line: what is wrong, the value, the way out."""


def flag(
    default: Any,
    help: str,
    *,
    off: Any = None,
    choices: Sequence[str] | None = None,
    short: str | None = None,
    new: bool = False,
) -> Any:
    """A dataclass field that is a command-line flag. One of type tuple[str, ...] may be given several times.

    Args:
        off: how the report prints "not set" (the field is then None in code), and a value that the command
            line takes for it; "None" is always taken where the type allows None.
        short: one-letter spelling, such as "-i".
        new: not a key of the reference report; printed after the reference's keys.
    """
    metadata = {"help": help, "off": off, "choices": choices, "short": short, "new": new}
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


REQUIRED = dataclasses.MISSING


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise InputError(f"{message} (see --help)")


def _nearest_int(kind: Any, text: str) -> str:
    """What to say of a fraction that was given for an integer."""
    try:
        value = float(text) if kind is int else math.nan
    except ValueError:
        return ""
    return f"; try {max(1, round(value))}" if 0 < value < math.inf else ""


def _scalar(kind: Any, optional: bool, off: Any, name: str) -> Callable[[str], Any]:
    """The function that turns a flag's text into its value."""

    def parse(text: str) -> Any:
        if optional and (text == "None" or (off is not None and text == str(off))):
            return None
        try:
            value = kind(text.replace("_", "") if kind is int else text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no {kind.__name__}{_nearest_int(kind, text)}") from None
        return None if optional and off is not None and value == off else value

    parse.__name__ = name
    return parse


def _kind(annotation: Any) -> tuple[Any, bool]:
    """(scalar type, may it be None) of a field's annotation."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        args = [a for a in typing.get_args(annotation) if a is not type(None)]
        return args[0], True
    return annotation, False


def build_parser(cls: type, about: str = "") -> argparse.ArgumentParser:
    """The parser of a config class: `--device_batch_size` and `--device-batch-size`, `--k=v` and `--k v`."""
    parser = _Parser(
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,  # the dataclass has the defaults; what is parsed was given
    )
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        m = f.metadata
        kind, optional = _kind(hints[f.name])
        names = [f"--{f.name}"] + ([f"--{f.name.replace('_', '-')}"] if "_" in f.name else [])
        if m["short"]:
            names.insert(0, m["short"])
        required = f.default is dataclasses.MISSING
        shown = "required" if required else f"default {m['off'] if f.default is None else f.default}"
        text = f"{m['help']} ({shown})".replace("%", "%%")
        if typing.get_origin(kind) is tuple:
            text = f"{m['help']} (may be repeated)".replace("%", "%%")
            parser.add_argument(*names, dest=f.name, action="append", metavar="STR", help=text)
            continue
        if kind is bool:
            parser.add_argument(*names, dest=f.name, action=argparse.BooleanOptionalAction, help=text)
            continue
        parser.add_argument(
            *names,
            dest=f.name,
            type=_scalar(kind, optional, m["off"], f.name),
            required=required,
            choices=m["choices"],
            metavar=kind.__name__.upper() if m["choices"] is None else None,
            help=text,
        )
    return parser


def parse_config(cls: type[C], argv: Sequence[str] | None = None, about: str = "") -> C:
    """Build the config from the command line.

    Raises:
        InputError: an unknown flag, a value of the wrong type, or one that the config refuses.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["--"]:  # torchrun's separator; harmless without torchrun too
        argv = argv[1:]
    values = vars(build_parser(cls, about).parse_args(argv))
    cfg = cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
    object.__setattr__(cfg, "_given", frozenset(values))  # no field: it is no setting
    return cfg


def is_given(cfg: Any, name: str) -> bool:
    """Whether a setting was on the command line, or is another than the default."""
    field = next(f for f in dataclasses.fields(cfg) if f.name == name)
    return name in getattr(cfg, "_given", ()) or getattr(cfg, name) != field.default


# What torch says in errors of a rank that is gone or has not answered in time; all else it reports is of this rank.
LOST_RANK = re.compile(
    "closed by peer|reset by peer|broken pipe|timed out|timeout|remote process|ncclRemoteError|was aborted"
    "|remote server|got 0 bytes",
    re.IGNORECASE,
)


def run_cli(cls: type[C], run: Callable[[C], Any], argv: Sequence[str] | None = None, about: str | None = "") -> None:
    """Parse, run, and end a wrong input in one line on stderr with exit code 2, the loss of another rank with 1."""
    try:
        run(parse_config(cls, argv, about or ""))
    except InputError as error:
        where = "" if hasattr(error, "ranks") else _rank()  # runtime.RankInputError says it itself
        if not _first_rank_says(str(error)):
            print(f"error: {where}{error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    except RuntimeError as error:
        reason = _lost_rank(error)
        if reason is None:
            raise
        text = f"error: {_rank()}lost another rank, whose error stands above or in its own log ({reason})"
        print(text, file=sys.stderr, flush=True)
        time.sleep(1)  # so that torchrun sees the other one end first, and names it
        raise SystemExit(1) from None


def _first_rank_says(text: str) -> bool:
    """Whether this is another rank, and the first one ends with the same error. By the store: a collective would wait
    for ranks that have no error."""
    if not (rank := _rank()):
        return False
    dist = sys.modules["torch.distributed"]
    with contextlib.suppress(RuntimeError):  # it has no error, or is gone with the store
        store = dist.distributed_c10d._get_default_store()
        if rank == "rank 0: ":
            store.set("error", text)
        else:
            store.wait(["error"], timedelta(seconds=SECONDS_BEHIND_FIRST))
            return bool(store.get("error").decode() == text)
    return False


def _rank() -> str:
    """`rank 1: ` in a run of several. No import of torch, which a stage that has no tensors starts without."""
    dist = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return ""
    return f"rank {dist.get_rank()}: "


def _lost_rank(error: BaseException) -> str | None:
    """What torch says of a rank that is gone; None if the error, or one before it, is of another kind.

    A process group of GPUs, and the store, raise torch.distributed.Dist...Error; gloo raises a plain RuntimeError
    that begins with its source file.
    """
    text = str(error)
    of_torch = type(error).__module__ == "torch.distributed" or (type(error) is RuntimeError and "/gloo/" in text)
    before = error.__cause__ or error.__context__
    if not of_torch or not LOST_RANK.search(text) or (before is not None and _lost_rank(before) is None):
        return None
    return re.sub(r"^\[\S*\] ", "", text.splitlines()[0]).split(". ")[0]


def report_config(cfg: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the reference report's settings, the settings that are new), in declaration order, "off" as printed."""
    old: dict[str, Any] = {}
    new: dict[str, Any] = {}
    for f in dataclasses.fields(cfg):
        value = getattr(cfg, f.name)
        value = ", ".join(value) or None if isinstance(value, tuple) else value
        value = f.metadata["off"] if value is None else value
        (new if f.metadata["new"] else old)[f.name] = value
    return old, new
