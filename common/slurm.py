"""What SLURM tells its jobs: a task's place among those of srun, which torch reads from other variables."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from collections.abc import Collection, Mapping

from common.errors import UserError

FIRST_PORT, PORTS = 10_000, 20_000
"""Ports of jobs: below 32768, from where the kernel takes the ports of outgoing connections."""
OF_A_TASK = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID", "WORLD_SIZE": "SLURM_STEP_NUM_TASKS"}
"""A launcher's variables, and those of srun that say the same."""


def job_id(env: Mapping[str, str]) -> str | None:
    """The number of the job that this process belongs to, the same after a requeue; None outside of SLURM."""
    return env.get("SLURM_JOB_ID")


def is_task_of_many(env: Mapping[str, str]) -> bool:
    """Whether srun started this process as one of several."""
    return "SLURM_PROCID" in env and int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def node_name(env: Mapping[str, str]) -> str:
    """This machine's name: in a task of srun the one that SLURM knows it by, else its host name."""
    return (is_task_of_many(env) and env.get("SLURMD_NODENAME")) or socket.gethostname()


def launcher_variables(env: Mapping[str, str]) -> dict[str, str]:
    """RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_SIZE, MASTER_ADDR and MASTER_PORT of this task of srun.

    Empty outside of srun, in a step of one task, and where another launcher has set WORLD_SIZE; LOCAL_SIZE alone where
    a container has set the others of this task. MASTER_ADDR and MASTER_PORT stay as they are if both are set. Raises
    UserError if the first node's address cannot be found.
    """
    if not is_task_of_many(env):
        return {}
    if "WORLD_SIZE" in env:
        # In NVIDIA's images enroot and pyxis set all but the size of a node; then every rank would take all of them for
        # those of its node, and neither code nor copies of the data of several nodes would be compared.
        is_ours = all(env.get(ours) == env.get(its) for ours, its in OF_A_TASK.items())
        is_lacking = is_ours and not env.keys() & {"LOCAL_SIZE", "LOCAL_WORLD_SIZE"}
        return {"LOCAL_SIZE": _tasks_of_this_node(env)} if is_lacking else {}
    return {
        **{ours: env[its] for ours, its in OF_A_TASK.items()},
        "LOCAL_SIZE": _tasks_of_this_node(env),
        "MASTER_ADDR": env.get("MASTER_ADDR") or first_address(env["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": env.get("MASTER_PORT") or str(job_port(env)),
    }


def _tasks_of_this_node(env: Mapping[str, str]) -> str:
    return str(tasks_per_node(env["SLURM_STEP_TASKS_PER_NODE"])[int(env["SLURM_NODEID"])])


def tasks_per_node(text: str) -> list[int]:
    """SLURM's short form of a list, one number per node: "2(x3),1" is 2, 2, 2, 1."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        assert match is not None, f"SLURM_STEP_TASKS_PER_NODE={text}"
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def job_port(env: Mapping[str, str]) -> int:
    """A port that all tasks derive in the same way from job, step and restart, so that jobs on one node differ."""
    job, step, restart = (int(env.get(f"SLURM_{name}", "0")) for name in ("JOB_ID", "STEP_ID", "RESTART_COUNT"))
    return FIRST_PORT + (job * 131 + step * 17 + restart) % PORTS


def jobs_in_queue(jobs: Collection[str], *, timeout_seconds: float = 20.0) -> dict[str, str]:
    """Those of `jobs`, by number, that wait or run, and squeue's word on why they do not run ("None": they do). Raises
    OSError if there is no squeue, and UserError if it cannot tell."""
    line = ["squeue", "--noheader", "--format=%A %r", f"--jobs={','.join(sorted(jobs))}"]
    # Without what squeue would leave out jobs by, such as SQUEUE_USERS or SQUEUE_STATES.
    env = {name: value for name, value in os.environ.items() if not name.startswith("SQUEUE_")}
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=timeout_seconds, check=False, env=env)
        said = (done.stderr.strip() or f"exit code {done.returncode}") if done.returncode else ""
    except subprocess.TimeoutExpired:
        said = f"no answer in {timeout_seconds:.0f} s"
    if said and "Invalid job id" not in said:  # which it says where none of them is known any more
        which = f"job {next(iter(jobs))} has" if len(jobs) == 1 else f"the jobs {', '.join(sorted(jobs))} have"
        raise UserError(f"squeue: does not say whether {which} ended ({said}); try the same command later")
    rows = [row.partition(" ") for row in done.stdout.splitlines()] if not said else []
    return {job: why.strip() for job, _, why in rows if job in jobs}


def first_address(nodes: str) -> str:
    """An address of the first of `nodes` ("node[1-2]"), where rank 0 is: the node's name if it resolves, else the
    address that SLURM itself uses (NodeAddr). Raises UserError."""
    name = _scontrol("show", "hostnames", nodes).split()[0]
    try:
        socket.getaddrinfo(name, None)
        return name
    except OSError:
        pass
    found = re.search(r"\bNodeAddr=(\S+)", _scontrol("--oneliner", "show", "node", name))
    if found is None:
        raise UserError(f"MASTER_ADDR: the node {name} has no address in DNS or SLURM; export MASTER_ADDR before srun")
    return found[1]


def _scontrol(*arguments: str) -> str:
    try:
        done = subprocess.run(["scontrol", *arguments], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", "") or str(error)).strip()
        raise UserError(
            f"MASTER_ADDR: scontrol {' '.join(arguments)} failed ({reason}); export MASTER_ADDR, the address of the "
            f"first node, before srun"
        ) from None
    return done.stdout
