"""The dense feed-forward layers against their equations in fp64, forward and every gradient, dropout on."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model import linear
from model.config import ModelConfig
from model.dropout import keep_mask, site_key
from model.feedforward.dense import DenseFeedForward
from model.feedforward.swiglu import SwiGLU
from model.kernels.choice import Backends
from model.parallel.context import ParallelContext
from tests.tensors import gradient_of


def relu_layer(x: Tensor, p: dict[str, Tensor], mask: Tensor) -> Tensor:
    hidden = (x @ p["up.weight"].T + p["up.bias"]).clamp_min(0) * mask
    return hidden @ p["down.weight"].T + p["down.bias"]


def swiglu_layer(x: Tensor, p: dict[str, Tensor], mask: Tensor) -> Tensor:
    gate = x @ p["gate.weight"].T
    return (gate / (1 + torch.exp(-gate)) * (x @ p["up.weight"].T) * mask) @ p["down.weight"].T


LAYERS = {"dense": (DenseFeedForward, relu_layer), "swiglu": (SwiGLU, swiglu_layer)}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", LAYERS)
def test_forward_and_every_gradient_equal_the_equation(kind: str, dropout: float) -> None:
    check(kind, dropout, Backends())


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_hidden_layer_that_is_filled_up(dropout: float, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU in half precision: 16 columns where there are 11, whose masks are those of 11."""
    widths = []
    monkeypatch.setattr(linear, "padding", lambda x, weight: (-weight.shape[1] % 8, -weight.shape[0] % 8))
    relu = F.relu

    def noted(hidden: Tensor) -> Tensor:
        widths.append(hidden.shape[2])
        return relu(hidden)

    monkeypatch.setattr(F, "relu", noted)
    check("dense", dropout, Backends(elementwise=backend))
    assert widths == [16]


def check(kind: str, dropout: float, backends: Backends) -> None:
    layer_class, equation = LAYERS[kind]
    B, T, d, width = 2, 5, 7, 11
    config = ModelConfig.model_validate(
        {
            "d_model": d,
            "num_layers": 1,
            "vocab_size": 4,
            "sequence_length": T,
            "feedforward": {"type": kind, "hidden_size": width},
            "dropout": dropout,
        }
    )
    torch.manual_seed(0)
    layer = layer_class(config, parallel=ParallelContext(), backends=backends, name="blocks.0.feedforward", seed=5)
    x, upstream = torch.randn(B, T, d).requires_grad_(), torch.randn(B, T, d)
    sequence_index = torch.tensor([3, 9])
    y, auxiliary = layer(x, sequence_index)
    assert auxiliary is None
    y.backward(upstream)
    mask = torch.ones(B, T, width, dtype=torch.float64)
    if dropout:
        key = site_key(5, "blocks.0.feedforward.hidden")
        keep = keep_mask(probability=dropout, key=key, sequence_index=sequence_index, shape=(B, T, width))
        mask = keep.double() / (1 - dropout)
        assert 0 < int((~keep).sum()) < keep.numel()
    p = {name: value.detach().double().requires_grad_() for name, value in layer.named_parameters()}
    x64 = x.detach().double().requires_grad_()
    expected = equation(x64, p, mask)
    expected.backward(upstream.double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient_of(x).double(), x64.grad, rtol=1e-5, atol=1e-5)
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(gradient_of(parameter).double(), p[name].grad, rtol=1e-5, atol=1e-5)
