"""What tells runs apart: settings, software, losses at equal steps, tokens and FLOPs, and the first step that differs.

The first run is the one that the others are compared with. Nothing here imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from common.errors import UserError
from common.splits import SPLITS, SplitName
from common.tables import counted
from common.terminal import visible
from common.urls import URL
from pretrain.config.keys import flatten
from pretrain.config.loading import MADE_OF_SETTINGS
from pretrain.config.validated import has_effect
from pretrain.views.reading import RunView

AXES = {"step": "steps", "tokens": "tokens", "flops": "training FLOPs"}
"""Key -> what a person calls it."""
TIMES = ("tokens_per_second", "step_seconds", "data_wait_seconds", "flops_per_second", "flops_utilization")
NOT_COMPARED = {
    "step",
    *("memory_bytes", "memory_peak_bytes", "memory_reserved_bytes"),
    *("slowest_rank", "slowest_rank_behind_seconds"),
    *TIMES,
}
"""Values of a step that two equal runs need not share: those of the machine."""
WINDOW = 20
"""Points, at most, whose mean is the loss at a place: single losses scatter by more than runs differ."""
SAME_RATE = 1e-9
"""Relative difference of two quotients of floats that stand for the same FLOPs per token."""
DIGEST = "data digest"
"""What differs where data do, wherever they lie."""
VALIDATIONS = 8
"""Most validations that are listed."""


@dataclass(frozen=True)
class Run:
    """A run as arrays by step."""

    label: str
    view: RunView

    def column(self, key: str) -> np.ndarray:
        """[steps] fp64, NaN where there is no value. `flops`: training FLOPs since the first step."""
        if key == "flops":
            return self._flops()
        return np.asarray(self.view.metrics.column(key), dtype=np.float64)

    @property
    def flops_per_token(self) -> float:
        """The median of all steps; NaN in a run of a version that did not record them."""
        rate = self._flops_rate()
        known = rate[np.isfinite(rate)]
        return float(np.median(known)) if len(known) else math.nan

    def _flops_rate(self) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):  # a warning of numpy's is none for a reader
            return self.column("flops_per_second") / self.column("tokens_per_second")

    def _flops(self) -> np.ndarray:
        tokens, rate, usual = self.column("tokens"), self._flops_rate(), self.flops_per_token
        rate = np.where(np.isfinite(rate), rate, usual)
        if not np.any(np.abs(rate - usual) > SAME_RATE * usual):
            return tokens * usual
        return np.cumsum(np.diff(tokens, prepend=0.0) * rate)  # a resume changed the model, such as its context

    def window_at(self, axis: str, place: float) -> float:
        """Where the last points up to `place` begin whose mean is a loss; NaN if the run has not been there."""
        x = self.column(axis)
        if not len(x) or not np.isfinite(x[-1]) or x[-1] < place or x[0] > place:
            return math.nan
        end = int(np.searchsorted(x, place, side="right"))
        return float(x[max(0, end - min(WINDOW, max(1, end // 10)))])

    def loss_at(self, axis: str, place: float) -> float:
        """Mean loss of the last points up to `place`; NaN if the run has not been there."""
        begin = self.window_at(axis, place)
        return math.nan if math.isnan(begin) else self.loss_between(axis, begin, place)

    def loss_between(self, axis: str, begin: float, place: float) -> float:
        """Mean of the finite losses from `begin` to `place`, of the last point up to there at least; infinite where
        none is finite, NaN without one."""
        x, y = self.column(axis), self.column("loss")
        end = int(np.searchsorted(x, place, side="right"))
        near = y[min(int(np.searchsorted(x, begin)), max(0, end - 1)) : end]
        finite = near[np.isfinite(near)]
        if not len(finite) and (not len(near) or "loss" not in self.view.metrics.names):
            return math.nan
        return float(finite.mean()) if len(finite) else math.inf


@dataclass(frozen=True)
class Difference:
    """Where a value of two runs begins to differ."""

    key: str
    step: int
    values: tuple[float, float]
    """At that step, of the first run and of the other."""
    largest: float
    """Largest relative difference over the steps that both have."""
    largest_step: int
    beyond: int | None
    """The first step whose relative difference is more than the tolerance; None: no step's is."""


def known(loss: float) -> float:
    """A loss that was computed: infinite where it is not finite, for NaN says that there is none."""
    return loss if math.isfinite(loss) else math.inf


