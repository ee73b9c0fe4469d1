"""Exponents are those of least squares, and the models of an axis differ in that axis alone. No timing."""

from __future__ import annotations

import contextlib
import importlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import page, records
from benchmarks.growth import __main__, axes, fit, ranks, table
from benchmarks.growth.axes import AXES, DENSE, FAMILIES, SWITCHALL, model_of, step_macs
from benchmarks.loop.loops import our_loop
from benchmarks.loop.speed import Piece
from common.errors import UserError
from model.costs import attention_macs, feedforward_macs, formula_parameters
from model.language_model import LanguageModel
from pretrain.config.schema import Config
from tests.harness import run_ranks
from tests.pretrain.runs import small_config

SIZES = [128, 256, 512, 1024, 2048]
SMALL = (
    "batch.micro_sequences=2",
    "model.d_model=16",
    "model.num_layers=1",
    "model.sequence_length=16",
    "monitor.tensorboard=false",
)
"""Of configs/switchall_tiny.json: steps of milliseconds."""


@pytest.mark.parametrize("power", [-0.5, 0.0, 1.0, 1.7])
def test_an_exact_power_law_is_found(power: float) -> None:
    values = [3.0 * size**power for size in SIZES]
    assert fit.power_law(SIZES, values) == pytest.approx((3.0, power))
    assert fit.leave_one_out(SIZES, values) == pytest.approx((power, power))
    assert fit.local_exponents(SIZES, values) == pytest.approx([power] * 4)
    assert fit.residual(SIZES, values) == pytest.approx(0.0, abs=1e-9)


def test_points_off_the_law_by_hand() -> None:
    """1, 2, 4 with 1, 4, 4: the line through (0, 0), (1, 2), (2, 2) in powers of two is 1/3 + x."""
    assert fit.power_law([1, 2, 4], [1.0, 4.0, 4.0]) == pytest.approx((2 ** (1 / 3), 1.0))
    assert fit.leave_one_out([1, 2, 4], [1.0, 4.0, 4.0]) == pytest.approx((0.0, 2.0))
    assert fit.residual([1, 2, 4], [1.0, 4.0, 4.0]) == pytest.approx(2 ** (2 / 3) - 1)


def test_distances_of_the_fixed_share_count_relative_to_the_values() -> None:
    """By the normal equations of sum ((a + b x) / y - 1)^2."""
    x, y = np.array(SIZES, float), np.array([150.0, 260.0, 510.0, 1090.0, 1990.0])
    u, v = 1 / y, x / y
    a, _ = np.linalg.solve([[u @ u, u @ v], [u @ v, v @ v]], [u.sum(), v.sum()])
    assert fit.fixed_share(SIZES, y.tolist()) == pytest.approx(a / y[0])


def test_the_fixed_share_is_what_a_straight_line_begins_with() -> None:
    assert fit.fixed_share([1, 2, 4], [3.0 + 1.0, 3.0 + 2.0, 3.0 + 4.0]) == pytest.approx(0.75)


def test_two_points_have_no_exponent_without_one_of_them() -> None:
    assert fit.leave_one_out([1, 2], [1.0, 2.0]) is None


GROWS: dict[str, tuple[str, ...]] = {
    "sequence-length": ("sequence_length",),
    "sigma-moe-experts": ("feedforward", "num_experts"),
    "switchhead-experts": ("attention", "num_experts"),
    "layers": ("num_layers",),
}


@pytest.mark.parametrize("name", AXES)
def test_models_differ_in_their_axis_alone(name: str) -> None:
    axis, (*section, key) = AXES[name], GROWS[name]
    for family in axis.families:
        trees = []
        for size in axis.sizes:
            tree = model_of(axis, family, size).model_dump()
            part: dict[str, Any] = tree
            for one in section:
                part = part[one]
            assert part.pop(key) == size
            trees.append(tree)
        assert all(tree == trees[0] for tree in trees)


def test_families_have_equally_many_parameters() -> None:
    dense, switchall = (formula_parameters(model_of(AXES["layers"], family, 4)).total for family in FAMILIES)
    assert switchall == pytest.approx(dense, rel=0.02)


