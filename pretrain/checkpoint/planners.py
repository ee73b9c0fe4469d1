"""DCP's planners for states of Fragments: no flattening, no pickled objects, nothing missing on a load."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from common.errors import UserError
from pretrain.checkpoint.fragments import Fragments


class SavePlanner(DefaultSavePlanner):
    """Saves {name: Fragments}. The global plan is DCP's: it refuses rectangles that overlap or leave a gap."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        fragments: Fragments = self.state_dict[index.fqn]
        return fragments.__get_tensor_shard__(index)


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
            if saved.size != fragments.size():
                raise UserError(
                    f"{self._what}: {name} has shape {list(saved.size)}, the model's is {list(fragments.size())}"
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
