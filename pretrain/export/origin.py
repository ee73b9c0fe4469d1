"""Where exported weights come from (training.json): configuration, progress, losses, data, tokenizer, versions.

Places on the machine of the training are left out: of a path to data its last part stays.
"""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path, PurePosixPath
from typing import Any

from pretrain.checkpoint.folder import Checkpoint, names_of
from pretrain.checkpoint.tokenizer_file import StoredTokenizer
from pretrain.config.loading import to_json
from pretrain.config.schema import Config
from pretrain.evaluation.results import results_folder
from pretrain.views.reading import RunView

FORMAT_VERSION = 1
MEASURES = ("loss", "perplexity", "accuracy", "bits_per_byte")
"""Numbers of an evaluation that a model card shows."""
PATHS = (
    *(("data", "cache_dir"), ("train", "init_from"), ("train", "replay_routing"), ("checkpoint", "resume")),
    ("monitor", "alert_command"),
)
"""Keys whose value is a place on a machine, or holds some; they become their defaults."""


def origin_of(
    checkpoint: Checkpoint, config: Config, tokenizer: StoredTokenizer, *, ema: bool = False
) -> dict[str, Any]:
    """The content of training.json, of the weights or of their moving average."""
    state, progress, source = checkpoint.state, checkpoint.progress, checkpoint.weights_source
    if ema:
        source = f"moving average, decay {config.train.ema_decay:g} a step"
    return {
        "format_version": FORMAT_VERSION,
        "source": source,
        "initial_weights": None if config.train.init_from is None else names_of([Path(config.train.init_from)])[0],
        "step": progress.step,
        "sequences": progress.consumed_sequences,
        "tokens": progress.tokens(config.model.sequence_length),
        "stages": [stage.to_json() for stage in progress.stages],
        "loss": None if ema else state["loss"],  # both are those of the weights
        "validation_loss": None if ema else state["validation_loss"],
        "evaluations": evaluations_of(checkpoint, ema=ema),
        "data_digest": state["manifest_digest"],
        "tokenizer": tokenizer.entry.model_dump(mode="json"),
        "by_line": tokenizer.by_line,
        "versions": dict(state["versions"]),
        "config": without_places(config),
    }


def evaluations_of(checkpoint: Checkpoint, *, ema: bool = False) -> list[dict[str, Any]]:
    """What launch/evaluate.py found for this checkpoint, or for its moving average; of other tasks what its run found
    (evaluate.tasks). Task (of a validation the split), measures, and how many examples (tokens) they are of; `limit`
    where those are the first of each file. Of two files of one task and split the newer one counts; one older than the
    checkpoint was found for another that once had its name."""
    folder, found = results_folder(checkpoint, ema=ema), dict[tuple[str, ...], tuple[float, dict[str, Any]]]()
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            when, one = float(result.get("time", math.inf)), _evaluation(result)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # of lm-evaluation-harness, or of the user
        of = one["task"], one.get("split", "")
        if when >= checkpoint.state["time"] and (of not in found or when > found[of][0]):
            found[of] = when, one
    tasks = {task for task, _ in found}
    of_the_run = [] if ema else _of_the_run(checkpoint)
    return [one for _, one in found.values()] + [one for one in of_the_run if one["task"] not in tasks]


def _of_the_run(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """What the run computed after the step of this checkpoint, where it is still in the run's folder."""
    path = checkpoint.path.absolute()
    if path.parent.name != "checkpoints" or checkpoint.weights_source is not None:
        return []
    view, found = RunView(path.parent.parent), []
    try:
        view.update_events()
    except OSError:
        return []
    limit = checkpoint.state["config"].get("evaluate", {}).get("tasks_limit") or None  # of events without one
    for _, event in sorted(view.tasks(at_step=checkpoint.progress.step).items()):
        with contextlib.suppress(ValueError, KeyError, TypeError):  # another version's
            found.append(_evaluation({"limit": limit, **event}))
    return found


def _evaluation(result: dict[str, Any]) -> dict[str, Any]:
    measured = {key: float(result[key]) for key in MEASURES if result.get(key) is not None}
    return {**_what(result), **measured}


def _what(result: dict[str, Any]) -> dict[str, Any]:
    """Which task a result is of, and how much of it. Raises KeyError, TypeError or ValueError where it is none."""
    if result["task"] == "validation":
        return {"task": "validation", "split": str(result["split"]), "tokens": int(result["tokens"])}
    limit = {} if result.get("limit") is None else {"limit": int(result["limit"])}
    return {"task": str(result["task"]), "examples": int(result["examples"]), **limit}


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
