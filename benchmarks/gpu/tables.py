"""The tables of docs/gpu.md, made of the records under benchmarks/results/, that of docs/untested-on-gpu.md, which is
the list of `visit`, and the table that a command ends with.

    python -m benchmarks.gpu tables [--check]

Each table stands between two comments that name it. A table without a record says so; nothing in it is written by hand.
"""

from __future__ import annotations

import argparse
import functools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import marked
from benchmarks.gpu import ceilings, record
from benchmarks.gpu.record import FAILED, PASSED, SKIPPED, Entry
from benchmarks.marked import with_table

DOCUMENT = record.ROOT / "docs" / "gpu.md"
NEXT = record.ROOT / "docs" / "untested-on-gpu.md"
EMPTY = "Not run on a GPU yet.\n"
Rows = list[tuple[str, ...]]
FORMER = "racecheck reached"
"""A part of records of 2026-11-27, which knew its own record alone; `race_rows` reads all."""


def add_command(commands: Any) -> None:
    what = "write the tables of docs/gpu.md from the records, and the list of visit in docs/untested-on-gpu.md"
    parser = commands.add_parser("tables", help=what, description=what)
    parser.add_argument(
        "--check", action="store_true", help="exit status 1 if the tables are not what they are made of"
    )
    parser.set_defaults(act=act)


def act(options: argparse.Namespace) -> int:
    status = 0
    for path, after_of in ((DOCUMENT, functools.partial(updated, results=record.RESULTS)), (NEXT, with_list)):
        before = path.read_text(encoding="utf-8")
        after = after_of(before)
        if not options.check:
            path.write_text(after, encoding="utf-8")
        elif after != before:
            print(f"docs/{path.name}: its tables are not what they are made of: python -m benchmarks.gpu tables")
            status = 1
    return status


def with_list(text: str) -> str:
    """docs/untested-on-gpu.md with the list of `visit`."""
    from benchmarks.gpu.visit import document_rows

    return with_table(text, "benchmarks.gpu visit", markdown(document_rows()))


def updated(text: str, results: Path) -> str:
    """`text` with every table of `TABLES` anew. ValueError for a marker that it lacks or that names no table."""
    named = re.findall(r"<!-- benchmarks\.gpu (\w+): begin -->", text)
    if sorted(named) != sorted(TABLES):
        raise ValueError(f"docs/gpu.md has the tables {sorted(named)}, benchmarks/gpu/tables.py has {sorted(TABLES)}")
    for name, (command, rows_of) in TABLES.items():
        text = with_table(text, f"benchmarks.gpu {name}", document_table(results, command, rows_of))
    return text


def document_table(results: Path, command: str, rows_of: Callable[[list[Entry]], Rows]) -> str:
    """The newest entries of every card, card by card, each under a line that says on what and when; below them what was
    measured before by other versions, sources or drivers and not since, as after a visit that did not reach its end."""
    pieces = []
    for path in sorted(results.glob(f"*/{command}.jsonl")):
        for number, entries in enumerate((latest(record.read(path)), *_measured_before(record.read(path)))):
            rows = rows_of(entries)
            if len(rows) < 2:
                continue
            one = entries[-1]
            on = one.identity
            versions = f"driver {on['driver']}, Python {on['python']}, torch {on['torch']}, triton {on['triton']}"
            when = f"{one.date[:10]}, revision {one.revision}"
            before = ", by earlier sources or versions and not since" if number else ""
            pieces.append(f"{on['card']}, {versions}; {when}{before}:\n\n{markdown(rows)}")
    return "\n".join(pieces) if pieces else EMPTY


def _measured_before(entries: Sequence[Entry]) -> Iterator[list[Entry]]:
    """The parts that passed on an earlier identity and have not ended on a later one, the newest identity first."""
    ended: set[str] = set()
    others = list(entries)
    while others:
        mine = [e for e in others if e.identity == others[-1].identity]
        others = [e for e in others if e.identity != mine[-1].identity]
        if mine[-1] is not entries[-1]:
            last = {e.part: e for e in mine}
            if left := [e for part, e in last.items() if e.status == PASSED and part not in ended]:
                yield left
        ended |= {e.part for e in mine if e.status in (PASSED, FAILED)}


