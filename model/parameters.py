"""Parameter counts of a model, total and active per token."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from model.config import ModelConfig, SigmaMoEConfig, SwitchHeadConfig


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of scalar parameters."""

    total: int
    active: int
    """Without the experts a token does not choose; embedding and output layer count whole."""


def count_parameters(model: nn.Module, config: ModelConfig) -> ParameterCount:
    """Counts the built model (meta device or real): expert tensors are active in the share k / E, all others whole."""
    total = active = 0
    for name, parameter in model.named_parameters():
        numel = parameter.numel()
        total += numel
        chosen, experts = _expert_share(name, config)
        assert numel % experts == 0, f"{name}: {numel} parameters in {experts} experts"
        active += numel // experts * chosen
    return ParameterCount(total=total, active=active)


def _expert_share(name: str, config: ModelConfig) -> tuple[int, int]:
    """(active, total) experts of the tensor `name`; (1, 1) if it holds none."""
    if ".attention." in name and name.endswith("_experts"):
        assert isinstance(config.attention, SwitchHeadConfig)
        return config.attention.active_experts, config.attention.num_experts
    if name.endswith((".up_experts", ".down_experts")):
        assert isinstance(config.feedforward, SigmaMoEConfig)
        return config.feedforward.active_experts, config.feedforward.num_experts
    return 1, 1
