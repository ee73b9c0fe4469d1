"""launch/sweep.py: what is refused before the first run, and what happens to each, with a program that takes the place
of a training; and one real sweep."""

from __future__ import annotations

import csv
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from common.run_lock import FolderLock
from launch.sweeps import check
from launch.sweeps.command import main
from model.costs import formula_parameters
from pretrain.config.loading import load_config
from pretrain.report.disk_space import checkpoint_space
from pretrain.views.reading import State
from pretrain.views.sweep import Result
from tests.launch.launcher import ROOT, environment
from tests.launch.sweep_case import RATE, VARY, Case


def test_all_that_is_wrong_with_any_run_is_said_before_the_first_starts(
    case: Case, capsys: pytest.CaptureFixture[str]
) -> None:
    assert case.run("--vary", f"{RATE}=1e-3,-1", "--vary", "batch.global_sequences=8,9", "--set", "train.stepz=3") == 2
    said = capsys.readouterr().err.splitlines()
    assert all(line.startswith("error: ") for line in said)
    (steps,) = [line for line in said if "train.stepz: unknown key" in line]
    assert steps.endswith("(in every run)")
    (rate,) = [line for line in said if f"{RATE}: " in line]
    assert rate.endswith("(in x,learning_rate=-1,global_sequences=8 and 1 other)")
    (batch,) = [line for line in said if "batch.global_sequences: 9" in line]
    assert batch.endswith("(in x,learning_rate=1e-3,global_sequences=9)")
    assert case.run("--vary", f"{RATE}=1e-3", "--set", f"data.manifest={case.folder / 'gone'}") == 2
    (data,) = capsys.readouterr().err.splitlines()
    assert data.startswith("error: data.manifest: ") and data.endswith("(in x,learning_rate=1e-3)")
    assert not case.dir.exists() and not case.trained


def test_a_dry_run_prints_every_command_and_writes_nothing(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(case.line(*VARY, "--set", "train.seed=3", "--dry-run")) == 0
    printed = capsys.readouterr().out
    first, second = [shlex.split(line) for line in printed.splitlines() if "pretrain.py" in line]
    assert first[1] == str(ROOT / "launch" / "pretrain.py") and second[-1] == f"{RATE}=2e-3"
    folder = case.dir / "x,learning_rate=1e-3"
    settings = ["--set", "train.seed=3", "--set", f"{RATE}=1e-3"]
    assert first[2:] == ["--config", str(case.config), "--run-dir", str(folder), *settings]
    assert not case.dir.exists()


def test_a_dry_run_of_a_sweep_that_has_begun_prints_its_own_copy(
    case: Case, capsys: pytest.CaptureFixture[str]
) -> None:
    assert case.run("--vary", f"{RATE}=1e-3") == 0
    capsys.readouterr()
    assert main(case.line(*VARY, "--dry-run")) == 0
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines() if "pretrain.py" in line]
    assert [line[3] for line in lines] == [str(case.dir / "configs" / "x.json")] * 2
    assert not (case.dir / "x,learning_rate=2e-3").exists()


