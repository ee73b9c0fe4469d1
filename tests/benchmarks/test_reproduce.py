"""benchmarks/reproduce: run folders beside the paper's tables, and the tables of docs/reproduce.md."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks.reproduce import hours, published, runs
from benchmarks.reproduce.__main__ import main
from benchmarks.reproduce.published import FOLDER, Row, config_of, evaluation, names, tables, tokens_wanted, training
from benchmarks.reproduce.runs import recognised, run_folders
from benchmarks.reproduce.table import HEAD, rows_of, state
from common.errors import UserError
from pretrain.config.loading import load_config, to_json
from pretrain.planning.fit import fit
from pretrain.planning.machine import MachineOptions, machine
from pretrain.planning.measured import measurements
from pretrain.views.reading import RunView
from tests.harness import run_ranks
from tests.pretrain.runs import small_config, train_runs

FINISHED, STOPPED = 0, 85


def write_run(
    folder: Path,
    name: str,
    *overrides: str,
    steps: int = 100_000,
    losses: dict[int, float] | None = None,
    exit_code: int = FINISHED,
    ranks: int = 1,
) -> Path:
    """A run folder as training of configs/paper/NAME.json leaves it after so many steps. `losses`: by step, of the
    split that the run validates."""
    config = load_config(FOLDER / f"{name}.json", overrides)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(to_json(config)))
    tokens = config.batch.global_sequences * config.model.sequence_length
    rows = [{"step": step, "loss": 3.0, "tokens": step * tokens} for step in (1, steps)]
    write_lines(folder / "metrics.jsonl", rows)
    events: list[dict[str, Any]] = [{"event": "started", "step": 0, "ranks": ranks, "last_step": config.train.steps}]
    split = config.evaluate.split
    events += [{"event": "validation", "step": s, "split": split, "loss": x} for s, x in (losses or {}).items()]
    write_lines(folder / "events.jsonl", events)
    (folder / "outcome.json").write_text(json.dumps({"exit_code": exit_code}))
    return folder


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def shown(capsys: pytest.CaptureFixture[str], *folders: Path) -> dict[str, list[dict[str, str]]]:
    """Every row that `table --markdown` prints, by its configuration."""
    assert main(["table", "--markdown", "--runs", *map(str, folders)]) == 0
    found: dict[str, list[dict[str, str]]] = {}
    for line in capsys.readouterr().out.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and cells[0] in names() and len(cells) == len(HEAD):
            found.setdefault(cells[0], []).append(dict(zip(HEAD, cells, strict=True)))
    return found


def test_every_configuration_is_trained_by_one_table_and_figures_are_those_of_the_files() -> None:
    rows = [row for table in tables() for row in table.rows]
    assert sorted(row.name for row in rows if row.trained_as is None) == list(names())
    for row in rows:
        if row.published is not None:
            sources = [row.name] if row.trained_as is None else names()
            assert any(row.published in config_of(name).description for name in sources), row
        if row.trained_as is None:
            assert row.split == config_of(row.name).evaluate.split
    again = {(row.name, row.published) for row in rows if row.trained_as is not None}
    assert {("wt103_switchhead_47m", "12.27"), ("wt103_dense_2heads_47m", "12.74")} < again and len(again) == 4
    assert tokens_wanted("c4_switchhead_47m") == 100_000 * 64 * 256


def test_a_command_makes_the_published_batch_one_micro_step_of_a_regularised_model() -> None:
    commands = {row.name: training(row) or "" for table in tables() for row in table.rows if row.trained_as is None}
    assert {name for name, text in commands.items() if text.endswith(" --set batch.micro_sequences=64")} == {
        *("c4_switchall_259m", "pes2o_switchall_259m", "wt103_switchall_259m"),
        *("c4_sigma_moe_262m", "pes2o_sigma_moe_262m", "wt103_sigma_moe_262m"),
    }


def test_a_figure_of_more_memory_than_in_training_waits_for_its_evaluation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, split = "wt103_sigma_moe_47m", "test"
    run = write_run(tmp_path / "a", name, losses={100_000: math.log(11.9)})
    (row,) = [row for table in tables() for row in table.rows if row.name == name]
    assert row.memory_chunks == 4 and evaluation(row) == (
        f"python launch/evaluate.py runs/paper/{name} --device cuda --set evaluate.streams=4 "
        "--set model.position.memory_chunks=4"
    )
    (run / "evaluation" / "step-00100000").mkdir(parents=True)
    result = {"split": split, "step": 100_000, "limit": None}
    for file, loss in (("test", 11.8), ("test-memory-2", 11.6), ("validation-memory-4", 11.5)):
        content = json.dumps({**result, "loss": math.log(loss)})
        (run / "evaluation" / "step-00100000" / f"{file}.json").write_text(content)
    (shown_row,) = shown(capsys, run)[name]
    assert shown_row["ours"] == "-" and shown_row["state"] == (
        "trained, not evaluated on test, 4 chunks of memory (python launch/evaluate.py)"
    )
    content = json.dumps({**result, "loss": math.log(11.7)})
    (run / "evaluation" / "step-00100000" / "test-memory-4.json").write_text(content)
    (shown_row,) = shown(capsys, run)[name]
    assert (shown_row["ours"], shown_row["state"]) == ("11.70", "finished")


def test_a_finished_run_stands_beside_the_published_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    losses = {99_000: math.log(30.0), 100_000: math.log(22.6)}
    run = write_run(tmp_path / "all" / "a", "c4_switchhead_47m", losses=losses)
    bits = write_run(tmp_path / "all" / "b", "enwik8_dense_41m", losses={100_000: 1.11 * math.log(2)})
    rows = shown(capsys, tmp_path / "all")
    (mine,) = rows["c4_switchhead_47m"]
    assert mine == {
        "row": "c4_switchhead_47m",
        "split": "validation",
        "published": "22.53",
        "ours": "22.60",
        "tokens": "1,638,400,000",
        "of": "1,638,400,000",
        "state": "finished",
        "run": str(run),
    }
    (mine,) = rows["enwik8_dense_41m"]
    assert (mine["ours"], mine["split"], mine["state"], mine["run"]) == ("1.110", "test", "finished", str(bits))


@pytest.mark.slow
def test_a_run_of_the_trainer_is_read(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the real trainer leaves, of a model that is small instead of published; also while it is half way."""
    config = small_config(prepared, "train.steps=4", "evaluate.every_steps=2")
    for module in (published, runs):
        monkeypatch.setattr(module, "config_of", lambda name: config)
    monkeypatch.setattr(runs, "names", lambda: ("small",))
    half = config.replaced("train", stop_after_steps=2)
    run_ranks(train_runs, 1, [(config, tmp_path / "all" / "whole"), (half, tmp_path / "all" / "half")])
    found, unknown = runs.found_runs([tmp_path / "all"])
    assert [run.view.path.name for run in found] == ["half", "whole"] and not unknown
    first, second = found
    row = Row("small", "20.00", "validation")
    assert (first.tokens, second.tokens) == (2 * 8 * 16, 4 * 8 * 16) and second.is_whole and not first.is_whole
    assert state(row, second) == "finished" and state(row, first) == "unfinished: ended after step 2, as it was told"
    events = [json.loads(line) for line in (second.view.path / "events.jsonl").read_text().splitlines()]
    last = [event for event in events if event["event"] == "validation"][-1]
    ((*_, ours, _, _, _, _),) = rows_of(row, [second])
    assert ours == f"{last['perplexity']:.2f}" and second.loss("test") is None


