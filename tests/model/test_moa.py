"""MoA against the fp64 loops: forward, every gradient, both routers and positions, expert dropout, the three losses."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention.moa import MoAAttention
from model.balance import balance_losses, cv_tangent
from model.config import MoAConfig, ModelConfig
from model.dropout import keep_mask, site_key
from model.initialization import initialize
from model.kernels.choice import Backends
from model.language_model import build_on_meta
from model.parallel.context import ParallelContext
from model.parameters import count_parameters
from model.routing import RoutingStatistics
from tests.harness import run_ranks
from tests.model import moa_oracle
from tests.tensors import gradient_of, sum_of


class Shape(NamedTuple):
    d: int
    h: int
    E: int
    k: int
    B: int
    T: int
    memory: int | None = None
    """Tokens of memory before the chunk with XL positions; None: RoPE."""
    router: str = "softmax"
    dropout: float = 0.0
    fraction: float = 0.5


SHAPES = {
    "plain": Shape(d=11, h=7, E=5, k=3, B=2, T=6),
    "sigmoid": Shape(d=11, h=7, E=5, k=3, B=2, T=6, router="sigmoid"),
    "expert dropout": Shape(d=11, h=7, E=5, k=2, B=2, T=6, dropout=0.4),
    "more dropped than spared": Shape(d=9, h=4, E=6, k=4, B=2, T=5, dropout=0.9, router="sigmoid"),
    "one expert": Shape(d=8, h=4, E=1, k=1, B=1, T=5),
    "all experts": Shape(d=9, h=5, E=4, k=4, B=2, T=4, fraction=1.0),
    "one token": Shape(d=16, h=8, E=4, k=2, B=3, T=1, fraction=0.25),
    "nothing rotated": Shape(d=13, h=3, E=2, k=1, B=1, T=7, fraction=0.1),
    "XL": Shape(d=11, h=7, E=5, k=3, B=2, T=5, memory=5),
    "XL, sigmoid, dropout, little memory": Shape(d=9, h=4, E=6, k=2, B=2, T=5, memory=3, router="sigmoid", dropout=0.3),
    "XL, no memory": Shape(d=8, h=6, E=3, k=2, B=1, T=6, memory=0),
}
BACKENDS = {"reference": Backends(), "cpu": Backends(route="cpu", expert_linear="cpu")}
LOSSES = {"z_loss_weight": 0.3, "switch_loss_weight": 0.7, "cv_loss_weight": 0.9}


def model_config(shape: Shape, **attention: Any) -> ModelConfig:
    position = {"type": "xl"} if shape.memory is not None else {"type": "rope", "fraction": shape.fraction}
    return ModelConfig.model_validate(
        {
            "d_model": shape.d,
            "num_layers": 2,
            "vocab_size": 12,
            "sequence_length": shape.T,
            "attention": {
                "type": "moa",
                "num_heads": shape.k,
                "head_dim": shape.h,
                "num_experts": shape.E,
                "router": shape.router,
                "expert_dropout": shape.dropout,
                **attention,
            },
            "position": position,
            "feedforward": {"type": "dense", "hidden_size": 8},
        }
    )


def build(shape: Shape, backend: str = "reference", /, **attention: Any) -> MoAAttention:
    layer = MoAAttention(
        model_config(shape, **attention),
        parallel=ParallelContext(),
        backends=BACKENDS[backend],
        name="blocks.0.attention",
        seed=3,
    )
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in layer.parameters():
            # Small enough that no softmax saturates: gradients would be differences of nearly equal numbers.
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return layer


def routed_by_loop(
    layer: MoAAttention, chunk: Tensor, selector: Tensor, index: Tensor
) -> list[list[moa_oracle.Routed]]:
    """Per sequence, the routed tokens of `chunk` [B, T, d]."""
    B, T, _ = chunk.shape
    config, keep = layer.config, None
    if config.expert_dropout:
        keep = keep_mask(
            probability=config.expert_dropout,
            key=site_key(3, "blocks.0.attention.experts"),
            sequence_index=index,
            shape=(B, T, config.num_experts),
        )
        assert 0 < int(keep.sum()) < keep.numel()
    options: dict[str, Any] = {"k": config.num_heads, "router": config.router}
    return [
        [
            moa_oracle.route(chunk[b, t], selector, keep=None if keep is None else keep[b, t], **options)
            for t in range(T)
        ]
        for b in range(B)
    ]


@pytest.mark.parametrize("scope", ["micro_batch", "global_batch"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SHAPES)
def test_forward_and_every_gradient_equal_the_loop(name: str, backend: str, scope: str) -> None:
    shape = SHAPES[name]
    d, E, B, T = shape.d, shape.E, shape.B, shape.T
    weights = LOSSES if shape.router == "softmax" else dict.fromkeys(LOSSES, 0.0)
    if shape.E == 1:  # a variance needs two; the configuration refuses the weight
        weights = weights | {"cv_loss_weight": 0.0}
    layer = build(shape, backend, loss_scope=scope, **weights)
    generator = torch.Generator().manual_seed(1)
    context = torch.randn(B, (shape.memory or 0) + T, d, generator=generator).requires_grad_()
    upstream = torch.randn(B, T, d, generator=generator)
    previous = [torch.rand(E, generator=generator, dtype=torch.float64) + 0.1 for _ in range(2)]
    layer.statistics.choice_share, layer.statistics.gate_mean = previous[0] / previous[0].sum(), previous[1]
    sequence_index = torch.arange(B) + 40
    y, loss = layer(context, T, sequence_index)
    if shape.router == "sigmoid":
        assert loss is None
        loss = torch.zeros(())
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    ((y * upstream).sum() + loss).backward()

    p = {name: value.detach().double().requires_grad_() for name, value in layer.named_parameters()}
    x = context.detach().double().requires_grad_()
    sequences = routed_by_loop(layer, x[:, x.shape[1] - T :], p["selector"], sequence_index)
    fraction = shape.fraction if shape.memory is None else None
    expected = torch.stack(
        [moa_oracle.attend(x[b], routed, p, fraction=fraction)[0] for b, routed in enumerate(sequences)]
    )
    routed = [token for sequence in sequences for token in sequence]
    mean = moa_oracle.gate_mean(routed)
    if scope == "micro_batch":
        switch, cv = moa_oracle.switch_loss(routed), moa_oracle.cv_loss(mean)
    else:
        switch = moa_oracle.switch_loss(routed, layer.statistics.choice_share)
        at = previous[1].clone().requires_grad_()
        value = moa_oracle.cv_loss(at)
        slope = torch.autograd.grad(value, at)[0] if E > 1 else torch.zeros(E)
        cv = value.detach() + (slope * (mean - previous[1])).sum()
    losses = (moa_oracle.z_loss(routed), switch, cv)
    expected_loss = sum(weight * term for weight, term in zip(weights.values(), losses, strict=True))
    ((expected * upstream.double()).sum() + expected_loss).backward()

    torch.testing.assert_close(y.double(), expected, rtol=5e-5, atol=5e-5)
    torch.testing.assert_close(loss.double(), torch.as_tensor(expected_loss).double().detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient_of(context).double(), x.grad, rtol=2e-4, atol=2e-4)
    assert len(p) == (7 if shape.memory is not None else 5)
    largest = max(float(gradient_of(value).norm()) for value in p.values())
    for parameter_name, parameter in layer.named_parameters():
        reference = gradient_of(p[parameter_name])
        if float(reference.norm()) < 1e-12 * largest:
            # A single token attends to itself alone, a single expert has probability 1: no gradient, but for rounding.
            assert float(gradient_of(parameter).norm()) < 1e-5 * largest, parameter_name
            continue
        error = (gradient_of(parameter).double() - reference).norm() / reference.norm()
        assert error < 2e-5, f"gradient of {parameter_name} is off by {error:.1e}"


@pytest.mark.parametrize("scope", ["micro_batch", "global_batch"])
def test_each_loss_counts_alone(scope: str) -> None:
    """Without the other two: together they are the sum of the three."""
    shape = SHAPES["plain"]
    context = torch.randn(shape.B, shape.T, shape.d, generator=torch.Generator().manual_seed(1))
    alone = [{name: weight if name == of else 0.0 for name, weight in LOSSES.items()} for of in LOSSES]
    together, *each = (
        build(shape, loss_scope=scope, **weights)(context, shape.T, torch.arange(shape.B))[1].item()
        for weights in (LOSSES, *alone)
    )
    assert min(each) > 0.01 or scope == "global_batch"  # where the cv loss begins at 0
    assert all(each[:2]) and together == pytest.approx(sum(each), rel=1e-6)


def test_permuting_experts_with_their_selector_rows_changes_nothing() -> None:
    shape = SHAPES["plain"]
    layer = build(shape, "cpu", loss_scope="micro_batch", **LOSSES)
    x = torch.randn(2, 6, shape.d, generator=torch.Generator().manual_seed(2))
    index = torch.zeros(2, dtype=torch.int64)
    before = layer(x, 6, index)
    with torch.no_grad():
        for parameter in (layer.selector, layer.query_experts, layer.output_experts):
            parameter.copy_(parameter[[3, 0, 4, 1, 2]].clone())
    for value, expected in zip(layer(x, 6, index), before, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_expert_is_dense_attention_with_one_head(backend: str) -> None:
    """softmax over a single expert is 1."""
    shape = Shape(d=10, h=6, E=1, k=1, B=2, T=5, fraction=0.1)
    layer = build(shape, backend)
    x = torch.randn(2, 5, 10, generator=torch.Generator().manual_seed(2))
    q, k, v = x @ layer.query_experts[0], F.linear(x, layer.key.weight), F.linear(x, layer.value.weight)
    logits = (q @ k.transpose(1, 2) / 6**0.5).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    expected = logits.softmax(-1) @ v @ layer.output_experts[0]
    torch.testing.assert_close(layer(x, 5, torch.zeros(2, dtype=torch.int64))[0], expected, rtol=1e-5, atol=1e-5)


def test_equal_logits_choose_the_first_experts() -> None:
    layer = build(SHAPES["plain"])
    with torch.no_grad():
        layer.selector.zero_()
    layer(torch.randn(2, 6, 11), 6, torch.zeros(2, dtype=torch.int64))
    assert layer.statistics.load.tolist() == [12.0, 12.0, 12.0, 0.0, 0.0]


def test_evaluation_has_no_losses_no_dropout_and_leaves_the_statistics() -> None:
    layer, spared = (
        build(SHAPES["expert dropout"], **LOSSES).eval(),
        build(SHAPES["expert dropout"], expert_dropout=0.0),
    )
    x, index = torch.randn(2, 6, 11, generator=torch.Generator().manual_seed(4)), torch.zeros(2, dtype=torch.int64)
    y, loss = layer(x, 6, index)
    assert loss is None
    assert torch.equal(y, spared(x, 6, index)[0])
    assert all(float(t.abs().sum()) == 0 for t in layer.statistics.accumulators())


def test_statistics_of_a_step_are_those_of_all_its_tokens() -> None:
    """Two micro-steps give the means of both; a skipped or empty step keeps them; the first step's are uniform."""
    layer = build(SHAPES["expert dropout"], **LOSSES)
    statistics = layer.statistics
    assert statistics.state().keys() == {"probability", "choice_share", "gate_mean"}
    assert statistics.choice_share.tolist() == statistics.gate_mean.tolist() == [0.2] * 5
    # The entropy of a run is of the routers whose regulariser uses it: MoA has none.
    assert statistics.probability.numel() == 0 and not statistics.tracks_probability
    x, index = torch.randn(4, 6, 11, generator=torch.Generator().manual_seed(4)), torch.arange(4)
    for part in (slice(0, 2), slice(2, 4)):
        layer(x[part], 6, index[part])
    statistics.finish_step()
    sequences = routed_by_loop(layer, x.double(), layer.selector.detach().double(), index)
    routed = [token for sequence in sequences for token in sequence]
    expected = moa_oracle.choice_share(routed), moa_oracle.gate_mean(routed)
    for keep in (True, False):
        torch.testing.assert_close(statistics.choice_share, expected[0])
        torch.testing.assert_close(statistics.gate_mean, expected[1], rtol=1e-6, atol=1e-7)
        assert all(float(t.abs().sum()) == 0 for t in statistics.accumulators())
        if keep:
            layer(x, 6, index + 9)
            statistics.finish_step(keep=torch.tensor(False))
            statistics.finish_step()


