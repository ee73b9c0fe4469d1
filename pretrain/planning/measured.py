"""What was measured of a device: the records of benchmarks/gpu, one JSON object a line
(benchmarks/results/CARD/COMMAND.jsonl, written by benchmarks/gpu/record.py)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.config import ModelConfig
from model.costs import formula_parameters
from pretrain.config.graph_rules import takes_graphs
from pretrain.config.schema import Config
from pretrain.planning.devices import Device, device_of_card

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
PASSED = "passed"
COPY, PRODUCT, MICRO_STEP = "ceiling copy", "ceiling product", "micro-step"
"""Names of parts, or their beginnings."""
LAUNCHED, GRAPHS, COMPILED, DENSE = "", "graphs", "compiled", "dense"
"""Kinds of micro-step."""
POSITIONS = {"1b": "rope", "262m": "xl", "tiny": "rope"}
"""`model.position.type` of the models that `speed` measures, by their names in the parts; records do not hold it."""


@dataclass(frozen=True, kw_only=True)
class MicroStep:
    """Forward and backward pass of a whole model on one GPU, in bf16."""

    kind: str
    sequences: int
    tokens: int
    parameters: int
    seconds: float
    busy: float
    """Seconds of these in which the GPU computed: all, where a profiler, which slows it, counted more or none."""
    positions: str | None
    """As `model.position.type`; None of a model that is not known."""
    flops_per_second: float | None
    """That the model needs: its share of the measured product's rate."""
    source: str
    """Part, card, date and revision, in words."""

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """Of one device; what was not measured is None or missing. The newest line of a part counts."""

    copy: float | None = None
    """Bytes a second, read and written ones."""
    product: float | None = None
    """bf16 FLOPs a second of a large product."""
    ceilings_source: str = ""
    micro_steps: tuple[MicroStep, ...] = ()

    def of_model(self, config: Config, data_size: int | None = None) -> MicroStep | None:
        """The micro-step of this very model, by its number of parameters and length, of the run's kind and precision,
        with the number of sequences nearest to the run's. None if there is none."""
        model, wanted = config.model, config.batch.micro_sequences
        kind = kind_of(config, data_size)
        same = [
            step
            for step in self.micro_steps
            if config.train.precision == "bf16"
            and step.kind == kind
            and step.tokens == step.sequences * model.sequence_length
            and step.parameters == formula_parameters(model).total
        ]
        return min(same, key=lambda step: (abs(step.sequences - wanted), step.sequences), default=None)


def kind_of(config: Config, data_size: int | None = None) -> str:
    """Which micro-steps are the run's: train.compile and train.cuda_graph where they are on. What rules graphs out on
    several data-parallel ranks counts only where their number is given."""
    if config.train.compile == "on":
        return COMPILED
    return GRAPHS if takes_graphs(config, data_size=data_size, device_type="cuda") else LAUNCHED


def has_experts(model: ModelConfig) -> bool:
    return model.attention.routers is not None or model.feedforward.routers is not None


def measurements(device: Device, folder: Path = RESULTS) -> Measurements:
    """What the records in `folder` say of a device; nothing if there are none. Lines that are cut are passed over."""
    newest: dict[str, dict[str, Any]] = {}
    for entry in _entries(folder):
        if entry.get("status") == PASSED and _is_of(entry, device):
            newest[str(entry["part"])] = entry
    copy, product = newest.get(COPY), newest.get(PRODUCT)
    either = copy or product
    rate = float(product["result"]["flops_per_second"]) if product else None
    steps = (_micro_step(part, entry, rate) for part, entry in newest.items())
    return Measurements(
        copy=float(copy["result"]["bytes_per_second"]) if copy else None,
        product=rate,
        ceilings_source=_source(either) if either else "",
        micro_steps=tuple(step for step in steps if step is not None),
    )


def _entries(folder: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.glob("*/*.jsonl")):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(entry, dict) and {"part", "result", "identity"} <= entry.keys():
                yield entry


def _is_of(entry: dict[str, Any], device: Device) -> bool:
    found = device_of_card(str(entry["identity"].get("card", "")))
    return found is not None and found.name == device.name and device.device_type == "cuda"


def _micro_step(part: str, entry: dict[str, Any], product: float | None) -> MicroStep | None:
    """`micro-step MODEL [KIND] SEQUENCES` as a record; None for any other part. product: FLOPs a second."""
    words, result = part.split(), entry["result"]
    if words[:1] != [MICRO_STEP] or not {"tokens", "parameters", "wall_ms", "flops_of_ceiling"} <= result.keys():
        return None
    wall = float(result["wall_ms"]) / 1e3
    return MicroStep(
        kind=" ".join(words[2:-1]),
        sequences=int(words[-1]),
        tokens=int(result["tokens"]),
        parameters=int(result["parameters"]),
        seconds=wall,
        busy=min(wall, float(result.get("busy_ms") or math.inf) / 1e3),
        positions=POSITIONS.get(words[1]),
        flops_per_second=float(result["flops_of_ceiling"]) * product if product else None,
        source=_source(entry),
    )


def _source(entry: dict[str, Any]) -> str:
    card = entry["identity"].get("card", "")
    return f"{entry['part']} on {card}, {str(entry.get('date', ''))[:10]}, revision {entry.get('revision', 'unknown')}"
