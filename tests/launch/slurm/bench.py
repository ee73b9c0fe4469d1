"""A bench for the job scripts: srun, scontrol and others that only write down how they were called."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from common.paths import REPOSITORY
from launch.slurm import job

# sh starts Python, whose path may hold a space, which a first line may not.
STUB = """#!/bin/sh
'''exec' '{python}' "$0" "$@"
' '''
import json, os, pathlib, signal, sys, time
name, folder = os.path.basename(sys.argv[0]), os.environ["STUBS"]
with open(f"{{folder}}/{{name}}.calls", "a") as file:
    file.write(json.dumps([sys.argv[1:], os.environ.get("MASTER_PORT"), os.environ.get("OMP_NUM_THREADS")]) + "\\n")
if name == "srun":
    checkpoint = os.environ.get("MAKES")
    if os.environ.get("SAYS"):
        log = f"{{os.environ['RUN_DIR']}}/slurm/7.rank{{os.environ.get('SAYS_IT', '0')}}.log"
        with open(log, "w") as file:
            file.write(os.environ["SAYS"])
    if checkpoint:
        os.makedirs(f"{{os.environ['RUN_DIR']}}/checkpoints/{{checkpoint}}", exist_ok=True)
    if os.environ.get("OUTCOME"):
        sys.path.append('{repository}')
        from common.files import write_json
        time.sleep(0.02)  # outcome.json is newer than the start
        write_json(pathlib.Path(os.environ["RUN_DIR"]) / "outcome.json", json.loads(os.environ["OUTCOME"]))
    for line in json.loads(os.environ.get("TASKS", "[]")):
        print("srun: error: " + line, file=sys.stderr)
    time.sleep(float(os.environ.get("SRUN_SECONDS", "0")))
    sys.exit(int(os.environ.get("SRUN_CODE", "0")))
if name == "scontrol" and sys.argv[1] == "requeue":
    if os.environ.get("ENDS"):
        os.killpg(0, signal.SIGTERM)  # all of the job's processes, this one too
    sys.exit(int(os.environ.get("REQUEUE_CODE", "0")))
if name == "scontrol" and sys.argv[1] == "update":
    sys.exit(int(os.environ.get("UPDATE_CODE", "0")))
if name == "scontrol":
    state = "JobState=COMPLETING Reason=" + os.environ.get("REASON", "None")
    print(f"JobId=7 {{state}} Dependency=(null) ExcNodeList={{os.environ.get('GIVEN', '(null)')}} NodeList=node[1-2]")
if name == "sinfo":
    print(os.environ.get("UP", "node1\\nnode2\\nnode2\\nnode3"))
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

    def start(self, script: Path, *arguments: str, **more: str) -> tuple[int, str]:
        process = self.open(script, *arguments, **more)
        output, _ = process.communicate(timeout=300)
        return process.returncode, output

    def train(self, **more: str) -> tuple[int, str]:
        return self.start(job.FOLDER / "pretrain.sbatch", "--config", "c.json", **more)

    def calls(self, name: str) -> list[list[object]]:
        path = self.folder / f"{name}.calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def excluded(self) -> list[object]:
        return [call[0][2] for call in self.calls("scontrol") if call[0][0] == "update"]  # type: ignore[index]

    def requeues(self) -> list[object]:
        return [call[0][1] for call in self.calls("scontrol") if call[0][0] == "requeue"]  # type: ignore[index]


def make_bench(folder: Path) -> Bench:
    (folder / "bin").mkdir()
    for name in ("srun", "scontrol", "sinfo", "sleep"):
        path = folder / "bin" / name
        path.write_text(STUB.format(python=sys.executable, repository=REPOSITORY))
        path.chmod(0o755)
    return Bench(folder)
