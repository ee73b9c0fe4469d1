"""Command line of launch/pretrain.py: arguments, help, checks before anything is allocated, dry run.

Modules that import torch or DeepSpeed are imported inside functions: they take seconds, and --help and refusals do not
need them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common.arguments import Parser, above_zero, add_overrides, at_least
from common.errors import UserError
from common.json_config import describe_keys
from common.requirements import misfits
from common.units import GIB
from pretrain.cli.refusals import code_of_failure
from pretrain.config.deepspeed_keys import EXTRA
from pretrain.config.fields import FREE
from pretrain.config.loading import alert_settings, load_config, to_json
from pretrain.config.schema import Config
from pretrain.config.watching import MonitorConfig
from pretrain.data.patience import Patience, patient_seconds
from pretrain.preflight.run import PlannedRun, preflight
from pretrain.preflight.whole import Examination, Wanted
from pretrain.ranks import Ranks
from pretrain.report.estimate import SideBySide
from pretrain.report.exit_codes import ExitCode, code_of, exit_codes_help
from pretrain.report.forecast import Forecast
from pretrain.report.run_paths import SAVED_CONFIG, asked_folder, config_file, run_folder
from pretrain.resilience.early_end import EarlyEnd
from pretrain.resilience.signals import ProcessState, Stop

if TYPE_CHECKING:
    from pretrain.checkpoint import Checkpoint
    from pretrain.data.sources import Sources

USAGE = "deepspeed [--num_gpus N] launch/pretrain.py --config FILE [--set key=value]... [--run-dir DIR] [--dry-run]"


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="launch/pretrain.py",
        usage=USAGE,
        description="Pretrains a SwitchAll, SwitchHead, MoA or dense language model. Without the deepspeed launcher "
        "(python launch/pretrain.py ...) it trains as one process.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"{exit_codes_help()}\n\n{keys_help()}",
    )
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE",
        help="the run as JSON, e.g. configs/switchall_tiny.json; a run folder, or its config.json, means that run",
    )
    add_overrides(
        parser,
        "override one dotted key, repeatable: --set train.steps=200 --set model.attention.type=dense "
        "(values are JSON where they parse as JSON: true, false, null, 1e-4, [1,2])",
    )
    parser.add_argument(
        "--run-dir",
        metavar="DIR",
        help="run folder (default: runs/NAME, NAME being the config "
        "file's, or the run that --config names); started again with the same folder, a run continues",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="make all checks of `launch/plan.py check`, print the resolved configuration and derived values, and stop",
    )
    parser.add_argument(
        "--ranks",
        type=at_least(1),
        metavar="N",
        help="with --dry-run: check the layout for N ranks (default: the product of the parallel sizes)",
    )
    parser.add_argument(
        "--no-step", action="store_true", help="with --dry-run: leave out the rehearsal of a training step"
    )
    parser.add_argument(
        "--device-memory",
        type=above_zero(1e6),
        metavar="GIB",
        help="with --dry-run: estimate the memory of a rank, and the largest batch.micro_sequences that fits a device "
        "of so many GiB (default: this machine's GPU; without one no estimate)",
    )
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # passed by the deepspeed launcher
    return parser


def main(arguments: Sequence[str] | None = None, stop: Stop | None = None) -> int:
    """Entry point of every rank. Signals are reported to `stop`. Returns an exit code, see exit_codes.py."""
    args, stop = build_parser().parse_args(arguments), stop or Stop()
    try:
        ranks = Ranks.from_environment()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return ExitCode.REFUSED
    end: EarlyEnd | None = None
    try:
        if args.ranks is not None and not args.dry_run:
            raise UserError("--ranks: goes with --dry-run; a run has as many as the launcher starts")
        if args.device_memory is not None and not args.dry_run:
            raise UserError("--device-memory: goes with --dry-run, which alone estimates memory; leave it out")
        if args.no_step and not args.dry_run:
            raise UserError("--no-step: goes with --dry-run, which alone rehearses a step; leave it out")
        if args.dry_run:
            wanted = Wanted(
                config=args.config,
                option="--config",
                overrides=args.overrides,
                run_dir=args.run_dir,
                num_ranks=args.ranks,
                device_memory=None if args.device_memory is None else int(args.device_memory * GIB),
            )
            return dry_run(wanted, with_step=not args.no_step)
        path = config_file(args.config)
        end = early_end(path, args.overrides, args.run_dir)
        if ranks.rank == 0:
            end.hear(stop)
        stop.enter(ProcessState.JOINING)
        run_dir = run_folder(path, args.run_dir)
        config = load_config(path, args.overrides)
        with contextlib.ExitStack() as stack:
            side_by_side = None
            if ranks.rank == 0:  # as early as can be: it takes a few seconds
                forecast = Forecast(config, ranks)
                stack.callback(forecast.close)
                side_by_side = SideBySide(forecast.take)
            patience = Patience(patient_seconds(config.resilience), rank=ranks.rank)
            sources, data_size, newest = preflight(
                config, ranks.world_size, run_dir, alone=ranks.world_size == 1, patience=patience
            )
            if ranks.rank == 0:
                print_derived(config, data_size, sources, run_dir, newest)
            return run(config, sources, run_dir, ranks, stop, side_by_side, end)
    except UserError as error:
        is_alone = stop.say_refusal(error, ranks)
        code = code_of(type(error))
        if end is not None and (ranks.rank == 0 or is_alone):
            stop.enter(ProcessState.ENDING)  # whatever ends this process now, it has refused the run
            end.note(code, str(error))
        return code
    except Exception as error:
        if end is not None and ranks.rank == 0:
            stop.enter(ProcessState.ENDING)
            end.note(ExitCode.UNFORESEEN, repr(error))
        raise


def early_end(path: Path, overrides: Sequence[str], given: str | None) -> EarlyEnd:
    """Notes how a start ends before its ranks have met, of which nothing is known yet but its arguments: the path of
    its configuration, `--set` and `--run-dir`. Where that configuration cannot be read, the one that the run has saved
    says whom to tell. Raises UserError where there is no folder to note it in."""
    run_dir = asked_folder(path, given)

    def monitor() -> MonitorConfig | None:
        return alert_settings(path, overrides) or alert_settings(run_dir / SAVED_CONFIG, overrides)

    return EarlyEnd(run_dir, monitor)


def dry_run(wanted: Wanted, *, with_step: bool = True) -> int:
    """Prints configuration and parameters, then makes all checks of `plan.py check` (`with_step`: of a step too), and
    prints what follows from the configuration. Then it estimates the memory of a rank, for the device that `wanted`
    names or the GPU that is here. What is wrong is said before the checks that follow, and settings that are
    wrong are not printed. Returns the exit code."""
    from pretrain.cli.plan_check import Errors, print_line, print_warnings, summary

    examination = Examination(wanted)
    errors = Errors(examination)
    examination.check_settings()
    config = examination.config
    if config is not None and examination.is_sound:
        from pretrain.report.model_text import parameter_count

        count = parameter_count(config.model)
        print(json.dumps(to_json(config), indent=1))
        print(f"parameters: {count.total:,} total, {count.active:,} active per token", flush=True)
    for outcome in examination.checks.outcomes:
        print_line(outcome)
    errors.say()
    examination.tell = print_line
    examination.check_run(thorough=True)
    errors.say()
    if with_step:
        examination.check_step()
    if not examination.is_sound:
        print_warnings(examination.checks.warnings)
        errors.say()
        return ExitCode.REFUSED
    planned = examination.run
    assert config is not None and planned is not None and planned.run_dir is not None
    assert planned.sources is not None and planned.data_size is not None
    print_warnings([*planned.passed_over, *examination.not_rehearsed])
    print_derived(config, planned.data_size, planned.sources, planned.run_dir, planned.newest)
    _print_memory(planned, wanted.device_memory)
    print(summary(examination), flush=True)
    return 0


def _print_memory(planned: PlannedRun, device_memory: int | None) -> None:
    from pretrain.gpus import gpu_memory

    assert planned.data_size is not None
    capacity = gpu_memory() if device_memory is None else device_memory
    if capacity is not None:
        from pretrain.report.memory_text import memory_rows

        for row in memory_rows(planned.config, planned.data_size, planned.device, capacity):
            print(f"  {row.name:<19}  {row.value:<12}  {row.formula}", flush=True)


def run(  # noqa: PLR0913 (what main has found, one after the other)
    config: Config,
    sources: Sources,
    run_dir: Path,
    ranks: Ranks,
    stop: Stop,
    side_by_side: SideBySide | None = None,
    end: EarlyEnd | None = None,
) -> int:
    """Joins the process group and trains. `end`: of this start, as long as the ranks have not met."""
    from pretrain import device as devices
    from pretrain.loop import train
    from pretrain.parallel.agreement import PeerFailed
    from pretrain.resilience.guard import RankLost, RunFailed, collective_timeout

    try:
        device = devices.start(ranks, config.train, timeout_seconds=collective_timeout(config.resilience))
    except devices.Unreachable as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        if end is not None and ranks.rank == 0:
            stop.enter(ProcessState.ENDING)
            end.note(ExitCode.CUT_OFF, str(error))
        return ExitCode.CUT_OFF
    stop.enter(ProcessState.STARTING)
    if end is not None:
        end.close(stop)
    code = ExitCode.UNFORESEEN
    try:
        code = train(config, sources, run_dir, device, stop, side_by_side)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = code_of(type(error))
    except PeerFailed as error:
        code = code_of(error.kind)
    except RunFailed as error:
        if ranks.rank == 0 or isinstance(error, RankLost):  # rank 0 may be the one that is gone
            print(f"error: {error}", file=sys.stderr, flush=True)
        code = error.code
    except Exception as error:
        code = code_of_failure(error)
    finally:
        stop.enter(ProcessState.ENDING)
        devices.stop(code)
    return code


def print_derived(
    config: Config, data_size: int, sources: Sources, run_dir: Path, newest: Checkpoint | None = None
) -> None:
    """Prints the derived values, each with its formula, packages of other versions, and what the data are too small
    for. `newest`: the checkpoint that the run continues from, if any."""
    from pretrain.data.warnings import data_warnings
    from pretrain.report.disk_space import checkpoint_space
    from pretrain.report.startup import DerivedValue, derived_values
    from pretrain.resumed_stages import progress_now, reads_by_end, reads_so_far, stages_of

    if config.description:
        print(config.description)
    space = checkpoint_space(config, run_dir)
    stages = stages_of(newest, sources, config)
    reads = reads_by_end(config, newest, stages[-1])
    progress = progress_now(config, newest)
    folder = DerivedValue("run folder", str(run_dir), "--run-dir, or runs/ + name of the config file")
    rows = [folder, *derived_values(config, data_size, sources, stages, reads, progress), space.row()]
    width, value_width = (max(len(getattr(row, part)) for row in rows) for part in ("name", "value"))
    for row in rows:
        print(f"  {row.name:<{width}}  {row.value:<{min(value_width, 40)}}  {row.formula}")
    for warning in [*misfits(), *data_warnings(config, sources, reads, reads_so_far(config, newest, stages[-1]))]:
        print(f"warning: {warning}")
    sys.stdout.flush()
    if warning := space.warning():
        print(f"warning: {warning}", file=sys.stderr, flush=True)


def keys_help() -> str:
    """Every configuration key with its type, default and docstring."""
    lines = ["configuration keys (for the file and for --set):", ""]
    lines += describe_keys(Config, lambda field: "; may change on resume" * (field.json_schema_extra == FREE))
    lines += ["", "keys of the deepspeed section that are passed on:"]
    lines += textwrap.wrap(", ".join(sorted(EXTRA)), 96, initial_indent="  ", subsequent_indent="  ")
    return "\n".join(lines)
