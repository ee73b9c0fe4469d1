"""Sums inside the Triton kernels are fp32 in bf16 too: of numbers that nearly cancel each other something is left.

Tolerances of bf16 cannot see this at sizes that an interpreter computes: a few roundings of a partial sum are hardly
more than the one of a result. Here matrices are 1 to 1.06, and what they multiply comes twice, with both signs, so that
a result is a hundredth of the sum on the way to it. Both are exact in bf16, and so are their products by the gates.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from benchmarks import op_cases
from benchmarks.gpu.equality import errors, expected, results
from benchmarks.gpu.timing import Inputs, draw
from benchmarks.op_cases import Build, Case
from model.kernels.dense import gemms
from model.kernels.triton import layer_norm, route, sigma_moe
from tests.model.kernels.triton.small_tiles import use_tiles

LIMIT = 2**-5
"""Of results that are rounded two or three times; a partial sum in bf16 leaves 0.1 and more."""
OPS: dict[str, tuple[Build, str]] = {
    "value gated": (partial(op_cases.value_case, 16, 64, 2, 4, 2, 64), "triton"),
    "value sorted": (partial(op_cases.value_case, 16, 64, 2, 5, 2, 64), "triton"),
    "value by sets": (partial(op_cases.value_case, 16, 64, 2, 4, 2, 64), "sets"),
    "output gated": (partial(op_cases.output_case, 16, 64, 2, 4, 2, 64), "triton"),
    "output sorted": (partial(op_cases.output_case, 16, 64, 2, 5, 2, 64), "triton"),
    "output by sets": (partial(op_cases.output_case, 16, 64, 2, 4, 2, 64), "sets"),
    "expert_linear": (partial(op_cases.expert_linear_case, 16, 64, 4, 2, 64), "triton"),
    "sigma_moe": (partial(op_cases.sigma_moe_case, 16, 64, 4, 2, 16), "triton"),
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four steps of every sum."""
    use_tiles(monkeypatch, 16)
    tiles = sigma_moe.ExpertTiles(rows=16, hidden=16, reduce=16, out=16, warps=4, stages=2)
    for name in ("mlp_tiles", "weight_tiles"):
        monkeypatch.setattr(sigma_moe, name, lambda *_, **__: tiles)
    torch.manual_seed(0)


def near_one(like: Tensor) -> Tensor:
    return (1.0 + torch.randint(0, 8, like.shape) / 128).to(like.dtype)


def both_signs(like: Tensor, axis: int) -> Tensor:
    """Random; the second half along the axis is the first with the other sign."""
    half = torch.randn_like(like.detach()).chunk(2, axis)[0]
    return torch.cat([half, -half], axis)


def replaced(inputs: Inputs, upstream: list[Tensor], **tensors: Tensor) -> Inputs:
    leaves = {n: t.detach().requires_grad_(n in inputs.case.leaves) for n, t in (inputs.tensors | tensors).items()}
    return Inputs(inputs.case, leaves, upstream)


def off(inputs: Inputs, backend: str) -> dict[str, float]:
    found, left = results(inputs, backend)
    return errors(found, expected(inputs, left))


def drawn(build: Build) -> tuple[Inputs, dict[str, Tensor]]:
    """In bf16, and gates of 1 or 1/2 for it."""
    inputs = draw(build, torch.device("cpu"), torch.bfloat16, 0)
    scores = inputs.tensors["scores"]
    return inputs, {"scores": torch.randint(1, 3, scores.shape).to(scores.dtype) / 2}


@pytest.mark.parametrize("name", OPS)
def test_sums_over_features(name: str) -> None:
    """Of what goes in and, backward, of what comes out."""
    build, backend = OPS[name]
    inputs, tensors = drawn(build)
    for leaf in inputs.case.leaves.keys() - {"scores"}:
        t = inputs.tensors[leaf]
        tensors[leaf] = both_signs(t, -1) if leaf in ("x", "a") else near_one(t)
    found = off(replaced(inputs, [both_signs(u, -1) for u in inputs.upstream], **tensors), backend)
    assert max(found.values()) <= LIMIT, found


