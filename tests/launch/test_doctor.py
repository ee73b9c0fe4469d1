"""The doctor on machines as they are found: nothing installed, an old driver, the wrong build of torch."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.specifiers import SpecifierSet

from launch import doctor

ROOT = Path(__file__).resolve().parents[2]
DOCTOR = ROOT / "launch" / "doctor.py"


def report(*options: str, path: str = os.environ["PATH"]) -> tuple[int, str]:
    line = [sys.executable, *options, str(DOCTOR)]
    done = subprocess.run(line, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    return done.returncode, done.stdout


def test_an_installation_is_complete() -> None:
    code, text = report()
    assert code == 0, text
    assert text.endswith("Everything that training needs is here.\n")
    for name in ("Python", "torch", "triton", "deepspeed", "GPU", "gcc", "cores", "memory", "disk", "/dev/shm"):
        assert re.search(rf"(?m)^{name} +\S", text), name


def test_without_any_package_it_names_what_is_missing_and_how_to_get_it(tmp_path: Path) -> None:
    code, text = report("-S", path=str(tmp_path))  # no site-packages, no program
    assert code == 1
    needed, optional = text.split("Missing, and needed:")[1].split("Missing, needed only for what it says:")
    assert re.search(r"(?m)^  torch +make -B install \(CUDA=cpu, cu126 or cu130 chooses\)", needed)
    together = re.search(r"(?m)^  make -B install\n    for ([^()]*?)\n  \w", needed)
    assert together is not None and needed.count("make -B install") == 2
    names = re.split(r",\s+", together[1])
    assert {"deepspeed", "megatron-core", "sentencepiece"} <= set(names) and len(names) == len(set(names))
    for name, fix in (("g\\+\\+", "Debian: apt install"), ("triton", "a CUDA build of torch"), ("numactl", "Debian")):
        assert re.search(rf"(?m)^  {name} +{fix}", optional), name


def test_bytecode_that_is_never_written_is_named_with_the_command_that_writes_it(tmp_path: Path) -> None:
    """Measured: 17 s of processor time before training in each rank, for 6."""
    for name in ("torch", "deepspeed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")
    script = f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); from launch import doctor; "
    script += "'DENY' in os.environ and setattr(os, 'access', lambda *_: False); "  # root may write everywhere
    script += f"sys.path.insert(0, {str(tmp_path)!r}); print(*(one.found + '|' + one.fix for one in doctor.bytecode()))"

    def found(**variables: str) -> str:
        line = [sys.executable, "-S", "-c", script]
        return subprocess.run(line, env=variables, capture_output=True, text=True, check=True).stdout

    assert found() == "\n", "the first run writes it"
    assert found(DENY="").startswith("none, and its folder cannot be written|")
    told = found(PYTHONDONTWRITEBYTECODE="1")
    assert told.startswith("none, and PYTHONDONTWRITEBYTECODE is set|")
    command = re.search(r"anew: once, (.*)", told)
    assert command is not None and command[1].endswith(f"-m compileall -q -j 0 {tmp_path}")
    subprocess.run(shlex.split(command[1]), env={"PYTHONDONTWRITEBYTECODE": "1"}, check=True)
    assert found(PYTHONDONTWRITEBYTECODE="1") == "\n"


def test_a_full_disk_below_stdout_is_told_and_the_verdict_stands(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        line = [sys.executable, "-S", str(DOCTOR)]
        done = subprocess.run(line, env={"PATH": str(tmp_path)}, stdout=full, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 1
    assert done.stderr.decode().splitlines() == [
        "warning: stdout cannot be written (No space left on device); the exit code is the verdict"
    ]


def test_a_reader_that_has_enough_is_no_error(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    line = [sys.executable, "-S", str(DOCTOR)]
    done = subprocess.run(line, env={"PATH": str(tmp_path)}, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize(
    "driver, cuda, missing",
    [
        ("580.65.06", "13.0", ""),
        (
            "550.54.15",
            "13.0",
            "CUDA 13.0, which torch was built with, needs driver 580 or newer: update the driver, or take the build "
            "for CUDA 12: make -B install CUDA=cu126",
        ),
        ("470.57.02", "13.0", "CUDA 13.0, which torch was built with, needs driver 580 or newer: update the driver"),
        ("550.54.15", None, "make -B install CUDA=cu126"),
        ("550.54.15", "12.6", ""),
        ("580.65.06", None, "make -B install CUDA=cu130"),
        (
            "579.99",
            "13.0",
            "CUDA 13.0, which torch was built with, needs driver 580 or newer: update the driver, or take the build "
            "for CUDA 12: make -B install CUDA=cu126",
        ),
        ("580.00", "13.0", ""),
        ("525.60.13", "12.6", ""),
        ("524.99", "12.6", "CUDA 12.6, which torch was built with, needs driver 525 or newer: update the driver"),
        ("524.99", "13.0", "CUDA 13.0, which torch was built with, needs driver 580 or newer: update the driver"),
    ],
)
def test_driver_and_build_of_torch_go_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, driver: str, cuda: str | None, missing: str
) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 81559 MiB, {driver}'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    import torch

    monkeypatch.setattr(torch.version, "cuda", cuda)
    found = {finding.name: finding for finding in doctor.torch_and_gpu()}
    assert found["GPU"].found == "NVIDIA H100 80GB HBM3, 81559 MiB" and found["NVIDIA driver"].found == driver
    assert [finding.fix for finding in found.values() if finding.fix] == ([missing] if missing else [])
    assert found["NVIDIA driver"].is_needed
    monkeypatch.setattr(doctor, "installed", lambda name: None)
    assert "torch for the GPU" not in [finding.name for finding in doctor.torch_and_gpu()], "it is said to be missing"


def test_a_version_that_does_not_fit_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed", lambda name: "0.19.7" if name == "deepspeed" else "1")
    found = {finding.name: finding for finding in doctor.packages()}
    assert found["deepspeed"] == ("deepspeed", "0.19.7 (needed: deepspeed==0.19.8)", "make -B install", True)


def test_a_torch_that_does_not_fit_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed", lambda name: "1.0")
    found = {finding.name: finding for finding in doctor.torch_and_gpu()}
    assert re.fullmatch(r"make -B install \(torch\S* is needed\)", found["torch"].fix) and found["torch"].is_needed


def test_sizes_are_those_of_the_system_and_what_is_too_small_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def found() -> dict[str, doctor.Finding]:
        return {finding.name: finding for finding in doctor.machine()}

    monkeypatch.setattr(doctor, "memory_limit", lambda: float("inf"))
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    sizes = re.fullmatch(r"([\d.]+) of ([\d.]+) GB available", found()["memory"].found)
    assert sizes is not None and float(sizes[2]) == pytest.approx(total / 1e9, abs=0.11) and sizes[1] != "0.0"
    monkeypatch.setattr(doctor, "memory_limit", lambda: 3e9)
    assert found()["memory"].found.endswith(" GB available, limited to 3.0 GB by its cgroup")
    for size, needs in ((10.1e9, (False, False)), (9.9e9, (True, False)), (0.9e9, (True, True))):
        monkeypatch.setattr(
            doctor.shutil, "disk_usage", lambda place, size=size: SimpleNamespace(total=size, free=size)
        )
        assert (bool(found()["disk"].fix), bool(found()["/dev/shm"].fix)) == needs
        assert f"{size / 1e9:.1f} GB free in " in found()["disk"].found


def test_the_version_of_a_program_is_the_last_one_that_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """nvcc says when it was built first. One that fails, or says nothing, is there all the same."""
    for name, says in (("nvcc", "echo 'Copyright 2005.1'; echo 'release 13.0, V13.0.88'"), ("ninja", "exit 1")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{says}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(doctor.sys, "executable", str(tmp_path / "python"))
    found = {finding.name: finding for finding in doctor.programs()}
    assert found["nvcc"] == ("nvcc", f"13.0.88 ({tmp_path / 'nvcc'})", "", False)
    assert (
        found["ninja"].found == f"found ({tmp_path / 'ninja'})"
        and found["numactl"].fix == "Debian: apt install numactl"
    )


def test_a_broken_torch_costs_the_environment_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`make clean` would remove prepared data and a run with it."""
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    found = next(doctor.torch_and_gpu())
    assert "does not import: OSError: libcudart.so.13" in found.found
    assert (found.fix, found.is_needed) == ("rm -r .venv && make install", True)


@pytest.mark.parametrize("minor, usable", [(10, False), (11, True), (14, True), (15, False)])
def test_a_python_that_does_not_do_is_missing(monkeypatch: pytest.MonkeyPatch, minor: int, usable: bool) -> None:
    monkeypatch.setattr(doctor.sys, "version_info", (3, minor, 0))
    found = next(doctor.python())
    assert found.is_needed and (found.fix == "") == usable
    names = {finding.name for finding in doctor.examine()}
    assert "gcc" in names and ("deepspeed" in names) == (minor >= 11), "an older one cannot read pyproject.toml"


def test_its_pythons_are_those_of_pyproject() -> None:
    declared = SpecifierSet(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"])
    for minor in range(8, 20):
        assert declared.contains(f"3.{minor}.0") == (doctor.PYTHONS[0] <= (3, minor) < doctor.PYTHONS[1])
