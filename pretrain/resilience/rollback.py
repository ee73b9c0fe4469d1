"""Going back: the rollbacks of a run, kept in RUN_DIR/rollbacks.json, and where to begin again."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from common.errors import UserError, kind_of
from common.files import write_json
from common.presence import exists
from pretrain.checkpoint import Checkpoint, DamagedCheckpoint, step_of
from pretrain.checkpoint.folder import CHECKPOINT_NAME
from pretrain.data.progress import Progress, Range, merged
from pretrain.data.stages import Stage


@dataclass(frozen=True)
class Rollback:
    """One rollback, made or requested."""

    reason: str
    at_step: int
    """The step after which it was decided."""
    first_step: int
    """The first step to undo: a checkpoint from before it serves."""
    skipped: Range | None = None
    """Positions of the data order never to be read again."""
    branch_start: str | None = None
    """The path given as checkpoint.resume, if any: another branch has rollbacks of its own."""
    stage: Stage | None = None
    """The stage of the data whose positions `skipped` are; None: a file from before it was kept."""
    manifest_digest: str | None = None
    """Sources.digest of those data, in files from before `stage` was kept; None: in files from before that too."""
    is_pending: bool = False
    """Decided, but no start has begun before `first_step` yet: the run was stopped or killed in between."""

    def to_json(self) -> dict[str, Any]:
        tree = asdict(self) | {"stage": None if self.stage is None else self.stage.to_json()}
        if not tree["is_pending"]:
            del tree["is_pending"]
        return tree

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> Rollback:
        """The inverse of `to_json`. Files of before have fewer keys."""
        skipped, stage = tree.get("skipped"), tree.get("stage")
        known = {"skipped": tuple(skipped) if skipped else None, "stage": Stage.from_json(stage) if stage else None}
        return cls(**{**tree, **known})


def read_rollbacks(run_dir: Path, branch_start: str | None) -> list[Rollback]:
    """Rollbacks of this branch of the run, oldest first. Raises UserError if the file cannot be read: it decides which
    data the run leaves out."""
    path = run_dir / "rollbacks.json"
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        found = [Rollback.from_json(row) for row in rows]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise kind_of(error)(
            f"--run-dir: {path} cannot be read ({error}); it says which data the run leaves out: repair it, or remove "
            f"it to read all data"
        ) from None
    return [rollback for rollback in found if rollback.branch_start == branch_start]


def pending(rollbacks: list[Rollback]) -> Rollback | None:
    """The rollback that the last start decided and did not live to make, if any, of what `read_rollbacks` gives."""
    return rollbacks[-1] if rollbacks and rollbacks[-1].is_pending else None


def record(run_dir: Path, rollback: Rollback) -> None:
    """Adds a rollback, durably, before anything is undone. Raises UserError if the disk refuses."""
    path = run_dir / "rollbacks.json"
    try:
        rows = json.loads(path.read_text(encoding="utf-8")) if exists(path) else []
        write_json(path, [*rows, rollback.to_json()])
    except OSError as error:
        raise kind_of(error)(f"--run-dir: {path} cannot be written: {error.strerror}") from None


def record_made(run_dir: Path) -> None:
    """Writes down that no rollback is pending any more: what they undo is set aside. Raises OSError."""
    path = run_dir / "rollbacks.json"
    rows = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, [{key: value for key, value in row.items() if key != "is_pending"} for row in rows])


def serving(paths: list[Path], rollback: Rollback) -> list[Path]:
    """The checkpoints among `paths`, newest first, that `rollback` can go back to, best first: those from before its
    first step; then, if retention has left none of them or none is whole, those from before the step that showed the
    fault, the oldest first. No paths: the beginning of the run. Raises UserError."""
    steps = {path: _step(path) for path in paths}
    before = [path for path in paths if steps[path] < rollback.first_step]
    within = [path for path in paths[::-1] if rollback.first_step <= steps[path] < rollback.at_step]
    if paths and not before and not within:
        raise UserError(
            f"checkpoint.keep_last: the run must go back to before step {rollback.at_step} ({rollback.reason}), and no "
            f"checkpoint is old enough; keep more of them"
        )
    return before + within


def _step(path: Path) -> int:
    try:
        return Checkpoint.open(path, world_size=0).progress.step
    except DamagedCheckpoint:  # whoever opens it says so, and may be able to
        return step_of(path) if CHECKPOINT_NAME.fullmatch(path.name) else 2**62


def with_skips(progress: Progress, stage: Stage, manifest_digest: str, rollbacks: list[Rollback]) -> Progress:
    """`progress` of a checkpoint, from which on `stage` is read, with the ranges ahead of it that rollbacks left out of
    that very stage. Ranges behind it are the checkpoint's own: they say how it came to be. Of a range that it lies in,
    because none from before it was kept, the rest is left out. The checkpoint's own ranges ahead of it are another
    stage's if this one begins here: the same positions are other windows, which nobody left out."""

    def is_ours(rollback: Rollback) -> bool:
        if rollback.stage is not None:
            return rollback.stage == stage
        return rollback.manifest_digest in (None, manifest_digest)

    position = progress.position
    own = tuple(part for part in progress.skipped_ranges if part[0] < position or stage.first < position)
    left_out = (rollback.skipped for rollback in rollbacks if rollback.skipped is not None and is_ours(rollback))
    ahead = tuple((max(first, position), end) for first, end in left_out if end > position)
    return replace(progress, skipped_ranges=merged((*own, *ahead)))
