"""From JSON and `--set` to a checked Config and back. Every refusal is one ConfigError that names the key."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from common import json_config
from common.errors import ConfigError, Problem, UserError, refuse
from pretrain.config.rules import check_rules
from pretrain.config.schema import Config
from pretrain.config.watching import MonitorConfig


def load_config(path: Path, overrides: Sequence[str] = (), *, option: str = "--config") -> Config:
    """Reads the JSON file at `path`, applies `--set` overrides in order and validates. Raises ConfigError, which names
    `option` as the argument that `path` came from."""
    return parse_config(config_tree(path, overrides, option=option))


def config_tree(
    path: Path, overrides: Sequence[str], *, option: str = "--config", problem: Problem = refuse
) -> dict[str, Any]:
    """The tree of the JSON file at `path` with `--set` overrides applied in order, before anything is validated. Raises
    ConfigError or PassingError where there is no tree; what is wrong with overrides too, unless `problem` takes it."""
    tree = _read(path, option)
    checks = [partial(apply_override, tree, override) for override in _in_order(overrides)]
    for check in (*checks, partial(_check_manifest, tree, overrides)):
        try:
            check()
        except ConfigError as error:
            problem(error)
    _correct_description(tree, path, overrides)
    return tree


def inspect_config(
    path: Path, overrides: Sequence[str], *, option: str = "--config"
) -> tuple[Config | None, list[UserError]]:
    """As `load_config`, with every problem of the file and of the overrides, but for rules that join keys (see
    `broken_rules`). The configuration is None where the problems leave none."""
    problems: list[UserError] = []
    try:
        tree = config_tree(path, overrides, option=option, problem=problems.append)
    except UserError as error:
        return None, [error]
    config, found = json_config.validate_all(Config, tree)
    return config, [*problems, *found]


def alert_settings(path: Path, overrides: Sequence[str]) -> MonitorConfig | None:
    """What a configuration that may be wrong in every other place says of alerts, in a MonitorConfig; None where it
    cannot be read, or is wrong there."""
    try:
        tree = config_tree(path, overrides, problem=lambda error: None)
    except UserError:
        return None
    monitor = tree.get("monitor", {})
    if not isinstance(monitor, dict):
        return None
    return json_config.validate_all(MonitorConfig, {key: monitor[key] for key in monitor if key.startswith("alert")})[0]


def _read(path: Path, option: str) -> dict[str, Any]:
    tree = json_config.read_tree(path, option)
    if "model" not in tree and "input" in tree:
        raise ConfigError(
            f"{option}: {path} prepares data (python -m data_prep run --config {path}); configurations of runs are "
            "in configs and configs/paper"
        )
    return tree


def _in_order(overrides: Sequence[str]) -> list[str]:
    """Types first: a new type resets its section, and must not discard a key that stands before it on the line."""
    return sorted(overrides, key=lambda text: not text.partition("=")[0].strip().endswith(".type"))


def _check_manifest(tree: dict[str, Any], overrides: Sequence[str]) -> None:
    """Raises ConfigError for `--set data.manifest` alone where the file's data.sources say what is read."""
    keys, data = {override.partition("=")[0].strip() for override in overrides}, tree.get("data")
    if keys & {"data.manifest", "data.sources"} == {"data.manifest"} and isinstance(data, dict) and data.get("sources"):
        raise ConfigError(
            "data.manifest: would not be read, for data.sources of the file say what is; to read it alone, add "
            "--set 'data.sources=[]'"
        )


DESCRIBED = ("model", "data", "batch", "optimizer", "schedule", "train", "parallel", "evaluate", "deepspeed")
"""Sections that a file's description may describe."""


MADE_OF_SETTINGS = " with other values of "
"""Between the name of a file and the keys that `--set` has changed, in the description that they make."""
NAMELESS = re.compile(r"config(-[0-9a-f]{12})?\.json")
"""Names that say nothing: of the configuration of a run (pretrain/report/run_paths.py), and of a job's copy of one
(launch/slurm/training.py)."""


def _correct_description(tree: dict[str, Any], path: Path, overrides: Sequence[str]) -> None:
    """If `--set` changes such a section, the file's description is no longer true: the file's name and the changed keys
    replace it, in the saved configuration too. Where that name says nothing, the description stays, and the keys come
    to those that were changed before."""
    keys = {override.partition("=")[0].strip() for override in overrides}
    changed = sorted(key for key in keys if key.partition(".")[0] in DESCRIBED)
    if changed and "description" in tree and "description" not in keys:
        name = path.name
        if NAMELESS.fullmatch(name) and isinstance(tree["description"], str):
            name, _, before = tree["description"].partition(MADE_OF_SETTINGS)
            name, changed = name.rstrip("."), sorted({*changed, *filter(None, before.split(", "))})
        if name:  # a file without a description has none in its run's configuration
            tree["description"] = f"{name}{MADE_OF_SETTINGS}{', '.join(changed)}"


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Applies `dotted.key=value` to `tree` in place, see common/json_config.py."""
    json_config.apply_override(tree, override, tag="type")


def parse_config(tree: dict[str, Any]) -> Config:
    """Validates a JSON tree. Raises ConfigError with the first problem and how many more there are."""
    config = json_config.validate(Config, tree)
    check_rules(config)
    return config


def to_json(config: Config) -> dict[str, Any]:
    """The resolved tree, defaults included, as plain JSON types."""
    return config.model_dump(mode="json")