def open_runs(views: Sequence[RunView]) -> list[Run]:
    """Raises UserError if a run has no step yet. Labels are folder names, with as much of the path as is needed."""
    for view in views:
        if not len(view.metrics):
            if view.metrics.damaged:
                raise UserError(
                    f"RUN: {view.path} has no step in metrics.jsonl, whose {counted(view.metrics.damaged, 'line')} are "
                    f"damaged; name another run"
                )
            raise UserError(f"RUN: {view.path} has no step in metrics.jsonl yet; wait for its first one")
    parts = [view.path.absolute().parts for view in views]
    depth = 1
    while len({p[-depth:] for p in parts}) < len(set(parts)):
        depth += 1
    labels = [visible("/".join(p[-depth:])) for p in parts]  # a page and a picture take no half of a character
    return [
        Run(label if labels.count(label) == 1 else f"{label} ({n + 1})", view)
        for n, (label, view) in enumerate(zip(labels, views, strict=True))
    ]


def flattened(tree: dict[str, Any]) -> dict[str, Any]:
    """Value by dotted key; an empty section has none."""
    return {key: value for key, value in flatten(tree).items() if value != {}}


def facts(run: Run) -> dict[str, Any]:
    """Settings, and what the newest start says of its data, software and layout. A run of several sources does not read
    data.manifest, which the file of its configuration most often has."""
    started = run.view.last("started")
    extra = {key: started[key] for key in ("software", "layout") if isinstance(started.get(key), dict)}
    found = flattened({**run.view.config, **extra, "ranks": started.get("ranks"), DIGEST: data_digest(run.view)})
    return {key: value for key, value in found.items() if key != "data.manifest" or not found.get("data.sources")}


def data_digest(view: RunView) -> str | None:
    """The first letters, as other texts show them, of what identifies the data of the newest start; None of a version
    that did not record it."""
    found = view.last("started").get("data_digest")
    return found[:12] if isinstance(found, str) else None


def differing_facts(runs: Sequence[Run]) -> list[tuple[str, list[Any]]]:
    """Key and the value of every run, where not all are equal; None where a run does not have it."""
    every = [facts(run) for run in runs]
    keys = dict.fromkeys(key for found in every for key in found)
    rows = [(key, [found.get(key) for found in every]) for key in keys]
    meant = [(key, values, [as_meant(key, value) for value in values]) for key, values in rows]
    differing = [(key, values) for key, values, these in meant if any(value != these[0] for value in these)]
    if not any(key.startswith(("data.manifest", "data.sources")) for key, _ in differing):
        # That an earlier version has not recorded which data lay at the one place is no other data.
        differing = [(key, values) for key, values in differing if key != DIGEST or len(set(values) - {None}) > 1]
    return [(key, values) for key, values in differing if _says_something(key, values, runs)]


def _says_something(key: str, values: Sequence[Any], runs: Sequence[Run]) -> bool:
    """Not a description that was made of the settings which differ, nor a setting that has no effect in any run."""
    if key == "description":
        return not any(isinstance(value, str) and MADE_OF_SETTINGS in value for value in values)
    return any(has_effect(key, run.view.config) for run in runs)


def as_meant(key: str, value: Any) -> Any:
    """A setting in the one form that it has among several which mean the same: data are named by their folder, or by
    the manifest in it."""
    if key == "data.manifest" and isinstance(value, str):
        url = URL.match(value)
        path = PurePosixPath(value[url.end() :] if url else value)
        path = path.parent if path.name == "manifest.json" else path
        return f"{url[0] if url else ''}{path}"
    if key == "data.sources" and isinstance(value, list):
        rows = [row if isinstance(row, dict) else {} for row in value]
        return [{**row, "manifest": as_meant("data.manifest", row.get("manifest"))} for row in rows]
    return value


def places(runs: Sequence[Run], axis: str, count: int = 6) -> list[float]:
    """Up to `count` places, evenly spaced by their logarithm, that all runs have reached; the last is the farthest."""
    ends = [run.column(axis)[-1] for run in runs]
    firsts = [run.column(axis)[0] for run in runs]
    if not all(map(math.isfinite, ends)) or max(firsts) > min(ends):
        return []
    low, high = max(max(firsts), min(ends) / 100.0), min(ends)
    found = np.geomspace(low, high, count) if low > 0 else np.array([high])
    return sorted({float(round(x)) for x in found if x < high} | {float(high)})


