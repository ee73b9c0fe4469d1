"""The steps from one start on: launch, read, judge the result, validate, save."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from common.strict_json import finite
from common.tables import counted
from pretrain.data.progress import Progress
from pretrain.device import memory_bytes
from pretrain.evaluate import validate
from pretrain.evaluation.likelihood import Place
from pretrain.parallel.agreement import from_first_rank, raise_agreed
from pretrain.report.estimate import COMPARED_AFTER
from pretrain.report.metrics import step_values
from pretrain.report.monitor import Monitor
from pretrain.report.profile import StepProfiler
from pretrain.report.run_folder import RunFolder
from pretrain.resilience.control import Control
from pretrain.resilience.guard import Diverged, ReplicasDiffer
from pretrain.resilience.replicas import ReplicaCheck, suspect_node, what_to_do
from pretrain.resilience.rollback import Rollback, record
from pretrain.resilience.slow_ranks import RankComparison
from pretrain.resilience.spikes import SpikeDetector
from pretrain.resilience.step_limit import StepLimit
from pretrain.resume import StartPoint, branch_start, what_stands
from pretrain.saving import SaveTimer, save
from pretrain.trainer import LaunchedStep, RunSetup, Trainer

MOST_WAITS = 100
"""Ranks whose waits for data are written down after one step: a fault of the file system is everybody's."""


@dataclass(frozen=True)
class SegmentEnd:
    """Where a segment ended, and why; after the last step both reasons are None."""

    step: int
    rollback: Rollback | None = None
    stopped: str | None = None
    """What stopped it, after a checkpoint was saved."""
    has_begun: bool = True
    """Whether it came to train: if not, no checkpoint was saved."""


