"""The paper's tables with what our runs gave: finished, unfinished and missing rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.marked import TIGHT, markdown
from benchmarks.reproduce.published import (
    ZERO_SHOT,
    Row,
    Table,
    evaluation,
    in_bits,
    tables,
    tokens_wanted,
    training,
    zero_shot_command,
)
from benchmarks.reproduce.runs import PaperRun, Unknown, figure
from common.tables import text_table

HEAD = ("row", "split", "published", "ours", "tokens", "of", "state", "run")
ZERO_SHOT_HEAD = ("row", "task", "published", "ours", "state", "run")
FIGURES = ("published", "ours", "tokens", "of")
MISSING = "missing"


def report(runs: Sequence[PaperRun], unknown: Sequence[Unknown], *, as_markdown: bool) -> str:
    """All tables, the commands of what is missing below each, and which run folders are in none."""
    parts = [_part(table, runs, as_markdown=as_markdown) for table in tables()]
    parts.append(_zero_shot(runs, as_markdown=as_markdown))
    if unknown:
        lines = [f"{one.path}: {one.reason}" for one in unknown]
        parts.append(_listed("Run folders that are in no table:", lines, as_markdown=as_markdown))
    return "\n\n".join(parts)


def _part(table: Table, runs: Sequence[PaperRun], *, as_markdown: bool) -> str:
    rows = [cells for row in table.rows for cells in rows_of(row, runs)]
    lacking = [row for row in table.rows if next(rows_of(row, runs))[6] == MISSING]
    missing = [text for row in lacking for text in (training(row), evaluation(row)) if text is not None]
    return _shown(f"{table.title}, {table.unit}", HEAD, rows, missing, as_markdown=as_markdown)


def _zero_shot(runs: Sequence[PaperRun], *, as_markdown: bool) -> str:
    rows, missing = [], []
    for name, published in ZERO_SHOT.items():
        mine = [run for run in runs if run.name == name]
        for task, percent in published.items():
            rows += [(name, task, f"{percent:.1f}", *_accuracy(run, task), str(run.view.path)) for run in mine]
            rows += [] if mine else [(name, task, f"{percent:.1f}", "-", MISSING, "")]
        if not any(run.accuracy(task) for run in mine for task in published):
            missing.append(zero_shot_command(name))
    return _shown("Zero-shot, accuracy in percent", ZERO_SHOT_HEAD, rows, missing, as_markdown=as_markdown)


def _accuracy(run: PaperRun, task: str) -> tuple[str, str]:
    """Ours, and its state."""
    found = run.accuracy(task)
    if found is None:
        return "-", "not evaluated"
    return f"{found[1]:.1f}", _progress(run, found[0]) + _differences(run)


def _shown(
    heading: str, head: Sequence[str], rows: Sequence[Sequence[str]], missing: Sequence[str], *, as_markdown: bool
) -> str:
    """A table, and the commands of what is missing. Columns of figures are right-aligned."""
    left = [number for number, name in enumerate(head) if name not in FIGURES]
    text = markdown(head, rows, TIGHT) if as_markdown else text_table(head, rows, left=left)
    part = f"### {heading}\n\n{text}" if as_markdown else f"{heading}\n{text}"
    return part + ("\n\n" + _listed("Missing:", missing, as_markdown=as_markdown) if missing else "")


def _listed(title: str, lines: Sequence[str], *, as_markdown: bool) -> str:
    indent = "    " if as_markdown else "  "
    return "\n".join([title, *([""] if as_markdown else []), *(indent + line for line in lines)])


def rows_of(row: Row, runs: Sequence[PaperRun]) -> Iterator[tuple[str, ...]]:
    """A line for every run of the row; one that says that it is missing if there is none."""
    mine = [run for run in runs if run.name == row.name]
    wanted = f"{tokens_wanted(row.name):,}"
    for run in mine:
        found = run.loss(row.split, row.memory_chunks)
        ours = "-" if found is None else figure(found[1], bits=in_bits(row.name))
        cells = (row.name, row.measured_on, row.published or "-", ours, f"{run.tokens:,}", wanted)
        yield (*cells, state(row, run), str(run.view.path))
    if not mine:
        yield (row.name, row.measured_on, row.published or "-", "-", "0", wanted, MISSING, "")


def state(row: Row, run: PaperRun) -> str:
    """Whether the figure of a run may stand beside the published one, and why not."""
    found = run.loss(row.split, row.memory_chunks)
    if found is None and run.is_whole:
        return f"trained, not evaluated on {row.measured_on} (python launch/evaluate.py)" + _differences(run)
    return _progress(run, None if found is None else found[0]) + _differences(run)


def _progress(run: PaperRun, measured: int | None) -> str:
    """Of a run whose figure is of step `measured`; None: it has none."""
    at = "" if measured in (None, run.view.step) else f", ours is of step {measured:,}"
    return ("finished" if run.is_whole else f"unfinished: {run.progress}") + at


def _differences(run: PaperRun) -> str:
    found = run.differences()
    return f"; differs in {', '.join(found)}" if found else ""
