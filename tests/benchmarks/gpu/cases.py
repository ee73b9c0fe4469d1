"""What tests of benchmarks/gpu share: the small shapes of every op, for an interpreter, parts' contexts and entries."""

from __future__ import annotations

import os
import stat
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import op_cases, op_shapes
from benchmarks.gpu import ceilings
from benchmarks.gpu.command import Context
from benchmarks.gpu.record import Entry, Identity

CASES = op_shapes.equality_cases(small=True)
CPU = torch.device("cpu")
MEASURED: dict[str, Any] = {ceilings.COPY: {"bytes_per_second": 1e9}, ceilings.PRODUCT: {"flops_per_second": 1e12}}
ON_CPU = Identity(card="CPU", driver="none", python="3", torch="2", cuda="none", triton="3", sources="0")


def _name(build: op_cases.Build) -> str:
    """That of what builds it, so that collecting tests builds nothing."""
    assert isinstance(build, partial)
    return " ".join(map(str, (build.func.__name__.removesuffix("_case"), *build.args, *build.keywords)))


NAMES = [_name(build) for build in CASES]


def context(
    folder: Path, *, device: str = "cpu", tiny: bool = True, remaining: float = 1000.0, **measured: dict[str, Any]
) -> Context:
    return Context(
        device=torch.device(device), tiny=tiny, results=folder, remaining=lambda: remaining, measured=measured
    )


def on_the_path(folder: Path, name: str, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that does what the script says."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def entry(part: str, status: str = "passed", **result: Any) -> Entry:
    return Entry(part=part, status=status, seconds=1.0, result=result, identity={}, revision="", date="", command="")
