"""The kernels of causal_attention, interpreted in small tiles, with every access checked: the oracle's values and
gradients, no races, no atomics, the same bits again; tiles that no query of a tile sees are not read; no copies."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.kernel_cases.recording import recording
from model.documents import Documents
from model.kernels.ops.causal_attention import Inputs, causal_attention
from model.kernels.triton import causal_attention as kernels
from model.recompute import Recompute, recomputed
from tests.model.kernels.checks import assert_compiles
from tests.model.kernels.test_causal_attention import NAMES, SHAPES, Shape, check, make_inputs, run, upstream

READABLE = kernels._readable
BACKWARD = ["query_gradient_kernel", "key_gradient_kernel"]
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered|All-NaN slice:RuntimeWarning")
"""numpy's, of the interpreter: what a mask leaves out is computed too."""


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of as many keys as queries, and of other numbers."""
    tiles = {"forward": (16, 32, 4, 1), "queries": (16, 16, 4, 1)}
    both, apart = {"k and v": (16, 32, 4, 1)}, {"k": (16, 16, 4, 1), "v": (16, 32, 4, 1)}
    monkeypatch.setattr(kernels, "TILES", {16: tiles | both, 32: tiles | apart})


@pytest.mark.parametrize("name", SHAPES)
def test_values_and_gradients_again_to_the_last_bit(name: str) -> None:
    shape = SHAPES[name]
    with recording() as launches:
        once = check(shape, torch.float32, "triton")
    apart = BACKWARD[-1:] * (shape.h > 16)
    assert [launch.kernel for launch in launches] == ["forward_kernel", *BACKWARD, *apart]
    assert not any(launch.atomics for launch in launches)
    again = run(make_inputs(shape, torch.float32), "triton")
    assert all(torch.equal(value, again[what]) for what, value in once.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    check(SHAPES["documents cross tiles, width 11"], dtype, "triton")


def test_a_query_may_begin_inside_the_memory() -> None:
    """Of the op alone: a model's documents have no memory."""
    shape = Shape(T=40, h=8, M=24, B=1)
    first = torch.tensor([[0] * 7 + [20] * 20 + [30] * 5 + [63] * 8], dtype=torch.int32)
    first[0, -8:] = torch.arange(56, 64)
    end = (first[:, :, None] <= torch.arange(64)).sum(1).int()
    inputs = make_inputs(shape, torch.float32)._replace(first=first, end=end)
    expected = run(inputs, "reference")
    for what, actual in run(inputs, "triton").items():
        torch.testing.assert_close(actual, expected[what], rtol=1e-5, atol=1e-5)


def test_tiles_of_other_documents_are_not_read() -> None:
    """The first of three documents is NaN, and so is the last: a product with either would be, also with the weight 0.
    They end where tiles end."""
    index = torch.repeat_interleave(torch.arange(3), 32)[None]
    inputs = make_inputs(Shape(T=96, h=8, B=1), torch.float32)
    documents, middle = Documents.of(index), slice(32, 64)

    def broken(t: Tensor) -> Tensor:
        values = torch.full_like(t, torch.nan)
        values[:, :, middle] = t.detach()[:, :, middle]
        return values.requires_grad_()

    q, k, v = broken(inputs.q), broken(inputs.k), broken(inputs.v)
    found = run(Inputs(q, k, v, documents.first, documents.end), "triton")
    alone = Inputs(*(t.detach()[:, :, middle].requires_grad_() for t in inputs[:3]))
    out = causal_attention(alone, backend="reference")
    grads = torch.autograd.grad(out, alone[:3], upstream(inputs)[:, :, middle])
    for what, wanted in zip(("out", *NAMES), (out, *grads), strict=True):
        torch.testing.assert_close(found[what][:, :, middle], wanted, rtol=1e-5, atol=1e-5)
        assert found[what][:, :, :32].isnan().all() and found[what][:, :, 64:].isnan().all()