@pytest.mark.parametrize("name, layer_macs", [("sigma-moe-experts", 1), ("switchhead-experts", 2)])
def test_more_experts_add_the_routers_alone(name: str, layer_macs: int) -> None:
    """d multiply-accumulates for each token, expert and selector: one of σ-MoE, two of SwitchHead."""
    axis = AXES[name]
    first, *others = [model_of(axis, SWITCHALL, size) for size in axis.sizes]
    for config, size in zip(others, axis.sizes[1:], strict=True):
        one_expert = 3 * config.num_layers * config.sequence_length * config.d_model * layer_macs
        assert step_macs(config) - step_macs(first) == one_expert * (size - axis.sizes[0])
        assert formula_parameters(config).total > formula_parameters(first).total


def test_layers_add_their_own_arithmetic_and_the_output_layer_stays() -> None:
    one, two, four = (model_of(AXES["layers"], DENSE, size) for size in (1, 2, 4))
    layer = 3 * (attention_macs(one) + feedforward_macs(one))
    assert step_macs(two) - step_macs(one) == layer and step_macs(four) - step_macs(two) == 2 * layer
    assert step_macs(one) - layer == 3 * 1024 * 256 * 512


@pytest.mark.parametrize("size", [128, 256])
def test_the_dense_step_does_the_multiply_accumulates_of_the_formulas(size: int) -> None:
    """As torch counts them in forward and backward, the attention matrices left out on both sides: a fused attention
    has a backward pass of its own."""
    config = model_of(AXES["sequence-length"], DENSE, size)
    tokens = torch.zeros(1, size, dtype=torch.int64)
    model = LanguageModel(config, seed=0)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        model(tokens, tokens, torch.arange(1))[0].backward()
    flops = counter.get_flop_counts()["Global"]
    products = sum(count for op, count in flops.items() if "mm" in str(op) and "bmm" not in str(op)) // 2
    matrices = 3 * config.num_layers * 2 * 256 * size * size
    assert products == step_macs(config) - matrices


FOUND: dict[str, Any] = {
    "threads": 1,
    "rounds": 3,
    "cores": 2,
    "axes": {
        "layers": {
            "dense": [
                {"size": size, "macs": 10 + 10 * size, "seconds": [9.0, 0.3 + 0.1 * size, 0.0]} for size in (1, 2, 4)
            ]
        },
        "sequence-length": {"dense": [{"size": s, "macs": s * s, "seconds": [s**1.5]} for s in (1, 2, 4)]},
    },
    "ranks": [
        {"ranks": n, "passed": [seconds], "worked": [0.2 * n**0.5], "sent": 1_000_000 * (n - 1)}
        for n, seconds in ((1, 0.25), (2, 0.5), (4, 7.0))
    ],
}


def test_rows_have_medians_exponents_and_shares() -> None:
    layers, sequence, step, worked = table.rows(FOUND)
    assert layers[:4] == ["layers", "dense", "1, 4", "400, 700"] and layers[-2:] == ["75%", "50%"]
    assert sequence[4:] == ["1.50", "1.50 to 1.50", "2.00", "1.50, 1.50", "0%", "-", "-"]
    # Four ranks share two cores: their processor time counts, their step time does not.
    assert step[1:7] == ["step", "1, 2", "250, 500", "1.00", "-", "0.00"]
    assert worked[1:7] == ["processor time", "1, 4", "200, 400", "0.50", "0.50 to 0.50", "0.00"]
    assert table.rank_rows(FOUND)[2] == ["4", "2", "7000", "28.00", "400", "2.00", "3.0"]


def test_a_kept_record_becomes_tables_and_a_picture(tmp_path: Path) -> None:
    records.keep(tmp_path, "growth", records.machine(), FOUND)
    text = page.updated(page.DOCUMENT.read_text(encoding="utf-8"), tmp_path)
    assert "| layers | dense | 1, 4 | 400, 700 |" in text and "| 4 | 2 | 7000 |" in text
    assert page.draw(tmp_path, tmp_path) == [tmp_path / "benchmark-growth.png"]
    assert (tmp_path / "benchmark-growth.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_prints_and_keeps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(axes, "BASE", axes.BASE | {"d_model": 8, "num_layers": 1, "sequence_length": 4})
    for name, sizes in (("layers", (1, 2)), ("sigma-moe-experts", (4, 5, 6))):
        monkeypatch.setitem(AXES, name, AXES[name]._replace(sizes=sizes))
    words = ["--axis", "layers", "--axis", "sigma-moe-experts", "--rounds", "2", "--keep", str(tmp_path)]
    assert __main__.main(words) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("layers", "σ-MoE"))]
    assert [line.split()[1] for line in lines[:2]] == ["dense", "SwitchAll"] and len(lines) == 3
    kept = records.read("growth", tmp_path)
    assert kept is not None and kept.found["ranks"] == []
    points = kept.found["axes"]["sigma-moe-experts"][SWITCHALL]
    assert [point["size"] for point in points] == [4, 5, 6] and all(len(point["seconds"]) == 2 for point in points)
    assert table.page(kept.found).count("\n") == 4