def test_first_step_of_global_batch_scope_has_no_balancing_gradient() -> None:
    layer = build(SHAPES["plain"], loss_scope="global_batch", **{**LOSSES, "z_loss_weight": 0.0})
    _, loss = layer(torch.randn(2, 6, 11), 6, torch.zeros(2, dtype=torch.int64))
    loss.backward()
    assert loss.item() == pytest.approx(LOSSES["switch_loss_weight"], rel=1e-6)
    assert float(gradient_of(layer.selector).abs().max()) < 1e-6


def test_tangent_touches_the_loss_at_its_point() -> None:
    at = torch.tensor([0.1, 0.4, 0.2], dtype=torch.float64, requires_grad=True)
    curve, tangent = moa_oracle.cv_loss(at), cv_tangent(at, at.detach())
    torch.testing.assert_close(tangent, curve)
    torch.testing.assert_close(*(torch.autograd.grad(value, at)[0] for value in (tangent, curve)))


def _rank_gradient(rank: int, x: Tensor, selector: Tensor, scope: str, world_size: int) -> tuple[Tensor, Tensor]:
    """Losses and gradient, each averaged over ranks, of a rank's share of the tokens."""
    import torch.distributed as dist

    group = dist.group.WORLD if world_size > 1 else None
    parallel = ParallelContext(data_rank=rank, data_size=world_size, data_group=group)
    E = selector.shape[0]
    config = MoAConfig.model_validate({"num_experts": E, "num_heads": 2, "loss_scope": scope, **LOSSES})
    statistics = RoutingStatistics((E,), tracks_probability=False, tracks_balance=True)
    statistics.choice_share = statistics.gate_mean = torch.arange(1.0, E + 1, dtype=torch.float64) / 10
    selector = selector.clone().requires_grad_()
    logits = x.chunk(world_size)[rank] @ selector.T
    probability = logits.softmax(-1)
    gates, index = probability.topk(2)
    load = index.flatten().bincount(minlength=E)
    loss = balance_losses(logits, probability, gates, index, load, config, statistics, parallel)
    loss.backward()
    results = torch.cat([loss.detach().view(1), gradient_of(selector).flatten()]) / world_size
    if world_size > 1:
        dist.all_reduce(results)
    return results[0], results[1:]


