"""The models of `plan.py costs` and `match`, read and checked. Light: what is refused does not wait for torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from common.errors import ConfigError
from model.config import ModelConfig
from pretrain.config.loading import load_config
from pretrain.report.run_paths import config_file, is_run

Width = Literal["head_dim", "hidden_size", "expert_size"]
WIDTHS: dict[Width, str] = {
    "head_dim": "model.attention.head_dim",
    "hidden_size": "model.feedforward.hidden_size",
    "expert_size": "model.feedforward.expert_size",
}
"""What can be solved for, with its dotted key."""


def models_of_costs(configs: Sequence[Path], baseline: Path | None, overrides: Sequence[str]) -> dict[str, ModelConfig]:
    """Every model by the name of its row, the baseline first. Raises ConfigError."""
    files = [file for path in configs for file in config_files(path)]
    models = {str(file): load_model(file, overrides) for file in files}
    if baseline is None:
        return models
    name = f"{baseline} (baseline)" if overrides and str(baseline) in models else str(baseline)
    return {name: load_model(baseline, (), option="--baseline")} | models


def models_of_match(
    config: Path, like: Path, solve: Width, overrides: Sequence[str]
) -> tuple[ModelConfig, ModelConfig]:
    """The model to be changed, which has that width, and the one to equal in size. Raises ConfigError."""
    model, baseline = load_model(config, overrides), load_model(like, (), option="--like")
    check_width(model, solve)
    return model, baseline


def check_width(model: ModelConfig, solve: Width) -> None:
    """Raises ConfigError if the model has no such width."""
    if solve not in (widths := [width for width in WIDTHS if hasattr(getattr(model, section_of(width)), width)]):
        section = section_of(solve)
        raise ConfigError(
            f"{WIDTHS[solve]}: model.{section}.type {getattr(model, section).type} has no {solve}; "
            + (f"solve for {' or '.join(widths)}" if widths else "no width of this model can be solved for")
        )


def section_of(width: Width) -> str:
    """`attention` or `feedforward`."""
    return WIDTHS[width].split(".")[1]


def config_files(path: Path) -> list[Path]:
    """`path`, the configuration of the run that it holds, or the JSON files directly in it, sorted."""
    if not path.exists():
        raise ConfigError(f"CONFIG: there is no file or folder {path}; configurations are in configs and configs/paper")
    if path.is_dir() and not is_run(path):
        files = sorted(path.glob("*.json"))
    else:
        files = [config_file(path, "CONFIG")]
    if not files:
        raise ConfigError(f"CONFIG: the folder {path} holds no .json file; name one that does, or a file")
    return files


def load_model(path: Path, overrides: Sequence[str], *, option: str = "CONFIG") -> ModelConfig:
    """The model section of a configuration file, given as `option`. Raises ConfigError that also names the file."""
    try:
        return load_config(config_file(path, option), overrides, option=option).model
    except ConfigError as error:
        named = "" if str(error).startswith(f"{option}: ") else f" (in {path})"
        raise ConfigError(f"{error}{named}") from None
