"""DCP's planners for states of Fragments: no flattening, no pickled objects, nothing missing on a load."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from common.errors import UserError
from pretrain.checkpoint.fragments import Fragments, fault_in


@dataclass
class AgreedPlan:
    """What the ranks agreed on when they last saved, as this rank knows it."""

    local: SavePlan | None = None
    """What this rank had to save, and `final`: what it was told to save."""
    final: SavePlan | None = None
    everybodys: list[SavePlan] = field(default_factory=list)
    """On the first rank: the local plans of all ranks, and `metadata`: what they make together."""
    metadata: Metadata | None = None


class SavePlanner(DefaultSavePlanner):
    """Saves {name: Fragments}. The global plan is DCP's; that rectangles do not overlap or leave a gap is checked here,
    because DCP (torch 2.13) compares nearly all pairs of some tensors (docs/scale.md). The plan is made when a rank has
    other rectangles than at the save before, as `agreed` remembers it; else no rank sends any, and the first rank plans
    nothing."""

    def __init__(self, agreed: AgreedPlan | None = None) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._agreed = agreed or AgreedPlan()

    def create_local_plan(self) -> SavePlan:
        self._local = super().create_local_plan()
        known = self._agreed.local
        return SavePlan([], usable=False) if known is not None and known.items == self._local.items else self._local

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        agreed = self._agreed
        if agreed.metadata is None or any(plan.usable for plan in all_plans):
            known = agreed.everybodys or all_plans
            plans = [new if new.usable else old for new, old in zip(all_plans, known, strict=True)]
            all_plans, metadata = create_default_global_save_plan(plans)
            _check(metadata, whole=len(plans) > 1)
            agreed.everybodys, agreed.metadata = plans, metadata
        assert agreed.metadata is not None
        return all_plans, agreed.metadata

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        if new_plan.usable:
            self._agreed.local, self._agreed.final = self._local, new_plan
        assert self._agreed.final is not None
        return super().finish_plan(self._agreed.final)

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        fragments: Fragments = self.state_dict[index.fqn]
        return fragments.__get_tensor_shard__(index)


def _check(metadata: Metadata, *, whole: bool) -> None:
    for name, saved in metadata.state_dict_metadata.items():
        assert isinstance(saved, TensorStorageMetadata)
        if fault := fault_in(saved.size, [(chunk.offsets, chunk.sizes) for chunk in saved.chunks], whole=whole):
            raise ValueError(f"{name}: {fault}")


class LoadPlanner(DefaultLoadPlanner):
    """Fills {name: Fragments} in place. Raises UserError if the checkpoint lacks a tensor or a part of it: DCP itself
    would leave the elements of a gap as they were."""

    def __init__(self, what: str) -> None:
        """`what`: the checkpoint, for messages."""
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._what = what

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items = []
        for name, fragments in self.state_dict.items():
            saved = self.metadata.state_dict_metadata.get(name)
            if not isinstance(saved, TensorStorageMetadata):
                raise UserError(f"{self._what}: holds no {name}, which this model has")
            if saved.size != fragments.shape:
                raise UserError(
                    f"{self._what}: {name} has shape {list(saved.size)}, the model's is {list(fragments.shape)}"
                )
            found = create_read_items_for_chunk_list(name, saved, fragments.__create_chunk_list__())
            covered = sum(math.prod(item.lengths) for item in found)
            if covered != fragments.numel:
                raise UserError(f"{self._what}: {name} is incomplete ({covered} of {fragments.numel} elements)")
            items += found
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        fragments: Fragments = self.state_dict[index.fqn]
        return fragments.__get_tensor_shard__(index)
