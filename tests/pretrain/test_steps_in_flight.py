"""Scalars of a step are read after the next one is launched, and nothing is made of a step before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import pretrain.segment
from common.errors import UserError
from model.parallel.context import ParallelContext
from pretrain.config.schema import Config
from pretrain.data.progress import Progress
from pretrain.engine.gradient_norm import GradientNorm
from pretrain.parallel.agreement import PeerFailed
from pretrain.resilience.control import Control
from pretrain.trainer import LaunchedStep, Trainer
from tests.harness import run_ranks
from tests.pretrain.resilience.faults import train_with
from tests.pretrain.runs import light_config, metrics

DUE = ("train.steps=7", "evaluate.sequences=8", "evaluate.every_steps=3", "checkpoint.every_steps=4")


def logged_run(rank: int, config: Config, run_dir: Path) -> list[str]:
    """What rank 0 does, in order."""
    log: list[str] = []
    agree, read, validate = Control.agree, LaunchedStep.read, pretrain.segment.validate
    numbers: dict[int, int] = {}

    def agreeing(self: Control, *arguments: Any, **options: Any) -> Any:
        log.append("message")
        return agree(self, *arguments, **options)

    def reading(self: LaunchedStep) -> Any:
        log.append(f"read {numbers[id(self)]}")
        return read(self)

    def validating(trainer: Any, monitor: Any, step: int, **options: Any) -> Any:
        log.append(f"validate {step}")
        return validate(trainer, monitor, step, **options | {"stopping": lambda: False})

    def prepare(trainer: Trainer) -> None:
        launch, save, compare = trainer.launch, trainer.saver.save, pretrain.segment.ReplicaCheck.__call__

        def launching(progress: Progress, given: Any) -> LaunchedStep:
            log.append(f"launch {progress.step + 1}")
            launched = launch(progress, given)
            numbers[id(launched)] = progress.step + 1
            return launched

        def saving(folder: Path, progress: Progress, **options: Any) -> None:
            log.append(f"save {progress.step}")
            save(folder, progress, **options)

        def comparing(self: Any) -> Any:
            log.append("compare")
            return compare(self)

        trainer.launch, trainer.saver.save = launching, saving
        pretrain.segment.ReplicaCheck.__call__ = comparing

    Control.agree, LaunchedStep.read, pretrain.segment.validate = agreeing, reading, validating
    assert train_with(rank, config, run_dir, prepare) == "FINISHED"
    return log


def test_each_step_is_read_after_the_next_launch_and_before_anything_is_made_of_it(
    prepared: Path, tmp_path: Path
) -> None:
    log, other = run_ranks(logged_run, 2, light_config(prepared, *DUE, ranks=2), tmp_path)
    assert log == other
    step_3 = ["message", "validate 3", "message"]  # the last: whether to stop, before it goes on
    step_4 = ["message", "compare", "save 4"]
    step_6 = ["message", "validate 6", "message"]
    step_7 = ["message", "compare", "validate 7", "message", "save 7", "message"]
    assert log == [
        *("message", "message", "launch 1"),  # the first: before the checkpoint is chosen
        *("message", "launch 2", "read 1"),
        *("message", "launch 3", "read 2", "read 3", *step_3),
        *("message", "launch 4", "read 4", *step_4),
        *("message", "launch 5"),
        *("message", "launch 6", "read 5", "read 6", *step_6),
        *("message", "launch 7", "read 7", *step_7),
    ], "\n".join(log)
    assert [row["step"] for row in metrics(tmp_path)] == list(range(1, 8))


def test_a_run_that_goes_back_on_spikes_reads_each_step_before_the_next(prepared: Path, tmp_path: Path) -> None:
    keys = ("train.steps=3", "evaluate.sequences=0", "resilience.spike_action=rollback")
    log, _ = run_ranks(logged_run, 2, light_config(prepared, *keys, ranks=2), tmp_path)
    in_order = [word for word in log if word.startswith(("launch", "read"))]
    assert in_order == ["launch 1", "read 1", "launch 2", "read 2", "launch 3", "read 3"]


def fail_to_read(trainer: Trainer, step: int) -> None:
    take, size = trainer.data.prefetcher.take, trainer.setup.config.batch.global_sequences

    def taking(consumed: int) -> Any:
        if dist.get_rank() == 1 and consumed == (step - 1) * size:
            raise UserError("data: a shard is damaged")
        return take(consumed)

    trainer.data.prefetcher.take = taking


def test_a_rank_without_a_batch_stops_all_after_the_step_before_is_written(prepared: Path, tmp_path: Path) -> None:
    keys = ("train.steps=6", "evaluate.sequences=0", "checkpoint.every_steps=4")
    config = light_config(prepared, *keys, ranks=2)
    endings = run_ranks(_leave_on_error, 2, config, tmp_path)
    assert endings == ["PeerFailed", "REFUSED: data: a shard is damaged"]
    assert [row["step"] for row in metrics(tmp_path)] == [1, 2]


def _leave_on_error(rank: int, config: Config, run_dir: Path) -> str:
    try:
        return train_with(rank, config, run_dir, fail_to_read, 3)
    except PeerFailed:
        return "PeerFailed"


class NoReading(TorchDispatchMode):
    """Refuses whatever makes the host wait for a number of the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "the host reads a number"
        return func(*args, **kwargs or {})


class Engine:
    """As much of DeepSpeed's engine as ZeRO 0 needs."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.module = torch.nn.Linear(5, 3)
        for parameter in self.module.parameters():
            parameter.tensor_model_parallel = False  # type: ignore[attr-defined]
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=0.1, fused=True)

    def zero_optimization_stage(self) -> int:
        return 0

    def update(self, norm: GradientNorm, scale: float) -> torch.Tensor:
        set_gradients(self.module, scale)
        norm.before_step()
        self.optimizer.step()
        return norm.value(torch.device("cpu"))

    def state(self) -> list[torch.Tensor]:
        moments = [value for state in self.optimizer.state.values() for value in state.values()]
        return [tensor.detach().clone() for tensor in [*self.module.parameters(), *moments]]


def set_gradients(module: torch.nn.Module, scale: float) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator) * scale


def test_gradients_that_are_not_finite_are_dropped_without_the_host() -> None:
    engine = Engine()
    norm = GradientNorm(engine, 0.5, ParallelContext())
    assert torch.isfinite(engine.update(norm, 1.0))
    before = engine.state()
    for wrong in (float("nan"), float("inf")):
        with NoReading():
            assert not torch.isfinite(engine.update(norm, wrong)).numpy()
        assert all(torch.equal(a, b) for a, b in zip(engine.state(), before, strict=True))
    engine.update(norm, 1.0)
    expected = Engine()
    expected.optimizer = torch.optim.AdamW(expected.module.parameters(), lr=0.1, foreach=False)
    for _ in range(2):
        set_gradients(expected.module, 1.0)
        torch.nn.utils.clip_grad_norm_(expected.module.parameters(), 0.5)
        expected.optimizer.step()
    for own, other in zip(engine.state(), expected.state(), strict=True):
        torch.testing.assert_close(own, other)
