"""The table of a sweep, against run folders written by hand: order, states, edges, numbers of the CSV, pictures."""

from __future__ import annotations

import csv
import io
import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.transforms import Bbox

from pretrain.views.sweep import (
    Result,
    SweepRun,
    edges,
    loss_name,
    number_of,
    ranked,
    seeds_table,
    seeds_text,
    table,
    table_csv,
    table_text,
)
from pretrain.views.sweep_picture import losses_drawn
from tests.pretrain.views.compared import row, write
from tests.pretrain.views.swept import RATE, result
from tests.pretrain.words_drawn import note_axes, note_words


def test_the_lowest_validation_loss_is_first_and_what_has_not_finished_is_last(tmp_path: Path) -> None:
    """A run that stopped early, however low its loss, is not compared with finished ones."""
    results = [
        result(tmp_path, "8e-3"),
        result(tmp_path, "4e-3", [5.0, 1.0], 85),
        result(tmp_path, "1e-3", [5.0, 4.0, 3.0]),
        result(tmp_path, "2e-3", [5.0, 3.0, 2.0]),
        result(tmp_path, "3e-2", [5.0], 3),
        result(tmp_path, "9e-3", unrecorded=2),
        result(tmp_path, "7e-3", job="41"),
        result(tmp_path, "6e-3", [5.0], None),
    ]
    header, *rows = table(results, [RATE])
    assert header[:4] == ["config", RATE, "state", "step"]
    assert [line[1:4] for line in rows] == [
        ["2e-3", "finished", "3 of 3"],
        ["1e-3", "finished", "3 of 3"],
        ["4e-3", "stopped at step 2", "2 of 3"],
        ["3e-2", "diverged at step 1", "1 of 3"],
        ["6e-3", "dead at step 1", "1 of 3"],
        ["8e-3", "not begun", "0"],
        ["9e-3", "failed, code 2", "0"],
        ["7e-3", "not begun (job 41)", "0"],
    ]
    assert rows[0][4:7] == ["2.1000", "2.0000", "100"]  # tokens/s: the median of 50, 100 and 150
    whole = table_text(results, [RATE])
    assert whole.count("\n") == len(results) and RATE in whole
    assert table_text(results, [RATE], width=max(map(len, whole.splitlines()))) == whole
    narrow = table_text(results, [RATE], width=60)
    assert max(map(len, narrow.splitlines())) <= 60 and RATE not in narrow
    first = [line for line in narrow.splitlines() if line.startswith("x,2e-3")]
    assert "2.1000" in " ".join(first) and "finished" in first[0]  # the run's name stands in each part


def test_a_finished_run_without_a_loss_comes_before_one_that_has_not_finished(tmp_path: Path) -> None:
    """Of the finished ones it is the last; its loss is no number, or it was not validated."""
    results = [
        result(tmp_path, "1e-3", [5.0, 1.0], 85),
        result(tmp_path, "2e-3", [5.0, 3.0, 2.0], validated=False),
        result(tmp_path, "3e-3", [5.0, 4.0, 3.0]),
    ]
    assert [one.run.values[RATE] for one in ranked(results)] == ["3e-3", "2e-3", "1e-3"]


def test_the_speed_of_a_run_is_that_of_its_usual_step(tmp_path: Path) -> None:
    speeds = [10.0, 20.0, 21.0, 22.0, 500.0]
    rows = [row(n, 5.0) | {"tokens_per_second": speed} for n, speed in enumerate(speeds, 1)]
    path = write(tmp_path / "x", rows)
    assert Result.read(SweepRun(name="x", config="x", values={}), path.parent, None, "").tokens_per_second == 21.0


def test_runs_that_all_failed_have_no_best_value(tmp_path: Path) -> None:
    results = [result(tmp_path, value, [5.0 - number], 3) for number, value in enumerate(("1e-3", "2e-3"))]
    assert all(one.has_ended for one in results) and not edges(results, [RATE])


def test_in_a_narrow_terminal_every_run_can_be_told_from_the_others(tmp_path: Path) -> None:
    """The names of two keys differ in their middle, which is cut where there is no room for it."""
    keys = ["optimizer.learning_rate", "model.sequence_length"]
    results = []
    for number, (rate, length) in enumerate([("1e-3", "64"), ("1e-3", "128"), ("4e-3", "64"), ("4e-3", "128")]):
        one = result(tmp_path, str(number), [5.0 - number])
        name = f"switchall_tiny,learning_rate={rate},sequence_length={length}"
        run = SweepRun(name=name, config="switchall_tiny", values=dict(zip(keys, (rate, length), strict=True)))
        results.append(Result(run, one.view))
    ways = {width: table_text(results, keys, width=width).splitlines() for width in (200, 105, 90, 60, 40)}
    assert ways[200][0].split()[:3] == ["config", *keys]
    assert ways[105][0].split()[:3] == ["config", "learning_rate", "sequence_length"]
    assert [line.split()[:2] for line in ways[90][:2]] == [["learning_rate", "sequence_length"], ["4e-3", "128"]]
    assert ways[60][0].startswith("learning_rate...") and ways[60][1].startswith("4e-3, 128  ")
    for width, lines in ways.items():
        assert max(map(len, lines)) <= width and len({line for line in lines if line}) == len(list(filter(None, lines)))


