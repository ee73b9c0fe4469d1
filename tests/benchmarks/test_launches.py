"""benchmarks/launches.py: the counter against counts by hand, the backward pass on its own graph against torch's, and
what a step of the shipped configurations may do: no wait of the host in a micro-step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.autograd.function import FunctionCtx
from torch.utils._pytree import tree_leaves

from benchmarks import launches, places
from benchmarks.fake_cuda import CUDA_TYPE, META_TYPE, backward, device_guards, fake_cuda, set_materialize_grads
from benchmarks.launch_counter import Counts, LaunchCounter, Tally, foreach_launches
from benchmarks.places import OTHER
from model.kernels.choice import Backends
from model.kernels.op import OPS
from model.kernels.ops.route import route
from model.layers import LayerNorm
from model.parallel.context import ParallelContext
from pretrain.config.loading import load_config
from pretrain.config.schema import Config
from pretrain.engine.gradient_norm import GradientNorm

CONFIGS = launches.CONFIGS


def counted(run: Callable[[], Any]) -> Counts:
    with fake_cuda(), LaunchCounter() as counter:
        run()
    return counter.counts


def new(*size: int, dtype: torch.dtype = torch.float32, **more: Any) -> Tensor:
    return torch.empty(size, dtype=dtype, device="cuda", **more)


# ------------------------------------------------------------------------------------------------------------ counter

ONE = 6 * 10 * 4  # bytes of [6, 10] in fp32
BY_HAND: dict[str, tuple[Callable[[Tensor], Any], int, int]] = {
    # What is done with x [6, 10] fp32: kernels, bytes.
    "views": (lambda x: x[1:, ::2].t().unsqueeze(0).expand(3, -1, -1).split(1), 0, 0),
    "reshape of a contiguous tensor": (lambda x: x.reshape(60).view(3, 20).detach(), 0, 0),
    "reshape that copies": (lambda x: x.t().reshape(60), 1, 2 * ONE),
    "empty tensors": (lambda x: (torch.empty_like(x), x.new_empty(4), torch.empty(3, device="cuda")), 0, 0),
    "out of place": (lambda x: x + 1.0, 1, 2 * ONE),
    "the same tensor twice": (lambda x: x * x, 1, 2 * ONE),
    "in place": (lambda x: x.mul_(2.0), 1, 2 * ONE),
    "overwritten": (lambda x: x.zero_(), 1, ONE),
    "part of it": (lambda x: x[:, :5].add_(1.0), 1, ONE),
    "out=": (lambda x: torch.add(x, x, out=new(6, 10)), 1, 2 * ONE),
    "copied in": (lambda x: new(6, 10).copy_(x), 1, 2 * ONE),
    "broadcast": (lambda x: x + new(10).expand(6, 10), 1, 2 * ONE + 40),
    "filled": (lambda x: torch.zeros(6, 10, device="cuda"), 1, ONE),
    "of the same kind": (lambda x: (x.new_zeros(3), torch.ones_like(x)), 2, 12 + ONE),
    "cast to half": (lambda x: x.half(), 1, ONE + ONE // 2),
    "no cast": (lambda x: x.float(), 0, 0),
    "reduced": (lambda x: x.sum(0), 1, ONE + 40),
    "gathered": (lambda x: x[new(3, dtype=torch.int64)], 1, 3 * 8 + 2 * (ONE // 2)),
    "looked up": (lambda x: F.embedding(new(3, dtype=torch.int64), x), 1, 3 * 8 + 2 * (ONE // 2)),
    "product": (lambda x: x @ new(10, 4), 1, ONE + 160 + 96),
    "with a number of the host": (lambda x: x + torch.tensor(1.0, device="cpu"), 1, 2 * ONE),
    "on the CPU": (lambda x: torch.empty(5) + 1.0, 0, 0),
    "a list": (lambda x: torch._foreach_add_([x, new(7)], 1.0), 1, 2 * (ONE + 28)),
    "a list, out of place": (lambda x: torch._foreach_mul([x, new(7)], [x, new(7)]), 1, 2 * ONE + 3 * 28),
}


@pytest.mark.parametrize("name", BY_HAND)
@pytest.mark.parametrize("is_body", [False, True], ids=["outside", "in the body of an op"])
def test_counts_by_hand(name: str, is_body: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    run, kernels, moved = BY_HAND[name]
    monkeypatch.setattr(OPS["group_choices"], "body", lambda x, *_: (run(x), (x, x))[1])
    with fake_cuda():
        x = new(6, 10)
        with LaunchCounter() as counter:
            torch.ops.switchall.group_choices(x, 1, "cpu") if is_body else run(x)
    total = counter.counts.total
    is_product = name == "product"
    assert total == Tally(kernels, 0, moved, 0 if is_product else moved)
    assert not counter.counts.waits and counter.counts.to_host == counter.counts.to_device == 0


def multiplied(count: int) -> None:
    """Two lists of so many tensors."""
    torch._foreach_mul([new(5) for _ in range(count)], [new(5) for _ in range(count)])


def test_lists_are_launched_in_pieces() -> None:
    """Of at most 770 tensors in one list, 448 in two, and 2240 blocks of 65,536 elements."""
    assert foreach_launches([5] * 770, 1) == 1 and foreach_launches([5] * 771, 1) == 2
    assert foreach_launches([5] * 448, 2) == 1 and foreach_launches([5] * 449, 2) == 2
    assert foreach_launches([65536 * 2240], 1) == 1 and foreach_launches([65536 * 2240 + 1], 1) == 2
    assert foreach_launches([0, 0], 1) == 0 and foreach_launches([0, 3], 4) == 1
    # A tensor that goes on in the next launch is in its list again: 1 + 769 there, and one more launch for the last.
    assert foreach_launches([65536 * 2241, *[1] * 770], 1) == 3
    found = counted(lambda: torch._foreach_add_([new(5) for _ in range(449)], [new(5) for _ in range(449)]))
    assert found.total.kernels == 2 and found.total.bytes == 3 * 449 * 20

    # Two lists and that of the results; norms of tensors are sums of parts, and a sum of these.
    for count, launched in ((336, 1), (337, 2)):
        found = counted(partial(multiplied, count))
        assert found.total.kernels == launched
    assert counted(lambda: torch._foreach_norm([new(6, 10), new(7)])).total.kernels == 2


def test_what_a_triton_kernel_is_given_is_moved() -> None:
    """By position or by name; nothing of it is an operator's."""
    with fake_cuda():
        x, y = new(6, 10), new(7)
        counter = LaunchCounter()
        with counter.at("attention"):
            counter.launched(SimpleNamespace(fn=SimpleNamespace(__name__="kernel")), (x, 3), {"y_ptr": y, "N": 5})
    assert counter.counts.total == Tally(1, 1, ONE + 28, 0)