def pieces(rank: int, config: Config, folder: Path) -> list[float]:
    """Losses, which the first rank writes."""
    with our_loop(config, folder, torch.device("cpu")) as ours:
        ours.train(2)
        ours.train(1)
        if rank == 0:
            return ours.losses()
        ours.train(1)
        return []


@pytest.mark.slow
def test_our_loop_trains_the_same_on_two_ranks(prepared: Path, tmp_path: Path) -> None:
    config = small_config(prepared)
    one, two = (run_ranks(pieces, count, config, tmp_path / str(count))[0] for count in (1, 2))
    assert len(one) == 3 and two == pytest.approx(one, rel=1e-5)


def test_each_rank_has_the_same_micro_batch(prepared: Path) -> None:
    for count in (1, 2, 4):
        config = ranks.config_for(
            Path("configs/switchall_tiny.json"), [f"data.manifest={prepared}", "batch.global_sequences=32"], count
        )
        assert (config.batch.micro_sequences, config.batch.global_sequences) == (8, 8 * count)


@pytest.mark.slow  # the fast one: traffic of ZeRO 1 in pretrain/planning/test_rough_traffic.py
def test_a_rank_sends_gradients_and_weights_around_the_ring(prepared: Path) -> None:
    """ZeRO 1: (N - 1) / N of all gradients twice and of all weights once, 4 bytes each, and little else."""
    config = ranks.config_for(Path("configs/switchall_tiny.json"), [f"data.manifest={prepared}"], 4)
    assert ranks.sent_by_a_rank(config, 1) == 0
    expected = 3 / 4 * 3 * 4 * formula_parameters(config.model).total
    assert ranks.sent_by_a_rank(config, 4) == pytest.approx(expected, rel=0.01)


def test_a_step_is_that_of_the_slowest_rank(monkeypatch: pytest.MonkeyPatch, prepared: Path) -> None:
    @contextlib.contextmanager
    def group(config: Config, count: int, folder: Path) -> Any:
        yield lambda steps: [Piece(2.0 * steps * (rank + 1), 1.0 * steps * rank) for rank in range(count)]

    monkeypatch.setattr(ranks, "group", group)
    words = [f"data.manifest={prepared}", *SMALL]
    configs = {n: ranks.config_for(Path("configs/switchall_tiny.json"), words, n) for n in (1, 2)}
    one, two = ranks.measured(configs, rounds=3, steps=5)
    assert (one["passed"], one["worked"]) == ([2.0] * 3, [0.0] * 3)
    assert (two["ranks"], two["passed"], two["worked"]) == (2, [4.0] * 3, [0.5] * 3)


def test_mistakes_are_refused_before_anything_is_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(axes, "measured", lambda *_: pytest.fail("measured"))
    assert __main__.main(["--data", str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        __main__.main(["--rounds", "0"])


@pytest.mark.slow
def test_processes_of_ranks_train_in_turns(prepared: Path) -> None:
    """test_our_loop_trains_the_same_on_two_ranks has the loop, test_a_step_is_that_of_the_slowest_rank the turns."""
    importlib.import_module("deepspeed")  # which sets a variable of its own
    before = dict(os.environ)
    words = [f"data.manifest={prepared}", *SMALL]
    configs = {n: ranks.config_for(Path("configs/switchall_tiny.json"), words, n) for n in (1, 2)}
    found = ranks.measured(configs, rounds=2, steps=2)
    assert [point["ranks"] for point in found] == [1, 2]
    assert all(len(point[clock]) == 2 and min(point[clock]) > 0 for point in found for clock in ("passed", "worked"))
    assert os.environ == before


@pytest.mark.slow
def test_a_rank_that_fails_is_told_with_its_last_words(prepared: Path, tmp_path: Path) -> None:
    """test_mistakes_are_refused_before_anything_is_measured has what can be known before."""
    config = ranks.config_for(Path("configs/switchall_tiny.json"), [f"data.manifest={prepared}", *SMALL], 1)
    gone = config.replaced("data", manifest=str(tmp_path / "gone"))
    with pytest.raises(UserError, match=r"rank 0 of 1 does not train(?s:.*)gone"), ranks.group(gone, 1, tmp_path / "g"):
        pass
