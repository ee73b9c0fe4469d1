"""What a parameter's initial values are drawn from (SwitchHead paper, arXiv 2312.07987, and its authors' code)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from model.config import ModelConfig


class Distribution(Protocol):
    """Where the initial values of one parameter come from."""

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """The initial values of the whole parameter, fp32 on the CPU."""


@dataclass(frozen=True)
class Constant:
    """The same value everywhere."""

    value: float

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.full(shape, self.value)


@dataclass(frozen=True)
class Uniform:
    """Uniform between -bound and bound: a standard deviation of bound / sqrt(3)."""

    bound: float

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.empty(shape).uniform_(-self.bound, self.bound, generator=generator)


@dataclass(frozen=True)
class Normal:
    """Normal with mean 0. With `equal_norms` the values are then scaled so that every vector along those dimensions has
    the same norm, and the whole tensor keeps its standard deviation."""

    std: float
    equal_norms: tuple[int, ...] = ()

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        value = torch.randn(shape, generator=generator) * self.std
        if not self.equal_norms:
            return value
        std = value.std()
        scaled = value / value.norm(dim=self.equal_norms, keepdim=True)
        return scaled * (std / scaled.std())


@dataclass(frozen=True)
class TruncatedNormal:
    """Normal, cut at two of its own standard deviations, then scaled so that the tensor's is `std`: as in the authors'
    code, which leaves torch's bounds of -2 and 2. (That code scales K and V of the dense baseline together, and here
    each is scaled by itself: a difference of 0.1%.)"""

    std: float

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        value = nn.init.trunc_normal_(torch.empty(shape), generator=generator)
        return value * (self.std / value.std())


def block_std(config: ModelConfig, fan_in: int) -> float:
    """Standard deviation of a matrix inside a block: s / sqrt(fan_in), s = sqrt(2 / L) or sqrt(1 / L) by init_scale."""
    return math.sqrt((2.0 if config.init_scale == "paper" else 1.0) / config.num_layers) / math.sqrt(fan_in)


def dense_layer_weight(config: ModelConfig, fan_in: int) -> Distribution:
    """For a weight that is an nn.Linear in the authors' code too, as all of a dense layer's are. (The dense projections
    of SwitchHead and MoA are plain parameters there, drawn from an untruncated normal distribution.)"""
    std = block_std(config, fan_in)
    return TruncatedNormal(std) if config.initialization != "normal" else Normal(std)