def test_counts_are_added_and_taken_away() -> None:
    one, two = Counts(), Counts()
    one.add("norm", "mul", Tally(1, 0, 10, 10))
    two.add("norm", "mul", Tally(2, 1, 4, 3))
    two.to_host, two.waits["item"] = 1, 2
    found = one.plus(two, 3)
    assert found.total == Tally(7, 3, 22, 19) and found.by_operator["norm", "mul"] == 7
    assert (found.to_host, found.to_device, found.waits["item"]) == (3, 0, 6)
    assert found.plus(two, -3).total == one.total


def test_a_triton_launch_is_counted_where_it_is_launched() -> None:
    def run() -> None:
        x, weight = new(16, 32, dtype=torch.bfloat16), new(2, 4, 32, dtype=torch.bfloat16)
        route(x, weight, 2, backend="triton")

    found = counted(run)
    assert set(found.by_place) == {"router"}
    assert found.by_operator["router", "choose_kernel"] == found.by_operator["router", "place_kernel"] == 1
    assert found.by_place["router"].triton == 2 and not found.waits


WAITS: dict[str, tuple[Callable[[Tensor], Any], int, int]] = {
    # How the host waits: copies to the host, copies to the GPU.
    "item": (lambda x: x.sum().item(), 1, 0),
    "float": (lambda x: float(x[0, 0]), 1, 0),
    "if": (lambda x: 1 if (x > 0).any() else 0, 1, 0),
    "tolist": (lambda x: x.tolist(), 1, 0),
    "cpu": (lambda x: x.cpu(), 1, 0),
    "copy to a tensor of the host": (lambda x: torch.empty(6, 10, device="cpu").copy_(x), 1, 0),
    "nonzero": (lambda x: x.nonzero(), 1, 0),
    "a mask as an index": (lambda x: x[x > 0], 1, 0),
    "a mask that is written to": (lambda x: x.index_put_((x > 0,), x.new_empty(())), 1, 0),
    "equal": (lambda x: torch.equal(x, x + 1), 1, 0),
    "pageable": (lambda x: torch.empty(6, 10, device="cpu").to(x.device, non_blocking=True), 0, 1),
    "a number of the host": (lambda x: x.new_tensor(3.0), 0, 1),
    "torch.tensor": (lambda x: torch.tensor([1, 2], device=x.device), 0, 1),
}


