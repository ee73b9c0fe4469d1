"""Errors of one rank, agreed by all before they reach a collective that would hang or break."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from common.errors import PassingError, UserError, kind_of
from pretrain.device import on_collective_device

Result = TypeVar("Result")


class PeerFailed(Exception):
    """Another rank met an error that the user must fix, or that may pass, and reports it; this rank leaves quietly."""

    def __init__(self, kind: type[UserError] = UserError, words: str = "") -> None:
        """`kind`: of that error, a PassingError or not. `words`: what it says, for the record of the run; empty where
        this rank was not told."""
        super().__init__()
        self.kind, self.words = kind, words


class Agreement(NamedTuple):
    """What the ranks said in one message; the same on every rank."""

    first_failed: int | None
    """The first rank that met an error."""
    stopping: bool
    """Whether any rank was asked to stop."""
    flags: list[bool]
    passes: bool = False
    """That rank's error may pass; no rank has met one that stays."""


def said(rank: int, size: int, failed: bool, stopping: bool, *flags: bool, passes: bool = False) -> Tensor:
    """What a rank says, [2 + flags] int64: the largest of what all say is their agreement. `passes`: its error may
    pass, and gives way to one that stays."""
    failure = size - rank + (0 if passes else size) if failed else 0
    return torch.tensor([failure, stopping, *flags], dtype=torch.int64)


def agreement(largest: Tensor, size: int) -> Agreement:
    """What the largest of the numbers of `size` ranks mean."""
    failed, stopping, *flags = largest.tolist()
    passes = 0 < failed <= size
    first = (size if passes else 2 * size) - failed if failed else None
    return Agreement(first, bool(stopping), [bool(flag) for flag in flags], passes)


def agreed(function: Callable[[], Result]) -> Result:
    """Calls `function` on every rank; collective. If it raises a UserError anywhere, the lowest such rank
    raises it and every other rank raises PeerFailed. An error that stays goes before one that may pass."""
    result, error = attempt(function)
    agree(error)
    return result


def from_first_rank(function: Callable[[], Result]) -> Result:
    """Calls `function` on rank 0 alone and returns its result on every rank; its UserError is agreed. Collective."""
    values = [agreed(lambda: function() if dist.get_rank() == 0 else None)]
    dist.broadcast_object_list(values, src=0)
    return values[0]  # type: ignore[return-value]


def of_all_ranks(value: Result, group: dist.ProcessGroup | None = None) -> list[Result]:
    """The values of all ranks (of the group), in their order. Collective."""
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def said_by_first(function: Callable[[], None]) -> None:
    """As `agreed`, but the first rank raises what any rank has met: people read its output, and not that of rank
    4711."""
    _, error = attempt(function)
    words = of_all_ranks(None if error is None else (isinstance(error, PassingError), str(error)))
    found = [word for word in words if word is not None]
    passes, text = min(found, key=lambda word: word[0], default=(False, ""))
    agree((PassingError if passes else UserError)(text) if found else None)


def attempt(function: Callable[[], Result]) -> tuple[Result, Exception | None]:
    """What `function` returns, and the UserError that it raises, for `agree`; not collective. With an
    error the result is None, and `agree` raises."""
    try:
        return function(), None
    except UserError as error:
        return None, error  # type: ignore[return-value]


def agree(error: Exception | None) -> None:
    """Collective: raises on every rank if any of them passes an error, see `agreed`. A process without a process group
    raises its own."""
    if not dist.is_initialized():
        if error is not None:
            raise error
        return
    size, passes = dist.get_world_size(), isinstance(error, PassingError)
    largest = on_collective_device(said(dist.get_rank(), size, error is not None, stopping=False, passes=passes))
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    found = agreement(largest, size)
    raise_agreed(error, found.first_failed, passes=found.passes)


def raise_agreed(
    error: Exception | None, first_failed: int | None, *, passes: bool = False, group: dist.ProcessGroup | None = None
) -> None:
    """`error` on the first rank that failed, PeerFailed with its words on every other, nothing if none has failed.
    `passes`: the first one's is a PassingError. Collective (over `group`, of all ranks) if one has failed."""
    if first_failed is None:
        return
    words = [str(error)]
    dist.broadcast_object_list(words, src=first_failed, group=group)
    if error is not None and first_failed == dist.get_rank():
        raise error
    raise PeerFailed(PassingError if passes else UserError, f"rank {first_failed}: {words[0]}")


def check_same(what: str, value: str) -> None:
    """Collective, if there is a process group: raises UserError (agreed) unless every rank holds the same value."""
    if not dist.is_initialized():
        return
    values = of_all_ranks(value)
    different = next((rank for rank, other in enumerate(values) if other != values[0]), None)
    agree(
        UserError(f"{what}: rank 0 has {values[0]}, rank {different} has {values[different]}; give all nodes the same")
        if different is not None
        else None
    )


def check_shared(folder: Path) -> None:
    """Collective: raises UserError (agreed) unless every rank sees the folder that rank 0 writes."""
    path = folder / from_first_rank(lambda: _seen_file(folder))
    try:
        agree(
            None
            if os.path.exists(path)  # pathlib's raises where this rank may not look, and leaves the others waiting
            else UserError(
                f"--run-dir: rank {dist.get_rank()} does not see the folder {folder} of rank 0; name one on a file "
                f"system that all nodes share"
            )
        )
    finally:
        if dist.get_rank() == 0:
            with contextlib.suppress(OSError):  # the next start removes it
                path.unlink()


def _seen_file(folder: Path) -> str:
    """The name of a new file in it."""
    name = f".seen-by-rank-0-{secrets.token_hex(8)}"
    try:
        (folder / name).touch()
    except OSError as error:
        raise kind_of(error)(f"--run-dir: {folder} cannot be written: {error.strerror}") from None
    return name
