"""benchmarks/gpu/timing.py: between the two events stands the op alone.

A clock that writes down the order of its calls, and a dispatch mode that writes every operator into the same list.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import op_cases
from benchmarks.gpu import timing
from benchmarks.gpu.timing import Times, Work, backward_of, draw, forward_of, measure, number_of_sets, times
from model.kernels.backend import BACKENDS
from tests.benchmarks.gpu.cases import CASES, CPU, NAMES

VIEWS = {"detach", "alias", "view", "transpose"}
"""Operators without a kernel."""


class Log(TorchDispatchMode):
    """Every operator, and what `FakeClock` does, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._opname not in VIEWS:
            self.lines.append(f"{func.namespace}.{func._opname}")
        return func(*args, **(kwargs or {}))


class FakeClock:
    """The n-th reading is n milliseconds."""

    l2_bytes = 1000

    def __init__(self, log: Log) -> None:
        self.log, self.waited, self.readings = log, False, 0

    def draw_on(self) -> Any:
        return contextlib.nullcontext()

    def capture(self, work: Work) -> Work:
        self.log.lines.append("capture")
        work()
        return work

    def hold(self) -> None:
        self.log.lines.append("hold")

    def flush(self) -> None:
        self.log.lines.append("flush")

    def timed(self, replay: Work) -> Callable[[], float]:
        self.log.lines.append("start")
        replay()
        self.log.lines.append("end")
        self.waited, self.readings = False, self.readings + 1
        return partial(self._read, float(self.readings))

    def _read(self, milliseconds: float) -> float:
        assert self.waited, "read before the device was done"
        return milliseconds

    def wait(self) -> None:
        self.log.lines.append("wait")
        self.waited = True


def timed_regions(lines: list[str]) -> Iterator[list[str]]:
    """What stands between a start and its end."""
    while "start" in lines:
        begin, end = lines.index("start"), lines.index("end")
        yield lines[begin + 1 : end]
        lines = lines[end + 1 :]


@pytest.mark.parametrize("build", CASES, ids=NAMES)
def test_the_op_alone_is_timed(build: op_cases.Build) -> None:
    sets = [draw(build, CPU, torch.float32, seed) for seed in range(2)]
    op = sets[0].case.op
    backend = "cpu" if "cpu" in BACKENDS[op] else "triton"
    with Log() as log:
        clock = FakeClock(log)
        measure(clock, [forward_of(inputs, backend) for inputs in sets], 3)
        forward = [*log.lines]
        log.lines.clear()
        works = [backward_of(inputs, backend, clock) for inputs in sets]
        before = len(log.lines)
        measure(clock, works, 3)
        backward = log.lines[before:]
    for lines, words in ((forward, "no backward"), (backward, "backward")):
        assert [line for line in lines if "." not in line] == [
            "capture", "capture", "flush", "wait", "hold", *["flush", "start", "end"] * 3, "wait",
        ]  # fmt: skip
        regions = list(timed_regions(lines))
        assert len(regions) == 3 and all(regions)
        for region in regions:
            assert all(line.startswith(f"switchall.{op}") or line in PLAIN.get(op, ()) for line in region), region
            assert all(line.endswith("_backward") == (words == "backward") for line in region if line[0] == "s")


DROPOUT = ("_to_copy", "__rshift__", "add", "arange", "bitwise_and_", "bitwise_xor", "bitwise_xor_", "div", "div_")
DROPOUT = (*DROPOUT, "ge", "mul", "mul_", "split", "unsqueeze")
ENTROPY = ("clamp_min", "detach", "exp", "expand", "log", "_log_softmax", "_log_softmax_backward_data", "mean")
ENTROPY = (*ENTROPY, "_softmax", "sum")
ROTATE = ("cat", "neg", "slice", "slice_backward", "sub")
PLAIN = {
    "linear_cross_entropy": {"aten.mul", "aten._to_copy"},
    "expert_linear": {"aten.add"},
    "elementwise": {
        f"aten.{name}" for name in (*DROPOUT, *ENTROPY, *ROTATE, "native_layer_norm", "native_layer_norm_backward")
    },
}
"""The loss makes its gradients in the forward pass, and the backward pass multiplies them. MoA's case gives the queries
too, which the output projection takes: two gradients are added. On a CPU dropout, RoPE, LayerNorm and the entropy
regulariser are plain operators."""


