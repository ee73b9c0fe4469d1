"""ZeRO 1 with bf16 takes DeepSpeed's ZeRO optimizer: it sums what BF16_Optimizer sums, and sends every gradient
once, most of them before the backward pass ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.config.schema import Config
from pretrain.data.progress import Progress
from pretrain.engine import zero_1
from tests.harness import run_ranks
from tests.pretrain.runs import one_step, small_config, trainer_of

BF16 = ("train.precision=bf16", "parallel.zero=1", "batch.micro_sequences=1")


class Sent(NamedTuple):
    """A collective on gradients."""

    name: str
    elements: int
    dtype: torch.dtype
    gradients: int
    """Gradients of this rank that were known at that time, in the last micro-step."""


class Run(NamedTuple):
    optimizer: str
    losses: list[float]
    norms: list[float]
    weights: torch.Tensor
    sent: list[Sent]
    """Of the last step, on rank 0."""
    parameters: int
    """Number of the model's parameter tensors."""


def traced(rank: int, config: Config, steps: int, patched: bool) -> Run:
    """Trains; with `patched` false by the optimizer that DeepSpeed would choose."""
    if not patched:
        zero_1.is_used = lambda config: False  # this process ends with the test
    trainer = trainer_of(config)
    engine, sent, known = trainer.engine, [], [0]  # type: Any, list[Sent], list[int]
    parameters = list(engine.module.parameters())
    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(lambda _: known.__setitem__(0, known[0] + 1))

    def recorded(name: str, original: Any) -> Any:
        def collective(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if tensor.numel() > 64:  # not the norm, an error flag or a statistic of a router
                sent.append(Sent(name, tensor.numel(), tensor.dtype, known[0] % len(parameters)))
            return original(tensor, *args, **kwargs)

        return collective

    losses, norms, originals = [], [], {name: getattr(dist, name) for name in ("all_reduce", "reduce")}
    for step in range(steps):
        if step == steps - 1:
            for name, original in originals.items():
                setattr(dist, name, recorded(name, original))
        result = one_step(trainer, Progress(step, step * config.batch.global_sequences))
        losses.append(result.sums.loss)
        norms.append(float(result.sums.grad_norm or 0.0))
    for name, original in originals.items():
        setattr(dist, name, original)
    weights = torch.cat([p.detach().float().flatten() for p in parameters])
    found = Run(type(engine.optimizer).__name__, losses, norms, weights, sent, len(parameters))
    engine.destroy()
    return found


def test_sums_of_bf16_optimizer_sent_during_the_backward_pass(prepared: Path) -> None:
    config = small_config(prepared, *BF16, "deepspeed.zero_optimization.reduce_bucket_size=4000")
    ours, plain = (run_ranks(traced, 2, config, 4, patched)[0] for patched in (True, False))
    assert (ours.optimizer, plain.optimizer) == ("DeepSpeedZeroOptimizer", "BF16_Optimizer")
    # The same micro-steps, summed in fp32 in the same order: only the norm is added up in another order.
    assert ours.losses == pytest.approx(plain.losses, rel=1e-4)
    assert ours.norms == pytest.approx(plain.norms, rel=1e-4)
    assert ours.norms[0] == pytest.approx(plain.norms[0], rel=1e-6)

    num = ours.weights.numel()
    assert {part.name for part in plain.sent} == {"all_reduce"} and sum(part.elements for part in plain.sent) >= num
    assert all(part.gradients == 0 for part in plain.sent), "BF16_Optimizer overlaps by now: is this file still needed?"
    assert {(part.name, part.dtype) for part in ours.sent} == {("all_reduce", torch.float32)}
    assert sum(part.elements for part in ours.sent) == num, "every gradient once"
    early = sum(part.elements for part in ours.sent if 0 < part.gradients < ours.parameters)
    assert early > num / 2, f"{early} of {num} elements were sent before the last gradient was known"


class Ops(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func._schema.name)
        return func(*args, **(kwargs or {}))


class _Optimizer:
    use_grad_accum_attribute = True

    def _fill_param_grad_accum_attribute(self, parameter: Any) -> None:
        raise AssertionError


@pytest.mark.parametrize("shape", [(7,), (5, 3), (2, 3, 11)])
def test_a_gradient_joins_the_sum_in_one_pass(shape: tuple[int, ...]) -> None:
    """One op that reads 2 + 4 bytes and writes 4; the values are those of fp32 copies added up."""
    optimizer, parameter = _Optimizer(), torch.nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16))
    zero_1.add_without_a_copy(optimizer)
    parameter.grad_accum = None  # type: ignore[attr-defined]
    optimizer._fill_param_grad_accum_attribute(parameter)  # no gradient: nothing
    assert parameter.grad_accum is None  # type: ignore[attr-defined]
    generator, expected = torch.Generator().manual_seed(3), torch.zeros(shape)
    for micro_step in range(3):
        gradient = torch.randn(shape, generator=generator).bfloat16()
        expected = expected + gradient.float()
        parameter.grad = gradient.clone()
        with Ops() as ops:
            optimizer._fill_param_grad_accum_attribute(parameter)
        assert ops.seen == (["aten::add_"] if micro_step else ["aten::_to_copy"])
        assert parameter.grad is None and torch.equal(parameter.grad_accum, expected)
