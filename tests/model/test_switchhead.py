"""SwitchHead attention against the fp64 loop: forward and the gradient of every parameter and of the input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from model.attention.dense import DenseAttention
from model.attention.switchhead import SwitchHeadAttention
from model.config import ModelConfig
from model.dropout import keep_mask, site_key
from model.kernels.choice import Backends
from model.parallel.context import ParallelContext
from tests.model import oracles

# d, H, h, E, k, T, B, expert dropout, rotated fraction, base
SHAPES = [
    (11, 2, 7, 5, 3, 6, 2, 0.0, 0.5, 10000.0),
    (11, 2, 7, 5, 3, 6, 2, 0.4, 0.5, 10000.0),
    (8, 1, 4, 1, 1, 5, 1, 0.0, 0.5, 10000.0),
    (9, 3, 5, 4, 4, 4, 2, 0.0, 1.0, 50.0),
    (16, 4, 8, 4, 2, 1, 3, 0.0, 0.25, 10000.0),
    (13, 1, 3, 2, 1, 7, 1, 0.9, 0.1, 10000.0),
]


BACKENDS = {
    "reference": Backends(),
    "cpu": Backends(route="cpu", switchhead_value="cpu", switchhead_output="cpu"),
    "dense": Backends(route="cpu", switchhead_value="dense", switchhead_output="dense"),
}


def build(
    d: int,
    H: int,
    h: int,
    E: int,
    k: int,
    T: int,
    dropout: float,
    fraction: float,
    backend: str = "reference",
    base: float = 10000.0,
) -> SwitchHeadAttention:
    config = ModelConfig.model_validate(
        {
            "d_model": d,
            "num_layers": 1,
            "vocab_size": 4,
            "sequence_length": T,
            "attention": {
                "type": "switchhead",
                "num_heads": H,
                "head_dim": h,
                "num_experts": E,
                "active_experts": k,
                "expert_dropout": dropout,
            },
            "position": {"type": "rope", "fraction": fraction, "base": base},
        }
    )
    layer = SwitchHeadAttention(
        config, parallel=ParallelContext(), backends=BACKENDS[backend], name="blocks.0.attention", seed=3
    )
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return layer


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("d, H, h, E, k, T, B, dropout, fraction, base", SHAPES)
def test_forward_and_every_gradient_equal_the_loop(
    d: int, H: int, h: int, E: int, k: int, T: int, B: int, dropout: float, fraction: float, base: float, backend: str
) -> None:
    layer = build(d, H, h, E, k, T, dropout, fraction, backend, base)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(B, T, d, generator=generator).requires_grad_()
    upstream = torch.randn(B, T, d, generator=generator)
    sequence_index = torch.arange(B) + 40
    y, _ = layer(x, T, sequence_index)
    y.backward(upstream)

    p = {name: value.detach().double().requires_grad_() for name, value in layer.named_parameters()}
    shaped = {name.removesuffix(".weight"): v.view(H, h, d) if name.endswith("weight") else v for name, v in p.items()}
    x64 = x.detach().double().requires_grad_()
    keep = {"value": None, "output": None}
    if dropout:
        keep = {
            side: keep_mask(
                probability=dropout,
                key=site_key(3, f"blocks.0.attention.{side}_experts"),
                sequence_index=sequence_index,
                shape=(B, T, H, E),
            )
            for side in ("value", "output")
        }
    expected = torch.stack(
        [
            oracles.switchhead(
                x64[b],
                shaped,
                k=k,
                fraction=fraction,
                base=base,
                keep_v=None if keep["value"] is None else keep["value"][b],
                keep_o=None if keep["output"] is None else keep["output"][b],
            )
            for b in range(B)
        ]
    )
    expected.backward(upstream.double())
    torch.testing.assert_close(y.double(), expected, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=5e-5, atol=5e-5)
    assert len(p) == 6
    largest = max(float(value.grad.norm()) for value in p.values())
    for name, parameter in layer.named_parameters():
        if T == 1 and name in ("query.weight", "key.weight"):
            # A single token attends to itself alone: no gradient, but for rounding.
            assert float(parameter.grad.norm()) < 1e-5 * largest and float(p[name].grad.norm()) < 1e-12 * largest
            continue
        error = (parameter.grad.double() - p[name].grad).norm() / p[name].grad.norm()
        assert error < 1e-5, f"gradient of {name} is off by {error:.1e}"


def test_selectors_learn_only_through_chosen_scores() -> None:
    layer = build(8, 2, 4, 4, 1, 5, 0.0, 0.5)
    x = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(0))
    layer(x, 5, torch.zeros(1, dtype=torch.int64))[0].square().sum().backward()
    chosen = layer.value_statistics.load > 0
    has_gradient = layer.value_selector.grad.abs().sum(-1) > 0
    assert torch.equal(chosen, has_gradient)
    assert 0 < int(chosen.sum()) < chosen.numel()


def test_evaluation_drops_no_expert_and_counts_nothing() -> None:
    layer, spared = build(8, 2, 4, 5, 2, 6, 0.6, 0.5).eval(), build(8, 2, 4, 5, 2, 6, 0.0, 0.5)
    x, index = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(5)), torch.arange(2)
    assert torch.equal(layer(x, 6, index)[0], spared(x, 6, index)[0])
    for statistics in (layer.value_statistics, layer.output_statistics):
        assert not statistics.load.any()
    assert not torch.equal(layer.train()(x, 6, index)[0], spared(x, 6, index)[0])


def test_tokens_of_memory_are_chosen_for_but_not_counted_again() -> None:
    """They were counted when they were new; the value selector looks at them all the same."""
    layer = build(8, 2, 4, 5, 2, 3, 0.0, 0.5)
    context = torch.randn(2, 7, 8, generator=torch.Generator().manual_seed(6))
    layer(context, 3, torch.arange(2))
    for side in ("value", "output"):
        logits = torch.einsum("btd,hed->hbte", context[:, 4:], getattr(layer, f"{side}_selector"))
        chosen = F.one_hot(logits.topk(2).indices, 5).sum((1, 2, 3))
        assert torch.equal(getattr(layer, f"{side}_statistics").load, chosen.double()), side


def test_permuting_experts_with_their_selector_rows_changes_nothing() -> None:
    layer = build(10, 2, 4, 5, 2, 6, 0.0, 0.5)
    x = torch.randn(2, 6, 10, generator=torch.Generator().manual_seed(2))
    index = torch.zeros(2, dtype=torch.int64)
    before, _ = layer(x, 6, index)
    order = torch.tensor([3, 0, 4, 1, 2])
    with torch.no_grad():
        for parameter in (layer.value_selector, layer.value_experts, layer.output_selector, layer.output_experts):
            parameter.copy_(parameter[:, order].clone())
    torch.testing.assert_close(layer(x, 6, index)[0], before, rtol=1e-5, atol=1e-5)


def test_dense_attention_equals_softmax_by_hand() -> None:
    d, H, h, T = 10, 3, 5, 6
    config = ModelConfig.model_validate(
        {
            "d_model": d,
            "num_layers": 1,
            "vocab_size": 4,
            "sequence_length": T,
            "attention": {"type": "dense", "num_heads": H, "head_dim": h},
        }
    )
    torch.manual_seed(0)
    layer = DenseAttention(config, parallel=ParallelContext(), backends=Backends(), name="attention", seed=0)
    x = torch.randn(1, T, d)
    q, k, v = (F.linear(x[0], m.weight).view(T, H, h).double() for m in (layer.query, layer.key, layer.value))
    rows = []
    for head in range(H):
        turned_q = torch.stack([oracles.rotate(q[t, head], t, fraction=0.5, base=10000.0) for t in range(T)])
        turned_k = torch.stack([oracles.rotate(k[t, head], t, fraction=0.5, base=10000.0) for t in range(T)])
        logits = turned_q @ turned_k.T / h**0.5
        logits = logits.masked_fill(torch.ones(T, T).triu(1).bool(), float("-inf"))
        rows.append(logits.softmax(-1) @ v[:, head])
    expected = torch.cat(rows, dim=-1) @ layer.output.weight.double().T
    torch.testing.assert_close(layer(x, T, torch.zeros(1))[0][0].double(), expected, rtol=1e-5, atol=1e-6)
