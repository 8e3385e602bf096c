"""What ranks must do alike: fail together, and see the same text."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from itertools import chain
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from nanochat.config import InputError
from nanochat.runtime import all_reduce

T = TypeVar("T")

ERROR_CHARS = 500  # of another rank's error


def is_same_everywhere(digest: str) -> bool:
    """Whether all ranks have this hexadecimal digest. Call it on all."""
    if not dist.is_initialized():
        return True
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    number = int(digest[:15], 16)
    most = all_reduce(torch.tensor([number, -number], device=device), "max")
    return bool(most[0] == -most[1])


def gather(mine: list[T]) -> list[T]:
    """The items of all ranks, rank after rank, on each of them. By messages: nodes may have no folder in common."""
    if not dist.is_initialized():
        return mine
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    return list(chain.from_iterable(parts))


class RankError(RuntimeError):
    """Work that all ranks shared failed: the same text on each. `ranks` are those where it did; there the rank's own
    exception is the cause."""

    def __init__(self, message: str, ranks: tuple[int, ...]) -> None:
        super().__init__(message)
        self.ranks = ranks


class RankInputError(RankError, InputError):
    """The same where the first of these ranks had an InputError: it ends a stage in one line."""


def together(fn: Callable[[], T]) -> T:
    """Call fn on every rank; if it fails on one, fail on all, so that none waits in a collective for one that has
    given up, or pairs it with another. Costs one reduction of an integer a rank.

    What the failed call held, its tensors above all, is freed at once, though its exception goes on.

    Args:
        fn: makes no collective call itself.

    Returns:
        What fn gave on this rank.

    Raises:
        RankError: fn failed on some rank, or in the only process; RankInputError if that was by an InputError.
    """
    try:
        value = fn()
    except Exception as error:
        _release(error)
        raise _rank_error(_ranks_where(True), error) from error
    ranks = _ranks_where(False)
    if ranks:
        del value  # or it would live as long as the exception
        raise _rank_error(ranks, None)
    return value


def _release(error: BaseException) -> None:
    """Empty the frames that an exception and those before it came through: they live as long as it does."""
    chain: list[BaseException] = [error]
    for e in chain:
        traceback.clear_frames(e.__traceback__)
        chain += [other for other in (e.__cause__, e.__context__) if other is not None and other not in chain]
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # NCCL does not take its memory from torch


def _ranks_where(is_true: bool) -> tuple[int, ...]:
    if not dist.is_initialized():
        return (0,) if is_true else ()
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    flags = torch.zeros(dist.get_world_size(), dtype=torch.int32, device=device)
    flags[dist.get_rank()] = int(is_true)
    return tuple(all_reduce(flags).nonzero().flatten().tolist())


def _rank_error(ranks: tuple[int, ...], error: Exception | None) -> RankError:
    """What all raise: the first rank's error, in one line. Args: where it failed, and with what on this rank."""
    is_input = isinstance(error, InputError)
    text = str(error) if is_input else f"{type(error).__name__}: {error}"
    told: list[Any] = [is_input, " ".join(text.split())[:ERROR_CHARS]]
    where = ""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast_object_list(told, src=ranks[0])
        where = f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))} of {dist.get_world_size()}: "
    is_input, text = told
    return (RankInputError if is_input else RankError)(where + text, ranks)
