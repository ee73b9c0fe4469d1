"""What the runs of a sweep came to: a table with the best first, and where a better value may lie outside of what was
tried. Nothing here imports torch."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from common.splits import SPLITS
from common.tables import folded_table, shortened, text_table
from common.terminal import visible
from pretrain.report.exit_codes import ExitCode
from pretrain.views.comparison import Run, data_digest, known
from pretrain.views.reading import RunView, State

TRAINING = "training"
BITS = " bits per byte"
"""What the name of a split ends with where losses are told so."""
STOPPED = (ExitCode.STOPPED, ExitCode.INTERRUPTED)


@dataclass(frozen=True, kw_only=True)
class SweepRun:
    """One combination of a sweep."""

    name: str
    """Of its run folder in the sweep's, e.g. `x,learning_rate=1e-3`."""
    config: str
    """Name of its configuration."""
    values: dict[str, str]
    """Dotted key -> value, as the user wrote it."""


@dataclass(frozen=True)
class Result:
    """What one run came to, so far."""

    run: SweepRun
    view: RunView | None
    """None: there is no run folder yet."""
    unrecorded: int | None = None
    """Exit code of the newest start, if that left no outcome in the run folder."""
    job: str = ""
    """SLURM's number of the newest job."""
    job_has_ended: bool = False
    """Where SLURM has said so."""

    @classmethod
    def read(cls, run: SweepRun, folder: Path, unrecorded: int | None, job: str) -> Result:
        """`folder`: of the sweep."""
        try:
            view = RunView.open(folder / run.name)
        except UserError:
            view = None
        return cls(run, view, unrecorded, job)

    @property
    def state(self) -> State | None:
        """None: not begun."""
        known = self.view.state if self.view is not None else None
        if self.unrecorded is None or known is State.FINISHED or (known is not None and known.goes_on):
            return known
        return State.STOPPED if self.unrecorded in STOPPED else State.FAILED

    @property
    def exit_code(self) -> int | None:
        outcome = self.view.outcome.get("exit_code") if self.view is not None else None
        return self.unrecorded if self.unrecorded is not None else outcome

    @property
    def is_diverged(self) -> bool:
        return self.state is State.FAILED and self.exit_code == ExitCode.DIVERGED

    @property
    def has_ended(self) -> bool:
        """Whether it will come to nothing else by itself."""
        return self.state in (State.FINISHED, State.FAILED)

    @property
    def state_text(self) -> str:
        if self.state is None:
            job = f" (job {self.job}{' has ended' * self.job_has_ended})" if self.job else ""
            return f"not begun{job}"
        if self.state is State.FAILED:
            return f"diverged at step {self.step}" if self.is_diverged else f"failed, code {self.exit_code}"
        place = f" at step {self.step}" if self.state in (State.STOPPED, State.DEAD) else ""
        return self.state.value + place

    @property
    def step(self) -> int:
        return self.view.step if self.view is not None else 0

    def loss(self, name: str) -> float:
        """The newest loss on the held-out split of that name, or the mean loss of the newest steps if it is `training`;
        nats per token, or bits per byte if its name says so. Infinite where it is not finite, NaN before the first."""
        if self.view is None:
            return math.nan
        if name == TRAINING:
            return Run("", self.view).loss_at("step", self.step)
        split = name.removesuffix(BITS)
        found = self.view.validations(split) if name == split else self.view.bits_per_byte(split)
        return known(found[-1][1]) if found else math.nan

    @property
    def tokens_per_second(self) -> float:
        """Median of all steps; NaN before the first."""
        column = Run("", self.view).column("tokens_per_second") if self.view is not None else np.array([])
        known = column[np.isfinite(column)]
        return float(np.median(known)) if len(known) else math.nan


def splits_of(results: Sequence[Result]) -> list[str]:
    """Those on which runs were validated, the one of most runs first; `validation` before any was."""
    found: dict[str, int] = {split: sum(math.isfinite(result.loss(split)) for result in results) for split in SPLITS}
    return sorted((split for split in found if found[split]), key=lambda split: -found[split]) or ["validation"]


