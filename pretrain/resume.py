"""Whether and where a run continues: which checkpoint, and which settings may differ from it."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from common.errors import UserError
from pretrain.checkpoint import Checkpoint, DamagedCheckpoint, list_checkpoints
from pretrain.checkpoint.folder import COMMIT_FILE, STATE_FILE
from pretrain.config.loading import fields, flatten, to_json
from pretrain.config.schedule import SPANNING, keeps_the_past
from pretrain.config.schema import FREE, Config, ScheduleConfig

SCHEDULE = {"schedule", "train.steps"}
"""What decides learning rates, beside their peak; see schedule.keeps_the_past for when it may change."""


def candidates(config: Config, run_dir: Path) -> list[Path]:
    """Checkpoints to try, best first, following checkpoint.resume. Raises UserError."""
    choice = config.checkpoint.resume
    existing = list_checkpoints(run_dir / "checkpoints")
    if choice == "auto":
        return existing[::-1]
    if choice == "never":
        if existing:
            raise UserError(
                f"checkpoint.resume: is never, but {run_dir} holds {len(existing)} checkpoints; choose another "
                f"--run-dir, or set checkpoint.resume to auto to continue"
            )
        return []
    # A path is where a branch starts. The same command, started again, continues that branch.
    start = named_checkpoint(choice)
    return [path for path in existing[::-1] if _starts_at(path) == str(start)] + [start]


def named_checkpoint(choice: str) -> Path:
    """The checkpoint that checkpoint.resume names. Raises UserError, with the checkpoint that was probably meant, if it
    names something else."""
    path = _absolute(choice)
    if os.path.isfile(path):
        is_part = os.path.exists(path.parent / STATE_FILE)
        meant = f"set it to its folder, {path.parent}" if is_part else "set it to auto, never or a step-... folder"
        raise UserError(f"checkpoint.resume: {path} is a file, not the folder of a checkpoint; {meant}")
    if os.path.exists(path / STATE_FILE) or not os.path.isdir(path):
        return path  # opening it says what is missing
    for folder, what in ((path, "a folder of checkpoints"), (path / "checkpoints", "a run folder")):
        if found := list_checkpoints(folder):
            newest = next((p for p in found[::-1] if (p / COMMIT_FILE).is_file()), found[-1])
            raise UserError(f"checkpoint.resume: {path} is {what}, not a checkpoint; its newest is: set it to {newest}")
    raise UserError(
        f"checkpoint.resume: {path} is no checkpoint (it holds no {STATE_FILE}) and no run with checkpoints; set it to "
        f"auto, never or a step-... folder"
    )


def _absolute(choice: str) -> Path:
    # Not pathlib's: those raise for ~NAME of nobody and for links in a circle.
    return Path(os.path.realpath(os.path.expanduser(choice)))


def branch_start(config: Config, resumed: Checkpoint | None) -> str | None:
    """What checkpoints of this start record as their `branch_start`: the path given as checkpoint.resume, if any."""
    if config.checkpoint.resume not in ("auto", "never"):
        return str(_absolute(config.checkpoint.resume))
    return resumed.state["branch_start"] if resumed else None


def _starts_at(path: Path) -> str | None:
    try:
        return Checkpoint.open(path).state["branch_start"]
    except DamagedCheckpoint:
        return None


def changed_settings(config: Config, checkpoint: Checkpoint, manifest_digest: str) -> dict[str, tuple[Any, Any]]:
    """{dotted key: (then, now)} of every setting that differs. Raises UserError if one of them may not change."""
    then, now = flatten(checkpoint.state["config"]), flatten(to_json(config))
    for key in now.keys() - then.keys():  # younger than the checkpoint, or of another kind of layer
        kind = then.get(f"{key.rpartition('.')[0]}.type")
        for owner, default in _defaults().get(key, []):
            if owner in (None, kind):
                then[key] = default
    changes = {
        key: (then.get(key), now.get(key)) for key in sorted(then.keys() | now.keys()) if then.get(key) != now.get(key)
    }
    data_key = "data.sources" if config.data.sources else "data.manifest"
    data_changed = checkpoint.state["manifest_digest"] != manifest_digest
    if data_changed:
        changes[f"{data_key} (digest)"] = (checkpoint.state["manifest_digest"][:12], manifest_digest[:12])
    allowed = free_keys() | set(config.checkpoint.allow_changes)
    if any(_is_under(key, SCHEDULE) for key in changes) and _keeps_learning_rates(config, checkpoint):
        allowed |= SCHEDULE
    refused = [key for key in changes if not _is_under(key, allowed)]
    if data_changed and _is_under(data_key, config.checkpoint.allow_changes):
        refused.remove(f"{data_key} (digest)")
    if refused:
        key = refused[0]
        more = f" (and {len(refused) - 1} more: {', '.join(refused[1:])})" if len(refused) > 1 else ""
        names = dict.fromkeys([*config.checkpoint.allow_changes, *map(_allowing, refused)])
        why = f" ({_why_not_extended(config)})" if _is_under(key, SCHEDULE) else ""
        one = len(refused) == 1
        raise UserError(
            f"{key}: was {json.dumps(changes[key][0])} in {checkpoint.path}, is {json.dumps(changes[key][1])} now"
            f"{more}; a resumed run "
            f"keeps {'it' if one else 'them'}{why}: restore the old {'value' if one else 'values'}, choose another "
            f"--run-dir, or allow {'the change' if one else 'all changes'} with "
            f"--set 'checkpoint.allow_changes={json.dumps(list(names))}'"
        )
    return changes


def _allowing(change: str) -> str:
    """What allow_changes must list to allow `change`: its key, or the section of a key that this version has not."""
    name = change.removesuffix(" (digest)")
    known = [key for key, _, _ in fields()]
    while "." in name and not name.startswith("deepspeed.") and not any(_is_under(key, [name]) for key in known):
        name = name.rpartition(".")[0]
    return name


def _keeps_learning_rates(config: Config, checkpoint: Checkpoint) -> bool:
    """Whether the steps before `checkpoint` had the learning rates that `config` gives them, at one peak."""
    saved = checkpoint.state["config"]
    try:
        schedule = ScheduleConfig.model_validate(saved["schedule"])
    except ValueError:  # of a version with other keys
        return False
    then, now = (schedule, saved["train"]["steps"]), (config.schedule, config.train.steps)
    return keeps_the_past(then, now, checkpoint.progress.step)


def _why_not_extended(config: Config) -> str:
    if config.schedule.shape in SPANNING:
        return f"schedule.shape = {config.schedule.shape} spans the whole run; constant, inverse_sqrt and wsd do not"
    return (
        "the steps so far would have had other learning rates; a checkpoint from before wsd's decay can be extended, "
        "with checkpoint.resume=PATH"
    )


def free_keys() -> set[str]:
    """Dotted keys that may change on resume: layout, machine, logging and stop settings."""
    return {key for key, section, name in fields() if section.model_fields[name].json_schema_extra == FREE}


@functools.cache
def _defaults() -> dict[str, list[tuple[str | None, Any]]]:
    """{dotted key: [(`type` of a section that has it, or None if it is the only one, default as plain JSON)]}."""
    owners: dict[str, list[tuple[str | None, Any]]] = {}
    for key, section, name in fields():
        field = section.model_fields[name]
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        kind = section.model_fields["type"].default if "type" in section.model_fields else None
        owners.setdefault(key, []).append((kind, list(default) if isinstance(default, tuple) else default))
    return {key: [(None, found[0][1])] if len(found) == 1 else found for key, found in owners.items()}


def newest_committed(paths: list[Path]) -> Checkpoint | None:
    """The first of `paths` that is committed and whose files have their sizes; not collective, reads no tensor. Raises
    UserError as `newest_valid`."""
    reasons: list[str] = []
    for path in paths:
        try:
            return Checkpoint.open(path)
        except DamagedCheckpoint as error:
            reasons.append(str(error))
    _refuse_without(reasons)
    return None


def newest_valid(
    paths: list[Path], *, rank: int, world_size: int, gather: Callable[[str | None], list[str | None]] | None = None
) -> tuple[Checkpoint | None, list[str]]:
    """The first of `paths` whose files match their sha256, and the reasons why others were passed over; collective,
    unless `gather` gives what all ranks found from what this one did.

    Raises UserError, on every rank, if there are checkpoints but none is whole: starting again from step 0 is never
    what a run folder with checkpoints asks for."""
    reasons: list[str] = []
    for path in paths:
        checkpoint: Checkpoint | None = None
        problem: str | None = None
        try:
            checkpoint = Checkpoint.open(path)
            damaged = checkpoint.damaged_file(rank=rank, world_size=world_size)
            problem = f"checkpoint {path}: {damaged}" if damaged else None
        except DamagedCheckpoint as error:
            problem = str(error)
        found = next((p for p in (gather or _gathered)(problem) if p), None)
        if found is None:
            return checkpoint, reasons
        reasons.append(found)
    _refuse_without(reasons)
    return None, reasons


def _gathered(problem: str | None) -> list[str | None]:
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    return problems


def _refuse_without(reasons: list[str]) -> None:
    """Raises UserError if checkpoints were found and passed over, for these reasons, until none was left."""
    if reasons:
        raise UserError(
            f"no checkpoint is whole ({'; '.join(reasons)}); move them away, choose another --run-dir, or name another "
            f"checkpoint in checkpoint.resume"
        )


def environment_changes(checkpoint: Checkpoint, engine_layout: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """{name: (then, now)} of data-parallel size and versions that differ from the checkpoint's. The other sizes are
    keys of the configuration, which `changed_settings` compares."""
    from pretrain.checkpoint.state import versions  # imports DCP, which a check before the start does without

    then = {"data-parallel size": checkpoint.state["layout"].get("data"), **checkpoint.state["versions"]}
    now = {"data-parallel size": engine_layout["data"], **versions()}
    return {key: (then.get(key), now[key]) for key in now if then.get(key) != now[key]}


def _is_under(key: str, prefixes: Any) -> bool:
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)