def latest(entries: Sequence[Entry]) -> list[Entry]:
    """The last entry of every part, of the identity of the last entry."""
    if not entries:
        return []
    mine = [e for e in entries if e.identity == entries[-1].identity]
    return list({e.part: e for e in mine}.values())


def markdown(rows: Rows) -> str:
    return marked.markdown(rows[0], rows[1:], marked.TIGHT) + "\n"


def entries_table(entries: Sequence[Entry]) -> str:
    """What a command prints at its end: a row per part."""
    rows: Rows = [("part", "status", "s", "measured")]
    rows += [(e.part, e.status, f"{e.seconds:.1f}", headline(e)) for e in entries]
    return markdown(rows)


def headline(entry: Entry) -> str:
    """The one number of a part, or why there is none."""
    result = entry.result
    if "reason" in result:
        return str(result["reason"]).splitlines()[0][:160]
    for key, (unit, scale) in UNITS.items():
        if result.get(key) is not None:
            return f"{result[key] / scale:.4g} {unit}"
    if "backends" in result:
        return "; ".join(f"{row['backend']} {_backend(row)}" for row in result["backends"] if "skipped" not in row)
    return ""


UNITS = {
    "bytes_per_second": ("TB/s", 1e12),
    "flops_per_second": ("TF/s", 1e12),
    "wall_seconds": ("s", 1.0),
    "tokens_per_second": ("tokens/s", 1.0),
    "gain_percent": ("% less time than today's tiles", 1.0),
    "time_over_macs": ("x the dense layer's time, over the ratio of MACs", 1.0),
}
"""Key of a result -> its unit in a table."""


def _backend(row: dict[str, Any]) -> str:
    if "reason" in row:
        return "failed"
    if "error" in row:
        return f"{row['error']:.1e}" + ("" if row.get("repeats") else " (other bits when repeated)")
    return ", ".join(f"{phase} {row[phase]['ms']:.4g} ms" for phase in ("forward", "backward") if phase in row)


def ceiling_rows(entries: list[Entry]) -> Rows:
    rows: Rows = [("ceiling", "measured", "a tenth below, a tenth above (ms)")]
    for entry in entries:
        if entry.part in (ceilings.COPY, ceilings.PRODUCT) and entry.status == PASSED:
            result = entry.result
            rows.append((entry.part.split()[1], headline(entry), f"{result['low']:.4g}, {result['high']:.4g}"))
    return rows


def truth_rows(entries: list[Entry]) -> Rows:
    """A row per kind of check, model and dtype."""
    groups: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        if not entry.part.startswith("ceiling") and entry.part != FORMER:
            groups[" ".join(word for word in entry.part.split()[:3] if "=" not in word)].append(entry)
    rows: Rows = [("check", "parts", "passed", "failed", "skipped", "largest relative error")]
    for name, members in groups.items():
        counts = [sum(e.status == status for e in members) for status in (PASSED, FAILED, SKIPPED)]
        found = [row["error"] for e in members for row in e.result.get("backends", ()) if "error" in row]
        rows.append((name, str(len(members)), *map(str, counts), f"{max(found, key=_nan_last):.1e}" if found else "-"))
    return rows


def _nan_last(error: float) -> tuple[bool, float]:
    """A key for `max`, to which a NaN is not larger than a number."""
    return math.isnan(error), error


def race_rows(entries: list[Entry]) -> Rows:
    """Which kernels that run in 8 warps racecheck saw, and which not."""
    from benchmarks.gpu import sanitizer

    seen, others = sanitizer.reached({e.part: e.result for e in entries if e.status == PASSED})
    rows: Rows = [("kernels in 8 warps", "which")]
    if seen:
        rows.append(("seen by racecheck", ", ".join(sorted(seen))))
        rows.append(("not seen", ", ".join(sorted(others)) or "none"))
    return rows


def kernel_rows(entries: list[Entry]) -> Rows:
    """Of every kernel and of attention: medians and the share of the roofline, or of the product's rate."""
    rows: Rows = [("work", "by", "forward ms", "of its roofline", "backward ms", "of its roofline")]
    for entry in entries:
        if entry.part.startswith(("kernel ", "attention ", "sparse ")):
            for found in entry.result.get("backends", ()):
                cells = [cell for phase in ("forward", "backward") for cell in _phase(found.get(phase))]
                if any(cell != "-" for cell in cells):
                    rows.append((entry.part.removeprefix("kernel "), found["backend"], *cells))
    return rows


