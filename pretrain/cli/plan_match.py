"""`plan.py match`: the width that gives a model as many parameters as its baseline, as in the paper's comparisons."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from common.errors import ConfigError
from model.config import ModelConfig
from model.costs import formula_parameters
from pretrain.cli.plan_models import WIDTHS, Width, section_of


@dataclass(frozen=True)
class Match:
    """The solved width and the parameter totals."""

    key: str
    before: int
    value: int
    total: int
    """Total parameters with `value`."""
    target: int
    """Total parameters of the baseline."""

    @property
    def override(self) -> str:
        return f"--set {self.key}={self.value}"


def match_width(model: ModelConfig, like: ModelConfig, solve: Width) -> Match:
    """The width, rounded to the nearest integer, at which `model` has as many parameters in total as `like`.

    The total is linear in either width, so one difference gives the width. Raises ConfigError if there is no such
    width.
    """
    key = WIDTHS[solve]
    before = getattr(getattr(model, section_of(solve)), solve)
    target = formula_parameters(like).total
    now = formula_parameters(model).total
    step = formula_parameters(with_width(model, solve, before + 1)).total - now
    value = before + round((target - now) / step)
    if value < 1:
        fixed = formula_parameters(with_width(model, solve, 1)).total
        other = "feed-forward width" if solve == "head_dim" else "head_dim"
        raise ConfigError(
            f"{key}: the baseline has {target:,} parameters, this model has {fixed:,} even with {solve} = 1; "
            f"make it smaller elsewhere, e.g. with another {other} or fewer experts"
        )
    total = formula_parameters(with_width(model, solve, value)).total
    assert 2 * abs(total - target) <= abs(step), f"the parameters of this model are not linear in {key}"
    return Match(key=key, before=before, value=value, total=total, target=target)


def with_width(model: ModelConfig, solve: Width, value: int) -> ModelConfig:
    """`model` with another width."""
    section = section_of(solve)
    return model.model_copy(update={section: getattr(model, section).model_copy(update={solve: value})})


def print_match(config: Path, like: Path, models: tuple[ModelConfig, ModelConfig], solve: Width) -> None:
    """Solves for the models of the two files and prints value, totals and the override to use. Raises ConfigError."""
    found = match_width(*models, solve)
    difference = found.total - found.target
    print(f"{found.key} = {found.value} (was {found.before})")
    print(f"  {config}: {found.total:,} parameters")
    print(f"  {like}: {found.target:,} parameters (difference {difference:+,}, {difference / found.target:+.3%})")
    print(f"use {found.override}")
