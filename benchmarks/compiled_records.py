"""benchmarks/compiled.csv: what each Triton gave of the cases, and its tables, for benchmarks/compiled.py."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from benchmarks import marked
from benchmarks.compiled_case import Compiled
from benchmarks.marked import TIGHT, with_table
from common.tables import text_table

Records = dict[str, dict[str, Compiled]]
"""Version of Triton -> key -> what it gave."""


def read_records(path: Path) -> Records:
    """The most complete version first; empty if there is no such file."""
    if not path.exists():
        return {}
    convert: dict[str, Callable[[str], Any]] = {"int": int, "bool": "True".__eq__, "str": str}
    kinds = {field.name: convert[str(field.type)] for field in fields(Compiled)}
    found: Records = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            values = {name: kinds[name](value) for name, value in row.items() if name in kinds}
            found.setdefault(row["triton"], {})[row["key"]] = Compiled(**values)
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def write_records(path: Path, records: Records) -> None:
    names = [field.name for field in fields(Compiled) if field.name not in ("error", "is_for_small")]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["key", "triton", *names], extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for version, results in records.items():
            good = {key: result for key, result in results.items() if not result.error}
            writer.writerows({"key": key, "triton": version, **asdict(result)} for key, result in good.items())


def in_one_table(records: Records) -> Iterable[Compiled]:
    """Every case once: as the most complete version gave it, else as another one did."""
    found: dict[tuple[str, int], Compiled] = {}
    for results in records.values():
        for result in results.values():
            found.setdefault((result.name, result.architecture), result)
    return found.values()


HEAD = ("kernel", "sm", "warps", "stages", "registers", "stack", "shared KB", "tensor cores", "16-byte loads", "fails")


def table(results: Sequence[Compiled], *, markdown: bool) -> str:
    """One row per case and architecture; `fails` is empty where everything holds."""
    rows = []
    for r in results:
        numbers = r.architecture, r.warps, r.stages, r.registers, r.stack_bytes, f"{r.shared_bytes / 1024:.0f}"
        tensor_cores = str(r.tensor_core) if r.is_gemm else "-"
        loads, fails = f"{r.wide_loads} of {r.loads}", "; ".join(r.failures())
        rows.append((r.name, *map(str, numbers), tensor_cores, loads, fails))
    return marked.markdown(HEAD, rows, TIGHT) if markdown else text_table(HEAD, rows, left=None)


def summary(results: Sequence[Compiled]) -> str:
    """Markdown, a row per kernel: ranges over its configurations, per architecture."""
    architectures = sorted({r.architecture for r in results})
    head = ("kernel", "configurations", *(f"sm_{a}: registers, shared KB, tensor cores" for a in architectures))
    rows = []

    def span(values: Sequence[float]) -> str:
        low, high = (f"{v:.0f}" for v in (min(values), max(values)))
        return low if low == high else f"{low}-{high}"

    for kernel in sorted({r.kernel for r in results}):
        cells = [kernel, str(len({r.name for r in results if r.kernel == kernel}))]
        for architecture in architectures:
            own = [r for r in results if r.kernel == kernel and r.architecture == architecture]
            gemms = [r.tensor_core for r in own if r.is_gemm]
            numbers = (span([r.registers for r in own]), span([r.shared_bytes / 1024 for r in own]))
            failed = sum(bool(r.failures()) for r in own)
            cells.append(", ".join((*numbers, span(gemms) if gemms else "-")) + f" ({failed} fail)" * (failed > 0))
        rows.append(cells)
    return marked.markdown(head, rows, TIGHT) + "\n"


def update_document(path: Path, results: Sequence[Compiled]) -> None:
    path.write_text(with_table(path.read_text(), "benchmarks.compiled", summary(results)))
