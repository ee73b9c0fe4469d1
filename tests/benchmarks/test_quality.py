"""The order of the runs, what is kept of them, and that the models have equally many parameters."""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Sequence
from pathlib import Path

import matplotlib.image
import pytest

from benchmarks.quality import __main__ as command
from benchmarks.quality.plan import (
    CONFIGS,
    HIGHEST,
    LOWEST,
    RATES,
    SEEDS,
    STEPS,
    TUNED_STEPS,
    Training,
    chosen_rate,
    missing,
    rates,
    tuning,
)
from benchmarks.quality.records import RESULTS, SHIPPED, Record, digest_of, keep, read_records, record_of
from benchmarks.quality.table import page, picture, short_table, table
from common.errors import DataError
from common.paths import REPOSITORY
from model.costs import formula_parameters, training_flops_per_token
from pretrain.config.loading import load_config
from tests.harness import run_ranks
from tests.pretrain.runs import small_config, train_runs


def record(training: Training, loss: float, *, diverged: bool = False) -> Record:
    points = training.steps // 10
    return Record(
        *(training.name, training.model, training.rate, training.seed, training.steps, diverged, 8192, 2e7),
        losses=[loss] * points,
        validations=[(training.steps // 2, loss + 1), (training.steps, loss)],
        seconds=[60.0 * number for number in range(points)],
        origin={"torch": "2"},
    )


def test_models_have_equally_many_parameters_and_differ_in_the_layers_alone() -> None:
    configs = {model: load_config(CONFIGS / f"{model}.json") for model in SEEDS}
    assert {path.stem for path in CONFIGS.glob("*.json")} == set(SEEDS)
    totals = {model: formula_parameters(config.model).total for model, config in configs.items()}
    assert 3e6 < totals["dense"] < 6e6
    assert all(abs(total / totals["dense"] - 1) < 0.002 for total in totals.values()), totals
    different = {"attention", "feedforward"}
    same = [config.model.model_dump(exclude=different) for config in configs.values()]
    same_runs = [config.model_dump(exclude={"model", "description"}) for config in configs.values()]
    assert all(tree == same[0] for tree in same) and all(tree == same_runs[0] for tree in same_runs)
    batch = configs["dense"].batch.global_sequences * configs["dense"].model.sequence_length
    assert batch * TUNED_STEPS >= 2e6 and batch * STEPS >= 8e6


def test_a_run_has_its_rate_seed_and_length() -> None:
    training = Training("moa", 0.00025, 2, STEPS)
    config = load_config(training.config, training.overrides)
    assert (config.optimizer.learning_rate, config.train.seed) == (0.00025, 2)
    assert (config.train.steps, config.schedule.warmup_steps) == (1000, 100)
    assert config.model == load_config(CONFIGS / "moa.json").model and training.name == "moa-1000-0.00025-2"


def trained_until_nothing_is_missing(best: dict[str, float]) -> list[Training]:
    """All runs in their order, if the loss of each is the distance of its rate from the best one of its model."""
    losses: dict[str, float] = {}
    order = []
    while (training := next(missing(losses), None)) is not None:
        order.append(training)
        losses[training.name] = abs(math.log(training.rate / best[training.model]))
    return order


def test_rates_are_chosen_first_and_the_lowest_loss_wins() -> None:
    best = dict.fromkeys(SEEDS, RATES[1])
    order = trained_until_nothing_is_missing(best)
    assert [(run.model, run.rate) for run in order[:15]] == [(model, rate) for model in SEEDS for rate in RATES]
    assert all(run.steps == TUNED_STEPS for run in order[:15]) and all(run.steps == STEPS for run in order[15:])
    assert [training.seed for training in order[15:]] == sorted(training.seed for training in order[15:])
    for model, seeds in SEEDS.items():
        of_model = [training for training in order[15:] if training.model == model]
        assert [training.seed for training in of_model] == list(range(seeds))
        assert {training.rate for training in of_model} == {best[model]}


def test_rates_beyond_the_best_are_tried_until_one_is_worse() -> None:
    """The best rate is never the highest or the lowest of those that were tried, but at the bounds."""
    best = {"dense": 0.008, "dense_2heads": 0.016, "moa": 0.032, "switchhead": 0.0005, "switchall": 1.0}
    order = trained_until_nothing_is_missing(best)
    tried = {
        model: sorted(run.rate for run in order if run.model == model and run.steps == TUNED_STEPS) for model in SEEDS
    }
    assert tried["dense"] == list(RATES) and tried["dense_2heads"] == [*RATES, 0.032]
    assert tried["moa"] == tried["switchall"] == [*RATES, 0.032, HIGHEST]
    assert tried["switchhead"] == [LOWEST, 0.0005, 0.001, 0.002, *RATES]
    assert {(run.model, run.rate) for run in order if run.steps == STEPS} == {*best.items()} - {("switchall", 1.0)} | {
        ("switchall", HIGHEST)
    }


def test_a_run_that_diverged_is_not_chosen() -> None:
    names = [Training("dense", rate, 0, TUNED_STEPS).name for rate in (*RATES, 0.032)]
    assert chosen_rate("dense", {names[0]: 4.0, names[1]: 3.0, names[2]: math.nan}) == RATES[1]
    assert chosen_rate("dense", {names[0]: 4.0, names[1]: 3.5, names[2]: 3.0, names[3]: math.nan}) == RATES[2]
    assert chosen_rate("dense", dict.fromkeys(names, math.nan)) is None
    assert chosen_rate("dense", {names[0]: 3.0, names[1]: 2.0}) is None, "one has not been trained"
    assert rates("dense", {names[0]: 3.0, names[1]: 2.0}) == list(RATES)


def test_a_run_that_diverged_is_read_again(tmp_path: Path) -> None:
    """Its last losses are no numbers; that ended the comparison after hours."""
    keep(record(Training("dense", RATES[0], 0, TUNED_STEPS), math.nan, diverged=True), tmp_path)
    (found,) = read_records(tmp_path)
    assert math.isnan(found.last_loss) and found.diverged and math.isnan(found.losses[-1])


def test_records_become_a_table_and_a_picture(tmp_path: Path) -> None:
    for training in tuning({}):
        keep(record(training, 4.0 + abs(training.rate - RATES[1])), tmp_path / "results")
    for seed, loss in enumerate((3.0, 3.2)):
        keep(record(Training("moa", RATES[1], seed, STEPS), loss), tmp_path / "results")
    keep(record(Training("moa", RATES[0], 0, STEPS), 1.0), tmp_path / "results")  # not the chosen rate
    records = read_records(tmp_path / "results")
    assert len(records) == 18
    lines = table(records).splitlines()
    assert len({line.count("|") for line in lines}) == 1 and "*" not in table(records)
    mean = (math.exp(3.0) + math.exp(3.2)) / 2
    (row,) = [line for line in lines if line.startswith("| MoA")]
    assert f"| 2 of 2 | {mean:.2f} | {math.exp(3.0):.2f} to {math.exp(3.2):.2f} | 99 |" in row
    picture(records, tmp_path / "quality.png")
    assert matplotlib.image.imread(tmp_path / "quality.png").std() > 0.01
    (tmp_path / "results" / "other.json").write_text("{}")
    with pytest.raises(command.UserError, match=r"other.json is no record of a run"):
        read_records(tmp_path / "results")


def test_the_table_says_of_a_rate_that_others_were_better_or_were_not_tried() -> None:
    short = [record(training, 5.0 - 25 * training.rate) for training in tuning({})]
    long = [record(Training(model, RATES[2], 0, STEPS), 3.0) for model in ("dense", "moa")]
    moa = [record(Training("moa", rate, 0, TUNED_STEPS), loss) for rate, loss in ((0.032, 4.25), (0.064, 4.5))]
    lines = table([*short, *long, *moa]).splitlines()
    assert [line.split("|")[5].strip() for line in lines if line.startswith(("| dense, 8", "| MoA"))] == [
        r"0.016\*",
        r"0.016\*",
    ]
    assert lines[-2:] == [
        "",
        r"\* dense, 8 heads: 0.032 not tried. MoA, 4 of 8: in short runs 0.032 was better by 0.35 nats.",
    ]


def test_the_short_runs_have_a_table_of_their_losses() -> None:
    records = [record(Training("moa", rate, 0, TUNED_STEPS), loss) for rate, loss in ((0.016, 4.25), (0.001, 4.125))]
    failed = record(Training("dense", 0.016, 0, TUNED_STEPS), 4.0, diverged=True)
    other_seed = record(Training("moa", 0.064, 1, TUNED_STEPS), 1.0)
    assert short_table([*records, failed, other_seed]).splitlines() == [
        "| model | 0.001 | 0.016 |",
        "|---|---|---|",
        "| dense, 8 heads |  | failed |",
        "| MoA, 4 of 8 | **4.125** | 4.250 |",
    ]


def test_runs_of_another_text_are_not_gone_on_with(prepared: Path, tmp_path: Path) -> None:
    training = next(tuning({}))
    keep(record(training, 3.0)._replace(origin={"data": "0123456789ab"}), tmp_path)
    with pytest.raises(DataError, match=r"--data: .* saw 0123456789ab; name a new folder with --results"):
        command.run(prepared, tmp_path / "runs", tmp_path, 1, 1, [])
    keep(record(training, 3.0)._replace(origin={"data": digest_of(prepared)}), tmp_path)
    assert command.run(prepared, tmp_path / "runs", tmp_path, 0, 1, []) == 0


def test_what_is_kept_of_a_run(prepared: Path, tmp_path: Path) -> None:
    config = small_config(prepared, "train.steps=20", "evaluate.every_steps=10")
    run_ranks(train_runs, 1, [(config, tmp_path / "run")])
    found = record_of(Training("dense", 0.004, 0, 20), tmp_path / "run", prepared, diverged=False)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert found.losses == [round(sum(row["loss"] for row in rows[at : at + 10]) / 10, 4) for at in (0, 10)]
    assert [step for step, _ in found.validations] == [10, 20] and found.steps == 20
    assert found.tokens_per_step == 8 * 16 and found.last_loss == found.validations[-1][1]
    assert found.seconds[1] == pytest.approx(sum(row["step_seconds"] for row in rows), abs=0.1)
    assert found.flops_per_token == pytest.approx(training_flops_per_token(config.model), rel=1e-3)
    assert set(found.origin) >= {"torch", "processor", "began", "data"}
    keep(found, tmp_path / "results")
    assert read_records(tmp_path / "results") == [found]
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    with pytest.raises(DataError, match=r"^--runs: .* has no metrics; remove it and start again"):
        record_of(Training("dense", 0.004, 0, 20), tmp_path / "run", prepared, diverged=False)


def test_the_command_trains_what_is_missing_and_stops_where_a_run_stops(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    codes, trained = [0, 3, 85], []

    def train(
        training: Training, data: Path, runs: Path, settings: Sequence[str], log: Path | None
    ) -> tuple[int, Path]:
        trained.append(training)
        return codes[len(trained) - 1], runs / training.name

    def read(training: Training, folder: Path, data: Path, *, diverged: bool) -> Record:
        return record(training, 3.0, diverged=diverged)

    monkeypatch.setattr(command, "train", train)
    monkeypatch.setattr(command, "record_of", read)
    line = ["quality", "run", "--data", str(prepared), "--runs", str(tmp_path), "--results", str(tmp_path / "results")]
    monkeypatch.setattr("sys.argv", line)
    assert command.main() == 85
    assert trained == list(tuning({}))[:3] and "the same command goes on" in capsys.readouterr().err
    kept = {each.name: each.diverged for each in read_records(tmp_path / "results")}
    assert kept == {trained[0].name: False, trained[1].name: True}
    monkeypatch.setattr("sys.argv", ["quality", "run"])
    assert command.main() == 2 and "error: --data: name the manifest.json" in capsys.readouterr().err


def test_several_jobs_train_each_run_once_and_tuning_comes_before_what_it_decides(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    at_once: list[int] = []
    trained: list[Training] = []
    running, most = set(), threading.Barrier(4, timeout=30)

    def train(
        training: Training, data: Path, runs: Path, settings: Sequence[str], log: Path | None
    ) -> tuple[int, Path]:
        assert settings == ["train.device=cuda"] and log == runs / f"{training.name}.log"
        running.add(training)
        trained.append(training)
        if training in first:  # four of them wait for each other
            most.wait()
        at_once.append(len(running))
        running.discard(training)
        return 0, runs / training.name

    def read(training: Training, folder: Path, data: Path, *, diverged: bool) -> Record:
        return record(training, abs(math.log(training.rate / RATES[1])), diverged=diverged)

    first = list(tuning({}))[:4]
    monkeypatch.setattr(command, "train", train)
    monkeypatch.setattr(command, "record_of", read)
    assert command.run(prepared, tmp_path, tmp_path / "results", 100, 4, ["train.device=cuda"]) == 0
    assert max(at_once) == 4 and len(trained) == len(set(trained)) == 3 * len(SEEDS) + sum(SEEDS.values())
    # In the order in which they were given out: that in which threads begin is the system's.
    begun = re.findall(r"(?m)^== (\S+),", capsys.readouterr().out)
    assert set(begun[:15]) == {training.name for training in tuning({})} and len(begun) == len(trained)
    assert all(training.rate == RATES[1] for training in set(trained) - set(tuning({})))


def test_a_users_own_results_get_a_picture_beside_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    keep(record(Training("moa", RATES[1], 0, STEPS), 3.0), tmp_path)
    monkeypatch.setattr("sys.argv", ["quality", "table", "--results", str(tmp_path)])
    ours = SHIPPED[RESULTS].picture
    before = ours.stat().st_mtime_ns
    assert command.main() == 0 and "| MoA, 4 of 8 |" in capsys.readouterr().out
    assert (tmp_path / "quality.png").is_file() and ours.stat().st_mtime_ns == before
    monkeypatch.setattr("sys.argv", ["quality", "table", "--results", str(tmp_path / "gone")])
    assert command.main() == 2 and "error: --results: there is no folder" in capsys.readouterr().err
    assert not (tmp_path / "gone").exists()


def test_a_page_or_a_picture_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    keep(record(Training("moa", RATES[1], 0, STEPS), 3.0), tmp_path)
    for name, content in (("bare.md", b"no marks"), ("latin.md", "\xe9".encode("latin-1"))):
        (tmp_path / name).write_bytes(content)
    line = ["quality", "table", "--results", str(tmp_path)]
    for option, name, words in (
        ("--page", "gone.md", "No such file or directory"),
        ("--page", "bare.md", "the page lacks <!-- benchmarks.quality: begin -->"),
        ("--page", "latin.md", "can't decode byte"),
        ("--picture", "bare.md/picture.png", "bare.md"),
    ):
        monkeypatch.setattr("sys.argv", [*line, option, str(tmp_path / name)])
        assert command.main() == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and words in said and said.count("\n") == 1, name
        assert option == "--picture" or f"--page: {tmp_path / name}" in said
    assert (tmp_path / "bare.md").read_bytes() == b"no marks"


def test_the_page_has_the_table_of_the_records() -> None:
    text = (REPOSITORY / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    for folder, shown in SHIPPED.items():
        again = f"python -m benchmarks.quality table --results {folder} --page docs/benchmarks.md"
        assert page(text, read_records(folder), shown.mark) == text, again
        assert shown.picture.is_file() and f"(pictures/{shown.picture.name})" in text
    with pytest.raises(ValueError, match=r"lacks <!-- benchmarks.quality: begin -->"):
        page("no marks", [], SHIPPED[RESULTS].mark)
