"""How evenly routers use their experts: values for metrics.jsonl and the terminal, and a watch for collapse.

A router is one row of counts: a sigma-MoE layer has one, a MoA layer one, a SwitchHead layer one per head and selector.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import ModelConfig
from model.layer_section import Routers
from pretrain.config.watching import MonitorConfig

OF_SOFTMAX = "switch_loss_weight"
BALANCING = ("entropy_weight", OF_SOFTMAX, "expert_dropout")
"""Keys of layers that keep their routers from collapsing, what helps most first; one is for a softmax alone."""
ATTENTION, FEEDFORWARD = "attention", "feedforward"
SHORT = {ATTENTION: "attn", FEEDFORWARD: "ffn"}


def choices(model: ModelConfig) -> dict[str, Routers]:
    """What the routers of each kind of layer choose from; dense layers have none."""
    layers = {ATTENTION: model.attention.routers, FEEDFORWARD: model.feedforward.routers}
    return {kind: found for kind, found in layers.items() if found is not None}


def rows_of(load: dict[str, Tensor], kind: str) -> Tensor:
    """Counts of every router of a kind, [routers, E] fp64."""
    rows = [counts.view(-1, counts.shape[-1]) for name, counts in load.items() if f".{kind}." in name]
    return torch.cat(rows) if rows else torch.zeros(0, 1, dtype=torch.float64)


def names_of(load: dict[str, Tensor], kind: str) -> list[tuple[str, int | None]]:
    """For each row of `rows_of`: layer with selector, and head where there are several."""
    names: list[tuple[str, int | None]] = []
    for name, counts in load.items():
        if f".{kind}." in name:
            names += [
                (without_ending(name), head if counts.ndim > 1 else None) for head in range(counts[..., 0].numel())
            ]
    return names


def without_ending(name: str) -> str:
    """The name of a router, of that of its statistics: `blocks.3.attention.value`."""
    return re.sub(r"[._]?statistics$", "", name)


def load_max(counts: Tensor) -> float:
    """[..., E] -> the load of the busiest expert, in units of the mean load of its router; the worst router's."""
    rows = counts.numpy()
    return float((rows.max(-1) / rows.sum(-1).clip(1.0)).max()) * rows.shape[-1]


def busiest_share(rows: Tensor, active: int) -> Tensor:
    """[routers, E] -> [routers]: the share of the choices that go to the k busiest experts; k / E is even, 1 is
    collapse."""
    return rows.topk(active, dim=-1).values.sum(-1) / rows.sum(-1).clamp_min(1.0)


def load_summary(load: dict[str, Tensor], model: ModelConfig) -> dict[str, float]:
    """Per kind of layer, over its routers: `load_max`, the busiest expert's load in units of the mean load (1 is even,
    E / k the most); `busiest_share` of the worst router; `unused_experts`, the number that no token chose, and
    `unused_share`, their share of all experts."""
    summary: dict[str, float] = {}
    for kind, choice in choices(model).items():
        rows = rows_of(load, kind)
        if not len(rows):
            continue
        unused = int((rows == 0).sum())
        summary[f"{kind}_load_max"] = load_max(rows)
        summary[f"{kind}_busiest_share"] = float(busiest_share(rows, choice.active).max())
        summary[f"{kind}_unused_experts"] = unused
        summary[f"{kind}_unused_share"] = unused / rows.numel()
    return summary


def load_text(load: dict[str, Tensor], model: ModelConfig) -> str:
    """For the terminal: `attn 1.96/2  ffn 2.19/4, 3 unused`. Empty for a dense model."""
    values, parts = load_summary(load, model), []
    for kind, choice in choices(model).items():
        if f"{kind}_load_max" in values:
            unused = values[f"{kind}_unused_experts"]
            text = f"{SHORT[kind]} {values[f'{kind}_load_max']:.2f}/{choice.num_experts / choice.active:.3g}"
            parts.append(text + (f", {unused:.0f} unused" if unused else ""))
    return "  ".join(parts)


@dataclass(frozen=True)
class Collapsed:
    """A router that has been collapsed for long."""

    router: str
    """E.g. `blocks.3.feedforward`, `blocks.0.attention.value`."""
    head: int | None
    share: float
    """Share of the choices of the last step that its k busiest experts got."""
    steps: int
    """In a row."""

    def __str__(self) -> str:
        head = "" if self.head is None else f" head {self.head}"
        return f"{self.router}{head} ({self.share:.1%} for {self.steps} steps)"


class CollapseWatch:
    """Counts, per router, the steps in a row for which it was collapsed: its k busiest experts got more than
    monitor.collapse_share of the choices. A router is reported after monitor.collapse_after_steps, then each time the
    streak has doubled."""

    def __init__(self, config: MonitorConfig, model: ModelConfig) -> None:
        self._share, self._after = config.collapse_share, config.collapse_after_steps
        # An even router is not collapsed, and one that chooses all its experts cannot be.
        self._choices = {kind: c for kind, c in choices(model).items() if c.active / c.num_experts < self._share}
        self._streaks: dict[str, Tensor] = {}

    def step(self, load: dict[str, Tensor]) -> list[Collapsed]:
        """Takes the counts of a step. Returns the routers to report now."""
        due: list[Collapsed] = []
        for kind, choice in self._choices.items() if self._after else ():
            rows = rows_of(load, kind)
            share = busiest_share(rows, choice.active)
            streak = self._streaks.get(kind, torch.zeros(len(rows), dtype=torch.int64))
            streak = self._streaks[kind] = torch.where(share > self._share, streak + 1, 0)
            told = [i for i, steps in enumerate(streak.tolist()) if self._is_told(steps)]
            names = names_of(load, kind) if told else []
            due += [Collapsed(*names[i], float(share[i]), int(streak[i])) for i in told]
        return due

    def _is_told(self, steps: int) -> bool:
        multiple, rest = divmod(steps, self._after)
        return multiple > 0 and rest == 0 and multiple & (multiple - 1) == 0


def advice(model: ModelConfig, due: list[Collapsed]) -> str:
    """What a user can change about these routers."""
    named = []
    for kind, layer in ((FEEDFORWARD, model.feedforward), (ATTENTION, model.attention)):
        is_softmax = layer.routers is not None and layer.routers.scores == "softmax"
        known = (key for key in BALANCING if hasattr(layer, key) and (is_softmax or key != OF_SOFTMAX))
        key = next(known, None)
        if key is not None and any(f".{kind}" in router.router for router in due):
            named.append(f"model.{kind}.{key}")
    return (f"raise {' and '.join(named)}, or " if named else "") + "lower optimizer.learning_rate"
