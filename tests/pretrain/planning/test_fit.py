"""Verdicts, the binding constraint and the one change, with memory and traffic by hand; and one whole estimate."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.errors import ConfigError
from common.units import GIB
from pretrain.cli.plan import main
from pretrain.cli.plan_fit import (
    _verdict,
    as_json,
    change_text,
    lines_of,
    steps_done,
    verdict,
    whole_run,
)
from pretrain.config.loading import load_config
from pretrain.config.schema import Config
from pretrain.planning import fit as planning
from pretrain.planning import layout_plan
from pretrain.planning.fit import changes, fit, with_overrides
from pretrain.planning.layout_plan import StageMemory, traffic
from pretrain.planning.links import Collective
from pretrain.planning.machine import Machine, MachineOptions, machine
from pretrain.planning.record import Call, Rehearsal
from pretrain.planning.step_time import held_by_stages
from pretrain.planning.stops import CannotRehearse, StepStops

ONE_BILLION = Path(__file__).resolve().parents[3] / "configs" / "switchall_1b.json"
TINY = Path(__file__).resolve().parents[3] / "configs" / "switchall_tiny.json"
NOWHERE = Path("no records")


def by_stage(estimate: Callable[..., Any]) -> Callable[..., list[Any]]:
    """In place of layout_plan.stage_memories."""
    return lambda config, found, stages=None: [
        estimate(config, found.num_gpus, "cuda", stage=stage) for stage in stages or range(config.parallel.pipeline)
    ]


def whole(gib: float, stage: int = 0) -> StageMemory:
    """In place of a traced estimate."""
    all_of_it = int(gib * GIB)
    return StageMemory(stage=stage, blocks=1, parameters=1, parts={}, total=all_of_it, staging=0, offloaded=0)


def h100(gpus: int, **options: Any) -> Machine:
    return machine(MachineOptions(gpu="h100-80gb", gpus=gpus, **options))


@pytest.fixture
def by_hand(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Config], float]], list[Config]]:
    """Takes the GiB that a configuration needs, and gives the list of configurations that were asked for."""

    def install(needed: Callable[[Config], float]) -> list[Config]:
        asked: list[Config] = []

        def estimate(config: Config, num_ranks: int, device_type: str, *, stage: int = 0) -> StageMemory:
            asked.append(config)
            return whole(needed(config), stage)

        def collectives(config: Config, num_ranks: int, stage: int, device_type: str = "cuda") -> list[Collective]:
            found = [Collective("all_reduce", "data", config.data_size(num_ranks), 10**9, "update")]
            if config.parallel.tensor > 1:
                found.append(Collective("all_reduce", "tensor", config.parallel.tensor, 10**9, "micro-step", 100))
            return found

        monkeypatch.setattr(layout_plan, "stage_memories", by_stage(estimate))
        monkeypatch.setattr(layout_plan, "rough_collectives", collectives)
        monkeypatch.setattr(planning, "rehearsed_collectives", collectives)
        return asked

    return install


ByHand = Callable[[Callable[[Config], float]], list[Config]]


def test_what_fits(by_hand: ByHand) -> None:
    by_hand(lambda config: 60.0)
    report = fit(load_config(ONE_BILLION), h100(8), results=NOWHERE)
    assert report.fits and report.change is None and report.needed == 60 * GIB
    assert report.constraint.startswith("computing")
    assert (report.data_size, report.micro_steps, report.bubble) == (8, 8, 0.0)
    assert report.usable == 72 * 10**9
    by_hand(lambda config: 67.1)  # 90% of 80e9 bytes are 67.06 GiB
    assert fit(load_config(ONE_BILLION), h100(8), results=NOWHERE).fits is False


def test_the_change_is_the_one_that_costs_least_time(by_hand: ByHand) -> None:
    def needed(config: Config) -> float:
        small = config.batch.micro_sequences <= 2 or config.train.recompute == "full" or config.parallel.tensor > 1
        return 50.0 if small else 70.0

    asked = by_hand(needed)
    report = fit(load_config(ONE_BILLION), h100(8), results=NOWHERE)
    assert report.constraint == "memory of the GPU"
    assert report.change is not None and report.change.overrides == ("batch.micro_sequences=2",)
    assert report.change.total == 50 * GIB and report.change.time is not None
    has = "67.06 GiB (90% of 74.5)"
    assert verdict(report) == f"does not fit: the fullest GPU needs 70.00 GiB, it has {has}"
    assert change_text(report).startswith("--set batch.micro_sequences=2 (then 50.00 GiB, ")
    small = fit(load_config(ONE_BILLION, ["batch.micro_sequences=2"]), h100(8), results=NOWHERE)
    assert verdict(small) == f"fits: the fullest GPU needs 50.00 GiB of {has}"
    # Recomputing everything would fit too, and a link that is used 100 times a step; both take longer.
    tried = {(config.batch.micro_sequences, config.train.recompute, config.parallel.tensor) for config in asked}
    assert (8, "full", 1) not in tried and not any(tensor > 1 for _, _, tensor in tried)


@pytest.mark.parametrize(
    "helps, expected",
    [
        (lambda config: config.train.recompute == "full", ("train.recompute=full",)),
        (lambda config: config.parallel.zero == 2, ("parallel.zero=2",)),
        # What costs less time is behind what is simpler.
        (lambda config: config.train.recompute == "full" or config.parallel.zero == 2, ("parallel.zero=2",)),
        (lambda config: config.parallel.tensor == 4, ("parallel.tensor=4", "parallel.sequence=true")),
        (lambda config: config.parallel.pipeline == 2, ("parallel.pipeline=2",)),
        (lambda config: config.parallel.expert == 8, ("parallel.expert=8",)),
        (lambda config: config.parallel.offload_optimizer, ("parallel.offload_optimizer=true",)),
    ],
)
def test_every_kind_of_change_is_found(
    by_hand: ByHand, helps: Callable[[Config], bool], expected: tuple[str, ...]
) -> None:
    by_hand(lambda config: 50.0 if helps(config) else 70.0)
    config = load_config(ONE_BILLION)
    report = fit(config, h100(8), results=NOWHERE)
    assert report.change is not None and report.change.overrides == expected
    assert fit(with_overrides(config, expected), h100(8), results=NOWHERE).fits


@pytest.mark.parametrize(
    "scope, helps, said",
    [
        ("micro_batch", "batch.micro_sequences=4", "32 sequences instead of 64"),
        ("micro_batch", "parallel.pipeline=2", "32 sequences instead of 64"),
        ("micro_batch", "train.recompute=full", None),
        ("global_batch", "batch.micro_sequences=4", None),
    ],
)
def test_a_change_of_the_loss_is_told(by_hand: ByHand, scope: str, helps: str, said: str | None) -> None:
    """Of a regulariser over the sequences of a micro-step on all data-parallel ranks."""
    config = load_config(ONE_BILLION, [f"model.feedforward.entropy_scope={scope}"])
    changed = with_overrides(config, (helps,))
    by_hand(lambda asked: 50.0 if asked == changed else 70.0)
    report = fit(config, h100(8), results=NOWHERE)
    assert report.change is not None and report.change.overrides == (helps,)
    head = list(itertools.takewhile(lambda line: not line.startswith("time:"), lines_of(ONE_BILLION, report)))
    (line,) = [line for line in head if line.startswith("change: ")]
    told = [line.strip() for line in head if "another loss" in line]
    begin = "which is another loss: model.feedforward.entropy_scope = micro_batch, of micro_sequences x data, "
    assert told == ([] if said is None else [begin + said]) and helps in line
    another_loss = as_json(report)["change"]["another_loss"]
    if said is None:
        assert another_loss is None
    else:
        keys = ("model.feedforward.entropy_scope",)
        assert another_loss == {"keys": keys, "sequences": 32, "run_sequences": 64}


def test_what_is_executed_is_what_the_model_needs_and_what_is_repeated(by_hand: ByHand) -> None:
    by_hand(lambda config: 60.0)
    for keys in ([], ["parallel.tensor=2", "parallel.pipeline=2"]):
        report, full = (
            fit(load_config(ONE_BILLION, [*keys, f"train.recompute={kind}"]), h100(8), results=NOWHERE)
            for kind in ("none", "full")
        )
        assert report.executed_flops == pytest.approx(report.model_flops)
        assert 1.2 < full.executed_flops / report.executed_flops < 4 / 3  # blocks a third more, and the head once


def test_a_change_brings_what_it_needs() -> None:
    """Expert parallelism does not go with ZeRO 0 and 3, stages go with ZeRO 1 alone, and both with sequences that
    tensor-parallel ranks divide."""

    def found(*keys: str) -> set[tuple[str, ...]]:
        return set(changes(load_config(ONE_BILLION, keys), h100(8)))

    stage_3 = found("parallel.zero=3")
    assert {("parallel.expert=2", "parallel.zero=1"), ("parallel.pipeline=2", "parallel.zero=1")} <= stage_3
    assert not any(change[0].startswith("parallel.zero") for change in stage_3)
    stage_2 = found("parallel.zero=2")
    assert {("parallel.zero=3",), ("parallel.expert=2",), ("parallel.pipeline=2", "parallel.zero=1")} <= stage_2
    assert not {("parallel.zero=1",), ("parallel.zero=2",)} & stage_2
    divided = found("parallel.tensor=2")
    assert {("parallel.sequence=true",), ("parallel.expert=2", "parallel.sequence=true")} <= divided


def test_what_is_too_large_by_its_weights_alone_is_not_tried(by_hand: ByHand) -> None:
    by_hand(lambda config: 1000.0)
    report = fit(load_config(ONE_BILLION), h100(8, memory_gib=0.1), results=NOWHERE)
    assert report.fits is False and report.change is None and report.tried == 0


@pytest.mark.parametrize("error", [StepStops, CannotRehearse])
def test_a_change_whose_step_stops_is_passed_over(by_hand: ByHand, error: type[Exception]) -> None:
    def needed(config: Config) -> float:
        if config.batch.micro_sequences < 8:
            raise error("step: an operator is missing")
        return 50.0 if config.train.recompute == "full" else 70.0

    by_hand(needed)
    report = fit(load_config(ONE_BILLION), h100(8), results=NOWHERE)
    assert report.change is not None and report.change.overrides == ("train.recompute=full",)
    assert report.tried > 2


@pytest.mark.parametrize(
    "keys, begun, share",
    [
        (("parallel.pipeline=2",), 2, 1),  # the first stage has begun two micro-steps
        (("parallel.pipeline=2", "batch.global_sequences=32"), 1, 1),  # there is but one
        (("parallel.tensor=2", "parallel.sequence=true"), 1, 2),
        (("parallel.offload_optimizer=true",), 1, 1),
    ],
)
def test_what_is_there_in_any_case(keys: tuple[str, ...], begun: int, share: int) -> None:
    """By hand: 18 blocks, of two stages 11 and 7, keep their inputs, [8, 2048, 2048] in bf16."""
    config, on = load_config(ONE_BILLION, keys), h100(8)
    held = held_by_stages(config, config.data_size(8))
    blocks = (11 * begun, 7) if config.parallel.pipeline == 2 else (18,)
    inputs = [2 * 8 * 2048 * 2048 // share * number for number in blocks]
    stages = [
        part.weights + part.optimizer * (not config.parallel.offload_optimizer) + kept
        for part, kept in zip(held, inputs, strict=True)
    ]
    assert layout_plan.at_least(config, on) == max(stages)


def test_stages_wait_for_the_first_and_the_last_micro_batch() -> None:
    """On eight GPUs, of which 8, 4 or 2 are data-parallel, with micro-batches of 8."""
    for stages, sequences, share in ((1, 64, 0.0), (2, 64, 1 / 3), (4, 64, 3 / 7), (4, 128, 3 / 11)):
        keys = [f"parallel.pipeline={stages}", f"batch.global_sequences={sequences}", "parallel.zero=1"]
        assert layout_plan.bubble(load_config(ONE_BILLION, keys), h100(8)) == pytest.approx(share)


def test_no_single_change_is_enough(by_hand: ByHand) -> None:
    by_hand(lambda config: 1000.0)
    report = fit(load_config(ONE_BILLION), h100(8), results=NOWHERE)
    assert report.fits is False and report.change is None and report.tried > 5


def test_what_binds(by_hand: ByHand) -> None:
    by_hand(lambda config: 1.0)
    slow = h100(64, interconnect="ethernet-10")
    report = fit(load_config(ONE_BILLION), slow, results=NOWHERE)
    assert report.constraint.startswith("the link between nodes (Ethernet), ")
    inner = fit(load_config(ONE_BILLION, ["parallel.tensor=8"]), h100(8, link_gb_per_second=1.0), results=NOWHERE)
    assert inner.constraint.startswith("the link inside a node (NVLink 4)")
    small = load_config(ONE_BILLION, ["model.d_model=256", "batch.micro_sequences=1", "train.cuda_graph=off"])
    assert fit(small, h100(1), results=NOWHERE).constraint.startswith("the host, which launches kernels")
    stages = load_config(ONE_BILLION, ["parallel.pipeline=8", "batch.global_sequences=8"])
    assert fit(stages, h100(8), results=NOWHERE).constraint.startswith("pipeline stages that wait")


def test_what_is_not_known_is_said_and_not_estimated(by_hand: ByHand) -> None:
    by_hand(lambda config: 1.0)
    unknown = machine(MachineOptions(gpu="prototype", gpus=1, memory_gib=2.0))
    report = fit(load_config(ONE_BILLION), unknown, results=NOWHERE)
    assert report.fits and report.time is None and "--peak-tflops" in str(report.why_no_time)
    cpu = fit(load_config(ONE_BILLION), machine(MachineOptions(gpu="cpu", gpus=2)), results=NOWHERE)
    assert cpu.fits is None and cpu.time is None
    assert not [line for line in _verdict(TINY, cpu, 0) if line.startswith("change:")], (
        "nothing says that one is needed"
    )


def test_equal_collectives_are_one_line() -> None:
    calls = [Collective("all_reduce", "data", 8, 80, "update"), Collective("all_reduce", "data", 8, 160, "update", 2)]
    calls += [Collective("all_gather", "data", 1, 80, "update"), Collective("send", "world", 8, 24, "update")]
    first, other, alone = traffic(load_config(ONE_BILLION), h100(8), calls)
    assert (first.calls, first.tensor_bytes, first.sent) == (3, 400, 2 * 7 / 8 * 400)
    assert (first.link, other.link, alone.link, alone.sent) == ("inside a node", "inside a node", "none", 0.0)


def test_a_run_that_would_be_refused_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^batch.global_sequences: 512 is not divisible"):
        fit(load_config(ONE_BILLION), machine(MachineOptions(gpu="h100-80gb", gpus=3)), results=NOWHERE)


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The real estimate, of the smallest shipped model."""
    few = ("--set", "model.num_layers=1")
    line = ["fit", str(TINY), *few, "--gpus", "2", "--gpu", "h100-80gb", "--results", str(tmp_path)]
    assert main(line) == 0
    text = capsys.readouterr().out
    for part in ("verdict:    fits", "constraint: ", "time:       ", "memory of a rank", "communication of a rank"):
        assert part in text
    assert main([*line, "--json", "--set", "train.stop_after_steps=150"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["steps_left"] == 150
    of_end = found["seconds"]["slow"]
    assert of_end["hours_left"] == pytest.approx(0.75 * of_end["run_hours"])
    assert found["fits"] and found["stages"][0]["needed_bytes"] > found["stages"][0]["weights"] > 0
    assert 0 < found["seconds"]["fast"]["total"] < found["seconds"]["slow"]["total"]
    assert {row["source"] for row in found["assumptions"]} and found["machine"]["gpus_per_node"] == 2


@pytest.mark.parametrize(
    "done, stop, said",
    [
        (0, "null", "; 200 steps take "),
        (150, "null", "; the 50 of 200 steps that are left take "),
        (200, "null", "; all 200 steps are done"),
        (0, "150", "; 150 steps to train.stop_after_steps take "),
        (50, "150", "; the 100 of 150 steps to train.stop_after_steps that are left take "),
        (150, "150", "; all 150 steps to train.stop_after_steps are done"),
        (50, "300", "; the 150 of 200 steps that are left take "),
    ],
)
def test_what_is_left_of_a_run_is_priced(tmp_path: Path, by_hand: ByHand, done: int, stop: str, said: str) -> None:
    by_hand(lambda config: 1.0)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_bytes(TINY.read_bytes())
    for step in range(50, done + 1, 50):
        (tmp_path / "checkpoints" / f"step-{step:08d}").mkdir()
        (tmp_path / "checkpoints" / f"step-{step:08d}" / "commit.json").touch()
    report = fit(load_config(TINY, [f"train.stop_after_steps={stop}"]), h100(2), results=NOWHERE)
    assert steps_done(tmp_path / "config.json") == done and steps_done(TINY) == 0 and report.time is not None
    assert said in whole_run(report, report.time, done)


def test_a_cpu_is_called_no_gpu(by_hand: ByHand) -> None:
    by_hand(lambda config: 2.0)
    for memory, said in ((None, "a rank needs 2.00 GiB"), (4.0, "the fullest rank needs"), (1.0, "the fullest rank")):
        found = machine(MachineOptions(gpu="cpu", gpus=2, memory_gib=memory, peak_tflops=0.1, link_gb_per_second=1.0))
        config = load_config(TINY, ["parallel.offload_optimizer=true", "batch.micro_sequences=1"])
        report = fit(config, found, results=NOWHERE)
        text = verdict(report)
        assert said in text and "GPU" not in text + report.constraint


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--gpus", "2", "--gpu", "h100"], "error: --gpu: 'h100' is not in the table of devices"),
        (["--gpus", "-2", "--gpu", "h100-80gb"], "error: --gpus: -2 is impossible"),
        (["--gpus", "2", "--gpu", "h100-80gb", "--set", "parallel.tensor=5"], "error: parallel.tensor: 5 does not"),
    ],
)
def test_mistakes(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", str(TINY), *arguments]) == 2
    assert said in capsys.readouterr().err


def test_a_divided_layout_is_rehearsed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stage by its first rank, with what it holds; what a rehearsal prints does not disturb the output."""
    asked: list[int] = []

    def rehearse(config: Config, num_ranks: int, rank: int, device_type: str, most_micro_steps: int = 3) -> Rehearsal:
        asked.append(rank)
        calls = [Call("send", (0, 4), "bfloat16", 500, 1000, "micro-step")] * most_micro_steps
        calls.append(Call("all_reduce", (0, 1, 2, 3) if rank == 0 else (4, 5, 6, 7), "float32", 25, 100, "update"))
        resting = {"weights": 2 * GIB, "optimizer": 3 * GIB, "pipeline": GIB}
        at_peak = {**resting, "loss": GIB, "update": 5}
        kept = {"blocks.0": 7 * GIB, "blocks.1": 6 * GIB, "head": GIB}
        return Rehearsal(most_micro_steps, resting, 0, kept, 20 * GIB + rank, at_peak, calls, [])

    monkeypatch.setattr(layout_plan, "rehearsed", rehearse)
    line = ["fit", str(ONE_BILLION), "--gpus", "8", "--gpu", "h100-80gb", "--set", "parallel.pipeline=2", "--json"]
    assert main([*line, "--results", str(ONE_BILLION.parent)]) == 0
    assert asked == [0, 4, 0, 0, 4, 4], "for memory, and for traffic with one micro-step more"
    told = json.loads(capsys.readouterr().out)
    (first, second), micro_steps = told["stages"], 512 // (8 * 4)
    for rows in told["traffic"]:
        assert [(row["kind"], row["group"], row["calls"], row["tensor_bytes"]) for row in rows] == [
            ("send", "pipeline", micro_steps, 1000 * micro_steps),
            ("all_reduce", "data", 1, 100),
        ]
    assert first["kept by a block"] == 7 * GIB and first["kept activations"] == 14 * GIB
    assert first["offloaded_optimizer_bytes"] == 0 < first["checkpoint_staging_bytes"]
    assert first["stage borders"] == GIB and second["needed_bytes"] == 20 * GIB + 4
