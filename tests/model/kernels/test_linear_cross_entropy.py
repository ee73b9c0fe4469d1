"""linear_cross_entropy against sums written out in fp64, forward and every gradient; chunks; vocabulary shards."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from model.kernels import backend as kernel_backend
from model.kernels.cpu.linear_cross_entropy import shard_gradient, shard_statistics
from model.kernels.ops import linear_cross_entropy as module
from model.kernels.ops.linear_cross_entropy import linear_cross_entropy
from tests.model.kernels.checks import assert_compiles, assert_repeats, error, flops, stored_in_reverse


class Shape(NamedTuple):
    N: int
    d: int
    V: int
    bias: bool = True
    ignored: float = 0.2
    chunk: int = 1 << 20
    """Tokens in a chunk, by way of CHUNK_BYTES."""
    scale: float = 1.0
    """Of the hidden states: at 200 most probabilities are 0 or 1 in fp32."""


SHAPES = {
    "plain": Shape(N=20, d=16, V=50),
    "no bias, odd sizes": Shape(N=13, d=7, V=31, bias=False),
    "chunks of 4, the last one short": Shape(N=18, d=8, V=40, chunk=4),
    "chunks of 1": Shape(N=5, d=8, V=40, chunk=0),
    "extreme logits": Shape(N=12, d=16, V=50, scale=200.0),
    "nothing ignored": Shape(N=12, d=8, V=20, ignored=0.0),
    "all ignored": Shape(N=12, d=8, V=20, ignored=1.0, chunk=5),
    "one class": Shape(N=6, d=4, V=1),
    "one token": Shape(N=1, d=4, V=10, ignored=0.0),
    "empty": Shape(N=0, d=4, V=10),
}
BACKENDS = kernel_backend.BACKENDS["linear_cross_entropy"]
NATIVE = tuple(backend for backend in BACKENDS if backend != "triton")
"""Those that take fp64 and whose whole table is here; the interpreted kernels have one of their own in triton/."""
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2**-8}  # bf16: only the gradients are rounded
UPSTREAM = 0.37


class Case(NamedTuple):
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor


def make_case(shape: Shape, dtype: torch.dtype, ignore_index: int = -100) -> Case:
    generator = torch.Generator().manual_seed(shape.N + shape.V)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, dtype=torch.float64, generator=generator)

    hidden = (normal(shape.N, shape.d) * shape.scale).to(dtype).requires_grad_()
    weight = (normal(shape.V, shape.d) / shape.d**0.5).to(dtype).requires_grad_()
    bias = normal(shape.V).to(dtype).requires_grad_() if shape.bias else None
    targets = torch.randint(0, shape.V, (shape.N,), generator=generator)
    targets[torch.rand(shape.N, generator=generator) < shape.ignored] = ignore_index
    return Case(hidden, weight, bias, targets)


def leaves(case: Case) -> list[Tensor]:
    return [t for t in case[:3] if t is not None]


def oracle(case: Case, ignore_index: int = -100) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Loss, token losses and gradients in fp64 from the equations, token by token."""
    hidden, weight = case.hidden.detach().double(), case.weight.detach().double()
    bias = torch.zeros(weight.shape[0], dtype=torch.float64) if case.bias is None else case.bias.detach().double()
    targets = case.targets.tolist()
    count = max(1, sum(t != ignore_index for t in targets))
    token_loss = torch.zeros(len(targets), dtype=torch.float64)
    grads = [torch.zeros_like(hidden), torch.zeros_like(weight), torch.zeros_like(bias)]
    for n, target in enumerate(targets):
        if target == ignore_index:
            continue
        logits = weight @ hidden[n] + bias
        top = logits.max()
        log_sum = top + torch.log(torch.exp(logits - top).sum())
        token_loss[n] = log_sum - logits[target]
        delta = torch.exp(logits - log_sum)
        delta[target] = torch.expm1(logits[target] - log_sum)  # p - 1 without cancellation
        delta = delta / count * UPSTREAM
        grads[0][n] = delta @ weight
        grads[1] += torch.outer(delta, hidden[n])
        grads[2] += delta
    return token_loss.sum() / count, token_loss, grads if case.bias is not None else grads[:2]


def set_chunk(monkeypatch: pytest.MonkeyPatch, shape: Shape, dtype: torch.dtype) -> None:
    size = torch.promote_types(dtype, torch.float32).itemsize
    monkeypatch.setattr(module, "CHUNK_BYTES", shape.chunk * shape.V * size)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("name", SHAPES)
