"""The list of tasks, and what a run's tokenizer and model make of one."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from common.paths import find_input
from pretrain.engine.micro_steps import Evaluator
from pretrain.evaluation.blimp import BLIMP
from pretrain.evaluation.cbt import CBT
from pretrain.evaluation.examples import Answer, Encoder, Example, Query, Task, limited
from pretrain.evaluation.lambada import LAMBADA
from pretrain.evaluation.likelihood import Answers, Limits, Place, answer, check_lengths

TASKS = {task.name: task for task in (LAMBADA, BLIMP, CBT)}
RAW = "raw"
"""Folder that a task's files are looked for in, unless a place is named: raw/lambada, raw/blimp, raw/cbt."""


def find_files(name: str, given: str | None) -> Path:
    """The place of a task's files: as named, below the current directory or the repository."""
    return find_input(given or f"{RAW}/{name}")


@dataclass(frozen=True)
class TaskResult:
    name: str
    values: dict[str, float]
    """accuracy (with groups: the mean of theirs) and, for a task that has one, perplexity: exp of minus the mean
    log-likelihood of a target. NaN where the model's numbers are not finite."""
    groups: dict[str, dict[str, float]]
    """accuracy and examples of each group, by name; empty if there are none."""
    examples: int
    left_out: int
    """Questions of the files that the protocol cannot ask."""
    cut: int
    """Texts whose beginning was cut off."""


@dataclass(frozen=True)
class PreparedTask:
    """A task as ids of one tokenizer."""

    task: Task
    examples: list[Example]
    queries: list[Query]
    """Those of all examples, one after the other."""
    left_out: int

    @classmethod
    def of(
        cls,
        name: str,
        path: Path,
        encoder: Encoder,
        limits: Limits,
        *,
        limit: int | None,
        shown: Callable[[list[Example]], Iterable[Example]] = lambda examples: examples,
    ) -> PreparedTask:
        """Reads the files at `path`. `limit`: examples of each group. `shown` may draw a progress bar. Raises
        UserError, also for a target that is longer than the context."""
        task = TASKS[name]
        try:
            found = task.read(path)
            examples = limited(found.examples, limit)
            queries = [query for example in shown(examples) for query in encoder.of_example(example)]
            check_lengths(queries, limits)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
        return cls(task, examples, queries, found.left_out)

    @property
    def digest(self) -> str:
        """Of all ids: ranks with other ones would compute together what does not belong together."""
        found = hashlib.sha256()
        for part in (part for query in self.queries for part in query):
            found.update(len(part).to_bytes(8, "little") + part.tobytes())
        return found.hexdigest()

    def evaluate(
        self,
        evaluator: Evaluator,
        limits: Limits,
        place: Place,
        *,
        goes_on: Callable[[int], bool] = lambda done: True,
    ) -> TaskResult | None:
        """Collective; see `answer`."""
        found = answer(evaluator, self.queries, limits, place, goes_on=goes_on)
        return None if found is None else self._result(found)

    def _result(self, found: Answers) -> TaskResult:
        right: dict[str, list[bool]] = {}
        answers, first_answers = iter(found.answers), list[Answer]()
        for example in self.examples:
            own = [next(answers) for _ in example.targets]
            right.setdefault(example.group, []).append(self.task.is_right(own))
            first_answers.append(own[0])
        groups = {name: {"accuracy": _mean(hits), "examples": len(hits)} for name, hits in sorted(right.items())}
        values = {"accuracy": _mean([group["accuracy"] for group in groups.values()])}
        if self.task.has_perplexity:
            loss = -_mean([own.log_likelihood for own in first_answers])
            values["perplexity"] = math.exp(min(loss, 700.0))
        if not all(math.isfinite(one.log_likelihood) for one in found.answers):
            values = dict.fromkeys(values, math.nan)
        return TaskResult(
            self.task.name,
            values,
            {} if list(groups) == [""] else groups,
            len(self.examples),
            self.left_out,
            found.cut,
        )


def _mean(values: list[float] | list[bool]) -> float:
    return math.fsum(values) / len(values)
