"""What the submitting commands share: a script from a template, checks of folders, the call of sbatch."""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.arguments import MOST_DIGITS, Parser, quoted
from common.errors import UserError
from common.files import write_file
from common.filesystems import filesystem_type, is_shared
from common.urls import may_hold_secret

FOLDER = Path(__file__).resolve().parent
SECRET_NAME = re.compile(r"(?i)(token|secret|passw(or)?d|credentials?|(api|access|private|secret)_?key)(_|$)")
"""Names of variables whose values must not be written to a file."""
OF_THE_CLUSTER = {"SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT", "SLURM_TIME_FORMAT"}
"""Variables by which SLURM's commands find the cluster; the others of SLURM are those of one job."""
OF_OWN_OPTIONS = "how many processes a node starts follows from this command's own options (--help lists them)"
REFUSED = {
    "array": "each of its tasks would be a job that does the same again, in the same folder; launch/sweep.py --submit "
    "submits many runs, and --tasks of launch/slurm/submit_data_prep.py shares out a preparation",
    "ntasks": OF_OWN_OPTIONS,
    "tasks-per-node": OF_OWN_OPTIONS,  # another name of --ntasks-per-node, of which the last one counts
    "distribution": "srun places the ranks, and would not follow it; --srun=--distribution=... does",
}
"""Options of sbatch that would undo what was checked, although these commands need not set them: why."""
WHOLE_NAMES = {"gpus"}
"""Options of sbatch that begin as one of those, or as one that these commands set, and mean themselves."""
WITHOUT_VALUE = {"exclusive", "contiguous"}
OF_SBATCH = {
    *WITHOUT_VALUE,
    *("mem", "mem-per-cpu", "mem-per-gpu", "gres", "gpus-per-task", "constraint", "nodelist", "exclude", "reservation"),
    *("mail-type", "mail-user", "licenses", "tmp", "switches", "hint", "comment", "begin", "dependency", "propagate"),
}
"""What users of clusters most often give sbatch, and these commands have no option of their own for."""
LOCAL_TYPES = ("tmpfs", "ramfs", "devtmpfs", "squashfs")
LOCAL_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm", "/run")
NUMBER = rf"\d{{1,{MOST_DIGITS}}}"
TIME = re.compile(
    rf"(?:(?P<days>{NUMBER})-(?P<day_hours>{NUMBER})(?::(?P<day_minutes>{NUMBER})(?::(?P<day_seconds>{NUMBER}))?)?)"
    rf"|(?:(?P<hours>{NUMBER}):(?P<minutes>{NUMBER}):(?P<seconds>{NUMBER}))"
    rf"|(?:(?P<only_minutes>{NUMBER})(?::(?P<only_seconds>{NUMBER}))?)"
)


class SubmitParser(Parser):
    """Options of sbatch that are given without --sbatch are named with it."""

    def advice(self, text: str, options: set[str]) -> str:
        name = text.partition("=")[0].removeprefix("--")
        if name not in OF_SBATCH:
            return super().advice(text, options)
        given = text if "=" in text or name in WITHOUT_VALUE else f"{text}=..."
        return f"; --sbatch={given} hands it on to sbatch"


@dataclass(frozen=True, kw_only=True)
class Template:
    """An .sbatch file: default options, and the text below them."""

    options: dict[str, str]
    body: str

    @classmethod
    def load(cls, name: str) -> Template:
        shebang, *lines = (FOLDER / name).read_text(encoding="utf-8").splitlines(keepends=True)
        assert shebang == "#!/bin/bash\n", name
        options = [line.removeprefix("#SBATCH --").strip() for line in lines if line.startswith("#SBATCH")]
        body = [line for line in lines if not line.startswith("#SBATCH")]
        return cls(options=dict(_key_value(option) for option in options), body="".join(body))


def script(
    template: Template,
    *,
    options: Mapping[str, str | None],
    more_options: Sequence[str],
    settings: Mapping[str, str],
    setup: Sequence[str],
    arguments: Sequence[str],
) -> str:
    """The whole script. Every value is quoted as data for the parser that reads it; only `setup` is code.

    options:      sbatch's long options over the template's; None drops one
    more_options: further ones as the user wrote them, "--gres=gpu:8"; none of `options`. Raises UserError
    settings:     exported variables
    setup:        lines of bash before anything else runs
    arguments:    what the template's "$@" is
    """
    merged: dict[str, str | None] = {**template.options, **options}
    for option in more_options:
        if not option.startswith("--") or option == "--":
            raise UserError(f"--sbatch {option}: write a long option of sbatch, e.g. --sbatch=--gres=gpu:8")
        name, given = _key_value(option.removeprefix("--"))
        if options.get(name) is not None:
            raise UserError(
                f"--sbatch={option}: --{name} follows from this command's own options, by which the job was checked; "
                f"give those instead (--help lists them)"
            )
        if name in REFUSED:
            raise UserError(f"--sbatch={option}: {REFUSED[name]}")
        ours = [whole for whole in (*options, *REFUSED) if whole.startswith(name)]
        if ours and name not in WHOLE_NAMES:
            raise UserError(
                f"--sbatch={option}: sbatch may take --{name} for --{ours[0]}, which is refused here; write the whole "
                f"name of the option that is meant"
            )
        merged[name] = given
    lines = ["#!/bin/bash"]
    for key, value in merged.items():
        if value is not None:
            lines.append(f"#SBATCH --{key}" + (f"={_for_sbatch(key, value)}" if value else ""))
    lines += [f"export {name}={shlex.quote(_one_line(name, value))}" for name, value in settings.items()]
    lines += setup
    lines.append(f"set -- {' '.join(shlex.quote(_one_line('an argument', part)) for part in arguments)}")
    return "\n".join(lines) + "\n" + template.body


