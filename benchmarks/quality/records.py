"""What is kept of a finished run: its settings, its curve and where it was trained. Metrics only, some KB a run."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import records
from benchmarks.quality.plan import Training
from common.errors import DataError
from common.files import write_json
from common.paths import REPOSITORY
from data_prep.shards.format import Manifest
from pretrain.views.reading import RunView, setting

RESULTS = Path(__file__).resolve().parent / "results"
EVERY = 10
"""Steps between two points of the kept curve, each the mean of the losses since the last one."""


class Shipped(NamedTuple):
    """Where the docs show results of ours."""

    mark: str
    """In docs/benchmarks.md: the table stands between its two."""
    picture: Path


PICTURES = REPOSITORY / "docs" / "pictures"
SHIPPED = {
    RESULTS: Shipped("benchmarks.quality", PICTURES / "quality.png"),
    RESULTS.with_name("results_cpu"): Shipped("benchmarks.quality cpu", PICTURES / "quality_cpu.png"),
}
"""By folder of results: of one text each."""


class Record(NamedTuple):
    """One finished run."""

    name: str
    model: str
    rate: float
    seed: int
    steps: int
    diverged: bool
    tokens_per_step: int
    flops_per_token: float
    """Of a training step, as plan.py counts them."""
    losses: list[float]
    """Training loss, a mean for every EVERY steps."""
    validations: list[tuple[int, float]]
    """(step, loss)."""
    seconds: list[float]
    """Of training until each point of `losses`, without validation and checkpoints."""
    origin: dict[str, str]
    """Machine, versions, date, data set."""

    @property
    def last_loss(self) -> float:
        """Validation loss at the end, nats per token; NaN if it diverged."""
        return math.nan if self.diverged or not self.validations else self.validations[-1][1]

    @property
    def perplexity(self) -> float:
        return math.exp(self.last_loss)


def record_of(training: Training, folder: Path, data: Path, *, diverged: bool) -> Record:
    """Reads a run folder. `data`: the manifest. Raises DataError if the folder has no metrics."""
    view = RunView.open(folder)
    steps = view.metrics
    if not len(steps):
        raise DataError(f"--runs: {folder} has no metrics; remove it and start again")
    losses, times = steps.column("loss"), steps.column("step_seconds")
    ends = range(EVERY, len(losses) + 1, EVERY)
    rate, tokens = steps.column("flops_per_second")[-1], steps.column("tokens_per_second")[-1]
    first, opened = view.last("started"), view.last("opened")
    software = {str(key): str(value) for key, value in first.get("software", {}).items()}
    return Record(
        name=training.name,
        model=training.model,
        rate=training.rate,
        seed=training.seed,
        steps=len(losses),
        diverged=diverged,
        tokens_per_step=int(steps.column("tokens")[-1]) // len(losses),
        flops_per_token=rate / tokens,
        losses=[round(sum(losses[end - EVERY : end]) / EVERY, 4) for end in ends],
        validations=[(step, round(loss, 5)) for step, loss in view.validations()],
        seconds=[round(sum(times[:end]), 1) for end in ends],
        origin={
            **software,
            "processor": processor(setting(view.config, "train.device")),
            "began": datetime.fromtimestamp(float(opened.get("time", 0)), UTC).date().isoformat(),
            "data": digest_of(data),
        },
    )


def digest_of(data: Path) -> str:
    """By which a record names the data set of a manifest. Raises DataError."""
    return Manifest.load(data).digest[:12]


def check_data(data: Path, results: Path) -> None:
    """Raises DataError if a kept run saw other text: perplexities of two texts cannot be compared."""
    for record in read_records(results):
        if record.origin.get("data", digest_of(data)) != digest_of(data):
            raise DataError(
                f"--data: {data} is the data set {digest_of(data)}, but the runs in {results} saw "
                f"{record.origin['data']}; name a new folder with --results, for which all runs are made"
            )


def processor(device: object) -> str:
    """The GPU of a run on `cuda`; else the CPU."""
    if device == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return records.processor()


def keep(record: Record, results: Path) -> None:
    """Writes it whole or not at all."""
    results.mkdir(parents=True, exist_ok=True)
    write_json(results / f"{record.name}.json", record._asdict(), indent=None)


def read_records(results: Path) -> list[Record]:
    """In the order of their names. Raises DataError for a file that is none."""
    found = []
    for path in sorted(results.glob("*.json")):
        try:
            tree: dict[str, Any] = json.loads(path.read_text())
            tree["losses"] = [_loss(loss) for loss in tree["losses"]]
            tree["validations"] = [(int(step), _loss(loss)) for step, loss in tree["validations"]]
            found.append(Record(**tree))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"--results: {path} is no record of a run ({error}); remove it") from error
    return found


def _loss(kept: float | None) -> float:
    """JSON has no NaN, which the losses of a run that diverged are."""
    return math.nan if kept is None else float(kept)
