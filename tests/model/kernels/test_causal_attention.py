"""causal_attention against a sum over keys in fp64 that is written with indices: the value and every gradient."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.documents import Documents
from model.kernels.backend import resolve
from model.kernels.ops.causal_attention import Inputs, causal_attention, memory_efficient_attention
from tests.model.kernels.checks import flops

NAMES = ("q", "k", "v")


class Shape(NamedTuple):
    """K heads of keys and values; M tokens of memory before the T of the chunk."""

    T: int
    h: int
    lengths: tuple[tuple[int, ...], ...] = ()
    """Of the documents of each sequence; none: queries see all from key 0 on."""
    M: int = 0
    B: int = 2
    H: int = 2
    K: int = 2
    scale: float = 1.0


SHAPES = {
    "one document": Shape(T=21, h=8, lengths=((21,), (21,))),
    "documents of one token": Shape(T=18, h=8, lengths=((1,) * 18, (1, 1, 16))),
    "documents cross tiles, width 11": Shape(T=51, h=11, lengths=((3, 25, 23), (20, 1, 1, 29)), H=1, K=1),
    "documents end where tiles end": Shape(T=64, h=16, lengths=((32, 32), (16, 48)), H=1, K=1),
    "shared keys": Shape(T=37, h=20, lengths=((9, 28),), B=1, H=3, K=1),
    "grouped queries": Shape(T=37, h=20, lengths=((9, 28),), B=1, H=6, K=2),
    "memory": Shape(T=17, h=8, M=40),
    "memory, grouped queries": Shape(T=13, h=8, M=9, B=1, H=6, K=3),
    "memory, shared keys, width 20": Shape(T=28, h=20, M=5, K=1),
    "one token, long memory": Shape(T=1, h=8, M=37, B=1),
    "large logits": Shape(T=41, h=8, lengths=((20, 21), (5, 36)), H=1, K=1, scale=9.0),
}
BOUNDS = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Of the largest difference, in units of the largest expected value."""


def document_index(shape: Shape) -> Tensor:
    """[B, T]."""
    return torch.stack([torch.repeat_interleave(torch.arange(len(n)), torch.tensor(n)) for n in shape.lengths])


def make_inputs(shape: Shape, dtype: torch.dtype, seed: int = 0) -> Inputs:
    """As projections leave them, tokens before heads in memory."""
    T, h, lengths, M, B, H, K, scale = shape
    generator = torch.Generator().manual_seed(seed)
    sizes = (B, T, H, h), (B, M + T, K, h), (B, M + T, K, h)
    drawn = [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]
    drawn[0] *= scale
    q, k, v = (t.to(dtype).transpose(1, 2).detach().requires_grad_() for t in drawn)
    documents = Documents.of(document_index(shape)) if lengths else None
    return Inputs(q, k, v, *(() if documents is None else (documents.first, documents.end)))


def upstream(inputs: Inputs) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(inputs.q.shape, generator=generator, dtype=torch.float64).to(inputs.q.dtype)


def oracle(shape: Shape, inputs: Inputs) -> dict[str, Tensor]:
    """The result and every gradient, in fp64; query by query, over the keys of its document alone."""
    q, k, v = (t.detach().double().requires_grad_() for t in inputs[:3])
    index = document_index(shape) if shape.lengths else torch.zeros(shape.B, shape.T)
    rows = []
    for b in range(shape.B):
        for head in range(shape.H):
            for i in range(shape.T):
                before = int((index[b, :i] != index[b, i]).sum())  # tokens of other documents
                seen = slice(before, shape.M + i + 1)
                group = head // (shape.H // shape.K)
                keys, values = k[b, group, seen], v[b, group, seen]
                rows.append(((keys @ q[b, head, i]) / math.sqrt(shape.h)).softmax(0) @ values)
    out = torch.stack(rows).view(q.shape)
    grads = torch.autograd.grad(out, (q, k, v), upstream(inputs).double())
    return {"out": out.detach(), **dict(zip(NAMES, grads, strict=True))}


def run(inputs: Inputs, backend: str) -> dict[str, Tensor]:
    out = causal_attention(inputs, backend=backend)
    grads = torch.autograd.grad(out, inputs[:3], upstream(inputs))
    return {"out": out.detach(), **dict(zip(NAMES, grads, strict=True))}


