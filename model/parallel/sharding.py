"""How a parameter is divided over tensor-parallel or expert-parallel ranks, as its spec declares it."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from model.parallel.context import ParallelContext
from model.parameter_spec import ParameterSpec

Axis = Literal["tensor", "expert"]


def sharded_axis(spec: ParameterSpec, *, expert_size: int) -> Axis | None:
    """The ranks that divide the parameter, where `expert_size` is the expert-parallel size. None: it is replicated."""
    if spec.divided is None:
        return None
    return "expert" if expert_size > 1 and spec.experts is not None and spec.experts.exchanged else "tensor"


def shard_place(spec: ParameterSpec, parallel: ParallelContext) -> tuple[int, int]:
    """The number of this rank's part of the parameter, and the number of parts; (0, 1): replicated."""
    axis = sharded_axis(spec, expert_size=parallel.expert_size)
    if axis is None:
        return 0, 1
    if axis == "expert":
        return parallel.expert_rank, parallel.expert_size
    return parallel.tensor_rank, parallel.tensor_size


def local_shape(spec: ParameterSpec, parallel: ParallelContext) -> tuple[int, ...]:
    """Shape of this rank's part of the parameter."""
    _, parts = shard_place(spec, parallel)
    if parts == 1:
        return spec.shape
    dim = spec.divided
    assert dim is not None and spec.shape[dim] % parts == 0, f"{spec.shape} cannot be divided by {parts} ranks"
    return (*spec.shape[:dim], spec.shape[dim] // parts, *spec.shape[dim + 1 :])


def local_part(full: Tensor, spec: ParameterSpec, parallel: ParallelContext) -> Tensor:
    """This rank's part (a view) of the whole tensor `full` of the parameter."""
    part, parts = shard_place(spec, parallel)
    if spec.divided is None or parts == 1:
        return full
    size = local_shape(spec, parallel)[spec.divided]
    return full.narrow(spec.divided, part * size, size)
