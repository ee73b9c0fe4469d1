"""The time of a step beside sums made by hand, from rates of round numbers."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from model.costs import training_flops_per_token
from pretrain.cli.plan_fit import hours_range, hours_text, seconds_text
from pretrain.config.loading import load_config
from pretrain.config.schema import Config
from pretrain.planning import layout_plan
from pretrain.planning.devices import Device
from pretrain.planning.links import Collective, Rates
from pretrain.planning.machine import Machine, MachineOptions
from pretrain.planning.machine import machine as machine_of
from pretrain.planning.measured import measurements
from pretrain.planning.step_time import (
    Pace,
    StageWork,
    Terms,
    blocks_of_stages,
    held_by_stages,
    model_flops,
    stage_flops,
    stage_works,
    step_terms,
)

ROOT = Path(__file__).resolve().parents[3]
CONFIGS = ROOT / "configs"
ONE_BILLION = CONFIGS / "switchall_1b.json"
RATES = Rates(inside=10.0, between=1.0, start_inside=0.01, start_between=0.1)
SLOW = Pace(flops=100.0, memory=1000.0, launches=0.1, repeated=7.0, rates=RATES, hides=False)
FAST = replace(SLOW, hides=True)
GRADIENTS = Collective("all_reduce", "data", 16, 80, "update")
WEIGHTS = Collective("all_gather", "data", 16, 40, "update")


def sixteen(*overrides: str) -> tuple[Config, Machine]:
    """Two micro-steps on two nodes of eight."""
    config = load_config(ONE_BILLION, ["batch.global_sequences=32", "batch.micro_sequences=1", *overrides])
    device = Device(name="x", what="x", flops={})
    return config, Machine(device=device, num_gpus=16, gpus_per_node=8, interconnect=None, ports_per_node=1)


def work(*collectives: Collective, flops: float = 50.0) -> StageWork:
    return StageWork(flops=flops, launched=2, activations=0.0, parameters=20, optimizer=40, collectives=collectives)


def test_data_parallel() -> None:
    config, machine = sixteen()
    slow = step_terms(config, machine, [work(GRADIENTS, WEIGHTS)], SLOW)
    # Two micro-steps of 50 / 100 s and 10 x 20 bytes of gradients; Adam's 2.5 x 40 bytes; rings over 8 ports a node.
    assert slow.compute == pytest.approx(1.0) and slow.host == slow.inside == slow.bubble == 0
    assert slow.memory == pytest.approx(2 * 0.2 + 0.1)
    assert slow.between == pytest.approx((0.1 + 2 * 15 / 16 * 80 / 8) + (0.1 + 15 / 16 * 40 / 8))
    fast = step_terms(config, machine, [work(GRADIENTS, WEIGHTS)], FAST)
    assert slow.total - fast.total == pytest.approx(2 / 3 * 0.5)  # behind the last backward pass
    assert fast.total == pytest.approx(25.1375 - 1 / 3)


def test_at_zero_0_autograd_adds_gradients_in_fp32() -> None:
    config, machine = sixteen("parallel.zero=0", "train.precision=fp32")
    assert step_terms(config, machine, [work()], SLOW).memory == pytest.approx(2 * 12 * 20 / 1000 + 0.1)


def test_a_moving_average_is_among_what_a_rank_holds() -> None:
    """Also where the same layout was asked for without one before: a search keeps what ranks hold."""
    plain, kept = (held_by_stages(sixteen(*keys)[0], 16)[0] for keys in ((), ("train.ema_decay=0.9",)))
    assert kept.optimizer > plain.optimizer and kept.parameters == plain.parameters


def test_a_short_reduction_is_hidden_whole_and_no_more() -> None:
    config, machine = sixteen()
    small = replace(GRADIENTS, num_bytes=0)
    assert step_terms(config, machine, [work(small)], FAST).between == 0.0
    assert step_terms(config, machine, [work(small)], SLOW).between == pytest.approx(0.1)


def test_the_host_is_waited_for_where_it_launches_more_slowly() -> None:
    config, machine = sixteen()
    terms = step_terms(config, machine, [work(flops=5.0)], SLOW)  # 0.05 s of computing, 2 x 0.1 s of launching
    assert (terms.compute, terms.host) == pytest.approx((0.1, 0.3))


def test_selective_recomputation_reads_and_writes_again() -> None:
    config, machine = sixteen("train.recompute=selective")
    (stage,) = stage_works(config, 16, [[]])
    assert stage.activations == 18 * 2048 * 2048  # blocks, tokens, d_model
    repeated = replace(work(), activations=30.0)
    more = step_terms(config, machine, [repeated], SLOW).memory - step_terms(config, machine, [work()], SLOW).memory
    assert more == pytest.approx(2 * 7 * 30 / 1000)
    assert stage.launched == 18 * 1.5 and stage_works(load_config(ONE_BILLION), 16, [[]])[0].launched == 18
    (halved,) = stage_works(load_config(ONE_BILLION, [*HALVES, "train.recompute=selective"]), 8, [[]])
    assert halved.activations == 8 * stage.activations / 2
    assert stage_works(load_config(ONE_BILLION), 16, [[]])[0].activations == 0.0


HALVES = ("parallel.tensor=2", "parallel.sequence=true")


def test_links_of_a_micro_step() -> None:
    config, machine = sixteen("parallel.tensor=2")  # 8 data ranks: four micro-steps
    tensor = Collective("all_reduce", "tensor", 2, 30, "micro-step", count=8)
    slow = step_terms(config, machine, [work(tensor)], SLOW)
    assert slow.inside == pytest.approx(8 * (0.01 + 3.0)) and slow.between == 0
    assert step_terms(config, machine, [work(tensor)], FAST).inside == pytest.approx(slow.inside / 2)


def test_pipeline_stages_wait_for_the_slowest() -> None:
    config, machine = sixteen("parallel.pipeline=4")  # 4 data ranks: eight micro-steps
    message = Collective("send", "pipeline", 4, 5, "micro-step", count=8)
    stages = [work(message), work(message, flops=80.0), work(message), work()]
    slow = step_terms(config, machine, stages, SLOW)
    # BF16_Optimizer moves 18 bytes a parameter, and a message takes 5.1 s between nodes.
    one = 0.8 + 18 * 20 / 1000 + 5.1
    assert slow.bubble == pytest.approx(3 * one)
    assert slow.total == pytest.approx((8 + 3) * one + 0.1)
    assert step_terms(config, machine, stages, FAST).total == pytest.approx((8 + 3) * (one - 5.1) + 0.1)


def test_zero_2_reduces_in_every_micro_step() -> None:
    config, machine = sixteen("parallel.zero=2", 'deepspeed={"zero_optimization": {"overlap_comm": true}}')
    every = replace(GRADIENTS, part="micro-step", count=2)
    one = 0.1 + 2 * 15 / 16 * 80 / 8
    assert step_terms(config, machine, [work(every)], SLOW).between == pytest.approx(2 * one)
    assert step_terms(config, machine, [work(every)], FAST).between == pytest.approx(2 * (one - 1 / 3))


@pytest.mark.parametrize("name", ["switchall_1b", "paper/c4_switchhead_262m", "paper/c4_dense_47m"])
@pytest.mark.parametrize("pipeline, recompute", [(1, "none"), (3, "selective"), (4, "full")])
def test_stages_execute_the_flops_of_the_model(name: str, pipeline: int, recompute: str) -> None:
    path = CONFIGS / f"{name}.json"
    config = load_config(path, [f"parallel.pipeline={pipeline}", f"train.recompute={recompute}"])
    tokens = config.batch.micro_sequences * config.model.sequence_length
    head = 6 * config.model.vocab_size * config.model.d_model
    expected = tokens * training_flops_per_token(config.model)
    if recompute == "full":  # the forward pass of the blocks once more, and that of the head not
        expected += tokens * (training_flops_per_token(config.model) - head) / 3
    assert sum(stage_flops(config)) == pytest.approx(expected)
    assert sum(blocks_of_stages(config)) == config.model.num_layers
    steps = config.batch.global_sequences / config.batch.micro_sequences
    assert model_flops(config) == pytest.approx(steps * tokens * training_flops_per_token(config.model))


def test_tensor_ranks_divide_them() -> None:
    config = load_config(ONE_BILLION, ["parallel.tensor=4"])
    assert stage_flops(config)[0] == pytest.approx(stage_flops(load_config(ONE_BILLION))[0] / 4)


def test_terms_add_up() -> None:
    one = Terms(compute=1.0, host=2.0, memory=3.0, inside=4.0, between=5.0, bubble=6.0)
    assert one.total == 21.0 and one.plus(one, 0.5).bubble == 9.0


def on_64_h100s(keys: list[str], interconnect: str | None) -> layout_plan.StepTime:
    found = machine_of(MachineOptions(gpu="h100-80gb", gpus=64, interconnect=interconnect))
    return layout_plan.step_time(load_config(ONE_BILLION, keys), found, measurements(found.device))


def test_the_advice_for_64_gpus_has_the_times_of_the_planner() -> None:
    text = (ROOT / "docs" / "parallelism.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (nothing|`\w+\.\w+=.*) \| ([\d.]+ to [\d.]+) \| ([\d.]+ to [\d.]+) \|$", text, re.MULTILINE)
    assert len(rows) == 6
    for setting, *told in rows:
        keys = re.findall(r"[\w.]+=\w+", setting)
        for interconnect, words in zip((None, "ethernet-100"), told, strict=True):
            ends = [f"{terms.total:#.3g}" for terms in on_64_h100s(keys, interconnect)]
            assert words == " to ".join(ends), setting


def test_the_answers_for_64_gpus_are_those_of_the_planner() -> None:
    text = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    (row,) = [line for line in text.splitlines() if line.startswith("| 64 | nothing")]
    plain, expert = (on_64_h100s(keys, None) for keys in ([], ["parallel.expert=8"]))
    network = [terms.between + terms.inside for terms in plain]
    for fast, slow in ([terms.total for terms in plain], [terms.total for terms in expert], network):
        assert f"{seconds_text(fast)} to {seconds_text(slow)}" in row


def test_hours_have_no_exponents() -> None:
    assert [hours_text(hours) for hours in (8.03e-06, 0.0123, 1.5, 99.9, 12_345.6)] == [
        "<0.01",
        "0.0123",
        "1.5",
        "99.9",
        "12,346",
    ]
    assert [hours_range(*ends) for ends in ((1e-5, 1e-4), (1e-5, 0.02), (1.5, 99.9))] == [
        "less than 0.01",  # <0.01 to <0.01
        "<0.01 to 0.02",
        "1.5 to 99.9",
    ]
