"""Initial weights: each parameter is drawn from its declared distribution, by a generator seeded by its name.

Seeding by name makes the values independent of the order of construction and of the layout: a rank that holds a slice
of a parameter takes that slice of the same full tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from common.hashing import number_of
from model.config import ModelConfig
from model.parallel.context import ParallelContext
from model.parallel.sharding import local_part
from model.parameter_spec import ParameterSpec
from model.parameters import owner_of, parameter_specs


def initialize(model: nn.Module, config: ModelConfig, parallel: ParallelContext, *, seed: int) -> None:
    """Fills every parameter of `model` in place (fp32, canonical names as keys) with this rank's part."""
    specs = parameter_specs(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            owner = owner_of(name, config)
            value = initial_value(owner, specs[owner], seed=seed)
            parameter.copy_(local_part(value, specs[name], parallel))


def initial_value(name: str, spec: ParameterSpec, *, seed: int) -> Tensor:
    """The whole initial tensor of the parameter `name`, fp32 on the CPU."""
    return spec.initial.draw(spec.shape, _generator(name, seed))


def _generator(name: str, seed: int) -> torch.Generator:
    """Random numbers of the parameter `name` alone."""
    return torch.Generator().manual_seed(number_of(f"{seed}/{name}") >> 1)
