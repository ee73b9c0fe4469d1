"""The tasks of a run while it trains: evaluate.tasks, every evaluate.tasks_every_steps and after the last step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from common.errors import Problem, UserError, refuse
from common.progress_bar import phase_progress
from common.strict_json import without_nan
from pretrain.config.schema import Config
from pretrain.data.sources import Sources
from pretrain.engine.micro_steps import Evaluator
from pretrain.evaluation.examples import Encoder
from pretrain.evaluation.likelihood import Limits, Place, learned_context
from pretrain.evaluation.tasks import PreparedTask, TaskResult, find_files
from pretrain.report.monitor import Monitor
from pretrain.saved_model.loading import document_end_of
from pretrain.saved_model.tokenizer import TASK_IS_TEXT, Tokenizer

REMEDY = (
    "remove the task, and compute it from a checkpoint with launch/evaluate.py --context {longest}, which the model "
    "has not learned"
)
"""For a target that is longer than what the model reads in training."""


def check_places(config: Config, problem: Problem = refuse) -> None:
    """A UserError for each task whose files are not there, raised unless `problem` takes it. Reads none of them."""
    for name, given in config.evaluate.tasks.items():
        try:
            _place(name, given)
        except UserError as error:
            problem(error)


def _place(name: str, given: str) -> Path:
    path = find_files(name, given)
    if not path.exists():
        raise UserError(f"evaluate.tasks.{name}: there is no {path}; name the file or folder, or remove the task")
    return path


class RunTasks(NamedTuple):
    """The tasks of a run as ids, on this rank: read once a start."""

    prepared: tuple[PreparedTask, ...]
    every_steps: int
    limits: Limits
    first: int | None = None
    """evaluate.tasks_limit: only the first so many examples of each file. None for all."""

    @classmethod
    def open(cls, config: Config, sources: Sources, problem: Problem = refuse) -> RunTasks:
        """Without the tasks that cannot be computed: a UserError for each, raised unless `problem` takes it."""
        settings = config.evaluate
        if not settings.tasks:
            return NO_TASKS
        first = settings.tasks_limit or None
        tokenizer = Tokenizer(sources.sources[0].manifest)
        end = document_end_of(config, tokenizer)
        limits = Limits(config.batch.micro_sequences, learned_context(config.model), end, REMEDY)
        if not tokenizer.has_text:
            problem(UserError(f"evaluate.tasks: {TASK_IS_TEXT}"))
            return NO_TASKS
        encoder, prepared = Encoder(tokenizer), []
        for name, given in settings.tasks.items():
            try:
                prepared.append(_prepared(name, _place(name, given), encoder, limits, first))
            except UserError as error:
                problem(error)
        return cls(tuple(prepared), settings.tasks_every_steps, limits, first)

    @property
    def digests(self) -> str:
        """By name, for ranks to compare: a node may have copies of the files."""
        return ", ".join(f"{one.task.name} of digest {one.digest[:12]}" for one in self.prepared) or "none"

    def evaluate(
        self,
        evaluator: Evaluator,
        place: Place,
        monitor: Monitor | None,
        step: int,
        goes_on: Callable[[int], bool],
    ) -> None:
        """Computes all tasks after optimizer step `step` and records them; nothing is recorded where `goes_on`, which
        is collective too, asks to stop (see `answer`). Collective."""
        results: list[TaskResult] = []
        for task in self.prepared:
            found = self._evaluate_one(task, evaluator, place, step, goes_on, says=monitor is not None)
            if found is None:
                return
            results.append(found)
        if monitor is None:
            return
        for result in results:
            values = without_nan(result.values)
            monitor.evaluation(step, result.name, values, examples=result.examples, limit=self.first)

    def _evaluate_one(
        self,
        task: PreparedTask,
        evaluator: Evaluator,
        place: Place,
        step: int,
        goes_on: Callable[[int], bool],
        *,
        says: bool,
    ) -> TaskResult | None:
        with phase_progress(f"{task.task.name} after step {step}", "texts", enabled=says) as progress:

            def heard(done: int) -> bool:
                progress(done, len(task.queries))
                return goes_on(done)

            return task.evaluate(evaluator, self.limits, place, goes_on=heard)


def _prepared(name: str, path: Path, encoder: Encoder, limits: Limits, first: int | None) -> PreparedTask:
    try:
        return PreparedTask.of(name, path, encoder, limits, limit=first)
    except UserError as error:
        raise UserError(f"evaluate.tasks.{error}") from None


NO_TASKS = RunTasks((), 0, Limits(1, 1))
