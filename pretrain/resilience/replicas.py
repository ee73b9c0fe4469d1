"""Whether ranks that must hold the same numbers do: checksums against silent corruption of memory or arithmetic."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from model.language_model import routing_statistics
from model.parallel.context import ParallelContext
from model.parallel.sharding import shard_place
from model.parameters import parameter_specs
from pretrain.parallel.agreement import of_all_ranks
from pretrain.parallel.rounds import maximum
from pretrain.ranks import ranks_text

CHUNK = 2**22
"""Elements that are multiplied at a time: 64 MiB beside the model."""
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Difference(NamedTuple):
    """Replicas that are not the same."""

    key: str
    groups: list[list[int]]
    """Ranks that hold the same numbers, the largest group last."""

    @property
    def minority(self) -> list[int]:
        """Ranks outside the majority; none where no group is larger than all others together."""
        *others, most = self.groups
        wrong = sorted(rank for group in others for rank in group)
        return wrong if len(most) > len(wrong) else []

    def __str__(self) -> str:
        """`blocks.0.norm.weight: rank 2 differs from ranks 0-1, 3`. If only two ranks hold it, either may be the wrong
        one."""
        *others, most = self.groups
        wrong = sorted(rank for group in others for rank in group)
        return f"{self.key}: {ranks_text(wrong)} {'differ' if len(wrong) > 1 else 'differs'} from {ranks_text(most)}"


def suspect_node(differences: Sequence[Difference], hosts: Sequence[str]) -> str | None:
    """The one node of all ranks that differ from a majority; None if they are on several, or if there is no majority
    anywhere. `hosts`: of every rank."""
    nodes = {hosts[rank] for difference in differences for rank in difference.minority}
    return nodes.pop() if len(nodes) == 1 else None


def what_to_do(node: str | None) -> str:
    """Advice for the end of a run whose replicas differ."""
    suspect = "those machines" if node is None else f"{node}, whose ranks alone differ from the majority, or exclude it"
    return (
        f"Check the memory of {suspect} or, if other machines end in the same way, the layer of that parameter: its "
        f"gradient must be the same on all"
    )


class ReplicaCheck:
    """Compares the weights that the ranks compute with, and the routing statistics, wherever several ranks hold them.

    Replicas are copies of the same part of the same parameter. Data-parallel ranks hold them; so do tensor-parallel
    ranks, for parameters that are not divided over them. For experts, the ranks that hold the same experts do. ZeRO 3
    divides parameters over the data-parallel ranks; only those below stage3_param_persistence_threshold (1e5 elements)
    stay whole. Master weights and moments have no replica under ZeRO 1 to 3.
    """

    def __init__(self, engine: Any, parallel: ParallelContext, group: Any) -> None:
        """Collective. `group`: all ranks, with tensors on the CPU."""
        self._engine, self._parallel, self._group = engine, parallel, group
        self.own_keys = [key for key, _ in self._tensors()]
        """The names of what this rank holds."""
        self._keys = _of_all_ranks(self.own_keys, parallel)
        place = {key: number for number, key in enumerate(self._keys)}
        self._places = torch.tensor([place[key] for key in self.own_keys], dtype=torch.int64)

    def __call__(self) -> list[Difference]:
        """What differs, and on which ranks; the same list on every rank, empty if all is well. Collective; reads every
        weight once. Each rank hears the smallest and the largest checksum of every tensor of the model; only of those
        that differ does it hear every rank's."""
        sums = [checksum(value) for _, value in self._tensors()]
        own = torch.stack(sums).cpu() if sums else torch.zeros(0, dtype=torch.int64)
        smallest, largest = extremes(own, self._places, len(self._keys), self._group)
        different = torch.nonzero(smallest != largest).view(-1)
        return self._differences(own, different) if len(different) else []

    def _differences(self, own: Tensor, different: Tensor) -> list[Difference]:
        """Which ranks differ in the tensors number `different` [n] of all; collective."""
        said = torch.zeros(2, len(self._keys), dtype=torch.int64)  # whether this rank holds it, and its checksum
        said[:, self._places] = torch.stack([torch.ones_like(own), own])
        said = said[:, different].contiguous()
        gathered = [torch.empty_like(said) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, said, group=self._group)
        found = []
        for column, number in enumerate(different.tolist()):
            by_value: dict[int, list[int]] = defaultdict(list)
            for rank, (holds, value) in enumerate(part[:, column].tolist() for part in gathered):
                if holds:
                    by_value[value].append(rank)
            found.append(Difference(self._keys[number], sorted(by_value.values(), key=len)))
        return found

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What this rank holds, under a name that is the same on all ranks with the same numbers."""
        module, parallel = self._engine.module, self._parallel
        specs = parameter_specs(module.config)
        for name, parameter in module.named_parameters():
            # RELIES-ON deepspeed-whole
            if self._engine.zero_optimization_stage() == 3 and not getattr(parameter, "ds_persist", False):
                continue
            part, parts = shard_place(specs[name], parallel)
            yield name + (f" (part {part + 1} of {parts})" if parts > 1 else ""), parameter.detach()
        for name, statistics in routing_statistics(module):
            for kind, value in statistics.state().items():
                # Sums over data-parallel ranks; tensor-parallel ranks may add up in another order.
                yield f"routing {kind} of {name}, tensor-parallel rank {parallel.tensor_rank}", value


def extremes(own: Tensor, places: Tensor, num_keys: int, group: Any) -> tuple[Tensor, Tensor]:
    """Smallest and largest number, both [num_keys] int64, that any rank has of each key; collective over `group`. `own`
    [n] int64: this rank's, of the keys number `places` [n]."""
    largest = maximum(both_ways(own, places, num_keys), group)
    return ~largest[num_keys:], largest[:num_keys]


def both_ways(own: Tensor, places: Tensor, num_keys: int) -> Tensor:
    """[2 num_keys] int64, whose maximum over ranks has the largest number of each key, and the smallest as ~x, which
    turns the order of int64 around and cannot overflow. What a rank does not hold is below all."""
    values = torch.full((2, num_keys), torch.iinfo(torch.int64).min)
    values[:, places] = torch.stack([own, ~own])
    return values.view(-1)


def _of_all_ranks(keys: list[str], parallel: ParallelContext) -> list[str]:
    """The keys of all ranks, each once, in the same order everywhere. Data-parallel ranks have the same ones, so only
    the ranks of the other dimensions ask each other. Collective."""
    found = set(keys)
    for group in (parallel.tensor_group, parallel.expert_group, parallel.pipeline_group):
        if group is not None:
            found = set().union(*of_all_ranks(sorted(found), group))
    return sorted(found)


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
