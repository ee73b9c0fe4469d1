"""An sbatch without a SLURM."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An sbatch that writes its arguments to the returned file and counts jobs from 41."""
    folder = tmp_path / "bin"
    folder.mkdir()
    record = tmp_path / "sbatch.calls"
    (folder / "sbatch").write_text(
        f"""#!/bin/sh\n'''exec' '{sys.executable}' "$0" "$@"\n' '''\n"""  # its path may hold a space
        "import json, sys\n"
        f"calls = open({str(record)!r}, 'a+')\ncalls.seek(0)\nnumber = 41 + len(calls.readlines())\n"
        "calls.write(json.dumps(sys.argv[1:]) + '\\n')\nprint(f'{number};cluster')\n"
    )
    (folder / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return record