@pytest.mark.parametrize("name", WAITS)
def test_waits_are_found(name: str) -> None:
    run, to_host, to_device = WAITS[name]
    with fake_cuda():
        x = new(6, 10)
        no_data_to_answer_with = contextlib.suppress(DynamicOutputShapeException, DataDependentOutputException)
        with LaunchCounter() as counter, no_data_to_answer_with:
            run(x)
    assert counter.counts.waits.total() == 1, counter.counts.waits
    assert (counter.counts.to_host, counter.counts.to_device) == (to_host, to_device)


def test_pinned_memory_does_not_wait() -> None:
    def run() -> None:
        staged = torch.empty(5, pin_memory=True)
        staged.copy_(new(5), non_blocking=True)
        staged.to("cuda", non_blocking=True)

    found = counted(run)
    assert not found.waits and (found.to_host, found.to_device) == (1, 1) and found.total.kernels == 0


# ------------------------------------------------------------------------------------------------------ backward pass


class Halves(torch.autograd.Function):
    """Two results, of which one may get no gradient; an argument that is no tensor."""

    @staticmethod
    def forward(ctx: Any, factor: float, x: Tensor, bare: bool) -> tuple[Tensor, Tensor]:
        ctx.factor = factor
        if bare:
            ctx.set_materialize_grads(False)
        return x * factor, x * 2

    @staticmethod
    def backward(ctx: Any, first: Tensor | None, second: Tensor | None) -> tuple[None, Tensor, None]:
        assert first is not None
        return None, first * ctx.factor + (torch.full_like(first, 7.0) if second is None else second * 2), None


def graph(x: Tensor, weight: Tensor, bias: Tensor, *, bare: bool) -> Tensor:
    first, _ = Halves.apply(3.0, x, bare)
    hidden = F.layer_norm(first @ weight + bias, (4,))  # the bias is broadcast
    hidden = hidden + hidden.relu() * x[:, :4]  # used twice
    left, right = hidden.split(2, 1)
    return (left * right.double()).sum() + bias.prod()


@pytest.mark.parametrize("bare", [False, True])
def test_the_walk_gives_the_gradients_of_torch(bare: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FunctionCtx, "set_materialize_grads", set_materialize_grads)
    generator = torch.Generator().manual_seed(0)
    leaves = [nn.Parameter(torch.randn(size, generator=generator)) for size in ((3, 5), (5, 4), (1, 4))]
    wanted = torch.autograd.grad(graph(*leaves, bare=bare), leaves)
    for times in (1, 2):  # the second adds to the first
        backward(graph(*leaves, bare=bare))
        for leaf, want in zip(leaves, wanted, strict=True):
            assert leaf.grad is not None and leaf.grad.shape == want.shape and leaf.grad.dtype == want.dtype
            torch.testing.assert_close(leaf.grad, times * want, rtol=1e-6, atol=1e-6)


