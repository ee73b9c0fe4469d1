"""Weights of a checkpoint that a new run begins with, instead of random ones (train.init_from)."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch.distributed as dist

from common.errors import PassingError, UserError, kind_of
from common.line_log import LineLog, is_event
from common.presence import exists, is_dir
from model.parallel.context import ParallelContext
from pretrain.checkpoint.folder import (
    AT_ONCE,
    STATE_FILE,
    Checkpoint,
    DamagedCheckpoint,
    check_no_export,
    list_checkpoints,
    newest_of,
)
from pretrain.checkpoint.shapes import check_shapes
from pretrain.config.keys import flatten
from pretrain.config.loading import to_json
from pretrain.config.schema import Config
from pretrain.data.patience import Patience, patient_seconds
from pretrain.parallel.agreement import PeerFailed, agree, agreed, from_first_rank

KEY = "train.init_from"
INITIAL_WEIGHTS = "initial_weights"
"""The event of a start with them: `path`, the key's value, and `checkpoint`, which that was."""


def initial_checkpoint(
    config: Config,
    tokenizer_sha256: str | None,
    *,
    world_size: int = 1,
    run_dir: Path | None = None,
    patience: Patience = AT_ONCE,
) -> Checkpoint | None:
    """What train.init_from names, opened; None if it is null. `tokenizer_sha256`: of the run's data, None for bytes.
    `world_size`: see `Checkpoint.open`. `run_dir`, `patience`: see `initial_place`. Raises UserError."""
    named = config.train.init_from
    if named is None:
        return None
    while True:
        place = initial_place(named, run_dir, patience=patience)
        try:
            return _opened(place, config, tokenizer_sha256, world_size=world_size, patience=patience)
        except UserError:
            if os.path.isdir(place):
                raise  # else the run that it is of goes on and has removed it, so that another one is the newest


def initial_place(named: str, run_dir: Path | None = None, *, patience: Patience = AT_ONCE) -> Path:
    """The checkpoint that train.init_from, `named`, means: of a run folder the newest, or the one that an earlier start
    of the run in `run_dir` has begun with, as long as it is there: the other run may go on, and this one, killed before
    its first checkpoint, would begin with other weights. `patience` makes every read. Raises UserError."""
    path = Path(os.path.expanduser(named))  # pathlib raises for ~NAME of nobody
    try:
        begun = None if run_dir is None else patience(lambda: _begun_with(run_dir, named))
        return begun or patience(lambda: _newest(path, patience))
    except OSError as error:
        raise kind_of(error)(f"{KEY}: {error.filename or path} cannot be read: {error.strerror}") from None


def _begun_with(run_dir: Path, named: str) -> Path | None:
    """The checkpoint that the newest start of a run without checkpoints has begun with, if it is still there. Raises
    OSError."""
    rows = LineLog(run_dir / "events.jsonl", is_event).rows()
    found = [row.get("checkpoint") for row in rows if row["event"] == INITIAL_WEIGHTS and row.get("path") == named]
    begun = found[-1] if found else None
    return Path(begun) if isinstance(begun, str) and exists(Path(begun) / STATE_FILE) else None


def _newest(path: Path, patience: Patience) -> Path:
    """Raises UserError and OSError."""
    if not is_dir(path):
        raise UserError(f"{KEY}: there is no folder {path}; name a checkpoint (step-...) or a run folder")
    if exists(path / STATE_FILE):
        return path.absolute()
    found = list_checkpoints(path / "checkpoints" if is_dir(path / "checkpoints") else path, patience=patience)
    if not found:
        check_no_export(path, KEY)
        raise UserError(f"{KEY}: {path} is no checkpoint and holds none; name a checkpoint (step-...) or a run folder")
    return newest_of(found).absolute()


def _opened(
    path: Path,
    config: Config,
    tokenizer_sha256: str | None,
    *,
    rank: int = 0,
    world_size: int = 1,
    patience: Patience = AT_ONCE,
) -> Checkpoint:
    """Raises UserError where the run cannot begin with the weights of this checkpoint."""
    checkpoint = Checkpoint.open(path, rank=rank, world_size=world_size, patience=patience)
    theirs, weights_only = checkpoint.state["tokenizer_sha256"], checkpoint.state.get("weights_only")
    is_known = theirs is not None or weights_only is None or weights_only["tokenizer"] is not None
    if is_known and theirs != tokenizer_sha256:
        raise UserError(
            f"{KEY}: {path} was trained with another tokenizer than this run's data have, so its embedding means other "
            f"pieces; prepare the data with its tokenizer, or leave the key out"
        )
    check_shapes(checkpoint, config.model, KEY)
    return checkpoint


def load_initial(
    config: Config, tokenizer_sha256: str | None, model: Any, parallel: ParallelContext, *, place: Path | None = None
) -> None:
    """Fills a model that ZeRO has not yet sharded with this rank's part of those weights, after all ranks together have
    checked the files. `place`: their checkpoint, as `initial_place` gave it, the same on all ranks. The first rank says
    where the weights come from, and which settings of the model differ. Collective; raises UserError, agreed; where the
    checkpoint was removed meanwhile and there is another, a PassingError."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    patience = Patience(patient_seconds(config.resilience), rank=rank)
    # Looked up by one: a run that goes on has another newest one for who looks later.
    named = config.train.init_from
    assert named is not None
    path = from_first_rank(lambda: initial_place(named, patience=patience)) if place is None else place

    def check() -> Checkpoint:
        checkpoint = _opened(path, config, tokenizer_sha256, rank=rank, world_size=world_size, patience=patience)
        if problem := checkpoint.damaged_file(rank=rank, world_size=world_size, patience=patience):
            raise DamagedCheckpoint(f"{KEY}: checkpoint {checkpoint.path}: {problem}; name another")
        return checkpoint

    from pretrain.checkpoint.loading import load_weights_together  # imports DCP, which a new start does without

    try:
        checkpoint = agreed(check)
        load_weights_together(checkpoint, model, parallel)
    except (UserError, PeerFailed):  # which all ranks have agreed on
        agree(_removed(path, named, patience))
        raise
    if parallel.is_first:
        print(f"initial weights: {checkpoint.path} (step {checkpoint.progress.step})", flush=True)
        for key, (then, now) in model_changes(checkpoint, config).items():
            print(f"  not as there: {key}: {json.dumps(then)} -> {json.dumps(now)}", flush=True)


def _removed(path: Path, named: str, patience: Patience) -> UserError | None:
    """What to say where `path`, which `named` meant, is gone; None where it is there."""
    if os.path.isdir(path):
        return None
    try:
        newest = initial_place(named, patience=patience)
    except UserError as error:
        return error
    return PassingError(
        f"{KEY}: {path} was removed before it was read, as by a run that goes on (checkpoint.keep_last); start again: "
        f"the run then begins with {newest}"
    )


def model_changes(checkpoint: Checkpoint, config: Config) -> dict[str, tuple[Any, Any]]:
    """{key of the model: (in the checkpoint, in `config`)} of what differs; None where one of them has no such key."""
    then = flatten({"model": checkpoint.state["config"]["model"]})
    now = flatten({"model": to_json(config)["model"]})
    keys = sorted(then.keys() | now.keys())
    return {key: (then.get(key), now.get(key)) for key in keys if then.get(key) != now.get(key)}
