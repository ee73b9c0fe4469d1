"""Tables of plain text, and commands whose reader leaves."""

from __future__ import annotations

import subprocess
import sys

from common.paths import REPOSITORY
from common.tables import text_table


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    rows = [("train", 12_345, "x"), ("test", 6, "long")]
    assert text_table(("split", "tokens", "y"), rows) == (
        "split  tokens     y\ntrain  12,345     x\ntest        6  long"
    )
    assert text_table(("split", "tokens", "y"), rows, left=None) == (
        "split  tokens  y\ntrain  12,345  x\ntest   6       long"
    )
    assert text_table(("split", "tokens"), []) == "split  tokens"


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