@pytest.mark.parametrize("scope", ["micro_batch", "global_batch"])
def test_losses_have_the_single_process_gradient_on_any_number_of_ranks(scope: str) -> None:
    generator = torch.Generator().manual_seed(9)
    x, selector = torch.randn(8, 5, generator=generator), torch.randn(4, 5, generator=generator)
    expected_loss, expected = _rank_gradient(0, x, selector, scope, 1)
    if scope == "micro_batch":
        selector64 = selector.double().requires_grad_()
        routed = [moa_oracle.route(token, selector64, k=2, router="softmax", keep=None) for token in x.double()]
        terms = (
            moa_oracle.z_loss(routed),
            moa_oracle.switch_loss(routed),
            moa_oracle.cv_loss(moa_oracle.gate_mean(routed)),
        )
        sum_of(weight * term for weight, term in zip(LOSSES.values(), terms, strict=True)).backward()
        torch.testing.assert_close(expected.double(), gradient_of(selector64).flatten(), rtol=1e-5, atol=1e-6)
    for world_size in (1, 2):
        for loss, gradient in run_ranks(_rank_gradient, world_size, x, selector, scope, world_size):
            torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["plain", "XL"])
def test_parameter_names_are_canonical(name: str) -> None:
    names = {"selector", "query_experts", "output_experts", "key.weight", "value.weight"}
    if name == "XL":
        names |= {"position.weight", "scale"}
    model = build_on_meta(model_config(SHAPES[name]))
    found = {n for n, _ in model.named_parameters() if ".attention." in n}
    assert found == {f"blocks.{layer}.attention.{n}" for layer in (0, 1) for n in names}


