"""Whether and where a run continues: which checkpoint, and which settings may differ from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist

from pretrain.checkpoint import Checkpoint, list_checkpoints
from pretrain.config import FREE, Config
from pretrain.config_io import fields, flatten, to_json
from pretrain.errors import UserError


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
    path = Path(choice).expanduser().absolute()
    if not path.is_dir():
        raise UserError(
            f"checkpoint.resume: there is no checkpoint folder {path}; use auto, never or a step-... folder"
        )
    return [path]


def changed_settings(config: Config, checkpoint: Checkpoint, manifest_digest: str) -> dict[str, tuple[Any, Any]]:
    """{dotted key: (then, now)} of every setting that differs. Raises UserError if one of them may not change."""
    then, now = flatten(checkpoint.state["config"]), flatten(to_json(config))
    changes = {
        key: (then.get(key), now.get(key)) for key in sorted(then.keys() | now.keys()) if then.get(key) != now.get(key)
    }
    data_changed = checkpoint.state["manifest_digest"] != manifest_digest
    if data_changed:
        changes["data.manifest (digest)"] = (checkpoint.state["manifest_digest"][:12], manifest_digest[:12])
    free = free_keys()
    refused = [
        key for key in changes if not _is_under(key, free) and not _is_under(key, config.checkpoint.allow_changes)
    ]
    if data_changed and _is_under("data.manifest", config.checkpoint.allow_changes):
        refused.remove("data.manifest (digest)")
    if refused:
        key = refused[0]
        more = f" (and {len(refused) - 1} more: {', '.join(refused[1:4])})" if len(refused) > 1 else ""
        name = key.removesuffix(" (digest)")
        raise UserError(
            f"{key}: was {changes[key][0]!r} in {checkpoint.path}, is {changes[key][1]!r} now{more}; a resumed run "
            f"keeps it: restore the old value, choose another --run-dir, or allow the change with "
            f"--set 'checkpoint.allow_changes=[\"{name}\"]'"
        )
    return changes


def free_keys() -> set[str]:
    """Dotted keys that may change on resume: layout, machine, logging and stop settings."""
    return {key for key, section, name in fields() if section.model_fields[name].json_schema_extra == FREE}


def newest_valid(paths: list[Path], *, rank: int, world_size: int) -> tuple[Checkpoint | None, list[str]]:
    """The first of `paths` whose files match their sha256; collective. Also the reasons why others were passed over."""
    reasons: list[str] = []
    for path in paths:
        try:
            checkpoint: Checkpoint | None = Checkpoint.open(path)
            assert checkpoint is not None
            damaged = checkpoint.damaged_file(rank=rank, world_size=world_size)
            problem = f"checkpoint {path}: {damaged} does not match its sha256" if damaged else None
        except UserError as error:
            checkpoint, problem = None, str(error)
        problems: list[str | None] = [None] * world_size
        dist.all_gather_object(problems, problem)
        found = next((p for p in problems if p), None)
        if found is None:
            return checkpoint, reasons
        reasons.append(found)
    return None, reasons


def _is_under(key: str, prefixes: Any) -> bool:
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)
