"""Where exported weights come from (training.json): configuration, progress, losses, data, tokenizer, versions.

Places on the machine of the training are left out: of a path to data its last part stays.
"""

from __future__ import annotations

import json
import math
from pathlib import Path, PurePosixPath
from typing import Any

from pretrain.checkpoint.folder import Checkpoint, names_of
from pretrain.checkpoint.tokenizer_file import StoredTokenizer
from pretrain.config.loading import to_json
from pretrain.config.schema import Config
from pretrain.evaluation.results import results_folder

FORMAT_VERSION = 1
MEASURES = ("loss", "perplexity", "accuracy", "bits_per_byte")
"""Numbers of an evaluation that a model card shows."""
PATHS = (
    *(("data", "cache_dir"), ("train", "init_from"), ("train", "replay_routing"), ("checkpoint", "resume")),
    ("monitor", "alert_command"),
)
"""Keys whose value is a place on a machine, or holds some; they become their defaults."""


def origin_of(checkpoint: Checkpoint, config: Config, tokenizer: StoredTokenizer) -> dict[str, Any]:
    """The content of training.json."""
    state, progress = checkpoint.state, checkpoint.progress
    return {
        "format_version": FORMAT_VERSION,
        "source": checkpoint.weights_source,
        "initial_weights": None if config.train.init_from is None else names_of([Path(config.train.init_from)])[0],
        "step": progress.step,
        "sequences": progress.consumed_sequences,
        "tokens": progress.tokens(config.model.sequence_length),
        "stages": [stage.to_json() for stage in progress.stages],
        "loss": state["loss"],
        "validation_loss": state["validation_loss"],
        "evaluations": evaluations_of(checkpoint),
        "data_digest": state["manifest_digest"],
        "tokenizer": tokenizer.entry.model_dump(mode="json"),
        "by_line": tokenizer.by_line,
        "versions": dict(state["versions"]),
        "config": without_places(config),
    }


def evaluations_of(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """What launch/evaluate.py found for this checkpoint: task, measures and number of examples of each. What is older
    than the checkpoint was found for another that once had its name."""
    folder, found = results_folder(checkpoint), []
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            if result.get("time", math.inf) < checkpoint.state["time"]:
                continue
            measured = {key: float(result[key]) for key in MEASURES if result.get(key) is not None}
            found.append({"task": str(result["task"]), **measured, "examples": int(result["examples"])})
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # of lm-evaluation-harness, or of the user
    return found


def without_places(config: Config) -> dict[str, Any]:
    """The configuration as JSON, for other machines."""
    tree = to_json(config)
    defaults = to_json(Config(model=config.model))
    for section, key in PATHS:
        tree[section][key] = defaults[section][key]
    return {key: value if key == "description" else _shortened(value) for key, value in tree.items()}


def _shortened(value: Any) -> Any:
    """`value` with the last part of every absolute path and URL in it: of a manifest the name of its folder. A relative
    path, as in the configurations of the project, stays."""
    if isinstance(value, dict):
        return {key: _shortened(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_shortened(inner) for inner in value]
    if not isinstance(value, str) or not (value.startswith(("/", "~")) or "://" in value):
        return value
    path = PurePosixPath(value)
    return path.parent.name if path.name == "manifest.json" else path.name
