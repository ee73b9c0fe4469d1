"""Attention maps against plain PyTorch in fp64, and against what the layer itself makes of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from model.config import RopeConfig
from pretrain.analysis.attention import attention_weights
from tests.pretrain.analysis.models import CASES, tiny


def rotated(x: Tensor, positions: Tensor, config: RopeConfig) -> Tensor:
    """x [n, H, h]: the first half of each head, as complex numbers of dimension i and i + n / 2, turned."""
    n = int(config.fraction * x.shape[-1]) // 2 * 2
    first, second = x[..., : n // 2], x[..., n // 2 : n]
    speed = config.base ** (-torch.arange(0, n, 2, dtype=torch.float64) / n)
    angles = positions[:, None, None].double() * speed
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag, x[..., n:]], dim=-1)


def gates(x: Tensor, selector: Tensor, k: int, *, softmax: bool = False) -> Tensor:
    """x [n, d], selector [H, E, d] -> [n, H, E]: the gate where an expert is among the k best, else 0."""
    logits = torch.einsum("nd,hed->nhe", x, selector)
    kept = torch.zeros_like(logits).scatter(-1, logits.topk(k).indices, 1.0)
    return kept * (logits.softmax(-1) if softmax else logits.sigmoid())


def reference(layer: Any, x: Tensor, T: int, position: Any) -> tuple[Tensor, Tensor]:
    """One context x [L, d] in fp64 -> weights [H, T, L] and the layer's output [T, d], from the equations."""
    p = {name: value.detach().double() for name, value in layer.named_parameters()}
    config, (L, d) = layer.config, x.shape
    h, kind = config.head_dim, config.type

    def project(name: str, tokens: Tensor) -> Tensor:
        if f"{name}_experts" in p:
            gate = gates(tokens, p[f"{config.selector_of(name)}_selector"], config.active_experts)
            return torch.einsum("nd,hedk,nhe->nhk", tokens, p[f"{name}_experts"], gate)
        return (tokens @ p[f"{name}.weight"].T).unflatten(-1, (-1, h))

    chosen = None
    if kind == "moa":
        gate = gates(x[L - T :], p["selector"][None], config.num_heads, softmax=config.router == "softmax")[:, 0]
        chosen = gate.topk(config.num_heads)  # best first: all gates are positive
        q = torch.einsum("td,tkdh->tkh", x[L - T :], p["query_experts"][chosen.indices])
    else:
        q = project("query", x[L - T :])
    k, v = project("key", x), project("value", x)
    places = torch.arange(L)
    if isinstance(position, RopeConfig):
        q, k = rotated(q, places[L - T :], position), rotated(k, places, position)
        logits = torch.einsum("thc,lhc->htl", q, k.expand(-1, q.shape[1], -1)) * h**-0.5
    else:
        distance = (places[L - T :, None] - places[None]).double()
        speed = 10000.0 ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
        angles = distance[..., None] * speed
        r = torch.stack([angles.sin(), angles.cos()], -1).flatten(-2)  # [T, L, d]
        far = (r @ p["position.weight"].T).unflatten(-1, (-1, h)).expand(-1, -1, q.shape[1], -1)
        u, w = (p.get(name, torch.zeros(())) for name in ("content_bias", "position_bias"))
        content = torch.einsum("thc,lhc->htl", q + u, k.expand(-1, q.shape[1], -1))
        logits = (content + torch.einsum("thc,tlhc->htl", q + w, far)) * p.get("scale", torch.tensor(h**-0.5))
    weights = torch.zeros_like(logits)
    for t in range(T):
        weights[:, t, : L - T + t + 1] = logits[:, t, : L - T + t + 1].softmax(-1)
    attended = torch.einsum("htl,lhc->thc", weights, v.expand(-1, q.shape[1], -1))
    if chosen is not None:
        return weights, torch.einsum("tk,tkh,tkhd->td", chosen.values, attended, p["output_experts"][chosen.indices])
    if "output_experts" in p:
        gate = gates(x[L - T :], p[f"{config.selector_of('output')}_selector"], config.active_experts)
        return weights, torch.einsum("thc,hecd,the->td", attended, p["output_experts"], gate)
    return weights, attended.flatten(1) @ p["output.weight"].T


@pytest.mark.parametrize("memory", [0, 4], ids=["no memory", "memory"])
@pytest.mark.parametrize("case", CASES)
def test_weights_of_every_attention(case: str, memory: int) -> None:
    model, T = tiny(case), 5
    layer: Any = model.blocks[1].attention
    context = torch.randn(2, memory + T, 12, generator=torch.Generator().manual_seed(1))
    found = attention_weights(layer, context, T)
    assert found.dtype == torch.float32 and found.shape == (2, layer.config.num_heads, T, memory + T)
    assert torch.allclose(found.sum(-1), torch.ones(()), atol=1e-6)
    assert (found.triu(memory + 1) == 0).all(), "a weight in the future"
    output, _ = layer(context, T, torch.zeros(2, dtype=torch.int64))
    for one, weights, y in zip(context.double(), found, output, strict=True):
        expected, expected_output = reference(layer, one, T, model.config.position)
        assert expected.std() > 0.05, "so even that a mistake would not be seen"
        assert (weights - expected).abs().max() < 1e-5
        assert (y - expected_output).abs().max() < 1e-4 * expected_output.abs().max()
