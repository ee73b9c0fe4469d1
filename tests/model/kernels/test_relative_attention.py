"""relative_attention against a sum over keys in fp64 that is written with indices: the value and every gradient."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from model.kernels import backend
from model.kernels.backend import resolve
from model.kernels.ops.relative_attention import Inputs, relative_attention
from tests.model.kernels.checks import flops


class Shape(NamedTuple):
    """K heads of keys and values and P of position keys; M tokens of memory before the T of the chunk."""

    T: int
    M: int
    h: int
    B: int = 2
    H: int = 2
    K: int = 2
    P: int = 2
    biases: bool = False
    """Whether the two terms have queries of their own."""
    scale: float = 0.4


SHAPES = {
    "no memory": Shape(T=9, M=0, h=8),
    "biases": Shape(T=7, M=12, h=8, biases=True),
    "one token": Shape(T=1, M=0, h=8, B=1, biases=True),
    "one token, long memory": Shape(T=1, M=37, h=8, B=1),
    "longer than a tile, width 11": Shape(T=37, M=25, h=11, B=1, H=1, K=1, P=1, biases=True),
    "tiles are full": Shape(T=32, M=32, h=16, B=1, H=1, K=1, P=1),
    "memory longer than the chunk, shared keys": Shape(T=17, M=40, h=20, B=1, H=2, K=1, P=1),
    "shared position keys": Shape(T=11, M=3, h=8, B=2, H=2, K=2, P=1),
    "grouped queries": Shape(T=13, M=9, h=8, B=2, H=6, K=2, P=2, biases=True),
    "grouped queries, position keys of each head": Shape(T=9, M=4, h=8, B=1, H=6, K=3, P=6),
    "large logits": Shape(T=21, M=10, h=8, B=1, scale=6.0, biases=True),
}
BOUNDS = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Of the largest difference, in units of the largest expected value."""


def make_inputs(shape: Shape, dtype: torch.dtype, seed: int = 0) -> Inputs:
    T, M, h, B, H, K, P, biases, scale = shape
    generator = torch.Generator().manual_seed(seed)
    sizes = [(B, T, H, h), (B, T, H, h), (B, M + T, K, h), (B, M + T, K, h), (M + T, P, h)]
    content, position, *others = (torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)
    content, position = (scale * content).to(dtype).requires_grad_(), (scale * position).to(dtype).requires_grad_()
    return Inputs(content, position if biases else content, *(t.to(dtype).requires_grad_() for t in others))


def leaves(inputs: Inputs) -> dict[str, Tensor]:
    found = inputs._asdict()
    if inputs.position_queries is inputs.content_queries:
        del found["position_queries"]
    return found


def upstream(inputs: Inputs) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    size = inputs.content_queries.shape
    return torch.randn(size, generator=generator, dtype=torch.float64).to(inputs.k.dtype)


def oracle(inputs: Inputs) -> dict[str, Tensor]:
    """The result and every gradient, in fp64; head by head and query by query."""
    wide = {name: t.detach().double().requires_grad_() for name, t in leaves(inputs).items()}
    content, k, v = wide["content_queries"], wide["k"], wide["v"]
    position, position_keys = wide.get("position_queries", content), wide["position_keys"]
    (_, T, H, _), L = content.shape, k.shape[1]
    results = []
    for i in range(T):
        seen = L - T + i + 1
        distances = torch.arange(seen - 1, -1, -1)  # of the keys that query i sees
        heads = []
        for head in range(H):
            group, of_places = (head * t // H for t in (k.shape[2], position_keys.shape[1]))
            keys, values = k[:, :seen, group], v[:, :seen, group]
            places = position_keys[L - 1 - distances, of_places]
            logits = torch.einsum("bh,bjh->bj", content[:, i, head], keys) + position[:, i, head] @ places.t()
            heads.append(torch.einsum("bj,bjh->bh", logits.softmax(-1), values))
        results.append(torch.stack(heads, 1))
    out = torch.stack(results, 1)
    grads = torch.autograd.grad(out, list(wide.values()), upstream(inputs).double())
    return {"out": out.detach(), **dict(zip(wide, grads, strict=True))}


def run(inputs: Inputs, backend: str) -> dict[str, Tensor]:
    out, named = relative_attention(inputs, backend=backend), leaves(inputs)
    grads = torch.autograd.grad(out, [*named.values()], upstream(inputs))
    return {"out": out.detach(), **dict(zip(named, grads, strict=True))}


def check(shape: Shape, dtype: torch.dtype, backend: str) -> dict[str, Tensor]:
    """Against the oracle at the values as they are stored; the results for more checks."""
    inputs = make_inputs(shape, dtype)
    actual, expected = run(inputs, backend), oracle(inputs)
    for what, wanted in expected.items():
        assert actual[what].dtype == dtype and actual[what].shape == wanted.shape, what
        # A single key has the weight 1 and its logit no gradient: both are rounding errors, relative to 1.
        error = (actual[what].double() - wanted).abs().max() / wanted.abs().max().clamp_min(1.0)
        assert error <= BOUNDS[dtype], (what, error)
    return actual


@pytest.mark.parametrize("name", SHAPES)
def test_the_reference_equals_the_oracle(name: str) -> None:
    check(SHAPES[name], torch.float64, "reference")


def test_flop_counter() -> None:
    """Logits of content and of places, and the weighted sum, over all keys; twice as much for the gradients."""
    B, T, L, H, h = 2, 5, 11, 3, 8
    q, k, v = (torch.empty(B, n, H, h, device="meta", requires_grad=True) for n in (T, L, L))
    inputs = Inputs(q, q, k, v, torch.empty(L, H, h, device="meta", requires_grad=True))
    product = 2 * B * H * T * L * h
    assert flops(lambda: relative_attention(inputs, backend="triton")) == (3 * product, 6 * product)


def test_triton_takes_what_fits_the_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(requested: str, dtype: torch.dtype, width: int) -> str:
        return resolve(requested, "relative_attention", "cuda", dtype=dtype, widths=(width,))

    assert chosen("auto", torch.bfloat16, 256) == chosen("triton", torch.float16, 41) == "triton"
    assert chosen("auto", torch.bfloat16, 512) == chosen("auto", torch.float32, 64) == "reference"
    with pytest.raises(ValueError, match=r"heads of at most 256 columns here, not 512\. Possible: auto, reference"):
        chosen("triton", torch.bfloat16, 512)
    with pytest.raises(ValueError, match=r"take bfloat16 and float16 on CUDA, not torch\.float32"):
        chosen("triton", torch.float32, 64)
    assert resolve("auto", "relative_attention", "cpu") == "reference"
    monkeypatch.setattr(backend, "cuda_capability", lambda: (8, 9))
    assert (chosen("auto", torch.bfloat16, 128), chosen("auto", torch.bfloat16, 132)) == ("triton", "reference")
