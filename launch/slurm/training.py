"""Training on SLURM: checks a run on the login node, writes its job script and submits it.

Modules that import torch are imported inside functions, because --help and refusals of arguments do not need them.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common.arguments import add_overrides, at_least, set_options
from common.errors import UserError
from common.paths import REPOSITORY, find_input
from common.tables import counted
from common.urls import URL
from launch.slurm import job
from pretrain.cli.refusals import exit_code_of
from pretrain.config.loading import inspect_config
from pretrain.config.rules import broken_rules, check_device, rank_problems
from pretrain.preflight.whole import Examination, Wanted
from pretrain.report.exit_codes import ExitCode
from pretrain.report.run_paths import config_file, run_folder
from pretrain.views.jobs import mark_submitted

if TYPE_CHECKING:
    from pretrain.config.schema import Config

SIGNAL_SECONDS = 300
GPU_REQUEST = re.compile(r"--(gpus(-per-[a-z]+)?=|(gres|tres-per-[a-z]+)=(.*,)?(gres[/:])?gpu\b)")
"""Options of sbatch that ask for GPUs, as they may stand behind --sbatch."""
CPU_REQUEST = re.compile(r"--(cpus-per-(task|gpu)=|exclusive)")
"""Those that say how many CPUs a rank has."""


def build_parser() -> argparse.ArgumentParser:
    parser = job.SubmitParser(
        prog="launch/slurm/submit.py",
        description="Checks a run as `launch/pretrain.py --dry-run` does, for the ranks of the job, and submits it. "
        "The job saves before its time limit, goes back into the queue and continues, until the run is finished; "
        "docs/operations.md says what happens otherwise.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="the run as JSON, or a run folder")
    add_overrides(parser)
    parser.add_argument("--run-dir", metavar="DIR", help="run folder (default: runs/NAME)")
    _add_allocation(parser)
    parser.add_argument(
        "--signal-seconds",
        type=at_least(1),
        metavar="N",
        help=f"how long before the limit the ranks are told to save and leave (default: {SIGNAL_SECONDS}, or half of a "
        f"shorter limit); SLURM may be 60 s early",
    )
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="instead of training test these nodes for the run, in minutes: collectives, a few steps, save, resume, "
        "tokens per second, and a verdict (launch/smoke.py); never requeued",
    )
    parser.add_argument(
        "--requeues",
        type=at_least(0),
        default=100,
        metavar="N",
        help="most restarts of the job, whatever the reason (default: %(default)s)",
    )
    parser.add_argument(
        "--faults",
        type=at_least(1),
        default=3,
        metavar="N",
        help="give up after this many starts in a row that left no newer checkpoint (default: %(default)s)",
    )
    parser.add_argument(
        "--repeats",
        type=at_least(0),
        default=1,
        metavar="N",
        help="after a failure of the ranks start them again at once on the same nodes, unless more than N starts in a "
        "row have left no newer checkpoint; then the nodes are given back and the job waits in the queue (default: "
        "%(default)s; 0: the nodes are given back at once)",
    )
    parser.add_argument(
        "--excludes",
        type=at_least(0),
        default=1,
        metavar="N",
        help="after two starts in a row that failed on the same node and no other, or when its weights differ from "
        "those of most replicas, the requeued job excludes it, if enough others are up; up to N nodes (default: "
        "%(default)s; 0: never)",
    )
    job.add_site_arguments(parser)
    return parser


def _add_allocation(parser: argparse.ArgumentParser) -> None:
    """What the job asks of SLURM."""
    parser.add_argument("--nodes", type=at_least(1), required=True, metavar="N", help="nodes")
    parser.add_argument("--time", required=True, metavar="LIMIT", help="time limit of each start, e.g. 12:00:00")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--gpus-per-node", type=at_least(1), metavar="N", help="GPUs of each node")
    where.add_argument("--cpu", action="store_true", help="train on the CPUs of the nodes; without GPUs say so")
    parser.add_argument(
        "--after",
        type=at_least(1),
        metavar="JOB",
        help="start when this job, the last of a data preparation, has ended well; the data are checked then, not now",
    )
    parser.add_argument(
        "--ranks-per-node", type=at_least(1), metavar="N", help="ranks (default: --gpus-per-node, 1 with --cpu)"
    )
    parser.add_argument(
        "--cpus-per-rank",
        type=at_least(1),
        metavar="N",
        help="CPUs, and OMP_NUM_THREADS: a node's cores / ranks (default: the cluster's, most often one)",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 submitted (or printed), 2 refused, 130 interrupted."""
    args = build_parser().parse_args(arguments)
    return exit_code_of(lambda: _submit(args))


