"""What `tune` found faster than today's tiles, and what is done with it: put in place for a measurement (`speed`), or
written into the table of measured tiles:

    python -m benchmarks.gpu apply [--results FOLDER] [--least-gain 1]

writes model/kernels/triton/tiles.json from the newest record of every card. Entries of other launches stay. After it:
`python -m benchmarks.compiled --check`, the tests, and on the card `truth` and `speed` again.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import record
from benchmarks.gpu.command import Context, Unavailable
from benchmarks.gpu.record import PASSED, Record
from benchmarks.gpu.tile_search import text
from common.files import write_json
from model.kernels.triton import tiles
from model.kernels.triton.tiles import Entry, Table

LEAST_GAIN = 1.0
"""Percent; less is within what rounds differ by."""


def winners(entries: Sequence[record.Entry], least_gain: float = LEAST_GAIN) -> list[Entry]:
    """Of the parts of `tune` that passed and whose best tiles take less time than today's by `least_gain` percent."""
    found = []
    for one in entries:
        result = one.result
        if one.status == PASSED and result.get("gain_percent", 0.0) >= least_gain:
            best = {"tiles": result["best"]["tiles"], "measured": _source(one)}
            found.append(dataclasses.replace(tiles.entry_of(result["entry"]), **best))
    return found


def _source(one: record.Entry) -> dict[str, Any]:
    on, result = one.identity, one.result
    times = {"ms": result["best"]["ms"], "before": text(result["today"]["tiles"]), "before_ms": result["today"]["ms"]}
    return {"card": on["card"], "triton": on["triton"], "date": one.date[:10], "part": one.part} | times


def launched(entries: Iterable[Entry], table: Table) -> list[str]:
    """The tiles of `entries` that a launch took while they were in the table, as a record names them."""
    found = []
    for entry in entries:
        if entry.key in table.used:
            shape = " ".join(f"{name}={value}" for name, value in entry.shape.items())
            found.append(f"{entry.kernel} {shape}: {text(dict(entry.tiles))}")
    return found


def of_here(context: Context) -> list[Entry]:
    """Of this card and these sources. Unavailable if there are none."""
    done = Record(context.results, "tune", record.identity(context.device.type)).done()
    if not done:
        raise Unavailable("tune has recorded nothing for this card and these sources")
    found = winners(list(done.values()))
    if not found:
        raise Unavailable(f"today's tiles are the fastest, in all {len(done)} parts that tune has recorded")
    return found


def add_command(commands: Any) -> None:
    what = "write what tune found into the table of measured tiles"
    parser = commands.add_parser("apply", help=what, description=what)
    parser.add_argument("--results", type=Path, default=record.RESULTS, help="folder of the records (default: ours)")
    parser.add_argument("--least-gain", type=float, default=LEAST_GAIN, metavar="PERCENT", help="default 1")
    parser.set_defaults(act=act)


def act(options: argparse.Namespace, file: Path | None = None) -> int:
    """Of several cards of one capability the last in the order of their names counts."""
    from benchmarks.gpu.tables import latest

    file = file or tiles.FILE
    table = tiles.load(file)
    before = dict(table)
    for path in sorted(options.results.glob("*/tune.jsonl")):
        entries = latest(record.read(path))
        if entries and entries[-1].identity["driver"] != record.NO_DRIVER:  # a CPU's only test the command
            table.update({one.key: one for one in winners(entries, options.least_gain)})
    for key, one in table.items():
        if before.get(key) != one:
            said = one.measured
            print(f"{said['part']}: {text(dict(one.tiles))}: {said['ms']:.4g} ms, {said['before_ms']:.4g} before")
    write_json(file, [one.as_json() for one in table.values()])
    print(f"{file.name}: {len(table)} entries. Next: python -m benchmarks.compiled --check, then truth on the card")
    return 0
