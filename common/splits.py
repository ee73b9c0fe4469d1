"""The parts of a data set: what is trained on, and what is held out."""

from __future__ import annotations

from typing import Literal

SplitName = Literal["train", "validation", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")
"""Test only if the corpus has one, the others always."""