def _key_value(option: str) -> tuple[str, str]:
    key, _, value = option.partition("=")
    if not re.fullmatch(r"[a-z][a-z0-9-]*", key):
        raise UserError(f"--sbatch --{option}: {key!r} is not the name of an option of sbatch")
    return key, value


def _for_sbatch(key: str, value: str) -> str:
    """The value as sbatch's own parser of #SBATCH lines reads it: a backslash or quotes protect a character."""
    value = _one_line(f"--{key}", value)
    if re.fullmatch(r"[\w@%+=:,./\[\]-]+", value, re.ASCII):
        return value
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _one_line(what: str, value: str) -> str:
    if not value.isprintable():
        raise UserError(f"{what}: {value!r} holds a character that cannot stand in a job script; use another name")
    return value


def output_pattern(path: Path) -> str:
    """A path for --output, whose % would otherwise begin a pattern such as %j."""
    if "\\" in str(path):
        raise UserError(f"--run-dir: {path} holds a backslash, which turns off SLURM's %j in names of logs; rename it")
    return str(path).replace("%", "%%")


def seconds_of(time: str) -> int:
    """Seconds of a time limit as SLURM writes it: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S. Raises UserError."""
    match = TIME.fullmatch(time)
    if match is None:
        shown = time if len(time) <= 60 else quoted(time)
        raise UserError(f"--time {shown}: write minutes (90), H:M:S (12:00:00) or D-H:M:S (2-00:00:00)")
    part = {name: int(value or 0) for name, value in match.groupdict().items()}
    return (
        86400 * part["days"]
        + 3600 * (part["day_hours"] + part["hours"])
        + 60 * (part["day_minutes"] + part["minutes"] + part["only_minutes"])
        + part["day_seconds"]
        + part["seconds"]
        + part["only_seconds"]
    )


def check_all_shared(places: Iterable[tuple[str, Path]], *, allow_local: bool) -> None:
    """`check_shared` of (what, path), each path once; warnings go to stderr. Raises UserError."""
    for path, what in {path: what for what, path in reversed(list(places))}.items():
        warning = check_shared(what, path, allow_local=allow_local)
        if warning is not None:
            print(f"warning: {warning}", file=sys.stderr)


def check_shared(what: str, path: Path, *, allow_local: bool) -> str | None:
    """A warning if it is unknown whether other hosts see `path`; None if they do. Raises UserError if they cannot.

    The path need not exist yet. `allow_local` (this host is the cluster) turns the check off.
    """
    if allow_local:
        return None
    path = path.resolve()
    kind = filesystem_type(path)
    local = next((folder for folder in LOCAL_FOLDERS if path.is_relative_to(folder)), None)
    if is_shared(kind):
        return None
    if local is not None or kind in LOCAL_TYPES:
        why = f"below {local}" if local is not None else f"on a {kind}"
        raise UserError(
            f"{what}: {path} is {why}, which the nodes of a cluster do not share; name a folder on a shared file "
            f"system, or add --allow-local if this host is the only node"
        )
    return f"{what}: {path} is on {kind or 'an unknown file system'}; make sure that every node sees it"


def write_once(folder: Path, stem: str, suffix: str, content: bytes) -> Path:
    """FOLDER/STEM-HASH.SUFFIX: a copy that no later submission changes. Raises UserError."""
    path = named_by_content(folder, stem, suffix, content)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            write_file(path, content)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}") from None
    return path


def named_by_content(folder: Path, stem: str, suffix: str, content: bytes) -> Path:
    return folder / f"{stem}-{hashlib.sha256(content).hexdigest()[:12]}{suffix}"


def say_nothing_submitted(config: Path) -> None:
    """What a dry run says of a script that cannot be handed to sbatch yet: the copy `config` is not there."""
    if not config.exists():
        print(
            f"note: nothing is submitted; the script reads a copy of the configuration, {config}, which only a "
            f"submission writes. Leave --dry-run out to submit it",
            file=sys.stderr,
        )


def need_sbatch() -> None:
    """Raises UserError if SLURM is not installed."""
    if shutil.which("sbatch") is None:
        raise UserError(
            "sbatch is not on the PATH: run this on a login node of the cluster, or add --dry-run to see the script"
        )