def _phase(found: dict[str, float] | None) -> tuple[str, str]:
    if found is None:
        return "-", "-"
    share = found.get("of_roofline", found.get("of_ceiling", 0.0))
    return f"{found['ms']:.4g} ({found['low']:.4g} to {found['high']:.4g})", f"{share:.1%}"


def step_rows(entries: list[Entry]) -> Rows:
    """Of every micro-step, and of a block."""
    times_head = ("wall ms", "GPU busy ms", "idle ms", "host ms")
    rows: Rows = [("micro-step", "tokens/s", "MFU", "of the product's rate", *times_head, "launches", "peak GB")]
    for entry in entries:
        r = entry.result
        if entry.part.startswith("micro-step ") and entry.status == PASSED:
            times = (f"{r[key]:.4g}" for key in ("wall_ms", "busy_ms", "idle_ms", "host_ms"))
            peak = f"{r['peak_bytes'] / 1e9:.1f}" if "peak_bytes" in r else "-"
            name = entry.part.removeprefix("micro-step ")
            rows.append((name, *_speed_cells(r), *times, str(r["launches"]), peak))
            if "today" in r:
                wall = f"{r['today']['wall_ms']:.4g}"
                rows.append((f"{name}: with today's tiles", *_speed_cells(r["today"]), wall, *["-"] * 5))
    return rows


def _speed_cells(r: dict[str, Any]) -> tuple[str, ...]:
    mfu = f"{r['mfu']:.1%}" if "mfu" in r else "-"
    return f"{r['tokens_per_second']:,.0f}", mfu, f"{r['flops_of_ceiling']:.1%}"


def block_rows(entries: list[Entry]) -> Rows:
    rows: Rows = [("block", "layer", "parameters", "forward + backward ms", "attention alone ms", "ratio over MACs")]
    for entry in entries:
        if entry.part.startswith("block ") and entry.status == PASSED:
            for kind in ("model", "dense", "today"):
                if kind not in entry.result:
                    continue
                r = entry.result[kind]
                alone = f"{r['attention']['ms']:.4g}" if "attention" in r else "-"
                ratio = f"{entry.result['time_over_macs']:.3g}" if kind == "model" and "attention" in r else "-"
                name = entry.part.removeprefix("block ")
                rows.append((name, kind, f"{r['parameters']:,}", f"{r['block']['ms']:.4g}", alone, ratio))
    return rows


def tile_rows(entries: list[Entry]) -> Rows:
    """Of every kernel whose tiles were searched."""
    from benchmarks.gpu import tune

    rows: Rows = [("kernel, shape", "today", "best", "gain", "candidates, rejected")]
    for entry in entries:
        if entry.status == PASSED:
            counts = f"{len(entry.result['candidates'])}, {entry.result['rejected']}"
            rows.append((entry.part, *tune.summary(entry.result), counts))
    return rows


def run_rows(entries: list[Entry]) -> Rows:
    rows: Rows = [("run", "status", "first loss", "last loss", "tokens/s", "said")]
    for entry in entries:
        losses = entry.result.get("losses") or ["-"]
        ends = (f"{x:.4f}" if isinstance(x, float) else "-" for x in (losses[0], losses[-1]))
        speed = entry.result.get("tokens_per_second") or "-"
        rows.append((entry.part, entry.status, *ends, str(speed), headline(entry) if "reason" in entry.result else ""))
    return rows


TABLES: dict[str, tuple[str, Callable[[list[Entry]], Rows]]] = {
    "ceilings": ("truth", ceiling_rows),
    "truth": ("truth", truth_rows),
    "races": ("truth", race_rows),
    "kernels": ("speed", kernel_rows),
    "block": ("speed", block_rows),
    "micro_steps": ("speed", step_rows),
    "runs": ("run", run_rows),
    "tiles": ("tune", tile_rows),
}
"""Name of a table in docs/gpu.md -> the command whose record it comes from, and its rows, the first of which is the
head."""