@dataclass
class Segment:
    """The steps from one start on: to the end, to a stop, or to a rollback."""

    trainer: Trainer
    folder: RunFolder
    monitor: Monitor | None
    control: Control
    replicas: ReplicaCheck | None
    ranks: RankComparison
    limit: StepLimit
    spikes: SpikeDetector
    timer: SaveTimer
    start: StartPoint
    progress: Progress
    last: int
    profiler: StepProfiler
    memory_before: int
    """Bytes that this process had before its model was built, see device.memory_before."""
    _launched: LaunchedStep | None = None
    """The step after `progress`, if the device may still be computing it."""
    _loss: float | None = None
    """Loss of the last step; None if it is not finite."""
    _validation_loss: float | None = None
    """Loss on the held-out split after the last step, if it was validated."""
    _saved_step: int = 0
    """Of the newest checkpoint, or of the start."""
    _is_time: bool = False
    """Whether a checkpoint is due by time, as rank 0 said in the last message: after the step that follows it."""
    _spike: str | None = None
    """On rank 0: the spike for which the run must go back, until the others know."""

    @property
    def setup(self) -> RunSetup:
        return self.trainer.setup

    @property
    def _ahead(self) -> Progress:
        """`progress`, or that after the launched step. Step and data of the next do not depend on how that one ends."""
        return self.progress if self._launched is None else self._after_step(updated=True)

    def _after_step(self, *, updated: bool) -> Progress:
        return self.progress.after_step(self.setup.config.batch.global_sequences, updated=updated)

    def run(self) -> SegmentEnd:
        """All steps, with what comes between them. Collective.

        The scalars of a step are read after the next one is launched, so that the device never waits for the host. Only
        where something is made of the step (a checkpoint, a validation, a comparison, the end) or where a spike must
        undo it before the next, nothing is launched before they are read."""
        if self._validation_is_missing():
            self._validate()
        if self._tasks_are_missing():
            self._evaluate_tasks()
        stopping, rollback = self.advance(self.last)
        if rollback is not None:
            self.trainer.saver.wait()
            return SegmentEnd(self.progress.step, rollback)
        stopping = stopping or self.control.stopping()
        self.setup.phases.enter("checkpoint")
        if self.trainer.saver.should_try_again():
            self._save()
        self.trainer.saver.finish()
        return SegmentEnd(self.progress.step, stopped=self.control.stop_reason() if stopping else None)

    def advance(self, step: int) -> tuple[bool, Rollback | None]:
        """Launches the steps up to `step`, with what comes between them, unless the ranks agree to stop or to go back.
        Returns whether to stop, and a rollback if one is needed. Collective."""
        stopping, rollback = False, None
        while self._ahead.step < step and not stopping and rollback is None:
            stopping, rollback = self._next_step()
        return stopping, rollback

    def _next_step(self) -> tuple[bool, Rollback | None]:
        """Launches the next step, unless the ranks agree to stop or to go back; then reads the one before. If something
        is due after the step, it is done. Returns whether to stop, and a rollback if one is needed."""
        phases = self.setup.phases
        phases.step = self._ahead.step + 1
        if self.trainer.data.stream.begins(self._ahead.consumed_sequences):
            self.limit.restart()  # memories are forgotten, and a micro-step without them may have to be recorded
        self.profiler.before(phases.step)
        given = self.trainer.read_input(self._ahead)
        phases.enter("waiting for the batches of other ranks")
        stopping, rollback = self._agree(given.error)
        if stopping and rollback is None:
            self._settle()
            return self._between_steps(stopping) if self.progress.step != self._saved_step else (True, None)
        if rollback is not None:
            return stopping, rollback
        launched = self.trainer.launch(self._ahead, given)
        self.profiler.after(phases.step)
        self._settle()
        self._launched = launched
        is_due = self._is_anything_due()
        if is_due or self._spikes_are_undone():
            self._settle()
        if not is_due:
            return False, None
        phases.enter("agreeing on what is next")
        stopping, rollback = self._agree()
        return (stopping, rollback) if rollback is not None else self._between_steps(stopping)

    def _settle(self) -> None:
        """Reads the launched step, if there is one: its line in metrics.jsonl, and what follows from it. Raises
        Diverged, on every rank."""
        if self._launched is None:
            return
        self.setup.phases.enter("reading the step's sums", quick=True)
        result, config = self._launched.read(), self.setup.config
        self.setup.phases.may_take_long()  # rank 0 writes
        self.limit.add(result.seconds)
        # Overflows are how fp16 finds its loss scale, as long as the loss itself is a number and the scale can fall.
        is_overflow = result.scale_can_fall and math.isfinite(result.sums.loss)
        self.progress = self._after_step(updated=result.sums.grad_norm is not None or is_overflow)
        self._launched = None
        self._loss, self._validation_loss = finite(result.sums.loss), None
        compared = self.ranks.step(self.progress.step, result.phase_seconds)
        if self.monitor is not None:
            values = step_values(config, self.trainer.data, result, self.progress, self.setup.device)
            self.monitor.step(
                values | compared, result.sums.load, phase_seconds=result.phase_seconds, details=result.details
            )
        if self.progress.step == self.start.progress.step + 1:
            self.setup.phases.enter("importing what a checkpoint needs")
            self.trainer.saver.prepare()
        self._judge(result.sums.loss)
        if self.progress.step == self.start.progress.step + COMPARED_AFTER:
            self._measure()

    def _measure(self) -> None:
        """One message of all ranks, once: what the first steps took, beside what was expected."""
        peak = memory_bytes(self.setup.device)["memory_peak_bytes"] - self.memory_before
        largest = self.control.largest(peak)
        if self.monitor is not None:
            self.monitor.measured(self.progress.step, largest)

    def _judge(self, loss: float) -> None:
        """What follows from the last step's loss. Raises Diverged."""
        settings, step, skipped = self.setup.config.resilience, self.progress.step, self.progress.skipped_updates
        if skipped:
            self.folder.event("skipped_update", step=step, loss=repr(loss), in_a_row=skipped)
        if skipped >= settings.max_skipped_updates:
            raise Diverged(
                f"step {step}: loss {loss}: the updates of {skipped} steps in a row were skipped, because loss or "
                f"gradients are not finite (resilience.max_skipped_updates = {settings.max_skipped_updates}). "
                f"{self._what_stands(Diverged)}"
            )
        spike = self.spikes.see(loss) if self.monitor is not None and math.isfinite(loss) else None
        if spike is None:
            return
        print(f"loss spike after step {step}: {spike}", flush=True)
        self.folder.event("loss_spike", step=step, reason=spike)
        self._spike = spike if self._spikes_are_undone() else None

    def _agree(self, error: Exception | None = None) -> tuple[bool, Rollback | None]:
        """One message of all ranks, about the batches of the next step (`error`: why this rank has none) and the last
        step that was read: whether to stop, and a rollback if one is needed. Raises `error`, or PeerFailed. Rank 0 says
        too whether it is time for a checkpoint."""
        step, skipped = self.progress.step, self.progress.skipped_updates
        waits = self.setup.sources.patience.taken_waits()
        is_time = self.setup.parallel.is_first and self.timer.is_due()
        said = self.control.agree(error, self._spike is not None, skipped > 0, skipped == 0, bool(waits), is_time)
        is_spike, any_skipped, any_updated, any_waited, self._is_time = said.flags
        if any_waited:
            for wait in self.control.gathered(waits)[:MOST_WAITS]:
                self.folder.event("data_waited", step=step, **wait)
            # Rank 0 writes, perhaps to the same disk: in the step the others would wait for it with a step's limit.
            self.control.largest(0)
        assert not (any_skipped and any_updated), f"step {step}: some ranks skipped the update, others did not"
        if is_spike:
            reason = from_first_rank(lambda: self._spike)
            steps = self.setup.config.resilience.spike_skip_steps
            return said.stopping, self._go_back(f"loss spike: {reason}", Diverged, steps=steps)
        if not said.stopping:
            if said.first_failed is not None:
                self._settle()
            raise_agreed(error, said.first_failed, passes=said.passes, group=self.control.group)
        return said.stopping, None

    def _between_steps(self, stopping: bool) -> tuple[bool, Rollback | None]:
        """What is due after a step that was read, with none launched: comparison, validation, checkpoint. Returns
        whether to stop, and a rollback if one is needed."""
        assert self._launched is None
        config, self.setup.phases.step = self.setup.config, self.progress.step
        rollback = self._compare_replicas(stopping)
        if rollback is not None:
            return stopping, rollback
        if not stopping and self._is_due(config.evaluate.every_steps):
            self._validate()
            stopping = self.control.stopping()
        if not stopping and self._tasks_are_due():
            self._evaluate_tasks()
            stopping = self.control.stopping()
        if stopping or self._save_is_due():
            self._save()
        return stopping, None

    def _is_anything_due(self) -> bool:
        """After the launched step."""
        config = self.setup.config
        replicas = config.resilience.replica_check_every_steps if self.replicas is not None else 0
        steps = (config.evaluate.every_steps, replicas)
        return self._save_is_due() or self._tasks_are_due() or any(map(self._is_due, steps))

    def _tasks_are_due(self) -> bool:
        return bool(self.setup.tasks.prepared) and self._is_due(self.setup.tasks.every_steps)

    def _save_is_due(self) -> bool:
        """After the last step, launched ones included: by time or by steps."""
        return self._is_time or self._is_due(self.setup.config.checkpoint.every_steps)

    def _spikes_are_undone(self) -> bool:
        """Whether a spike makes the run go back. Then the next step waits until the loss is known: else
        the run would have to forget a step that it launched."""
        settings = self.setup.config.resilience
        return settings.spike_threshold > 0.0 and settings.spike_action == "rollback"

    def _compare_replicas(self, stopping: bool) -> Rollback | None:
        """Compares replicas after the configured number of steps, and before a save. Raises ReplicasDiffer."""
        settings = self.setup.config.resilience
        if self.replicas is None or not (
            stopping or self._is_due(settings.replica_check_every_steps) or self._save_is_due()
        ):
            return None
        self.setup.phases.enter("comparing replicas")
        different = self.replicas()
        if not different:
            return None
        more = f" (and {len(different) - 3} more)" if len(different) > 3 else ""
        told = [str(difference) for difference in different[:100]]
        reason = f"replicas differ after step {self.progress.step}: {'; '.join(told[:3])}{more}"
        node = suspect_node(different, self.control.hosts)
        self.folder.event("replicas_differ", step=self.progress.step, tensors=told, node=node)
        if settings.replica_action == "stop":
            raise ReplicasDiffer(f"{reason}. {what_to_do(node)}. {self._what_stands()}", node=node)
        return self._go_back(reason, partial(ReplicasDiffer, node=node))

    def _go_back(self, reason: str, failure: Callable[[str], Exception], *, steps: int = 0) -> Rollback | None:
        """The request for a rollback, written down, which leaves out the data of the last `steps` steps. Raises
        `failure` if there were too many before."""
        settings, done = self.setup.config.resilience, len(self.start.rollbacks)
        if done >= settings.max_rollbacks:
            stands = self._what_stands(failure)
            raise failure(f"{reason}, after {counted(done, 'rollback')} (resilience.max_rollbacks). {stands}")
        sequences = self.setup.config.batch.global_sequences
        # A checkpoint from before the stage would begin it anew: its positions would be other data.
        consumed, stream = self.progress.consumed_sequences, self.trainer.data.stream
        steps = min(steps, self.progress.step, stream.read_in_stage(consumed) // sequences)
        consumed -= steps * sequences
        rollback = Rollback(
            reason=reason,
            at_step=self.progress.step,
            first_step=self.progress.step - max(1, steps) + 1,
            skipped=stream.range_of(consumed, steps * sequences) if steps else None,
            branch_start=branch_start(self.setup.config, self.start.checkpoint),
            stage=stream.stage,
        )
        if self.monitor is not None:
            skipped = rollback.skipped
            data = f", leaving out the positions {skipped[0]} to {skipped[1] - 1} of the data" if skipped else ""
            print(f"going back to before step {rollback.first_step}{data}: {reason}", flush=True)
        # First: killed in between, the next start says the event.
        decided = replace(rollback, is_pending=True)
        from_first_rank(lambda: record(self.folder.path, decided))
        self.folder.event("rollback", **rollback.to_json())
        return rollback

    def _what_stands(self, failure: object = None) -> str:
        """See resume.what_stands; a save under way has ended by then."""
        self.trainer.saver.settle()
        return what_stands(self.setup.config, self.folder.path, is_diverged=failure is Diverged)

    def _validation_is_missing(self) -> bool:
        """Whether a stop prevented the validation that was due after the step that this segment starts from, or its
        settings differ from the checkpoint's."""
        others = ("evaluate.tasks", "evaluate.every_steps")
        changed = any(key.startswith("evaluate.") and not key.startswith(others) for key in self.start.changes)
        due = self.progress.step > 0 and self._is_due(self.setup.config.evaluate.every_steps)
        return due and self._is_missing("validation", changed)

    def _tasks_are_missing(self) -> bool:
        """As `_validation_is_missing`: other tasks (evaluate.tasks.NAME), or another limit."""
        every = "evaluate.tasks_every_steps"
        changed = any(key.startswith("evaluate.tasks") and key != every for key in self.start.changes)
        due = self.progress.step > 0 and self._tasks_are_due()
        return due and self._is_missing("evaluation", changed)

    def _is_missing(self, event: str, changed: bool) -> bool:
        """Rank 0 says what has changed: where a node has its own place of a task's files, that is a change to its ranks
        alone. Collective."""
        return from_first_rank(lambda: changed or not self.folder.was_validated(self.progress.step, event))

    def _evaluate_tasks(self) -> None:
        def goes_on(done: int) -> bool:
            self.setup.phases.enter("evaluation of tasks")  # every call is a sign of life
            return not self.control.stopping()

        place = Place(self.setup.parallel, self.setup.device)
        self.setup.tasks.evaluate(self.trainer.executor, place, self.monitor, self.progress.step, goes_on)

    def _validate(self) -> None:
        is_last = self.progress.step >= self.last
        self._validation_loss = validate(
            self.trainer, self.monitor, self.progress.step, is_last=is_last, stopping=self.control.stopping
        )

    def _save(self) -> None:
        """Writes a checkpoint, or begins to write it. Collective."""
        self.setup.phases.enter("checkpoint")
        self._saved_step = self.progress.step
        if self.monitor is not None:
            self.monitor.flush()
        losses = {"loss": self._loss, "validation_loss": self._validation_loss}
        save(self.trainer, self.folder, self.progress, branch_start(self.setup.config, self.start.checkpoint), losses)
        self.timer.restart()

    def _is_due(self, every: int) -> bool:
        """After the last step, launched ones included."""
        step = self._ahead.step
        return step == self.last or (every > 0 and step % every == 0)

    def close(self) -> None:
        """Frees the engine, so that another can be built."""
        self.profiler.close()
        self.trainer.close()
        if self.monitor is not None:
            self.monitor.close()
