"""Faults for tests: a trainer in which chosen steps go wrong on one rank."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

import pretrain.loop
import pretrain.segment_start
from common.errors import UserError
from model.layers import Head
from pretrain.config.schema import Config
from pretrain.data.progress import Progress
from pretrain.data.sources import Sources
from pretrain.engine.step_sums import StepSums
from pretrain.resilience.guard import RunFailed
from pretrain.resilience.signals import Stop
from pretrain.trainer import LaunchedStep, StepInput, Trainer


def spoil_gradient(trainer: Trainer, is_wrong: Callable[[], bool]) -> None:
    """One parameter's gradient on this rank is NaN in one element whenever `is_wrong()`; that of an expert which no
    other rank holds, if there are such; of tensor-parallel ranks that of a parameter which all of them hold, and which
    the norm counts on the first alone."""

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        if is_wrong():
            gradient = gradient.clone()
            gradient.view(-1)[0] = math.nan
        return gradient

    parameters = list(trainer.engine.module.parameters())
    own = [parameter for parameter in parameters if not getattr(parameter, "allreduce", True)]
    if trainer.setup.parallel.tensor_size > 1:
        own = own or [parameter for parameter in parameters if not parameter.tensor_model_parallel]
    (own or parameters)[0].register_hook(spoil)


def spoil_loss(trainer: Trainer, is_wrong: Callable[[], bool]) -> None:
    """The loss of this rank's sequences is infinite whenever `is_wrong()`; the gradients do not show it."""

    def spoil(module: Any, inputs: Any, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        first, losses, *rest = output
        return (first, losses + math.inf, *rest) if is_wrong() else output

    heads = [module for module in trainer.engine.module.modules() if isinstance(module, Head)]
    target = heads[0] if trainer.setup.parallel.pipeline_size > 1 else trainer.engine.module
    target.register_forward_hook(spoil)


def train_with(
    rank: int, config: Config, run_dir: Path, prepare: Callable[..., None], *arguments: Any, stop: Stop | None = None
) -> str:
    """Trains with `prepare(trainer, *arguments)` called on every trainer that is built. How it ended."""
    build = pretrain.segment_start.build_trainer

    def build_and_prepare(*args: Any, **options: Any) -> Trainer:
        trainer = build(*args, **options)
        prepare(trainer, *arguments)
        return trainer

    pretrain.segment_start.build_trainer = build_and_prepare
    try:
        code = pretrain.loop.train(config, Sources.load(config), run_dir, torch.device("cpu"), stop)
        return code.name
    except RunFailed as error:
        return f"{error.code.name}: {error}"
    except UserError as error:
        return f"REFUSED: {error}"
    finally:
        pretrain.segment_start.build_trainer = build


def before_steps(trainer: Trainer, function: Callable[[int], None]) -> None:
    """Calls `function(step)`, step from 1, when a step begins."""
    launch = trainer.launch

    def launched(progress: Progress, given: StepInput) -> LaunchedStep:
        function(progress.step + 1)
        return launch(progress, given)

    trainer.launch = launched


def spoil_losses_of_steps(trainer: Trainer, wrong: tuple[int, ...], rank: int) -> None:
    """`spoil_loss` on `rank` in the steps `wrong`."""
    if dist.get_rank() == rank:
        now = [0]
        before_steps(trainer, lambda step: now.__setitem__(0, step))
        spoil_loss(trainer, lambda: now[0] in wrong and trainer.engine.module.training)


def spike_in_steps(trainer: Trainer, steps: tuple[int, ...]) -> None:
    """The losses of `steps` are read as 50 nats too high."""
    reduce, now = trainer.reduce, [0]
    before_steps(trainer, lambda step: now.__setitem__(0, step))

    def spiked(*args: Any, **options: Any) -> SimpleNamespace:
        report, height = reduce(*args, **options), 50.0 * (now[0] in steps)

        def read() -> StepSums:
            sums = report.read()
            return replace(sums, loss=sums.loss + height)

        return SimpleNamespace(read=read)

    trainer.reduce = spiked  # type: ignore[assignment]


def spike_on_position(trainer: Trainer, position: int) -> None:
    """The step of 8 sequences that reads `position` of the data order has a loss 50 nats too high."""
    left_out = {p for first, end in trainer.data.stream._skipped for p in range(first, end)}
    read = [p for p in range(1000) if p not in left_out]
    spike_in_steps(trainer, (read.index(position) // 8 + 1,) if position in read else ())


def outcome(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "outcome.json").read_text())
