"""The paper's tables with what our runs gave: finished, unfinished and missing rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.reproduce.published import Row, Table, command, in_bits, tables, tokens_wanted
from benchmarks.reproduce.runs import PaperRun, Unknown, figure
from common.tables import text_table

HEAD = ("row", "split", "published", "ours", "tokens", "of", "state", "run")
LEFT = (0, 1, 6, 7)
MISSING = "missing"


def report(runs: Sequence[PaperRun], unknown: Sequence[Unknown], *, as_markdown: bool) -> str:
    """All tables, the commands of what is missing below each, and which run folders are in none."""
    parts = [_part(table, runs, as_markdown=as_markdown) for table in tables()]
    if unknown:
        lines = [f"{one.path}: {one.reason}" for one in unknown]
        parts.append(_listed("Run folders that are in no table:", lines, as_markdown=as_markdown))
    return "\n\n".join(parts)


def _part(table: Table, runs: Sequence[PaperRun], *, as_markdown: bool) -> str:
    rows = [cells for row in table.rows for cells in rows_of(row, runs)]
    heading = f"{table.title}, {table.unit}"
    text = markdown(HEAD, rows) if as_markdown else text_table(HEAD, rows, left=LEFT)
    part = f"### {heading}\n\n{text}" if as_markdown else f"{heading}\n{text}"
    missing = [command(row) for row in table.rows if next(rows_of(row, runs))[6] == MISSING]
    return part + ("\n\n" + _listed("Missing:", missing, as_markdown=as_markdown) if missing else "")


def _listed(title: str, lines: Sequence[str], *, as_markdown: bool) -> str:
    indent = "    " if as_markdown else "  "
    return "\n".join([title, *([""] if as_markdown else []), *(indent + line for line in lines)])


def rows_of(row: Row, runs: Sequence[PaperRun]) -> Iterator[tuple[str, ...]]:
    """A line for every run of the row; one that says that it is missing if there is none."""
    mine = [run for run in runs if run.name == row.name]
    wanted = f"{tokens_wanted(row.name):,}"
    for run in mine:
        found = run.loss(row.split)
        ours = "-" if found is None else figure(found[1], bits=in_bits(row.name))
        cells = (row.name, row.split, row.published or "-", ours, f"{run.tokens:,}", wanted)
        yield (*cells, state(row, run), str(run.view.path))
    if not mine:
        yield (row.name, row.split, row.published or "-", "-", "0", wanted, MISSING, "")


def state(row: Row, run: PaperRun) -> str:
    """Whether the figure of a run may stand beside the published one, and why not."""
    found, step = run.loss(row.split), run.view.step
    at = "" if found is None or found[0] == step else f", ours is of step {found[0]:,}"
    if not run.is_whole:
        text = f"unfinished: {run.progress}{at}"
    elif found is None:
        text = f"trained, not evaluated on {row.split} (python launch/evaluate.py)"
    else:
        text = f"finished{at}"
    differences = run.differences()
    return text + (f"; differs in {', '.join(differences)}" if differences else "")


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; a | in a cell would end it."""
    lines = [f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])
