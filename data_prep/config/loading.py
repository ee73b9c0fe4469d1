"""The configuration of a preparation: JSON in, `--set key=value` on top, every mistake one message with the fix.

Relative paths. `input`, `validation_input`, `test_input` and `tokenizer.model` are looked up in the current
directory and, if nothing is there, in the repository root, so the shipped configs work from anywhere. `output` is
made in the current directory, except that a config from the repository's own `configs/` writes below the repository
root; an `output` given with `--set` is always relative to the current directory.
"""

import functools
from collections.abc import Sequence
from pathlib import Path

from common import json_config
from common.errors import ConfigError
from common.paths import REPOSITORY
from data_prep.config.schema import DataConfig


def load_config(path: Path, overrides: Sequence[str]) -> DataConfig:
    """Reads a config file and applies `key=value` overrides. Raises ConfigError."""
    tree = json_config.read_tree(path)
    if "model" in tree and "input" not in tree:
        raise ConfigError(
            f"--config: {path} is the configuration of a run (launch/pretrain.py); configurations of data "
            "are in configs/data"
        )
    own = path.resolve().is_relative_to(REPOSITORY / "configs")
    if own and isinstance(tree.get("output"), str):
        tree["output"] = str(REPOSITORY / tree["output"])
    for override in overrides:
        json_config.apply_override(tree, override)
    return json_config.validate(DataConfig, tree)


@functools.cache
def describe_keys() -> str:
    """Every key with its default and meaning, for --help."""
    return "\n".join(json_config.describe_keys(DataConfig))
