"""`plan.py costs`: a table of what models cost, by the paper's formulas and counted from the built model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.strict_json import dumps
from common.tables import text_table
from model.config import ModelConfig
from model.costs import (
    attention_macs,
    attention_memory,
    cache_floats,
    feedforward_macs,
    feedforward_memory,
    formula_parameters,
    training_flops_per_token,
)
from model.counted_costs import count_macs
from pretrain.report.run_paths import SAVED_CONFIG

UNITS = (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3))
LEGEND = """\
MACs and floats: one layer, one sequence of T tokens, forward, causal masking not deducted.
published: the convention of the paper's tables. Eq. 13: the paper's equation, SwitchHead's position term times C and no
selectors. floats: activations, for which there is only one formula for both conventions.
counted: matrix products of the built model with a full memory. model: all layers and the output layer.
ratios are of counted MACs to {baseline}{where}.
FLOPs: of training, per token, 6 x active matmul parameters + attention.
cache: of generation, keys and values of one token in all layers."""


@dataclass(frozen=True)
class Costs:
    """Exact numbers of one configuration; `--json` prints them under these names."""

    config: str
    parameters: int
    active_parameters: int
    attention_macs_published: int
    attention_macs_equation_13: int
    attention_macs_counted: int
    attention_macs_ratio: float | None
    """Relative to the baseline, or to the first model; null if the first has another sequence length or d_model."""
    attention_floats: int
    feedforward_macs_published: int
    feedforward_macs_counted: int
    feedforward_floats: int
    model_macs_counted: int
    model_macs_ratio: float | None
    cache_floats: int
    training_flops_per_token: int
    cache_ratio: float | None
    """Not in the table, which is as wide as it can be."""


def print_costs(models: dict[str, ModelConfig], *, any_size: bool, as_json: bool) -> None:
    """Prints one row per model, see `model_costs`."""
    rows = model_costs(models, any_size=any_size)
    if as_json:
        print(dumps([dataclasses.asdict(row) for row in rows], indent=1))
    else:
        print(table(rows))


def model_costs(models: dict[str, ModelConfig], *, any_size: bool) -> list[Costs]:
    """The costs of each model, with ratios to the first; if `any_size` is False, only for the first one's T and
    d_model."""
    counted = {}  # the published models repeat over corpora: each is counted once
    for model in models.values():
        if model not in counted:
            counted[model] = count_macs(model)
    first = next(iter(models.values()))
    reference = counted[first]
    rows = []
    for name, model in models.items():
        parameters, macs = formula_parameters(model), counted[model]
        comparable = any_size or (model.sequence_length, model.d_model) == (first.sequence_length, first.d_model)
        rows.append(
            Costs(
                config=name,
                parameters=parameters.total,
                active_parameters=parameters.active,
                attention_macs_published=attention_macs(model, "published"),
                attention_macs_equation_13=attention_macs(model, "equation_13"),
                attention_macs_counted=macs.attention,
                attention_macs_ratio=macs.attention / reference.attention if comparable else None,
                attention_floats=attention_memory(model),
                feedforward_macs_published=feedforward_macs(model),
                feedforward_macs_counted=macs.feedforward,
                feedforward_floats=feedforward_memory(model),
                model_macs_counted=macs.model,
                model_macs_ratio=macs.model / reference.model if comparable else None,
                cache_floats=cache_floats(model),
                training_flops_per_token=training_flops_per_token(model),
                cache_ratio=cache_floats(model) / cache_floats(first) if comparable else None,
            )
        )
    return rows


def table(rows: Sequence[Costs]) -> str:
    """The rows for a terminal, with a legend."""
    heads = [
        ("", "config"),
        ("params", "total"),
        ("", "active"),
        ("attention MACs", "published"),
        ("", "Eq. 13"),
        ("", "counted"),
        ("", "ratio"),
        ("", "floats"),
        ("feed-forward MACs", "published"),
        ("", "counted"),
        ("", "floats"),
        ("model MACs", "counted"),
        ("", "ratio"),
        ("cache", "floats"),
        ("training", "FLOPs"),
    ]
    lines = [[upper for upper, _ in heads], [lower for _, lower in heads]]
    names = _short_names([row.config for row in rows])
    for name, row in zip(names, rows, strict=True):
        lines.append([name, *map(_cell, dataclasses.astuple(row)[1:-1])])
    widths = [max(len(line[column]) for line in lines[1:]) for column in range(len(heads))]
    # A group's title stands above its columns and begins at the left of the first.
    starts = [2 * column + sum(widths[:column]) for column in range(len(heads))]
    upper = ""
    for start, title in zip(starts, lines[0], strict=True):
        if title:
            upper = f"{upper:<{start}}{title}"
    gaps = any(row.model_macs_ratio is None for row in rows)
    where = ", - where T or d_model differ from its (--baseline compares all)" if gaps else ""
    return "\n".join([upper, text_table(lines[1], lines[2:]), "", LEGEND.format(baseline=names[0], where=where)])


def _cell(value: int | float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else short(value)


def short(value: int) -> str:
    """Four digits with a unit, e.g. 202.5M, 2.358G, 47.26M."""
    if value < 1000:
        return str(value)
    rounded = float(f"{value:.4g}")  # first: 999,951 is 1.000M, not 1000.0k
    unit, size = next((unit, size) for unit, size in UNITS if rounded >= size)
    scaled = rounded / size
    return f"{scaled:.{max(0, 4 - len(str(int(scaled))))}f}{unit}"


def _short_names(paths: Sequence[str]) -> list[str]:
    """File names without .json where that is unambiguous."""
    files = [Path(path) for path in paths]
    names = [file.parent.name if file.name == SAVED_CONFIG else file.name.removesuffix(".json") for file in files]
    return names if len(set(names)) == len(names) else list(paths)
