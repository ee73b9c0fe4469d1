"""The families have equally many parameters, and ratios are those of the same round."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import families, records, rounds
from benchmarks.families import ALL_PARTS, DENSE, SHAPES, Measured, Step, model_of, part_of, profiled, rows
from benchmarks.rounds import orders
from model.config import ModelConfig
from model.costs import formula_parameters


@pytest.mark.parametrize("shape", SHAPES)
def test_families_of_a_shape_are_matched(shape: str) -> None:
    models = {family: model_of(shape, family) for family in SHAPES[shape]}
    totals = {family: formula_parameters(config).total for family, config in models.items()}
    assert all(abs(total / totals[DENSE] - 1) < 0.02 for total in totals.values()), totals
    one = models[DENSE]
    for config in models.values():
        assert (config.d_model, config.num_layers, config.sequence_length) == (
            one.d_model,
            one.num_layers,
            one.sequence_length,
        )
        assert config.dropout == 0.0 and config.vocab_size == one.vocab_size and config.position == one.position


def test_each_round_begins_with_another_family() -> None:
    assert "".join(orders("abc", 4)) == "abc" + "bca" + "cab" + "abc"


@pytest.mark.parametrize("threads, clock", [(1, 5.0), (2, 7.0)])
def test_one_thread_is_timed_by_the_processor(threads: int, clock: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds.torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(rounds.time, "process_time", lambda: 5.0)
    monkeypatch.setattr(rounds.time, "perf_counter", lambda: 7.0)
    assert rounds.seconds() == clock


def test_ratios_are_of_the_same_round() -> None:
    found = {
        "dense": Measured(100, 10, 50, 1000, [1.0, 2.0, 4.0], {}),
        "SwitchAll": Measured(99, 4, 26, 500, [0.5, 1.0, 1.0], {}),
    }
    dense, other = rows("47m", found)
    assert dense[3:6] == ["2.00", "1.00", "1.00 to 1.00"]
    assert other[1:5] == ["SwitchAll", "99", "1.00", "0.50"] and other[6:] == ["0.40", "0.52", "0", "0.50"]


TINY = {
    "d_model": 8,
    "num_layers": 1,
    "vocab_size": 11,
    "sequence_length": 4,
    "attention": {"type": "dense", "num_heads": 2, "head_dim": 4},
    "position": {"type": "xl", "memory_chunks": 1},
    "feedforward": {"type": "dense", "hidden_size": 16},
}


def test_what_is_kept_is_counted_once_and_parameters_are_not() -> None:
    step = Step(ModelConfig.model_validate(TINY), 2)
    x, weight = torch.ones(5, 3, requires_grad=True), torch.nn.Parameter(torch.ones(3, 3))
    step.model.extra = weight
    step.model.forward = lambda *_, **__: ((x * x @ weight).exp().sum(), torch.zeros(2), torch.zeros(()))
    # x, its square and the exponential; the weight is a parameter.
    assert step.kept_bytes() == 3 * 5 * 3 * 4
    assert step() > 0


def test_the_work_of_a_step_is_that_of_the_layers_that_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters and the work of a block are the whole model's."""
    attention = {"type": "dense", "num_heads": 2, "head_dim": 4}
    base = {"d_model": 8, "vocab_size": 11, "sequence_length": 6, "attention": attention}
    whole, one = (ModelConfig.model_validate(base | {"num_layers": layers}) for layers in (3, 1))
    monkeypatch.setattr(families, "SHAPES", {"small": {DENSE: ("", None)}})
    monkeypatch.setattr(families, "model_of", lambda *_: whole)
    found = families.measured("small", 1, 1, 1)[DENSE]
    assert found.step_macs == families.forward_macs(one) == found.macs + 11 * 8 * 6
    assert found.parameters == formula_parameters(whole).total


@pytest.mark.slow  # the fast one: the others of this file
def test_the_command_prints_a_line_for_each_family(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    switchhead = {"type": "switchhead", "num_heads": 1, "head_dim": 4, "num_experts": 2, "active_experts": 1}
    trees = {"dense": TINY, "SwitchHead": TINY | {"attention": switchhead}}
    monkeypatch.setattr(families, "SHAPES", {"47m": dict.fromkeys(trees, ("", None))})
    monkeypatch.setattr(families, "model_of", lambda _, family: ModelConfig.model_validate(trees[family]))
    assert families.main(["--shape", "47m", "--rounds", "2", "--layers", "2"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("47m ")]
    assert [line[1] for line in lines] == ["dense", "SwitchHead"] * 2
    assert families.main(["--shape", "47m", "--rounds", "2", "--layers", "2", "--keep", str(tmp_path)]) == 0
    kept = records.read("families", tmp_path)
    assert kept is not None and kept.found["layers"] == 2
    rows_of_page = [row for row in families.page(kept.found).splitlines() if row.startswith("| 47m")]
    assert [row.split(" | ")[1] for row in rows_of_page] == ["dense", "SwitchHead"] * 2


def test_the_parts_of_a_step_are_those_of_the_model() -> None:
    switchhead = {"type": "switchhead", "num_heads": 1, "head_dim": 4, "num_experts": 2, "active_experts": 1}
    experts = {"type": "sigma_moe", "num_experts": 4, "expert_size": 8, "active_experts": 2}
    trees = {"dense": TINY, "SwitchAll": TINY | {"attention": switchhead, "feedforward": experts}}
    found = {name: profiled(Step(ModelConfig.model_validate(tree), 2)) for name, tree in trees.items()}
    only_experts = {"routers", "experts of attention", "experts of feed-forward"}
    for name, parts in found.items():
        assert set(parts) == set(ALL_PARTS)
        spent = {part for part, seconds in parts.items() if seconds > 0.0}
        assert spent == (set(ALL_PARTS) if name == "SwitchAll" else set(ALL_PARTS) - only_experts)


@pytest.mark.parametrize(
    "name, part",
    [
        ("autograd::engine::evaluate_function: GeneratedBackwardFor_switchall_sigma_moe_defaultBackward", ALL_PARTS[3]),
        ("autograd::engine::evaluate_function: MmBackward0", ALL_PARTS[5]),
        ("autograd::engine::evaluate_function: BmmBackward0", ALL_PARTS[4]),
        ("autograd::engine::evaluate_function: UnsafeViewBackward0", ALL_PARTS[6]),
    ],
)
def test_names_of_the_profiler_belong_to_parts(name: str, part: str) -> None:
    assert part_of(name) == part