def test_a_backward_pass_is_counted_where_its_forward_pass_was() -> None:
    with fake_cuda():
        with torch.device("cuda"):
            norm = LayerNorm(8, parallel=ParallelContext(), backends=Backends(elementwise="cpu"))
        x = new(5, 8, requires_grad=True)
        with LaunchCounter() as counter:
            y = norm(x)
            forward, counter.counts = counter.counts, Counts()
            backward(y.sum(), counter.before_node)
    assert forward.by_operator == {("norm", "native_layer_norm"): 1}
    assert counter.counts.by_operator["norm", "native_layer_norm_backward"] == 1
    assert x.grad is not None and x.grad.shape == (5, 8) and norm.weight.grad is not None


def test_the_folder_of_a_checkout_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "ROOT", "/tests/dropout.py/layer_norm.py")
    place = places._place.__wrapped__
    assert place(f"{places.ROOT}/model/attention/dense.py", "attend") == "attention"
    assert place(f"{places.ROOT}/tests/model/test_model.py", "attend") is None


def test_the_guard_is_gone_afterwards() -> None:
    """Builds of torch with CUDA have one of their own, which comes back."""
    before = list(device_guards())
    for _ in range(2):
        with fake_cuda():
            inside = list(device_guards())
        assert torch.cuda.is_available() or inside[CUDA_TYPE] == before[META_TYPE] != before[CUDA_TYPE]
        with pytest.raises(ZeroDivisionError), fake_cuda():
            _ = 1 / (new(3).dim() - 1)
        assert list(device_guards()) == before


# --------------------------------------------------------------------------------------------------- shipped configs


ALL = sorted([*CONFIGS.glob("*.json"), *CONFIGS.glob("paper/*.json")])
CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "switchall_1b": ("switchall_1b", ()),
    "dropout everywhere": (
        "switchall_1b",
        ("model.dropout=0.1", "model.attention.expert_dropout=0.1", "model.feedforward.expert_dropout=0.1"),
    ),
    "switchall_tiny with documents": ("switchall_tiny", ("data.document_mask=true",)),
    "XL": ("paper/c4_switchhead_262m", ()),
    "experts everywhere": ("paper/wt103_ablation_vkqo_47m", ()),
    "MoA": ("paper/wt103_moa_8heads_47m", ()),
    "dense": ("paper/c4_dense_rope_244m", ()),
    "computed again": ("switchall_tiny", ("train.recompute=selective",)),
    "GEMMs of all experts": ("switchall_1b", ("kernels.backend=dense",)),
    "GEMMs of sets of experts": ("switchall_1b", ("kernels.backend=sets",)),
}
QUICK = ("dropout everywhere", "XL", "MoA", "computed again")


def one_layer(path: Path, overrides: Iterable[str] = ()) -> Config:
    config = load_config(path, ["model.num_layers=1", "batch.micro_sequences=2", *overrides])
    assert config.parallel.expert == 1
    return config


