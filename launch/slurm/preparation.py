"""Data preparation on SLURM: four jobs, each after the one before."""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.arguments import a_path, add_overrides, at_least, set_options
from common.errors import UserError
from common.folders import check_folder
from common.paths import REPOSITORY
from common.urls import PIPE, may_hold_secret
from data_prep.config.loading import load_config
from data_prep.config.resolved import ResolvedConfig, resolve
from data_prep.run.disk_estimate import check_room
from data_prep.run.output_files import check_manifest_is_own, check_output
from data_prep.run.up_to_date import is_up_to_date
from data_prep.stages.lossy import check_given_model
from launch.slurm import job
from pretrain.cli.refusals import exit_code_of

CONFIG = "config"
SIGNAL_SECONDS = 60
"""How long before the limit SLURM ends a task, which then goes back into the queue: at most half of the limit, or a
short one would end it as soon as it starts."""
STEPS = (("dedup", True), ("tokenizer", False), ("encode", True), ("shard", False))
"""Steps of data_prep in order, and whether array tasks share them; each step first does what earlier steps have left
undone."""


def build_parser() -> argparse.ArgumentParser:
    parser = job.SubmitParser(
        prog="launch/slurm/submit_data_prep.py",
        description="Submits a data preparation as four jobs, each after the one before: reading, filtering and "
        "signing (array), duplicates and tokenizer, encoding (array), shards. The output is that of `data_prep run`.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=a_path, required=True, metavar="FILE", help="JSON config, see configs/data/")
    add_overrides(parser)
    parser.add_argument("--tasks", type=at_least(1), required=True, metavar="N", help="array tasks, at most raw files")
    parser.add_argument("--time", required=True, metavar="LIMIT", help="time limit of each task, e.g. 4:00:00")
    parser.add_argument(
        "--cpus-per-task",
        type=at_least(1),
        default=8,
        metavar="N",
        help="CPUs and processes of a task (default: %(default)s)",
    )
    parser.add_argument(
        "--requeues", type=at_least(0), default=5, metavar="N", help="most restarts of each task (default: %(default)s)"
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="rebuild although the output holds other data, and replace files in the way that no preparation made",
    )
    job.add_site_arguments(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 submitted (or printed), 2 refused, 130 interrupted."""
    args = build_parser().parse_args(arguments)
    numbers: list[str] = []
    code = exit_code_of(lambda: _submit(args, numbers))
    if code and numbers:
        print(f"already submitted: {' '.join(numbers)}; cancel with scancel", file=sys.stderr)
    return code


def _submit(args: argparse.Namespace, numbers: list[str]) -> None:
    """Puts the numbers of the jobs into `numbers`, one after the other. Raises UserError and OSError."""
    if not args.dry_run:
        job.need_sbatch()
    resolved = _check(args)
    if resolved is None:
        return
    logs = resolved.output / "slurm"
    config = _frozen(args.config, logs)
    if config.content is None:
        job.check_all_shared([("--config", config.path)], allow_local=args.allow_local)
    for step, is_array in STEPS:
        text = _script(args, resolved, config, step, is_array=is_array)
        if args.dry_run:
            print(text)
            continue
        if config.content is not None:
            job.write_once(logs, CONFIG, ".json", config.content)
        path = job.write_once(logs, step, ".sbatch", text.encode("utf-8"))
        numbers.append(job.submit(path, *(job.after(numbers[-1]) if numbers else [])))
    if args.dry_run:
        job.say_nothing_submitted(config.path)
    else:
        print(
            f"submitted jobs {' '.join(numbers)}: {', '.join(step for step, _ in STEPS)}; logs in {logs}\n"
            f"  state   squeue --job {','.join(numbers)}\n"
            f"  cancel  scancel {' '.join(numbers)}\n"
            f"  train   {_training(resolved, numbers[-1])}"
        )


def _training(resolved: ResolvedConfig, last_job: str) -> str:
    """The command that trains on the data once they are there."""
    data = shlex.quote(f"data.manifest={resolved.output.absolute()}")
    return f"python launch/slurm/submit.py --config FILE --nodes N ... --set {data} --after {last_job}"


def _check(args: argparse.Namespace) -> ResolvedConfig | None:
    """None where the output is already what the configuration makes, which is said. Raises UserError."""
    job.seconds_of(args.time)
    job.srun_options(args)
    _check_secrets(args.overrides)
    resolved = resolve(load_config(args.config, args.overrides))
    # The jobs would refuse these too, but only after they have waited for their nodes.
    check_given_model(resolved)
    check_folder(resolved.output, "output")
    check_manifest_is_own(resolved.output, force=args.force)
    if is_up_to_date(resolved, force=args.force):
        print(f"up to date: {resolved.output}; nothing is submitted", file=sys.stderr)
        return None
    check_output(resolved, force=args.force)
    check_room(resolved)
    if args.tasks > len(resolved.sources):
        raise UserError(
            f"--tasks {args.tasks}: there are {len(resolved.sources)} raw files and a task takes whole ones; "
            f"use --tasks {len(resolved.sources)}"
        )
    places = [("output", resolved.output), ("the repository", REPOSITORY)]
    places += [] if job.python_is_in_container(args) else [("--python", Path(job.python_of_the_job(args)))]
    places += [("raw files", source.path.parent) for source in resolved.sources if isinstance(source.path, Path)]
    places += [] if resolved.external_model is None else [("tokenizer.model", resolved.external_model)]
    job.check_all_shared(places, allow_local=args.allow_local)
    return resolved


def _check_secrets(overrides: Sequence[str]) -> None:
    """Refuses secrets: the job scripts hold the command line, and others may be able to read them."""
    for override in overrides:
        if _may_hold_secret(override):
            raise UserError(
                f"--set {override.partition('=')[0]}: a command, and a URL with a password or a query, may hold a "
                f"secret, and the job scripts would keep it; write it into the file of --config, which is not copied "
                f"then"
            )


def _may_hold_secret(text: str) -> bool:
    return may_hold_secret(text) or PIPE in text


@dataclass(frozen=True)
class Frozen:
    """The configuration as it was checked. The user's file may be edited while the jobs wait, or between two of them,
    and every start reads it again."""

    path: Path
    """What the jobs read: a copy, or the user's own file where that may hold secrets, which no copy may keep."""
    content: bytes | None
    """Of the copy; None: there is none."""
    sha256: str
    """Of the user's file, which the jobs compare where there is no copy."""


def _frozen(given: Path, logs: Path) -> Frozen:
    content = given.read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    if _may_hold_secret(json.dumps(json.loads(content), ensure_ascii=False)):  # without escapes such as \/
        print(
            f"note: {given} may hold a secret (a command, or a URL with a password or a query), so the jobs get no "
            f"copy of it: leave it as it is until they have ended; one that finds it changed ends with exit code 2",
            file=sys.stderr,
        )
        return Frozen(given.absolute(), None, sha256)
    return Frozen(job.named_by_content(logs, CONFIG, ".json", content).absolute(), content, sha256)


def _script(args: argparse.Namespace, resolved: ResolvedConfig, config: Frozen, step: str, *, is_array: bool) -> str:
    options = {
        **job.site_options(args, f"{resolved.output.name}-{step}"),
        "cpus-per-task": str(args.cpus_per_task),
        "time": args.time,
        "signal": f"TERM@{max(1, min(SIGNAL_SECONDS, job.seconds_of(args.time) // 2))}",
        "array": f"0-{args.tasks - 1}" if is_array else None,
        "output": job.output_pattern(resolved.output / "slurm") + ("/%A_%a.log" if is_array else "/%j.log"),
        "chdir": str(Path.cwd()),  # relative paths of the configuration
    }
    settings = {
        **job.variables(args.env),
        "REPOSITORY": str(REPOSITORY),
        "PYTHON": job.python_of_the_job(args),
        "REQUEUES": str(args.requeues),
        **job.srun_options(args),
        **({"TASKS": str(args.tasks)} if is_array else {}),
        **({"CONFIG_SUM": f"{config.sha256}  {config.path}"} if config.content is None else {}),
    }
    # The output as it is resolved: the file's own may be relative to where the file lies, see
    # data_prep/config/loading.py.
    others = [override for override in args.overrides if override.partition("=")[0].strip() != "output"]
    overrides = [*others, f"output={resolved.output.absolute()}"]
    arguments = [step, "--config", str(config.path), *set_options(overrides), *["--force"] * args.force]
    return job.script(
        job.Template.load("data_prep.sbatch"),
        options=options,
        more_options=args.sbatch,
        settings=settings,
        setup=args.setup,
        arguments=arguments,
    )
