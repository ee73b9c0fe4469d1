"""Training, top to bottom: find a start, step, judge the result, validate, save; go back if necessary."""

from __future__ import annotations

import gc
import math
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from common.strict_json import finite
from pretrain.checkpoint import Retention, layout
from pretrain.checkpoint.saver import Outcome, drained
from pretrain.config.loading import to_json
from pretrain.config.schema import Config
from pretrain.data.progress import Progress
from pretrain.data.sources import Sources
from pretrain.device import synchronize
from pretrain.evaluate import validate
from pretrain.parallel.agreement import agreed, check_same, check_shared
from pretrain.parallel.context import parallel_context
from pretrain.report.exit_codes import ExitCode
from pretrain.report.metrics import StepResult, step_values
from pretrain.report.monitor import Monitor
from pretrain.report.run_folder import RunFolder
from pretrain.resilience.control import Control
from pretrain.resilience.guard import Diverged, ReplicasDiffer, guarded
from pretrain.resilience.replicas import ReplicaCheck
from pretrain.resilience.rollback import Rollback, record
from pretrain.resilience.signals import ProcessState, Stop
from pretrain.resilience.spikes import SpikeDetector
from pretrain.resume import StartPoint, branch_start, find_start, record_start
from pretrain.routing.tape import open_tape
from pretrain.trainer import RunSetup, Trainer, build_trainer


@dataclass(frozen=True)
class SegmentEnd:
    """Where a segment ended, and why; after the last step both reasons are None."""

    step: int
    rollback: Rollback | None = None
    """The rollback that is needed."""
    stopped: str | None = None
    """What stopped it, after a checkpoint was saved."""


def train(config: Config, sources: Sources, run_dir: Path, device: torch.device, stop: Stop | None = None) -> ExitCode:
    """Runs until train.steps, train.stop_after_steps or a request in `stop`, and goes back to a checkpoint when
    `config.resilience` says so. Collective; the process group must exist.

    Returns FINISHED, or STOPPED after the checkpoint was saved. Raises UserError (nothing was changed) and RunFailed
    (the last checkpoint stands)."""
    stop = stop or Stop()
    stop.enter(ProcessState.STARTING)
    setup = RunSetup(config, sources, parallel_context(config), device)
    check_same(f"{sources.key} (digest)", sources.digest)
    folder = agreed(lambda: RunFolder(run_dir, writes=setup.parallel.is_first))
    with guarded(config.resilience, folder, stop, setup.phases) as control, drained():
        check_shared(run_dir)
        rollback: Rollback | None = None
        while True:
            setup.phases.enter("looking for a checkpoint")
            start = find_start(config, sources, run_dir, control, rollback)
            if control.stopping():
                end = SegmentEnd(start.progress.step, stopped=control.stop_reason())
                break
            end = run_segment(setup, folder, control, stop, start)
            gc.collect()  # nothing refers to the segment any more: its memory goes before another is built
            rollback = end.rollback
            if rollback is None:
                break
            agreed(partial(record, run_dir, rollback, writes=setup.parallel.is_first))
        setup.phases.enter("ending")
        code = ExitCode.STOPPED if end.stopped else ExitCode.FINISHED
        if setup.parallel.is_first:
            report_end(folder, config, end)
        folder.end(code, end.stopped or "finished", step=end.step)
        stop.enter(ProcessState.ENDING)
        dist.barrier()
    return code


def run_segment(setup: RunSetup, folder: RunFolder, control: Control, stop: Stop, start: StartPoint) -> SegmentEnd:
    """The steps from `start` on. Collective."""
    segment = build_segment(setup, folder, control, start)
    stop.enter(ProcessState.TRAINING)
    end = segment.run()
    segment.close()
    return end


def report_end(folder: RunFolder, config: Config, end: SegmentEnd) -> None:
    """Rank 0: the last event and the last line on the terminal."""
    step, stopped = end.step, end.stopped
    if stopped is None:
        folder.event("finished", step=step)
        early = " (train.stop_after_steps)" if step < config.train.steps else ""
        print(f"finished at step {step} of {config.train.steps}{early}; run folder {folder.path}", flush=True)
        return
    folder.event("stopped", step=step, reason=stopped)
    what = f"at step {step} of {config.train.steps}, checkpoint saved" if step else "during start-up, nothing trained"
    print(f"stopped by {stopped} {what}; the same command continues; run folder {folder.path}", flush=True)


