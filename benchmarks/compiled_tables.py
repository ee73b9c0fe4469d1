"""Tables of compiled configurations, for benchmarks/compiled.py: on the terminal and in docs/kernels.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import marked
from benchmarks.marked import TIGHT, with_table
from common.tables import text_table

if TYPE_CHECKING:
    from benchmarks.compiled_case import Compiled

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
