"""Which ranks form which groups, and what each rank holds: known before anything is started."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from model.layers import layer_specs
from model.parallel.context import DIMENSIONS, ParallelContext
from model.parallel.sharding import local_shape, sharded_axis
from model.parameter_spec import prefixed
from model.parameters import owner_of
from pretrain.config.loading import load_config
from pretrain.config.rules import check_ranks
from pretrain.config.schema import Config, ParallelConfig
from pretrain.parallel.stages import stage_bounds

MASTER_AND_MOMENTS = 12
"""Bytes of Adam's state per parameter: fp32 master weight and two fp32 moments."""


def mesh(config: Config, data_size: int) -> np.ndarray:
    """Ranks [pipeline, data, tensor] int64, as `model.parallel.context.DIMENSIONS` says."""
    sizes = (config.parallel.pipeline, data_size, config.parallel.tensor)
    return np.arange(np.prod(sizes)).reshape(sizes)


def group_ranks(config: Config, data_size: int) -> dict[str, np.ndarray]:
    """The groups of every dimension that is divided: name -> ranks [groups, ranks of a group]."""
    ranks, found = mesh(config, data_size), {}
    for axis, name in enumerate(DIMENSIONS):
        if ranks.shape[axis] > 1:
            found[name] = np.moveaxis(ranks, axis, -1).reshape(-1, ranks.shape[axis])
    if config.parallel.expert > 1:
        pipeline, data, tensor = ranks.shape
        apart = ranks.reshape(pipeline, data // config.parallel.expert, config.parallel.expert, tensor)
        found["expert"] = np.moveaxis(apart, 2, -1).reshape(-1, config.parallel.expert)
    return found


def groups_text(groups: np.ndarray, *, most: int = 4) -> str:
    """`0-1, 2-3, ...`: the first groups, each as a range (with its stride if that is not 1)."""
    texts = []
    for group in groups[:most]:
        stride = int(group[1] - group[0])
        texts.append(f"{group[0]}-{group[-1]}" + (f" by {stride}" if stride > 1 and len(group) > 2 else ""))
        if len(group) == 2 and stride > 1:
            texts[-1] = f"{group[0]},{group[-1]}"
    return ", ".join(texts) + (f", ... ({len(groups)} groups)" if len(groups) > most else "")


def stage_text(config: Config, stage: int) -> str:
    """What a pipeline stage holds, e.g. `embedding, blocks 0-8`."""
    bounds, num_layers = stage_bounds(config), config.model.num_layers
    blocks = [layer - 1 for layer in range(bounds[stage], bounds[stage + 1]) if 1 <= layer <= num_layers]
    parts = ["embedding"] if stage == 0 else []
    parts.append(f"blocks {blocks[0]}-{blocks[-1]}" if len(blocks) > 1 else f"block {blocks[0]}")
    parts += ["final norm, output layer"] if stage == config.parallel.pipeline - 1 else []
    return ", ".join(parts)


@dataclass(frozen=True)
class RankBytes:
    """What one rank of a pipeline stage holds between steps, without gradients, activations and padding."""

    stage: int
    parameters: int
    """Elements of the model that the rank computes with (under ZeRO 3 of its data-parallel group)."""
    weights: int
    """Bytes of the weights that the rank computes with."""
    optimizer: int
    """Bytes of fp32 master weights and Adam's moments."""


def rank_bytes(config: Config, data_size: int) -> list[RankBytes]:
    """One entry per pipeline stage: all its ranks hold the same amount. Counted from what the layers declare.

    ZeRO 1 to 3 divide master weights and moments by the ranks that share a parameter: data_size, or for experts under
    expert parallelism data_size x tensor / expert. ZeRO 3 divides the weights too. At ZeRO 0 the fp32 weights are the
    master weights.
    """
    parallel, weight_bytes = config.parallel, 4 if config.train.precision == "fp32" else 2
    found = []
    for stage in range(parallel.pipeline):
        elements = _elements(config, data_size, stage)
        total = sum(elements.values())
        replicas = {"expert": data_size * parallel.tensor // parallel.expert, "tensor": data_size, None: data_size}
        states = {0: 8, 1: MASTER_AND_MOMENTS, 2: MASTER_AND_MOMENTS, 3: MASTER_AND_MOMENTS}[parallel.zero]
        if parallel.zero == 0:
            optimizer = states * total
        else:
            optimizer = sum(-(-states * n // replicas[axis]) for axis, n in elements.items())
        weights = weight_bytes * total
        found.append(RankBytes(stage, total, -(-weights // data_size) if parallel.zero == 3 else weights, optimizer))
    return found


def _elements(config: Config, data_size: int, stage: int) -> dict[Any, int]:
    """Elements of the parameters of one rank of `stage`, by the axis that they are divided over."""
    parallel = config.parallel
    sizes = {"data": data_size, "tensor": parallel.tensor, "pipeline": parallel.pipeline, "expert": parallel.expert}
    nobody: Any = object()  # nothing communicates here
    divided: dict[str, Any] = {f"{name}_size": size for name, size in sizes.items()}
    divided |= {f"{name}_group": nobody for name, size in sizes.items() if size > 1}
    context = ParallelContext(pipeline_rank=stage, sequence_parallel=parallel.sequence, **divided)
    bounds = stage_bounds(config)
    counts: dict[Any, int] = {}
    layers = list(layer_specs(config.model).items())[bounds[stage] : bounds[stage + 1]]
    for name, spec in prefixed(dict(layers)).items():
        if parallel.pipeline == 1 and owner_of(name, config.model) != name:
            continue  # it is the embedding
        axis = sharded_axis(spec, expert_size=parallel.expert)
        counts[axis] = counts.get(axis, 0) + math.prod(local_shape(spec, context))
    return counts


def print_layout(path: Path, num_ranks: int | None, overrides: Sequence[str]) -> None:
    """`plan.py layout`: the mesh of a run, and what every rank holds beside what one process would. Raises
    ConfigError."""
    config = load_config(path, overrides)
    parallel = config.parallel
    data_size = check_ranks(config, num_ranks or parallel.tensor * parallel.pipeline * parallel.expert)
    ranks = mesh(config, data_size)
    print(
        f"{ranks.size} ranks = pipeline {parallel.pipeline} x data {data_size} x tensor {parallel.tensor}; "
        f"rank = (pipeline_rank x {data_size} + data_rank) x {parallel.tensor} + tensor_rank"
    )
    for name, groups in group_ranks(config, data_size).items():
        print(f"  {name + ' groups':<16}  {groups_text(groups)}")
    alone = config.model_copy(update={"parallel": ParallelConfig()})
    rows = [("all", "one", rank_bytes(alone, 1)[0], "the whole model in one process, ZeRO 1")]
    for entry in rank_bytes(config, data_size):
        of_stage = ranks[entry.stage].ravel()
        rows.append((str(entry.stage), f"{of_stage[0]}-{of_stage[-1]}", entry, stage_text(config, entry.stage)))
    table = [["stage", "ranks", "parameters", "weights", "optimizer", "both", "holds"]]
    for stage, which, entry, holds in rows:
        sizes = (entry.weights, entry.optimizer, entry.weights + entry.optimizer)
        table.append([stage, which, f"{entry.parameters:,}", *(f"{size / 2**30:.3f}" for size in sizes), holds])
    print("\nper rank, GiB; without gradients, activations and padding; optimizer: master weights and moments")
    widths = [max(len(row[column]) for row in table) for column in range(7)]
    for row in table:
        padded = [
            cell.rjust(width) if 2 <= column <= 5 else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(padded).rstrip())
