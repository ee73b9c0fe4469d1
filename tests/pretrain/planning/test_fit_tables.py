"""The tables, hours and JSON that plan.py fit makes of its numbers, which are given here."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from common.units import GIB
from pretrain.cli.plan_fit import _memory, _time, _traffic, as_json, whole_run
from pretrain.config.loading import load_config
from pretrain.planning.fit import fit
from pretrain.planning.layout_plan import StepTime, Traffic
from pretrain.planning.machine import Machine, MachineOptions, machine
from pretrain.planning.step_time import Terms

TINY = Path(__file__).resolve().parents[3] / "configs" / "switchall_tiny.json"
NOWHERE = Path("no records")


def h100(gpus: int, **options: Any) -> Machine:
    return machine(MachineOptions(gpu="h100-80gb", gpus=gpus, **options))


def test_tables_have_what_any_stage_has_and_each_number_in_its_column() -> None:
    device = SimpleNamespace(unit="GPU", device_type="cuda")
    stages = [
        SimpleNamespace(
            stage=stage,
            blocks="2",
            parameters="9",
            parts={"weights": GIB, "loss": stage * GIB, "queue": 0},
            total=(1 + stage) * GIB,
            offloaded=3 * stage * GIB,
            staging=4 * GIB,
        )
        for stage in (0, 1)
    ]
    rows = [
        Traffic("update", "all_reduce", "data", ranks, "between nodes", 3, 5 * 10**9, 7 * 10**9) for ranks in (8, 1)
    ]
    found = SimpleNamespace(device=device, gpus_per_node=8, num_gpus=16)
    report: Any = SimpleNamespace(stages=stages, machine=found, traffic=[rows])
    table, offloaded, copies = list(_memory(report))[1:]
    assert [line.split() for line in table.splitlines() if line] == [
        ["stage", "blocks", "parameters", "weights", "loss", "highest"],
        ["0", "2", "9", "1.000", "0.000", "1.00"],
        ["1", "2", "9", "1.000", "1.000", "2.00"],
    ]
    assert offloaded == "CPU memory for the offloaded optimizer: 3.000 GiB a rank"
    assert "4.000 GiB a rank, up to 32.00 GiB a node (none with" in copies
    device.device_type = "cpu"
    assert list(_memory(report))[-1].startswith("highest is with the copy that a checkpoint is written from")
    _, table = _traffic(report)
    (row,) = (line.split() for line in table.splitlines()[1:] if line)
    assert row == ["0", "update", "all_reduce", "data", "(8)", "between", "nodes", "3", "5.000", "7.000"]
    report.traffic = [rows[1:]]
    assert list(_traffic(report)) == ["\nno GPU sends anything to another one"]
    report.config = SimpleNamespace(parallel=SimpleNamespace(pipeline=1))
    report.model_flops, report.time = 2e12, StepTime(Terms(inside=2.0, between=3.0), Terms(inside=4.0, between=6.0))
    for executed, said in ((2e12, ""), (3e12, ", 3e+12 with the repeated forward passes")):
        report.executed_flops = executed
        first, _, table = _time(report)
        assert first == f"\nFLOPs of a step: 2e+12 that the model needs{said}"
    assert [re.split(" {2,}", line.strip()) for line in table.splitlines()[1:] if line] == [
        ["links inside a node", "2 s", "4 s"],
        ["links between nodes", "3 s", "6 s"],
        ["all", "5 s", "10 s"],
    ]


def test_hours_and_tokens_are_those_of_a_step_of_the_run() -> None:
    """36 to 72 s a step of 4,096 tokens, on two GPUs, of 200 steps of which 100 are done."""
    report = fit(load_config(TINY, ["model.num_layers=1"]), h100(2, gpus_per_node=1), results=NOWHERE)
    time = StepTime(Terms(compute=30.0, inside=6.0), Terms(compute=72.0))
    assert whole_run(report, time, 100) == (
        "36 s to 72 s a step, 56 to 113 tokens a second; the 100 of 200 steps that are left take 1 to 2 h, 2 to 4 "
        "GPU-hours, without validation and start-up"
    )
    change: Any = SimpleNamespace(overrides=("train.recompute=full",), total=5)
    told = as_json(replace(report, time=time, change=change), 100)
    assert told["change"] == {"set": ["train.recompute=full"], "needed_bytes": 5, "another_loss": None}
    fast = told["seconds"]["fast"]
    assert (fast["run_hours"], fast["run_gpu_hours"], fast["hours_left"]) == (2.0, 4.0, 1.0)
    assert fast["tokens_per_second"] == 4096 / 36 and (told["steps_done"], told["steps_left"]) == (100, 100)
    assert told["machine"]["usable_bytes"] == int(0.9 * told["machine"]["memory_bytes"])