@pytest.mark.slow  # the fast ones, of other models: tests/pretrain/engine/test_compiled.py
@pytest.mark.parametrize("scope", ["micro_batch", "global_batch"])
@pytest.mark.parametrize("name", ["expert dropout", "XL"])
def test_compiles_without_graph_breaks(name: str, scope: str) -> None:
    shape = SHAPES[name]
    context = torch.randn(2, (shape.memory or 0) + shape.T, shape.d, generator=torch.Generator().manual_seed(6))
    found = []
    for compiled in (False, True):
        layer = build(shape, "cpu", loss_scope=scope, **LOSSES)
        function = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
        y, loss = function(context, shape.T, torch.arange(2))
        gradients = torch.autograd.grad(y.square().sum() + loss, list(layer.parameters()))
        found.append([y, loss, *gradients, *layer.statistics.accumulators()])
    for eager, other in zip(*found, strict=True):
        torch.testing.assert_close(other, eager)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["plain", "XL"])
def test_bf16_stays_near_fp32(name: str, backend: str) -> None:
    """Choices and gates are fp32; everything else is rounded to 8 bits a few times."""
    shape = SHAPES[name]
    context = torch.randn(2, (shape.memory or 0) + shape.T, shape.d, generator=torch.Generator().manual_seed(6))
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        layer = build(shape, backend, **LOSSES)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.copy_(parameter.bfloat16())  # the same weights in both
        layer = layer.to(dtype)
        y, loss = layer(context.bfloat16().to(dtype), shape.T, torch.arange(2))
        assert y.dtype == dtype
        assert loss.dtype == torch.float32
        found.append((y.double(), loss, layer.statistics.load.clone(), layer.statistics.gate_sum.clone()))
    (y, loss, load, gates), (y_bf16, loss_bf16, load_bf16, gates_bf16) = found
    assert (y_bf16 - y).norm() / y.norm() < 2e-2
    assert torch.equal(load, load_bf16)
    torch.testing.assert_close(loss_bf16, loss)
    torch.testing.assert_close(gates_bf16, gates, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["plain", "XL"])
def test_initial_values_and_parameter_counts(name: str) -> None:
    """s = sqrt(2 / L) = 1: 1 / sqrt(d), and 1 / sqrt(k h) for the output experts."""
    shape = SHAPES[name]._replace(d=240, h=36)
    config = model_config(shape)
    layer = MoAAttention(config, parallel=ParallelContext(), backends=Backends(), name="blocks.0.attention", seed=0)
    holder = torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([torch.nn.ModuleDict({"attention": layer})])})
    initialize(holder, config, ParallelContext(), seed=0)
    expected_std = {"output_experts": (3 * 36) ** -0.5}
    for parameter_name, parameter in layer.named_parameters():
        if parameter_name == "scale":
            assert parameter.tolist() == pytest.approx([36**-0.5])
            continue
        std = expected_std.get(parameter_name, 240**-0.5)
        assert parameter.std().item() == pytest.approx(std, rel=0.05), parameter_name
    count = count_parameters(build_on_meta(config), config)
    # Two layers, two projections, of which 3 of 5 experts are active.
    assert count.total - count.active == 2 * 2 * (5 - 3) * 240 * 36
