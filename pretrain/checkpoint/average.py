"""The weighted mean of the weights of several checkpoints, as a checkpoint of weights alone (arXiv 1803.05407)."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError
from common.progress_bar import count_bytes
from pretrain.checkpoint.folder import Checkpoint, names_of
from pretrain.checkpoint.loading import whole_parameters
from pretrain.checkpoint.prepared_data import stored_tokenizer_of
from pretrain.checkpoint.shares import shares_of
from pretrain.checkpoint.tokenizer_file import StoredTokenizer
from pretrain.checkpoint.weights import WeightsOrigin, write_weights
from pretrain.config.keys import flatten
from pretrain.config.loading import parse_config

ONLY_IN_TRAINING = {
    "dropout",
    "expert_dropout",
    "entropy_weight",
    "entropy_scope",
    "z_loss_weight",
    "switch_loss_weight",
    "cv_loss_weight",
    "loss_scope",
    "initialization",
    "init_scale",
    "normalized_init",
}
"""Last parts of the model's keys that a trained model computes nothing with."""


def average(
    folders: Sequence[Path], out: Path, *, weights: Sequence[float] | None = None, kind: str = "master"
) -> None:
    """Writes the mean of `kind` (master, or ema: the moving averages) of the checkpoints `folders` to the new
    checkpoint `out`. `weights`: one positive number for each; they are divided by their sum; None: all the same.
    Configuration, progress and tokenizer are those of the checkpoint with the most steps. Sums are fp64; a parameter of
    one checkpoint is in memory at a time. Raises UserError; then there is no `out`."""
    shares = shares_of(weights, len(folders))
    checkpoints = [Checkpoint.open(folder) for folder in folders]
    for other in checkpoints[1:]:
        _check_same_model(checkpoints[0], other)
    for checkpoint in checkpoints:
        checkpoint.check_files()
    parameters = [whole_parameters(checkpoint, kind) for checkpoint in checkpoints]
    newest = max(checkpoints, key=lambda checkpoint: checkpoint.progress.step)
    shapes = newest.state["parameters"]

    def mean(name: str) -> Tensor:
        total = torch.zeros(shapes[name], dtype=torch.float64)
        for parameter, share in zip(parameters, shares, strict=True):
            total.add_(parameter(name).double(), alpha=share)
        return total.float()

    bar = count_bytes(out.name, sum(4 * math.prod(shape) for shape in shapes.values()))
    means = {name: partial(mean, name) for name in shapes}
    write_weights(out, origin_of(newest, _source(checkpoints, shares, kind)), means, wrote=bar)
    print(f"{out}: {_source(checkpoints, shares, kind)}", flush=True)


def _check_same_model(one: Checkpoint, other: Checkpoint) -> None:
    """Raises UserError with the first difference that makes a mean of the two meaningless."""
    first, second = (_model_keys(checkpoint) for checkpoint in (one, other))
    for key in sorted(first.keys() | second.keys()):
        if first.get(key) != second.get(key):
            raise UserError(
                f"{other.path}: {key} is {json.dumps(second.get(key))}, but {json.dumps(first.get(key))} in "
                f"{one.path}; only checkpoints of the same model have a mean"
            )
    if one.state["tokenizer_sha256"] != other.state["tokenizer_sha256"]:
        raise UserError(
            f"{other.path}: was trained with another tokenizer than {one.path}, so the rows of their embeddings mean "
            f"other pieces; only checkpoints of the same tokenizer have a mean"
        )


def _model_keys(checkpoint: Checkpoint) -> dict[str, Any]:
    config = parse_config(checkpoint.state["config"])  # keys younger than the checkpoint get their defaults
    keys = flatten({"model": config.model.model_dump(mode="json")})
    return {key: value for key, value in keys.items() if key.rpartition(".")[2] not in ONLY_IN_TRAINING}


def origin_of(checkpoint: Checkpoint, source: str, tokenizer: StoredTokenizer | None = None) -> WeightsOrigin:
    """What weights made of those of `checkpoint` are recorded with. `tokenizer`: where it is open already."""
    return WeightsOrigin(
        config=parse_config(checkpoint.state["config"]),
        source=source,
        tokenizer=stored_tokenizer_of(checkpoint)[0] if tokenizer is None else tokenizer,
        tokenizer_sha256=checkpoint.state["tokenizer_sha256"],
        manifest_digest=checkpoint.state["manifest_digest"],
        progress=checkpoint.progress,
    )


def _source(checkpoints: Sequence[Checkpoint], shares: Sequence[float], kind: str) -> str:
    what = "moving average" if kind == "ema" else "weights"
    names = names_of([checkpoint.path for checkpoint in checkpoints])
    if len(names) == 1:
        return f"{what} of {names[0]}"
    equal = len(set(shares)) == 1
    parts = [name + ("" if equal else f" x {share:.4g}") for name, share in zip(names, shares, strict=True)]
    return f"mean of the {what} of {', '.join(parts)}"
