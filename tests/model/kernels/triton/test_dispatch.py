"""On CUDA every op takes the Triton path, its host code never waits for the GPU, and kernels are launched where tensors
are: fake CUDA tensors run through the real op bodies, launches are recorded. A fake tensor has no data: .item(),
.tolist() and data-dependent shapes fail."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction

from model.kernels.backend import BACKENDS, IMPLEMENTATIONS, implementation, resolve
from model.kernels.choice import Backends
from model.kernels.dense import gemms
from model.kernels.ops import route
from model.kernels.ops.switchhead import choose_strategy
from model.language_model import LanguageModel
from tests.pretrain.runs import MOA, small_config

N, d, H, h, E, k, G, V = 96, 32, 2, 16, 4, 2, 16, 64
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BODIES = {
    "route": ("_route", "_route_backward", "_group_choices"),
    "sigma_moe": ("_sigma_moe", "_sigma_moe_backward"),
    "switchhead_value": ("_value", "_value_backward"),
    "switchhead_output": ("_output", "_output_backward"),
    "expert_linear": ("_expert_linear", "_expert_linear_backward", "_expert_linear_sum", "_expert_linear_sum_backward"),
    "relative_attention": ("_relative_attention", "_relative_attention_backward"),
    "causal_attention": ("_causal_attention", "_causal_attention_backward"),
    "linear_cross_entropy": ("_linear_cross_entropy",),
    "elementwise": (
        *("_dropout", "_keep_mask", "_rotate", "_rotate_backward"),
        *("_layer_norm", "_layer_norm_backward"),
        *("_entropy", "_entropy_backward"),
    ),
}
"""The custom ops of every op's module."""


def op_module(op: str) -> Any:
    """The file of model/kernels/ops that defines `op`."""
    return importlib.import_module(f"model.kernels.ops.{'switchhead' if op.startswith('switchhead') else op}")


