"""Command line of launch/smoke.py: is this cluster fit for this run? A few minutes, and one verdict.

It checks and times collectives between all ranks, trains a few steps with the run's own configuration, saves them, and
resumes from the middle, which must give the same bits. It writes everything to a new folder RUN_DIR/smoke-N, and
removes the checkpoints there if all is well. Modules that import torch are imported inside functions, as in
cli/train.py.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.arguments import Parser, a_path, add_overrides
from common.errors import UserError
from common.tables import counted
from pretrain.config.loading import load_config
from pretrain.config.schema import Config
from pretrain.preflight.run import preflight
from pretrain.ranks import Ranks
from pretrain.report.exit_codes import ExitCode
from pretrain.report.run_paths import config_file, run_folder
from pretrain.resilience.signals import ProcessState, Stop

if TYPE_CHECKING:
    import torch

    from pretrain.data.sources import Sources

VERDICT = "smoke: "
"""How every line of its output begins; the last line is the verdict."""
COMPARED = ("loss", "auxiliary_loss", "grad_norm")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="launch/smoke.py",
        usage="deepspeed [--num_gpus N] launch/smoke.py --config FILE [--set key=value]... [--run-dir DIR]",
        description="Checks that a run can work here, in minutes: collectives between all ranks are right and how fast "
        "they are, a few steps with their tokens per second, a checkpoint, and a resume that is equal in every bit. "
        "Ends with one line, smoke: PASSED (code 0) or smoke: FAILED and why (code 1).",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="the run as JSON, as for launch/pretrain.py")
    add_overrides(parser)
    parser.add_argument("--run-dir", type=a_path, metavar="DIR", help="the run's folder (default: runs/NAME)")
    parser.add_argument(
        "--steps", type=int, default=5, metavar="N", help="save after N steps, train to 2 N (default 5, at least 2)"
    )
    parser.add_argument(
        "--mebibytes", type=int, default=64, metavar="N", help="buffer of the collectives on each rank (default 64)"
    )
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # passed by the deepspeed launcher
    return parser


def main(arguments: Sequence[str] | None = None, stop: Stop | None = None) -> int:
    """Entry point of every rank. Returns 0 passed, 1 failed, 2 refused, or the code that training ended with."""
    args, stop = build_parser().parse_args(arguments), stop or Stop()
    try:
        ranks = Ranks.from_environment()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return ExitCode.REFUSED
    try:
        for option, value, least in (("--steps", args.steps, 2), ("--mebibytes", args.mebibytes, 1)):
            if value < least:
                raise UserError(f"{option}: {value} is too small; write {least} or more")
        path = config_file(args.config)
        config = smoke_config(path, args.overrides, args.steps)
        run_dir = run_folder(path, args.run_dir)
        from pretrain.report.weights_and_biases import check_installed  # here: numpy, for which --help need not wait

        check_installed(load_config(path, args.overrides).monitor)  # of the run: the test sends nothing
        sources, *_ = preflight(config, ranks.world_size, run_dir / "smoke", alone=ranks.world_size == 1)
    except UserError as error:
        stop.say_refusal(error, ranks)
        return ExitCode.REFUSED
    return _run(config, sources, run_dir, ranks, stop, args)


def smoke_config(path: Path, overrides: Sequence[str], steps: int, resume: Path | None = None) -> Config:
    """The run's configuration for 2 x `steps` steps with a checkpoint in the middle, and nothing that costs time.
    Deterministic: fused attention on a GPU does not repeat its bits otherwise, and a sound machine would fail."""
    own: dict[str, Any] = {
        "train.deterministic": True,
        "train.steps": max(2 * steps, load_config(path, overrides).train.steps),
        "train.stop_after_steps": 2 * steps,
        "train.record_routing": False,
        "train.replay_routing": None,
        "checkpoint.every_steps": steps,
        "checkpoint.every_minutes": 0.0,
        "checkpoint.keep_last": 2,
        "checkpoint.keep_every_steps": 0,
        "checkpoint.keep_best": 0,
        "checkpoint.resume": "auto" if resume is None else str(resume),
        "evaluate.every_steps": 0,
        "evaluate.sequences": 0,
        "evaluate.tasks": {},  # of 100,000 texts the test would take hours
        "evaluate.tasks_every_steps": 0,
        "evaluate.tasks_limit": 0,
        "monitor.tensorboard": False,
        "monitor.wandb": "off",  # its two runs are none of the project's
        "monitor.print_every_steps": 1,
        "monitor.alert_command": None,
    }
    return load_config(path, [*overrides, *(f"{key}={json.dumps(value)}" for key, value in own.items())])


def _run(config: Config, sources: Sources, run_dir: Path, ranks: Ranks, stop: Stop, args: argparse.Namespace) -> int:
    """Joins the process group, tests, and gives the verdict; the same code on every rank unless one failed alone."""
    from pretrain import device as devices
    from pretrain.parallel.agreement import PeerFailed
    from pretrain.resilience.guard import RunFailed, collective_timeout

    started = time.monotonic()
    try:
        device = devices.start(ranks, config.train, timeout_seconds=collective_timeout(config.resilience))
    except devices.Unreachable as error:
        print(f"{VERDICT}FAILED: {error}", flush=True)
        return ExitCode.CUT_OFF
    except UserError as error:  # such as a port that is taken
        stop.say_refusal(error, ranks, prefix=f"{VERDICT}FAILED: ", stream=sys.stdout)
        return ExitCode.REFUSED
    stop.enter(ProcessState.STARTING)
    speaks, code = ranks.rank == 0, ExitCode.UNFORESEEN
    try:
        code, words = _test(config, sources, run_dir, device, stop, args)
    except PeerFailed:
        words = "FAILED: another rank met an error and says so in its own output"
    except (UserError, RunFailed) as error:
        speaks, words = True, f"FAILED: {error}"
    except Exception as error:  # such as a failed collective: the verdict names it, below the traceback
        traceback.print_exc()
        speaks, words = True, f"FAILED: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    finally:
        stop.enter(ProcessState.ENDING)
    if speaks:  # before leaving: after a fault the process group may not let this process go
        where = "" if ranks.rank == 0 else f"rank {ranks.rank} "
        nodes = max(1, ranks.world_size // ranks.local_size)
        size = f"{counted(ranks.world_size, 'rank')} on {counted(nodes, 'node')}, {time.monotonic() - started:.0f} s"
        print(f"{VERDICT}{where}{words} ({size})", flush=True)
    devices.stop(code)
    return code


def _test(
    config: Config, sources: Sources, run_dir: Path, device: torch.device, stop: Stop, args: argparse.Namespace
) -> tuple[ExitCode, str]:
    """Collective. The exit code and the verdict, the same on every rank."""
    import torch.distributed as dist

    from pretrain.loop import train
    from pretrain.parallel.agreement import from_first_rank
    from pretrain.smoke.collectives import check_collectives

    is_first = dist.get_rank() == 0
    alone = dist.get_world_size() == 1  # its collectives move nothing: a bandwidth of 0 would read like a fault
    measured, faults = ([], []) if alone else check_collectives(args.mebibytes << 20, device)
    if is_first:
        for one in measured:
            print(f"{VERDICT}{one}, {args.mebibytes} MiB in {one.seconds * 1e3:.3g} ms", flush=True)
        for fault in faults:
            print(f"{VERDICT}{fault}", flush=True)
    if faults:
        return ExitCode.UNFORESEEN, f"FAILED: a wrong result of a collective, {faults[0]}"
    folder = from_first_rank(lambda: new_folder(run_dir))
    if train(config, sources, folder / "unbroken", device, stop) is not ExitCode.FINISHED:
        return ExitCode.STOPPED, "STOPPED by a signal before it was done"
    middle = folder / "unbroken" / "checkpoints" / f"step-{args.steps:08d}"
    resumed = smoke_config(config_file(args.config), args.overrides, args.steps, resume=middle)
    if train(resumed, sources, folder / "resumed", device, stop) is not ExitCode.FINISHED:
        return ExitCode.STOPPED, "STOPPED by a signal before it was done"
    faults = from_first_rank(lambda: differences(folder, args.steps))
    if faults:
        return ExitCode.UNFORESEEN, f"FAILED: resume is not equal in every bit: {faults[0]}; see {folder}"
    speed = from_first_rank(lambda: tokens_per_second(folder / "unbroken"))
    if is_first:
        for name in ("unbroken", "resumed"):
            shutil.rmtree(folder / name / "checkpoints")
    slower = " (train.deterministic=true)" if device.type == "cuda" else ""
    links = "".join(f", {one}" for one in measured if one.name == "all_reduce" or one.name.startswith("slowest"))
    collectives = "no collectives, as there is one rank" if alone else f"collectives right{links}"
    return (
        ExitCode.FINISHED,
        f"PASSED: {collectives}; {speed:,.0f} tokens/s{slower}; resume equal in every bit",
    )


def new_folder(run_dir: Path) -> Path:
    """RUN_DIR/smoke-N, made now: nothing of an earlier test is touched. Raises UserError."""
    number = 1
    while True:
        folder = run_dir / f"smoke-{number}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            if not folder.exists():
                raise UserError(f"--run-dir: {run_dir} is not a folder; name one") from None
            number += 1
        except OSError as error:
            raise UserError(f"--run-dir: {folder} cannot be made: {error.strerror}") from None
        else:
            return folder


def differences(folder: Path, steps: int) -> list[str]:
    """How the resumed run differs from the unbroken one: losses and norms of the steps after the checkpoint,
    then every file of weights and optimizer states at the end."""
    from pretrain.checkpoint import Checkpoint

    found = []
    one, other = (_lines(folder / name) for name in ("unbroken", "resumed"))
    for step in range(steps + 1, 2 * steps + 1):
        for key in COMPARED:
            then, now = one.get(step, {}).get(key), other.get(step, {}).get(key)
            if then != now:
                found.append(f"{key} of step {step} is {now!r} after the resume, {then!r} without")
    last = f"step-{2 * steps:08d}"
    sums = [
        {
            name: entry["sha256"]
            for name, entry in Checkpoint.open(folder / run / "checkpoints" / last).state["files"].items()
            if name.endswith(".safetensors")
        }
        for run in ("unbroken", "resumed")
    ]
    found += [f"{name} of {last} holds other bits" for name in sums[0] if sums[0][name] != sums[1].get(name)]
    return found


def tokens_per_second(run_dir: Path) -> float:
    """Median over the steps, the first two left out."""
    return statistics.median(line["tokens_per_second"] for step, line in _lines(run_dir).items() if step > 2)


def _lines(run_dir: Path) -> dict[int, dict[str, Any]]:
    """metrics.jsonl by step."""
    text = (run_dir / "metrics.jsonl").read_text(encoding="utf-8")
    return {line["step"]: line for line in map(json.loads, text.splitlines())}
