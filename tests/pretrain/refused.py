"""Commands that refuse what they were given before they import what takes seconds."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence

from common.paths import REPOSITORY

CODE = """
import importlib, json, sys
main = importlib.import_module(sys.argv[1]).main
codes = [main(line) for line in json.loads(sys.argv[2])]
print(json.dumps([codes, "torch" in sys.modules]))
"""


def refused_without_torch(module: str, lines: Sequence[Sequence[str]]) -> list[int]:
    """The exit codes of `main` of `module` for each line of arguments, in one process of their own, which must say one
    short sentence of each and import no torch."""
    done = subprocess.run(
        [sys.executable, "-c", CODE, module, json.dumps(lines)], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    codes, has_torch = json.loads(done.stdout)
    said = done.stderr.splitlines()
    assert len(said) == len(lines) and all(line.startswith("error: ") and len(line) < 400 for line in said), done.stderr
    assert not has_torch
    return codes
