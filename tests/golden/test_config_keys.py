"""No configuration key, type or default changes unseen."""

from __future__ import annotations

import difflib

from tests.golden.config_keys import FILE, keys


def test_the_keys_are_those_of_the_list() -> None:
    listed = FILE.read_text(encoding="utf-8").splitlines()
    changes = [line for line in difflib.ndiff(listed, keys()) if line[0] in "+-"]
    assert not changes, "\n".join(
        [
            "keys changed; if on purpose, tell CHANGELOG.md and run: python -m tests.golden.config_keys --write",
            *changes,
        ]
    )


def test_the_list_has_every_kind_of_key() -> None:
    """A section inside a list, each member of a union, an optional section, a default made by a function."""
    found = keys()
    assert len(found) == len(set(found)) > 160
    for line in (
        "pretrain data.sources.weight: float = required",
        "pretrain model.attention(moa).num_experts: int = 8",
        "pretrain train.steps: int = 100000",
        "pretrain parallel.zero: 0 | 1 | 2 | 3 = 1, may change on resume",
        "pretrain deepspeed: dict[str, Any] = {}",
        "data_prep filter: section | None = null",
        "data_prep filter.min_words: int = 50",
        "data_prep input: tuple[str, ...] = required",
    ):
        assert line in found, line