def _submit(args: argparse.Namespace) -> int | None:
    """Raises UserError and OSError."""
    if not args.dry_run:
        job.need_sbatch()
    args.config = config_file(args.config)
    run_dir = run_folder(args.config, args.run_dir)
    problems = _check(args, run_dir)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if problems:
        return ExitCode.REFUSED
    # A copy, because the file may be edited while the job waits or runs, and every restart reads it again.
    content = args.config.read_bytes()
    logs = run_dir / "slurm"
    config = job.named_by_content(logs, "config", ".json", content)
    text = _script(args, run_dir, config)
    if args.dry_run:
        print(text, end="")
        job.say_nothing_submitted(config)
        return None
    job.write_once(logs, "config", ".json", content)
    path = job.write_once(logs, "smoke" if args.smoke else "pretrain", ".sbatch", text.encode("utf-8"))
    number = job.submit(path, *([] if args.after is None else job.after(args.after)))
    if not args.smoke:
        with contextlib.suppress(OSError):  # it is submitted
            mark_submitted(run_dir, number)
    size = f"{counted(args.nodes, 'node')} x {counted(_ranks_per_node(args), 'rank')}"
    lines = [
        f"submitted job {number}: {size}, script {path}",
        f"  state      squeue --job {number}",
        f"  watch      tail -F {_quoted(logs / f'{number}.log')} {_quoted(logs / f'{number}.rank0.log')}",
        f"  cancel     scancel {number}",
    ]
    if args.smoke:
        lines.append(f"  verdict    grep smoke: {_quoted(logs / f'{number}.log')}")
    else:
        lines.insert(3, f"  metrics    tensorboard --logdir {_quoted(run_dir / 'tensorboard')}")
        lines.append(f"  save, stop scontrol update JobId={number} Requeue=0 && scancel --signal=USR1 {number}")
    print("\n".join(lines))
    return None


def _check(args: argparse.Namespace, run_dir: Path) -> list[UserError]:
    """Checks everything that can be wrong before the job gets a node, and returns what is wrong with the run, all at
    once; warnings and derived values go to stderr. Raises UserError for options of the job."""
    limit = job.seconds_of(args.time)
    if args.signal_seconds is not None and args.signal_seconds >= limit:
        raise UserError(f"--signal-seconds {args.signal_seconds}: must be below --time ({limit} s)")
    _check_gpus(args)
    waits = next((option for option in args.sbatch if option.startswith("--dep")), None)  # sbatch takes --depend= too
    if waits is not None and args.after is not None:  # of two that sbatch is given, it takes one
        raise UserError(f"--sbatch={waits}: --after {args.after} is such a condition too; give one of them")
    job.srun_options(args)
    if args.cpus_per_rank is None and not any(CPU_REQUEST.match(option) for option in args.sbatch):
        print(
            "warning: --cpus-per-rank: is not given; most clusters then give a rank one core, which Python, reading "
            "data, saving and NCCL share. Give it a node's cores / ranks, and --sbatch=--mem=0 for all of its memory",
            file=sys.stderr,
        )
    config, problems = inspect_config(args.config, args.overrides)
    problems += [] if config is None else broken_rules(config).values()
    if config is None or problems:
        return problems
    device, num_ranks = "cpu" if args.cpu else "cuda", args.nodes * _ranks_per_node(args)
    if config.train.device not in ("auto", device):
        fix = "remove --cpu" if args.cpu else "add --cpu"
        raise UserError(
            f"train.device: is {config.train.device}, but the job is for {device}; {fix}, or --set "
            f"train.device={device}"
        )
    if args.after is None:
        wanted = Wanted(
            config=args.config,
            option="--config",
            overrides=args.overrides,
            run_dir=run_dir,
            num_ranks=num_ranks,
            device=device,
        )
        problems, data = _check_run(wanted)
    else:
        from pretrain.engine.optimizer import group_problems

        problems = [*rank_problems(config, num_ranks), *group_problems(config)]
        data = _future_data(config)
        check_device(config, device)
        print(
            f"--after {args.after}: data ({', '.join(map(str, data)) or 'behind URLs'}) and an earlier checkpoint are "
            f"checked when the job starts, not now; where they do not fit it ends with exit code 2",
            file=sys.stderr,
        )
    places = [("--run-dir", run_dir), ("the repository", REPOSITORY)]
    places += [] if job.python_is_in_container(args) else [("--python", Path(job.python_of_the_job(args)))]
    places += [("data", folder) for folder in data]
    job.check_all_shared(places, allow_local=args.allow_local)
    return problems


