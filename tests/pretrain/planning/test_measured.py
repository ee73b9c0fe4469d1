"""An estimate starts from what was measured of its device, where records say something, and says so."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import models
from benchmarks.gpu.record import Entry
from model.costs import formula_parameters, training_flops_per_token
from pretrain.config.loading import load_config
from pretrain.planning.devices import device_named
from pretrain.planning.machine import MachineOptions, machine
from pretrain.planning.measured import POSITIONS, Measurements, measurements
from pretrain.planning.paces import paces, why_no_time

ONE_BILLION = Path(__file__).resolve().parents[3] / "configs" / "switchall_1b.json"
LAUNCHED = "train.cuda_graph=off"
CONFIG = load_config(ONE_BILLION, [LAUNCHED])
H100 = machine(MachineOptions(gpu="h100-80gb", gpus=1))
CARD = "NVIDIA H100 80GB HBM3"


def record(folder: Path, *parts: tuple[str, str, dict[str, Any]], card: str = CARD) -> Path:
    """A made-up record of `speed` in the form of benchmarks/gpu/record.py."""
    path = folder / "card" / "speed.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for part, status, result in parts:
            entry = Entry(
                part=part,
                status=status,
                seconds=1.0,
                result=result,
                identity={"card": card},
                revision="abc123",
                date="2027-01-02T03:04:05+00:00",
                command="",
            )
            file.write(json.dumps(dataclasses.asdict(entry)) + "\n")
        file.write('{"part": "cut\n')
    return folder


def micro_step(sequences: int, wall_ms: float, share: float = 0.5) -> dict[str, Any]:
    tokens = sequences * CONFIG.model.sequence_length
    parameters = formula_parameters(CONFIG.model).total
    return {"tokens": tokens, "parameters": parameters, "wall_ms": wall_ms, "flops_of_ceiling": share}


CEILINGS = (
    ("ceiling copy", "passed", {"bytes_per_second": 3e12}),
    ("ceiling product", "passed", {"flops_per_second": 700e12}),
)


def test_what_is_timed_otherwise_is_no_run(tmp_path: Path) -> None:
    """Documents or tiles of a search: other work, whatever is recorded first."""
    names = ("micro-step 1b documents graphs 8", "micro-step 1b tuned sets 8", "micro-step 1b 8")
    folder = record(tmp_path, *CEILINGS, *((name, "passed", micro_step(8, 100.0 + i)) for i, name in enumerate(names)))
    found = measurements(device_named("h100-80gb"), folder)
    config = load_config(ONE_BILLION, [LAUNCHED])
    step = found.of_model(config)
    assert step is not None and step.source.startswith("micro-step 1b 8 on")


def test_no_records_no_measurements(tmp_path: Path) -> None:
    assert measurements(device_named("h100-80gb"), tmp_path / "absent") == Measurements()


def test_records_of_other_cards_and_parts_that_failed_do_not_count(tmp_path: Path) -> None:
    record(tmp_path, *CEILINGS, card="NVIDIA H100 PCIe")
    record(tmp_path, ("micro-step 1b 8", "failed", micro_step(8, 100.0)))
    assert measurements(device_named("h100-80gb"), tmp_path) == Measurements()
    assert measurements(device_named("h100-pcie"), tmp_path).copy == 3e12


def test_the_newest_line_of_a_part_counts(tmp_path: Path) -> None:
    record(tmp_path, ("micro-step 1b 8", "passed", micro_step(8, 100.0)))
    record(tmp_path, ("micro-step 1b 8", "passed", micro_step(8, 80.0)))
    (step,) = measurements(device_named("h100-80gb"), tmp_path).micro_steps
    assert step.seconds == pytest.approx(0.08) and step.flops_per_second is None  # without the product's rate
    assert step.source == f"micro-step 1b 8 on {CARD}, 2027-01-02, revision abc123"


def test_a_micro_step_of_the_same_model_takes_its_measured_time(tmp_path: Path) -> None:
    parts = [("micro-step 1b 8", "passed", micro_step(8, 100.0)), ("micro-step 1b 2", "passed", micro_step(2, 40.0))]
    parts += [("micro-step 1b graphs 8", "passed", micro_step(8, 60.0))]
    found = measurements(H100.device, record(tmp_path, *parts, *CEILINGS))
    ends = paces(CONFIG, H100, found)
    flops = 8 * CONFIG.model.sequence_length * training_flops_per_token(CONFIG.model)
    assert ends.fast.flops == ends.slow.flops == pytest.approx(flops / 0.1)
    assert ends.fast.launches == ends.slow.launches == 0.0  # they are in the measured time
    assert ends.fast.memory == 3e12
    (line,) = [line for line in ends.assumptions if line.what == "computing"]
    assert "8 sequences" in line.value and CARD in line.source
    graphs = paces(load_config(ONE_BILLION, []), H100, found)
    assert graphs.fast.flops == pytest.approx(flops / 0.06)
    small = paces(load_config(ONE_BILLION, ["batch.micro_sequences=1", LAUNCHED]), H100, found)
    assert small.slow.flops == pytest.approx(flops / 4 / 0.04)  # the nearest, of 2
    for other in ("model.sequence_length=1024", "train.precision=fp32", "train.precision=fp16"):
        config = load_config(ONE_BILLION, [other, LAUNCHED])
        assert found.of_model(config) is None and paces(config, H100, found).slow.launches > 0.0, other


def test_other_models_of_its_kind_bound_the_range(tmp_path: Path) -> None:
    parts = [("micro-step 1b 8", "passed", micro_step(8, 100.0, share=0.4))]
    parts += [("micro-step 262m 8", "passed", {**micro_step(8, 50.0, share=0.3), "parameters": 7})]
    parts += [("micro-step 1b dense 8", "passed", {**micro_step(8, 50.0, share=0.9), "parameters": 8})]
    found = measurements(H100.device, record(tmp_path, *parts, *CEILINGS))
    wider = load_config(ONE_BILLION, ["model.d_model=1024", LAUNCHED])
    ends = paces(wider, H100, found)
    assert (ends.slow.flops, ends.fast.flops) == pytest.approx((0.3 * 700e12, 0.4 * 700e12))
    # Of each of them the micro-step nearest in tokens: a single sequence says nothing of eight.
    few = measurements(H100.device, record(tmp_path, ("micro-step 262m 1", "passed", {**parts[1][2], **FEW})))
    assert paces(wider, H100, few).slow.flops == pytest.approx(0.3 * 700e12)
    one = load_config(ONE_BILLION, ["model.d_model=1024", LAUNCHED, "batch.micro_sequences=1"])
    assert paces(one, H100, few).slow.flops == pytest.approx(0.01 * 700e12)
    dense = load_config(ONE_BILLION, ['model.feedforward={"type": "dense", "hidden_size": 64}', DENSE, LAUNCHED])
    assert paces(dense, H100, found).fast.flops == pytest.approx(0.9 * 700e12)


FEW = {"tokens": CONFIG.model.sequence_length, "flops_of_ceiling": 0.01}
DENSE = 'model.attention={"type": "dense", "num_heads": 8, "head_dim": 128}'


def test_the_fast_end_is_the_busy_gpu_of_the_nearest_model_with_the_same_positions(tmp_path: Path) -> None:
    """A model of other positions says nothing of what a fast host would reach, however near it is in size."""
    near, far = 2 * 10**8, 10**10
    parts = [
        ("micro-step 1b 8", "passed", {**micro_step(8, 50.0, share=0.6), "parameters": near, "busy_ms": 48.0}),
        ("micro-step 262m 8", "passed", {**micro_step(8, 50.0, share=0.1), "parameters": far, "busy_ms": 20.0}),
    ]
    found = measurements(H100.device, record(tmp_path, *parts, *CEILINGS))
    xl = load_config(ONE_BILLION, ["model.d_model=1024", 'model.position={"type": "xl"}', LAUNCHED])
    ends = paces(xl, H100, found)
    assert (ends.slow.flops, ends.fast.flops) == pytest.approx((0.1 * 700e12, 0.1 * 700e12 * 50 / 20))
    (line,) = [line for line in ends.assumptions if line.what == "computing"]
    assert "busy with the nearest one (micro-step 262m 8)" in line.value and "micro-step 1b" not in line.source
    rope = paces(load_config(ONE_BILLION, ["model.d_model=1024", LAUNCHED]), H100, found)
    assert (rope.slow.flops, rope.fast.flops) == pytest.approx((0.1 * 700e12, 0.6 * 700e12 * 50 / 48))
    # A profiler slows a GPU: what is busy for longer than by the clock was busy all the time.
    slowed = [("micro-step 262m 8", "passed", {**parts[1][2], "busy_ms": 60.0})]
    assert paces(xl, H100, measurements(H100.device, record(tmp_path, *slowed))).fast.flops == pytest.approx(70e12)


@pytest.mark.parametrize("name", models.FILES)
def test_the_positions_of_a_record_are_those_of_its_model(name: str) -> None:
    assert models.load(name).position.type == POSITIONS[name]


def test_without_measurements_data_sheets_and_assumptions() -> None:
    ends = paces(CONFIG, H100, Measurements())
    assert (ends.slow.flops, ends.fast.flops) == pytest.approx((0.12 * 989e12, 0.39 * 989e12))
    assert ends.fast.launches < ends.slow.launches and ends.fast.hides and not ends.slow.hides
    assert all(line.source for line in ends.assumptions)
    ceiling = paces(CONFIG, H100, Measurements(product=200e12, ceilings_source="made up"))
    assert ceiling.fast.flops == pytest.approx(200e12)  # no more than the largest product
    for product, ends in ((100e12, (100e12, 100e12)), (900e12, (0.12 * 989e12, 0.39 * 989e12))):
        found = paces(CONFIG, H100, Measurements(product=product, ceilings_source="made up"))
        assert (found.slow.flops, found.fast.flops) == pytest.approx(ends)


def test_cards_on_pcie_reach_a_smaller_share_of_their_link() -> None:
    for gpu, shares in (("h100-pcie", (0.55, 0.7)), ("h100-80gb", (0.7, 0.78))):
        two = machine(MachineOptions(gpu=gpu, gpus=2, gpus_per_node=2))
        found = paces(CONFIG, two, Measurements())
        assert two.device.link_bandwidth is not None
        rates = (found.slow.rates.inside, found.fast.rates.inside)
        assert rates == pytest.approx([two.device.link_bandwidth.value * share for share in shares])


def test_collectives_inside_a_micro_step_leave_several_ranks_without_graphs(tmp_path: Path) -> None:
    scope = ["model.feedforward.entropy_scope=micro_batch", "model.feedforward.entropy_weight=0.01"]
    config, eight = load_config(ONE_BILLION, scope), machine(MachineOptions(gpu="h100-80gb", gpus=8))
    assert paces(config, H100, Measurements()).fast.launches == 0.0
    assert paces(config, eight, Measurements()).fast.launches > 0.0
    parts = [("micro-step 1b 8", "passed", micro_step(8, 100.0))]
    parts += [("micro-step 1b graphs 8", "passed", micro_step(8, 60.0))]
    found = measurements(H100.device, record(tmp_path, *parts, *CEILINGS))
    one, several = (paces(config, on, found).fast.flops for on in (H100, eight))
    assert one / several == pytest.approx(100 / 60)


@pytest.mark.parametrize(
    "options, said",
    [
        (MachineOptions(gpu="v100-32gb", gpus=1), "--peak-tflops"),
        (MachineOptions(gpu="new", gpus=2, gpus_per_node=2, memory_gib=8, peak_tflops=1), "--link-gb-per-second"),
        (
            MachineOptions(gpu="l40s", gpus=4, gpus_per_node=2),
            "--interconnect, one of ib-ndr-400",
        ),
    ],
)
def test_what_is_not_known_is_said(options: MachineOptions, said: str) -> None:
    assert said in str(why_no_time(CONFIG, machine(options)))
    assert "offload_optimizer" in str(why_no_time(load_config(ONE_BILLION, ["parallel.offload_optimizer=true"]), H100))
    assert why_no_time(CONFIG, H100) is None
