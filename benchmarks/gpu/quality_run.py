"""The comparison of models by perplexity (benchmarks/quality) on one GPU, ten runs at a time: a part of `run`, where
the prepared text was carried (`python -m benchmarks.gpu carry --text FOLDER`)."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from benchmarks.gpu import carry, record
from benchmarks.gpu.command import Context, Failed, Unavailable
from benchmarks.gpu.processes import within
from benchmarks.gpu.record import ROOT

JOBS, SEQUENCES = 10, 32
"""Runs at a time, and sequences of a micro-step."""


def quality(context: Context) -> dict[str, Any]:
    """The records of all runs and the table. What has ended is kept in runs/, and the next call of the same sources
    goes on with it. Unavailable without the text, and where the time is over."""
    manifest = carry.FOLDER / "data" / carry.TEXT / "manifest.json"
    if not manifest.exists():
        raise Unavailable(f"there is no {manifest.relative_to(ROOT)}: carry a prepared text with carry --text FOLDER")
    runs = ROOT / "runs" / "quality-gpu" / record.identity(context.device.type).sources
    kept = runs / "records"
    line = [sys.executable, "-m", "benchmarks.quality", "run", "--data", str(manifest), "--runs", str(runs / "runs")]
    line += ["--results", str(kept), "--device", context.device.type, "--jobs", str(JOBS)]
    line += ["--set", f"batch.micro_sequences={SEQUENCES}"]
    code = within(line, context.remaining(), ROOT)
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(kept.glob("*.json"))]
    result = {"records": found}
    if code is None:
        raise Unavailable(f"the time was over after {len(found)} runs; they are kept in {kept.relative_to(ROOT)}")
    if code != 0:
        raise Failed(f"benchmarks.quality ended with {code} after {len(found)} runs", result)
    table = [sys.executable, "-m", "benchmarks.quality", "table", "--results", str(kept)]
    done = subprocess.run(table, cwd=ROOT, capture_output=True, text=True, check=True)
    print(done.stdout)
    return result | {"table": done.stdout}
