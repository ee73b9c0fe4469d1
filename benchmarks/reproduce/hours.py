"""What training each row costs on one GPU, as launch/plan.py fit estimates it: the tables of docs/reproduce.md."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.marked import TIGHT, markdown
from benchmarks.reproduce.published import (
    ZERO_SHOT,
    Row,
    Table,
    config_of,
    evaluation,
    overrides,
    tables,
    tokens_wanted,
    training,
    zero_shot_command,
)
from common.errors import UserError
from common.paths import REPOSITORY
from pretrain.cli.plan_fit import hours_text
from pretrain.config.schema import Config
from pretrain.planning.fit import check_on, with_overrides
from pretrain.planning.layout_plan import step_time
from pretrain.planning.machine import Machine, MachineOptions, machine
from pretrain.planning.measured import RESULTS, Measurements, measurements
from pretrain.planning.paces import Assumption, paces, why_no_time

NAME = "docs/reproduce.md"
PAGE = REPOSITORY / NAME
HEAD = ("row", "published", "tokens", "GPU hours", "rests on")
MARKED = re.compile(
    r"(<!-- benchmarks\.reproduce hours --gpu (\S+): begin -->\n)(.*?)(<!-- benchmarks\.reproduce hours: end -->)",
    re.DOTALL,
)


@dataclass(frozen=True)
class Estimate:
    """Of a whole run on one GPU."""

    fast: float
    """Hours."""
    slow: float
    basis: tuple[Assumption, ...]
    """What the time of computing rests on."""


def planned(name: str) -> Config:
    """The run with the settings of its command."""
    return with_overrides(config_of(name), overrides(name))


def estimate(name: str, on: Machine, measured: Measurements) -> Estimate:
    """The time that `plan.py fit` prints, without tracing its memory. Raises UserError where there is none."""
    config = planned(name)
    check_on(config, on)
    reason = why_no_time(config, on)
    if reason is not None:
        raise UserError(f"--gpu: {reason}, which launch/plan.py fit takes")
    found = paces(config, on, measured)
    fast, slow = (config.train.steps * terms.total / 3600 for terms in step_time(config, on, measured))
    basis = tuple(one for one in found.assumptions if one.what.startswith("computing"))
    return Estimate(fast, slow, basis)


def block(gpu: str, results: Path = RESULTS) -> str:
    """Markdown: for every table of the paper its rows with tokens and GPU hours, and its commands; then what the
    hours rest on. Raises UserError for a GPU that is not known."""
    on = machine(MachineOptions(gpu=gpu, gpus=1))
    measured = measurements(on.device, results)
    bases: dict[tuple[Assumption, ...], str] = {}
    parts = [_part(table, on, measured, bases) for table in tables()]
    notes = [f"- **{letter}**: {_basis_text(basis)}" for basis, letter in bases.items()]
    rests = f"GPU hours are those of one {on.device.what}. What they rest on:\n\n" + "\n".join(notes)
    return "\n\n".join([*parts, _zero_shot(), f"### What the hours rest on\n\n{rests}"]) + "\n"


def _part(table: Table, on: Machine, measured: Measurements, bases: dict[tuple[Assumption, ...], str]) -> str:
    rows, ends = [], [0.0, 0.0]
    for row in table.rows:
        if row.trained_as is not None:
            rows.append((f"`{row.name}`", row.published or "-", f"those of {row.trained_as}", "-", "-"))
            continue
        found = estimate(row.name, on, measured)
        letter = bases.setdefault(found.basis, chr(ord("a") + len(bases)))
        ends = [ends[0] + found.fast, ends[1] + found.slow]
        tokens = f"{tokens_wanted(row.name):,}"
        rows.append((f"`{row.name}`", row.published or "-", tokens, range_text(found.fast, found.slow), letter))
    text = f"### {table.title}: {table.unit}\n\n{markdown(HEAD, rows, TIGHT)}\n\n"
    text += f"Together {range_text(*ends)} GPU hours.\n\n"
    return text + "\n".join(f"    {line}" for line in _commands(table.rows))


def _zero_shot() -> str:
    """The published accuracies, and the commands that evaluate two trained models."""
    tasks = {"lambada": "LAMBADA", "blimp": "BLiMP", "cbt": "CBT"}
    rows = [(f"`{name}`", *(f"{found[task]:.1f}" for task in tasks)) for name, found in ZERO_SHOT.items()]
    commands = "\n".join(f"    {zero_shot_command(name)}" for name in ZERO_SHOT)
    return f"### Zero-shot: accuracy in percent\n\n{markdown(('row', *tasks.values()), rows, TIGHT)}\n\n{commands}"


def _commands(rows: Sequence[Row]) -> Iterator[str]:
    """Trained rows first: what is evaluated was trained by another table."""
    yield from (text for one in (training, evaluation) for row in rows if (text := one(row)) is not None)


def range_text(fast: float, slow: float) -> str:
    ends = hours_text(fast), hours_text(slow)
    return ends[0] if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}"


def _basis_text(basis: Sequence[Assumption]) -> str:
    return "; ".join(f"{one.what}: {one.value} [{_sources_text(one.source)}]" for one in basis)


def _sources_text(source: str) -> str:
    """Parts of one record together: `A on CARD, DATE; B on CARD, DATE` as `A, B on CARD, DATE`."""
    parts: dict[str, list[str]] = {}
    for one in source.split("; "):
        part, _, where = one.partition(" on ")
        parts.setdefault(where, []).append(part)
    return "; ".join(", ".join(found) + (f" on {where}" if where else "") for where, found in parts.items())


def updated(text: str, results: Path = RESULTS) -> str:
    """A page with every marked part anew. Raises UserError if no part is marked."""
    if not MARKED.search(text):
        raise UserError(
            f"{NAME}: no part is marked; put the tables between "
            "`<!-- benchmarks.reproduce hours --gpu h200: begin -->` and `<!-- benchmarks.reproduce hours: end -->`"
        )
    return MARKED.sub(lambda found: found[1] + block(found[2], results) + found[4], text)
