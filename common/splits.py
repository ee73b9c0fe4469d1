"""The parts of a data set: what is trained on, and what is held out."""

from __future__ import annotations

from typing import Literal

SplitName = Literal["train", "validation", "test"]
SourceSplit = Literal[SplitName, "hash", "position"]
"""Where the documents of a raw file go: all to one split, or to train and validation by a hash of their text, or to
every split by their place in the file."""
SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")
"""Test only if the corpus has one, the others always."""
