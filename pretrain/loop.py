"""Training, top to bottom: begin somewhere, step, look at what came out, validate, save; go back if it must."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from common.strict_json import finite
from model.parallel.context import ParallelContext
from pretrain.checkpoint import Checkpoint, Retention, list_checkpoints
from pretrain.checkpoint.saver import Outcome, drained
from pretrain.config.loading import to_json
from pretrain.config.schema import Config
from pretrain.data.progress import Progress
from pretrain.data.sources import Sources
from pretrain.device import synchronize
from pretrain.parallel.agreement import agreed, check_same, check_shared
from pretrain.parallel.context import parallel_context
from pretrain.phases import Phases
from pretrain.report.exit_codes import ExitCode
from pretrain.report.monitor import Monitor
from pretrain.report.reporting import prepare_folder, run_validation, step_values
from pretrain.report.run_folder import RunFolder
from pretrain.resilience.control import Control
from pretrain.resilience.guard import Diverged, ReplicasDiffer, guarded
from pretrain.resilience.replicas import ReplicaCheck
from pretrain.resilience.rollback import Rollback, read_rollbacks, record, serving, with_skips
from pretrain.resilience.signals import ProcessState, Stop
from pretrain.resilience.spikes import SpikeDetector
from pretrain.resume import branch_start, candidates, changed_settings, newest_valid
from pretrain.routing.tape import open_tape
from pretrain.trainer import StepResult, Trainer, build_trainer


@dataclass(frozen=True)
class StartPoint:
    """Where a segment of the run begins, the same on every rank."""

    checkpoint: Checkpoint | None
    progress: Progress
    rollbacks: list[Rollback]
    """Those that led here, and earlier ones."""
    damaged: list[str]
    """Why newer checkpoints were."""
    changes: dict[str, tuple[Any, Any]]
    """Settings that differ from the checkpoint's: key -> (then, now)."""


def train(config: Config, sources: Sources, run_dir: Path, device: torch.device, stop: Stop | None = None) -> ExitCode:
    """Runs until train.steps, train.stop_after_steps or a stop that `stop` is asked for, and goes back to a checkpoint
    where `config.resilience` says so. Collective; the process group must exist.

    Returns FINISHED, or STOPPED after the checkpoint was saved. Raises UserError (nothing was changed) and RunFailed
    (the last checkpoint stands)."""
    stop, phases = stop or Stop(), Phases()
    stop.enter(ProcessState.STARTING)
    parallel = parallel_context(config)
    check_same(f"{sources.key} (digest)", sources.digest)
    folder = agreed(lambda: RunFolder(run_dir, writes=parallel.is_first))
    with guarded(config.resilience, folder, stop, phases) as control, drained():
        check_shared(run_dir)
        rollback: Rollback | None = None
        while True:
            phases.enter("looking for a checkpoint")
            start = find_start(config, sources, run_dir, control, rollback)
            step = start.progress.step
            if control.stopping():
                stopped: str | None = control.stop_reason()
                break
            segment = build_segment(config, sources, parallel, device, folder, control, phases, start)
            stop.enter(ProcessState.TRAINING)
            rollback, stopped = segment.run()
            segment.close()
            step = segment.progress.step
            if rollback is None:
                break
            agreed(partial(record, run_dir, rollback, writes=parallel.is_first))
        phases.enter("ending")
        code = ExitCode.STOPPED if stopped else ExitCode.FINISHED
        if parallel.is_first:
            report_end(folder, config, step, stopped)
        folder.end(code, stopped or "finished", step=step)
        stop.enter(ProcessState.ENDING)
        dist.barrier()
    return code


def report_end(folder: RunFolder, config: Config, step: int, stopped: str | None) -> None:
    """Rank 0: the last event and the last line on the terminal."""
    if stopped is None:
        folder.event("finished", step=step)
        early = " (train.stop_after_steps)" if step < config.train.steps else ""
        print(f"finished at step {step} of {config.train.steps}{early}; run folder {folder.path}", flush=True)
        return
    folder.event("stopped", step=step, reason=stopped)
    what = f"at step {step} of {config.train.steps}, checkpoint saved" if step else "during start-up, nothing trained"
    print(f"stopped by {stopped} {what}; the same command continues; run folder {folder.path}", flush=True)


def find_start(
    config: Config, sources: Sources, run_dir: Path, control: Control, rollback: Rollback | None
) -> StartPoint:
    """The checkpoint to continue from, if any, or to go back to. Collective; rank 0's listing of the folder counts.
    Raises UserError or PeerFailed on every rank."""
    paths: list[Path] = control.from_first_rank(lambda: _paths(config, run_dir, rollback))
    resumed, damaged = agreed(lambda: newest_valid(paths, rank=dist.get_rank(), world_size=dist.get_world_size()))
    changes = agreed(lambda: changed_settings(config, resumed, sources.digest) if resumed else {})
    branch = branch_start(config, resumed)
    rollbacks: list[Rollback] = control.from_first_rank(lambda: read_rollbacks(run_dir, branch))
    progress = with_skips(resumed.progress if resumed else Progress(0, 0), rollbacks)
    return StartPoint(resumed, progress, rollbacks, damaged, changes)


def _paths(config: Config, run_dir: Path, rollback: Rollback | None) -> list[Path]:
    if rollback is None:
        return candidates(config, run_dir)
    if config.checkpoint.resume == "never":  # what this run saved itself
        return serving(list_checkpoints(run_dir / "checkpoints")[::-1], rollback)
    return serving(candidates(config, run_dir), rollback)