def losses(runs: Sequence[Run], axis: str) -> list[tuple[float, list[float]]]:
    """A place and the loss of every run there. All are means over the same stretch, the shortest of the runs' own: one
    that began at the place, as a branch does, or that takes more tokens in a step, would be compared with losses of
    earlier steps of the others, which are higher."""
    found = []
    for place in places(runs, axis):
        begin = max(run.window_at(axis, place) for run in runs)
        found.append((place, [run.loss_between(axis, begin, place) for run in runs]))
    return found


def splits_of(runs: Sequence[Run]) -> list[SplitName]:
    """Those on which any of the runs was validated."""
    found = {split for run in runs for split in run.view.splits}
    return [split for split in SPLITS if split in found]


def validation_losses(runs: Sequence[Run], split: SplitName = "validation") -> list[tuple[float, list[float]]]:
    """A step and the loss of every run on a split after it, infinite where that was not finite, NaN where a run was not
    validated on that: some steps, evenly among all, with the first and the last."""
    return _some([dict(run.view.validations(split)) for run in runs])


def bits_per_byte(runs: Sequence[Run], split: SplitName = "validation") -> list[tuple[float, list[float]]]:
    """As `validation_losses`, bits per byte of the text, which models of different tokenizers have in common."""
    return _some([dict(run.view.bits_per_byte(split)) for run in runs])


def _some(found: Sequence[dict[int, float]]) -> list[tuple[float, list[float]]]:
    steps = sorted(set().union(*found))
    chosen = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), VALIDATIONS)).round().astype(int))
    return [
        (steps[n], [known(of_run[steps[n]]) if steps[n] in of_run else math.nan for of_run in found]) for n in chosen
    ]


def source_losses_at_end(
    runs: Sequence[Run], split: SplitName = "validation"
) -> tuple[int, list[tuple[str, list[float]]]]:
    """The last step after which all runs were validated on a split (0: there is none); every source of that validation,
    and its loss in every run, infinite where that was not finite, NaN where a run did not read it."""
    found = [dict(run.view.source_validations(split)) for run in runs]
    step = max(set.intersection(*map(set, found)), default=0)
    at_end = [of_run.get(step, {}) for of_run in found]
    names = dict.fromkeys(name for losses in at_end for name in losses)
    return step, [(name, [known(losses[name]) if name in losses else math.nan for losses in at_end]) for name in names]


def task_accuracies_at_end(runs: Sequence[Run]) -> list[tuple[str, int, list[float]]]:
    """Every task, the last step after which all runs that were evaluated on it have an accuracy, and that of every run,
    NaN where a run was not; no task without such a step."""
    every = [run.view.task_accuracies() for run in runs]
    found = []
    for task in sorted({task for of_run in every for task in of_run}):
        of_task = [of_run.get(task, {}) for of_run in every]
        step = max(set.intersection(*(set(of_run) for of_run in of_task if of_run)), default=None)
        if step is not None:
            found.append((task, step, [of_run.get(step, math.nan) for of_run in of_task]))
    return found


def differences(first: Run, other: Run, tolerance: float) -> tuple[int, list[Difference]]:
    """The number of steps that both have, and every value that is not the same in all of them, the earliest first."""
    common, ours, theirs = np.intersect1d(first.column("step"), other.column("step"), return_indices=True)
    found = []
    for key in first.view.metrics.names:
        if key in NOT_COMPARED or key not in other.view.metrics.names:
            continue
        a, b = first.column(key)[ours], other.column(key)[theirs]
        is_same = (a == b) | (np.isnan(a) & np.isnan(b))
        if is_same.all():
            continue
        scale = np.maximum(np.abs(a), np.abs(b))
        with np.errstate(invalid="ignore"):  # inf / inf of a loss that is not finite; 0 / 0 of what is the same
            relative = np.where(is_same, 0.0, np.abs(a - b) / scale)
        relative = np.where(np.isnan(relative), math.inf, relative)  # one has a value and the other has none
        at, most = int(np.argmin(is_same)), int(np.argmax(relative))
        beyond = np.flatnonzero(relative > tolerance)
        found.append(
            Difference(
                key,
                int(common[at]),
                (float(a[at]), float(b[at])),
                float(relative[most]),
                int(common[most]),
                int(common[beyond[0]]) if len(beyond) else None,
            )
        )
    return len(common), sorted(found, key=lambda difference: difference.step)