def test_unfinished_rows_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stopped = write_run(
        tmp_path / "a", "c4_dense_47m", steps=41_000, losses={40_000: math.log(26.0)}, exit_code=STOPPED
    )
    short = write_run(tmp_path / "b", "c4_dense_47m", "train.steps=500", steps=500, losses={500: 5.0})
    early = write_run(tmp_path / "c", "c4_dense_47m", steps=100, exit_code=STOPPED)
    first, second, third = shown(capsys, stopped, short, early)["c4_dense_47m"]
    assert first["state"] == "unfinished: stopped after step 41,000, ours is of step 40,000"
    assert first["ours"] == "26.00" and first["tokens"] == f"{41_000 * 64 * 256:,}"
    assert second["state"] == "unfinished: ended after step 500, as it was told; differs in train.steps"
    assert (third["ours"], third["state"]) == ("-", "unfinished: stopped after step 100")


def test_missing_rows_come_with_their_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "a", "c4_dense_47m", losses={100_000: 3.0})
    assert main(["table", "--runs", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "--config configs/paper/c4_dense_47m.json" not in printed
    assert "  deepspeed --num_gpus 1 launch/pretrain.py --config configs/paper/pes2o_dense_47m.json" in printed
    assert printed.count(" missing") == sum(len(table.rows) for table in tables()) - 1 + 6


def test_a_row_of_another_split_waits_for_its_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "a", "wt103_switchhead_47m", losses={100_000: math.log(12.4)})
    rows = shown(capsys, run)["wt103_switchhead_47m"]
    main_row, *others = rows
    assert (main_row["ours"], main_row["state"]) == ("12.40", "finished")
    assert [row["ours"] for row in others] == ["-", "-"]
    assert {row["state"] for row in others} == {"trained, not evaluated on validation (python launch/evaluate.py)"}
    result = {"split": "validation", "loss": math.log(12.3), "step": 100_000, "limit": None}
    (run / "evaluation" / "step-00100000").mkdir(parents=True)
    file = run / "evaluation" / "step-00100000" / "validation.json"
    for other in ({"limit": 8}, {"moving_average": True}):
        file.write_text(json.dumps({**result, **other}))
        assert [row["ours"] for row in shown(capsys, run)["wt103_switchhead_47m"]] == ["12.40", "-", "-"]
    file.write_text(json.dumps(result))
    assert [row["ours"] for row in shown(capsys, run)["wt103_switchhead_47m"]] == ["12.40", "12.30", "12.30"]


def test_a_newer_evaluation_of_another_split_is_none_of_the_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "a", "wt103_switchhead_47m", losses={99_000: math.log(12.4)})
    (run / "evaluation" / "step-00100000").mkdir(parents=True)
    result = {"split": "validation", "loss": math.log(12.3), "step": 100_000, "limit": None}
    (run / "evaluation" / "step-00100000" / "validation.json").write_text(json.dumps(result))
    assert [row["ours"] for row in shown(capsys, run)["wt103_switchhead_47m"]] == ["12.40", "12.30", "12.30"]


