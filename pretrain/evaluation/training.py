"""The tasks of a run while it trains: evaluate.tasks, every evaluate.tasks_every_steps and after the last step."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from common.errors import Problem, UserError, refuse
from common.strict_json import without_nan
from pretrain.config.schema import Config
from pretrain.data.sources import Sources
from pretrain.engine.micro_steps import Evaluator
from pretrain.evaluation.examples import Encoder
from pretrain.evaluation.likelihood import Limits, Place, learned_context
from pretrain.evaluation.tasks import PreparedTask, TaskResult, find_files
from pretrain.report.monitor import Monitor
from pretrain.saved_model.tokenizer import Tokenizer


def check_places(config: Config, problem: Problem = refuse) -> None:
    """A UserError for each task whose files are not there, raised unless `problem` takes it. Reads none of them."""
    for name, given in config.evaluate.tasks.items():
        path = find_files(name, given)
        if not path.exists():
            problem(
                UserError(f"evaluate.tasks.{name}: there is no {path}; name the file or folder, or remove the task")
            )


class RunTasks(NamedTuple):
    """The tasks of a run as ids, on this rank: read once a start."""

    prepared: tuple[PreparedTask, ...]
    every_steps: int
    limits: Limits
    first: int | None = None
    """evaluate.tasks_limit: only the first so many examples of each file. None for all."""

    @classmethod
    def open(cls, config: Config, sources: Sources) -> RunTasks:
        """Raises UserError."""
        settings = config.evaluate
        if not settings.tasks:
            return NO_TASKS
        limits = Limits(config.batch.micro_sequences, learned_context(config.model))
        first = settings.tasks_limit or None
        tokenizer = Tokenizer(sources.sources[0].manifest)
        try:
            encoder = Encoder(tokenizer)
            prepared = [
                PreparedTask.of(name, find_files(name, given), encoder, limit=first)
                for name, given in settings.tasks.items()
            ]
            for task in prepared:
                task.check(limits)
        except UserError as error:
            raise UserError(f"evaluate.tasks{'.' if tokenizer.has_text else ': '}{error}") from None
        return cls(tuple(prepared), settings.tasks_every_steps, limits, first)

    def evaluate(
        self,
        evaluator: Evaluator,
        place: Place,
        monitor: Monitor | None,
        step: int,
        goes_on: Callable[[int], bool],
    ) -> None:
        """Computes all tasks after optimizer step `step` and records them; nothing is recorded where `goes_on`, which
        is collective too, asks to stop (see `answer`). Collective. Raises UserError."""
        results: list[TaskResult] = []
        for task in self.prepared:
            found = task.evaluate(evaluator, self.limits, place, goes_on=goes_on)
            if found is None:
                return
            results.append(found)
        if monitor is None:
            return
        for result in results:
            values = without_nan(result.values)
            monitor.evaluation(step, result.name, values, examples=result.examples, limit=self.first)


NO_TASKS = RunTasks((), 0, Limits(1, 1))
