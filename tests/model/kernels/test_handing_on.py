"""Ops that hand their input on (model/kernels/op.py, `hand_on`): the gradient of the input by the op and by what comes
after it, against torch's operators in fp64, and what sums it up."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from benchmarks.kernel_cases.recording import recording
from model.config import ModelConfig
from model.kernels.choice import Backends
from model.kernels.dense import gemms
from model.kernels.ops.elementwise import layer_norm
from model.kernels.ops.route import group_choices, route_handing_on, route_reference
from model.kernels.ops.switchhead import Choice, switchhead_value_handing_on, switchhead_value_reference
from model.language_model import build_model
from model.recompute import Recompute
from tests.model.kernels.triton.small_tiles import use_tiles

B, T, d, R, E, k, h = 3, 7, 24, 2, 4, 2, 8
EPSILON = 1e-5


class Way(NamedTuple):
    """An op that hands on, by one backend."""

    op: str
    backend: str


WAYS = [Way("route", "dense"), Way("value", "dense"), Way("value", "sets"), Way("norm", "triton")]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-8}
"""bf16: products of several roundings of 2^-9 are summed."""

Leaves = dict[str, Tensor]


def leaves() -> Leaves:
    """fp64; `next` is the weight of the map that comes after the op."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*size, dtype=torch.float64, generator=generator) * scale

    return {
        "x": normal(B * T, d),
        "router": normal(R, E, d, scale=d**-0.5),
        "experts": normal(R, E, d, h, scale=d**-0.5),
        "scores": torch.rand(B * T, R, k, dtype=torch.float64, generator=generator),
        "weight": 1 + normal(d, scale=0.1),
        "bias": normal(d, scale=0.1),
        "next": normal(d, d, scale=d**-0.5),
    }


INDEX = torch.rand(B * T, R, E, generator=torch.Generator().manual_seed(1)).topk(k).indices
USED = {"route": ("x", "router"), "value": ("x", "experts", "scores"), "norm": ("x", "weight", "bias")}


def by_torch(op: str, t: Leaves) -> tuple[Tensor, ...]:
    if op == "route":
        return route_reference(t["x"], t["router"], k)[:2]
    if op == "value":
        return (switchhead_value_reference(t["x"], choice(t), t["experts"]),)
    return (F.layer_norm(t["x"], (d,), t["weight"], t["bias"], EPSILON),)


def handing_on(way: Way, t: Leaves) -> tuple[Tensor, tuple[Tensor, ...]]:
    if way.op == "route":
        x, found = route_handing_on(t["x"], t["router"], k, backend=way.backend)
        return x, found[:2]
    if way.op == "value":
        x, v = switchhead_value_handing_on(t["x"], choice(t), t["experts"], backend=way.backend)
        return x, (v,)
    x, y = layer_norm(t["x"].view(B, T, d), t["weight"], t["bias"], EPSILON, backend=way.backend)
    return x.view(B * T, d), (y.view(B * T, d),)


def choice(t: Leaves) -> Choice:
    return Choice(t["scores"], INDEX, *group_choices(INDEX, E, backend="reference"))


def loss(results: tuple[Tensor, ...], after: Tensor | None) -> Tensor:
    """Every element of the results and of what comes `after` the op weighs differently."""
    total = torch.zeros((), dtype=torch.float64)
    for y in (*results, *(() if after is None else (after,))):
        total = total + (y.double() * torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape)).sum()
    return total


def expected(op: str, t: Leaves, *, uses_results: bool = True, uses_x: bool = True) -> dict[str, Tensor]:
    t = {name: leaf.detach().double().requires_grad_() for name, leaf in t.items()}
    loss(by_torch(op, t) if uses_results else (), t["x"] @ t["next"] if uses_x else None).backward()
    return {name: leaf.grad for name, leaf in t.items() if leaf.grad is not None}


def found(
    way: Way, t: Leaves, *, uses_results: bool = True, uses_x: bool = True, again: bool = False
) -> dict[str, Tensor]:
    t = {name: leaf.detach().clone().requires_grad_() for name, leaf in t.items()}

    def forward(x: Tensor) -> Tensor:
        handed, results = handing_on(way, t | {"x": x})
        assert torch.equal(handed, x)
        return loss(results if uses_results else (), handed @ t["next"] if uses_x else None)

    (checkpoint(forward, t["x"], use_reentrant=False) if again else forward(t["x"])).backward()
    return {name: leaf.grad for name, leaf in t.items() if leaf.grad is not None}


def stored(dtype: torch.dtype) -> Leaves:
    """Scores stay wide, as a router gives them."""
    return {name: leaf.to(torch.float32 if name == "scores" else dtype) for name, leaf in leaves().items()}


def assert_close(ours: dict[str, Tensor], exact: dict[str, Tensor], dtype: torch.dtype) -> None:
    assert ours.keys() == exact.keys()
    for name, gradient in ours.items():
        assert gradient.is_contiguous()
        off = (gradient.double() - exact[name]).norm() / exact[name].norm()
        assert off <= TOLERANCE[dtype], f"{name} is off by {off:.1e}"


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    use_tiles(monkeypatch, 16)


