"""Every layer declares its parameters, and a declaration that does not fit what the layer builds is refused."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from model.config import ModelConfig
from model.feedforward.sigma_moe import SigmaMoE
from model.feedforward.swiglu import SwiGLU
from model.language_model import LanguageModel
from model.layers import Block, Head
from model.parallel.context import ParallelContext
from model.parallel.sharding import local_shape, sharded_axis
from model.parameter_spec import Experts, Specs
from model.parameters import DeclarationError, check_declarations, parameter_specs

PROJECTIONS = ("query", "key", "value", "output")
SUBSETS = [list(chosen) for n in (1, 2, 3, 4) for chosen in itertools.combinations(PROJECTIONS, n)]
SIZES = {"num_heads": 4, "head_dim": 3}
ATTENTIONS: list[dict[str, Any]] = [{"type": "switchhead"}, {"type": "dense"}, {"type": "moa"}]
FEEDFORWARDS: list[dict[str, Any]] = [
    {"type": "sigma_moe", "num_experts": 8, "expert_size": 5},
    {"type": "dense", "hidden_size": 12},
    {"type": "swiglu", "hidden_size": 12},
    {"type": "sigma_moe", "num_experts": 8, "expert_size": 5, "activation": "swiglu"},
]


def config_of(attention: dict[str, Any], position: str, feedforward: dict[str, Any], **changes: Any) -> ModelConfig:
    sizes = {"d_model": 10, "num_layers": 1, "vocab_size": 8, "sequence_length": 4}
    layers = {"attention": attention | SIZES, "position": {"type": position}, "feedforward": feedforward}
    return ModelConfig.model_validate(sizes | layers | changes)


EVERY_LAYER = [
    *(config_of(attention, p, FEEDFORWARDS[0]) for attention in ATTENTIONS for p in ("rope", "xl")),
    *(config_of({"type": "dense"}, "rope", feedforward, tied_embedding=True) for feedforward in FEEDFORWARDS),
]
EVERY_PROJECTION = [
    config_of({"type": "switchhead", "expert_projections": subset, "selection": selection}, "xl", FEEDFORWARDS[0])
    for selection in ("side", "projection", "shared")
    for subset in (SUBSETS if selection == "side" else SUBSETS[-5:])
]
SWIGLU = config_of({"type": "dense"}, "rope", FEEDFORWARDS[2])
SIGMA_MOE = config_of({"type": "dense"}, "xl", FEEDFORWARDS[0])


def context(tensor: int = 1, expert: int = 1, *, sequence_parallel: bool = False) -> ParallelContext:
    """The last rank of a layout; nothing communicates."""
    peers: Any = object()
    divided: dict[str, Any] = {"sequence_parallel": sequence_parallel}
    for name, size in (("tensor", tensor), ("expert", expert), ("data", expert)):
        if size > 1:
            divided |= {f"{name}_size": size, f"{name}_rank": size - 1, f"{name}_group": peers}
    return ParallelContext(**divided)


LAYOUTS = [
    context(tensor=2),
    context(tensor=4),
    context(tensor=2, sequence_parallel=True),
    context(expert=2),
    context(tensor=2, expert=2, sequence_parallel=True),
    context(tensor=2, expert=4, sequence_parallel=True),
]


def built(config: ModelConfig, parallel: ParallelContext) -> nn.Module:
    with torch.device("meta"):
        return LanguageModel(config, parallel)


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}


def test_the_ranks_shares_make_up_the_whole_parameter_in_every_layer_and_layout() -> None:
    """Both shapes are those of built layers; only how a share becomes the whole is read from the declaration."""
    for config in (*EVERY_LAYER, *EVERY_PROJECTION):
        specs, whole = parameter_specs(config), shapes(built(config, ParallelContext()))
        assert {name: spec.shape for name, spec in specs.items()} == whole
        for parallel in LAYOUTS if config in EVERY_LAYER else LAYOUTS[:1]:
            if parallel.expert_size > 1 and config.feedforward.type != "sigma_moe":
                continue
            for name, share in shapes(built(config, parallel)).items():
                axis = sharded_axis(specs[name], expert_size=parallel.expert_size)
                parts = {"tensor": parallel.tensor_size, "expert": parallel.expert_size, None: 1}[axis]
                put_together = tuple(n * parts if d == specs[name].divided else n for d, n in enumerate(share))
                assert put_together == whole[name], f"{name} of {config} in {parallel}"
                assert local_shape(specs[name], parallel) == share


def test_matrices_and_experts_are_decayed_and_norms_biases_and_scales_are_not() -> None:
    for config in (*EVERY_LAYER, *EVERY_PROJECTION):
        decayed = {name: spec.decayed for name, spec in parameter_specs(config).items()}
        assert decayed == {name: not ("norm" in name or name.endswith(("bias", "scale"))) for name in decayed}


def redeclare(monkeypatch: pytest.MonkeyPatch, layer: Any, change: Callable[[Specs], Specs]) -> None:
    """Lets `layer` declare `change(its specs)` in the place of its specs."""
    original = layer.parameter_specs
    monkeypatch.setattr(layer, "parameter_specs", staticmethod(lambda config: change(original(config))))


def altered(name: str, **fields: Any) -> Callable[[Specs], Specs]:
    """Other values for fields of the declaration `name`."""
    return lambda specs: {**specs, name: dataclasses.replace(specs[name], **fields)}


GATE, UP = "blocks.0.feedforward.gate.weight", "blocks.0.feedforward.up_experts"
FIX = "correct the layer, or what it declares in"
IN_SWIGLU = "SwiGLU.parameter_specs (model/feedforward/swiglu.py)"
MUTATIONS = {
    "not declared": (
        SWIGLU, SwiGLU, lambda specs: {k: v for k, v in specs.items() if k != "gate.weight"}, ParallelContext(),
        f"the parameter {GATE} is not declared; declare it in {IN_SWIGLU}",
    ),
    "declared as replicated": (
        SWIGLU, SwiGLU, altered("gate.weight", divided=None), context(tensor=2),
        f"the parameter {GATE} has shape [6, 10] on this rank, but its declaration means [12, 10], all of [12, 10] on "
        f"every rank; {FIX} {IN_SWIGLU}",
    ),
    "another dimension": (
        SWIGLU, SwiGLU, altered("down.weight", divided=0), context(tensor=2),
        "the parameter blocks.0.feedforward.down.weight has shape [10, 6] on this rank, but its declaration means "
        f"[5, 12], [10, 12] with dimension 0 divided by 2; {FIX} {IN_SWIGLU}",
    ),
    "another shape": (
        SWIGLU, SwiGLU, altered("gate.weight", shape=(10, 12)), ParallelContext(),
        f"the parameter {GATE} has shape [12, 10] on this rank, but its declaration means [10, 12], [10, 12] with "
        f"dimension 0 divided by 1; {FIX} {IN_SWIGLU}",
    ),
    "experts not exchanged": (
        SIGMA_MOE, SigmaMoE, altered("up_experts", experts=Experts(active=4, total=8, exchanged=False)),
        context(expert=2),
        f"the parameter {UP} has shape [4, 10, 5] on this rank, but its declaration means [8, 10, 5], [8, 10, 5] with "
        f"dimension 0 divided by 1; {FIX} SigmaMoE.parameter_specs (model/feedforward/sigma_moe.py)",
    ),
    "not built": (
        SWIGLU, SwiGLU, lambda specs: specs | {"gate.bias": specs["gate.weight"]}, ParallelContext(),
        f"the parameter blocks.0.feedforward.gate.bias is declared, but its layer does not build it; "
        f"{FIX} {IN_SWIGLU}",
    ),
    "norm of a block": (
        SWIGLU, Block, lambda specs: {k: v for k, v in specs.items() if not k.startswith("attention_norm")},
        ParallelContext(),
        "the parameter blocks.0.attention_norm.weight is not declared; declare it in LayerNorm.parameter_specs "
        "(model/layers.py)",
    ),
    "output layer": (
        SWIGLU, Head, altered("bias", divided=None), context(tensor=2),
        "the parameter head.bias has shape [4] on this rank, but its declaration means [8], all of [8] on every rank; "
        f"{FIX} Head.parameter_specs (model/layers.py)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_wrong_declaration_is_refused_when_the_model_is_built(mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, layer, change, parallel, message = MUTATIONS[mutation]
    built(config, parallel)
    redeclare(monkeypatch, layer, change)
    with pytest.raises(DeclarationError) as error:
        built(config, parallel)
    assert str(error.value) == message


def test_a_parameter_outside_every_layer_is_refused() -> None:
    model = built(SWIGLU, ParallelContext())
    model.register_parameter("temperature", nn.Parameter(torch.empty(1, device="meta")))
    with pytest.raises(DeclarationError) as error:
        check_declarations(model, SWIGLU, ParallelContext(), layers=("embedding", "blocks.0", "final_norm", "head"))
    expected = "the parameter temperature is not declared; declare it in layer_specs (model/layers.py)"
    assert str(error.value) == expected


def test_a_buffer_that_no_checkpoint_would_hold_is_refused() -> None:
    """As the bias of a router that is balanced without a loss: a resume would begin with the one of the constructor."""
    model, layers = built(SWIGLU, ParallelContext()), ("embedding", "blocks.0", "final_norm", "head")
    feedforward = model.get_submodule("blocks.0.feedforward")
    feedforward.register_buffer("table", torch.zeros(3), persistent=False)
    check_declarations(model, SWIGLU, ParallelContext(), layers=layers)
    feedforward.register_buffer("bias", torch.zeros(3))
    with pytest.raises(DeclarationError, match=r"^the buffer blocks\.0\.feedforward\.bias would be in no checkpoint; "):
        check_declarations(model, SWIGLU, ParallelContext(), layers=layers)
