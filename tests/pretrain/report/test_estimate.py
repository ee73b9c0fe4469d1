"""What is expected of a run beside what it takes: once, after 20 steps of a start, and at the price of no number."""

from __future__ import annotations

import contextlib
import io
import json
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import pretrain.segment
import pretrain.segment_start
from pretrain import gpus
from pretrain.cli import forecast as child
from pretrain.config.loading import to_json
from pretrain.config.schema import Config
from pretrain.data.sources import Sources
from pretrain.loop import train
from pretrain.planning.layout_plan import copy_beside_a_step, staging_bytes, step_time
from pretrain.planning.machine import MachineOptions, machine
from pretrain.planning.measured import measurements
from pretrain.planning.memory import estimate
from pretrain.planning.rehearsal import rehearse
from pretrain.planning.step_time import held_by_stages
from pretrain.ranks import Ranks
from pretrain.report.estimate import LIBRARIES, Comparison, Measured, RunEstimate, SideBySide
from pretrain.report.event_text import event_text
from pretrain.report.forecast import COMMAND, Forecast
from pretrain.report.memory_text import run_estimate
from tests.harness import LIMIT_SECONDS, run_ranks
from tests.pretrain.runs import events, light_config, metrics, small_config

GIB = 1 << 30
PIPELINE = ("parallel.tensor=2", "parallel.pipeline=2", "model.feedforward.num_experts=6")


def compared(
    memory: tuple[int | None, int], *, device: str = "cuda", step: tuple[tuple[float, float] | None, float] = (None, 1)
) -> Comparison:
    return Comparison(20, RunEstimate(memory[0], device, "", step[0]), Measured(memory[1], step[1]))