all_ways = pytest.mark.parametrize("way", WAYS, ids=lambda way: f"{way.op} {way.backend}")


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@all_ways
def test_the_gradient_is_that_of_the_op_and_of_what_comes_after(way: Way, dtype: torch.dtype) -> None:
    t = stored(dtype)
    with recording():
        ours = found(way, t)
    assert_close(ours, expected(way.op, t), dtype)
    assert ours.keys() == {*USED[way.op], "next"}


@all_ways
def test_either_gradient_may_be_missing(way: Way) -> None:
    t = stored(torch.float32)
    assert_close(found(way, t, uses_x=False), expected(way.op, t, uses_x=False), torch.float32)
    assert_close(found(way, t, uses_results=False), expected(way.op, t, uses_results=False), torch.float32)


@all_ways
def test_an_op_that_is_computed_again_hands_on_too(way: Way) -> None:
    t = stored(torch.bfloat16)
    once, again = found(way, t), found(way, t, again=True)
    assert all(torch.equal(once[name], again[name]) for name in once)


@pytest.mark.parametrize("way", WAYS[1:2], ids=["value dense"])
def test_chunks_of_tokens_are_added_each_to_its_own_rows(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemms, "CHUNK_BYTES", 8 * R * E * h * 4)
    t = stored(torch.float32)
    assert_close(found(way, t), expected(way.op, t), torch.float32)


class Sums(TorchDispatchMode):
    """How many times torch adds two tensors like x."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        like_x = [a for a in args if isinstance(a, Tensor) and a.numel() == B * T * d]
        self.count += func.name().startswith(("aten::add.", "aten::add_.")) and len(like_x) > 1
        return func(*args, **(kwargs or {}))


@all_ways
def test_no_pass_over_memory_sums_the_gradients(way: Way) -> None:
    t = {name: leaf.requires_grad_() for name, leaf in stored(torch.bfloat16).items()}
    handed, results = handing_on(way, t)
    for x, expected_sums in ((handed, 0), (t["x"], 1)):  # where x itself is used twice, autograd sums
        outputs = x @ t["next"], *results
        with Sums() as sums:
            torch.autograd.grad(outputs, t["x"], [torch.ones_like(y) for y in outputs], retain_graph=True)
        assert sums.count == expected_sums


def test_what_cannot_add_gives_x_itself() -> None:
    t = {name: leaf.requires_grad_() for name, leaf in stored(torch.float32).items()}
    assert handing_on(Way("route", "cpu"), t)[0] is t["x"]
    assert handing_on(Way("value", "cpu"), t)[0] is t["x"]
    assert handing_on(Way("norm", "cpu"), t)[0].data_ptr() == t["x"].data_ptr()
    with torch.no_grad():
        assert all(handing_on(way, t)[0].grad_fn is None for way in WAYS)


MODEL = {
    "d_model": d, "num_layers": 2, "vocab_size": 19, "sequence_length": T, "dropout": 0.1,
    "attention": {"type": "switchhead", "num_heads": R, "head_dim": h, "num_experts": E, "active_experts": k},
    "feedforward": {"type": "sigma_moe", "num_experts": 6, "expert_size": 8, "active_experts": k},
}  # fmt: skip


@pytest.mark.parametrize("value", ["dense", pytest.param("sets", marks=pytest.mark.slow)])
def test_a_model_that_hands_on_has_the_gradients_of_the_reference(value: str) -> None:
    """Residual stream, routers, experts, queries and keys; its activations kept, or computed again."""
    config, tokens = ModelConfig.model_validate(MODEL), torch.arange(B * T).view(B, T) % 19
    adding = Backends(route="dense", switchhead_value=value, elementwise="triton")
    gradients = []
    ways: list[tuple[Backends, Recompute]] = [
        (Backends(), "none"), (adding, "none"), (adding, "selective"), (adding, "full"),
    ]  # fmt: skip
    for backends, recompute in ways:
        model = build_model(config, backends=backends, seed=3, recompute=recompute)
        model(tokens, tokens.roll(-1, 1), torch.arange(B))[0].backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for ours in gradients[1:]:
        for name, expected in gradients[0].items():
            torch.testing.assert_close(ours[name], expected, rtol=1e-4, atol=1e-6, msg=name)


@all_ways
def test_a_compiler_sees_the_op_itself(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    """It adds up gradients in its own kernels, and could not look into ours; without gradients there is no sum."""

    def functions(t: Leaves) -> set[str]:
        """Names of the autograd functions behind the results of the op and behind what it hands on."""
        x, results = handing_on(way, t)
        todo, seen = [y.grad_fn for y in (x, *results)], set[str]()
        while todo:
            node = todo.pop()
            if node is not None:
                seen.add(node.name())
                todo += [before for before, _ in node.next_functions]
        return seen

    t = {name: leaf.requires_grad_() for name, leaf in stored(torch.float32).items()}
    assert "_HandOnBackward" in functions(t)
    with torch.no_grad():
        assert not functions(t)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert "_HandOnBackward" not in functions(t)