def test_equals_oracle(name: str, backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    set_chunk(monkeypatch, SHAPES[name], dtype)
    case = make_case(SHAPES[name], dtype)
    loss, token_loss = linear_cross_entropy(*case, backend=backend)
    assert loss.dtype == token_loss.dtype == torch.promote_types(dtype, torch.float32)
    assert not token_loss.requires_grad
    grads = torch.autograd.grad(loss * UPSTREAM, leaves(case))
    expected_loss, expected_token_loss, expected_grads = oracle(case)
    assert error(loss.detach(), expected_loss) <= min(TOLERANCE[dtype], 1e-6)
    assert error(token_loss, expected_token_loss) <= min(TOLERANCE[dtype], 1e-6)
    assert (token_loss[case.targets == -100] == 0).all()
    for what, actual, expected in zip(("hidden", "weight", "bias"), grads, expected_grads, strict=False):
        assert actual.dtype == dtype
        assert error(actual, expected) <= TOLERANCE[dtype], what


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_ignored_is_zero(backend: str) -> None:
    case = make_case(SHAPES["all ignored"], torch.float32)
    loss, _ = linear_cross_entropy(*case, backend=backend)
    assert loss.item() == 0.0
    for grad in torch.autograd.grad(loss, leaves(case)):
        assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("ignore_index", [-1, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_other_ignore_index(backend: str, ignore_index: int) -> None:
    case = make_case(SHAPES["plain"], torch.float32, ignore_index)
    loss, _ = linear_cross_entropy(*case, ignore_index=ignore_index, backend=backend)
    assert error(loss.detach(), oracle(case, ignore_index)[0]) <= 1e-6


@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False, False, True), (False,) * 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_only_needed_gradients(backend: str, needed: tuple[bool, ...]) -> None:
    case = make_case(SHAPES["plain"], torch.float32)
    for tensor, need in zip(leaves(case), needed, strict=True):
        tensor.requires_grad_(need)
    loss, _ = linear_cross_entropy(*case, backend=backend)
    assert loss.requires_grad == any(needed)
    if any(needed):
        (loss * UPSTREAM).backward()
    for tensor, need, expected in zip(leaves(case), needed, oracle(case)[2], strict=True):
        assert (tensor.grad is not None) == need
        if tensor.grad is not None:
            assert error(tensor.grad, expected) <= 2e-6


def test_no_gradient_work_without_grad() -> None:
    N, d, V = SHAPES["plain"][:3]
    case = make_case(SHAPES["plain"], torch.float32)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        loss, _ = linear_cross_entropy(*case, backend="cpu")
    assert not loss.requires_grad
    assert counter.get_total_flops() == 2 * N * d * V


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(backend: str) -> None:
    """Non-contiguous hidden states and weight, and a loss whose gradient is expanded from a mean."""
    case = make_case(SHAPES["plain"], torch.float32)
    strided = case._replace(
        hidden=stored_in_reverse(case.hidden),
        weight=stored_in_reverse(case.weight),
        targets=case.targets.repeat_interleave(2)[::2],
    )
    loss, _ = linear_cross_entropy(*strided, backend=backend)
    grads = torch.autograd.grad((loss.expand(4) * UPSTREAM).mean(), leaves(strided))
    for actual, expected in zip(grads, oracle(case)[2], strict=True):
        assert error(actual, expected) <= 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeats_bit_for_bit(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape(N=100, d=32, V=301, chunk=32)
    set_chunk(monkeypatch, shape, torch.float32)
    case = make_case(shape, torch.float32)

    def run() -> list[Tensor]:
        loss, token_loss = linear_cross_entropy(*case, backend=backend)
        return [loss, token_loss, *torch.autograd.grad(loss, leaves(case))]

    assert_repeats(run, times=3)


def test_backward_twice() -> None:
    """The gradients of the forward pass are scaled out of place: a retained graph gives them again."""
    case = make_case(SHAPES["plain"], torch.float32)
    loss, _ = linear_cross_entropy(*case, backend="cpu")
    first = torch.autograd.grad(loss * 2, leaves(case), retain_graph=True)
    second = torch.autograd.grad(loss * 2, leaves(case))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_shards_of_the_vocabulary_combine() -> None:
    """Two shards, a maximum and one sum of two numbers per token between them: the same loss and gradient."""
    case = make_case(Shape(N=20, d=16, V=50, bias=False, ignored=0.0), torch.float64)
    full = case.hidden.detach() @ case.weight.detach().t()
    log_probability = full.log_softmax(1)
    shards = [full[:, :17].clone(), full[:, 17:].clone()]
    first_classes = (0, 17)
    statistics = [shard_statistics(s, case.targets, first_class=f) for s, f in zip(shards, first_classes, strict=True)]
    maximum = torch.maximum(statistics[0][0], statistics[1][0])  # all-reduce, max
    corrections = [(local - maximum).exp() for local, _, _ in statistics]
    exp_sum = sum(c * s for c, (_, s, _) in zip(corrections, statistics, strict=True))  # all-reduce, sum
    target_logit = sum(t for _, _, t in statistics)  # in the same all-reduce
    assert isinstance(exp_sum, Tensor)
    loss = exp_sum.log() + maximum - target_logit
    torch.testing.assert_close(loss, -log_probability.gather(1, case.targets[:, None])[:, 0])
    gradient = []
    for shard, f, correction in zip(shards, first_classes, corrections, strict=True):
        scale = shard_gradient(shard, case.targets, exp_sum / correction, first_class=f)
        gradient.append(shard * scale[:, None])
    expected = log_probability.exp()
    expected[torch.arange(20), case.targets] -= 1
    torch.testing.assert_close(torch.cat(gradient, 1), expected)


@pytest.mark.parametrize("backend", NATIVE)
def test_gradcheck(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape(N=5, d=4, V=7, chunk=2)
    set_chunk(monkeypatch, shape, torch.float64)
    case = make_case(shape, torch.float64)
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_cross_entropy(h, w, b, case.targets, backend=backend)[0], tuple(leaves(case))
    )


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("needed", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("bias", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_opcheck(bias: bool, needed: bool, backend: str) -> None:
    case = make_case(Shape(N=20, d=16, V=50, bias=bias), torch.bfloat16)
    for tensor in leaves(case):
        tensor.requires_grad_(needed)
    arguments = (*case, -100, needed, needed, "", 0, backend)
    torch.library.opcheck(torch.ops.switchall.linear_cross_entropy.default, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_graph_breaks(backend: str) -> None:
    case = make_case(SHAPES["plain"], torch.float32)
    assert case.bias is not None

    def function(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        loss, token_loss = linear_cross_entropy(hidden * 2, weight, bias, case.targets, backend=backend)
        return loss * 3 + token_loss.max()

    assert_compiles(function, (case.hidden, case.weight, case.bias))


@pytest.mark.parametrize("backend", BACKENDS)
def test_meta_tensors(backend: str) -> None:
    case = make_case(SHAPES["plain"], torch.bfloat16)
    hidden, weight, bias = (t.detach().to("meta").requires_grad_() for t in leaves(case))
    loss, token_loss = linear_cross_entropy(hidden, weight, bias, case.targets.to("meta"), backend=backend)
    assert (loss.shape, token_loss.shape, loss.dtype) == ((), (20,), torch.float32)
    loss.backward()
    assert weight.grad is not None
    assert weight.grad.shape == weight.shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_flop_counter(backend: str) -> None:
    """Three products of N d V multiply-adds; the op does all of them in the forward pass, plain operators one."""
    N, d, V = SHAPES["plain"][:3]
    case = make_case(SHAPES["plain"], torch.float32)
    product = 2 * N * d * V
    expected = (product, 2 * product) if backend == "reference" else (3 * product, 0)
    assert flops(lambda: linear_cross_entropy(*case, backend=backend)[0]) == expected


def test_loss_of_uniform_logits() -> None:
    loss, _ = linear_cross_entropy(torch.zeros(3, 4), torch.ones(8, 4), None, torch.tensor([0, 7, 3]), backend="cpu")
    assert loss.item() == pytest.approx(math.log(8), rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_small_gradients_of_fp16_live_until_the_loss_is_scaled(backend: str) -> None:
    """As of 16384 tokens: gradients below fp16's smallest normal number, 6e-5, and a scale above its largest."""
    case = make_case(Shape(N=16, d=8, V=20), torch.float16)
    hidden, weight, bias = [t.detach() * 2**-12 for t in leaves(case)]
    case = Case(hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), case.targets)
    scale = 2.0**17
    loss, _ = linear_cross_entropy(*case, backend=backend)
    grads = torch.autograd.grad(loss * scale, leaves(case))
    for what, actual, expected in zip(("hidden", "weight", "bias"), grads, oracle(case)[2], strict=True):
        assert actual.dtype == torch.float16
        assert error(actual, expected * (scale / UPSTREAM)) <= 2**-10, what
