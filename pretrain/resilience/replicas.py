"""Whether ranks that must hold the same numbers do: checksums against silent corruption of memory or arithmetic."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from model.language_model import routing_statistics
from model.parallel.context import ParallelContext
from model.parallel.sharding import shard_place
from model.parameters import parameter_specs

CHUNK = 2**22
"""Elements that are multiplied at a time: 64 MiB beside the model."""
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class ReplicaCheck:
    """Compares the weights that the ranks compute with, and the routing statistics, wherever several ranks hold them.

    Replicas are copies of the same part of the same parameter. Data-parallel ranks hold them; so do tensor-parallel
    ranks, for parameters that are not divided over them. For experts, the ranks that hold the same experts do. ZeRO 3
    divides parameters over the data-parallel ranks; only those below stage3_param_persistence_threshold (1e5 elements)
    stay whole. Master weights and moments have no replica under ZeRO 1 to 3.
    """

    def __init__(self, engine: Any, parallel: ParallelContext, group: Any) -> None:
        """Collective over `group`: all ranks, with tensors on the CPU."""
        self._engine, self._parallel, self._group = engine, parallel, group
        keys: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(keys, [key for key, _ in self._tensors()], group=group)
        self._keys: list[list[str]] = keys
        self._longest = max(len(own) for own in keys)

    @property
    def num_compared(self) -> int:
        """Tensors of this rank that another rank holds as well."""
        holders: dict[str, int] = defaultdict(int)
        for own in self._keys:
            for key in own:
                holders[key] += 1
        return sum(holders[key] > 1 for key in self._keys[dist.get_rank()])

    def __call__(self) -> list[str]:
        """What differs, and on which ranks; the same list on every rank, empty if all is well. Collective; reads every
        weight once."""
        own = torch.zeros(self._longest, dtype=torch.int64)
        sums = [checksum(value) for _, value in self._tensors()]
        if sums:
            own[: len(sums)] = torch.stack(sums).cpu()
        gathered = [torch.empty_like(own) for _ in self._keys]
        dist.all_gather(gathered, own, group=self._group)
        holders: dict[str, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
        for rank, (keys, values) in enumerate(zip(self._keys, gathered, strict=True)):
            for key, value in zip(keys, values.tolist(), strict=False):
                holders[key][value].append(rank)
        return [_difference(key, list(by_value.values())) for key, by_value in holders.items() if len(by_value) > 1]

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What this rank holds, under a name that is the same on all ranks with the same numbers."""
        module, parallel = self._engine.module, self._parallel
        specs = parameter_specs(module.config)
        for name, parameter in module.named_parameters():
            if self._engine.zero_optimization_stage() == 3 and not getattr(parameter, "ds_persist", False):
                continue
            part, parts = shard_place(specs[name], parallel)
            yield name + (f" (part {part + 1} of {parts})" if parts > 1 else ""), parameter.detach()
        for name, statistics in routing_statistics(module):
            for kind, value in statistics.state().items():
                # Sums over data-parallel ranks; tensor-parallel ranks may add up in another order.
                yield f"routing {kind} of {name}, tensor-parallel rank {parallel.tensor_rank}", value


def checksum(value: Tensor) -> Tensor:
    """[...] -> int64 scalar on the same device: sum of bits x odd number modulo 2^64. One changed element always
    changes it; NaNs count by their bits."""
    bits = value.contiguous().view(-1).view(_INTEGERS[value.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=value.device)
    for start in range(0, bits.numel(), CHUNK):
        part = bits[start : start + CHUNK].long()
        odd = torch.arange(2 * start + 1, 2 * (start + len(part)) + 1, 2, device=value.device)
        total = total + (part * odd).sum()
    return total


def _difference(key: str, groups: list[list[int]]) -> str:
    """`blocks.0.norm.weight: rank 2 differs from ranks 0, 1, 3`. If only two ranks hold it, either may be the wrong
    one."""
    *others, most = sorted(groups, key=len)
    wrong = sorted(rank for group in others for rank in group)
    return f"{key}: {_ranks(wrong)} {'differ' if len(wrong) > 1 else 'differs'} from {_ranks(most)}"


def _ranks(numbers: list[int]) -> str:
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