def test_the_newest_evaluation_of_a_split_counts_whatever_its_file_is_called(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Earlier versions wrote those of the test split to validation.json too."""
    run = write_run(tmp_path / "a", "wt103_switchhead_47m")
    folder = run / "evaluation" / "step-00100000"
    folder.mkdir(parents=True)

    def ours(name: str, perplexity: float, time: float) -> str:
        result = {"split": "test", "loss": math.log(perplexity), "step": 100_000, "limit": None, "time": time}
        (folder / f"{name}.json").write_text(json.dumps(result))
        return shown(capsys, run)["wt103_switchhead_47m"][0]["ours"]

    found = [ours("validation", 12.4, 1.0), ours("test", 12.5, 2.0), ours("test", 12.3, 3.0), ours("test", 12.5, 0.0)]
    assert found == ["12.40", "12.50", "12.30", "12.40"]


def test_zero_shot_tasks_are_read_from_a_run_and_from_evaluations(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "a", "c4_switchhead_262m", losses={100_000: 2.8})
    assert main(["table", "--runs", str(run)]) == 0
    assert "launch/evaluate.py runs/paper/c4_switchhead_262m --tasks lambada,blimp,cbt" in capsys.readouterr().out
    with open(run / "events.jsonl", "a") as file:
        event = {"event": "evaluation", "step": 100_000, "task": "lambada", "accuracy": 0.301}
        some = {"event": "evaluation", "step": 100_000, "task": "blimp", "accuracy": 0.9, "limit": 5}
        file.write(json.dumps(event) + "\n" + json.dumps(some) + "\n")
    folder = run / "evaluation" / "step-00090000"
    folder.mkdir(parents=True)
    for task in ("lambada", "blimp"):
        (folder / f"{task}.json").write_text(json.dumps({"step": 90_000, "accuracy": 0.5, "limit": None}))
    (folder / "cbt.json").write_text(json.dumps({"step": 90_000, "accuracy": 0.5, "limit": 3}))
    assert main(["table", "--markdown", "--runs", str(run)]) == 0
    printed = capsys.readouterr().out.partition("### Zero-shot, accuracy in percent")[2]
    assert f"| c4_switchhead_262m | lambada | 29.4 | 30.1 | finished | {run} |" in printed
    assert f"| c4_switchhead_262m | blimp | 79.6 | 50.0 | finished, ours is of step 90,000 | {run} |" in printed
    assert f"| c4_switchhead_262m | cbt | 83.3 | - | not evaluated | {run} |" in printed
    assert "| c4_dense_262m | cbt | 83.6 | - | missing |  |" in printed
    assert "runs/paper/c4_switchhead_262m" not in printed and "runs/paper/c4_dense_262m --tasks" in printed


@pytest.mark.parametrize("name", ["c4_dense_47m", "pes2o_dense_47m", "wt103_switchall_47m", "pes2o_switchhead_262m"])
def test_a_run_is_the_row_of_its_corpus(tmp_path: Path, name: str) -> None:
    """Also with data elsewhere, with another description, or with both if the folder's name is kept."""
    kept = f"/far/paper/{Path(str(config_of(name).data.manifest)).parent.name}"
    folders = [
        write_run(tmp_path / "plain", name),
        write_run(tmp_path / "moved", name, "data.manifest=/far/away/manifest.json", "train.seed=3"),
        write_run(tmp_path / "described", name, "description=mine"),
        write_run(tmp_path / "both", name, f"data.manifest={kept}", "description=mine"),
        write_run(tmp_path / "of another kind", name, f"data.manifest={kept.replace('/paper/', '/mine/')}"),
    ]
    assert [recognised(RunView.open(run)) for run in folders] == [name] * 5
    data = [any("data.manifest" in key for key in runs.PaperRun(name, RunView.open(f)).differences()) for f in folders]
    assert data == [False, True, False, False, True]


def test_every_published_model_is_recognised(tmp_path: Path) -> None:
    for name in names():
        view = RunView(tmp_path, config=to_json(config_of(name)))
        assert recognised(view) == name
        view.config["description"] = ""
        assert recognised(view) == name


def test_what_makes_a_result_another_one_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    far = ["data.manifest=/far/c4_32k", "train.seed=3", "optimizer.learning_rate=0.001", "evaluate.streams=2"]
    run = write_run(tmp_path / "a", "c4_dense_47m", *far, "batch.micro_sequences=4", losses={100_000: 3.0})
    all_ = write_run(tmp_path / "b", "c4_switchall_259m", losses={100_000: 3.0}, ranks=4)
    rows = shown(capsys, run, all_)
    expected = "optimizer.learning_rate, train.seed, evaluate.streams, data.manifest (/far/c4_32k)"
    assert rows["c4_dense_47m"][0]["state"] == f"finished; differs in {expected}"
    assert rows["c4_switchall_259m"][0]["state"] == "finished; differs in entropy over 32 of 64 sequences"


@pytest.mark.parametrize(
    "ranks, divided, differs",
    [
        (8, [], ""),
        (16, ["parallel.tensor=2"], ""),
        (8, ["parallel.tensor=2"], "; differs in entropy over 32 of 64 sequences"),
        (16, ["parallel.tensor=2", "parallel.pipeline=2"], "; differs in entropy over 32 of 64 sequences"),
    ],
)
def test_the_regulariser_sees_what_data_parallel_ranks_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], ranks: int, divided: list[str], differs: str
) -> None:
    run = write_run(tmp_path / "a", "c4_switchall_259m", *divided, losses={100_000: 3.0}, ranks=ranks)
    assert shown(capsys, run)["c4_switchall_259m"][0]["state"] == f"finished{differs}"


