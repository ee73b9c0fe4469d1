#!/usr/bin/env python
"""What this machine has for training, what is missing, and how to get it: python launch/doctor.py

Uses the standard library alone and guards every import, so it also runs before anything is installed, on any Python
from 3.8 on. The exit status is 1 if something that training needs is missing.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
# Python puts this file's folder first, where `import pretrain` would find launch/pretrain.py instead of the package.
sys.path[0] = str(ROOT)

import common.interruption  # noqa: E402, F401  # before anything that takes long
from common.limits import memory_limit, usable_cores  # noqa: E402
from common.requirements import fits, installed, name_of, requirements  # noqa: E402
from common.wrong_python import PYTHONS  # noqa: E402

MINIMUM_DRIVER = {"13": 580, "12": 525}
"""The oldest NVIDIA driver for each major version of the CUDA that torch was built with (NVIDIA's compatibility
table)."""
INSTALL = "make -B install"
"""-B: a bare `make install` does nothing if it has run before, even if packages were lost since."""
GB = 1e9


class Finding(NamedTuple):
    """One line of the report."""

    name: str
    found: str
    fix: str = ""
    """How to get what is missing; empty if nothing is."""
    is_needed: bool = False
    """Training does not start without it."""


def python() -> Iterator[Finding]:
    version, usable = platform.python_version(), PYTHONS[0] <= sys.version_info[:2] < PYTHONS[1]
    fix = "" if usable else "install one of Python 3.11 to 3.14, then make install PYTHON=/path/to/python3.12"
    yield Finding("Python", f"{version} ({sys.executable})", fix, True)
    header = Path(sysconfig.get_path("include")) / "Python.h"
    fix = "" if header.exists() else "install Python's headers (Debian: python3-dev)"
    yield Finding("Python.h", "found" if header.exists() else "none (triton on a GPU compiles with it)", fix)


def packages() -> Iterator[Finding]:
    """The dependencies of pyproject.toml; torch and triton have lines of their own."""
    for requirement in requirements():
        name = name_of(requirement)
        if name == "torch":
            continue
        version = installed(name)
        if version is None:
            yield Finding(name, f"none ({requirement})", INSTALL, True)
        elif not fits(requirement, version):
            yield Finding(name, f"{version} (needed: {requirement})", INSTALL, True)
        else:
            yield Finding(name, version, "", True)


def bytecode() -> Iterator[Finding]:
    """Whether Python finds, or may write, the compiled form of the two largest packages."""
    missing = False
    for name in ("torch", "deepspeed"):
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            return
        path = Path(importlib.util.cache_from_source(spec.origin))
        folder = next(parent for parent in path.parents if parent.exists())
        missing |= not path.exists() and (sys.dont_write_bytecode or not os.access(folder, os.W_OK))
        site = Path(spec.origin).parents[1]
    if missing:
        why = "PYTHONDONTWRITEBYTECODE is set" if sys.dont_write_bytecode else "its folder cannot be written"
        command = [sys.executable, "-m", "compileall", "-q", "-j", "0", str(site)]
        fix = f"each rank compiles torch and deepspeed anew: once, {shlex.join(command)}"
        yield Finding("bytecode", f"none, and {why}", fix)


def torch_and_gpu() -> Iterator[Finding]:
    """Whether torch and triton can be imported, the GPUs, and whether the driver fits this build of torch."""
    gpus = _run("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader").splitlines()
    driver = gpus[0].rsplit(",", 1)[-1].strip() if gpus else ""
    requirement = next(text for text in requirements() if text.startswith("torch"))
    version, cuda = installed("torch"), None
    if version is None:
        yield Finding("torch", f"none ({requirement})", f"{INSTALL} (CUDA=cpu, cu126 or cu130 chooses)", True)
    else:
        try:
            cuda = importlib.import_module("torch").version.cuda
        except Exception as error:  # a broken build may fail in any way: missing libraries, another processor
            reason = str(error).splitlines()[0] if str(error) else ""
            found = f"{version} does not import: {type(error).__name__}: {reason}"
            # Not `make clean install`, which would also remove prepared data and the demo's run.
            yield Finding("torch", found, "rm -r .venv && make install", True)
        else:
            fix = "" if fits(requirement, version) else f"{INSTALL} ({requirement} is needed)"
            yield Finding("torch", f"{version}, {f'CUDA {cuda}' if cuda else 'CPU build'}", fix, True)
    triton = installed("triton")
    fix = (
        ""
        if triton
        else 'a CUDA build of torch brings its own; without a GPU only tests need it: pip install -e ".[dev]"'
    )
    yield Finding("triton", triton or "none", fix)
    if not gpus:
        yield Finding("GPU", "none: training runs on the CPU")
        return
    for line in gpus:
        yield Finding("GPU", line.rsplit(",", 1)[0])
    major, fix = driver.split(".")[0], ""
    known = int(major) if major.isdecimal() else MINIMUM_DRIVER["13"]
    build = "cu130" if known >= MINIMUM_DRIVER["13"] else "cu126"
    needed = MINIMUM_DRIVER.get((cuda or "").split(".")[0], 0)
    if known < needed:
        fix = f"CUDA {cuda}, which torch was built with, needs driver {needed} or newer: update the driver"
        if known >= MINIMUM_DRIVER["12"]:
            fix += f", or take the build for CUDA 12: {INSTALL} CUDA={build}"
    yield Finding("NVIDIA driver", driver, fix, True)
    if version is not None and cuda is None:
        yield Finding("torch for the GPU", "none: a CPU build does not see it", f"{INSTALL} CUDA={build}")


def programs() -> Iterator[Finding]:
    """Compilers and the programs that launchers call."""
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    for name, option, purpose, fix in (
        ("gcc", "-dumpfullversion", "triton on a GPU", "Debian: apt install gcc"),
        ("g++", "-dumpfullversion", "DeepSpeed's own operators", "Debian: apt install g++"),
        ("ninja", "--version", "DeepSpeed's own operators", INSTALL),
        ("nvcc", "--version", "DeepSpeed's own operators on a GPU, kernels.backend=cuda", "install the CUDA toolkit"),
        ("numactl", "--version", "binding ranks to NUMA nodes", "Debian: apt install numactl"),
        ("pdsh", "-V", "several nodes without SLURM", "Debian: apt install pdsh"),
    ):
        home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
        path = shutil.which(name, path=places + os.pathsep + os.path.join(home, "bin"))
        if path is None:
            yield Finding(name, f"none (for {purpose})", fix)
        else:
            versions = re.findall(r"\d+(?:\.\d+)+", _run(path, option))
            yield Finding(name, f"{versions[-1] if versions else 'found'} ({path})")


def machine() -> Iterator[Finding]:
    """Cores, memory and the two places that fill up. Sizes in units of 1e9 bytes."""
    yield Finding("cores", f"{usable_cores()} of {os.cpu_count()}, {platform.machine()}")
    yield Finding("memory", _memory())
    free = shutil.disk_usage(ROOT).free
    fix = "" if free > 10 * GB else "free some: .venv takes 2.5 GB with a CPU build of torch, 9 GB with a CUDA build"
    yield Finding("disk", f"{free / GB:.1f} GB free in {ROOT}", fix)
    if not os.path.isdir("/dev/shm"):
        yield Finding("/dev/shm", "none", "mount a tmpfs there: NCCL's ranks of one node talk through it")
        return
    shared = shutil.disk_usage("/dev/shm")
    fix = "" if shared.total >= GB else "NCCL's ranks of one node talk through it; in Docker: --shm-size=8g"
    yield Finding("/dev/shm", f"{shared.free / GB:.1f} of {shared.total / GB:.1f} GB free", fix)


def _memory() -> str:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        sizes = {line.split(":")[0]: 1024 * int(line.split()[1]) for line in lines}
        text = f"{sizes['MemAvailable'] / GB:.1f} of {sizes['MemTotal'] / GB:.1f} GB available"
    except (OSError, LookupError, ValueError):
        return "unknown"
    limit = memory_limit()
    return text if limit >= sizes["MemTotal"] else f"{text}, limited to {limit / GB:.1f} GB by its cgroup"


def _run(*command: str) -> str:
    """Standard output and errors of a command; empty if it is missing, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout + done.stderr


