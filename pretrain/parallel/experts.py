"""What DeepSpeed (0.19.8) must know about parameters that only some data-parallel ranks share: the sigma-MoE experts.

DeepSpeed looks for its own MoE module in the model, for attributes of the parameters and for marks on the optimizer's
groups. The model knows nothing of DeepSpeed, so this module adds all of that from outside. DeepSpeed is imported inside
functions, because device.start must prepare its import.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn

from model.config import ModelConfig, SigmaMoEConfig
from model.parallel.context import ParallelContext
from model.parallel.sharding import sharded_axis
from model.parameters import parameter_specs
from pretrain.parallel.groups import groups_of

MARKER = "deepspeed_experts"
"""Name of a module without parameters, by which DeepSpeed detects that there are experts."""


def declare_experts(model: nn.Module, config: ModelConfig, parallel: ParallelContext) -> None:
    """Call it before deepspeed.initialize: marks the parameters that are divided over `parallel.expert_group`, none if
    there is no such group. Their gradients are then summed over the ranks that hold the same experts, and divided by
    the data-parallel size like all others: a rank's experts see the tokens of its whole expert-parallel group."""
    if parallel.expert_group is None:
        return
    from deepspeed.moe.layer import MoE

    assert isinstance(config.feedforward, SigmaMoEConfig)
    size, num_experts = parallel.expert_size, config.feedforward.num_experts
    name, specs = f"ep_size_{size}", parameter_specs(config)  # DeepSpeed reads the size out of the name
    for parameter_name, parameter in model.named_parameters():
        if sharded_axis(specs[parameter_name], expert_size=size) == "expert":
            parameter.allreduce = False  # type: ignore[attr-defined]
            parameter.group_name = name  # type: ignore[attr-defined]

    class Marker(MoE):  # RELIES-ON deepspeed-experts
        """Is found by its type; computes nothing, so DeepSpeed's own constructor is not called."""

        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.num_experts, self.num_local_experts = num_experts, num_experts // size
            self.ep_size = size
            self.expert_group_name = name

        def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
            """Called by the engine, which looks its groups up by name afterwards: they are ours."""
            _register_groups(name, parallel)

    model.add_module(MARKER, Marker())


def separate_experts(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Moves experts into optimizer groups of their own and marks these, as ZeRO wants; without experts returns the same
    groups.

    If the first expert tensor of a group has more than 178,956,971 elements, DeepSpeed's function for this leaves an
    empty group, and ZeRO fails on it.
    """
    separated = []
    for group in groups:
        for wanted in (False, True):
            params = [p for p in group["params"] if getattr(p, "allreduce", True) is not wanted]
            mark = {"moe": True, "name": params[0].group_name} if wanted and params else {}
            if params:
                separated.append({**group, "params": params, **mark})
    return separated


def _register_groups(name: str, parallel: ParallelContext) -> None:
    """Gives DeepSpeed the groups of our mesh; those that it would make hold the same ranks (a test compares them)."""
    from deepspeed.utils import groups

    ours = groups_of(parallel)
    assert dist.get_process_group_ranks(ours.expert) == dist.get_process_group_ranks(parallel.expert_group)
    for groups_by_name, ranks_by_name, group in (
        (groups._EXPERT_PARALLEL_GROUP, groups._EXPERT_PARALLEL_GROUP_RANKS, parallel.expert_group),
        (groups._EXPERT_DATA_PARALLEL_GROUP, groups._EXPERT_DATA_PARALLEL_GROUP_RANKS, ours.expert_replicas),
    ):
        groups_by_name.clear()  # those of an earlier engine, in another layout
        ranks_by_name.clear()
        groups_by_name[name] = group
        ranks_by_name[name] = dist.get_process_group_ranks(group)
