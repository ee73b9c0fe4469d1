"""launch/sweep.py: what is refused before the first run, and what happens to each, with a program that takes the place
of a training; and one real sweep."""

from __future__ import annotations

import csv
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.run_lock import FolderLock
from launch.sweeps import check
from launch.sweeps.command import main
from pretrain.config.loading import load_config, to_json
from pretrain.report.disk_space import checkpoint_space
from pretrain.views import comparison_page, sweep_picture
from pretrain.views.reading import State
from pretrain.views.sweep import Result
from tests.harness import forked
from tests.launch.launcher import ROOT, environment
from tests.pretrain.runs import small_config

RATE = "optimizer.learning_rate"
VARY = ("--vary", f"{RATE}=1e-3,2e-3")
FAKE = """
import json, pathlib, signal, sys, time
own, arguments = pathlib.Path(__file__).parent, sys.argv[2:]
folder = pathlib.Path(arguments[arguments.index("--run-dir") + 1])
rate = [a for a in arguments if a.startswith("optimizer.learning_rate=")][-1].partition("=")[2]
with (own / "calls").open("a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\\n")
code = json.loads((own / "codes.json").read_text()).get(rate, 0)
print("trains", rate, flush=True)
if code == 2:
    sys.exit(2)
if code == "is killed":
    signal.raise_signal(signal.SIGKILL)
if code == "waits":
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, lambda number, _: (own / "got").write_text(str(number)))
    (own / "waits").touch()
    while not (own / "got").exists():  # no signal.pause(): the signal may come before it
        time.sleep(0.01)
    code = 85
folder.mkdir(exist_ok=True)
(folder / "checkpoints").mkdir(exist_ok=True)
(folder / "config.json").write_text('{"train": {"steps": 2}}')
rows = [{"step": n, "loss": 9 - n + float(rate), "tokens": n, "tokens_per_second": 5} for n in (1, 2)]
(folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
validation = json.dumps({"event": "validation", "step": 2, "loss": float(rate)}) + "\\n"
(folder / "events.jsonl").write_text("" if "evaluate.sequences=0" in arguments else validation)
(folder / "outcome.json").write_text(json.dumps({"exit_code": code, "time": time.time()}))
sys.exit(1 if code else 0)  # as deepspeed, which may return another code
"""
"""Trains nothing, and ends as codes.json beside it says: rate -> exit code, `is killed`, or `waits` for a signal."""


class Case:
    """A sweep whose runs are FAKE's."""

    def __init__(self, folder: Path, prepared: Path) -> None:
        self.folder, self.dir = folder, folder / "sweep"
        self.config = folder / "x.json"
        self.config.write_text(json.dumps(to_json(small_config(prepared))))
        (folder / "fake.py").write_text(FAKE)
        self.launcher = shlex.join([sys.executable, str(folder / "fake.py")])
        self.ends()

    def ends(self, **codes: int | str) -> None:
        (self.folder / "codes.json").write_text(json.dumps({name.replace("_", "-"): c for name, c in codes.items()}))

    def line(self, *more: str) -> list[str]:
        return ["--config", str(self.config), "--sweep-dir", str(self.dir), *more]

    def run(self, *more: str) -> int:
        return main(self.line("--launcher", self.launcher, *more))

    @property
    def trained(self) -> list[str]:
        """Rates of all starts so far."""
        path = self.folder / "calls"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [line[-1].partition("=")[2] for line in lines]


@pytest.fixture
def case(tmp_path: Path, prepared: Path) -> Case:
    return Case(tmp_path, prepared)


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """For sweeps whose pictures would be those that other tests here, and pretrain/views/test_sweep.py, have drawn."""
    monkeypatch.setattr(comparison_page, "drawn", lambda runs: b"")
    monkeypatch.setattr(sweep_picture, "losses_drawn", lambda results, keys: b"")


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


def test_a_reader_that_leaves_at_once_ends_no_sweep(case: Case) -> None:
    command = [sys.executable, str(ROOT / "launch" / "sweep.py"), *case.line("--launcher", case.launcher, *VARY)]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
        process.wait()
    assert process.returncode == 0 and case.trained == ["1e-3", "2e-3"]


def test_a_folder_of_other_files_and_a_damaged_record_are_refused(
    case: Case, capsys: pytest.CaptureFixture[str]
) -> None:
    case.dir.mkdir()
    assert main(["--sweep-dir", str(case.dir), "--table"]) == 2
    (case.dir / "notes").touch()
    assert case.run(*VARY) == 2
    (case.dir / "sweep.json").write_text('{"runs": 1}')
    assert case.run(*VARY) == 2
    said = capsys.readouterr().err.splitlines()
    for line, words in zip(said, ("holds no sweep", "holds other files and no sweep", "is no record"), strict=True):
        assert line.startswith("error: --sweep-dir: ") and words in line


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


def sweep_in(output: Path, number: int, line: list[str]) -> int:
    """A sweep in this process, whose prints go into a file."""
    signal.signal(number, signal.SIG_DFL)  # what nohup, or a shell's job in the background, ignores stays ignored
    file = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, sys.stdout.fileno())
    return main(line)


def wait_until_it_trains(case: Case, is_alive: Callable[[], bool]) -> None:
    while not (case.folder / "waits").exists():
        assert is_alive()
        time.sleep(0.05)


def assert_stopped(case: Case, number: int, printed: str) -> None:
    """What a signal does to a sweep whose first run was in training; then the same command goes on."""
    assert (case.folder / "got").read_text() == str(number)
    assert printed.endswith("stopped at step 2\nstopped; the same command goes on\n")
    assert case.trained == ["1e-3"]
    case.ends()
    assert case.run(*VARY) == 0
    assert case.trained == ["1e-3", "1e-3", "2e-3"]


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_stop_of_the_sweep_alone_is_handed_on_and_the_same_command_goes_on(case: Case, number: int) -> None:
    case.ends(**{"1e_3": "waits"})
    said = case.folder / "said"
    with forked(sweep_in, said, number, case.line("--launcher", case.launcher, *VARY)) as process:
        wait_until_it_trains(case, process.is_alive)
        assert process.pid is not None
        os.kill(process.pid, number)
        process.join(120)
        assert process.exitcode == 128 + number
    assert_stopped(case, number, said.read_text())


@pytest.mark.usefixtures("no_pictures")
def test_a_stop_by_ctrl_c_of_the_command_itself(case: Case) -> None:
    """Beside Python's own handling of Ctrl-C, and that of common/interruption.py."""
    case.ends(**{"1e_3": "waits"})
    # What a shell's job in the background ignores stays ignored.
    heard = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    sweep = [sys.executable, str(ROOT / "launch" / "sweep.py"), *case.line("--launcher", case.launcher, *VARY)]
    command = [sys.executable, "-c", heard, *sweep]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        try:
            wait_until_it_trains(case, lambda: process.poll() is None)
            process.send_signal(signal.SIGINT)
            printed, _ = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 128 + signal.SIGINT
    assert_stopped(case, signal.SIGINT, printed)


def test_a_run_that_was_stopped_by_itself_stops_the_sweep(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    case.ends(**{"1e_3": 85})
    assert case.run(*VARY) == 85
    assert capsys.readouterr().out.endswith("stopped at step 2\nstopped; the same command goes on\n")
    assert case.trained == ["1e-3"]


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
