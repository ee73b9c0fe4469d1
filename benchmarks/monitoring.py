r"""What it costs to be watched, measured: a step with everything that a run writes, against a step that writes nothing.

    python -m benchmarks.monitoring --json monitoring.json           # configs/switchall_tiny.json, data of `make data`

One process trains three copies of the model in turns, a block of steps each: `off` writes nothing, `curves` writes
metrics.jsonl, the terminal's lines and TensorBoard at every step, `details` also takes details (norms by group,
histograms, pictures) in one step of every block. A block ends when all of it is on the disk and drawn. The ratios are
medians over the rounds of block / block of the same round, so that what else the machine does cancels; the last line
spreads the details over monitor.details_every_steps.
"""

import argparse
import contextlib
import io
import json
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

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


@dataclass
class Watched:
    """A model in training, and who watches it."""

    trainer: Trainer
    monitor: Monitor | None
    progress: Progress

    def block(self, steps: int) -> float:
        """Seconds of so many steps."""
        setup, start = self.trainer.setup, time.perf_counter()
        for _ in range(steps):
            launched = self.trainer.launch(self.progress, self.trainer.read_input(self.progress))
            result = launched.read()
            self.progress = self.progress.after_step(setup.config.batch.global_sequences, updated=True)
            if self.monitor is not None:
                values = step_values(setup.config, self.trainer.data, result, self.progress, setup.device)
                self.monitor.step(values, result.sums.load, phase_seconds=result.phase_seconds, details=result.details)
        if self.monitor is not None:
            self.monitor.flush()
        return time.perf_counter() - start


def watched(kind: str, config: Config, folder: Path, device: torch.device) -> Watched:
    setup = RunSetup(config, open_sources(config), parallel_context(config), device)
    trainer, monitor = build_trainer(setup, None), None
    if kind != "off":
        origin = Origin(0, 0, config.train.steps, device, 1)
        layout = dict.fromkeys(("data", "tensor", "pipeline", "expert"), 1)
        monitor = Monitor(config, RunFolder(folder, writes=True), origin, facts=start_facts(config, layout, device))
    return Watched(trainer, monitor, Progress(0, 0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/switchall_tiny.json"), help="default: %(default)s")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--block", type=int, default=10, metavar="N", help="steps of a block (default: 10)")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="blocks of each kind (default: 7)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every measurement to this file")
    args = parser.parse_args()
    keys = {
        "off": ("monitor.tensorboard=false",),
        "curves": ("monitor.tensorboard=true", "monitor.details_every_steps=0"),
        "details": ("monitor.tensorboard=true", f"monitor.details_every_steps={args.block}"),
    }
    every = load_config(args.config, args.overrides).monitor.details_every_steps
    configs = {kind: load_config(args.config, [*args.overrides, *keys[kind]]) for kind in KINDS}
    device = devices.start(Ranks.from_environment(), configs["off"].train)
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    loads = []
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        runs = {kind: watched(kind, configs[kind], Path(folder) / kind, device) for kind in KINDS}
        for run in runs.values():
            run.block(args.block)  # the first steps allocate, and tell what is told once
        for number in range(args.rounds):
            for place in range(len(KINDS)):
                kind = KINDS[(number + place) % len(KINDS)]
                seconds[kind].append(runs[kind].block(args.block))
            loads.append(os.getloadavg()[0])
        for run in runs.values():
            if run.monitor is not None:
                run.monitor.close()
            run.trainer.close()
    report(seconds, loads, args.block, every, args.json)
    devices.stop()


def report(seconds: dict[str, list[float]], loads: list[float], block: int, every: int, target: Path | None) -> None:
    """`every`: the steps between details in a run."""
    ratios = {
        kind: statistics.median(own / off for own, off in zip(found, seconds["off"], strict=True))
        for kind, found in seconds.items()
    }
    for kind, found in seconds.items():
        spread = " ".join(f"{value / block:.4f}" for value in found)
        print(f"{kind:8} {statistics.median(found) / block:.4f} s a step, ratio {ratios[kind]:.4f}   ({spread})")
    whole = ratios["curves"] + ((ratios["details"] - ratios["curves"]) * block / every if every else 0.0)
    print(f"monitored / not monitored, details every {every} steps: {whole:.4f}  (load of the machine {loads[-1]:.1f})")
    if target is not None:
        rows = {"seconds": seconds, "ratios": ratios, "ratio": whole, "block": block, "load": loads}
        target.write_text(json.dumps({**rows, "details_every_steps": every, "torch": torch.__version__}))


if __name__ == "__main__":
    main()
