"""Tables of plain text, and commands whose reader leaves."""

from __future__ import annotations

import subprocess
import sys

import pytest

from common.paths import REPOSITORY
from common.tables import folded_table, shortened, shortened_apart, text_table


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    rows = [("train", 12_345, "x"), ("test", 6, "long")]
    assert text_table(("split", "tokens", "y"), rows) == (
        "split  tokens     y\ntrain  12,345     x\ntest        6  long"
    )
    assert text_table(("split", "tokens", "y"), rows, left=None) == (
        "split  tokens  y\ntrain  12,345  x\ntest   6       long"
    )
    assert text_table(("split", "tokens"), []) == "split  tokens"


def test_a_table_folds_to_the_width_of_a_terminal() -> None:
    header, rows = (
        ("steps", "run-with-a-long-name=1", "run-with-a-long-name=2"),
        [("1", "9.5", "9.6"), ("20", "8", "7")],
    )
    for width in (None, 200, 53):
        assert folded_table(header, rows, width=width) == text_table(header, rows)
    first, second = "steps  run-with...ng-name=1", "  run-with...ng-name=2"
    assert folded_table(header, rows, width=52).splitlines()[0] == first + second
    assert folded_table(header, rows, width=30) == (
        f"{first}\n1                       9.5\n20                        8\n\n"
        f"steps{second}\n1                       9.6\n20                        7"
    )


def test_a_title_of_several_words_is_broken_and_not_cut() -> None:
    header, rows = ("value", "largest difference (relative)", "at step"), [("loss", "0.5", "7"), ("norm", "0.25", "8")]
    assert folded_table(header, rows, width=34) == (
        "       largest difference\n"
        "value          (relative)  at step\n"
        "loss                  0.5        7\n"
        "norm                 0.25        8"
    )
    header, rows = ("a", "one two three four five six", "b"), [("1", "2", "3")]
    assert "one" in (cut := folded_table(header, rows, width=14)) and "..." in cut and "three" not in cut


@pytest.mark.parametrize("width", [20, 33, 47, 80])
def test_a_folded_table_holds_every_cell_that_fits(width: int) -> None:
    """Every row of every part begins with the first column's cell."""
    header = ("setting", *(f"run {n}" for n in range(9)))
    rows = [(f"key {m}", *(f"{m}.{n}" for n in range(9))) for m in range(4)]
    text = folded_table(header, rows, width=width)
    assert max(map(len, text.splitlines())) <= width
    parts = [part.splitlines() for part in text.split("\n\n")]
    for number, row in enumerate([header, *rows]):
        assert all(part[number].startswith(row[0]) for part in parts)
        assert "".join("".join(part[number].removeprefix(row[0]).split()) for part in parts) == "".join(
            "".join(cell.split()) for cell in row[1:]
        )


def test_a_name_loses_its_middle() -> None:
    assert [shortened("0123456789", most) for most in (10, 9, 4, 3, 2)] == [
        "0123456789",
        "012...789",
        "...9",
        "...",
        "..",
    ]


def test_names_that_would_look_alike_are_shown_where_they_differ() -> None:
    names = [f"tiny,learning_rate={rate},weight_decay=0.1" for rate in ("1e-3", "2e-3")]
    assert {shortened(name, 20) for name in names} == {"tiny,lea...decay=0.1"}
    assert shortened_apart(names, 20) == ["...earning_rate=1...", "...earning_rate=2..."]
    assert shortened_apart([*names, "other"], 20)[2] == "other"
    assert shortened_apart(["same" * 9] * 2, 20) == [shortened("same" * 9, 20)] * 2
    both = [f"tiny,learning_rate={r},sequence_length={n}" for r in ("1e-3", "2e-3") for n in (64, 128)]
    many = [f"{n:09}" for n in range(20_000)]  # the square of which would take minutes
    assert len(set(shortened_apart([f"run {name} of a sweep" for name in many], 16))) == len(many)
    assert len(set(shortened_apart(both, 20))) == 4 and max(map(len, shortened_apart(both, 20))) <= 20
    table = folded_table(("steps", *names), [("1", "9.5", "9.6")], width=40)
    assert "=1..." in table and "=2..." in table
    rows = [(name, "x" * 30) for name in names]
    assert "=1..." in (cut := folded_table(("run", "loss"), rows, width=42)) and "=2..." in cut


def test_a_reader_that_leaves_is_no_error() -> None:
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from common.terminal import reader_may_leave\n"
        "with reader_may_leave():\n"
        "    for _ in range(100_000): print('line')\n"
    )
    command = [sys.executable, "-c", program, str(REPOSITORY)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == b"line\n"
        process.stdout.close()
        assert process.wait(60) == 0 and process.stderr.read() == b""
