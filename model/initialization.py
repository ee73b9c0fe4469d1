"""Initial weights (SwitchHead paper, arXiv 2312.07987, and its authors' code), each drawn from a generator seeded by
the parameter's name.

Seeding by name makes the values independent of the order of construction and of the layout: a rank that holds a slice
of a parameter takes that slice of the same full tensor.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn

from model.config import DenseAttentionConfig, ModelConfig, SigmaMoEConfig, SwitchHeadConfig
from model.parallel.context import ParallelContext
from model.parallel.sharding import full_shape, local_part, owner_of


def initialize(model: nn.Module, config: ModelConfig, parallel: ParallelContext, *, seed: int) -> None:
    """Fills every parameter of `model` in place (fp32, canonical names as keys) with this rank's part."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            shape = torch.Size(full_shape(list(parameter.shape), name, config, parallel))
            value = initial_value(owner_of(name, config), shape, config, seed=seed)
            parameter.copy_(local_part(value, name, config, parallel))


def initial_value(name: str, shape: torch.Size, config: ModelConfig, *, seed: int) -> Tensor:
    """The full initial tensor of the parameter `name`, fp32 on the CPU."""
    published = config.initialization == "published"
    if published and name.startswith("head."):
        bound = 1.0 / math.sqrt(config.d_model)  # of torch.nn.Linear, weight and bias: standard deviation 1 / sqrt(3 d)
        return torch.empty(shape).uniform_(-bound, bound, generator=_generator(name, seed))
    leaf = ".".join(name.split(".")[-2:])
    if leaf.endswith("bias"):
        return torch.zeros(shape)
    if "norm." in name:
        return torch.ones(shape)
    if name.endswith("attention.scale"):
        return torch.full(shape, config.attention.head_dim**-0.5)
    std = standard_deviation(name, config)
    if published and _is_dense_linear(name, config):
        return _truncated_normal(shape, std, _generator(name, seed))
    value = torch.randn(shape, generator=_generator(name, seed)) * std
    normalized = isinstance(config.attention, SwitchHeadConfig) and config.attention.normalized_init
    if normalized and ".attention." in name and name.endswith("_experts"):
        return _equal_norms(value, dim=(0, 1))
    return _equal_norms(value, dim=(-1,)) if name.endswith("feedforward.router") else value


def standard_deviation(name: str, config: ModelConfig) -> float:
    """Standard deviation of the normal distribution that the parameter `name` is drawn from.

    s = sqrt(2 / L) or sqrt(1 / L), by init_scale. Embedding and output layer 1 / sqrt(d); attention Q, K, V, W_pos and
    selectors, up and gate projections and router s / sqrt(d); attention outputs s / sqrt(H h), H being MoA's active
    experts; down projections s / sqrt(fan-in), which for sigma-MoE is the dense equivalent's N_E G.
    """
    scale = math.sqrt((2.0 if config.init_scale == "paper" else 1.0) / config.num_layers)
    attention, feedforward = config.attention, config.feedforward
    if name in ("embedding.weight", "head.weight"):
        return 1.0 / math.sqrt(config.d_model)
    if name.endswith(("attention.output.weight", "attention.output_experts")):
        return scale / math.sqrt(attention.num_heads * attention.head_dim)
    if ".feedforward.down" in name:
        if isinstance(feedforward, SigmaMoEConfig):
            fan_in = feedforward.num_experts * feedforward.expert_size
        else:
            fan_in = feedforward.hidden_size
        return scale / math.sqrt(fan_in)
    attention_in = tuple(f"attention.{p}{kind}" for p in ("query", "key", "value") for kind in (".weight", "_experts"))
    others = (
        "attention.position.weight",
        "attention.selector",
        "_selector",
        "router",
        "up_experts",
        ".up.weight",
        ".gate.weight",
    )
    assert name.endswith((*attention_in, *others)), f"no initial distribution is known for {name}"
    return scale / math.sqrt(config.d_model)


def _is_dense_linear(name: str, config: ModelConfig) -> bool:
    """Whether `name` is a weight that is an nn.Linear in the authors' code too: all of a dense layer's. The dense
    projections of SwitchHead and MoA are plain parameters there, drawn from an untruncated normal distribution."""
    if not name.endswith(".weight"):
        return False
    return ".feedforward." in name or (".attention." in name and isinstance(config.attention, DenseAttentionConfig))


def _generator(name: str, seed: int) -> torch.Generator:
    """Random numbers of the parameter `name` alone."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _truncated_normal(shape: torch.Size, std: float, generator: torch.Generator) -> Tensor:
    """Normal, cut at two of its own standard deviations, then scaled so that the tensor's is `std`: as in the authors'
    code, which leaves torch's bounds of -2 and 2. (It scales K and V of the dense baseline together, here each by
    itself: 0.1% in the size of either.)"""
    value = nn.init.trunc_normal_(torch.empty(shape), generator=generator)
    return value * (std / value.std())


def _equal_norms(weight: Tensor, *, dim: tuple[int, ...]) -> Tensor:
    """Scales `weight` to the same norm along `dim` everywhere and then so that it keeps its standard deviation."""
    std = weight.std()
    scaled = weight / weight.norm(dim=dim, keepdim=True)
    return scaled * (std / scaled.std())
