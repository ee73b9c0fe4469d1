r"""What it costs to be watched, measured: a step with everything that a run writes, against a step that writes nothing.

    python -m benchmarks.monitoring --json monitoring.json           # configs/switchall_tiny.json, data of `make data`

One process trains three copies of the model in turns, a block of steps each: `off` writes nothing, `curves` writes
metrics.jsonl, the terminal's lines and TensorBoard at every step, `details` also takes details (norms by group,
histograms, pictures) in one step of every block. A block ends when all of it is on the disk and drawn. Both the time
that passes and the time that processors work for it, in all threads, are measured: on a machine that others use too the
second is the one to read, on a CPU. The ratios are medians over the rounds of block / block of the same round; the last
lines spread the details over monitor.details_every_steps. `calls` is the work of the main thread in what a step tells
the monitor, measured by itself: of a percent, where ratios of whole steps scatter by more.
"""

import argparse
import contextlib
import io
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.rounds import orders, ratio
from common.arguments import add_overrides
from common.errors import UserError
from pretrain import device as devices
from pretrain.config.loading import load_config
from pretrain.config.schema import Config
from pretrain.data.progress import Progress
from pretrain.data.sources import open_sources
from pretrain.parallel.context import parallel_context
from pretrain.ranks import Ranks
from pretrain.report.metrics import step_values
from pretrain.report.monitor import Monitor, Origin
from pretrain.report.run_folder import RunFolder
from pretrain.report.start_facts import start_facts
from pretrain.trainer import RunSetup, Trainer, build_trainer

KINDS = ("off", "curves", "details")
CLOCKS = ("passed", "worked")


@dataclass
class Watched:
    """A model in training, and who watches it."""

    trainer: Trainer
    monitor: Monitor | None
    progress: Progress
    called: float = 0.0
    """Seconds that the main thread has worked in the monitor's calls."""

    def block(self, steps: int) -> tuple[float, float]:
        """Seconds of so many steps: those that pass, and those that processors work."""
        setup, start, worked = self.trainer.setup, time.perf_counter(), time.process_time()
        for _ in range(steps):
            launched = self.trainer.launch(self.progress, self.trainer.read_input(self.progress))
            result = launched.read()
            self.progress = self.progress.after_step(setup.config.batch.global_sequences, updated=True)
            before = time.thread_time()
            if self.monitor is not None:
                values = step_values(setup.config, self.trainer.data, result, self.progress, setup.device)
                self.monitor.step(values, result.sums.load, phase_seconds=result.phase_seconds, details=result.details)
            self.called += time.thread_time() - before
        if self.monitor is not None:
            self.monitor.flush()
        return time.perf_counter() - start, time.process_time() - worked


def watched(kind: str, config: Config, folder: Path, device: torch.device) -> Watched:
    setup = RunSetup(config, open_sources(config), parallel_context(config), device)
    trainer, monitor = build_trainer(setup, None), None
    if kind != "off":
        origin = Origin(0, 0, config.train.steps, device, 1)
        layout = dict.fromkeys(("data", "tensor", "pipeline", "expert"), 1)
        monitor = Monitor(config, RunFolder(folder, writes=True), origin, facts=start_facts(config, layout, device))
    return Watched(trainer, monitor, Progress(0, 0))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.monitoring",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, default=Path("configs/switchall_tiny.json"), help="default: %(default)s")
    add_overrides(parser)
    parser.add_argument("--block", type=int, default=10, metavar="N", help="steps of a block (default: 10)")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="blocks of each kind (default: 7)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every measurement to this file")
    args = parser.parse_args(arguments)
    if min(args.block, args.rounds) < 1:
        parser.error("--block and --rounds must be at least 1")
    keys = {
        "off": ("monitor.tensorboard=false",),
        "curves": ("monitor.tensorboard=true", "monitor.details_every_steps=0"),
        "details": ("monitor.tensorboard=true", f"monitor.details_every_steps={args.block}"),
    }
    try:
        every = load_config(args.config, args.overrides).monitor.details_every_steps
        configs = {kind: load_config(args.config, [*args.overrides, *keys[kind]]) for kind in KINDS}
        open_sources(configs["off"])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    device = devices.start(Ranks.from_environment(), configs["off"].train)
    seconds: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
    loads = []
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        runs = {kind: watched(kind, configs[kind], Path(folder) / kind, device) for kind in KINDS}
        for run in runs.values():
            run.block(args.block)  # the first steps allocate, and tell what is told once
            run.called = 0.0
        for kind in orders(KINDS, args.rounds):
            seconds[kind].append(runs[kind].block(args.block))
            loads.append(os.getloadavg()[0])
        for run in runs.values():
            if run.monitor is not None:
                run.monitor.close()
            run.trainer.close()
    times = {
        clock: {kind: [pair[number] for pair in pairs] for kind, pairs in seconds.items()}
        for number, clock in enumerate(CLOCKS)
    }
    ratios = {clock: report(clock, found, args.block, every) for clock, found in times.items()}
    off = statistics.median(times["worked"]["off"]) / args.block
    calls = {kind: run.called / (args.block * args.rounds) for kind, run in runs.items() if kind != "off"}
    for kind, spent in calls.items():
        print(f"calls, {kind}: {1000 * spent:.2f} ms a step, {spent / off:.2%} of one that is not monitored")
    print(f"load of the machine {min(loads):.1f} to {max(loads):.1f}")
    if args.json is not None:
        about = {"block": args.block, "details_every_steps": every, "load": loads, "torch": torch.__version__}
        args.json.write_text(json.dumps({"seconds": times, "ratios": ratios, "calls": calls, **about}))
    devices.stop()
    return 0


def report(clock: str, seconds: dict[str, list[float]], block: int, every: int) -> dict[str, float]:
    """Prints and returns the ratio of each kind, and of all with details every so many steps."""
    ratios = {kind: ratio(found, seconds["off"]) for kind, found in seconds.items()}
    print(f"seconds a step, {clock}:")
    for kind, found in seconds.items():
        spread = " ".join(f"{value / block:.4f}" for value in found)
        print(f"  {kind:8} {statistics.median(found) / block:.4f}, ratio {ratios[kind]:.4f}   ({spread})")
    ratios["all"] = ratios["curves"] + ((ratios["details"] - ratios["curves"]) * block / every if every else 0.0)
    print(f"  monitored / not monitored, details every {every} steps: {ratios['all']:.4f}")
    return ratios


if __name__ == "__main__":
    sys.exit(main())
