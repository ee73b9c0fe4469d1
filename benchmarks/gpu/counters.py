"""Hardware counters of the costliest kernels of a micro-step, by Nsight Compute, where it is on the PATH and may count.

It runs with `--clock-control none`: by default it would set the card's clocks.
"""

from __future__ import annotations

import csv
import functools
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.gpu import micro_step
from benchmarks.gpu.command import Context, Failed, Late, Part, Unavailable
from benchmarks.gpu.processes import captured
from benchmarks.gpu.record import ROOT

KERNELS = 5
METRICS = {
    "gpu__time_duration.sum": "ns",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "sm_percent",
    "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed": "dram_percent",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps_percent",
}
"""ncu's name of a metric -> ours."""
NOT_PERMITTED = ("ERR_NVGPUCTRPERM", "LibraryNotLoaded", "Failed to initialize the profiler")


def parts(*, tiny: bool) -> Iterator[Part]:
    model, sequences = ("tiny", 2) if tiny else ("1b", 8)
    yield Part(f"counters {model}", functools.partial(compute, model=model, sequences=sequences), 30.0)


def compute(context: Context, *, model: str, sequences: int) -> dict[str, Any]:
    """Of a model with one block, at the shape of the micro-step."""
    program = shutil.which("ncu")
    if program is None:
        raise Unavailable("ncu is not on the PATH")
    measured = context.measured.get(micro_step.name_of(model, sequences))
    if measured is None:
        raise Unavailable(f"the part {micro_step.name_of(model, sequences)!r} has not been measured")
    names = list(dict.fromkeys(function_name(kernel["name"]) for kernel in measured["kernels"]))[:KERNELS]
    child = [sys.executable, "-m", "benchmarks.gpu.micro_step", model, str(sequences), context.device.type, "1"]
    pattern = f"regex:(^|::)({'|'.join(map(re.escape, names))})$"
    line = [program, "--target-processes", "all", "--clock-control", "none", "--csv", "--page", "raw"]
    line += ["--metrics", ",".join(METRICS), "--kernel-name-base", "function", "--kernel-name", pattern]
    limit = max(context.remaining(), 1.0)
    done = captured([*line, "--launch-count", "60", *child], limit, ROOT, os.environ)
    if done is None:
        raise Late(f"ncu did not end in {limit:.0f} s")
    said = done.stdout + done.stderr
    for words in NOT_PERMITTED:
        if words in said:
            raise Unavailable(f"ncu may not read the counters here: {words}")
    rows = read(done.stdout)
    if done.returncode != 0 or not rows:
        raise Failed(f"ncu ended with {done.returncode}: {said[-500:]}")
    return {"kernels": rows}


def function_name(name: str) -> str:
    """Of a kernel as the profiler writes it: without result, namespaces, template and arguments."""
    bare = re.sub(r"[<(].*", "", name.removeprefix("void "))
    return bare.strip().rsplit("::", 1)[-1]


def read(output: str) -> list[dict[str, Any]]:
    """Rows of ncu's CSV: kernel and metrics, of the longest launch of each kernel. A row of units follows the head."""
    lines = output.splitlines()
    begin = next((number for number, line in enumerate(lines) if line.startswith('"ID"')), None)
    if begin is None:
        return []
    found: dict[str, dict[str, Any]] = {}
    for row in _rows(lines[begin:]):
        if not row["ID"]:
            continue
        values = {ours: float(row[theirs].replace(",", "")) for theirs, ours in METRICS.items() if row.get(theirs)}
        best = found.get(row["Kernel Name"])
        if best is None or values.get("ns", 0.0) > best.get("ns", 0.0):
            found[row["Kernel Name"]] = {"kernel": row["Kernel Name"][:120], **values}
    return list(found.values())


def _rows(lines: Sequence[str]) -> Iterator[dict[str, str]]:
    return csv.DictReader(lines)