def _check_run(wanted: Wanted) -> tuple[list[UserError], list[Path]]:
    """What is wrong with the run, and the folders of its data sets."""
    from pretrain.cli.train import print_derived

    examination = Examination(wanted)
    examination.check_settings()
    examination.check_run(thorough=False)
    run = examination.run
    if not examination.is_sound or run is None:
        return examination.checks.problems, []
    assert run.sources is not None and run.data_size is not None and run.run_dir is not None
    with contextlib.redirect_stdout(sys.stderr):
        print_derived(run.config, run.data_size, run.sources, run.run_dir, run.newest)
    return [], [source.manifest.folder for source in run.sources.sources]


def _check_gpus(args: argparse.Namespace) -> None:
    """Checks that the job gets GPUs or is meant for CPUs, and that the number of ranks on a node is known."""
    request = next((option for option in args.sbatch if GPU_REQUEST.match(option)), None)
    if request is not None and args.cpu:
        raise UserError(f"--sbatch={request}: asks for GPUs, and --cpu for a run on CPUs; remove one of the two")
    if args.gpus_per_node is not None or args.cpu:
        return
    if request is None:
        raise UserError(
            "--gpus-per-node: is not given, so the run would get no GPU; add --gpus-per-node N, or --cpu if it is to "
            "train on CPUs"
        )
    if args.ranks_per_node is None:
        raise UserError(
            f"--ranks-per-node: is not given, and --sbatch={request} does not say it; add --ranks-per-node N, one rank "
            f"for each GPU of a node"
        )


def _future_data(config: Config) -> list[Path]:
    """Where the data sets will be, found as in pretrain/data/sources.py; those behind URLs are left out."""
    return [find_input(location).absolute() for location in config.data.locations if not URL.match(location)]


def _script(args: argparse.Namespace, run_dir: Path, config: Path) -> str:
    limit = job.seconds_of(args.time)
    signal_seconds = args.signal_seconds or max(1, min(SIGNAL_SECONDS, limit // 2))
    options: dict[str, str | None] = {
        **job.site_options(args, run_dir.name + "-smoke" * args.smoke),
        "nodes": str(args.nodes),
        "ntasks-per-node": str(_ranks_per_node(args)),
        "time": args.time,
        "signal": f"USR1@{signal_seconds}",
        "output": job.output_pattern(run_dir / "slurm") + "/%j.log",
        "chdir": str(Path.cwd()),  # relative paths of the configuration
    }
    if args.gpus_per_node:
        options["gpus-per-node"] = str(args.gpus_per_node)
    if args.cpus_per_rank:
        options["cpus-per-task"] = str(args.cpus_per_rank)
    return job.script(
        job.Template.load("pretrain.sbatch"),
        options=options,
        more_options=args.sbatch,
        settings={
            # Else that of the shell that submits decides for train.device=auto, or the driver of a node without a GPU
            # for this job.
            "DS_ACCELERATOR": "cpu" if args.cpu else "cuda",
            **job.variables(args.env),
            "RUN_DIR": str(run_dir),
            "REPOSITORY": str(REPOSITORY),
            "PYTHON": job.python_of_the_job(args),
            "REQUEUES": "0" if args.smoke else str(args.requeues),
            "FAULTS": str(args.faults),
            "REPEATS": str(args.repeats),
            "EXCLUDES": str(args.excludes),
            "SIGNAL_SECONDS": str(signal_seconds),
            **job.srun_options(args),
            **({"PROGRAM": "smoke.py"} if args.smoke else {}),
        },
        setup=args.setup,
        arguments=["--config", str(config), *set_options(args.overrides)],
    )


def _ranks_per_node(args: argparse.Namespace) -> int:
    return args.ranks_per_node or args.gpus_per_node or 1


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
