"""Which ranks form which groups, and what each rank holds: known before anything is started."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from model.layers import layer_specs
from model.parallel.context import DIMENSIONS, ParallelContext
from model.parallel.sharding import local_shape, sharded_axis
from model.parameter_spec import prefixed
from model.parameters import owner_of
from pretrain.config.schema import Config
from pretrain.parallel.stages import stage_bounds


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


def state_bytes(config: Config) -> int:
    """Bytes of the state of one parameter, in memory and in a checkpoint: fp32 master weight, Adam's two moments and,
    with train.ema_decay, a moving average of the weight."""
    return 16 if config.train.ema_decay else 12


@dataclass(frozen=True)
class RankBytes:
    """What one rank of a pipeline stage holds between steps, without gradients, activations and padding."""

    stage: int
    parameters: int
    """Elements of the model that the rank computes with (under ZeRO 3: that its data-parallel group computes with)."""
    weights: int
    """Bytes of the weights that the rank computes with."""
    optimizer: int
    """Bytes of fp32 master weights, Adam's moments and, with train.ema_decay, a moving average of the weights."""


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
        states = state_bytes(config) - (0 if parallel.zero else 4)
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