def test_runs_are_checked_for_the_ranks_that_train_them(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    """Those that --ranks says of the launcher, or the fewest that the layout allows; without a launcher one."""
    divided = ("--set", "parallel.pipeline=2", "--dry-run")
    assert case.run(*VARY, "--ranks", "3", "--dry-run") == 2
    assert "batch.global_sequences: 8 is not divisible by" in capsys.readouterr().err
    assert case.run(*VARY, *divided) == 0 == case.run(*VARY, *divided, "--ranks", "2")
    assert main(case.line(*VARY, *divided)) == 2
    assert "parallel: 1 rank cannot be divided into groups of tensor x pipeline = 2" in capsys.readouterr().err


def test_the_weight_of_a_source_is_varied_as_a_key_of_its_entry(
    case: Case, prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = f'data.sources=[{{"manifest": "{prepared}", "weight": 1}}]'
    key = "data.sources.0.weight"
    assert main(case.line("--set", sources, "--vary", f"{key}=0.5,2", "--dry-run")) == 0
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines() if "pretrain.py" in line]
    assert [line[-4:] for line in lines] == [["--set", sources, "--set", f"{key}={weight}"] for weight in ("0.5", "2")]
    assert [Path(line[line.index("--run-dir") + 1]).name for line in lines] == [
        "x,sources.0.weight=0.5",
        "x,sources.0.weight=2",
    ]
    assert main(case.line("--set", sources, "--vary", f"{key}=0.5,-1", "--vary", "data.sources.1.weight=1")) == 2
    said = capsys.readouterr().err
    assert "data.sources is a list without entry 1; its entries are 0 to 0" in said


def test_a_disk_without_room_for_the_checkpoints_of_all_runs_is_said_before_the_first_starts(
    case: Case, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each run checks the disk for its own alone."""
    needed = 2 * checkpoint_space(load_config(case.config), case.dir).wanted
    said = f"no room for the checkpoints of all runs: {needed:,} bytes are needed, {needed - 1:,} are free"
    for free, words in ((needed, ""), (needed - 1, f"warning: the disk of {case.dir} has {said}")):
        monkeypatch.setattr(check, "free_bytes", lambda _, free=free: free)
        assert main(case.line(*VARY, "--dry-run")) == 0
        assert capsys.readouterr().err.partition(";")[0] == words


def test_a_sweep_trains_ranks_and_draws_its_runs(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    assert case.run("--vary", f"{RATE}=2e-3,1e-3") == 0
    printed = capsys.readouterr().out
    assert case.trained == ["2e-3", "1e-3"]
    assert "run 2 of 2  x,learning_rate=1e-3" in printed
    assert f"note: the best {RATE}, 1e-3, is the lowest tried: try lower ones" in printed
    with (case.dir / "sweep.csv").open() as file:
        assert [(line[RATE], line["validation_loss"]) for line in csv.DictReader(file)] == [
            ("1e-3", "0.001"),
            ("2e-3", "0.002"),
        ]
    assert (case.dir / "x,learning_rate=2e-3.log").read_text() == "trains 2e-3\n"
    assert all((case.dir / name).read_bytes().startswith(b"\x89PNG") for name in ("losses.png", "curves.png"))


def test_widths_are_solved_for_so_that_all_runs_have_as_many_parameters(
    case: Case, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the solved width, which the user did not choose, has no better side."""
    width, vary = "model.feedforward.expert_size", ("--vary", "model.feedforward.num_experts=2,8", *VARY)
    assert case.run(*vary, "--equal-parameters", "model.feedforward.hidden_size") == 2
    assert "type sigma_moe has no hidden_size; solve for head_dim or expert_size" in capsys.readouterr().err
    assert case.run(*vary, "--equal-parameters", width) == 0
    printed = capsys.readouterr().out
    calls = [json.loads(line) for line in (case.folder / "calls").read_text().splitlines()]
    sizes = [
        formula_parameters(load_config(case.config, [a for a in call if a.startswith(("model.", "optim"))]).model).total
        for call in calls
    ]
    like = load_config(case.config).model
    one = like.d_model * 2 * 8  # of 8 experts, one more column and row
    assert len(sizes) == 4 and all(
        abs(size - formula_parameters(like).total) <= one / 2 + 8 * like.d_model for size in sizes
    )
    assert f"note: the best {RATE}, 1e-3, is the lowest" in printed and f"best {width}" not in printed
    record = json.loads((case.dir / "sweep.json").read_bytes())
    assert record["solved"] == width and len({run["values"][width] for run in record["runs"]}) == 2
    for line, words in (
        (
            (*vary, "--equal-parameters", width, "--set", f"{width}=3"),
            f"--equal-parameters: {width} stands in --vary or",
        ),
        (vary, f"is a sweep of model.feedforward.num_experts and {RATE} and {width} (solved for"),
        ((*vary, "--vary", f"{width}=3"), f"is a sweep with {width} solved for, and this command solves for none"),
    ):
        assert case.run(*line) == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("key", ["num_experts", "expert_size"])
def test_runs_that_are_added_have_as_many_parameters_as_those_before(
    case: Case, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    """The file's own values of what is varied and solved for say how many; no run has them."""
    width, vary = "model.feedforward.expert_size", "model.feedforward.num_experts=2,8"
    line = ("--equal-parameters", width, "--vary", vary, "--vary", f"{RATE}=1e-3")
    assert case.run(*line) == 0
    tree = json.loads(case.config.read_text())
    tree["model"]["feedforward"][key] = 4 * getattr(load_config(case.config).model.feedforward, key)
    case.config.write_text(json.dumps(tree))
    capsys.readouterr()
    assert case.run(*line) == 2
    assert capsys.readouterr().err.startswith(f"error: model.feedforward.{key}: is ")


def test_a_run_without_validation_ends_without_a_validation_loss(
    case: Case, capsys: pytest.CaptureFixture[str]
) -> None:
    assert case.run("--vary", f"{RATE}=2e-3", "--set", "evaluate.sequences=0") == 0
    assert case.run("--vary", f"{RATE}=2e-3", "--set", "evaluate.sequences=0") == 0
    printed = capsys.readouterr().out
    assert "\n  finished\n" in printed and "nan" not in printed


def test_the_same_command_skips_what_finished_or_diverged_and_tries_again_what_failed(
    case: Case, capsys: pytest.CaptureFixture[str]
) -> None:
    rates = ("--vary", f"{RATE}=1e-3,2e-3,3e-3,4e-3,5e-3")
    ends: dict[str, int | str] = {"2e_3": 1, "3e_3": 2, "4e_3": 3, "5e_3": "is killed"}
    case.ends(**ends)
    assert case.run(*rates) == 1
    said = capsys.readouterr()
    for words in ("failed, code 1\n", "failed, code 2\n", "diverged at step 2\n", "failed, code 137\n"):
        assert words in said.out
    assert "x,learning_rate=3e-3.log says more" in said.err
    case.ends()
    assert case.run(*rates) == 1, "the one that diverged stays so"
    assert case.trained == ["1e-3", "2e-3", "3e-3", "4e-3", "5e-3", "2e-3", "3e-3", "5e-3"]
    assert "failed" not in capsys.readouterr().out.partition("tokens/s")[2]
    assert (case.dir / "x,learning_rate=2e-3.log").read_text() == 2 * "trains 2e-3\n", "why the first failed stays"


@pytest.mark.usefixtures("no_pictures")
def test_a_run_that_another_process_trains_is_passed_over_and_the_sweep_is_not_done(
    case: Case, capsys: pytest.CaptureFixture[str]
) -> None:
    case.ends(**{"1e_3": 1})
    assert case.run("--vary", f"{RATE}=1e-3") == 1
    lock = FolderLock(case.dir / "x,learning_rate=1e-3")
    try:
        case.ends()
        assert case.run(*VARY) == 1
        assert "  passed over: another process trains it" in capsys.readouterr().out
    finally:
        lock.release()
    assert case.trained == ["1e-3", "2e-3"]
    assert case.run(*VARY) == 0
    assert case.trained == ["1e-3", "2e-3", "1e-3"]


@pytest.mark.usefixtures("no_pictures")
def test_new_values_and_configurations_are_added_and_known_ones_stay_however_they_are_written(
    case: Case, capsys: pytest.CaptureFixture[str]
) -> None:
    assert case.run("--vary", f"{RATE}=1e-3") == 0
    other = case.folder / "y.json"
    other.write_text(case.config.read_text())
    assert case.run("--config", str(other), "--vary", f"{RATE}=0.001,2e-3") == 0
    assert sorted(path.name for path in case.dir.glob("*.log")) == [
        "x,learning_rate=1e-3.log",
        "x,learning_rate=2e-3.log",
        "y,learning_rate=0.001.log",
        "y,learning_rate=2e-3.log",
    ]
    capsys.readouterr()
    assert main(["--sweep-dir", str(case.dir), "--table"]) == 0
    assert capsys.readouterr().out.count(" finished ") == 4
    assert len(case.trained) == 4


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    "changes, words",
    [
        (("--set", "train.steps=7"), "train.steps: is 30 in the runs of"),
        (("--vary", "train.seed=1,2"), "varies optimizer.learning_rate and train.seed"),
    ],
)
def test_another_command_in_the_same_folder_is_refused_with_the_key(
    case: Case, changes: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert case.run(*VARY) == 0
    assert case.run(*VARY, *changes) == 2
    assert words in capsys.readouterr().err
    assert len(case.trained) == 2


@pytest.mark.usefixtures("no_pictures")
def test_an_edited_configuration_is_refused_with_the_key(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    assert case.run(*VARY) == 0
    tree: dict[str, Any] = json.loads(case.config.read_text())
    tree["optimizer"]["learning_rate"] = 5e-3  # which every run is given anew
    case.config.write_text(json.dumps(tree))
    assert case.run(*VARY) == 0
    tree["optimizer"]["clip_norm"] = 1.0
    case.config.write_text(json.dumps(tree))
    assert case.run(*VARY) == 2
    assert "optimizer.clip_norm: is 0.5 in the runs of" in capsys.readouterr().err
    assert case.run(*VARY, "--set", "optimizer.clip_norm=0.5") == 0, "the same runs, said in another way"


@pytest.mark.usefixtures("no_pictures")
def test_the_value_that_a_configuration_has_of_a_varied_key_may_be_edited(case: Case) -> None:
    """A user puts the best rate into the file, and tries more of them: no run has the file's rate."""
    assert case.run(*VARY) == 0
    tree: dict[str, Any] = json.loads(case.config.read_text())
    tree["optimizer"]["learning_rate"] = 2e-3
    case.config.write_text(json.dumps(tree))
    assert case.run("--vary", f"{RATE}=2e-3,3e-3") == 0
    assert case.trained == ["1e-3", "2e-3", "3e-3"]


@pytest.mark.usefixtures("no_pictures")
def test_a_run_that_somebody_else_put_there_is_no_result_of_the_sweep(
    case: Case, capsys: pytest.CaptureFixture[str]
) -> None:
    assert case.run("--vary", f"{RATE}=1e-3") == 0
    foreign = case.dir / "x,learning_rate=2e-3"
    shutil.copytree(case.dir / "x,learning_rate=1e-3", foreign)
    assert case.run(*VARY) == 2
    assert f"error: --sweep-dir: {foreign} holds a run that is not of this sweep" in capsys.readouterr().err
    assert case.trained == ["1e-3"] and (foreign / "metrics.jsonl").exists()


def test_a_run_that_goes_on_elsewhere_is_passed_over_and_not_all_have_finished(
    case: Case, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Result, "state", State.RUNNING)
    assert case.run("--vary", f"{RATE}=1e-3") == 1
    assert "passed over: another process trains it" in capsys.readouterr().out
    assert not case.trained


@pytest.mark.slow  # the fast one: test_a_reader_that_stops_reading_is_no_error in test_plan.py
def test_a_reader_that_leaves_at_once_ends_no_sweep(case: Case) -> None:
    command = [sys.executable, str(ROOT / "launch" / "sweep.py"), *case.line("--launcher", case.launcher, *VARY)]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
        process.wait()
    assert process.returncode == 0 and case.trained == ["1e-3", "2e-3"]


WRONG = (
    "--sweep-dir: {dir} holds no sweep",
    "--table: goes with --sweep-dir alone",
    "--sweep-dir: {dir} holds other files and no sweep",
    "--sweep-dir: {dir}/sweep.json is no record",
)


def test_a_folder_of_other_files_and_a_damaged_record_are_refused(
    case: Case, capsys: pytest.CaptureFixture[str]
) -> None:
    case.dir.mkdir()
    assert main(["--sweep-dir", str(case.dir), "--table"]) == 2
    assert main(["--sweep-dir", str(case.dir), "--table", "--config", str(case.config)]) == 2
    (case.dir / "notes").touch()
    assert case.run(*VARY) == 2
    (case.dir / "sweep.json").write_text('{"runs": 1}')
    assert case.run(*VARY) == 2
    said = capsys.readouterr().err.splitlines()
    for line, words in zip(said, WRONG, strict=True):
        assert line.startswith(f"error: {words.format(dir=case.dir)}")


@pytest.mark.parametrize(
    "given, words",
    [
        (("--table",), "--table: goes with --sweep-dir alone"),
        (("--at-once", "2"), "--at-once: goes with --submit"),
        (("--ranks", "2"), "--ranks: goes with --launcher"),
        (("--submit", "--launcher", "deepspeed"), "--launcher: does not go with --submit"),
        (("--launcher", "no-such-program"), "--launcher no-such-program: there is no program"),
        (("--launcher", 'a "b'), '--launcher a "b: is no command'),
        (("--", "--nodes", "2"), "--nodes: options behind -- are for SLURM; add --submit"),
        (("--submit", "--", "--run-dir=x"), "--run-dir: stands behind --"),
        (("--submit", "--", "--help"), "--help: stands behind --"),
        (("--submit", "--at-once", "1", "--", "--after", "3"), "--at-once: lets jobs wait for each other"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    case: Case, given: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(case.line(*VARY, *given)) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


@pytest.mark.slow  # two processes that import torch; test_a_sweep_trains_ranks_and_draws_its_runs has all but training
def test_two_real_runs_end_as_the_table_says(case: Case) -> None:
    """Of three steps, with the command of a user; the validation loss is that of the run's own events."""
    few = ("train.steps=3", "schedule.warmup_steps=1", "evaluate.sequences=8")
    settings = [part for setting in few for part in ("--set", setting)]
    command = [sys.executable, str(ROOT / "launch" / "sweep.py"), *case.line(*VARY, *settings)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    with (case.dir / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2
    for row in rows:
        folder = case.dir / row["run"]
        assert json.loads((folder / "config.json").read_text())["optimizer"]["learning_rate"] == float(row[RATE])
        events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
        assert float(row["validation_loss"]) == [e["loss"] for e in events if e["event"] == "validation"][-1]
        assert (row["state"], row["step"], os.listdir(folder / "checkpoints")) == ("finished", "3", ["step-00000003"])