def loss_name(results: Sequence[Result]) -> str:
    """By which loss the runs are ranked: that on the split on which most of them were validated, or `training` if none
    was. Losses on another split say nothing of it. In bits per byte where the runs read different data, which may have
    different tokenizers, and all have recorded it."""
    split = splits_of(results)[0]
    validated = [result for result in results if math.isfinite(result.loss(split))]
    if not validated:
        return TRAINING
    digests = {data_digest(result.view) for result in validated if result.view is not None}
    has_bits = len(digests) > 1 and all(math.isfinite(result.loss(split + BITS)) for result in validated)
    return split + BITS * has_bits


def shown_losses(results: Sequence[Result]) -> list[str]:
    """Names of the losses of a table: first that by which the runs are ranked, if it is in bits per byte."""
    name = loss_name(results)
    return [*([name] if name.endswith(BITS) else []), *splits_of(results), TRAINING]


def ranked(results: Sequence[Result]) -> list[Result]:
    """The finished ones first, and of these the lowest loss first; the others in the same order after them."""
    name = loss_name(results)

    def place(result: Result) -> tuple[bool, bool, float]:
        loss = result.loss(name)
        return result.state is not State.FINISHED, not math.isfinite(loss), loss if math.isfinite(loss) else 0.0

    return sorted(results, key=place)


def table(results: Sequence[Result], keys: Sequence[str]) -> list[list[str]]:
    """Header and rows, the best run first."""
    losses = shown_losses(results)
    rows = [["config", *keys, "state", "step", *losses, "tokens/s", "run"]]
    for result in ranked(results):
        last = result.view.last_step if result.view is not None else None
        rows.append(
            [
                result.run.config,
                *(result.run.values[key] for key in keys),
                result.state_text,
                f"{result.step:,}" + (f" of {last:,}" if last else ""),
                *(_loss_text(loss) for loss in map(result.loss, losses)),
                f"{result.tokens_per_second:,.0f}" if math.isfinite(result.tokens_per_second) else "-",
                result.run.name,
            ]
        )
    return rows


def _loss_text(loss: float) -> str:
    return "-" if math.isnan(loss) else f"{loss:.4f}" if math.isfinite(loss) else "not finite"


