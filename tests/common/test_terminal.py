"""What reaches a terminal or another program."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import pytest

from common.paths import REPOSITORY
from common.terminal import json_line


@pytest.mark.parametrize(
    "text, shown",
    [
        ("Übung σ 数", '"Übung σ 数"'),
        ('a "b"\n', r'"a \"b\"\n"'),
        ("\x1b[31m\x9b\x7f\x85", r'"\u001b[31m\u009b\u007f\u0085"'),
        ("a\u2028b\u202ec", r'"a\u2028b\u202ec"'),
        ("\udc80", r'"\udc80"'),
    ],
)
def test_json_is_readable_in_every_script_and_steers_nothing(text: str, shown: str) -> None:
    for encoding, expected in (("utf-8", shown), ("ascii", json.dumps(text)), ("latin-1", json.dumps(text))):
        line = json_line(text, io.TextIOWrapper(io.BytesIO(), encoding=encoding))
        assert line == expected and json.loads(line) == text and line.splitlines() == [line]


def test_a_closed_stdin_is_an_empty_one() -> None:
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from common.terminal import prepare_streams\n"
        "prepare_streams()\n"
        "print(sys.stdin.buffer.read())\n"
    )
    line = ["sh", "-c", 'exec "$0" "$@" <&-', sys.executable, "-c", program, str(REPOSITORY)]
    assert subprocess.run(line, capture_output=True, check=True).stdout == b"b''\n"
