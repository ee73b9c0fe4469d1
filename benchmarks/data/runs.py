"""One run of our own preparation, measured."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from benchmarks.data.peers import ONE_THREAD
from benchmarks.data.process_cost import Cost, measure


def prepare(work: Path, name: str, paths: list[Path], command: str = "run", **keys: Any) -> Cost:
    """Into the empty folder work/NAME; `keys` are those of a preparation's config."""
    shutil.rmtree(work / name, ignore_errors=True)
    body = {"input": [str(path) for path in paths], "output": str(work / name), "workers": 1, **keys}
    file = work / f"{name}.json"
    file.write_text(json.dumps(body), encoding="utf-8")
    line = [sys.executable, "-m", "data_prep", command, "--config", str(file)]
    return measure(line, log=work / f"{name}.log", environment=ONE_THREAD)