@pytest.mark.parametrize(
    "case", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_the_host_never_waits_in_a_micro_step(case: str) -> None:
    name, overrides = CASES[case]
    config = one_layer(CONFIGS / f"{name}.json", overrides)
    found = launches.count_step(config, with_documents=config.data.document_mask).micro_step
    assert found.total.kernels > 80 and found.to_host == found.to_device == 0 and not found.waits
    assert OTHER not in found.by_place and {"attention", "feed-forward", "norm", "head"} <= found.by_place.keys()
    assert ("dropout" in found.by_place) is (config.model.dropout > 0)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_documents_make_no_mask_but_in_the_reference(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor whose last axes are queries and keys."""
    shapes: set[tuple[int, ...]] = set()

    class WithShapes(launches.LaunchCounter):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            results = super().__torch_dispatch__(func, types, args, kwargs)
            shapes.update(tuple(t.shape) for t in tree_leaves(results) if isinstance(t, Tensor))
            return results

    monkeypatch.setattr(launches, "LaunchCounter", WithShapes)
    overrides = ("data.document_mask=true", "train.precision=bf16", "model.sequence_length=200")
    config = one_layer(CONFIGS / "switchall_tiny.json", (*overrides, f"kernels.backend={backend}"))
    found = launches.count_step(config, with_documents=True).micro_step.by_operator
    masks = {shape for shape in shapes if shape[-2:] == (200, 200)}
    kernels = {("attention", name) for name in ("forward_kernel", "query_gradient_kernel", "key_gradient_kernel")}
    if backend == "auto":
        assert not masks and kernels <= found.keys()
    else:
        assert (2, 1, 200, 200) in masks and not kernels & found.keys()


@pytest.mark.slow
@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_the_host_never_waits_in_a_micro_step_of_any_configuration(path: Path) -> None:
    changes = ["model.dropout=0.0", "model.dropout=0.2", "train.recompute=full", "train.recompute=selective"]
    for change in changes:
        found = launches.count_step(one_layer(path, [change])).micro_step
        assert found.to_host == found.to_device == 0 and not found.waits


def test_a_wait_in_a_micro_step_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    original = LayerNorm.add

    def waiting(self: LayerNorm, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        total, y = original(self, x, *rest)
        return total, y * x.sum().clamp(1, 1).item()

    monkeypatch.setattr(LayerNorm, "add", waiting)
    found = launches.count_step(one_layer(CONFIGS / "switchall_tiny.json")).micro_step
    assert found.waits.total() == found.to_host == 3 and all("_local_scalar_dense" in wait for wait in found.waits)


def test_the_regulariser_of_a_router_and_its_statistics_are_three_launches() -> None:
    found = launches.count_step(one_layer(CONFIGS / "switchall_tiny.json"))
    of_router = {operator for place, operator in found.forward.by_operator if place == "router"}
    assert of_router == {"choose_kernel", "place_kernel", "probability_kernel", "entropy_kernel"}
    assert ("statistics", "_softmax") not in found.forward.by_operator
    for kernel in ("probability_kernel", "entropy_kernel", "entropy_backward_kernel"):
        assert found.micro_step.by_operator["router", kernel] == 1


def test_only_a_layer_with_an_auxiliary_loss_launches_something_for_it() -> None:
    """One addition to that of the layers before; SwitchHead and dense layers have none."""
    for name, additions in (("switchall_tiny", 1), ("paper/c4_switchhead_262m", 0)):
        found = launches.count_step(one_layer(CONFIGS / f"{name}.json")).forward.by_operator
        assert found["residual", "add"] == additions and not found["attention", "new_zeros"]


@pytest.mark.slow  # test_table adds up two layers and one
def test_layers_are_alike() -> None:
    """Which is why two layers and one tell what a model of any depth does."""
    path = CONFIGS / "switchall_tiny.json"
    _, one, layer = launches.count_model(path)
    three = launches.count_step(load_config(path, ["model.num_layers=3"]))
    for first, further, wanted in zip(one.parts[:2], layer.parts[:2], three.parts[:2], strict=True):
        assert first.plus(further, 2) == wanted


def test_the_host_never_waits_in_an_optimizer_step() -> None:
    """The fused optimizer of a run reads the gradient norm on the device. What the host wants to know is one copy to
    pinned memory, which nobody waits for."""
    found = launches.count_step(one_layer(CONFIGS / "switchall_1b.json")).step
    assert not found.waits and (found.to_host, found.to_device) == (1, 0)
    assert found.by_place["statistics"].kernels <= 60
    assert found.by_operator["optimizer", "_fused_adamw_"] > 0 and found.by_place["optimizer"].kernels <= 10


def test_a_host_that_reads_the_norm_is_seen_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    class Read(GradientNorm):
        def before_step(self) -> None:
            super().before_step()
            assert self._own is not None
            float(self._own)

    monkeypatch.setattr(launches, "GradientNorm", Read)
    found = launches.count_step(one_layer(CONFIGS / "switchall_1b.json")).step
    assert sum(found.waits.values()) == 1 and next(iter(found.waits)).startswith("_local_scalar_dense")
    assert found.to_host == 2