@pytest.mark.parametrize(
    "found, warned",
    [
        (compared((100 * GIB, 115 * GIB)), []),
        (compared((100 * GIB, 116 * GIB)), ["memory is 16% above the estimate"]),
        (compared((100 * GIB, 84 * GIB)), ["memory is 16% below the estimate"]),
        # A process on a CPU gains code too, which is not the model's.
        (compared((GIB, GIB + LIBRARIES), device="cpu"), []),
        (compared((GIB, GIB + LIBRARIES + GIB // 5), device="cpu"), ["memory is "]),
        (compared((GIB, GIB + GIB // 5)), ["memory is 20% above the estimate"]),  # less than LIBRARIES
        (compared((100 << 20, 110 << 20), device="cpu"), []),
        (compared((GIB, GIB // 2), device="cpu"), ["memory is 50% below the estimate"]),
        (compared((None, 5)), []),
        (compared((None, 5), step=((1.0, 2.0), 2.29)), []),
        (compared((None, 5), step=((1.0, 2.0), 2.4)), ["a step takes 20% above the estimate"]),
        (compared((None, 5), step=((1.0, 2.0), 0.5)), ["a step takes 50% below the estimate"]),
        (compared((GIB, 2 * GIB), step=((1.0, 2.0), 4.0)), ["memory is 100% above", "a step takes 100% above"]),
    ],
)
def test_a_warning_above_fifteen_percent(found: Comparison, warned: list[str]) -> None:
    assert len(found.warnings) == len(warned)
    assert all(text.startswith(words) for text, words in zip(found.warnings, warned, strict=True)), found.warnings


def test_less_than_was_estimated_asks_for_no_more_room_and_for_no_waiting() -> None:
    """What helps where a run takes more is wrong where it takes less."""
    more, less = (compared((10 * GIB, x * GIB), step=((2.0, 2.0), x / 5)).warnings for x in (20, 5))
    assert "leave that much room" in more[0] and "what it waits for" in more[1]
    assert "leave that much room" not in less[0] and "larger batch.micro_sequences may fit" in less[0]
    assert "waits for" not in less[1] and "too slow" in less[1]


def test_the_words_say_what_was_measured() -> None:
    on_gpu = compared((2 * GIB, GIB), step=((0.5, 1.0), 0.75))
    assert on_gpu.text == (
        "memory of the rank with most 1.00 GiB (tensors at its peak), estimated 2.00 GiB; a step 0.75 s, estimated 0.5 "
        "to 1 s"
    )
    assert "resident memory above that before the model" in compared((GIB, GIB), device="cpu").text
    assert compared((None, GIB)).text == ""
    event = {"event": "estimate_compared", "time": 0.0, **on_gpu.to_json()}
    assert event_text(event, 0.0).endswith(f"after step 20: {on_gpu.text}; warning: {on_gpu.warnings[0]}")
    estimated = RunEstimate(GIB, "cuda", "1.00 GiB", (0.5, 1.0))
    assert RunEstimate.from_json(json.loads(json.dumps(estimated.to_json()))) == estimated
    assert estimated.line() == "memory of a rank: 1.00 GiB; a step: 0.5 to 1 s estimated"


@pytest.mark.parametrize("is_late", [False, True])
def test_each_is_said_once_whichever_comes_first(is_late: bool) -> None:
    found = RunEstimate(GIB, "cuda", "1.00 GiB")
    arrived = [] if is_late else [found]
    said: list[tuple[str, int | None, float | None]] = []
    both = SideBySide(lambda: arrived.pop() if arrived else None)

    def look() -> None:
        both.look(
            lambda kind, **values: said.append(
                (kind, values.get("step"), values.get("measured", {}).get("step_seconds")),
            )
        )

    look()
    assert said == ([] if is_late else [("estimated", None, None)])
    both.measure(20, GIB, [9.0, 1.0, 2.0])
    look()
    if is_late:
        assert said == []
        arrived.append(found)
    for _ in range(2):
        both.measure(40, 9 * GIB, [9.0])  # of a later segment
        look()
    assert said == [("estimated", None, None), ("estimate_compared", 20, 2.0)]


def test_nothing_is_compared_where_nothing_was_estimated(capsys: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    both = SideBySide(lambda: RunEstimate(None, "cpu", "not estimated"))
    both.measure(20, GIB, [1.0])
    both.look(lambda kind, **values: said.append(kind))
    assert said == ["estimated"] and capsys.readouterr().out == "memory of a rank: not estimated\n"


def run_of(rank: int, config: Config, run_dir: Path) -> None:
    """With the comparison after 3 steps, and memory that is told and not measured."""
    pretrain.segment.COMPARED_AFTER = 3
    pretrain.segment_start.memory_before = lambda device: 100 * (rank + 1)
    pretrain.segment.memory_bytes = lambda device: {"memory_peak_bytes": 1000 * (rank + 2)}
    estimates = [RunEstimate(2500, "cuda", "2,500 bytes"), None]  # the second look finds it
    side_by_side = SideBySide(lambda: estimates.pop() if estimates else None) if rank == 0 else None
    train(config, Sources.load(config), run_dir, torch.device("cpu"), side_by_side=side_by_side)


def runs_of(rank: int, configs: list[tuple[Config, Path]]) -> None:
    for config, run_dir in configs:
        run_of(rank, config, run_dir)


def test_a_run_compares_the_rank_that_takes_most_and_a_shorter_one_says_nothing(prepared: Path, tmp_path: Path) -> None:
    keys = "evaluate.sequences=0"
    lengths = {2: light_config(prepared, keys, "train.steps=2", ranks=2)}
    lengths[4] = light_config(prepared, keys, "train.steps=4", "monitor.tensorboard=true", ranks=2)
    run_ranks(runs_of, 2, [(config, tmp_path / str(steps)) for steps, config in lengths.items()])
    for steps in lengths:
        assert [row["text"] for row in events(tmp_path / str(steps), "estimated")] == ["2,500 bytes"]
        both = events(tmp_path / str(steps), "estimate_compared")
        assert len(both) == (steps >= 3)
        for row in both:
            assert (row["step"], row["measured"]["memory_bytes"]) == (3, 3000 - 200), "of rank 1"
            seconds = [line["step_seconds"] for line in metrics(tmp_path / str(steps))[:3]]
            assert row["measured"]["step_seconds"] == sorted(seconds)[1]
            assert row["warnings"] == []
    shown = b"".join(path.read_bytes() for path in (tmp_path / "4" / "tensorboard").rglob("*tfevents*"))
    assert b"memory of a rank: 2,500 bytes" in shown and b"(tensors at its peak), estimated 0.00 GiB" in shown


# ---------------------------------------------------------------------------------------- the process that estimates


THREE = Ranks(rank=0, local_rank=0, world_size=3, local_size=3)


AT_ONCE = (
    *COMMAND[:-2],
    "-c",
    f"import os, runpy; os.nice = lambda by: 0; runpy.run_module({COMMAND[-1]!r}, run_name='__main__', alter_sys=True)",
)
"""COMMAND, but not at the lowest priority: beside other tests it would take as long as they do."""


def taken(forecast: Forecast) -> RunEstimate | None:
    """What arrives within a while."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while forecast._process is not None and time.monotonic() < deadline:
        if (found := forecast.take()) is not None:
            return found
        time.sleep(0.01)
    return None


def test_a_process_of_its_own_gives_the_estimate(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(prepared)
    monkeypatch.setenv("RANK", "0")
    script = (
        "import json, os, sys; given = json.load(sys.stdin); assert 'RANK' not in os.environ;"
        "print(json.dumps({'memory_bytes': given['ranks'], 'device_type': 'cpu',"
        " 'text': str(given['config']['train']['steps']), 'step_seconds': [1, 2]}))"
    )
    python = (sys.executable, "-I", "-c")
    assert taken(Forecast(config, THREE, (*python, script))) == RunEstimate(3, "cpu", "30", (1.0, 2.0))
    for failing in ("raise SystemExit(1)", "print('no JSON')", "print('{}')"):
        assert taken(Forecast(config, THREE, (*python, failing))) is None
    assert taken(Forecast(config, THREE, ("/nowhere/python",))) is None
    endless = Forecast(config, THREE, (*python, "import time; time.sleep(1000)"))
    process: Any = endless._process
    assert endless.take() is None
    endless.close()
    assert process.returncode == -9 and endless.take() is None


def test_what_the_process_computes(
    prepared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_config(prepared, "train.device=cpu")
    monkeypatch.setattr("os.nice", lambda by: None)
    monkeypatch.setattr("signal.alarm", lambda seconds: None)
    monkeypatch.setattr(
        "sys.stdin", io.StringIO(json.dumps({"config": to_json(config), "ranks": 2, "ranks_per_node": 2}))
    )
    assert child.main() == 0
    found = RunEstimate.from_json(json.loads(capsys.readouterr().out))
    assert found == run_estimate(config, 2, "cpu", card=None, ranks_per_node=2)
    assert "GiB estimated: weights" in found.text


def test_on_a_cpu_the_copy_for_a_checkpoint_lies_beside_a_step(prepared: Path) -> None:
    """Of a model of 262 million parameters 2.9 GiB beside 5.6: a run would take more than half as much again as was
    said."""
    config = small_config(prepared, "parallel.zero=1", "checkpoint.asynchronous=true")
    found = {kind: run_estimate(config, 2, kind, card=None, ranks_per_node=2) for kind in ("cpu", "cuda")}
    copy = staging_bytes(config, held_by_stages(config, 2)[0], config.model.num_layers, 2)
    assert copy >= 12 * held_by_stages(config, 2)[0].parameters // 2
    assert found["cpu"].memory_bytes == estimate(config, 2, "cpu").total + copy
    assert "more for the copy that a checkpoint is written from" in found["cpu"].text
    assert found["cuda"].memory_bytes == estimate(config, 2, "cuda").total and "copy" not in found["cuda"].text
    waiting = config.replaced("checkpoint", asynchronous=False)
    assert run_estimate(waiting, 2, "cpu", card=None, ranks_per_node=2).memory_bytes == estimate(config, 2, "cpu").total


@pytest.mark.parametrize("is_forked", [pytest.param(True, id="pipeline"), pytest.param(False, id="zero 3")])
@pytest.mark.slow  # the fast ones: test_a_run_compares_... here, and rehearsals in tests/pretrain/planning
def test_a_divided_run_is_rehearsed(prepared: Path, is_forked: bool) -> None:
    """Once by the process itself, and once by what it runs in one that has imported all already: what libraries print
    is no part of the answer."""
    keys = ("parallel.zero=3", "batch.global_sequences=4", "batch.micro_sequences=1", "model.num_layers=1")
    if is_forked:
        keys = (*PIPELINE, "batch.global_sequences=2", "batch.micro_sequences=2")
    config, stages = small_config(prepared, "train.device=cpu", *keys), 2 if is_forked else 1
    four = Ranks(rank=0, local_rank=0, world_size=4, local_size=4)
    found = None if is_forked else taken(Forecast(config, four, AT_ONCE))
    ((peaks, printed),) = run_ranks(peaks_of, 1, config, stages, is_forked)
    if is_forked:
        found = RunEstimate.from_json(json.loads(printed))
    assert found is not None and found.device_type == "cpu"
    needs = [peak + copy_beside_a_step(config, 4, stage, "cpu") for stage, peak in enumerate(peaks)]
    rank = needs.index(max(needs)) * (4 // stages)
    assert found.memory_bytes == max(needs) > max(peaks) and f"of rank {rank}, at the highest point" in found.text


def peaks_of(rank: int, config: Config, stages: int, is_forked: bool) -> tuple[list[int], str]:
    """Of the first of 4 ranks of each stage; and what the process prints that estimates."""
    torch.distributed.destroy_process_group()
    printed = ""
    if is_forked:
        given = io.StringIO(json.dumps({"config": to_json(config), "ranks": 4, "ranks_per_node": 4}))
        with mock.patch("sys.stdin", given), mock.patch("os.nice"), contextlib.redirect_stdout(io.StringIO()) as out:
            assert child.main() == 0
        printed = out.getvalue()
    return [rehearse(config, 4, first, "cpu").peak for first in range(0, 4, 4 // stages)], printed


def test_the_time_of_a_step_is_that_of_the_planner_where_the_gpu_is_known(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpus, "DRIVER", tmp_path / "version")
    assert gpus.card_name() is None
    (tmp_path / "gpus" / "0000:01:00.0").mkdir(parents=True)
    (tmp_path / "gpus" / "0000:01:00.0" / "information").write_text("Model: \t NVIDIA H100 80GB HBM3\nIRQ:   1\n")
    card = gpus.card_name()
    assert card == "NVIDIA H100 80GB HBM3"
    config = small_config(prepared, "train.precision=bf16", "parallel.zero=1")
    found = run_estimate(config, 2, "cpu", card=card, ranks_per_node=2).step_seconds
    eight = machine(MachineOptions(gpu="h100-80gb", gpus=2, gpus_per_node=2))
    planned = step_time(config, eight, measurements(eight.device))
    assert found == (planned.fast.total, planned.slow.total) and 0 < found[0] < found[1]
    assert run_estimate(config, 2, "cpu", card="Some Accelerator", ranks_per_node=2).step_seconds is None
