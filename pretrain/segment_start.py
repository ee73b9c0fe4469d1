"""Everything that the steps from one start on need, built on all ranks; and what rank 0 writes down of the start."""

from __future__ import annotations

from dataclasses import replace

import torch.distributed as dist

from pretrain.checkpoint.state import layout
from pretrain.device import memory_before
from pretrain.parallel.agreement import agreed
from pretrain.report.monitor import Monitor, Origin
from pretrain.report.profile import StepProfiler
from pretrain.report.run_folder import RunFolder, refusal
from pretrain.report.start_facts import start_facts
from pretrain.resilience.control import Control
from pretrain.resilience.replicas import ReplicaCheck
from pretrain.resilience.slow_ranks import RankComparison
from pretrain.resilience.spikes import SpikeDetector
from pretrain.resilience.step_limit import StepLimit
from pretrain.resume import StartPoint, record_start
from pretrain.routing.record import remove_after
from pretrain.routing.tape import open_tape
from pretrain.saving import SaveTimer
from pretrain.segment import Segment
from pretrain.trainer import RunSetup, build_trainer


def build_segment(setup: RunSetup, folder: RunFolder, control: Control, start: StartPoint) -> Segment:
    """Builds everything for the steps after `start`. Collective."""
    config, parallel, before = setup.config, setup.parallel, memory_before(setup.device)
    trainer = build_trainer(setup, start.checkpoint, progress=start.progress, initial=start.initial)
    last = config.train.last_step
    settings, step = config.resilience, start.progress.step
    steps = range(step + 1, last + 1)
    trainer.tape = open_tape(config, trainer.data, trainer.engine.module, parallel, folder.path, steps)

    def prepare() -> tuple[Monitor | None, list[float]]:
        if not parallel.is_first:
            return None, []
        tokens, extra = start.progress.tokens(config.model.sequence_length), start.progress.extra_flops
        origin = Origin(step, tokens, last, setup.device, dist.get_world_size(), extra_flops=extra)
        sizes = layout(trainer.engine, parallel)
        try:
            branch = record_start(folder, start, config, sizes, data_digest=setup.sources.digest, last_step=last)
            origin = replace(origin, hides_all=branch)
            if branch and config.train.record_routing:
                remove_after(folder.path / "routing", 0)
            facts = start_facts(config, sizes, setup.device)
            monitor = Monitor(config, folder, origin, facts=facts, side_by_side=setup.side_by_side)
            return monitor, folder.losses(step, settings.spike_window_steps)
        except OSError as error:
            raise refusal(folder.path, error) from None

    monitor, losses = agreed(prepare)
    replicas = None
    if settings.replica_check_every_steps and dist.get_world_size() > 1:
        replicas = ReplicaCheck(trainer.engine, parallel, control.group)
    # Rank 0 decides: it has the losses before this start, and floats of other ranks could differ in the last bit.
    spikes = SpikeDetector(settings.spike_threshold, settings.spike_window_steps, losses)
    profiler = StepProfiler(config.monitor.profile_steps, folder.path, parallel, setup.device, ahead=steps)
    timer = SaveTimer(config.checkpoint.every_minutes, trainer.saver)
    ranks = RankComparison(config, parallel, control, setup.phases, folder)
    limit = StepLimit(settings, setup.phases, reads_files=trainer.tape is not None)
    return Segment(
        trainer, folder, monitor, control, replicas, ranks, limit, spikes, timer, start, start.progress, last,
        profiler, before, _saved_step=step,
    )  # fmt: skip
