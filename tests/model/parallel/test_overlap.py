"""The sum of a region's input gradient over ranks is begun before the gradients of the region's weights are computed
and awaited after them, in every layer; and what is left for later has the values that it has at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from model.attention.dense import DenseAttention
from model.attention.moa import MoAAttention
from model.attention.switchhead import SwitchHeadAttention
from model.config import ModelConfig
from model.feedforward.dense import DenseFeedForward
from model.feedforward.sigma_moe import SigmaMoE
from model.feedforward.swiglu import SwiGLU
from model.kernels.choice import Backends
from model.kernels.ops.expert_linear import expert_linear
from model.kernels.ops.route import Choice, route
from model.kernels.ops.sigma_moe import HeldExperts, sigma_moe
from model.kernels.ops.switchhead import switchhead_value
from model.linear import region_linear
from model.parallel.context import ParallelContext
from model.parallel.overlap import Late, Slot, WeightGradients, enter_overlapped, late_weights
from tests.harness import run_ranks
from tests.tensors import gradient_of

B, T, D = 3, 26, 10
"""B T = 78 tokens: no weight has such a dimension, so a product without it is of a weight's gradient."""

ATTENTION: dict[str, dict[str, Any]] = {
    "dense attention": {"type": "dense", "num_heads": 4, "head_dim": 6},
    "switchhead": {"type": "switchhead", "num_heads": 4, "head_dim": 6, "num_experts": 3, "active_experts": 2},
    "moa": {"type": "moa", "num_heads": 2, "head_dim": 6, "num_experts": 3},
}
FEEDFORWARD: dict[str, dict[str, Any]] = {
    "dense": {"type": "dense", "hidden_size": 14},
    "swiglu": {"type": "swiglu", "hidden_size": 14},
    "sigma-moe": {"type": "sigma_moe", "num_experts": 4, "expert_size": 14, "active_experts": 2},
}
LAYERS: dict[str, Callable[..., nn.Module]] = {
    "dense attention": DenseAttention,
    "switchhead": SwitchHeadAttention,
    "moa": MoAAttention,
    "dense": DenseFeedForward,
    "swiglu": SwiGLU,
    "sigma-moe": SigmaMoE,
}
LATE = {
    "dense attention": ("query.weight", "key.weight", "value.weight"),
    "switchhead": ("query.weight", "key.weight", "value_experts"),
    "moa": (),  # query_experts: each rank computes some slots with all of them, so a sum over ranks follows
    "dense": ("up.weight",),
    "swiglu": ("gate.weight", "up.weight"),
    "sigma-moe": ("up_experts", "down_experts"),
}
"""Weights whose gradients arrive while the sum is on its way."""


def build(name: str, parallel: ParallelContext) -> nn.Module:
    attention, feedforward = ATTENTION.get(name), FEEDFORWARD.get(name)
    sections = {"attention": attention, "feedforward": feedforward}
    config = ModelConfig.model_validate(
        {"d_model": D, "num_layers": 1, "vocab_size": 4, "sequence_length": T}
        | {key: value for key, value in sections.items() if value is not None}
    )
    ops = ("route", "switchhead_value", "switchhead_output", "expert_linear", "sigma_moe")
    backends = Backends(**dict.fromkeys(ops, "cpu"))
    layer = LAYERS[name](config, parallel=parallel, backends=backends, name="layer", seed=3)
    for number, parameter in enumerate(layer.parameters()):
        generator = torch.Generator().manual_seed(number + 10 * parallel.tensor_rank)
        parameter.data.normal_(generator=generator).mul_(0.3)
    return layer