def test_without_validations_the_training_loss_ranks(tmp_path: Path) -> None:
    results = [result(tmp_path, value, [x], validated=False) for value, x in (("1", 5.0), ("2", 4.0))]
    assert [found.run.values[RATE] for found in ranked(results)] == ["2", "1"]


def test_losses_that_are_not_finite_are_said_to_be_and_rank_last(tmp_path: Path) -> None:
    """A run writes them as null. `-` is for a loss that was not computed."""
    results = [result(tmp_path, "1", [math.nan]), result(tmp_path, "2", [4.0]), result(tmp_path, "3", [])]
    header, *rows = table(results, [RATE])
    assert [row[1] for row in rows] == ["2", "1", "3"] and header[4:6] == ["validation", "training"]
    assert [row[4:6] for row in rows] == [["4.1000", "4.0000"], ["not finite"] * 2, ["-"] * 2]
    assert [row["training_loss"] for row in csv.DictReader(io.StringIO(table_csv(results, [RATE])))] == ["4.0", "", ""]


def test_runs_that_were_validated_on_the_test_split_are_ranked_by_that(tmp_path: Path) -> None:
    """Not by their training losses, nor together with one that was validated on another split."""
    results = [
        result(tmp_path, "1", [1.0], validated=False),
        result(tmp_path, "2", [5.0], split="test"),
        result(tmp_path, "3", [4.0], split="test"),
        result(tmp_path, "4", [0.5]),
    ]
    assert loss_name(results) == "test"
    assert [found.run.values[RATE] for found in ranked(results)] == ["3", "2", "1", "4"]
    header, *rows = table(results, [RATE])
    assert header[4:7] == ["test", "validation", "training"]
    assert rows[0][4:7] == ["4.1000", "-", "4.0000"] and rows[3][4:7] == ["-", "0.6000", "0.5000"]
    assert next(csv.DictReader(io.StringIO(table_csv(results, [RATE]))))["test_loss"] == "4.1"
    assert len(losses_drawn(results, [RATE])) > 1000


def test_a_start_that_left_no_outcome_counts_until_the_run_goes_on_or_is_finished(tmp_path: Path) -> None:
    assert result(tmp_path, "1", [5.0], 85, unrecorded=2).state_text == "failed, code 2"
    assert result(tmp_path, "2", [5.0], 0, unrecorded=2).state_text == "finished"
    assert result(tmp_path, "3", [5.0], None, unrecorded=86).state_text == "stopped at step 1"


def test_the_csv_has_every_number_in_full_and_nothing_where_there_is_none(tmp_path: Path) -> None:
    results = [result(tmp_path, "[1,2]", [1 / 3], key="k"), result(tmp_path, "[2]", key="k")]
    first, second = csv.DictReader(io.StringIO(table_csv(results, ["k"])))
    assert (first["k"], float(first["training_loss"]), float(first["validation_loss"])) == ("[1,2]", 1 / 3, 1 / 3 + 0.1)
    assert (second["state"], second["training_loss"], second["tokens_per_second"]) == ("not begun", "", "")


@pytest.mark.parametrize(
    "losses, said",
    [
        ([3.0, 2.0, 1.0], [f"the best {RATE}, 4e-3, is the highest tried: try higher ones"]),
        ([1.0, 2.0, 3.0], [f"the best {RATE}, 1e-3, is the lowest tried: try lower ones"]),
        ([2.0, 1.0, 3.0], []),
    ],
)
def test_the_best_value_at_an_edge_of_what_was_tried_is_said(
    tmp_path: Path, losses: list[float], said: list[str]
) -> None:
    values = ("1e-3", "2e-3", "4e-3")
    assert edges([result(tmp_path, v, [x]) for v, x in zip(values, losses, strict=True)], [RATE]) == said


def test_nothing_lower_than_zero_is_proposed(tmp_path: Path) -> None:
    tried = [result(tmp_path, value, [loss]) for value, loss in (("0", 1.0), ("0.1", 2.0))]
    assert edges(tried, ["optimizer.learning_rate"]) == []
    assert len(edges([result(tmp_path, "0.2", [3.0]), tried[1]], [RATE])) == 1


