"""Weights of a checkpoint that a new run begins with, instead of random ones (train.init_from)."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch.distributed as dist

from common.errors import UserError, kind_of
from common.presence import exists, is_dir
from model.parallel.context import ParallelContext
from pretrain.checkpoint.folder import (
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
from pretrain.parallel.agreement import agreed, from_first_rank

KEY = "train.init_from"


def initial_checkpoint(
    config: Config, tokenizer_sha256: str | None, *, rank: int = 0, world_size: int = 1
) -> Checkpoint | None:
    """What train.init_from names, opened; None if it is null. `tokenizer_sha256`: of the run's data, None for bytes.
    `rank`, `world_size`: see `Checkpoint.open`. Raises UserError."""
    place = config.train.init_from
    return None if place is None else _opened(_named(place), config, tokenizer_sha256, rank, world_size)


def _named(place: str) -> Path:
    """The checkpoint that train.init_from names: of a run folder the newest. Raises UserError."""
    path = Path(os.path.expanduser(place))  # pathlib raises for ~NAME of nobody
    try:
        if not is_dir(path):
            raise UserError(f"{KEY}: there is no folder {path}; name a checkpoint (step-...) or a run folder")
        if exists(path / STATE_FILE):
            return path
        found = list_checkpoints(path / "checkpoints" if is_dir(path / "checkpoints") else path)
        if not found:
            check_no_export(path, KEY)
            raise UserError(
                f"{KEY}: {path} is no checkpoint and holds none; name a checkpoint (step-...) or a run folder"
            )
        return newest_of(found)
    except OSError as error:
        raise kind_of(error)(f"{KEY}: {path} cannot be read: {error.strerror}") from None


def _opened(path: Path, config: Config, tokenizer_sha256: str | None, rank: int, world_size: int) -> Checkpoint:
    """Raises UserError where the run cannot begin with the weights of this checkpoint."""
    checkpoint = Checkpoint.open(path, rank=rank, world_size=world_size)
    theirs, weights_only = checkpoint.state["tokenizer_sha256"], checkpoint.state.get("weights_only")
    is_known = theirs is not None or weights_only is None or weights_only["tokenizer"] is not None
    if is_known and theirs != tokenizer_sha256:
        raise UserError(
            f"{KEY}: {path} was trained with another tokenizer than this run's data have, so its embedding means other "
            f"pieces; prepare the data with its tokenizer, or leave the key out"
        )
    check_shapes(checkpoint, config.model, KEY)
    return checkpoint


def load_initial(config: Config, tokenizer_sha256: str | None, model: Any, parallel: ParallelContext) -> None:
    """Fills a model that ZeRO has not yet sharded with this rank's part of those weights, after all ranks together have
    checked the files. The first rank says where the weights come from, and which settings of the model differ.
    Collective; raises UserError, agreed."""
    place = config.train.init_from
    assert place is not None
    path = from_first_rank(lambda: _named(place))  # a run that goes on has another newest one for who looks later

    def check() -> Checkpoint:
        rank, world_size = dist.get_rank(), dist.get_world_size()
        checkpoint = _opened(path, config, tokenizer_sha256, rank, world_size)
        if problem := checkpoint.damaged_file(rank=rank, world_size=world_size):
            raise DamagedCheckpoint(f"{KEY}: checkpoint {checkpoint.path}: {problem}; name another")
        return checkpoint

    from pretrain.checkpoint.loading import load_weights_together  # imports DCP, which a new start does without

    checkpoint = agreed(check)
    load_weights_together(checkpoint, model, parallel)
    if parallel.is_first:
        print(f"initial weights: {checkpoint.path} (step {checkpoint.progress.step})", flush=True)
        for key, (then, now) in model_changes(checkpoint, config).items():
            print(f"  not as there: {key}: {json.dumps(then)} -> {json.dumps(now)}", flush=True)


def model_changes(checkpoint: Checkpoint, config: Config) -> dict[str, tuple[Any, Any]]:
    """{key of the model: (in the checkpoint, in `config`)} of what differs; None where one of them has no such key."""
    then = flatten({"model": checkpoint.state["config"]["model"]})
    now = flatten({"model": to_json(config)["model"]})
    keys = sorted(then.keys() | now.keys())
    return {key: (then.get(key), now.get(key)) for key in keys if then.get(key) != now.get(key)}
