"""The tables and pictures of docs/benchmarks.md, made of the records in benchmarks/results/cpu.

    python -m benchmarks.page [--check]

A table stands between two comments that name its record. Under it stand the machine, the date and the command. The
module of a record has `page(found)`, which gives the table in Markdown, and may have `draw(found, path)`, which gives
docs/pictures/benchmark-WHAT.png. Nothing of them is written by hand.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.marked import with_table
from benchmarks.records import RESULTS, Kept, heading, read
from common.paths import REPOSITORY

DOCUMENT = REPOSITORY / "docs" / "benchmarks.md"
PICTURES = REPOSITORY / "docs" / "pictures"
MODULES = {
    "families": "benchmarks.families",
    "growth": "benchmarks.growth.table",
    "loop-speed": "benchmarks.loop.speed",
    "loop-start": "benchmarks.loop.start",
    "moe-layers": "benchmarks.moe_layers",
    "switchhead-layers": "benchmarks.kernels_switchhead",
    "preparation": "benchmarks.data.preparation",
    "preparation-memory": "benchmarks.data.memory",
    "reading": "benchmarks.data.reading",
    "checkpoint-stall": "benchmarks.checkpoint",
}
"""Record -> the module that knows its form."""


def updated(text: str, results: Path = RESULTS) -> str:
    """`text` with every table anew. Raises ValueError for a mark that it lacks or that names no record."""
    named = re.findall(r"<!-- benchmarks\.page ([\w-]+): begin -->", text)
    if sorted(named) != sorted(MODULES):
        raise ValueError(f"the page has the tables {sorted(named)}, benchmarks/page.py has {sorted(MODULES)}")
    for what in MODULES:
        kept = read(what, results)
        text = with_table(text, f"benchmarks.page {what}", section(kept) if kept else "Not measured yet.")
    return text


def section(kept: Kept) -> str:
    """Table and origin."""
    table = importlib.import_module(MODULES[kept.what]).page(kept.found)
    return f"{table}\n\n{heading(kept.about)}; `{kept.command}`"


def draw(results: Path = RESULTS, pictures: Path = PICTURES) -> list[Path]:
    """Every picture of what was measured. Returns their paths."""
    paths = []
    for what, name in MODULES.items():
        kept, module = read(what, results), importlib.import_module(name)
        if kept is not None and hasattr(module, "draw"):
            paths.append(pictures / f"benchmark-{what}.png")
            module.draw(kept.found, paths[-1])
    return paths


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.page", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="exit status 1 if the page is not that of the records")
    args = parser.parse_args(arguments)
    try:
        before = DOCUMENT.read_text(encoding="utf-8")
        after = updated(before)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.check:
        if after != before:
            print("docs/benchmarks.md is not that of the records: python -m benchmarks.page", file=sys.stderr)
        return int(after != before)
    DOCUMENT.write_text(after, encoding="utf-8")
    for path in draw():
        print(path.relative_to(REPOSITORY))
    return 0


if __name__ == "__main__":
    sys.exit(main())
