"""Attention maps against loops in fp64, and against what the layer itself makes of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from model.config import RopeConfig
from pretrain.analysis.attention import attention_weights
from tests.model import attention_oracle, moa_oracle
from tests.pretrain.analysis.models import CASES, tiny


def reference(layer: Any, x: Tensor, T: int, position: Any) -> tuple[Tensor, Tensor]:
    """One context x [L, d] in fp64 -> the layer's output [T, d] and weights [H, T, L], by the loops of its tests."""
    p = {name: value.detach().double() for name, value in layer.named_parameters()}
    config, rope = layer.config, (position.fraction, position.base) if isinstance(position, RopeConfig) else None
    if config.type == "moa":
        options: dict[str, Any] = {"k": config.num_heads, "router": config.router, "keep": None}
        routed = [moa_oracle.route(token, p["selector"], **options) for token in x[len(x) - T :]]
        return moa_oracle.attend(x, routed, p, fraction=rope and rope[0])
    h = config.head_dim
    return attention_oracle.attention(
        x,
        T,
        attention_oracle.shaped(p, config.num_heads, h),
        k=getattr(config, "active_experts", 0),
        selector_of=getattr(config, "selector_of", str),
        rope=rope,
        scale=p.get("scale", h**-0.5),
    )


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
        expected_output, expected = reference(layer, one, T, model.config.position)
        assert expected.std() > 0.05, "so even that a mistake would not be seen"
        assert (weights - expected).abs().max() < 1e-5
        assert (y - expected_output).abs().max() < 1e-4 * expected_output.abs().max()


@pytest.mark.parametrize("case", [case for case in CASES if isinstance(tiny(case).config.position, RopeConfig)])
def test_weights_of_a_document_are_those_without_what_stands_before_it(case: str) -> None:
    """RoPE's, of which differences of positions alone count: a document of 4 tokens behind one of 3."""
    layer: Any = tiny(case).blocks[1].attention
    context = torch.randn(1, 7, 12, generator=torch.Generator().manual_seed(1))
    found = attention_weights(layer, context, 7, torch.tensor([[0, 0, 0, 3, 3, 3, 3]]))
    one, other = (attention_weights(layer, part, part.shape[1]) for part in (context[:, :3], context[:, 3:]))
    assert (found[..., 3:, :3] == 0).all() and other.std() > 0.05
    assert torch.allclose(found[..., :3, :3], one, atol=1e-5) and torch.allclose(found[..., 3:, 3:], other, atol=1e-5)