def build_segment(setup: RunSetup, folder: RunFolder, control: Control, start: StartPoint) -> Segment:
    """Builds everything for the steps after `start`. Collective."""
    config, parallel = setup.config, setup.parallel
    trainer = build_trainer(setup, start.checkpoint, progress=start.progress)
    last = min(config.train.steps, config.train.stop_after_steps or config.train.steps)
    settings, step = config.resilience, start.progress.step
    steps = range(step + 1, last + 1)
    trainer.tape = open_tape(config, setup.sources, trainer.engine.module, parallel, folder.path, steps)

    def prepare() -> Monitor | None:
        if not parallel.is_first:
            return None
        record_start(folder, start, config, layout(trainer.engine, parallel), last_step=last)
        return Monitor(config, folder, first_step=step, last_step=last)

    monitor = agreed(prepare)
    replicas = None
    if settings.replica_check_every_steps and dist.get_world_size() > 1:
        replicas = ReplicaCheck(trainer.engine, parallel, control.group)
    # Rank 0 decides: it has the losses before this start, and floats of other ranks could differ in the last bit.
    window = settings.spike_window_steps
    spikes = SpikeDetector(settings.spike_threshold, window, folder.losses(step, window))
    return Segment(trainer, folder, monitor, control, replicas, spikes, start, start.progress, last)


