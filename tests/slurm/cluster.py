"""A real two-node SLURM on this host, in a temporary folder: `python -m tests.slurm.cluster` opens a shell in it.

munged, slurmctld and one slurmd per node are children of this process, in the foreground, and die with it. Nothing of
another SLURM on the host is read or touched: ports are free ones, sockets, spool and state lie in the folder.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "sinfo", "scancel")
PACKAGES = ("slurm-wlm", "munge")
NODES = ("node1", "node2")
STEP = "slurmstepd"
TEMPLATE = Path(__file__).with_name("slurm.conf.in")
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


class SlurmUnavailable(RuntimeError):
    """SLURM is not installed and cannot be."""


def install() -> None:
    """Installs SLURM through apt if it is absent. Raises SlurmUnavailable, with the command, where that is not ours to
    do."""
    missing = [program for program in PROGRAMS if _program(program) is None]
    if not missing:
        return
    command = f"apt-get install -y --no-install-recommends {' '.join(PACKAGES)}"
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        raise SlurmUnavailable(
            f"{', '.join(missing)}: not installed, and only root on Debian or Ubuntu can be helped: run `{command}` as "
            f"root, or install SLURM 22.05 or newer and munge"
        )
    print(f"installing {' and '.join(PACKAGES)}", flush=True)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for line in (["apt-get", "update", "-q"], command.split()):
        done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode != 0:
        raise SlurmUnavailable(f"`{command}` failed: {done.stderr.strip()[-500:]}")


def _program(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin:/sbin")


class Cluster:
    """Context manager: up on entry, down on exit whatever happened. `environment` is what its commands need."""

    def __init__(self) -> None:
        # SLURM's own paths allow neither spaces nor more than 108 characters of socket name.
        self.base = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        self.conf = self.base / "slurm.conf"
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._on_sigterm: Any = signal.SIG_DFL

    @property
    def environment(self) -> dict[str, str]:
        foreign = ("SLURM", "SBATCH", "SRUN", "SINFO", "SQUEUE", "SCANCEL")
        own = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
        return {**own, "SLURM_CONF": str(self.conf)}

    def __enter__(self) -> Cluster:
        install()
        # Whatever a daemon leaves behind becomes a child of this process, so that `_kill_rest` finds it.
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1)
        self._on_sigterm = signal.signal(
            signal.SIGTERM, signal.default_int_handler
        )  # an end like Ctrl-C, with clean-up
        try:
            self._configure()
            munge = self.base / "munge"
            self._start(
                "munged",
                "--foreground",
                "--force",  # the folder below /tmp has permissive parents
                f"--key-file={munge}/munge.key",
                f"--socket={munge}/munge.socket",
                f"--pid-file={munge}/munged.pid",
                f"--log-file={munge}/munged.log",
                f"--seed-file={munge}/munged.seed",
            )
            self._wait_for(lambda: (munge / "munge.socket").exists(), "munged")
            self._start("slurmctld", "-D", "-f", str(self.conf))
            for node in NODES:
                self.start_node(node)
            self._wait_for(self._all_idle, "the nodes")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if "slurmctld" in self._daemons:
            self.run("scancel", f"--user={getpass.getuser()}", check=False)
            deadline = time.monotonic() + 15
            while time.monotonic() < deadline and self.run("squeue", "-h", check=False).stdout.strip():
                time.sleep(0.2)
        for name in ("slurmctld", *(f"slurmd {node}" for node in NODES), "munged"):
            self._stop(name, signal.SIGTERM)
        self._kill_rest()
        signal.signal(signal.SIGTERM, self._on_sigterm)
        shutil.rmtree(self.base, ignore_errors=True)

    def run(self, *command: str, check: bool = True, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """A command of SLURM in this cluster."""
        try:
            done = subprocess.run(
                command, env=self.environment, capture_output=True, text=True, timeout=timeout, check=False
            )
        except subprocess.TimeoutExpired:
            done = subprocess.CompletedProcess(command, 124, "", f"no answer within {timeout:.0f} s")
        assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stderr}{done.stdout}"
        return done

    def job(self, job_id: str) -> dict[str, str]:
        """The fields of `scontrol show job`."""
        text = self.run("scontrol", "--oneliner", "show", "job", job_id).stdout
        return dict(part.split("=", 1) for part in text.split() if "=" in part)

    def start_node(self, node: str) -> None:
        self._start("slurmd", "-D", "-f", str(self.conf), "-N", node, name=f"slurmd {node}")

    def kill_node(self, node: str) -> None:
        """SIGKILL to the slurmd of a node and everything that runs on it: what a power failure looks like."""
        self._stop(f"slurmd {node}", signal.SIGKILL)
        steps = {step: step.children(recursive=True) for step in self._of_this_cluster() if _name(step) == STEP}
        lost = [step for step, below in steps.items() if any(_variable(p, "SLURMD_NODENAME") == node for p in below)]
        for process in [*lost, *(p for step in lost for p in steps[step])]:  # steps first: they would report the rest
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def tasks(self, node: str | None = None) -> list[psutil.Process]:
        """The processes of jobs' tasks, on one node or all."""
        found = [p for p in self._of_this_cluster() if _variable(p, "SLURM_STEP_ID") is not None]
        return [p for p in found if node is None or _variable(p, "SLURMD_NODENAME") == node]

    def logs(self) -> str:
        """The ends of the daemons' logs, for a failed test."""
        return "\n".join(
            f"== {path.name}\n{path.read_text()[-3000:]}" for path in sorted((self.base / "log").glob("*"))
        )

    def _configure(self) -> None:
        for folder in ("munge", "log", "run", "state", *(f"spool.{node}" for node in NODES)):
            (self.base / folder).mkdir()
        self.base.chmod(0o711)
        (self.base / "munge").chmod(0o711)
        key = self.base / "munge" / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        text = TEMPLATE.read_text(encoding="utf-8")
        ports = _free_ports(3)
        for name, value in {
            "BASE": self.base,
            "USER": getpass.getuser(),
            "CPUS": max(2, os.cpu_count() or 1),
            "CONTROLLER_PORT": ports[0],
            "NODE1_PORT": ports[1],
            "NODE2_PORT": ports[2],
        }.items():
            text = text.replace(f"@{name}@", str(value))
        self.conf.write_text(text, encoding="utf-8")

    def _start(self, program: str, *arguments: str, name: str = "") -> None:
        path = _program(program)
        assert path is not None, program
        log = (self.base / "log" / f"{name.replace(' ', '-') or program}.out").open("ab")
        with log:
            self._daemons[name or program] = subprocess.Popen(
                [path, *arguments],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.base,
                preexec_fn=lambda: ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM),
            )

    def _stop(self, name: str, number: int) -> None:
        daemon = self._daemons.pop(name, None)
        if daemon is None:
            return
        daemon.send_signal(number)
        try:
            daemon.wait(timeout=15)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()

    def _kill_rest(self) -> None:
        left = self._of_this_cluster()
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=10)

    def _of_this_cluster(self) -> list[psutil.Process]:
        """What the daemons have started: descendants of this process that manage a job step (SLURM leaves them no
        environment) or run with this cluster's configuration."""
        daemons = {daemon.pid for daemon in self._daemons.values()}
        return [
            process
            for process in psutil.Process().children(recursive=True)
            if process.pid not in daemons
            and (_name(process) == STEP or _variable(process, "SLURM_CONF") == str(self.conf))
        ]

    def _all_idle(self) -> bool:
        states = self.run("sinfo", "--noheader", "--Node", "--format=%T", check=False).stdout.split()
        return states == ["idle"] * len(NODES)

    def _wait_for(self, ready: object, what: str) -> None:
        deadline = time.monotonic() + 60
        while not ready():  # type: ignore[operator]
            if time.monotonic() > deadline:
                raise SlurmUnavailable(f"{what} did not come up within 60 s:\n{self.logs()}")
            time.sleep(0.1)


def _name(process: psutil.Process) -> str | None:
    try:
        return process.name()
    except psutil.NoSuchProcess:
        return None


def _variable(process: psutil.Process, name: str) -> str | None:
    try:
        return process.environ().get(name)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return None


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.slurm.cluster", description=__doc__)
    parser.add_argument("command", nargs=argparse.REMAINDER, help="what is run in it, in the place of a shell")
    command = parser.parse_args().command or [os.environ.get("SHELL", "bash")]
    with Cluster() as cluster:
        print(f"SLURM of two nodes, SLURM_CONF={cluster.conf}; leave the shell to stop it", flush=True)
        return subprocess.run(command, env=cluster.environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
