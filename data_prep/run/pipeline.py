"""Walks the list of stages up to the one that a command names.

Finished work is skipped, so a command that is repeated, or started again after a kill, goes on where it was.

An array task has a slice of the raw files. It does the last stages over slices: for `dedup` all stages before the
removal of duplicates, for `encode` that stage alone. The stages before them must be finished.
"""

import time
from collections.abc import Sequence
from typing import Any

from common.errors import DataError
from data_prep.run.output_files import publish
from data_prep.run.preparation import Preparation
from data_prep.run.stages import STAGES, Stage
from data_prep.work.parallel import Workers


class Pipeline:
    """The stages of one preparation."""

    def __init__(self, preparation: Preparation, workers: Workers, *, force: bool = False) -> None:
        """`force`: whether foreign files in the output may be replaced."""
        self.preparation = preparation
        self._workers = workers
        self._force = force
        self.seconds: dict[str, float] = {}
        """How long each stage took, for the stages that the config turns on."""

    def run(self, until: str) -> None:
        """Does every stage up to the one of this name, and publishes what that one makes."""
        stages = STAGES[: 1 + next(place for place, stage in enumerate(STAGES) if stage.name == until)]
        before, due = _divided(stages, is_all=self.preparation.slice.is_all)
        for stage in due:
            stage.check(self.preparation)
        for stage in before:
            self._need_done(stage)
        for stage in due:
            started = time.monotonic()
            if tasks := stage.tasks(self.preparation):
                left, finished = list[Any](), list[Any]()
                for task in tasks:
                    (finished if stage.is_done(task) else left).append(task)
                stage.make(left, finished, self._workers)
                stage.finish(self.preparation, tasks)
                self.seconds[stage.name] = time.monotonic() - started
        if stages[-1].publishes is not None and due and due[-1] is stages[-1]:
            publish(stages[-1].publishes(self.preparation), self.preparation.resolved.output, force=self._force)

    def _need_done(self, stage: Stage) -> None:
        """Raises DataError if something of a stage is left to do."""
        if not all(map(stage.is_done, stage.tasks(self.preparation))):
            raise DataError(
                f"{stage.name} is not finished; run the stages before with every --task of --tasks, and those over all "
                "files once"
            )


def _divided(stages: Sequence[Stage], *, is_all: bool) -> tuple[Sequence[Stage], Sequence[Stage]]:
    """(stages that must be finished, stages to do): for an array task the last ones over slices are to do."""
    if is_all:
        return [], stages
    if stages[-1].over == "all":  # what follows when every array task has ended
        stages = stages[:-1]
    begin = max((place + 1 for place, stage in enumerate(stages) if stage.over == "all"), default=0)
    return stages[:begin], stages[begin:]