def test_every_op_is_covered() -> None:
    assert BODIES.keys() == BACKENDS.keys() == {field.name for field in fields(Backends)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", sorted(BACKENDS.keys() - {"relative_attention", "causal_attention"}))
def test_auto_on_cuda_is_triton(op: str, dtype: torch.dtype) -> None:
    """Of all but attention, which has limits of its own."""
    assert resolve("auto", op, "cuda", dtype=dtype, widths=(412, 100) if op == "sigma_moe" else ()) == "triton"
    assert resolve("auto", op, "cpu", dtype=dtype) == "cpu"


class Launches(list[tuple[str, list[Tensor]]]):
    """Kernel and tensors of every launch."""


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    found = Launches()

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        assert all(isinstance(size, int) for size in grid)
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        assert {tensor.device.index for tensor in tensors} == {current_device[-1]}, "launched on another GPU"
        found.append((self.fn.__name__, tensors))

    monkeypatch.setattr(InterpretedFunction, "run", record)
    return found


current_device = [0]


@pytest.fixture(autouse=True)
def _devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """The current device of a machine with several GPUs."""

    def exchange(index: int) -> int:
        before = current_device[-1]
        if index >= 0:
            current_device[-1] = index
        return before

    monkeypatch.setattr(torch.cuda, "_exchange_device", exchange)
    monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", exchange)


@pytest.fixture(autouse=True)
def _indexing(monkeypatch: pytest.MonkeyPatch) -> None:
    """x[...] of a CUDA tensor, read or written, asks for a device guard, which CPU builds of torch
    lack: the same views by other names. An index that is a tensor, whose result may be data-dependent, still fails."""
    original = Tensor.__getitem__

    def getitem(self: Tensor, key: Any) -> Tensor:
        if self.device.type != "cuda":
            return original(self, key)
        keys = list(key) if isinstance(key, tuple) else [key]
        if Ellipsis in keys:
            missing = self.dim() - sum(k is not None and k is not Ellipsis for k in keys)
            at = keys.index(Ellipsis)
            keys[at : at + 1] = [slice(None)] * missing
        result, dim = self, 0
        for k in keys:
            if isinstance(k, int):
                result = result.select(dim, k)
                continue
            if k is None:
                result = result.unsqueeze(dim)
            else:
                assert isinstance(k, slice), f"indexing a CUDA tensor with {k}"
                result = torch.ops.aten.slice(result, dim, k.start, k.stop, k.step or 1)
            dim += 1
        return result

    def setitem(self: Tensor, key: Any, value: Tensor) -> None:
        view = getitem(self, key)
        assert value.device == view.device and torch.broadcast_shapes(value.shape, view.shape) == view.shape

    monkeypatch.setattr(Tensor, "__getitem__", getitem)
    monkeypatch.setattr(Tensor, "__setitem__", setitem)


def forbid_others(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every function of another backend fails, and the reference."""

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("another backend was called")

    others = [(op_module(op), name) for name in dir(op_module(op)) if name.endswith("reference")]
    assert others
    for backend in IMPLEMENTATIONS[op].keys() - {"triton"}:
        module = implementation(op, backend)
        others += [(module, name) for name in dir(module) if name.endswith(("forward", "backward"))]
    for module, name in others:
        monkeypatch.setattr(module, name, fail)


def arguments(op: str, dtype: torch.dtype, num_experts: int) -> Iterator[tuple[int, Callable[..., tuple[Any, ...]]]]:
    """(which of BODIES[op], its arguments from the results of the one before)."""

    def new(*size: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(size, dtype=of, device="cuda:1")

    def integers(*size: int) -> Tensor:
        return new(*size, of=torch.int64)

    def wide(*size: int) -> Tensor:
        return new(*size, of=torch.float32)

    x, rows, E = new(N, d), new(N, H, h), num_experts
    order, load = integers(N * k), integers(E)
    if op == "route":
        weight, keep = new(H, E, d), new(N, H, E, of=torch.bool)
        yield 0, lambda: (x, weight, keep, k, True, "triton")
        yield 1, lambda logits, scores, index, *_: (wide(N, H, E), wide(N, H, k), x, weight, scores, index, "triton")
        yield 2, lambda *_: (integers(N, H, k), E, "triton")
    elif op == "sigma_moe":
        tensors = (x, wide(N, k), order, load, new(E, d, G), new(E, G, d))
        yield 0, lambda: (*tensors, "triton")
        yield 1, lambda y, hidden: (new(N, d), *tensors, hidden, "triton")
    elif op == "switchhead_value":
        tensors = (x, wide(N, H, k), integers(N, H, k), integers(H, N * k), integers(H, E), new(H, E, d, h))
        way = "triton", choose_strategy("triton", N, E, k)
        yield 0, lambda: (*tensors, *way)
        yield 1, lambda y, *saved: (new(N, H, h), *tensors, *saved, *way)
    elif op == "switchhead_output":
        tensors = (rows, wide(N, H, k), integers(N, H, k), integers(H, N * k), integers(H, E), new(H, E, h, d))
        way = "triton", choose_strategy("triton", N, E, k)
        yield 0, lambda: (*tensors, *way)
        yield 1, lambda y, *saved: (new(N, d), *tensors, *saved, *way)
    elif op == "expert_linear":
        into, out_of, narrow, gates = new(E, d, h), new(E, h, d), new(N, k, h), wide(N, k)
        yield 0, lambda: (x, order, load, into, k, "triton")
        yield 1, lambda y: (new(N, k, h), x, order, load, into, "triton")
        yield 2, lambda *_: (narrow, gates, order, load, out_of, "triton")
        yield 3, lambda y: (new(N, d), narrow, gates, order, load, out_of, "triton")
    elif op == "relative_attention":
        heads, shared = new(3, 40, H, 12), new(3, 56, 1, 12)
        tensors = heads, heads, shared, shared, new(56, 1, 12)
        yield 0, lambda: (*tensors, "triton")
        yield 1, lambda out, log_sum: (new(3, 40, H, 12), out, log_sum, *tensors, "triton")
    elif op == "causal_attention":
        q, shared = new(3, 40, H, 12).transpose(1, 2), new(3, 1, 56, 12)
        yield 0, lambda: (q, shared, shared, None, None, "triton")
        yield 1, lambda out, log_sum: (new(3, H, 40, 12), out, log_sum, q, shared, shared, None, None, "triton")
        own, ranges = new(3, 40, H, 12).transpose(1, 2), (new(3, 40, of=torch.int32), new(3, 40, of=torch.int32))
        yield 0, lambda *_: (q, own, own, *ranges, "triton")
        yield 1, lambda out, log_sum: (new(3, H, 40, 12), out, log_sum, q, own, own, *ranges, "triton")
    elif op == "linear_cross_entropy":
        yield 0, lambda: (x, new(V, d), new(V), integers(N), -100, True, True, "", 0, "triton")
    elif op == "elementwise":
        place = 0.1, 2**62 + 1, integers(2), 0
        yield 0, lambda: (new(2, N, d), new(2, N, d), *place, d, 0, "triton")
        yield 1, lambda *_: ([2, N, H, E], *place, 3 * H, H, "triton")
        tables, heads = (wide(N, 1, 4), wide(N, 1, 4)), new(2, N, H, h)
        yield 2, lambda *_: (new(2, N, 2 * H, h), None, *tables, H, "triton")
        yield 3, lambda *_: (heads, heads, *tables, True, "triton")
        yield 2, lambda *_: (heads, heads, *tables, 0, "triton")
        yield 3, lambda *_: (heads, heads, *tables, False, "triton")
        rows, row, statistics = new(2, N, d), new(d), (wide(2 * N), wide(2 * N))
        for drawn in ((0.1, 2**62 + 1, integers(2), 0), (0.0, 0, None, 0)):
            yield 4, lambda *_, p=drawn: (rows, rows, row, row, 1e-5, *p, "triton")
            yield 5, lambda *_, p=drawn: (rows, rows, rows, row, *statistics, *p, "triton")
        yield 4, lambda *_: (rows, None, row, row, 1e-5, 0.0, 0, None, 0, "triton")
        yield 5, lambda *_: (rows, None, rows, row, *statistics, 0.0, 0, None, 0, "triton")
        logits, probability = wide(N, E), new(E, of=torch.float64)
        yield 6, lambda *_: (logits, probability, 0.3, "triton")
        yield 7, lambda value, _: (value, logits, probability, 0.3, "triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "op, num_experts",
    [
        *(pytest.param(op, 4, id=f"{op}, half chosen") for op in BACKENDS),
        # By the share of the experts that is chosen, SwitchHead's ops choose their kernels.
        *(pytest.param(op, 8, id=f"{op}, a quarter chosen") for op in BACKENDS if op.startswith("switchhead")),
    ],
)
def test_op_bodies_launch_kernels_and_never_wait(
    op: str, dtype: torch.dtype, num_experts: int, launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = op_module(op)
    forbid_others(op, monkeypatch)
    visited = set()
    with FakeTensorMode(), torch.no_grad():
        results: tuple[Any, ...] = ()
        for body, args_from in arguments(op, dtype, num_experts):
            visited.add(body)
            definition, args = getattr(module, BODIES[op][body]), args_from(*results)
            launches.clear()
            results = definition.body(*args)
            results = results if isinstance(results, tuple) else (results,)
            assert launches, f"{BODIES[op][body]} launched nothing"
            for kernel, tensors in launches:
                assert {str(tensor.device) for tensor in tensors} == {"cuda:1"}, kernel
            assert current_device == [0]
            promised = definition.overload(*args)
            promised = promised if isinstance(promised, tuple) else (promised,)
            for actual, wanted in zip(results, promised, strict=True):
                assert (actual.shape, actual.dtype, actual.device) == (wanted.shape, wanted.dtype, wanted.device)
                assert actual.stride() == wanted.stride()
    assert visited == set(range(len(BODIES[op])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", ["switchhead_value", "switchhead_output"])
def test_dense_launches_kernels_and_never_waits(op: str, dtype: torch.dtype, launches: Launches) -> None:
    """Several chunks of tokens, in half precision with a gradient of the experts that is kept in fp32 between them."""
    module = op_module(op)
    with FakeTensorMode(), torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(gemms, "CHUNK_BYTES", 40 * H * E * h * dtype.itemsize)
        # A product of halves in fp32, for which fake tensors of a CPU build have no answer.
        patch.setattr(gemms, "multiply", lambda a, b, out, add=False: out)
        results: tuple[Any, ...] = ()
        for body, args_from in arguments(op, dtype, E):
            definition = getattr(module, BODIES[op][body])
            *tensors, _, _ = args_from(*results)
            launches.clear()
            results = definition.body(*tensors, "dense", "fused")
            assert len(launches) == -(-N // 40) * (2 if "output_backward" in BODIES[op][body] else 1)
            for kernel, given in launches:
                assert {str(tensor.device) for tensor in given} == {"cuda:1"}, kernel
            promised = definition.overload(*tensors, "dense", "fused")
            for actual, wanted in zip(results, promised, strict=True):
                assert (actual.shape, actual.dtype, actual.device) == (wanted.shape, wanted.dtype, wanted.device)


def test_a_wait_would_be_seen() -> None:
    """What the test above relies on: each way to wait for the GPU fails on a fake CUDA tensor, as there is no value to
    read, or because a build of torch for CPUs cannot choose the device."""
    with FakeTensorMode():
        load = torch.empty(4, dtype=torch.int64, device="cuda")
        reads = "_local_scalar_dense|not linked with support for cuda"
        waits: tuple[tuple[Callable[[], Any], str], ...] = (
            (lambda: load.tolist(), reads),
            (lambda: load.cpu().tolist(), reads),
            (lambda: int(load.sum()), reads),
            (lambda: load.nonzero(), "nonzero|not linked with support for cuda"),
            (lambda: bool(load.any()), reads),
            (lambda: load.numpy(), "numpy"),
        )
        for wait, words in waits:
            with pytest.raises(Exception, match=words):  # torch raises five different types
                wait()


class OpCalls(TorchDispatchMode):
    """Name and backend of every call of our ops."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "switchall":
            bound = {a.name: v for a, v in zip(func._schema.arguments, args, strict=False)} | (kwargs or {})
            self.found.append((func._opname, bound["backend"]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("attention", ["switchhead", "moa", "moa xl"])
def test_a_model_on_cuda_calls_no_operators_of_autograd(prepared: Path, attention: str) -> None:
    overrides = ("model.dropout=0.1", "model.feedforward.expert_dropout=0.1")
    attention, _, position = attention.partition(" ")
    if position == "xl":
        overrides += ("model.position.type=xl", "model.position.memory_chunks=0")
    config = small_config(prepared, *([MOA] if attention == "moa" else []), *overrides).model
    backends = Backends.choose("auto", config, device_type="cuda", dtype=torch.bfloat16)
    dense = {op for op, backend in vars(backends).items() if backend == "dense"}
    of_heads = {"switchhead_value", "switchhead_output"} if attention == "switchhead" else set()
    assert dense == of_heads
    assert {backend for op, backend in vars(backends).items() if op not in dense} == {"triton"}
    with FakeTensorMode(), OpCalls() as calls:  # on the CPU, for autograd; what is called does not depend on it
        model = LanguageModel(config, backends=backends)
        tokens = torch.zeros(2, config.sequence_length, dtype=torch.int64)
        model(tokens, tokens, torch.arange(2))[0].backward()
    own = {"switchhead": {"switchhead_value", "switchhead_output"}, "moa": {"expert_linear", "expert_linear_sum"}}
    both_ways = {"route", "sigma_moe", "relative_attention" if position else "rotate"}
    both_ways |= {"layer_norm", "dropout", "entropy"} | own[attention]
    expected = both_ways | {f"{name}_backward" for name in both_ways} | {"linear_cross_entropy"}
    expected = (expected | {"keep_mask"}) - {"dropout_backward"}
    found = {(name.removesuffix("_added"), backend) for name, backend in calls.found}  # what is after a sum too
    assert {name for name, _ in found} == expected
    for name, backend in found:
        assert backend == ("dense" if name.removesuffix("_backward") in dense else "triton"), name


def test_tensors_that_triton_cannot_take_are_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(8, 16), torch.randn(2, 4, 16)
    route.route(x, weight, 2, backend="triton")
    monkeypatch.setattr("model.kernels.backend.interpreting", lambda: False)
    with pytest.raises(
        RuntimeError, match=r"model\.kernels\.triton\.route got tensors on cpu: it runs on CUDA.*TRITON_INTERPRET=1"
    ):
        route.route(x, weight, 2, backend="triton")
