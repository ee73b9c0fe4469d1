"""What a layer declares about each of its parameters: `parameter_specs(config)` in the layer's class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from model.distributions import Distribution


@dataclass(frozen=True, kw_only=True)
class Experts:
    """Says that a parameter consists of experts, of which a token uses a few."""

    active: int
    """Experts that a token uses."""
    total: int
    exchanged: bool
    """Whether expert-parallel ranks divide the parameter. If there are any, tensor-parallel ranks do not."""


@dataclass(frozen=True, kw_only=True)
class ParameterSpec:
    """One parameter, as sharding, initialisation, optimizer groups, parameter counts and checkpoints see it.

    No field has a default, so that nothing is decided by an omission.
    """

    shape: tuple[int, ...]
    """Shape of the whole parameter, the same in every layout."""
    divided: int | None
    """The dimension that tensor-parallel ranks divide (or expert-parallel ranks, see `Experts.exchanged`). None: every
    rank holds the whole parameter, and the layer makes its gradient complete on every rank (model/parallel/regions.py).
    """
    experts: Experts | None
    """None: a token uses the whole parameter."""
    decayed: bool
    """Whether weight decay applies."""
    initial: Distribution
    """What the initial values are drawn from."""


Specs = dict[str, ParameterSpec]
"""Parameter specs by the parameters' names inside a module."""


def prefixed(modules: Mapping[str, Specs]) -> Specs:
    """The specs of a module whose submodules have the specs `modules`."""
    return {f"{module}.{name}": spec for module, specs in modules.items() for name, spec in specs.items()}