@dataclass
class Segment:
    """The steps from one start on: to the end, to a stop, or to a rollback."""

    trainer: Trainer
    folder: RunFolder
    monitor: Monitor | None
    control: Control
    replicas: ReplicaCheck | None
    spikes: SpikeDetector
    start: StartPoint
    progress: Progress
    last: int
    _loss: float | None = None
    """Loss of the last step; None if it is not finite."""
    _validation_loss: float | None = None
    """Loss on the held-out split after the last step, if it was validated."""

    @property
    def setup(self) -> RunSetup:
        return self.trainer.setup

    def run(self) -> SegmentEnd:
        """All steps, with what comes between them. Collective."""
        config, phases = self.setup.config, self.setup.phases
        if self._validation_is_missing():
            self._validate()
        stopping = self.control.stopping()
        while self.progress.step < self.last and not stopping:
            phases.step = self.progress.step + 1
            result = self._timed_step()
            stopping, rollback = self._judge(result)
            if rollback is None:
                rollback = self._compare_replicas(stopping)
            if rollback is not None:
                self.trainer.saver.wait()
                return SegmentEnd(self.progress.step, rollback)
            if not stopping and self._is_due(config.evaluate.every_steps):
                self._validate()
                stopping = self.control.stopping()
            if stopping or self._is_due(config.checkpoint.every_steps):
                self._save()
                stopping = self.control.stopping()
        phases.enter("checkpoint")
        self.trainer.saver.finish()
        return SegmentEnd(self.progress.step, stopped=self.control.stop_reason() if stopping else None)

    def _timed_step(self) -> StepResult:
        """One step, with its line in metrics.jsonl."""
        config, device = self.setup.config, self.setup.device
        synchronize(device)
        started = time.perf_counter()
        result = self.trainer.step(self.progress)
        synchronize(device)
        seconds = time.perf_counter() - started
        # Overflows are how fp16 finds its loss scale, as long as the loss itself is a number.
        updated = result.sums.grad_norm is not None or (
            result.loss_scale is not None and math.isfinite(result.sums.loss)
        )
        self.progress = self.progress.after_step(config.batch.global_sequences, updated=updated)
        self._loss, self._validation_loss = finite(result.sums.loss), None
        if self.monitor is not None:
            values = step_values(config, self.trainer.data, result, self.progress, seconds=seconds, device=device)
            self.monitor.step(values, result.sums.load)
        return result

    def _judge(self, result: StepResult) -> tuple[bool, Rollback | None]:
        """What follows from the step, agreed by all ranks: whether to stop, and a rollback if one is needed. Raises
        Diverged."""
        self.setup.phases.enter("agreeing on what is next")
        settings, step, loss = self.setup.config.resilience, self.progress.step, result.sums.loss
        skipped = self.progress.skipped_updates
        spike = self.spikes.see(loss) if self.monitor is not None and math.isfinite(loss) else None
        stopping, is_spike, any_skipped, any_updated = self.control.any(
            self.control.stop_is_requested, spike is not None, skipped > 0, skipped == 0
        )
        assert not (any_skipped and any_updated), f"step {step}: some ranks skipped the update, others did not"
        if skipped:
            self.folder.event("skipped_update", step=step, loss=repr(loss), in_a_row=skipped)
        if skipped >= settings.max_skipped_updates:
            raise Diverged(
                f"step {step}: loss {loss}: the updates of {skipped} steps in a row were skipped, because loss or "
                f"gradients are not finite (resilience.max_skipped_updates = {settings.max_skipped_updates}). The last "
                f"checkpoint stands: resume from it with a lower learning rate (--set optimizer.learning_rate=... "
                f"--set 'checkpoint.allow_changes=[\"optimizer\"]'), or from an earlier one (checkpoint.resume=PATH)"
            )
        if not is_spike:
            return stopping, None
        reason = self.control.from_first_rank(lambda: spike)
        if self.monitor is not None:
            print(f"loss spike after step {step}: {reason}", flush=True)
        self.folder.event("loss_spike", step=step, reason=reason)
        if settings.spike_action == "warn":
            return stopping, None
        return stopping, self._go_back(f"loss spike: {reason}", Diverged, steps=settings.spike_skip_steps)

    def _compare_replicas(self, stopping: bool) -> Rollback | None:
        """Compares replicas after the configured number of steps, and before a save. Raises ReplicasDiffer."""
        settings, saves = self.setup.config.resilience, self.setup.config.checkpoint.every_steps
        if self.replicas is None or not (
            stopping or self._is_due(settings.replica_check_every_steps) or self._is_due(saves)
        ):
            return None
        self.setup.phases.enter("comparing replicas")
        different = self.replicas()
        if not different:
            return None
        more = f" (and {len(different) - 3} more)" if len(different) > 3 else ""
        reason = f"replicas differ after step {self.progress.step}: {'; '.join(different[:3])}{more}"
        self.folder.event("replicas_differ", step=self.progress.step, tensors=different[:100])
        if settings.replica_action == "stop":
            raise ReplicasDiffer(
                f"{reason}. The last checkpoint was saved before; check the memory of those machines or, if other "
                "machines end in the same way, the layer of that parameter: its gradient must be the same on all"
            )
        return self._go_back(reason, ReplicasDiffer)

    def _go_back(self, reason: str, failure: type[Exception], *, steps: int = 0) -> Rollback | None:
        """The request for a rollback, which leaves out the data of the last `steps` steps. Raises `failure` if there
        were too many before."""
        settings, done = self.setup.config.resilience, len(self.start.rollbacks)
        if done >= settings.max_rollbacks:
            raise failure(
                f"{reason}; {done} rollbacks were made (resilience.max_rollbacks). The last checkpoint stands"
            )
        sequences = self.setup.config.batch.global_sequences
        steps = min(steps, self.progress.step, self.progress.consumed_sequences // sequences)
        consumed = self.progress.consumed_sequences - steps * sequences
        rollback = Rollback(
            reason=reason,
            at_step=self.progress.step,
            first_step=self.progress.step - max(1, steps) + 1,
            skipped=self.trainer.data.stream.range_of(consumed, steps * sequences) if steps else None,
            branch_start=branch_start(self.setup.config, self.start.checkpoint),
        )
        if self.monitor is not None:
            skipped = rollback.skipped
            data = f", leaving out the positions {skipped[0]} to {skipped[1] - 1} of the data" if skipped else ""
            print(f"going back to before step {rollback.first_step}{data}: {reason}", flush=True)
        self.folder.event("rollback", **vars(rollback))
        return rollback

    def _validation_is_missing(self) -> bool:
        """Whether a stop prevented the validation that was due after the step that this segment starts from."""
        due = self.progress.step > 0 and self._is_due(self.setup.config.evaluate.every_steps)
        if any(key.startswith("evaluate.") and key != "evaluate.every_steps" for key in self.start.changes):
            return due  # because settings differ from the checkpoint's
        return due and not self.control.from_first_rank(lambda: self.folder.was_validated(self.progress.step))

    def _validate(self) -> None:
        is_last = self.progress.step >= self.last
        self._validation_loss = validate(
            self.trainer, self.monitor, self.progress.step, is_last=is_last, stopping=self.control.stopping
        )

    def _save(self) -> None:
        """Writes a checkpoint, or begins to write it. Collective. The result is logged, and printed if it is a
        failure."""
        trainer, folder, settings = self.trainer, self.folder, self.setup.config.checkpoint
        self.setup.phases.enter("checkpoint")
        if self.monitor is not None:
            self.monitor.flush()

        def report(outcome: Outcome) -> None:
            times = {"seconds": outcome.seconds, "stall_seconds": outcome.stall_seconds}
            if outcome.error is None:
                folder.event("checkpoint", step=outcome.step, path=outcome.path.name, bytes=outcome.bytes, **times)
                print(
                    f"checkpoint saved: {outcome.path} ({outcome.bytes / 2**20:,.1f} MiB in {outcome.seconds:.1f} s, "
                    f"training stood still for {outcome.stall_seconds:.1f} s)",
                    flush=True,
                )
            else:
                folder.event("checkpoint_failed", step=outcome.step, reason=outcome.error, **times)
                print(f"checkpoint of step {outcome.step} failed: {outcome.error}", file=sys.stderr, flush=True)

        trainer.saver.save(
            folder.checkpoints,
            self.progress,
            extra={
                "config": to_json(self.setup.config),
                "manifest_digest": self.setup.sources.digest,
                "tokenizer_sha256": self.setup.sources.tokenizer.sha256,
                "branch_start": branch_start(self.setup.config, self.start.checkpoint),
                "loss": self._loss,
                "validation_loss": self._validation_loss,
            },
            retention=Retention(
                keep_last=settings.keep_last,
                keep_every_steps=settings.keep_every_steps,
                keep_best=settings.keep_best,
            ),
            before=folder.make_durable,
            report=report,
        )

    def _is_due(self, every: int) -> bool:
        step = self.progress.step
        return step == self.last or (every > 0 and step % every == 0)

    def close(self) -> None:
        """Frees the engine, so that another can be built."""
        self.trainer.close()
        if self.monitor is not None:
            self.monitor.flush()
