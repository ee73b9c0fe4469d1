"""Which settings may differ from those of the checkpoint that a run continues from."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from common.errors import UserError
from common.json_config import keys
from pretrain.config.fields import FREE
from pretrain.config.keys import flatten
from pretrain.config.loading import to_json
from pretrain.config.schedule import SPANNING, keeps_the_past
from pretrain.config.schema import Config, ScheduleConfig

SCHEDULE = {"schedule", "train.steps"}
"""The settings that decide learning rates, apart from their peak; schedule.keeps_the_past says when they may change."""


@dataclass(frozen=True)
class SavedRun:
    """What a checkpoint says of the run that wrote it."""

    checkpoint: str
    """Its path, for messages."""
    config: dict[str, Any]
    """The resolved configuration as JSON."""
    manifest_digest: str
    steps: int
    """Optimizer steps done."""


def changes_since(
    saved: SavedRun, config: Config, manifest_digest: str, fits: Callable[[], bool] = lambda: True
) -> dict[str, tuple[Any, Any]]:
    """{dotted key: (then, now)} of every setting that differs. Raises UserError if one of them may not change. `fits`:
    whether the saved weights have the shapes of this model's; asked only where a change is refused."""
    then, now = flatten(saved.config), flatten(to_json(config))
    for key in now.keys() - then.keys():  # newer than the checkpoint, or of another kind of layer
        kind = then.get(f"{key.rpartition('.')[0]}.type")
        for owner, default in _defaults().get(key, []):
            if owner in (None, kind):
                then[key] = default
    changes = {
        key: (then.get(key), now.get(key)) for key in sorted(then.keys() | now.keys()) if then.get(key) != now.get(key)
    }
    # A section that is empty on one side: its keys say what changed.
    changes = {key: pair for key, pair in changes.items() if pair not in (({}, None), (None, {}))}
    data_key = "data.sources" if config.data.sources else "data.manifest"
    if saved.manifest_digest != manifest_digest:
        changes[f"{data_key} (digest)"] = (saved.manifest_digest[:12], manifest_digest[:12])
    allowed = free_keys() | set(config.checkpoint.allow_changes)
    if _is_under(data_key, config.checkpoint.allow_changes):  # that it is free allows no other contents
        allowed.add(f"{data_key} (digest)")
    if any(_is_under(key, SCHEDULE) for key in changes) and _keeps_learning_rates(saved, config):
        allowed |= SCHEDULE
    refused = [key for key in changes if not _is_under(key, allowed)]
    if refused:
        key = refused[0]
        more = f" (and {len(refused) - 1} more: {', '.join(refused[1:])})" if len(refused) > 1 else ""
        names = dict.fromkeys([*config.checkpoint.allow_changes, *map(_allowing, refused)])
        why = f" ({_why_not_extended(config, saved.steps)})" if _is_under(key, SCHEDULE) else ""
        one = len(refused) == 1
        allow = (
            f", or allow {'the change' if one else 'all changes'} with "
            f"--set 'checkpoint.allow_changes={json.dumps(list(names))}'"
        )
        if any(_is_under(key, {"model"}) for key in refused) and not fits():
            allow = "; the saved weights have other sizes, so the change cannot be allowed"
        elif then.get("model.position.memory_chunks") and "batch.global_sequences" in refused:
            streams = changes["batch.global_sequences"][0]
            allow = f"; the checkpoint holds the memory of {streams} streams of text, so the change cannot be allowed"
        raise UserError(
            f"{key}: was {json.dumps(changes[key][0])} in {saved.checkpoint}, is {json.dumps(changes[key][1])} now"
            f"{more}; a resumed run "
            f"keeps {'it' if one else 'them'}{why}: restore the old {'value' if one else 'values'} or choose another "
            f"--run-dir{allow}"
        )
    return changes


def _allowing(change: str) -> str:
    """What allow_changes must list to allow `change`: its key, or the section of a key that this version does not
    have."""
    name = change.removesuffix(" (digest)")
    known = [key.dotted for key in keys(Config)]
    while "." in name and not name.startswith("deepspeed.") and not any(_is_under(key, [name]) for key in known):
        name = name.rpartition(".")[0]
    return name


def _keeps_learning_rates(saved: SavedRun, config: Config) -> bool:
    """Whether the steps before the checkpoint had the learning rates that `config` gives them for the same peak."""
    try:
        schedule = ScheduleConfig.model_validate(saved.config["schedule"])
    except ValueError:  # saved by a version with other keys
        return False
    then, now = (schedule, saved.config["train"]["steps"]), (config.schedule, config.train.steps)
    return keeps_the_past(then, now, saved.steps)


def _why_not_extended(config: Config, done: int) -> str:
    if config.train.steps < done:
        return f"{done} steps are done; an earlier checkpoint is taken with checkpoint.resume=PATH"
    if config.schedule.shape in SPANNING:
        return f"schedule.shape = {config.schedule.shape} spans the whole run; constant, inverse_sqrt and wsd do not"
    return (
        "the steps so far would have had other learning rates; a checkpoint from before wsd's decay can be extended, "
        "with checkpoint.resume=PATH"
    )


def free_keys() -> set[str]:
    """Dotted keys that may change on resume: layout, machine, logging and stop settings."""
    return {key.dotted for key in keys(Config) if key.field.json_schema_extra == FREE}


@functools.cache
def _defaults() -> dict[str, list[tuple[str | None, Any]]]:
    """{dotted key: [(`type` of a section that has it, or None if it is the only one, default as plain JSON)]}."""
    owners: dict[str, list[tuple[str | None, Any]]] = {}
    for key in keys(Config):
        default = None if key.field.is_required() else key.field.get_default(call_default_factory=True)
        kind = key.section.model_fields["type"].default if "type" in key.section.model_fields else None
        owners.setdefault(key.dotted, []).append((kind, list(default) if isinstance(default, tuple) else default))
    return {key: [(None, found[0][1])] if len(found) == 1 else found for key, found in owners.items()}


def _is_under(key: str, prefixes: Any) -> bool:
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)
