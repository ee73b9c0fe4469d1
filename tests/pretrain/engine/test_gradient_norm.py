"""The gradient norm, and the sum of squares behind it, against numpy's in fp64."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from model.parallel.context import ParallelContext
from pretrain.config.schema import Config
from pretrain.data.progress import Progress
from pretrain.engine import build
from pretrain.engine.gradient_norm import (
    ROW,
    GradientNorm,
    ask_once,
    deepspeed_norm,
    poisoned_unless_finite,
    see_copies,
    sum_as_we_do,
    sum_of_squares,
)
from tests.harness import run_ranks
from tests.pretrain.runs import light_config, one_step, trainer_of

SHAPES = [(3,), (ROW,), (ROW + 1,), (8000, 128), (7, 11, 513), (2, ROW * 3), ()]


def tensors(dtype: torch.dtype) -> list[torch.Tensor]:
    """Of skewed values, as gradients are: few are large."""
    generator = torch.Generator().manual_seed(3)
    made = [torch.randn(shape, generator=generator).pow(3) * 10.0**-number for number, shape in enumerate(SHAPES)]
    made.append(torch.randn(600, 700, generator=generator).T)  # not contiguous
    made.append(torch.empty(0))
    return [tensor.to(dtype) for tensor in made]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_tensor_counts(dtype: torch.dtype) -> None:
    made = tensors(dtype)
    for chosen in [made, *([tensor] for tensor in made if tensor.numel())]:
        expected = sum(np.square(tensor.double().numpy()).sum() for tensor in chosen)
        found = sum_of_squares(chosen)
        assert found.dtype == torch.float64 and found.shape == ()
        assert float(found) == pytest.approx(expected, rel=2e-7)


def test_torch_s_own_norm_would_not_do() -> None:
    embedding = torch.randn(8000, 512, generator=torch.Generator().manual_seed(0))
    expected = np.square(embedding.double().numpy()).sum()
    assert abs(float(torch.linalg.vector_norm(embedding)) ** 2 / expected - 1) > 1e-5
    assert float(sum_of_squares([embedding])) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e25])
def test_one_value_that_is_not_finite_or_cannot_be_squared_shows(value: float) -> None:
    for place in (0, 5000):
        made = [torch.ones(3), torch.ones(9000)]
        made[1][place] = value
        assert not torch.isfinite(sum_of_squares(made))


@pytest.mark.parametrize("norm", [torch.tensor(2.0), 2.0])
def test_the_norm_is_on_the_device_of_the_sums_wherever_deepspeed_has_it(norm: torch.Tensor | float) -> None:
    """With an offloaded optimizer it is in CPU memory, and a step's sums, which it joins, are on the GPU."""
    optimizer = SimpleNamespace(overflow=False)
    engine = SimpleNamespace(optimizer=optimizer, get_global_grad_norm=lambda: norm)
    assert deepspeed_norm(engine, torch.device("meta")).device.type == "meta"
    assert float(deepspeed_norm(engine, torch.device("cpu"))) == 2.0
    optimizer.overflow = True
    assert deepspeed_norm(engine, torch.device("meta")).device.type == "meta"
    assert float(deepspeed_norm(engine, torch.device("cpu"))) == float("inf")


def engine(*, zero: int) -> Any:
    """A divided parameter of gradient norm 4, a whole one of norm 3, and one without a gradient; DeepSpeed says 7."""
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    for parameter, is_divided in zip(parameters, (True, False, False), strict=True):
        parameter.tensor_model_parallel = is_divided  # type: ignore[attr-defined]
    parameters[0].grad, parameters[1].grad = torch.tensor([0.0, 4.0]), torch.tensor([3.0, 0.0])
    return SimpleNamespace(
        module=SimpleNamespace(parameters=lambda: iter(parameters)),
        optimizer=SimpleNamespace(overflow=False),
        zero_optimization_stage=lambda: zero,
        get_global_grad_norm=lambda: 7.0,
    )