def examine() -> list[Finding]:
    """The whole report."""
    if sys.version_info[:2] < PYTHONS[0]:  # it cannot read pyproject.toml
        return [*python(), *programs(), *machine()]
    return [finding for part in (python, torch_and_gpu, packages, bytecode, programs, machine) for finding in part()]


def describe(findings: list[Finding], missing: dict[bool, list[Finding]]) -> str:
    """The report as text: what was found, then what is missing, by whether it is needed."""
    width = max(len(finding.name) for finding in findings) + 2
    lines = [f"{finding.name:{width}}{finding.found}" for finding in findings]
    for needed, heading in ((True, "Missing, and needed:"), (False, "Missing, needed only for what it says:")):
        if missing[needed]:
            lines += ["", heading, *_fixes(missing[needed], width)]
    end = "Something that training needs is missing." if missing[True] else "Everything that training needs is here."
    return "\n".join([*lines, "", end])


def _fixes(missing: list[Finding], width: int) -> Iterator[str]:
    """What is missing and how to get it; what one command brings stands together."""
    together = [f.name for f in missing if f.fix == INSTALL]
    if len(together) > 3:
        yield f"  {INSTALL}"
        yield from textwrap.wrap(", ".join(together), 100, initial_indent="    for ", subsequent_indent="    ")
    for finding in missing:
        if len(together) <= 3 or finding.fix != INSTALL:
            yield f"  {finding.name:{width}}{finding.fix}"


def main() -> int:
    argparse.ArgumentParser(prog="launch/doctor.py", description=(__doc__ or "").splitlines()[0]).parse_args()
    findings = examine()
    missing = {needed: [f for f in findings if f.fix and f.is_needed == needed] for needed in (True, False)}
    try:
        print(describe(findings, missing), flush=True)
    except OSError as error:
        if not isinstance(error, BrokenPipeError):  # a reader that has left, e.g. `head`, is no error
            print(
                f"warning: stdout cannot be written ({error.strerror}); the exit code is the verdict", file=sys.stderr
            )
        # The rest is discarded, or Python would report the error again when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1 if missing[True] else 0


if __name__ == "__main__":
    sys.exit(main())
