"""The entropy regulariser of a router, and the sums of its probabilities, by every backend: against fp64, and the plain
backends against the operators that they always were, bit for bit."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from model.config import SigmaMoEConfig
from model.feedforward.sigma_moe import SigmaMoE
from model.kernels import backend as kernel_backend
from model.kernels.choice import Backends
from model.kernels.ops.elementwise import entropy
from model.parallel.context import ParallelContext
from model.recompute import recomputed
from model.routing import RoutingStatistics, entropy_regularizer
from tests.model.test_sigma_moe import build

BACKENDS = kernel_backend.BACKENDS["elementwise"]
PLAIN = tuple(name for name in BACKENDS if name != "triton")
SHAPES = [(37, 5), (64, 16), (203, 21), (1, 8), (1, 1), (6, 1), (300, 64)]
WEIGHT = 0.3


class Found(NamedTuple):
    """What a backend computes, with the gradient for that of the value."""

    value: Tensor
    probability_sum: Tensor
    grad_logits: Tensor


def inputs(N: int, E: int) -> tuple[Tensor, Tensor]:
    """Logits, and probabilities of which the first is 0."""
    generator = torch.Generator().manual_seed(N + E)
    probability = torch.rand(E, dtype=torch.float64, generator=generator)
    probability[0] = 0.0
    return 3 * torch.randn(N, E, generator=generator), probability / probability.sum().clamp_min(1e-9)


def found(logits: Tensor, probability: Tensor, backend: str, upstream: float = 0.7) -> Found:
    logits = logits.detach().requires_grad_()
    value, probability_sum = entropy(logits, probability, WEIGHT, backend=backend)
    (grad,) = torch.autograd.grad(value, logits, torch.tensor(upstream, dtype=value.dtype))
    return Found(value.detach(), probability_sum, grad)


def exact(logits: Tensor, probability: Tensor, upstream: float = 0.7) -> Found:
    """In fp64, the gradient of the softmax by hand."""
    share = logits.double().softmax(-1)
    logs = probability.clamp_min(1e-30).log()
    value = WEIGHT * (share.mean(0) * logs).sum()
    towards = logs - (share * logs).sum(-1, keepdim=True)
    return Found(value, share.sum(0), upstream * WEIGHT / logits.shape[0] * share * towards)


def check(actual: Found, expected: Found) -> None:
    assert actual.value.dtype == actual.grad_logits.dtype == torch.float32
    assert actual.probability_sum.dtype == torch.float64 and not actual.probability_sum.requires_grad
    torch.testing.assert_close(actual.value.double(), expected.value, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(actual.probability_sum, expected.probability_sum, rtol=1e-6, atol=1e-7)
    scale = float(expected.grad_logits.abs().max())
    torch.testing.assert_close(actual.grad_logits.double(), expected.grad_logits, rtol=1e-5, atol=1e-6 * scale)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_sums_and_gradient_equal_fp64(shape: tuple[int, int], backend: str) -> None:
    t = inputs(*shape)
    check(found(*t, backend), exact(*t))


@pytest.mark.parametrize("backend", PLAIN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_plain_backends_compute_what_they_always_did(backend: str, dtype: torch.dtype) -> None:
    """Bit for bit the operators that stood in the regulariser and in the statistics."""
    logits, probability = inputs(203, 21)
    leaf = logits.to(dtype).requires_grad_()
    log_share = leaf.log_softmax(-1)
    coefficient = probability.float().clamp_min(1e-30).log()
    value = WEIGHT * (coefficient * log_share.exp().mean(0)).sum()
    (grad,) = torch.autograd.grad(value, leaf, torch.tensor(0.7, dtype=dtype))
    actual = found(logits.to(dtype), probability, backend)
    assert actual.value.dtype == dtype and torch.equal(actual.value, value.detach())
    assert torch.equal(actual.probability_sum, leaf.detach().softmax(-1).sum(0, dtype=torch.float64))
    assert torch.equal(actual.grad_logits, grad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_mean_of_no_tokens_is_not_a_number_and_their_sum_is_zero(backend: str) -> None:
    actual = found(*inputs(0, 5), backend)
    assert actual.value.isnan() and actual.grad_logits.shape == (0, 5)
    assert torch.equal(actual.probability_sum, torch.zeros(5, dtype=torch.float64))


@pytest.mark.parametrize("backend", BACKENDS)
def test_probabilities_that_underflow_leave_everything_finite(backend: str) -> None:
    """Of the step before, also below the smallest number of fp32, and of this one; and powers of e that overflow."""
    logits = torch.tensor([[0.0, 0.0, -200.0, 1.0], [1.0, 0.0, -150.0, 2.0], [100.0, 99.0, -60.0, 101.0]])
    probability = torch.tensor([0.5, 0.0, 1e-300, 1e-40], dtype=torch.float64)
    actual = found(logits, probability, backend)
    assert all(t.isfinite().all() for t in actual)
    assert float(actual.grad_logits[:, 2].abs().max()) == 0.0
    check(actual, exact(logits, probability))


@pytest.mark.parametrize("place", [0, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_a_number_reaches_the_value(backend: str, place: int) -> None:
    """From logits, and from the probability of the step before."""
    logits, probability = inputs(9, 5)
    spoilt = probability.clone()
    spoilt[place] = torch.nan
    assert found(logits, spoilt, backend).value.isnan()
    logits[place, place] = torch.nan
    actual = found(logits, probability, backend)
    assert actual.value.isnan() and actual.probability_sum.isnan().all() and actual.grad_logits[place].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_value_needs_no_gradient_and_the_sums_have_none(backend: str) -> None:
    logits, probability = inputs(9, 5)
    value, _ = entropy(logits, probability, WEIGHT, backend=backend)
    assert value.grad_fn is None
    leaf = logits.requires_grad_()
    value, probability_sum = entropy(leaf, probability, WEIGHT, backend=backend)
    assert value.requires_grad and probability_sum.grad_fn is None and not probability_sum.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_compiler_takes_it_whole(backend: str) -> None:
    logits, probability = inputs(37, 5)

    def function(logits: Tensor) -> tuple[Tensor, Tensor]:
        value, probability_sum = entropy(logits * 2, probability, WEIGHT, backend=backend)
        return value + 1, probability_sum

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    leaf = logits.requires_grad_()
    for actual, expected in zip(compiled(leaf), function(leaf), strict=True):
        assert torch.equal(actual, expected)
    (actual,), (expected,) = (torch.autograd.grad(f(leaf)[0], leaf) for f in (compiled, function))
    assert torch.equal(actual, expected)


# ----------------------------------------------------------------------------------------------------------- the layer


def layer_of(backend: str) -> SigmaMoE:
    """Of 6 experts, with expert dropout, at probabilities of an earlier step."""
    layer = build(8, 6, 5, 2, 0.3, gamma=0.4, scope="global_batch")
    layer.backends = Backends(elementwise=backend)
    layer.statistics.probability.copy_(torch.tensor([0.0, 0.1, 0.1, 0.2, 0.2, 0.4], dtype=torch.float64))
    return layer


def trained(layer: SigmaMoE, mode: str = "none") -> dict[str, Tensor]:
    """Output, regulariser, gradients and counts of two micro-steps, and the new mean."""
    results: dict[str, Tensor] = {}
    for number in range(2):
        x = torch.randn(3, 7, 8, generator=torch.Generator().manual_seed(number)).requires_grad_()

        def function(x: Tensor, number: int = number) -> tuple[Tensor, Tensor]:
            return layer(x, torch.arange(3) + 3 * number)

        y, auxiliary_loss = recomputed(function, x, mode=mode, recorders=[layer.statistics])  # type: ignore[arg-type]
        (y.square().sum() + 2 * auxiliary_loss).backward()
        assert x.grad is not None
        results |= {f"y {number}": y.detach(), f"value {number}": auxiliary_loss.detach(), f"x {number}": x.grad}
    counts = layer.statistics
    sums = {"load": counts.load, "tokens": counts.num_tokens, "probability_sum": counts.probability_sum}
    results |= {name: value.clone() for name, value in sums.items()}
    counts.finish_step()
    gradients = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return results | gradients | {"probability": counts.probability.clone()}


def test_a_layer_by_the_kernels_trains_and_counts_as_by_plain_operators() -> None:
    actual, expected = trained(layer_of("triton")), trained(layer_of("reference"))
    assert actual.keys() == expected.keys() and len(actual) == 13
    assert float(expected["value 0"]) != 0.0
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_repeated_forward_pass_counts_nothing_and_gives_the_same_bits(backend: str, mode: str) -> None:
    kept, again = trained(layer_of(backend)), trained(layer_of(backend), mode)
    assert float(kept["tokens"]) == 2 * 21
    for name, value in kept.items():
        assert torch.equal(again[name], value), name


class OpCalls(TorchDispatchMode):
    """How often each of our ops is called."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "switchall":
            self.found.append(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode, times", [("none", 2), ("selective", 2), ("full", 4)])
def test_selective_recomputation_keeps_what_the_op_gave(mode: str, times: int) -> None:
    with OpCalls() as calls:
        trained(layer_of("triton"), mode)
    assert calls.found.count("entropy") == times and calls.found.count("entropy_backward") == 2


def test_the_sums_that_the_op_gives_are_those_that_are_recorded() -> None:
    config = SigmaMoEConfig(num_experts=5, active_experts=2, entropy_weight=WEIGHT)
    logits, load = inputs(37, 5)[0], torch.ones(5, dtype=torch.int64)
    by_op, by_record = (RoutingStatistics((5,), tracks_probability=True) for _ in range(2))
    for backend in BACKENDS:
        _, sums = entropy_regularizer(logits, config, by_op, ParallelContext(), backend=backend)
        assert sums is not None
        by_op.record(load, logits, probability=sums)
        by_record.record(load, logits)
    assert torch.equal(by_op.num_tokens, by_record.num_tokens)
    torch.testing.assert_close(by_op.probability_sum, by_record.probability_sum, rtol=1e-6, atol=0)


def test_other_scopes_leave_the_sums_to_the_statistics() -> None:
    config = SigmaMoEConfig(num_experts=5, active_experts=2, entropy_weight=WEIGHT, entropy_scope="micro_batch")
    statistics = RoutingStatistics((5,), tracks_probability=True)
    logits = inputs(37, 5)[0]
    with OpCalls() as calls:
        value, sums = entropy_regularizer(logits, config, statistics, ParallelContext(), backend="triton")
    assert sums is None and calls.found == []
    p = logits.double().softmax(-1).mean(0)
    torch.testing.assert_close(value.double(), WEIGHT * (p * p.log()).sum(), rtol=1e-5, atol=1e-6)
