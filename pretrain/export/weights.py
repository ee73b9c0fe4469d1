"""Weights of a checkpoint as safetensors files with the names of the model, in shards of limited size."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from common.errors import UserError
from common.files import write_json
from pretrain.checkpoint.folder import Checkpoint
from pretrain.checkpoint.loading import whole_parameters
from pretrain.checkpoint.storage import Entry, write_safetensors
from pretrain.export.folder import INDEX, WEIGHTS, shard_name

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def shards_of(shapes: Mapping[str, list[int]], itemsize: int, most_bytes: int) -> list[list[str]]:
    """Names in order, in as few groups as neighbours of at most `most_bytes` make; a larger tensor stands alone."""
    shards: list[list[str]] = [[]]
    room = most_bytes
    for name, shape in shapes.items():
        size = itemsize * math.prod(shape)
        if size > room and shards[-1]:
            shards.append([])
            room = most_bytes
        shards[-1].append(name)
        room -= size
    return shards


def write_weights(
    folder: Path,
    checkpoint: Checkpoint,
    *,
    dtype: str,
    most_bytes: int,
    wrote: Callable[[int], None],
    ema: bool = False,
) -> int:
    """Writes the checkpoint's weights in `dtype` to `folder`, or with `ema` their moving average, and an index if there
    is more than one file; returns the bytes of the tensors. A parameter is in memory at a time. `wrote` is called with
    the size of every block. Raises UserError."""
    shapes: dict[str, list[int]] = checkpoint.state["parameters"]
    kind, read = DTYPES[dtype], whole_parameters(checkpoint, "ema" if ema else "master")

    def parameter(name: str) -> Tensor:
        tensor = read(name)
        rounded = tensor.to(kind)
        if not rounded.isfinite().all() and tensor.isfinite().all():
            raise UserError(f"--dtype: {name} has values that {dtype} has not; use bfloat16 or float32")
        return rounded

    shards = shards_of(shapes, kind.itemsize, most_bytes)
    places: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = WEIGHTS if len(shards) == 1 else shard_name(number, len(shards))
        entries = [Entry(name, kind, shapes[name], partial(parameter, name)) for name in names]
        write_safetensors(folder / file, entries, wrote)
        places |= dict.fromkeys(names, file)
    total = bytes_of(shapes, dtype)
    if len(shards) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places}, indent=2)
    return total


def bytes_of(shapes: Mapping[str, list[int]], dtype: str) -> int:
    """Bytes of tensors of these shapes."""
    return DTYPES[dtype].itemsize * sum(map(math.prod, shapes.values()))