def test_runs_are_looked_for_where_the_commands_put_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["table"]) == 0
    assert " finished" not in capsys.readouterr().out
    write_run(tmp_path / "runs" / "paper" / "c4_dense_47m", "c4_dense_47m", losses={100_000: 3.0})
    assert main(["table"]) == 0
    assert capsys.readouterr().out.count(" finished ") == 1


def test_a_loss_that_is_no_number_is_no_perplexity() -> None:
    assert [runs.figure(loss, bits=bits) for loss in (math.nan, math.inf) for bits in (False, True)] == [
        "not finite"
    ] * 4


def test_run_folders_that_are_no_row_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "wide", "c4_dense_47m", "model.dropout=0.5")
    write_run(tmp_path / "which", "c4_dense_47m", "description=mine", "data.manifest=/far/away")
    both = "/".join(Path(str(config_of(f"{corpus}_dense_47m").data.manifest)).parent.name for corpus in ("c4", "pes2o"))
    write_run(tmp_path / "which too", "c4_dense_47m", "description=mine", f"data.manifest=/far/{both}")
    (write_run(tmp_path / "torn", "c4_dense_47m") / "config.json").write_text('{"model": {')
    assert main(["table", "--runs", str(tmp_path)]) == 0
    listed = capsys.readouterr().out.partition("Run folders that are in no table:\n")[2].splitlines()
    assert listed[0] == f"  {tmp_path / 'torn'}: its config.json has no model section, or cannot be read"
    assert "which: its model is that of c4_dense_47m, pes2o_dense_47m, wt103_dense_47m: neither" in listed[1]
    assert "which too: its model is that of c4_dense_47m, pes2o_dense_47m, wt103_dense_47m: neither" in listed[2]
    assert listed[3] == f"  {tmp_path / 'wide'}: its model section is that of no file in configs/paper"


