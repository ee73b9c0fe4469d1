"""Commands of a test's own that alerts call, and what they got."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pretrain.report import alerts

alerts.END_SECONDS = 60.0  # a busy machine may take longer than the 5 s to start the Python of a command

WRITES = """
import json, os, sys
with open(sys.argv[1], "a") as file:
    file.write(json.dumps([sys.argv[2:], sys.stdin.read(), os.environ.get("RANK")]) + "\\n")
"""
"""Appends its arguments after the first, its stdin and its rank to a file that the first one names."""


def command(folder: Path, program: str, *words: str) -> str:
    """A command of this program and these words, as a configuration has it."""
    path = folder / "program of mine.py"
    path.write_text(program)
    return " ".join(f"'{word}'" for word in (sys.executable, str(path), *words))


def calls(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The sentence and the JSON of every call of WRITES."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for (*_, sentence), given, _ in lines:
        assert given.count("\n") == 1 and json.loads(given)["text"] == sentence
    return [(arguments[-1], json.loads(given)) for arguments, given, _ in lines]
