"""When a step's memory of text is kept and when it is forgotten, with stand-ins for all that computes."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from common.paths import REPOSITORY
from model.memory import LayerMemory
from model.parallel.context import ParallelContext
from pretrain.config.loading import load_config
from pretrain.config.schema import Config
from pretrain.data.progress import Progress
from pretrain.late_reading import Stopwatch
from pretrain.trainer import RunSetup, StepInput, Trainer

CPU = torch.device("cpu")


class Steps:
    """A trainer of one stream of chunks of 2 tokens, of which a layer remembers 4."""

    def __init__(self) -> None:
        self.memory = LayerMemory(4)
        self.memory.assign(torch.tensor([0]), 1)
        module: Any = nn.Module()
        module.memory = self.memory
        self.loss, self.begins, self.seen = 0.0, False, list[int]()
        engine: Any = SimpleNamespace(
            module=module, optimizer=SimpleNamespace(param_groups=[{}]), fp16_enabled=lambda: False
        )
        executor: Any = SimpleNamespace(train=self._train, before_update=None)
        data: Any = SimpleNamespace(stream=SimpleNamespace(begins=lambda consumed: self.begins))
        report = SimpleNamespace(read=lambda: SimpleNamespace(loss=self.loss))
        config: Config = load_config(REPOSITORY / "configs" / "switchall_tiny.json")
        nothing: Any = None
        setup = RunSetup(config, nothing, ParallelContext(), CPU)
        self.trainer = Trainer(setup, engine, executor, lambda output, count: report, data, nothing)  # type: ignore[arg-type]

    def _train(self, batches: Any, phases: Any) -> Any:
        context = self.memory.extend(torch.ones(1, 2, 3), torch.tensor([0]))
        self.seen.append(context.shape[1] - 2)
        return SimpleNamespace(grad_norm=torch.ones(()))

    def step(self, loss: float = 1.0, *, begins: bool = False) -> int:
        """How many tokens of memory the step sees."""
        self.loss, self.begins = loss, begins
        self.trainer.launch(Progress(0, 0), StepInput([], None, Stopwatch(CPU), 0.0))
        return self.seen[-1]


def test_memory_grows_and_is_forgotten_where_streams_begin() -> None:
    steps = Steps()
    assert [steps.step() for _ in range(4)] == [0, 2, 4, 4]
    assert steps.step(begins=True) == 0
    assert [steps.step() for _ in range(2)] == [2, 4]


def test_memory_of_a_step_without_a_finite_loss_is_forgotten() -> None:
    """Hidden states that gave no number would spoil every step to come."""
    steps = Steps()
    assert [steps.step(), steps.step(), steps.step(math.nan)] == [0, 2, 4]
    assert [steps.step(), steps.step(math.inf), steps.step(), steps.step()] == [0, 2, 0, 2]
