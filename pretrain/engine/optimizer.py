"""The optimizer: which parameters decay, AdamW, and the learning rate of a step."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from model.parameters import parameter_specs
from pretrain.config.schema import Config
from pretrain.parallel.experts import separate_experts


def parameter_groups(model: nn.Module, config: Config) -> list[dict[str, Any]]:
    """Two groups: the parameters that are declared as decayed (matrices and experts), and the others."""
    decay = config.optimizer.weight_decay
    if decay == 0.0:
        return [{"params": list(model.parameters()), "weight_decay": 0.0}]
    specs = parameter_specs(config.model)
    groups = [
        {"params": [p for name, p in model.named_parameters() if specs[name].decayed is wanted], "weight_decay": rate}
        for wanted, rate in ((True, decay), (False, 0.0))
    ]
    return [group for group in groups if group["params"]]


class AdamW(torch.optim.AdamW):
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
        group["lr"] = learning_rate
