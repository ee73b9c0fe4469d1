"""docs/untested-on-gpu.md lists exactly the branches that only a GPU executes."""

from __future__ import annotations

import csv
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_list_equals_the_code() -> None:
    marked = set()
    for folder in ("pretrain", "model", "launch", "data_prep"):
        for path in (ROOT / folder).rglob("*.py"):
            for name in re.findall(r"# GPU-ONLY ([\w-]+)", path.read_text()):
                marked.add((name, path.relative_to(ROOT).as_posix()))
    table = re.findall(
        r"^\| ([\w-]+) \| (\S+\.py) \|", (ROOT / "docs" / "untested-on-gpu.md").read_text(), re.MULTILINE
    )
    assert marked == set(table)
    assert len(table) == len(set(table)) > 0


def test_the_page_says_how_many_kernels_spill_on_consumer_gpus() -> None:
    with (ROOT / "benchmarks" / "compiled.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if (row["triton"], row["architecture"]) == ("3.9.0", "120")]
    stacks = [int(row["stack_bytes"]) for row in rows if int(row["stack_bytes"])]
    page = " ".join((ROOT / "docs" / "untested-on-gpu.md").read_text(encoding="utf-8").split())
    assert f"{len(stacks)} of {len(rows)} configurations spill up to {max(stacks)} bytes a thread on sm_120" in page


def test_cuda_is_touched_in_the_device_modules_alone() -> None:
    """Other modules may compare device types; calling torch.cuda elsewhere would hide a GPU-only branch.

    The CUDA C++ router queues its kernels on torch's current stream, and Triton on the current device, which only
    torch.cuda names; megatron-core's functions ask it where to allocate; which kernels fit depends on the GPU's
    capability. They are marked too.
    """
    users = {
        path.relative_to(ROOT).as_posix()
        for folder in ("pretrain", "model", "launch", "data_prep")
        for path in (ROOT / folder).rglob("*.py")
        if re.search(r"torch\.cuda\.", path.read_text())
    }
    assert users == {
        "pretrain/device.py",
        "pretrain/gpus.py",
        "model/kernels/backend.py",
        "model/kernels/cuda/route.py",
        "model/kernels/triton/launch.py",
        "model/parallel/megatron_core.py",
    }
