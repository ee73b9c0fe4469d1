"""What a board of curves must be able to do; TensorBoard and Weights & Biases are two."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Position:
    """Where a point lies, by any of three axes."""

    step: int
    tokens: int
    flops: float
    """Training FLOPs of the model since the first step."""


class Writer(Protocol):
    """Is called by one thread of one rank. No call may raise because a disk is full or a network is gone."""

    def scalars(self, at: Position, values: Mapping[str, float]) -> None:
        """One point of each curve, by tag."""

    def text(self, step: int, tag: str, text: str) -> None:
        """Markdown."""

    def event(self, step: int, kind: str, text: str) -> None:
        """Something that happened, which stays although the step may be computed again."""

    def histogram(self, step: int, tag: str, shares: Tensor) -> None:
        """`shares` [n]: of n equal parts of 0 .. 1."""

    def image(self, step: int, tag: str, png: bytes) -> None: ...

    def settings(self, values: Mapping[str, Any]) -> None:
        """What tells this run from others: settings by dotted key. Called once, before the first point."""

    def flush(self) -> None:
        """Called at every point that the run may continue from."""

    def close(self) -> None: ...