def test_bad_input_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    for arguments, said in (
        (["table", "--runs", str(tmp_path / "gone")], f"--runs: there is no folder {tmp_path / 'gone'}"),
        (["table", "--runs", str(tmp_path / "empty")], "holds no run folder"),
        (["hours", "--gpu", "h20"], "--gpu: 'h20' is not in the table of devices"),
        (["hours", "--gpu", "cpu"], "--peak-tflops, which launch/plan.py fit takes"),
        (["hours", "--results", str(tmp_path / "gone")], "--results: there is no folder"),
    ):
        assert main(arguments) == 2
        errors = capsys.readouterr().err.strip().splitlines()
        assert errors[-1].startswith("error: ") and said in errors[-1]
    with pytest.raises(UserError, match="no part is marked"):
        hours.updated("# a page\n")


def test_a_run_inside_a_run_folder_is_not_another_one(tmp_path: Path) -> None:
    outer = write_run(tmp_path / "a", "c4_dense_47m")
    write_run(outer / "smoke-1", "c4_dense_47m")
    assert run_folders(tmp_path) == run_folders(outer) == [outer]


def test_the_page_is_what_the_command_writes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["hours", "--check"]) == 0, "python -m benchmarks.reproduce hours --write"
    assert main(["hours", "--gpu", "h200"]) == 0
    assert capsys.readouterr().out in hours.PAGE.read_text(encoding="utf-8")


def test_a_page_that_was_changed_by_hand_is_found_and_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, page = hours.PAGE.read_text(encoding="utf-8"), tmp_path / "page.md"
    page.write_text(right.replace("| 22.53 |", "| 22.54 |", 1), encoding="utf-8")
    monkeypatch.setattr(hours, "PAGE", page)
    assert main(["hours", "--check"]) == 1
    assert main(["hours", "--write"]) == 0
    assert page.read_text(encoding="utf-8") == right


def test_without_records_the_hours_rest_on_assumptions(tmp_path: Path) -> None:
    text = hours.block("h100-80gb", tmp_path)
    assert "measured" not in text and "NVIDIA H100" in text and "assumed" in text


@pytest.mark.slow
def test_hours_are_those_of_plan_fit() -> None:
    """fit traces and rehearses a step, for its memory; the time is the same."""
    on = machine(MachineOptions(gpu="h200", gpus=1))
    for name in ("c4_switchhead_262m", "wt103_dense_47m"):
        report = fit(hours.planned(name), on)
        assert report.time is not None
        found = hours.estimate(name, on, measurements(on.device))
        assert [found.fast, found.slow] == [100_000 * terms.total / 3600 for terms in report.time]