def table_text(results: Sequence[Result], keys: Sequence[str], *, width: int | None = None) -> str:
    """For a terminal of that width. Where it is narrow, keys are short and the only configuration goes without saying;
    where a column for each key is too much for it, the runs' names say the values, or if they look alike when they are
    cut, the values alone."""
    (config, *titles), *rows = table(results, keys)
    short, count = short_keys(keys), len(keys)
    others = titles[count:]
    begin = int(len({row[0] for row in rows}) == 1)
    for named, first in ((keys, 0), ([short[key] for key in keys], 0), ([short[key] for key in keys], begin)):
        # The folder's name, which is last, says what the other columns say.
        header = [config, *named, *others][first:-1]
        whole = visible(text_table(header, [row[first:-1] for row in rows], left=range(count + 2 - first)))
        if width is None or max(map(len, whole.splitlines())) <= width:
            return whole
    assert width is not None, "a table without a limit is returned above"
    title, labels = others[-1], [row[-1] for row in rows]
    if len({shortened(label, width // 2 - 1) for label in labels}) < len(labels):
        title, labels = ", ".join(short.values()), [", ".join(row[begin : count + 1]) for row in rows]
    told = [[label, *row[count + 1 : -1]] for label, row in zip(labels, rows, strict=True)]
    return visible(folded_table([title, *others[:-1]], told, width=width, left=(0, 1)))


def without_seeds(keys: Sequence[str]) -> list[str]:
    return [key for key in keys if not key.endswith("seed")]


def over_seeds(results: Sequence[Result], keys: Sequence[str]) -> list[list[Result]]:
    """Finished runs with a loss: those together that differ in their seeds alone, the lowest mean loss first."""
    name, others, groups = loss_name(results), without_seeds(keys), dict[tuple[str, ...], list[Result]]()
    for result in results:
        if result.state is State.FINISHED and math.isfinite(result.loss(name)):
            group = result.run.config, *(result.run.values[key] for key in others)
            groups.setdefault(group, []).append(result)
    return sorted(groups.values(), key=lambda group: statistics.fmean(result.loss(name) for result in group))


def seeds_table(results: Sequence[Result], keys: Sequence[str]) -> list[list[str]]:
    """Header and rows, the best first: of finished runs that differ in their seeds alone the mean loss and its standard
    deviation (of a sample). Empty where no two such runs are there."""
    name, groups = loss_name(results), over_seeds(results, keys)
    if max(map(len, groups), default=0) < 2:
        return []
    others = without_seeds(keys)
    rows = [["config", *others, "seeds", f"mean {name}", "deviation"]]
    for group in groups:
        losses = [result.loss(name) for result in group]
        deviation = f"{statistics.stdev(losses):.4f}" if len(losses) > 1 else "-"
        combination = [group[0].run.config, *(group[0].run.values[key] for key in others)]
        rows.append([*combination, f"{len(losses)}", f"{statistics.fmean(losses):.4f}", deviation])
    return rows


def seeds_text(results: Sequence[Result], keys: Sequence[str], *, width: int | None = None) -> str:
    """`seeds_table` for a terminal of that width; empty where it is."""
    found = seeds_table(results, keys)
    return visible(folded_table(found[0], found[1:], width=width, left=range(len(found[0]) - 3))) if found else ""


def table_csv(results: Sequence[Result], keys: Sequence[str]) -> str:
    """With every number in full, and nothing where there is none."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    losses = shown_losses(results)
    names = [name.replace(" ", "_") if name.endswith(BITS) else f"{name}_loss" for name in losses]
    header = ["run", "config", *keys, "state", "step", *names, "tokens_per_second"]
    writer.writerow(header)
    for result in ranked(results):
        numbers = (*map(result.loss, losses), result.tokens_per_second)
        written = [repr(number) if math.isfinite(number) else "" for number in numbers]
        values = [result.run.values[key] for key in keys]
        writer.writerow([result.run.name, result.run.config, *values, result.state_text, result.step, *written])
    return text.getvalue()


def short_keys(keys: Sequence[str]) -> dict[str, str]:
    """Each key by its last part, where that says which of them it is; one of an entry of a list with the list and the
    entry, `sources.0.weight`."""
    tails = {key: re.search(r"([^.]+\.[0-9]+\.)*[^.]*$", key) for key in keys}
    found = {key: tail[0] if tail is not None else key for key, tail in tails.items()}
    return {key: tail if list(found.values()).count(tail) == 1 else key for key, tail in found.items()}


def content_of(value: str) -> list[str]:
    """What a list or a section holds, without the names of its keys; of any other value the value itself."""
    try:
        tree = json.loads(value, parse_float=str, parse_int=str)  # numbers as the user wrote them
        return list(_leaves(tree)) if isinstance(tree, dict | list) else [value]
    except (ValueError, RecursionError):  # no JSON, or too deep for Python
        return [value]


def _leaves(tree: Any) -> Iterator[str]:
    if isinstance(tree, dict | list):
        for entry in tree.values() if isinstance(tree, dict) else tree:
            yield from _leaves(entry)
    else:
        yield tree if isinstance(tree, str) else json.dumps(tree)


def number_of(value: str) -> float | None:
    """The number that a value is; None if it is none."""
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return None
    return float(found) if isinstance(found, int | float) and not isinstance(found, bool) else None


def edges(results: Sequence[Result], keys: Sequence[str]) -> list[str]:
    """For every configuration all of whose runs have ended: each key whose best value is the lowest or the highest
    tried, as a sentence. Seeds have no better side; of runs that differ in them alone the mean counts."""
    said, configs = [], dict.fromkeys(result.run.config for result in results)
    for config in configs:
        of_config = [result for result in results if result.run.config == config]
        groups = over_seeds(of_config, keys)
        if not groups or not all(result.has_ended for result in of_config):
            continue
        best = groups[0][0]
        for key in without_seeds(keys):
            tried = [number for result in of_config if (number := number_of(result.run.values[key])) is not None]
            chosen = number_of(best.run.values[key])
            if chosen is None or len(set(tried)) < 2 or min(tried) < chosen < max(tried):
                continue
            if chosen == 0 == min(tried):
                continue  # no key takes less than nothing
            side, more = ("lowest", "lower") if chosen == min(tried) else ("highest", "higher")
            which = f"{config}: " if len(configs) > 1 else ""
            said.append(f"{which}the best {key}, {best.run.values[key]}, is the {side} tried: try {more} ones")
    return said
