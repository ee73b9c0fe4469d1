"""Runs of a sweep that all have as many parameters: one width of each is solved for, as `plan.py match` does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from common.errors import ConfigError, UserError
from launch.sweeps.plan import run_name
from pretrain.cli.plan_models import WIDTHS, check_width, load_model
from pretrain.views.sweep import SweepRun

OPTION = "--equal-parameters"


def check_is_free(width: str, varied: Iterable[str], overrides: Iterable[str]) -> None:
    """Raises UserError if another option decides the width, or would replace it."""
    fixed = [override.partition("=")[0].strip() for override in overrides]
    if width in [*varied, *fixed]:
        raise UserError(f"{OPTION}: {width} stands in --vary or --set too; leave it out there, it is solved for")


def of_equal_size(
    runs: Sequence[SweepRun], configs: Mapping[str, Path], overrides: Sequence[str], width: str
) -> list[SweepRun]:
    """The runs, each with the value of `width` (a dotted key) at which it has as many parameters in total as its
    configuration with `overrides` (--set): the nearest whole number. Raises ConfigError and UserError."""
    from pretrain.cli.plan_match import match_width  # torch

    (solve,) = (name for name, key in WIDTHS.items() if key == width)
    found: dict[str, SweepRun] = {}
    for run in runs:
        settings = [*overrides, *(f"{key}={value}" for key, value in run.values.items())]
        try:
            like, model = (load_model(configs[run.config], given) for given in (overrides, settings))
            check_width(model, solve)
            value = match_width(model, like, solve).value
        except ConfigError as error:
            raise ConfigError(f"{error} ({OPTION}, in {run.name})") from None
        values = {**run.values, width: str(value)}
        found[run.name] = replace(run, name=run_name(run.config, values), values=values)
    return list(found.values())
