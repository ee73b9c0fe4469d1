"""Training the model of an export with transformers: what is dropped, gradients step after step, initial weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from model.kernels.ops.route import route_reference
from pretrain.export import layers_switchall
from tests.pretrain.export.models import MODELS, model_of, some_tokens
from tests.pretrain.export.test_modeling import theirs


def test_dropouts_act_in_training_alone() -> None:
    model = theirs(model_of("switchall"), "sdpa")
    tokens = some_tokens(1, 9)
    model.config.attention["expert_dropout"] = 0.5
    for block in model.blocks:
        block.attention.dropout = block.feedforward.dropout = 0.5
    assert torch.equal(model(tokens).logits, model(tokens).logits)
    model.train()
    assert not torch.equal(model(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("zeroed", [False, True], ids=["never preferred", "scores 0"])
@pytest.mark.parametrize("dropout", [0.0, 0.4, 0.9])
def test_an_expert_is_dropped_as_in_training(zeroed: bool, dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    x, selector = (torch.randn(shape, generator=generator) for shape in ((40, 6), (3, 5, 6)))
    numbers = torch.rand(40, 3, 5, generator=generator)
    monkeypatch.setattr(torch, "rand_like", lambda scores: numbers)
    gates, index = layers_switchall.gates_of(x, selector, 3, dropout, zeroed=zeroed)
    keep = numbers >= dropout if dropout else None
    expected = route_reference(x, selector, 3, keep=keep, drop_scores=zeroed)
    assert torch.equal(index, expected.index)
    torch.testing.assert_close(gates.gather(-1, index), expected.scores)
    assert torch.equal((gates != 0).sum(-1), (expected.scores != 0).sum(-1)), "0 for all others"


@pytest.mark.parametrize("name, hidden", [("switchall", 0), ("dense", 2)])
def test_dropout_has_the_places_of_the_trained_model(name: str, hidden: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Embedding, each attention and feed-forward, the hidden layer of a dense one, and before the output layer."""
    model = theirs(model_of(name), "sdpa").train()
    model.config.dropout = 0.25
    for module in model.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.25
    dropout, seen = F.dropout, list[tuple[float, bool]]()

    def noted(x: torch.Tensor, p: float, training: bool) -> torch.Tensor:
        seen.append((p, training))
        return dropout(x, p, training)

    monkeypatch.setattr(F, "dropout", noted)
    model(some_tokens(1, 9))
    assert seen == [(0.25, True)] * (2 + 2 * 2 + hidden)


@pytest.mark.parametrize("name", [name for name in MODELS if "xl" in name])
def test_keys_of_distances_follow_their_weights(name: str) -> None:
    """They are kept while a text is generated. A step of training makes its own, and changes those to come."""
    model, tokens = theirs(model_of(name), "sdpa"), some_tokens(1, 7)

    def logits() -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = model(tokens).logits
        return found

    before, gradients = logits(), []
    for _ in range(2):
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        gradients.append([block.attention.position.weight.grad.clone() for block in model.blocks])
    for first, second in zip(*gradients, strict=True):
        assert torch.equal(first, second) and first.any()
    with torch.no_grad():
        for block in model.blocks:
            weight = block.attention.position.weight
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    after, fresh = logits(), theirs(model_of(name), "sdpa")
    fresh.load_state_dict(model.state_dict())
    assert torch.allclose(after, fresh(tokens).logits, atol=1e-5) and not torch.allclose(after, before, atol=1e-3)


def begun(name: str) -> Any:
    """A model without an export."""
    from pretrain.export.modeling_switchall import SwitchAllForCausalLM

    config = theirs(model_of(name), "sdpa").config
    config.num_hidden_layers = 3
    torch.manual_seed(0)
    return SwitchAllForCausalLM(config)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_may_begin_without_an_export(name: str) -> None:
    """By the width of what a matrix multiplies, and inside of the 3 blocks by sqrt(2 / 3)."""
    for parameter, value in begun(name).named_parameters():
        kind = parameter.rpartition(".")[2]
        if kind == "scale":
            assert value.tolist() == pytest.approx([model_of(name).config.attention.head_dim ** -0.5])
        elif kind.endswith("bias") or "norm" in parameter:
            assert torch.equal(value, torch.full_like(value, float(kind == "weight"))), parameter
        else:
            fan_in = value.shape[-2] if kind.endswith("_experts") else value.shape[-1]
            scale = float(value.detach().std()) * fan_in**0.5 / ((2 / 3) ** 0.5 if "blocks" in parameter else 1.0)
            assert scale == pytest.approx(1.0, abs=5 / (2 * value.numel()) ** 0.5), parameter
