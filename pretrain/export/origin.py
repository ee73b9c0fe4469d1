"""Where exported weights come from (training.json): configuration, progress, losses, data, tokenizer, versions.

Places on the machine of the training are left out: of a path to data its last part stays.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

from pretrain.checkpoint.folder import Checkpoint
from pretrain.checkpoint.tokenizer_file import StoredTokenizer
from pretrain.config.loading import to_json
from pretrain.config.schema import Config

FORMAT_VERSION = 1
PATHS = (("data", "cache_dir"), ("train", "init_from"), ("train", "replay_routing"), ("checkpoint", "resume"))
"""Keys whose value is a place on a machine; they become their defaults."""


def origin_of(checkpoint: Checkpoint, config: Config, tokenizer: StoredTokenizer) -> dict[str, Any]:
    """The content of training.json."""
    state, progress = checkpoint.state, checkpoint.progress
    return {
        "format_version": FORMAT_VERSION,
        "source": checkpoint.weights_source,
        "step": progress.step,
        "sequences": progress.consumed_sequences,
        "tokens": progress.consumed_sequences * config.model.sequence_length,
        "loss": state["loss"],
        "validation_loss": state["validation_loss"],
        "data_digest": state["manifest_digest"],
        "tokenizer": tokenizer.entry.model_dump(mode="json"),
        "by_line": tokenizer.by_line,
        "versions": dict(state["versions"]),
        "config": without_places(config),
    }


def without_places(config: Config) -> dict[str, Any]:
    """The configuration as JSON, for other machines."""
    tree = to_json(config)
    defaults = to_json(Config(model=config.model))
    for section, key in PATHS:
        if key in tree[section]:
            tree[section][key] = defaults[section][key]
    for entry in (tree["data"], *tree["data"]["sources"]):
        entry["manifest"] = _last_part(entry["manifest"])
    return tree


def _last_part(place: str) -> str:
    """The name of a data set's folder; a relative path, as in the configurations of the project, stays."""
    path = PurePosixPath(place)
    if not path.is_absolute() and ":" not in place and not place.startswith("~"):
        return place
    return path.parent.name if path.name == "manifest.json" else path.name
