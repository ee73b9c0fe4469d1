"""Types of arguments: what they take, and what they refuse in words."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.arguments import a_path, above_zero, at_least, not_empty, quoted


@pytest.mark.parametrize(
    "kind, text, value",
    [
        (a_path, "runs/a b", Path("runs/a b")),
        (a_path, ".", Path(".")),
        (not_empty, "https://host/data", "https://host/data"),
        (at_least(2), "2", 2),
        (above_zero(), "1e-3", 0.001),
        (above_zero(10), "10", 10.0),
    ],
)
def test_what_is_taken(kind: Callable[[str], Any], text: str, value: Any) -> None:
    assert kind(text) == value


@pytest.mark.parametrize(
    "kind, text",
    [
        *[(kind, text) for kind in (a_path, not_empty) for text in ("", "  ")],
        *[(at_least(2), text) for text in ("1", "-3", "2.5", "", "two")],
        *[(above_zero(10), text) for text in ("0", "-1", "nan", "inf", "1e300", "10.1", "", "ten")],
        (above_zero(), "inf"),
        *[(kind, "9" * 5000) for kind in (at_least(2), above_zero())],  # Python's int raises above 4,300 digits
    ],
)
def test_what_is_refused(kind: Callable[[str], Any], text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"is empty; |expected a ") as refused:
        kind(text)
    assert len(str(refused.value)) < 200


def test_what_a_user_wrote_is_quoted_by_its_beginning() -> None:
    assert quoted("5 apples") == "'5 apples'"
    assert quoted("9" * 5000, most=3) == "'999'... (5,000 characters)"
