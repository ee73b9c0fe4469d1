"""The optimizer: which parameters decay, AdamW, and the learning rate of a step."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from common.errors import ConfigError
from model.parameter_spec import ParameterSpec
from model.parameters import owner_of, parameter_specs
from pretrain.config.schema import Config, GroupConfig, OptimizerConfig, UndecayedGroupConfig
from pretrain.engine.parts import group_of
from pretrain.parallel.experts import separate_experts

RATIO = "learning_rate_ratio"
"""Key of a group of the optimizer."""


class Rates(NamedTuple):
    """What the optimizer does with a parameter."""

    weight_decay: float
    ratio: float
    """Of the step's learning rate."""


def _key(name: str, spec: ParameterSpec) -> str:
    """Of its group in optimizer.groups."""
    return group_of(name, spec).replace("-", "")


def rates_of(name: str, spec: ParameterSpec, config: OptimizerConfig) -> Rates:
    """Of the parameter with this canonical name. A parameter that is not declared as decayed never is."""
    own: GroupConfig | UndecayedGroupConfig = getattr(config.groups, _key(name, spec))
    decay = config.weight_decay
    if isinstance(own, GroupConfig) and own.weight_decay is not None:
        decay = own.weight_decay
    return Rates(decay if spec.decayed else 0.0, own.learning_rate_ratio)


def group_problems(config: Config) -> Iterator[ConfigError]:
    """What optimizer.groups says of parameters that the model does not have, or does not decay."""
    groups = config.optimizer.groups
    decayed: dict[str, bool] = {}
    for name, spec in parameter_specs(config.model).items():
        group = _key(name, spec)
        is_copy = owner_of(name, config.model) != name
        decayed[group] = decayed.get(group, False) or (spec.decayed and not is_copy)
    for group in sorted(groups.model_fields_set):
        own, has_decayed = getattr(groups, group), decayed.get(group)
        default = type(groups).model_fields[group].default
        changed = [key for key, value in own if value != getattr(default, key)]
        if has_decayed is None:
            for key in changed:
                yield ConfigError(f"optimizer.groups.{group}.{key}: this model has no such parameters; remove the key")
        elif not has_decayed and "weight_decay" in changed:
            yield ConfigError(f"optimizer.groups.{group}.weight_decay: nothing of it is decayed; remove the key")


def grouped(names: Iterable[str], config: Config) -> dict[Rates, list[str]]:
    """The parameters, all of a model's or a stage's, by what the optimizer does with them; the ones that decay most
    first. Raises ConfigError, the first of `group_problems`."""
    for error in group_problems(config):
        raise error
    specs = parameter_specs(config.model)
    found: dict[Rates, list[str]] = {}
    for name in names:
        owner = owner_of(name, config.model)  # both stages that hold a tied embedding change it in the same way
        found.setdefault(rates_of(owner, specs[owner], config.optimizer), []).append(name)
    return dict(sorted(found.items(), reverse=True))


def parameter_groups(model: nn.Module, config: Config) -> list[dict[str, Any]]:
    """One for each weight decay and learning rate that parameters have: by default the parameters that are declared as
    decayed (matrices and experts), and the others."""
    named = dict(model.named_parameters())
    return [
        {"params": [named[name] for name in names], "weight_decay": rates.weight_decay, RATIO: rates.ratio}
        for rates, names in grouped(named, config).items()
    ]


class AdamW(torch.optim.AdamW):  # RELIES-ON torch-adamw
    """torch's own, without what its compiler needs: torch wraps these methods so that each imports the compiler at its
    first call, which takes two seconds of a start. Nobody compiles an optimizer here."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        return _plain("step")(self, closure)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        _plain("add_param_group")(self, param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        _plain("zero_grad")(self, set_to_none)

    def state_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = _plain("state_dict")(self)
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        _plain("load_state_dict")(self, state_dict)


def _plain(method: str) -> Any:
    """torch's method, as it was written."""
    return inspect.unwrap(getattr(torch.optim.AdamW, method))


def build_optimizer(model: nn.Module, config: Config) -> AdamW:
    """torch's AdamW over the model's parameters, with the groups that decay and expert parallelism ask for; the
    learning rate of a step is set before each step.

    The fused form updates in one pass over its state, on a GPU and on a CPU: there a fourth of the time, and without
    the two tensors as large as a rank's share (8 bytes a parameter) that torch's other form makes on the way. Its step
    counter is where the state is.
    """
    return AdamW(
        separate_experts(parameter_groups(model, config)),
        lr=config.optimizer.learning_rate,
        betas=config.optimizer.betas,
        eps=config.optimizer.eps,
        fused=True,
    )


def set_learning_rate(engine: Any, learning_rate: float) -> None:
    """Sets the rate of the next optimizer step."""
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate * group.get(RATIO, 1.0)
