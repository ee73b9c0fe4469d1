"""The parameters of a model: what its layers declare, under canonical names, and how many there are."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import nn

from model.config import ModelConfig
from model.layers import layer_specs
from model.parallel.context import ParallelContext
from model.parallel.sharding import local_shape, shard_place
from model.parameter_spec import ParameterSpec, prefixed


@functools.lru_cache(maxsize=8)
def parameter_specs(config: ModelConfig) -> Mapping[str, ParameterSpec]:
    """Every parameter of the model by canonical name, the tied output layer's copy of the embedding included."""
    return MappingProxyType(prefixed(layer_specs(config)))


def owner_of(name: str, config: ModelConfig) -> str:
    """The parameter as which `name` is initialised and saved: itself, except for the output layer's copy of a tied
    embedding, which a pipeline's last stage holds."""
    return "embedding.weight" if config.tied_embedding and name == "head.weight" else name


class DeclarationError(Exception):
    """A layer does not build the parameters that it declares."""


def check_declarations(
    model: nn.Module, config: ModelConfig, parallel: ParallelContext, *, layers: Iterable[str]
) -> None:
    """Compares the parameters of `model`, which holds `layers` (canonical names), with their declarations: same names,
    and on this rank the declared share of the declared shape. Raises DeclarationError.

    Everything that reads a declaration relies on it. A parameter whose division is not declared would train on wrong
    numbers: every rank would take its part for the whole.
    """
    declared, held = layer_specs(config), set(layers)
    expected = prefixed({layer: specs for layer, specs in declared.items() if layer in held})
    built = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in built.items():
        if name not in expected:
            raise DeclarationError(f"the parameter {name} is not declared; declare it in {_declared_in(model, name)}")
        spec = expected[name]
        if tuple(parameter.shape) != (share := local_shape(spec, parallel)):
            raise DeclarationError(
                f"the parameter {name} has shape {list(parameter.shape)} on this rank, but its declaration means "
                f"{list(share)}, {_division(spec, parallel)}; correct the layer, or what it declares in "
                f"{_declared_in(model, name)}"
            )
    for name in sorted(model.state_dict().keys() - built.keys()):
        raise DeclarationError(
            f"the buffer {name} would be in no checkpoint; declare a parameter in its place, or register it with "
            f"persistent=False if it is computed anew"
        )
    for name in expected:
        if name not in built:
            raise DeclarationError(
                f"the parameter {name} is declared, but its layer does not build it; correct the layer, or what it "
                f"declares in {_declared_in(model, name)}"
            )


def _division(spec: ParameterSpec, parallel: ParallelContext) -> str:
    _, parts = shard_place(spec, parallel)
    if spec.divided is None:
        return f"all of {list(spec.shape)} on every rank"
    return f"{list(spec.shape)} with dimension {spec.divided} divided by {parts}"


def _declared_in(model: nn.Module, name: str) -> str:
    """Function and file for the declaration of `name`: those of the innermost module that declares parameters."""
    module, found = model, "layer_specs (model/layers.py)"
    for part in name.split(".")[:-1]:
        inner = getattr(module, part, None)
        if not isinstance(inner, nn.Module):
            break
        module = inner
        if hasattr(module, "parameter_specs"):
            kind = type(module)
            found = f"{kind.__name__}.parameter_specs ({kind.__module__.replace('.', '/')}.py)"
    return found


@dataclass(frozen=True)
class ParameterCount:
    total: int
    active: int
    """Without the experts a token does not choose; embedding and output layer count whole."""


def count_parameters(model: nn.Module, config: ModelConfig) -> ParameterCount:
    """Counts the built model (meta device or real): expert tensors are active in the share k / E, all others whole."""
    specs = parameter_specs(config)
    total = active = 0
    for name, parameter in model.named_parameters():
        numel, experts = parameter.numel(), specs[name].experts
        total += numel
        active += numel if experts is None else numel // experts.total * experts.active
    return ParameterCount(total=total, active=active)