def test_a_value_that_diverged_was_tried_and_one_that_is_still_to_come_ends_nothing(tmp_path: Path) -> None:
    two = [result(tmp_path, "1e-3", [3.0]), result(tmp_path, "2e-3", [2.0])]
    assert edges([*two, result(tmp_path, "4e-3", [9.0], 3)], [RATE]) == []
    assert edges([*two, result(tmp_path, "5e-4")], [RATE]) == []
    assert len(edges(two, [RATE])) == 1


def test_each_configuration_has_its_own_edges_and_seeds_have_none(tmp_path: Path) -> None:
    results = [
        result(tmp_path, value, [loss], config=config)
        for config, losses in (("x", (3.0, 2.0, 4.0)), ("y", (1.0, 2.0, 3.0)))
        for value, loss in zip(("1", "2", "10"), losses, strict=True)
    ]
    assert edges(results, [RATE]) == [f"y: the best {RATE}, 1, is the lowest tried: try lower ones"]
    seeds = [result(tmp_path, f"{seed}", [float(seed)], config="z", key="train.seed") for seed in (1, 2)]
    assert edges(seeds, ["train.seed"]) == []


def test_runs_that_differ_in_their_seeds_alone_have_a_mean_and_a_deviation(tmp_path: Path) -> None:
    def seeded(config: str, rate: str, seed: str, loss: float, code: int = 0) -> Result:
        found = result(tmp_path, f"{rate},{seed}", [loss], code, config=config)
        return replace(found, run=replace(found.run, values={RATE: rate, "train.seed": seed}))

    results = [
        seeded("x", "1e-3", "0", 3.0),
        seeded("x", "1e-3", "1", 4.0),
        seeded("x", "1e-3", "2", 8.0),
        seeded("x", "2e-3", "0", 1.0),
        seeded("x", "2e-3", "1", 2.0, 3),  # diverged: no loss to take a mean of
        seeded("y", "1e-3", "0", 2.0),
        seeded("y", "1e-3", "1", 2.0),
        seeded("y", "2e-3", "0", 2.0, 85),
    ]
    assert seeds_table(results, [RATE, "train.seed"]) == [
        ["config", RATE, "seeds", "mean validation", "deviation"],
        ["x", "2e-3", "1", "1.1000", "-"],
        ["y", "1e-3", "2", "2.1000", "0.0000"],
        ["x", "1e-3", "3", "5.1000", f"{math.sqrt(7):.4f}"],
    ]
    assert seeds_text(results, [RATE, "train.seed"]).splitlines()[3].split() == ["x", "1e-3", "3", "5.1000", "2.6458"]
    assert seeds_text(results[3:6], [RATE, "train.seed"]) == "" == seeds_text([result(tmp_path, "9")], [RATE])


def test_only_json_numbers_are_numbers() -> None:
    assert [number_of(value) for value in ("1e-3", "2", "true", '"3"', "dense", "[1]")] == [0.001, 2.0, *[None] * 4]
    assert number_of("[" * 100_000) is None, "too deep for Python's reader of JSON"


@pytest.mark.parametrize(
    "values", [("1e-3", "2e-3"), ("dense", "moa"), ("0", "-1"), (r"a$\frac$", "b$"), ("/long/path" * 40, "c")]
)
def test_losses_are_drawn_for_numbers_words_and_what_no_logarithm_has(tmp_path: Path, values: tuple[str, str]) -> None:
    results = [
        result(tmp_path, value, [3.0 + number], config=config)
        for config in ("x", "y")
        for number, value in enumerate(values)
    ]
    png = losses_drawn([*results, result(tmp_path, values[0], config="z")], [RATE])
    picture = matplotlib.image.imread(io.BytesIO(png))
    assert picture.shape[:2] == (500, 1300)  # one part for the rate, one for the configurations
    assert not math.isclose(float(picture.std()), 0.0)


def test_the_legend_says_which_of_two_weights_a_value_is_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels: set[str] = set()
    plot = Axes.plot

    def noted(axes: Axes, *given: Any, **options: Any) -> Any:
        labels.add(options.get("label", ""))
        return plot(axes, *given, **options)

    monkeypatch.setattr(Axes, "plot", noted)
    keys = ["data.sources.0.weight", "data.sources.1.weight"]
    results = []
    for first, second in (("1", "2"), ("2", "1")):
        found = result(tmp_path, f"{first},{second}", [3.0])
        run = SweepRun(name=found.run.name, config="x", values=dict(zip(keys, (first, second), strict=True)))
        results.append(Result.read(run, tmp_path, None, ""))
    losses_drawn(results, keys)
    for label in ("sources.0.weight=1", "sources.1.weight=2"):
        assert label in labels


