"""A bench for the job scripts: srun, scontrol and others that only write down how they were called."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from common.files import write_json
from common.paths import REPOSITORY
from launch.slurm import job

# In sh: Python takes ten times as long to start as all of this, and a job calls half a dozen of them.
STUB = r"""#!/bin/sh
name=${0##*/}
printf '%s\0' "$#" "$@" "${MASTER_PORT-}" "${OMP_NUM_THREADS-}" >>"$STUBS/$name.calls"
case $name:$1 in
srun:*)
  [ -z "$SAYS$OUTCOME" ] || command -p sleep 0.02 # what ranks leave is newer than the start
  [ -z "$SAYS" ] || printf %s "$SAYS" >"$RUN_DIR/slurm/7.rank${SAYS_IT:-0}.log"
  [ -z "$MAKES" ] || mkdir -p "$RUN_DIR/checkpoints/$MAKES"
  [ -z "$OUTCOME" ] || cp "$OUTCOME" "$RUN_DIR/outcome.json"
  printf %s "$TASKS" >&2
  looks=0 # of 0.02 s, until the test lets the ranks go
  while [ -n "$RANKS_STAY" ] && [ ! -e "$STUBS/go" ] && [ "$looks" -lt 5000 ]; do
    looks=$((looks + 1))
    command -p sleep 0.02
  done
  exit "${SRUN_CODE:-0}" ;;
scontrol:requeue)
  [ -z "$ENDS" ] || kill -TERM 0 # all of the job's processes, this one too
  exit "${REQUEUE_CODE:-0}" ;;
scontrol:update) exit "${UPDATE_CODE:-0}" ;;
scontrol:*)
  echo "JobId=7 JobState=${STATE:-RUNNING} Reason=${REASON:-None} Dependency=(null) Requeue=${REQUEUE:-1} Restarts=0" \
    "EndTime=${END_TIME:-Unknown} Deadline=N/A" \
    "ExcNodeList=${GIVEN:-(null)} NodeList=node[1-2]" ;;
sinfo:*) printf '%s\n' "${UP:-node1
node2
node2
node3}" ;;
esac
"""


@dataclass
class Bench:
    """One job in a folder: `start` runs a script as SLURM would have, `calls` says what it did."""

    folder: Path
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def run_dir(self) -> Path:
        return self.folder / "it's a run"

    def environment(self, **more: str) -> dict[str, str]:
        """`more`: what commands do. TASKS: a list, what srun says of tasks; OUTCOME: an outcome.json that is left."""
        if "TASKS" in more:
            more["TASKS"] = "".join(f"srun: error: {line}\n" for line in json.loads(more["TASKS"]))
        if "OUTCOME" in more:
            write_json(self.folder / "outcome", json.loads(more["OUTCOME"]))
            more["OUTCOME"] = str(self.folder / "outcome")
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "OMP", "MASTER"))}
        return {
            **clean,
            "PATH": f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "STUBS": str(self.folder),
            "RUN_DIR": str(self.run_dir),
            "REPOSITORY": str(REPOSITORY),
            "PYTHON": sys.executable,
            "SLURM_JOB_ID": "7",
            "SLURM_NTASKS": "2",
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_PARTITION": "night",
            **more,
        }

    def open(self, script: Path, *arguments: str, **more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", str(script), *arguments],
            env=self.environment(**more),
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def terminate(self, process: subprocess.Popen[str], *, starts: int) -> None:
        """SIGTERM, twice as SLURM sends it, while the ranks of start number `starts` run, which RANKS_STAY keeps until
        then."""
        deadline = time.monotonic() + 60
        while len(self.calls("srun")) < starts and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGTERM)
        (self.folder / "go").touch()

    def start(self, script: Path, *arguments: str, **more: str) -> tuple[int, str]:
        process = self.open(script, *arguments, **more)
        output, _ = process.communicate(timeout=300)
        return process.returncode, output

    def train(self, **more: str) -> tuple[int, str]:
        return self.start(job.FOLDER / "pretrain.sbatch", "--config", "c.json", **more)

    def calls(self, name: str) -> list[tuple[list[str], str, str]]:
        """Of each call of a command so far: its arguments, the port of the ranks and their threads."""
        path, found = self.folder / f"{name}.calls", []
        words = path.read_bytes().decode().split("\0")[:-1] if path.exists() else []
        while words:
            count = int(words[0])
            found.append((words[1 : count + 1], words[count + 1], words[count + 2]))
            words = words[count + 3 :]
        return found

    def excluded(self) -> list[str]:
        return [call[0][2] for call in self.calls("scontrol") if call[0][0] == "update"]

    def requeues(self) -> list[str]:
        return [call[0][1] for call in self.calls("scontrol") if call[0][0] == "requeue"]


def make_bench(folder: Path) -> Bench:
    (folder / "bin").mkdir()
    for name in ("srun", "scontrol", "sinfo", "sleep"):
        path = folder / "bin" / name
        path.write_text(STUB)
        path.chmod(0o755)
    return Bench(folder)