class Devices(TorchDispatchMode):
    """Where every operator leaves its result."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.found |= {t.device.type for t in tree_leaves(result) if isinstance(t, torch.Tensor)}
        return result


@pytest.mark.parametrize("build", CASES, ids=NAMES)
def test_inputs_and_upstream_gradients_are_drawn_on_the_device(build: op_cases.Build) -> None:
    """The device is torch's meta here: a tensor of the host would show."""
    with Devices() as devices:
        inputs = draw(build, torch.device("meta"), torch.bfloat16, 0)
    assert devices.found == {"meta"}
    assert all(t.device.type == "meta" for t in [*inputs.tensors.values(), *inputs.upstream])
    for name in inputs.case.leaves:
        assert inputs.tensors[name].dtype == (torch.float32 if name in ("scores", "logits") else torch.bfloat16)


def test_two_draws_differ_and_a_seed_repeats() -> None:
    build = partial(op_cases.loss_case, 20, 8, 30)
    first, again, other = (draw(build, CPU, torch.float32, seed) for seed in (1, 1, 2))
    assert torch.equal(first.tensors["hidden"], again.tensors["hidden"])
    assert not torch.equal(first.tensors["hidden"], other.tensors["hidden"])


def test_every_set_of_inputs_is_drawn_anew() -> None:
    """So are upstream gradients, which are no ones: of those a wrong sum may be a right one."""
    build = partial(op_cases.sigma_moe_case, 20, 8, 4, 2, 8)
    sets = timing.draw_sets(build, CPU, torch.bfloat16, 10 << 20, tiny=False)
    assert len(sets) == 8
    for tensors in ([s.tensors["x"] for s in sets], [s.tensors["index"] for s in sets], [s.upstream[0] for s in sets]):
        assert not any(torch.equal(one, other) for one, other in itertools.combinations(tensors, 2))
    assert all(0.5 < float(s.upstream[0].float().std()) < 2.0 for s in sets)


@pytest.mark.parametrize("dtype, scale", [(torch.float16, 65536.0), (torch.bfloat16, 1.0), (torch.float32, 1.0)])
def test_losses_are_scaled_in_fp16_alone(dtype: torch.dtype, scale: float) -> None:
    """As in training: what a mean's gradients divided by the tokens are would be zeros in fp16."""
    (plain,) = draw(partial(op_cases.loss_case, 20, 8, 30), CPU, torch.float32, 3).upstream
    (found,) = draw(partial(op_cases.loss_case, 20, 8, 30), CPU, dtype, 3).upstream
    assert float(found) == pytest.approx(scale * float(plain), rel=1e-2)
    (rows,) = draw(partial(op_cases.sigma_moe_case, 20, 8, 4, 2, 8), CPU, dtype, 0).upstream
    assert float(rows.float().std()) < 2.0


def test_readings_become_a_median_with_its_spread() -> None:
    with Log() as log:
        found = measure(FakeClock(log), [lambda: None], 20)
    assert found == Times(median=10.5, low=3.0, high=18.0, rounds=20)
    assert times([3.0, 1.0, 2.0]) == Times(median=2.0, low=1.0, high=3.0, rounds=3)


def test_rounds_rotate_through_the_inputs() -> None:
    called: list[int] = []
    with Log() as log:
        measure(FakeClock(log), [partial(called.append, number) for number in range(3)], 5)
    # Captures, then once each, then the rounds.
    assert called == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1]


def test_so_many_sets_that_the_cache_has_lost_the_first() -> None:
    inputs = draw(partial(op_cases.loss_case, 20, 8, 30), CPU, torch.float32, 0)
    held = sum(t.numel() * t.element_size() for t in inputs.tensors.values())
    assert [number_of_sets(inputs, l2) for l2 in (1, held, 10 * held)] == [2, 4, 8]
    assert timing.clock_of(CPU).l2_bytes == 1
