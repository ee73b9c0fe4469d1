"""The process groups of every dimension of parallelism, and what DeepSpeed asks about them."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from model.parallel.context import DIMENSIONS, ParallelContext
from pretrain.device import device_type


class Groups(NamedTuple):
    """This rank's process group in each dimension; groups of one rank exist as well, DeepSpeed wants them (but for
    experts: None if they are not divided)."""

    pipeline: Any
    data: Any
    tensor: Any
    expert: Any
    expert_replicas: Any
    """The ranks that hold the same experts, tensor-parallel ones included: they sum the gradients of those."""


def process_groups(*, pipeline: int, data: int, tensor: int, expert: int = 1) -> Groups:
    """The groups of the mesh pipeline x data x tensor, the slowest first (model/parallel/context.py, DIMENSIONS), and
    of `expert` neighbouring data-parallel ranks; `expert` divides `data`. Collective over all ranks."""
    return _process_groups(dist.group.WORLD, pipeline, data, tensor, expert)


@functools.cache
def _process_groups(world: Any, pipeline: int, data: int, tensor: int, expert: int) -> Groups:
    """Made once for a world: a group is never freed."""
    assert pipeline * data * tensor == dist.get_world_size() and data % expert == 0
    mesh = init_device_mesh(device_type(), (pipeline, data, tensor), mesh_dim_names=DIMENSIONS)
    expert_group = replica_group = None
    if expert > 1:
        grid = mesh.mesh.view(pipeline, data // expert, expert, tensor)
        expert_group, _ = dist.new_subgroups_by_enumeration(grid.transpose(2, 3).reshape(-1, expert).tolist())
        replicas = grid.permute(0, 2, 3, 1).reshape(pipeline * expert, -1)
        replica_group, _ = dist.new_subgroups_by_enumeration(replicas.tolist())
    pipeline_group, data_group, tensor_group = (mesh.get_group(name) for name in DIMENSIONS)
    return Groups(pipeline_group, data_group, tensor_group, expert_group, replica_group)


def tied_group(parallel: ParallelContext) -> Any:
    """The first and the last pipeline stage of this rank's model, which hold one tied weight; collective over all
    ranks. None on a stage between them."""
    return _tied_groups(dist.group.WORLD, parallel.pipeline_size, parallel.data_size, parallel.tensor_size)


@functools.cache
def _tied_groups(world: Any, pipeline: int, data: int, tensor: int) -> Any:
    ranks = torch.arange(pipeline * data * tensor).view(pipeline, -1)
    group, _ = dist.new_subgroups_by_enumeration(ranks[[0, -1]].t().tolist())
    return group


class ModelParallelUnit:
    """What DeepSpeed asks about groups when a model is more than data-parallel (its `mpu`)."""

    def __init__(self, parallel: ParallelContext) -> None:
        assert parallel.tensor_group is not None
        self._parallel = parallel
        # A group of one rank where there is no data parallelism: DeepSpeed wants a group in any case.
        self._data_group = process_groups(
            pipeline=parallel.pipeline_size,
            data=parallel.data_size,
            tensor=parallel.tensor_size,
            expert=parallel.expert_size,
        ).data

    def get_data_parallel_group(self) -> Any:
        return self._data_group

    def get_data_parallel_rank(self) -> int:
        return self._parallel.data_rank

    def get_data_parallel_world_size(self) -> int:
        return self._parallel.data_size

    def get_model_parallel_group(self) -> Any:
        return self._parallel.tensor_group

    def get_model_parallel_rank(self) -> int:
        return self._parallel.tensor_rank

    def get_model_parallel_world_size(self) -> int:
        return self._parallel.tensor_size
