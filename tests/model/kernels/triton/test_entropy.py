"""The kernels of the entropy regulariser, interpreted in small tiles, with every access checked: launches, bytes, no
races, no atomics, the same bits again, the probability of the moment."""

from __future__ import annotations

import pytest
import torch

from benchmarks.kernel_cases.recording import Launch, recording
from model.kernels.ops.elementwise import entropy
from model.kernels.triton import entropy as kernels
from tests.model.kernels.test_entropy import WEIGHT, check, exact, found, inputs

KERNELS = ["probability_kernel", "entropy_kernel", "entropy_backward_kernel"]


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """4 tokens of 8 experts; 3 programs, whose sums are added up two at a time."""
    monkeypatch.setattr(kernels, "TILE", 32)
    monkeypatch.setattr(kernels, "SUM_TILE", 16)
    monkeypatch.setattr(kernels, "PROGRAMS", 3)


@pytest.mark.parametrize("N, E", [(37, 5), (48, 8), (1, 5), (5, 21), (13, 2), (9, 64), (9, 1)])
def test_several_programs_of_several_tiles_equal_fp64(N: int, E: int) -> None:
    """Within bounds, without races and atomics: two launches forward, one backward."""
    t = inputs(N, E)
    with recording() as launches:
        actual = found(*t, "triton")
    check(actual, exact(*t))
    assert [launch.kernel for launch in launches] == KERNELS
    assert not any(launch.atomics for launch in launches)


def test_the_shape_alone_decides_who_sums_what() -> None:
    for N in range(1, 60):
        num_parts, num_tiles = kernels.tokens_each(N, 4)
        assert 1 <= num_parts <= 3
        assert (num_parts - 1) * num_tiles * 4 < N <= num_parts * num_tiles * 4, "every program has a token"


def test_no_tokens_launch_nothing() -> None:
    with recording() as launches:
        found(*inputs(0, 5), "triton")
    assert launches == []


def test_repetition_gives_the_same_bits() -> None:
    t = inputs(37, 21)
    first, again = found(*t, "triton"), found(*t, "triton")
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_bytes_a_logit() -> None:
    """4 forward, 8 backward; the probabilities and the programs' sums besides."""
    N, E = 37, 8
    with recording() as launches:
        found(*inputs(N, E), "triton")
    forward, sums, backward = launches
    assert of(forward, "logits_ptr") == of(backward, "logits_ptr") == of(backward, "grad_logits_ptr") == 4 * N * E
    parts = 8 * E * kernels.tokens_each(N, 4)[0]
    assert of(forward, "parts_ptr") == of(sums, "parts_ptr") == parts
    assert of(sums, "probability_ptr") == of(sums, "sum_ptr") == 8 * E and of(sums, "value_ptr") == 4


def of(launch: Launch, tensor: str) -> int:
    return launch.tensors[tensor].requested_bytes


def test_strided_logits_and_gradients_are_taken() -> None:
    """Every second column, and a gradient of the value that autograd expanded."""
    logits, probability = inputs(13, 5)
    wide = torch.stack([logits, logits], -1)[..., 0].requires_grad_()
    assert not wide.is_contiguous()
    value, _ = entropy(wide, probability, WEIGHT, backend="triton")
    (grad,) = torch.autograd.grad(value.expand(3).sum(), wide)
    torch.testing.assert_close(grad.double(), exact(logits, probability, 3.0).grad_logits, rtol=1e-5, atol=1e-7)


def test_the_probability_is_read_when_the_kernel_runs() -> None:
    """From the router's own tensor, a row of the table of all routers: what a CUDA graph replays."""
    table = torch.full((2, 5), 0.2, dtype=torch.float64)
    logits, probability = inputs(13, 5)
    before = found(logits, table[1], "triton")
    table[1] = probability
    with recording() as launches:
        after = found(logits, table[1], "triton")
    check(after, exact(logits, probability))
    assert not torch.equal(before.value, after.value)
    assert all(of(launch, "probability_ptr") for launch in launches[1:])


def test_a_probability_that_changes_before_the_backward_pass_is_refused() -> None:
    logits, probability = inputs(13, 5)
    value, _ = entropy(logits.requires_grad_(), probability, WEIGHT, backend="triton")
    probability.fill_(0.2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()
