"""Training, top to bottom: find a start, take the steps from there, go back if necessary, end."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from pretrain.checkpoint.saver import drained
from pretrain.config.schema import Config
from pretrain.data.sources import Sources
from pretrain.device import record_memory_history
from pretrain.evaluation.training import RunTasks
from pretrain.gpus import is_far_from_its_cores
from pretrain.parallel.agreement import agreed, check_same, check_shared
from pretrain.parallel.context import parallel_context
from pretrain.parallel.placement import placement_warnings
from pretrain.report.alerts import Alerts
from pretrain.report.estimate import SideBySide
from pretrain.report.exit_codes import ExitCode
from pretrain.report.profile import note_full_memory
from pretrain.report.run_folder import RunFolder
from pretrain.resilience.control import Control
from pretrain.resilience.guard import early_end_noted, guarded
from pretrain.resilience.rollback import Rollback
from pretrain.resilience.signals import ProcessState, Stop
from pretrain.resume import StartPoint, find_start, what_stands
from pretrain.segment import Segment, SegmentEnd
from pretrain.segment_start import build_segment
from pretrain.together import check_code, check_config, check_data, remember_data
from pretrain.trainer import RunSetup


def train(
    config: Config,
    sources: Sources,
    run_dir: Path,
    device: torch.device,
    stop: Stop | None = None,
    side_by_side: SideBySide | None = None,
) -> ExitCode:
    """Runs until train.steps, train.stop_after_steps or a request in `stop`, and goes back to a checkpoint when
    `config.resilience` says so. `side_by_side`, of rank 0, compares what is expected with what is measured. Collective;
    the process group must exist.

    Returns FINISHED, or STOPPED after the checkpoint was saved. Raises UserError (nothing was changed) and RunFailed
    (what was saved stands)."""
    stop = stop or Stop()
    stop.enter(ProcessState.STARTING)
    with early_end_noted(run_dir, config.monitor, stop) as early_end:
        check_code()  # first: other code may have other keys
        check_config(config)
        check_same(f"{sources.key} (digest)", sources.digest)
        sources = check_data(sources, config, run_dir)
        parallel, tasks = parallel_context(config), agreed(lambda: RunTasks.open(config, sources))
        check_same("evaluate.tasks", tasks.digests)
        if config.monitor.memory_history:
            record_memory_history(device)  # before a model is built: only what is allocated later has a stack
        alerts = Alerts(config.monitor, run_dir) if parallel.is_first else None
        folder = agreed(lambda: early_end.open(lambda: RunFolder(run_dir, writes=parallel.is_first, alerts=alerts)))
    setup = RunSetup(config, sources, parallel, device, tasks=tasks, side_by_side=side_by_side)
    stop.standing = lambda: what_stands(config, run_dir)
    with guarded(config.resilience, folder, stop, setup.phases) as control, drained():
        check_shared(run_dir)
        for warning in placement_warnings(config, control.hosts, control.gathered([is_far_from_its_cores(device)])):
            if parallel.is_first:
                print(f"warning: {warning}", file=sys.stderr, flush=True)
        remember_data(run_dir, sources)
        rollback: Rollback | None = None
        while True:
            setup.phases.enter("looking for a checkpoint")
            start = find_start(config, sources, run_dir, rollback)
            if control.stopping():
                end = SegmentEnd(start.progress.step, stopped=control.stop_reason(), has_begun=False)
                break
            end = run_segment(setup, folder, control, stop, start)
            gc.collect()  # nothing refers to the segment any more: its memory goes before another is built
            rollback = end.rollback
            if rollback is None:
                break
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
    segment: Segment | None = None
    try:
        segment = build_segment(setup, folder, control, start)
        stop.enter(ProcessState.TRAINING)
        end = segment.run()
    except BaseException as error:
        setup.sources.patience.end()  # a thread that waits for data would keep this process
        if isinstance(error, torch.OutOfMemoryError):
            note_full_memory(folder.path, setup.device, has_history=setup.config.monitor.memory_history)
        if segment is not None and segment.monitor is not None:
            segment.monitor.flush()  # the curves before a failure are those that people look at
        raise
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
    what = f"at step {step} of {config.train.steps}, checkpoint saved"
    if not (end.has_begun and step):
        what = "during start-up, nothing trained" + (f" after step {step}" if step else "")
    print(f"stopped by {stopped} {what}; the same command continues; run folder {folder.path}", flush=True)