class Trace(TorchDispatchMode):
    """The order in which collectives are begun and awaited and weight gradients computed, of the thread's own ops."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.events: list[str] = []
        for name in ("all_reduce", "reduce_scatter_tensor"):
            monkeypatch.setattr(dist, name, self._recorded(getattr(dist, name)))
        leave = Slot.leave

        def left(slot: Slot, gradients: WeightGradients) -> None:
            self.events.append("leave")

            def compute() -> Sequence[Tensor]:
                self.events.append("compute")
                return gradients()

            leave(slot, compute)

        monkeypatch.setattr(Slot, "leave", left)

    def _recorded(self, collective: Callable[..., Any]) -> Callable[..., Any]:
        def begin(*args: Any, async_op: bool = False, **more: Any) -> Any:
            work = collective(*args, async_op=async_op, **more)
            if not async_op:
                return work
            self.events.append("begin")
            return Awaited(work, self.events)

        return begin

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            # The dimension that is summed over: tokens (of all, or of an expert) in a weight's gradient.
            first = args[0] if func.overloadpacket is torch.ops.aten.mm else args[1]
            if D in result.shape and not any(size == B * T for size in result.shape) and first.shape[1] > T:
                self.events.append("product of a weight")
        return result


class Awaited:
    def __init__(self, work: Any, events: list[str]) -> None:
        self._work, self._events = work, events

    def wait(self) -> None:
        self._events.append("wait")
        self._work.wait()


def arrived(events: list[str], name: str, parameter: Tensor) -> None:
    events.append(name)


def traces(rank: int, sequence_parallel: bool) -> dict[str, list[str]]:
    parallel = ParallelContext(
        tensor_rank=rank, tensor_size=2, tensor_group=dist.group.WORLD, sequence_parallel=sequence_parallel
    )
    found = {}
    for name in LATE:
        layer = build(name, parallel)
        x = torch.randn(B, T // parallel.token_shards, D, generator=torch.Generator().manual_seed(rank))
        x.requires_grad_()
        index = torch.arange(B)
        y, _ = layer(x, x.shape[1], index) if name in ATTENTION else layer(x, index)
        order: list[str] = []
        for parameter_name, parameter in layer.named_parameters():
            parameter.register_post_accumulate_grad_hook(partial(arrived, order, parameter_name))
        with pytest.MonkeyPatch.context() as monkeypatch, Trace(monkeypatch) as trace:
            trace.events = order
            y.backward(torch.ones_like(y))
        found[name] = order
    return found


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_the_sum_is_begun_before_the_weight_gradients_and_awaited_after(sequence_parallel: bool) -> None:
    for rank, found in enumerate(run_ranks(traces, 2, sequence_parallel)):
        for name, events in found.items():
            label = f"{name}, rank {rank}: {events}"
            assert events.count("begin") == events.count("wait") == 1, f"one collective: {label}"
            begin, end = events.index("begin"), events.index("wait")
            assert "product of a weight" in events[begin:end], f"nothing was computed on the way: {label}"
            if name == "dense" and not sequence_parallel:
                # megatron-core's layer is one node: its weight's gradient arrives when the node ends.
                assert "compute" not in events and events.index("up.weight") > end, label
                continue
            maps = events.count("leave")
            assert maps and maps == events[:begin].count("leave"), f"a map ran after the sum was begun: {label}"
            assert maps == events.count("compute") == events[begin:end].count("compute"), label
            assert {weight for weight in LATE[name] if weight in events[begin:end]} == set(LATE[name]), label


def gradient_of_two(rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """One tensor is the gradient of a region's input and of another: that of the input, and the other's after it."""
    parallel = ParallelContext(tensor_rank=rank, tensor_size=2, tensor_group=dist.group.WORLD)
    x, other = torch.zeros(B, T, D, requires_grad=True), torch.zeros(B, T, D, requires_grad=True)
    later = other * 1.0  # made first, so its backward pass comes last
    entered, _, _ = enter_overlapped(x, parallel)
    own = torch.randn(B, T, D, generator=torch.Generator().manual_seed(rank))
    (entered + later).backward(own.clone())
    return own, gradient_of(x), gradient_of(other)


def test_a_gradient_that_another_tensor_has_too_is_not_summed_in_its_place() -> None:
    (one, *first), (two, *second) = run_ranks(gradient_of_two, 2)
    for own, (of_input, of_other) in ((one, first), (two, second)):
        assert torch.equal(of_input, one + two) and torch.equal(of_other, own)


def gradients(map_: Callable[[Late], Tensor], late: Late, leaves: list[Tensor]) -> list[Tensor]:
    y = map_(late)
    towards = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y.dtype)
    return list(torch.autograd.grad(y, leaves, towards))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "name",
    [
        "linear",
        "joint linear",
        "switchhead_value",
        "switchhead_value of all experts",
        "sigma_moe",
        "sigma_moe with SwiGLU",
        "grouped_mm",
        "expert_linear",
    ],
)
def test_what_is_left_for_later_has_the_same_values(name: str, dtype: torch.dtype) -> None:
    """Also for experts that no token chose, and where the forward pass is computed again."""
    N, d, H, E, k, h = 37, 16, 2, 5, 2, 8
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_()

    x = leaf(N, d)
    selector = torch.randn(H, E, d, generator=generator) - 5.0 * (torch.arange(E) == 3)[:, None]
    choice = route(x.detach().abs(), selector.to(dtype), k, backend="cpu").choice
    assert (choice.load[0] == 0).any(), "every expert was chosen"
    scores = choice.scores.detach().requires_grad_()
    choice = choice._replace(scores=scores)
    first = scores[:, 0].detach().requires_grad_()
    single = Choice(first, choice.index[:, 0], choice.order[0], choice.load[0])
    weights, inputs, map_ = {
        "linear": ([leaf(h, d)], [x], lambda late: region_linear(x, late)),
        "joint linear": ([leaf(h, d), leaf(3, d)], [x], lambda late: region_linear(x, late)),
        "switchhead_value": (
            [leaf(H, E, d, h)],
            [x, scores],
            lambda late: switchhead_value(x, choice, *late.weights, backend="cpu", slot=late.slot),
        ),
        "switchhead_value of all experts": (
            [leaf(H, E, d, h)],
            [x, scores],
            lambda late: switchhead_value(x, choice, *late.weights, backend="dense", slot=late.slot),
        ),
        "sigma_moe": (
            [leaf(E, d, h), leaf(E, h, d)],
            [x, first],
            lambda late: sigma_moe(x, single, HeldExperts(*late.weights), backend="cpu", slot=late.slot),
        ),
        "sigma_moe with SwiGLU": (
            [leaf(E, d, 2 * h), leaf(E, h, d)],
            [x, first],
            lambda late: sigma_moe(x, single, HeldExperts(*late.weights), backend="cpu", slot=late.slot),
        ),
        "grouped_mm": (
            [leaf(E, d, 2 * h), leaf(E, h, d)],
            [x, first],
            lambda late: sigma_moe(x, single, HeldExperts(*late.weights), backend="grouped_mm", slot=late.slot),
        ),
        "expert_linear": (
            [leaf(E, d, h)],
            [x],
            lambda late: expert_linear(x, single, *late.weights, backend="cpu", slot=late.slot),
        ),
    }[name]
    at_once = gradients(map_, Late(tuple(weights)), [*inputs, *weights])
    late = late_weights(weights)
    assert late.slot is not None
    for found, expected in zip(gradients(map_, late, [*inputs, *weights]), at_once, strict=True):
        torch.testing.assert_close(found, expected)
    assert late.slot.take() is None, "something was left over"

    def recomputed(_: Late) -> Tensor:
        return checkpoint(lambda: map_(late_weights(weights)), use_reentrant=False)

    for found, expected in zip(gradients(recomputed, late, [*inputs, *weights]), at_once, strict=True):
        torch.testing.assert_close(found, expected)


def test_weights_without_gradient_are_not_late() -> None:
    weight = torch.ones(2, 3)
    assert late_weights([weight]) == ((weight,), None)
    with torch.no_grad():
        assert late_weights([weight.requires_grad_()]).slot is None
