"""Means over seeds as a table for a paper, against run folders written by hand."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer

from model.config import ModelConfig
from pretrain.views.sweep import Result, SweepRun, edges
from pretrain.views.sweep_means import means_csv, means_latex, summarised
from pretrain.views.sweep_picture import losses_drawn
from tests.pretrain.views.compared import row, write
from tests.pretrain.words_drawn import note_axes

EXPERTS, SEED = "model.feedforward.num_experts", "train.seed"
MODEL = ModelConfig(d_model=8, num_layers=1, vocab_size=10, sequence_length=4)


def result(folder: Path, experts: str, seed: str, loss: float, code: int = 0, model: object = None) -> Result:
    run = SweepRun(name=f"x_1,{experts},{seed}", config="x_1", values={EXPERTS: experts, SEED: seed})
    config = {"train": {"steps": 1}, "model": MODEL.model_dump(mode="json") if model is None else model}
    path = write(folder / run.name, [row(1, loss)], config)
    (path / "events.jsonl").write_text(json.dumps({"event": "validation", "step": 1, "loss": loss}) + "\n")
    (path / "outcome.json").write_text(json.dumps({"exit_code": code}))
    return Result.read(run, folder, None, "")


def test_means_deviations_and_costs(tmp_path: Path) -> None:
    found = summarised(
        [
            result(tmp_path, "4", "0", 3.0),
            result(tmp_path, "4", "1", 3.4),
            result(tmp_path, "4", "2", 1.0, 3),  # diverged: no result of the model
            result(tmp_path, "8", "0", 3.1, model={"of": "another version"}),
        ],
        [EXPERTS, SEED],
    )
    eight, four = csv.DictReader(io.StringIO(means_csv(found, [EXPERTS, SEED])))
    assert [means.values[EXPERTS] for means in found] == ["8", "4"], "the best first"
    assert four["seeds"] == "2" and eight["seeds"] == "1"
    perplexities = [math.exp(3.0), math.exp(3.4)]
    assert math.isclose(float(four["validation_loss_mean"]), 3.2)
    assert math.isclose(float(four["validation_loss_deviation"]), stdev([3.0, 3.4]))
    assert math.isclose(float(four["validation_perplexity_mean"]), fmean(perplexities))
    assert math.isclose(float(four["validation_perplexity_deviation"]), stdev(perplexities))
    assert eight["validation_loss_deviation"] == eight["parameters"] == ""
    # 4 heads of 64 with 4 experts each; 16 experts of 128; three norms; embedding, output layer and its bias.
    d, heads, experts = 8, 4 * 64, 4
    attention = 2 * d * heads + 2 * experts * d * heads + 2 * 4 * experts * d
    feedforward = 16 * d + 16 * 2 * d * 128
    assert int(four["parameters"]) == attention + feedforward + 4 * d + 2 * 10 * d + 10 + 2 * d
    assert int(four["parameters"]) - int(four["active_parameters"]) == 2 * 2 * d * heads + 12 * 2 * d * 128
    latex = means_latex(found, [EXPERTS, SEED])
    assert "num experts & parameters (M) & active (M) & MFLOP/token & seeds & perplexity" in latex
    assert rf"4 & 0.1 & 0.0 & 0.1 & 2 & {fmean(perplexities):.2f} $\pm$ {stdev(perplexities):.2f} \\" in latex
    assert rf"8 & -- & -- & -- & 1 & {math.exp(3.1):.2f} \\" in latex


def test_nothing_of_a_value_is_a_command_of_tex(tmp_path: Path) -> None:
    found = summarised([result(tmp_path, '{"type": "sigma_moe", "a%b": "~^"}', "0", 3.0)], [EXPERTS, SEED])
    assert r"sigma\_moe \textasciitilde{}\textasciicircum{} &" in means_latex(found, [EXPERTS, SEED])
    assert "nothing yet" in means_latex([], [EXPERTS])


def test_losses_of_several_tokenizers_are_bits_and_no_perplexities(tmp_path: Path) -> None:
    results = []
    for number, (experts, bits) in enumerate((("4", 1.25), ("8", 1.5))):
        found = result(tmp_path, experts, "0", 3.0)
        assert found.view is not None
        events = [{"event": "started", "step": 0, "data_digest": str(number) * 64}]
        events += [{"event": "validation", "split": "validation", "step": 1, "loss": 3.0, "bits_per_byte": bits}]
        (found.view.path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
        results.append(Result.read(found.run, tmp_path, None, ""))
    means = summarised(results, [EXPERTS, SEED])
    first, _ = csv.DictReader(io.StringIO(means_csv(means, [EXPERTS, SEED])))
    assert first["validation_bits_per_byte_mean"] == "1.25" and not any("perplexity" in key for key in first)
    latex = means_latex(means, [EXPERTS, SEED])
    assert "& bits per byte" in latex and "& 1.2500" in latex


def test_the_best_value_is_that_of_the_best_mean(tmp_path: Path) -> None:
    """One lucky seed of the highest value, and the lowest mean in the middle."""
    losses = {"2": (3.4, 3.4), "4": (3.1, 3.1), "8": (2.9, 3.9)}
    results = [result(tmp_path, n, str(seed), loss) for n, of in losses.items() for seed, loss in enumerate(of)]
    assert edges(results, [EXPERTS, SEED]) == []
    assert "highest tried" in edges([r for r in results if r.run.values[SEED] == "0"], [EXPERTS, SEED])[0]


def test_the_picture_has_means_over_seeds_with_their_deviation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And each run against the seeds themselves. The star is the best mean, not the luckiest run."""
    losses = {("4", "0"): 3.0, ("4", "1"): 3.4, ("8", "0"): 2.9, ("8", "1"): 3.7}
    found = note_axes(monkeypatch)
    losses_drawn([result(tmp_path, *at, loss) for at, loss in losses.items()], [EXPERTS, SEED])
    of_experts, of_seeds = found
    mean, star = of_experts.lines[0], of_experts.lines[-1]
    assert np.allclose(np.asarray(mean.get_ydata()), [3.2, 3.3])
    assert np.allclose(np.asarray(star.get_xydata()), [[4.0, 3.2]])
    (bars,) = [container for container in of_experts.containers if isinstance(container, ErrorbarContainer)]
    ends = [[point[1] for point in line] for line in bars[2][0].get_segments()]
    first, second = stdev([3.0, 3.4]), stdev([2.9, 3.7])
    assert np.allclose(ends, [[3.2 - first, 3.2 + first], [3.3 - second, 3.3 + second]])
    assert not of_seeds.containers and len(of_seeds.lines) == 3


def test_finished_runs_without_a_loss_are_in_no_mean_of_the_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their loss is no number, or they were not validated: two seeds of them have no deviation either."""
    stars: list[tuple[float, float]] = []
    plot = Axes.plot

    def plotted(axes: Axes, *values: Any, **look: Any) -> Any:
        if "k*" in values:
            stars.append((values[0], values[1]))
        return plot(axes, *values, **look)

    monkeypatch.setattr(Axes, "plot", plotted)
    losses = {("4", "0"): math.nan, ("4", "1"): math.nan, ("8", "0"): 3.0, ("8", "1"): math.nan}
    losses_drawn([result(tmp_path, *names, loss) for names, loss in losses.items()], [EXPERTS, SEED])
    assert stars[0] == (8.0, 3.0)
