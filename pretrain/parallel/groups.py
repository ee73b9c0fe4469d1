"""The process groups of every dimension of parallelism, and what DeepSpeed asks about them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch.distributed as dist

from common.replaced import replaced
from model.parallel.context import ParallelContext


class Groups(NamedTuple):
    """This rank's process group in each dimension. Groups of one rank exist too, because DeepSpeed wants them; the
    expert group is None if experts are not divided."""

    pipeline: Any
    data: Any
    tensor: Any
    expert: Any
    expert_replicas: Any
    """The ranks that hold the same experts, tensor-parallel ones included: they sum the gradients of these experts."""


def process_groups(*, pipeline: int, data: int, tensor: int, expert: int = 1) -> Groups:
    """The groups of the mesh pipeline x data x tensor, the slowest first (model/parallel/context.py, DIMENSIONS), and
    of `expert` neighbouring data-parallel ranks; `expert` divides `data`. Collective over all ranks."""
    return _process_groups(dist.group.WORLD, pipeline, data, tensor, expert)


@functools.cache
def _process_groups(world: Any, pipeline: int, data: int, tensor: int, expert: int) -> Groups:
    """Made once for a world: a group is never freed."""
    grid = _grid(pipeline, data, tensor, expert)
    return Groups(
        pipeline=grid.create_pg("pp"),
        data=grid.create_pg(["dp", "ep"]),
        tensor=grid.create_pg("tp"),
        expert=grid.create_pg("ep") if expert > 1 else None,
        expert_replicas=grid.create_pg(["dp", "tp"]) if expert > 1 else None,
    )


def groups_of(parallel: ParallelContext) -> Groups:
    """The groups of a run whose rank this is, which are there: not collective."""
    return process_groups(
        pipeline=parallel.pipeline_size,
        data=parallel.data_size,
        tensor=parallel.tensor_size,
        expert=parallel.expert_size,
    )


def _grid(pipeline: int, data: int, tensor: int, expert: int) -> Any:
    """megatron-core's grid of all ranks, whose groups are values (its parallel_state holds them in globals). Imported
    here, because it takes seconds, and a run with data-parallel ranks alone needs no groups."""
    from model.parallel.megatron_core import HyperCommGrid

    assert pipeline * data * tensor == dist.get_world_size() and data % expert == 0
    # The fastest dimension first. Our data-parallel ranks are two dimensions here: ep, which divides the experts, and
    # dp, whose ranks hold the same experts.
    return HyperCommGrid([tensor, expert, data // expert, pipeline], ["tp", "ep", "dp", "pp"])


def replica_group(parallel: ParallelContext, of_experts: bool) -> Any:
    """The ranks that hold the same values as this one of a parameter, or with `of_experts` of one that is divided over
    the expert-parallel ranks; None if there is no other. Not collective: the groups are there."""
    if not of_experts:
        return parallel.data_group
    groups = groups_of(parallel)
    return groups.expert_replicas if dist.get_world_size(groups.expert_replicas) > 1 else None


def tied_group(parallel: ParallelContext) -> Any:
    """The first and the last pipeline stage of this rank's model, which hold one tied weight; collective over all
    ranks. None on a stage between them."""
    return _tied_groups(dist.group.WORLD, parallel.pipeline_size, parallel.data_size, parallel.tensor_size)


@functools.cache
def _tied_groups(world: Any, pipeline: int, data: int, tensor: int) -> Any:
    pipelines = _grid(pipeline, data, tensor, 1).get_rank_enum("pp")
    group, _ = dist.new_subgroups_by_enumeration([[ranks[0], ranks[-1]] for ranks in pipelines])
    return group


@contextlib.contextmanager
def asked_for_once() -> Iterator[None]:
    """Inside, DeepSpeed gets the same group whenever it asks for one of the same ranks, also for another engine. Its
    pipelines ask for five at each build, and a group is never freed: a GPU would lose the memory of as many of NCCL's
    communicators at each rollback."""
    from deepspeed import comm  # here: device.start prepares its import

    make = comm.new_group

    def group_of(ranks: Iterable[int]) -> Any:
        return _asked_for(dist.group.WORLD, make, tuple(ranks))

    # RELIES-ON deepspeed-groups
    with replaced(comm, "new_group", group_of):
        yield


@functools.cache
def _asked_for(world: Any, make: Callable[[list[int]], Any], ranks: tuple[int, ...]) -> Any:
    return make(list(ranks))


class ModelParallelUnit:
    """What DeepSpeed asks about groups when a model is more than data-parallel (its `mpu`)."""

    def __init__(self, parallel: ParallelContext) -> None:
        assert parallel.tensor_group is not None
        self._parallel = parallel
        # A group of one rank where there is no data parallelism: DeepSpeed wants a group in any case.
        self._data_group = groups_of(parallel).data

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