def check(shape: Shape, dtype: torch.dtype, backend: str) -> dict[str, Tensor]:
    """Against the oracle at the values as they are stored; the results for more checks."""
    inputs = make_inputs(shape, dtype)
    actual, expected = run(inputs, backend), oracle(shape, inputs)
    for what, wanted in expected.items():
        assert actual[what].dtype == dtype and actual[what].shape == wanted.shape, what
        # A single key has the weight 1 and its logit no gradient: both are rounding errors, relative to 1.
        error = (actual[what].double() - wanted).abs().max() / wanted.abs().max().clamp_min(1.0)
        assert error <= BOUNDS[dtype], (what, error)
    return actual


@pytest.mark.parametrize("name", SHAPES)
def test_the_reference_equals_the_oracle(name: str) -> None:
    check(SHAPES[name], torch.float64, "reference")


@pytest.mark.parametrize("name", SHAPES)
def test_the_reference_is_torchs_attention_with_a_mask_to_the_last_bit(name: str) -> None:
    shape = SHAPES[name]
    inputs = make_inputs(shape, torch.float32)
    q, k, v = (t.detach().requires_grad_() for t in inputs[:3])
    mask = torch.ones(shape.T, shape.M + shape.T, dtype=torch.bool).tril(shape.M)
    if shape.lengths:
        index = document_index(shape)
        mask = (index[:, :, None] == index[:, None, :]).tril()[:, None]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=shape.K < shape.H)
    grads = torch.autograd.grad(out, (q, k, v), upstream(inputs))
    for what, wanted in zip(("out", *NAMES), (out, *grads), strict=True):
        assert torch.equal(run(inputs, "reference")[what], wanted), what


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SHAPES)
def test_what_the_memory_efficient_kernel_is_given_equals_the_oracle(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Columns of 0, and keys of each head, change neither the value nor a gradient."""

    def on_cuda(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor, shared: bool) -> Tensor:
        return memory_efficient_attention(q, k, v, mask=mask)

    monkeypatch.setattr("model.kernels.ops.causal_attention.torch_attention", on_cuda)
    check(SHAPES[name], dtype, "reference")


@pytest.mark.parametrize("K", [6, 2, 1])
def test_what_the_memory_efficient_kernel_is_given_is_causal_without_a_mask(K: int) -> None:
    inputs = make_inputs(Shape(T=19, h=11, H=6, K=K), torch.float64)
    q, k, v = (t.detach().requires_grad_() for t in inputs[:3])
    found = memory_efficient_attention(q, k, v, mask=None)
    grads = torch.autograd.grad(found, (q, k, v), upstream(inputs))
    for what, value in zip(("out", *NAMES), (found, *grads), strict=True):
        torch.testing.assert_close(value, run(inputs, "reference")[what], rtol=1e-12, atol=1e-12, msg=what)


def test_the_end_of_a_key_is_the_number_of_queries_that_begin_up_to_it() -> None:
    for shape in SHAPES.values():
        if shape.lengths:
            documents = Documents.of(document_index(shape))
            begun = documents.first[:, :, None] <= torch.arange(shape.T)
            assert torch.equal(documents.end, begun.sum(1)) and documents.first.dtype == torch.int32


def test_flop_counter() -> None:
    """Logits and the weighted sum over all keys; twice as much for the gradients."""
    B, T, L, H, h = 2, 5, 11, 3, 8
    q, k, v = (torch.empty(B, H, n, h, device="meta", requires_grad=True) for n in (T, L, L))
    product = 2 * B * H * T * L * h
    assert flops(lambda: causal_attention(Inputs(q, k, v), backend="triton")) == (2 * product, 4 * product)


def test_auto_takes_triton_on_cuda_where_it_fits_the_registers() -> None:
    def chosen(dtype: torch.dtype, width: int) -> str:
        return resolve("auto", "causal_attention", "cuda", dtype=dtype, widths=(width,))

    assert chosen(torch.bfloat16, 128) == chosen(torch.float16, 41) == "triton"
    assert chosen(torch.bfloat16, 512) == chosen(torch.float32, 64) == "reference"
    assert resolve("auto", "causal_attention", "cpu") == "reference"
    with pytest.raises(ValueError, match=r"heads of at most 256 columns here, not 512\. Possible: auto, reference"):
        resolve("triton", "causal_attention", "cuda", dtype=torch.bfloat16, widths=(512,))