def build_segment(
    config: Config,
    sources: Sources,
    parallel: ParallelContext,
    device: torch.device,
    folder: RunFolder,
    control: Control,
    phases: Phases,
    start: StartPoint,
) -> Segment:
    """Builds everything for the steps after `start`. Collective."""
    trainer = build_trainer(config, sources, parallel, device, start.checkpoint, progress=start.progress, phases=phases)
    last = min(config.train.steps, config.train.stop_after_steps or config.train.steps)
    settings, step = config.resilience, start.progress.step
    trainer.tape = open_tape(config, sources, trainer.engine.module, parallel, folder.path, step, last)

    def prepare() -> Monitor | None:
        if not parallel.is_first:
            return None
        prepare_folder(folder, trainer, start.checkpoint, start.damaged, start.changes, last)
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
    """Of the last step; None if it is not finite."""
    _validation_loss: float | None = None
    """Of the model after the last step, where it was validated."""

    def run(self) -> tuple[Rollback | None, str | None]:
        """What must be gone back for, and what stopped it (saved by then); neither at the last step. Collective."""
        config, phases = self.trainer.config, self.trainer.phases
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
                return rollback, None
            if not stopping and self._is_due(config.evaluate.every_steps):
                self._validate()
                stopping = self.control.stopping()
            if stopping or self._is_due(config.checkpoint.every_steps):
                self._save()
                stopping = self.control.stopping()
        self.trainer.phases.enter("checkpoint")
        self.trainer.saver.finish()
        return None, self.control.stop_reason() if stopping else None

    def _timed_step(self) -> StepResult:
        """One step, with its line in metrics.jsonl."""
        trainer = self.trainer
        synchronize(trainer.device)
        started = time.perf_counter()
        result = trainer.step(self.progress)
        synchronize(trainer.device)
        seconds = time.perf_counter() - started
        # Overflows are how fp16 finds its loss scale, as long as the loss itself is a number.
        updated = result.grad_norm is not None or (trainer.engine.fp16_enabled() and math.isfinite(result.sums.loss))
        self.progress = self.progress.after_step(trainer.config.batch.global_sequences, updated=updated)
        self._loss, self._validation_loss = finite(result.sums.loss), None
        if self.monitor is not None:
            self.monitor.step(step_values(trainer, result, self.progress, seconds), result.sums.load)
        return result

    def _judge(self, result: StepResult) -> tuple[bool, Rollback | None]:
        """What the step says of the run, agreed by all ranks: whether to stop, and what to go back for. Raises
        Diverged."""
        self.trainer.phases.enter("agreeing on what is next")
        settings, step, loss = self.trainer.config.resilience, self.progress.step, result.sums.loss
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
        """Every so many steps, and before what is about to be saved. Raises ReplicasDiffer."""
        settings, saves = self.trainer.config.resilience, self.trainer.config.checkpoint.every_steps
        if self.replicas is None or not (
            stopping or self._is_due(settings.replica_check_every_steps) or self._is_due(saves)
        ):
            return None
        self.trainer.phases.enter("comparing replicas")
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
        were too many; None, which is said, if there is nothing to go back to."""
        settings, done = self.trainer.config.resilience, len(self.start.rollbacks)
        if done >= settings.max_rollbacks:
            raise failure(
                f"{reason}; {done} rollbacks were made (resilience.max_rollbacks). The last checkpoint stands"
            )
        sequences = self.trainer.config.batch.global_sequences
        steps = min(steps, self.progress.step, self.progress.consumed_sequences // sequences)
        consumed = self.progress.consumed_sequences - steps * sequences
        rollback = Rollback(
            reason=reason,
            at_step=self.progress.step,
            first_step=self.progress.step - max(1, steps) + 1,
            skipped=self.trainer.stream.range_of(consumed, steps * sequences) if steps else None,
            branch_start=branch_start(self.trainer.config, self.start.checkpoint),
        )
        if self.monitor is not None:
            skipped = rollback.skipped
            data = f", leaving out the positions {skipped[0]} to {skipped[1] - 1} of the data" if skipped else ""
            print(f"going back to before step {rollback.first_step}{data}: {reason}", flush=True)
        self.folder.event("rollback", **vars(rollback))
        return rollback

    def _validation_is_missing(self) -> bool:
        """Whether the step that this segment starts after was to be validated and a stop came in between."""
        due = self.progress.step > 0 and self._is_due(self.trainer.config.evaluate.every_steps)
        if any(key.startswith("evaluate.") and key != "evaluate.every_steps" for key in self.start.changes):
            return due  # by other settings than the checkpoint's
        return due and not self.control.from_first_rank(lambda: self.folder.was_validated(self.progress.step))

    def _validate(self) -> None:
        is_last = self.progress.step >= self.last
        self._validation_loss = run_validation(
            self.trainer, self.monitor, self.progress.step, is_last=is_last, stopping=self.control.stopping
        )

    def _save(self) -> None:
        """Writes a checkpoint, or begins to (collective); how it ended is logged, and printed if it failed."""
        trainer, folder, settings = self.trainer, self.folder, self.trainer.config.checkpoint
        trainer.phases.enter("checkpoint")
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
                "config": to_json(trainer.config),
                "manifest_digest": trainer.sources.digest,
                "tokenizer_sha256": trainer.sources.tokenizer.sha256,
                "branch_start": branch_start(trainer.config, self.start.checkpoint),
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