def test_short_documents_read_and_multiply_less() -> None:
    """Of 96 tokens in tiles of 16 and 32: one document takes all tiles below the diagonal, six take those on it."""
    counts = []
    for lengths in ((96,), (16,) * 6):
        inputs = make_inputs(Shape(T=96, h=8, lengths=(lengths,), B=1, H=1, K=1), torch.float32)
        with recording() as launches:
            run(inputs, "triton")
        counts.append([launch.dot_flops for launch in launches])
    per_tile = 2 * 16 * 32 * 16
    forward = 2 * per_tile
    assert counts[0][0] == 12 * forward and counts[1][0] == 6 * forward  # tiles of 32 keys: 1 1 2 2 3 3, and 1 each
    assert counts[0][1] == 21 * 3 * per_tile // 2 and counts[1][1] == 6 * 3 * per_tile // 2
    assert counts[0][2] == 12 * 4 * per_tile and counts[1][2] == 6 * 4 * per_tile  # tiles of 32 keys, 16 queries


LAYOUTS = ["tokens before heads", "heads before tokens", "joint", "odd", "expanded gradient", "ranges by tokens"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_are_read_where_they_stand(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`odd` rows are no whole 16 bytes, which alone are copied."""
    h = 12 if layout == "odd" else 8
    shape = Shape(T=19, h=h, lengths=((19,), (4, 15)))
    inputs = make_inputs(shape, torch.float32)
    q, k, v = inputs[:3]
    if layout == "heads before tokens":
        q, k, v = (t.detach().contiguous().requires_grad_() for t in (q, k, v))
    if layout == "joint":
        joint = torch.cat([t.detach().transpose(1, 2) for t in (q, k, v)], 2).requires_grad_()
        q, k, v = (t.transpose(1, 2) for t in joint.split(2, dim=2))
    ranges = [t if layout != "ranges by tokens" or t is None else t.t().contiguous().t() for t in inputs[3:]]
    copied: list[bool] = []

    def readable(t: Tensor) -> Tensor:
        found = READABLE(t)
        copied.append(found is not t)
        return found

    monkeypatch.setattr(kernels, "_readable", readable)
    out = causal_attention(Inputs(q, k, v, *ranges), backend="triton")
    given = torch.ones(()).expand(out.shape) if layout == "expanded gradient" else upstream(inputs)
    grads = torch.autograd.grad(out, (q, k, v), given)
    of_gradient = layout == "expanded gradient"
    assert copied == ([True] * 8 if layout == "odd" else [False] * 6 + [of_gradient, False])
    expected = causal_attention(inputs, backend="reference")
    wanted = torch.autograd.grad(expected, inputs[:3], given)
    for actual, reference in zip((out, *grads), (expected, *wanted), strict=True):
        torch.testing.assert_close(actual, reference, rtol=1e-5, atol=1e-5)
        assert actual.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_selective_recomputation_keeps_the_result(mode: Recompute) -> None:
    inputs = make_inputs(SHAPES["one document"], torch.float32)
    with recording() as launches:
        out = recomputed(lambda x: causal_attention(x, backend="triton"), inputs, mode=mode, recorders=())
        torch.autograd.grad(out, inputs[:3], upstream(inputs))
    forward = ["forward_kernel"] * (1 if mode == "selective" else 2)
    assert [launch.kernel for launch in launches] == [*forward, *BACKWARD]


def test_a_compiled_function_calls_the_op_without_a_break() -> None:
    """And its results stand in memory as the op promises."""
    inputs = make_inputs(SHAPES["shared keys"], torch.float32)

    def attended(q: Tensor, k: Tensor, v: Tensor, first: Tensor, end: Tensor) -> Tensor:
        out = causal_attention(Inputs(2 * q, k, v, first, end), backend="triton")
        return out.transpose(1, 2).flatten(2) + 1

    assert inputs.first is not None and inputs.end is not None
    ranges = inputs.first, inputs.end
    assert_compiles(lambda q, k, v: attended(q, k, v, *ranges).sum(), inputs[:3])


def test_no_sequences_are_no_launch() -> None:
    inputs = make_inputs(Shape(T=5, h=8, B=0), torch.float32)
    with recording() as launches:
        assert run(inputs, "triton")["k"].shape == (0, 2, 5, 8)
    assert not launches


def test_what_the_kernels_cannot_take_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at most 256 columns here, not 264: set kernels\.backend=reference"):
        run(make_inputs(Shape(T=2, M=1, h=264), torch.float32), "triton")