def test_sections_that_begin_alike_are_told_apart_in_the_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has a line of its own, and below the axis what it holds."""
    found = note_axes(monkeypatch)
    key = "model.feedforward"
    sections = [f'{{"type": "dense", "hidden_size": {size}}}' for size in (64, 128)]
    mixtures = [f'[{{"manifest": "data/{"m" * 30}", "weight": {share}}}, "data/o"]' for share in (0.25, 0.75)]
    for values in (sections, mixtures):
        runs = [
            result(tmp_path, value, [loss + number - 0.1], config=f"{number}", key=key)
            for number in (0, 1)
            for value, loss in zip(values, (3, 5), strict=True)
        ]
        losses_drawn(runs, [key])
    drawn = [
        (
            [text.get_text() for text in axes.get_xticklabels()],
            [np.asarray(line.get_ydata()).tolist() for line in axes.lines if line.get_marker() == "o"],
        )
        for axes in found
    ]
    (sizes, _), (_, by_size), (shares, _), (_, by_share) = drawn
    assert sizes == ["dense 64", "dense 128"] and len(set(shares)) == 2, drawn
    assert np.allclose(sorted(by_size), [[3, 4], [5, 6]]) and np.allclose(sorted(by_share), [[3, 4], [5, 6]])


def test_a_run_that_blew_up_does_not_hide_how_the_others_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scales: list[str] = []
    monkeypatch.setattr(Axes, "set_yscale", lambda axes, scale: scales.append(scale))
    near = [result(tmp_path, value, [loss]) for value, loss in (("1e-3", 3.0), ("2e-3", 4.0))]
    losses_drawn([*near, result(tmp_path, "3e-3", [math.nan])], [RATE])
    assert scales == []
    losses_drawn([*near, result(tmp_path, "1", [3e6])], [RATE])
    assert scales == ["log"]


def test_the_legend_names_also_a_configuration_that_begins_with_an_underscore(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = note_axes(monkeypatch)
    values = ("1e-3", "2e-3")
    losses_drawn([result(tmp_path, value, [3.0], config=config) for config in ("_x", "y") for value in values], [RATE])
    assert len({axes.figure for axes in found}) == 1
    legend = found[0].get_legend()
    assert legend is not None and [text.get_text() for text in legend.get_texts()] == ["_x", "y"]


def test_every_line_with_a_name_in_the_legend_looks_different(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve configurations, where matplotlib has ten colours; also dots without lines, of the configurations."""
    found = note_axes(monkeypatch)
    configs = [f"config-{number:02}" for number in range(12)]
    rates = [f"{number}e-3" for number in range(1, 13)]
    losses_drawn([result(tmp_path, value, [3.0], config=config) for config in configs for value in rates], [RATE])
    looks = []
    for axes in found:
        legend = axes.get_legend()
        assert legend is not None
        lines = legend.get_lines()
        looks.append({(to_hex(line.get_color()), line.get_linestyle(), line.get_fillstyle()) for line in lines})
    assert [len(of_axes) for of_axes in looks] == [12, 12]


def test_seeds_are_names_and_no_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Side by side in rising order, and no line leads from one to the next, as if there were something between them."""
    found = note_axes(monkeypatch)
    key = "train.seed"
    losses_drawn([result(tmp_path, v, [5.0, 2.0 + n], key=key) for n, v in enumerate(["100", "9", "1"])], [key])
    (axes,) = found
    assert axes.get_xscale() == "linear" and axes.lines[0].get_linestyle() == "None"
    assert [text.get_text() for text in axes.get_xticklabels()] == ["1", "9", "100"]
    assert axes.get_xticks().tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize(
    "values, shown",
    [
        (["2.5e-4", "3e-4", "3.5e-4", "4e-4", "1e-3", "1e-1"], {"3e-4", "1e-3", "1e-1"}),
        (["0", "0.001", "0.002", "0.5"], {"0.001", "0.5"}),
        (["0", "1", "2", "3"], {"0", "1", "2", "3"}),
    ],
)
def test_values_close_together_are_not_written_over_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: list[str], shown: set[str]
) -> None:
    """The best, the lowest and the highest of them go first."""
    words = note_words(monkeypatch)
    losses_drawn([result(tmp_path, v, [5.0, 2.0 + abs(n - 1)]) for n, v in enumerate(values)], [RATE])
    assert shown <= {word for word, _ in words}
    for (one, box), (other, its) in itertools.combinations(words, 2):
        assert Bbox.intersection(box, its) is None, f"{one!r} lies over {other!r}"
