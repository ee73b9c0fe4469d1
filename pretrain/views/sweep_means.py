"""Runs of a sweep that differ in their seeds alone, as rows of a paper's table: means and standard deviations, and what
each model costs; as CSV and as LaTeX."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from common.errors import ConfigError
from common.json_config import validate
from pretrain.views.sweep import BITS, Result, content_of, loss_name, over_seeds, short_keys, without_seeds


@dataclass(frozen=True, kw_only=True)
class Means:
    """One combination of everything but seeds; finished runs alone."""

    config: str
    values: dict[str, str]
    """Dotted key -> value."""
    loss_of: str
    """As `loss_name` says it."""
    losses: list[float]
    """Of each run, in nats per token, or in bits per byte."""
    parameters: int | None
    active_parameters: int | None
    """That a token uses."""
    flops_per_token: int | None
    """Of training. These three: None where the run's configuration says too little."""

    @property
    def has_bits(self) -> bool:
        """Whether the losses are bits per byte, as of several tokenizers, of which no perplexities compare."""
        return self.loss_of.endswith(BITS)

    @property
    def perplexities(self) -> list[float]:
        return [math.exp(min(loss, 700.0)) for loss in self.losses]


def summarised(results: Sequence[Result], keys: Sequence[str]) -> list[Means]:
    """The lowest mean loss first."""
    name, found = loss_name(results), []
    for members in over_seeds(results, keys):
        total, active, flops = _costs(members[0])
        run = members[0].run
        found.append(
            Means(
                config=run.config,
                values={key: run.values[key] for key in without_seeds(keys)},
                loss_of=name,
                losses=[result.loss(name) for result in members],
                parameters=total,
                active_parameters=active,
                flops_per_token=flops,
            )
        )
    return found


def means_csv(found: Sequence[Means], keys: Sequence[str]) -> str:
    """Every number in full; a deviation is that of a sample, empty for one seed."""
    others = without_seeds(keys)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    costs = ["parameters", "active_parameters", "training_flops_per_token"]
    name = found[0].loss_of.replace(" ", "_") if found else "validation"
    names = [name] if found and found[0].has_bits else [f"{name}_loss", f"{name}_perplexity"]
    numbers = [f"{what}_{of}" for what in names for of in ("mean", "deviation")]
    writer.writerow(["config", *others, *costs, "seeds", *numbers])
    for means in found:
        row: list[Any] = [means.config, *(means.values[key] for key in others)]
        row += ["" if cost is None else cost for cost in _costs_of(means)]
        row.append(len(means.losses))
        for values in (means.losses,) if means.has_bits else (means.losses, means.perplexities):
            row += [repr(statistics.fmean(values)), repr(statistics.stdev(values)) if len(values) > 1 else ""]
        writer.writerow(row)
    return text.getvalue()


def means_latex(found: Sequence[Means], keys: Sequence[str]) -> str:
    """A tabular for the package booktabs: perplexity (or bits per byte) with its deviation, parameters in millions,
    MFLOP per token."""
    others = without_seeds(keys)
    short = short_keys(others)
    has_configs = len({means.config for means in found}) > 1
    named = ["config"] * has_configs + [short[key].replace("_", " ") for key in others]
    unit = "bits per byte" if found and found[0].has_bits else "perplexity"
    titles = [*map(_escaped, named), "parameters (M)", "active (M)", "MFLOP/token", "seeds", unit]
    lines = [
        f"% loss on: {found[0].loss_of if found else 'nothing yet'}; the deviation is that of a sample",
        rf"\begin{{tabular}}{{{'l' * len(named)}{'r' * 5}}}",
        r"\toprule",
        " & ".join(titles) + r" \\",
        r"\midrule",
    ]
    for means in found:
        words = [means.config] * has_configs + [" ".join(content_of(means.values[key])) for key in others]
        costs = ["--" if cost is None else f"{cost / 1e6:.1f}" for cost in _costs_of(means)]
        values, digits = (means.losses, 4) if means.has_bits else (means.perplexities, 2)
        mean = f"{statistics.fmean(values):.{digits}f}"
        if len(values) > 1:
            mean += rf" $\pm$ {statistics.stdev(values):.{digits}f}"
        lines.append(" & ".join([*map(_escaped, words), *costs, f"{len(means.losses)}", mean]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def _costs_of(means: Means) -> list[int | None]:
    return [means.parameters, means.active_parameters, means.flops_per_token]


def _costs(result: Result) -> tuple[int, int, int] | tuple[None, None, None]:
    """Parameters, active ones, and training FLOPs per token, of the model in the run's configuration."""
    from model.config import ModelConfig
    from model.costs import formula_parameters, training_flops_per_token  # torch, for which refusals need not wait

    section = result.view.config.get("model") if result.view is not None else None
    try:
        model = validate(ModelConfig, section) if isinstance(section, dict) else None
    except ConfigError:  # of another version
        model = None
    if model is None:
        return None, None, None
    count = formula_parameters(model)
    return count.total, count.active, training_flops_per_token(model)


def _escaped(text: str) -> str:
    """A text in which TeX reads no command."""
    known = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(known.get(letter, f"\\{letter}" if letter in "&%$#_{}" else letter) for letter in text)
