"""The place of this rank in a run's layout."""

from __future__ import annotations

import torch.distributed as dist

from model.parallel.context import ParallelContext
from pretrain.config.schema import Config
from pretrain.parallel.groups import process_groups


def parallel_context(config: Config) -> ParallelContext:
    """The place of this rank; collective. Tensor-parallel ranks follow each other: their traffic is the heaviest, so
    they belong on one node."""
    rank, parallel = dist.get_rank(), config.parallel
    tensor, expert = parallel.tensor, parallel.expert
    data = config.data_size(dist.get_world_size())
    data_rank = rank // tensor % data
    if data == dist.get_world_size() and expert == 1:  # the group of all ranks is enough
        return ParallelContext(data_rank=rank, data_size=data, data_group=dist.group.WORLD if data > 1 else None)
    groups = process_groups(pipeline=parallel.pipeline, data=data, tensor=tensor, expert=expert)
    return ParallelContext(
        data_rank=data_rank,
        data_size=data,
        data_group=groups.data if data > 1 else None,
        tensor_rank=rank % tensor,
        tensor_size=tensor,
        tensor_group=groups.tensor if tensor > 1 else None,
        sequence_parallel=parallel.sequence,
        pipeline_rank=rank // (data * tensor),
        pipeline_size=parallel.pipeline,
        pipeline_group=groups.pipeline if parallel.pipeline > 1 else None,
        expert_rank=data_rank % expert,
        expert_size=expert,
        expert_group=groups.expert if expert > 1 else None,
    )