@pytest.mark.parametrize(
    "zero, tensor_rank, clip_norm, norm, factor",
    [
        # Another tensor-parallel rank has a part of norm 12, and the same whole parameter, which the first rank counts.
        (0, 0, 6.5, 13.0, 0.5),
        (0, 1, 6.5, 13.0, 0.5),
        (0, None, 2.5, 5.0, 0.5),
        (0, None, 0.5, 5.0, 0.1),
        (0, None, 0.0, 5.0, 1.0),  # no clipping
        (0, None, 9.0, 5.0, 1.0),  # smaller gradients stay as they are
        (1, None, 2.5, 7.0, 1.0),  # DeepSpeed clips
    ],
)
def test_gradients_are_clipped_to_the_norm_of_all_parts_where_deepspeed_does_not(
    zero: int, tensor_rank: int | None, clip_norm: float, norm: float, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = {0: 144.0, 1: 153.0, None: 0.0}[tensor_rank]
    monkeypatch.setattr(dist, "all_reduce", lambda squares, group: squares.add_(others))
    group: Any = "the two ranks"
    parallel = ParallelContext()
    if tensor_rank is not None:
        parallel = ParallelContext(tensor_rank=tensor_rank, tensor_size=2, tensor_group=group)
    found = engine(zero=zero)
    of_step = GradientNorm(found, clip_norm, parallel)
    of_step.before_step()
    assert float(of_step.value(torch.device("cpu"))) == norm
    divided, whole, none = (parameter.grad for parameter in found.module.parameters())
    torch.testing.assert_close(divided, torch.tensor([0.0, 4.0 * factor]))
    torch.testing.assert_close(whole, torch.tensor([3.0 * factor, 0.0]))
    assert none is None


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_makes_every_gradient_nan_and_another_changes_nothing(wrong: float) -> None:
    for own, losses in ((0.3, [1.0, 2.0]), (wrong, [1.0, 2.0]), (0.3, [1.0, wrong])):
        weights = torch.tensor([0.1, 1.7], requires_grad=True)
        objective = weights.square().sum() + own
        poisoned = poisoned_unless_finite(objective, torch.tensor(losses))
        poisoned.backward()
        assert weights.grad is not None
        if np.isfinite([own, *losses]).all():
            assert torch.equal(poisoned, objective) and torch.equal(weights.grad, 2.0 * weights)
        else:
            assert weights.grad.isnan().all()


class Questions(TorchDispatchMode):
    """How often the host asks for a number of the device."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.asked += func._opname == "_local_scalar_dense"
        return func(*args, **(kwargs or {}))


def updates(rank: int, config: Config, left_out: str = "") -> tuple[list[tuple[int, int]], list[Any], torch.Tensor]:
    """Of four optimizer steps, the second of whose gradients is not finite in one value: questions and small tensors
    copied to the device while the optimizer steps; losses, norms and whether it skipped; and the weights."""
    if left_out:
        assert callable(getattr(build, left_out))
        setattr(build, left_out, lambda optimizer, **options: None)  # this process ends with the test
    trainer = trainer_of(config)
    optimizer, seen, found = trainer.engine.optimizer, [], []
    step, tensor = optimizer.step, torch.tensor
    made: list[Any] = []

    def noted(*values: Any, **options: Any) -> torch.Tensor:
        made.append(values)
        return tensor(*values, **options)

    def stepping() -> Any:
        if len(seen) == 1 and rank == 0:
            optimizer.averaged_gradients[0][0].view(-1)[0] = math.inf
        with (
            Questions() as questions,
            mock.patch.object(torch, "tensor", noted),
        ):
            made.clear()
            result = step()
        seen.append((questions.asked, len(made)))
        return result

    optimizer.step = stepping
    for number in range(4):
        sums = one_step(trainer, Progress(number, number * config.batch.global_sequences)).sums
        found.append((sums.loss, sums.grad_norm, optimizer.overflow))
    return seen, found, torch.cat([p.detach().float().flatten() for p in trainer.engine.module.parameters()])


def updated(prepared: Path, ranks: int, precision: str, zero: int, left_out: str = "") -> Any:
    """What `updates` gives on rank 0."""
    keys = f"train.precision={precision}", f"parallel.zero={zero}", "batch.micro_sequences=4"
    config = light_config(prepared, *keys)  # one rank adds up two micro-steps, and asks once for both
    return run_ranks(updates, ranks, config, left_out)[0]


@pytest.fixture(scope="module")
def ours(prepared: Path) -> Callable[[int, str, int], Any]:
    """`updated` with nothing left out, once for each layout."""
    return functools.cache(lambda ranks, precision, zero: updated(prepared, ranks, precision, zero))


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("precision, zero", [("bf16", 1), ("fp32", 1), ("fp32", 2)])
def test_the_host_asks_deepspeed_s_optimizer_once_a_step(
    prepared: Path, ours: Callable[[int, str, int], Any], ranks: int, precision: str, zero: int
) -> None:
    """And every number is what it was, also where an update is skipped because one value on one rank is not finite."""
    seen, found, weights = ours(ranks, precision, zero)
    before, expected, expected_weights = updated(prepared, ranks, precision, zero, "ask_once")
    assert seen == [(1, 0)] * 4
    assert all(asked > 1 for asked, _ in [before[0], *before[2:]]), "DeepSpeed asks less by now"
    assert found == expected and torch.equal(weights, expected_weights)
    assert [skipped for _, _, skipped in found] == [False, True, False, False]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("precision, zero", [("bf16", 1), ("fp32", 2)])
def test_deepspeeds_norm_is_summed_in_one_reading(
    prepared: Path, ours: Callable[[int, str, int], Any], ranks: int, precision: str, zero: int
) -> None:
    """And is DeepSpeed's own to 1e-6 of it, which copies every gradient to fp64."""
    seen, found, weights = ours(ranks, precision, zero)
    before, expected, expected_weights = updated(prepared, ranks, precision, zero, "sum_as_we_do")
    assert all(made == 0 for _, made in seen) and all(made > 0 for _, made in before), "DeepSpeed copies less by now"
    assert [skipped for _, _, skipped in found] == [skipped for _, _, skipped in expected]
    for row in (0, 2, 3):
        assert found[row][:2] == pytest.approx(expected[row][:2], rel=1e-6 if row < 2 else 1e-4)
    torch.testing.assert_close(weights, expected_weights, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_parallel_rank", [0, 1])
def test_of_a_group_each_parameter_counts_once_and_no_padding(
    model_parallel_rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand: one divided parameter, one whole one, and one that the first stage counts; padding before, between and
    behind them, of numbers that would show."""
    monkeypatch.setattr(dist, "all_reduce", lambda squares, group: squares.add_({"data": 100.0}[group]))
    optimizer: Any = SimpleNamespace(
        device=torch.device("cpu"),
        dp_process_group="data",
        model_parallel_rank=model_parallel_rank,
        get_grad_norm_direct=print,
        scaled_global_norm=print,
        _model_parallel_all_reduce=lambda tensor, op: tensor.add_({dist.ReduceOp.SUM: 1000.0}[op]),
    )
    sum_as_we_do(optimizer)
    divided, whole, replicated = (torch.nn.Parameter(torch.zeros(2)) for _ in range(3))
    divided.tensor_model_parallel, replicated.ds_pipe_replicated = True, True  # type: ignore[attr-defined]
    replicated.tensor_model_parallel = True  # type: ignore[attr-defined]
    padding = torch.tensor([64.0, 64.0])
    padding._zero_padding = True  # type: ignore[attr-defined]
    own = torch.tensor([2.0, 1.0]), torch.tensor([3.0, 5.0]), torch.tensor([7.0, 7.0])
    given = [padding, own[0], padding, own[1], own[2], padding]

    def norm(*parameters: torch.nn.Parameter, gradients: list[torch.Tensor] = given) -> float:
        return float(optimizer.get_grad_norm_direct(gradients, iter(parameters)))

    counted = 5.0 + (34.0 if model_parallel_rank == 0 else 0.0)
    assert norm(divided, whole, replicated) == pytest.approx(math.sqrt(counted + 1100.0), rel=1e-7)
    assert norm(gradients=[padding]) == pytest.approx(math.sqrt(1100.0), rel=1e-7)
    own[0][1] = math.inf
    assert norm(divided, whole, replicated) == -1.0


def waits(rank: int, config: Config) -> int:
    """How often DeepSpeed's engine waits for all that a GPU has queued, in five steps of two micro-steps."""
    from deepspeed.accelerator import get_accelerator

    trainer, waited = trainer_of(config), []
    with mock.patch.object(get_accelerator(), "synchronize", lambda device=None: waited.append(device)):
        for number in range(5):
            one_step(trainer, Progress(number, number * config.batch.global_sequences))
    return len(waited)


@pytest.mark.parametrize(
    "zero", [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(2, marks=pytest.mark.slow), 3]
)
def test_the_host_queues_micro_steps_in_advance(prepared: Path, zero: int) -> None:
    """From the third step on DeepSpeed's throughput timer, which prints nothing here, would wait for the GPU before
    each forward pass and after each backward pass."""
    config = light_config(prepared, f"parallel.zero={zero}", "batch.micro_sequences=4")
    assert run_ranks(waits, 1, config) == [0]


@pytest.mark.parametrize("layout", ["has_moe_layers", "mpu", "cpu_offload"])
def test_where_the_norm_does_not_tell_the_values_are_asked(layout: str) -> None:
    plain = {"has_moe_layers": False, "mpu": None, "cpu_offload": False}
    methods = dict.fromkeys(("check_overflow", "unscale_and_clip_grads"), print)
    ordinary, other = SimpleNamespace(**plain, **methods), SimpleNamespace(**(plain | {layout: True}), **methods)
    ask_once(ordinary)
    ask_once(other)
    assert vars(other).items() >= methods.items() and print not in vars(ordinary).values()


@pytest.mark.parametrize("has_divided", [True, False])
@pytest.mark.parametrize("model_parallel_rank", [0, 1])
@pytest.mark.parametrize("wrong", [1.0, math.nan, math.inf])
def test_a_copy_that_no_norm_counts_shows_where_it_is_not_finite(
    has_divided: bool, model_parallel_rank: int, wrong: float
) -> None:
    """DeepSpeed's norm of ZeRO 3, written down; the numbers are the same, and no gradient is changed."""

    def norm(gradients: list[torch.Tensor], parameters: list[Any], norm_type: int = 2) -> float:
        counted = [
            gradient.double().norm(norm_type)
            for gradient, parameter in zip(gradients, parameters, strict=True)
            if parameter.tensor_model_parallel or model_parallel_rank == 0
        ]
        return float(torch.stack(counted).square().sum().sqrt()) if counted else 0.0

    optimizer: Any = SimpleNamespace(
        model_parallel_rank=model_parallel_rank, offload_optimizer=False, get_grad_norm_direct=norm
    )
    see_copies(optimizer)
    parameters = [
        SimpleNamespace(tensor_model_parallel=divided) for divided in (False, has_divided, has_divided, False)
    ]
    generator = torch.Generator().manual_seed(3)
    gradients = [torch.randn(size, generator=generator).bfloat16() for size in (3, 600, 7, 5)]
    gradients[3][2] = wrong
    before = [gradient.clone() for gradient in gradients]
    found, plain = optimizer.get_grad_norm_direct(gradients, parameters), norm(gradients, parameters)
    assert found == plain if wrong == 1.0 else not math.isfinite(found)
    assert [parameter.tensor_model_parallel for parameter in parameters] == [False, has_divided, has_divided, False]
    for one, other in zip(gradients, before, strict=True):
        torch.testing.assert_close(one, other, rtol=0.0, atol=0.0, equal_nan=True)