def submit(path: Path, *options: str) -> str:
    """Hands the script to SLURM; returns the job's number. Raises UserError with sbatch's own words."""
    need_sbatch()
    line = ["sbatch", "--parsable", *options, str(path)]
    try:
        done = subprocess.run(
            line, env=outside_of_jobs(os.environ), capture_output=True, text=True, timeout=120, check=False
        )
    except subprocess.TimeoutExpired:
        raise UserError("sbatch gave no answer within 120 s; is the controller up (scontrol ping)?") from None
    # The last line: some clusters greet the user on the same stream.
    job = (done.stdout.splitlines() or [""])[-1].strip().split(";")[0]
    if done.returncode != 0 or not job.isdecimal():
        words = " ".join((done.stderr or done.stdout).split())
        hint = (
            "; where the job before has ended well and is forgotten, leave --after out" if "ependency" in words else ""
        )
        raise UserError(f"sbatch refused the job: {words}{hint} (script: {path})")
    return job


def outside_of_jobs(env: Mapping[str, str]) -> dict[str, str]:
    """The environment without what SLURM says of the job around this process, if there is one: a shell on a compute
    node, a notebook. sbatch hands it on, and srun in the new job takes it for options of its own: memory by node where
    the new job has it by CPU, or CPUs that are the other job's, both of which it refuses."""
    if "SLURM_JOB_ID" not in env:
        return dict(env)
    return {name: value for name, value in env.items() if not name.startswith("SLURM") or name in OF_THE_CLUSTER}


def after(job: int | str) -> list[str]:
    """sbatch's options for a job that starts when another job (or a whole array) has ended well."""
    # kill-on-invalid-dep: otherwise it would stay in the queue for ever after a job that failed for good.
    return [f"--dependency=afterok:{job}", "--kill-on-invalid-dep=yes"]


def add_site_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of both commands that belong to the cluster."""
    parser.add_argument("--partition", metavar="NAME", help="partition (default: the cluster's)")
    parser.add_argument("--account", metavar="NAME", help="account to be charged")
    parser.add_argument("--qos", metavar="NAME", help="quality of service")
    parser.add_argument("--job-name", metavar="NAME", help="name in squeue")
    parser.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION",
        help="any further long option of sbatch, repeatable: --sbatch=--gres=gpu:8 --sbatch=--mail-type=END,FAIL",
    )
    parser.add_argument(
        "--srun",
        action="append",
        default=[],
        metavar="OPTION",
        help="further option of srun, repeatable: --srun=--container-image=/shared/torch.sqsh",
    )
    parser.add_argument(
        "--setup",
        action="append",
        default=[],
        metavar="LINE",
        help="a line of bash at the start of the job, repeatable: --setup 'module load cuda/12.4'",
    )
    parser.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a variable for the job, repeatable: --env NCCL_SOCKET_IFNAME=ib0",
    )
    parser.add_argument(
        "--python", metavar="FILE", help="interpreter on the nodes (default: the one that runs this command)"
    )
    parser.add_argument(
        "--allow-local", action="store_true", help="this host is the cluster: do not ask for shared file systems"
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the script, submit nothing")


def variables(assignments: Sequence[str]) -> dict[str, str]:
    """The --env arguments. Raises UserError."""
    found = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise UserError(f"--env {assignment}: write it as NAME=VALUE")
        if SECRET_NAME.search(name) or may_hold_secret(value):
            raise UserError(
                f"--env {name}: looks like a secret, which the job's script would keep; export {name} in the shell "
                f"that submits instead (sbatch hands its environment on)"
            )
        found[name] = value
    return found


def site_options(arguments: argparse.Namespace, name: str) -> dict[str, str | None]:
    """sbatch options for the arguments above; an option that is not given keeps the cluster's default."""
    given = {"partition": arguments.partition, "account": arguments.account, "qos": arguments.qos}
    return {"job-name": arguments.job_name or name, **{key: value for key, value in given.items() if value}}


def srun_options(arguments: argparse.Namespace) -> dict[str, str]:
    """The --srun arguments as the scripts read them. Raises UserError."""
    wrong = next((option for option in arguments.srun if not re.match(r"--[a-z]", option)), None)
    if wrong is not None:
        raise UserError(f"--srun {wrong}: write a long option of srun, e.g. --srun=--cpu-bind=none")
    return {"SRUN_OPTIONS": shlex.join(arguments.srun)} if arguments.srun else {}


def python_is_in_container(arguments: argparse.Namespace) -> bool:
    """Whether --python may be a file that only a container has (pyxis: --container-image; srun's own --container)."""
    is_path = arguments.python is not None and os.path.isabs(arguments.python)
    return is_path and any(option.startswith("--container") for option in arguments.srun)


def python_of_the_job(arguments: argparse.Namespace) -> str:
    """Absolute path of the interpreter that srun starts. Raises UserError."""
    if python_is_in_container(arguments):
        return str(arguments.python)
    return on_path(arguments.python or sys.executable)


def on_path(path: str) -> str:
    """An absolute path of an interpreter, symbolic links kept: a venv's python is one. Raises UserError."""
    found = os.path.abspath(path) if os.sep in path else shutil.which(path)
    if found is None or not os.access(found, os.X_OK):
        raise UserError(f"--python: {path} cannot be executed here; name the interpreter of the nodes' environment")
    return found