OF_TOKENS = {
    "value gated": (partial(op_cases.value_case, 96, 16, 2, 4, 2, 16), "triton"),
    "value sorted": (partial(op_cases.value_case, 96, 16, 2, 5, 2, 16), "triton"),
    "value by sets": (partial(op_cases.value_case, 96, 16, 2, 4, 2, 16), "sets"),
    "output gated": (partial(op_cases.output_case, 96, 16, 2, 4, 2, 16), "triton"),
    "output sorted": (partial(op_cases.output_case, 96, 16, 2, 5, 2, 16), "triton"),
    "output by sets": (partial(op_cases.output_case, 96, 16, 2, 4, 2, 16), "sets"),
    "expert_linear": (partial(op_cases.expert_linear_case, 96, 16, 4, 2, 16), "triton"),
    "value dense": (partial(op_cases.value_case, 96, 16, 2, 4, 2, 16), "dense"),
    "output dense": (partial(op_cases.output_case, 96, 16, 2, 4, 2, 16), "dense"),
}
"""σ-MoE has a test of exact numbers, in test_sigma_moe.py."""


@pytest.mark.parametrize("name", OF_TOKENS)
def test_sums_over_tokens(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the gradient of the experts, whose tokens are two tiles or more, and two chunks where cuBLAS adds them up.
    Tokens n and n + N / 2 choose alike."""
    build, backend = OF_TOKENS[name]
    monkeypatch.setattr(gemms, "CHUNK_BYTES", 48 * 2 * 4 * 16 * 2)
    inputs, tensors = drawn(build)
    for leaf in ("x", "a"):
        if leaf in inputs.tensors:
            tensors[leaf] = near_one(inputs.tensors[leaf])
    index = torch.cat([inputs.tensors["index"].chunk(2)[0]] * 2)
    tensors |= op_cases.grouped(index, inputs.tensors["load"].shape[-1])
    tensors["scores"] = torch.cat([tensors["scores"].chunk(2)[0]] * 2)
    assert int(tensors["load"].max()) > 32
    upstream = [both_signs(u, 0) if n == 0 else torch.zeros_like(u) for n, u in enumerate(inputs.upstream)]
    of = "query" if name == "expert_linear" else "experts"
    assert off(replaced(inputs, upstream, **tensors), backend)[f"gradient of {of}"] <= LIMIT


ALL = {
    "value gated": (partial(op_cases.value_case, 16, 16, 3, 8, 8, 16), "triton"),
    "value sorted": (partial(op_cases.value_case, 16, 16, 3, 17, 8, 16), "triton"),
    "value by sets": (partial(op_cases.value_case, 16, 16, 3, 6, 5, 16), "sets"),
    "output gated": (partial(op_cases.output_case, 16, 16, 3, 8, 8, 16), "triton"),
    "output sorted": (partial(op_cases.output_case, 16, 16, 3, 17, 8, 16), "triton"),
    "output by sets": (partial(op_cases.output_case, 16, 16, 3, 6, 5, 16), "sets"),
    "expert_linear": (partial(op_cases.expert_linear_case, 16, 16, 8, 8, 16), "triton"),
    "value gated, 3 of 5": (partial(op_cases.value_case, 16, 16, 3, 5, 3, 16), "triton"),
}


@pytest.mark.parametrize("name", ALL)
def test_sums_over_choices_and_heads(name: str) -> None:
    """Experts are the identity and all else is positive, so that a result is off by its own rounding, 2^-8 at most, and
    by that of the rows in it, which is a mean of many."""
    build, backend = ALL[name]
    inputs, tensors = drawn(build)
    tensors["scores"] = 0.5 + torch.rand_like(tensors["scores"]) / 2
    for leaf in inputs.case.leaves.keys() - {"scores"}:
        t = inputs.tensors[leaf].detach()
        is_rows = leaf in ("x", "a")
        tensors[leaf] = (0.5 + torch.rand_like(t)) if is_rows else torch.eye(16).to(t.dtype).expand_as(t).contiguous()
    given = replaced(inputs, [(0.5 + torch.rand_like(u)) for u in inputs.upstream], **tensors)
    found, left = results(given, backend)
    wanted = expected(given, left)
    names = [n for n in found if n.startswith("output ") or n in ("gradient of x", "gradient of a")]
    for each in names:
        share = ((found[each].double() - wanted[each]) / wanted[each]).abs().max().item()
        assert share <= 1.6 * 2**-8, each
    assert errors(found, wanted)["gradient of scores"] <= 1e-5  # fp32, of products that are exact


@pytest.mark.parametrize("E", [2, 4], ids=["gated", "sorted"])
@pytest.mark.parametrize("case", [op_cases.value_case, op_cases.output_case], ids=["value", "output"])
def test_gates_are_fp32(case: Callable[..., Case], E: int) -> None:
    """Of one choice and one head: x times its gate, rounded once, to the last bit."""
    inputs = draw(partial(case, 32, 16, 1, E, 1, 16), torch.device("cpu"), torch.bfloat16, 0)
    t = inputs.tensors
    experts = torch.eye(16).to(torch.bfloat16).expand_as(t["experts"]).contiguous()
    (y, *_), _ = (list(part.values()) for part in results(replaced(inputs, inputs.upstream, experts=experts), "triton"))
    rows = t["x"] if "x" in t else t["a"][:, 0]
    assert torch.equal(y.view(32, 16), (rows.float() * t["scores"][:, 0]).bfloat16())


def test_sums_of_a_routers_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over tokens, of which each program has some, and over what the programs made of them."""
    inputs = draw(partial(op_cases.route_case, 256, 32, 2, 4, 2), torch.device("cpu"), torch.bfloat16, 0)
    upstream = [both_signs(inputs.upstream[0], 0), torch.zeros_like(inputs.upstream[1])]
    given = replaced(inputs, upstream, x=near_one(inputs.tensors["x"]))
    for programs in (256, 1):
        monkeypatch.setattr(route, "MAX_GRADIENT_PROGRAMS", programs)
        assert off(given, "triton")["gradient of weight"] <= LIMIT


@pytest.mark.parametrize("resident", [64, 1])
def test_sums_of_a_norms_gradients(resident: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the rows of a program, and over programs; exact but for the last rounding."""
    monkeypatch.setattr(layer_norm, "RESIDENT_WARPS", resident)
    inputs = draw(partial(op_cases.norm_case, 1, 64, 16, None), torch.device("cpu"), torch.bfloat16, 0)
    ones = near_one(inputs.upstream[0])
    upstream = [torch.cat([ones[:, :32], -ones[:, 32:]], 1)]
    rows = inputs.tensors["x"][:, :32]
    found = off(replaced(inputs, upstream, x=torch.cat([rows, rows], 1)), "triton")
    assert max(found["gradient of bias"], found["gradient of weight"]) <= 2**-7


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")  # numpy's, of what is masked
@pytest.mark.parametrize("kind", ["relative", "causal"])
def test_means_of_values(kind: str) -> None:
    """Over the keys of a memory, to all of which a query of zeros attends alike."""
    build = op_cases.attention_case if kind == "relative" else op_cases.range_attention_case
    inputs = draw(partial(build, 1, 64, 1, 16), torch.device("cpu"), torch.bfloat16, 0)
    tensors = {name: torch.zeros_like(t) for name, t in inputs.tensors.items() if name in ("q", "content_queries")}
    ones = near_one(inputs.tensors["v"])
    tensors["v"] = torch.cat([ones[:, :64], -ones[:, 64:]], 1)  # of the last query's 128
    given = replaced(inputs, inputs.upstream, **tensors)
    found, left = results(given, "triton")
    y, wanted = found["output 0"][:, -1:], expected(given, left)["output 0"][:, -1:]
    assert errors({"y": y}, {"y": wanted})["y"] <= 2**-7
