"""What launch/status.py says of runs that go on, have ended, died, are damaged, empty, or of another version."""

from __future__ import annotations

import json
import math
import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from common.run_lock import DEAD_SECONDS, FolderLock, process_identity
from pretrain.cli.status import main
from pretrain.views.reading import Metrics, RunView, State
from pretrain.views.status import balance_text, duration, runs_table, screen, speed_text, summary
from tests.harness import run_ranks
from tests.pretrain.runs import light_config, train_runs
from tests.pretrain.views.status_case import row, shown, write


def test_a_run_that_goes_on(tmp_path: Path) -> None:
    folder = write(tmp_path / "run")
    lock = FolderLock(folder)
    try:
        text = shown(folder)
    finally:
        lock.release()
    assert f"running: process {os.getpid()} on {socket.gethostname()}, 2 ranks, last sign of life 0 s ago" in text
    assert "step       10 of 40 (25.0%), 320 tokens" in text
    assert "time left  60 s, until " in text  # 30 steps of 2 s
    assert "loss       4.0000 (mean of 10 steps 4.4500)" in text
    assert "speed      16 tokens/s, 2 s a step" in text
    assert "attention 1.50 of 2; feed-forward 3.00 of 4, 2 unused (busiest; 1 is even)" in text
    assert "started after step 0 on 2 ranks" in text
    assert max(map(len, text.splitlines()[:-1])) <= 100


def test_what_a_start_goes_on_from_still_counts(tmp_path: Path) -> None:
    """Evaluations after the step that it begins at, and none of later ones; of two splits after one step the one that
    the configuration names; lines that are empty, or repeat what metrics.jsonl held, tell nothing."""
    evaluated = [{"event": "evaluation", "task": "cbt", "step": step, "accuracy": step / 10} for step in (4, 6, 8)]
    validated = [
        {"event": "validation", "split": split, "step": 6, "loss": loss}
        for split, loss in (("validation", 3.0), ("test", 4.0))
    ]
    events: list[dict[str, Any]] = [*evaluated, *validated, {"event": "superseded_metrics", "metrics": {"step": 7}}]
    folder = write(tmp_path / "run", events=[*events, {"event": "started", "step": 6, "time": 2.0}])
    with (folder / "events.jsonl").open("a") as file:
        file.write("\n  \n{torn\n")
    view = RunView.open(folder)
    assert view.task_accuracies() == {"cbt": {4: 0.4, 6: 0.6}} and view.tasks()["cbt"]["step"] == 6
    assert view.damaged_events == 1 and not view.last("superseded_metrics")
    assert view.newest_validation == ("validation", 6, 3.0)
    for split, loss in (("test", 4.0), ("validation", 3.0)):
        (folder / "config.json").write_text(json.dumps({"evaluate": {"split": split}}))
        assert RunView.open(folder).newest_validation == (split, 6, loss)


@pytest.mark.parametrize(
    "outcome, state, words",
    [
        ({"exit_code": 0, "reason": "finished"}, State.FINISHED, "a later train.stop_after_steps goes on"),
        ({"exit_code": 85, "reason": "SIGUSR1 to rank 0"}, State.STOPPED, "continues from step-00000008"),
        ({"exit_code": 5, "reason": "hang"}, State.FAILED, "hang/message.txt: it names the rank"),
        ({"exit_code": 3, "reason": "diverged"}, State.FAILED, "The same command would diverge again: lower opt"),
        ({"exit_code": 2, "reason": "refused"}, State.FAILED, "Change that, then start it again; it continues from"),
        ({"exit_code": 6, "reason": "lost"}, State.FAILED, "See who has the folder before you start it again"),
        ({"exit_code": 1, "reason": "bug"}, State.FAILED, "Then start the same command again; it continues from"),
        ({"exit_code": 77, "reason": "of a later version"}, State.FAILED, "exit code 77"),
        ({}, State.DEAD, "read the end of its log, then start the same command again; it continues from step-0"),
    ],
)
def test_a_run_that_has_ended(tmp_path: Path, outcome: dict[str, Any], state: State, words: str) -> None:
    view = RunView.open(write(tmp_path / "run", **outcome))
    assert view.state is state
    text = screen(view, width=100, now=time.time())
    assert words in text.splitlines()[-1] and "time left" not in text
    assert f"state      {state.value}" in text and outcome.get("reason", "left no outcome") in text


def test_a_changed_setting_has_the_values_that_a_configuration_has(tmp_path: Path) -> None:
    changed = {"event": "changed_setting", "time": 2.0, "key": "train.stop_after_steps", "then": 60, "now": None}
    lists = {**changed, "key": "checkpoint.allow_changes", "then": [], "now": ["optimizer"]}
    words = {**changed, "key": "checkpoint.resume", "then": "auto", "now": "never"}
    text = shown(write(tmp_path / "run", events=[changed, lists, words]), 200)
    assert "setting train.stop_after_steps changed from 60 to null" in text
    assert 'checkpoint.allow_changes changed from [] to ["optimizer"]' in text
    assert "checkpoint.resume changed from auto to never" in text


def test_a_validation_has_its_moving_average_beside_it(tmp_path: Path) -> None:
    events = [
        {"event": "validation", "time": 2.0, "step": step, "loss": loss, "ema_loss": average}
        for step, loss, average in ((4, 4.5, 4.75), (8, 5.0, 4.25))
    ]
    text = shown(write(tmp_path / "run", events=events))
    assert "validation 5.0000 after step 8, best 4.5000 after step 4; moving average 4.2500" in text
    assert "validation after step 4: loss 4.5000; moving average: loss 4.7500" in text
    assert "moving average not finite" in shown(write(tmp_path / "wild", events=[{**events[0], "ema_loss": None}]))
    del events[1]["ema_loss"]  # switched off on the way
    assert "best 4.5000 after step 4\n" in shown(write(tmp_path / "off", events=events))


def test_a_hang_is_said_once(tmp_path: Path) -> None:
    """The message begins as the event is called."""
    message = "hang: step 5, forward does not end. Did not arrive: rank 1"
    text = shown(write(tmp_path / "run", events=[{"event": "hang", "time": 2.0, "message": message}]), 200)
    assert "hung: step 5, forward does not end\n" in text


def test_an_explanation_is_wrapped_and_no_word_lost(tmp_path: Path) -> None:
    words = " ".join(f"word{number}" for number in range(40))
    events = [{"event": "skipped_checkpoint", "time": 2.0, "path": "step-00000009", "reason": words}]
    lines = shown(write(tmp_path / "run", events=events, exit_code=2, reason=words), width=60).splitlines()[:-1]
    assert all(len(line) <= 60 for line in lines)
    start = next(n for n, line in enumerate(lines) if line.startswith("state "))
    end = next(n for n, line in enumerate(lines) if line.startswith("step "))
    assert " ".join(line[11:] for line in lines[start:end]) == f"failed: {words}"
    long = f"{words * 99}; set batch.micro_sequences to 4"
    endless = shown(write(tmp_path / "endless", exit_code=2, reason=long), width=60).splitlines()
    assert endless[1].startswith("state      failed: word0 ") and endless[4] == " " * 11 + "..."
    ending = " ".join(line.strip() for line in endless[5:7])
    assert ending.endswith("; set batch.micro_sequences to 4") and endless[7].startswith("step ")


@pytest.mark.parametrize("age, alive", [(0.0, True), (DEAD_SECONDS + 5.0, False)])
def test_the_lock_of_another_machine_is_judged_by_its_age(tmp_path: Path, age: float, alive: bool) -> None:
    folder = write(tmp_path / "run")
    lock = folder / "lock-3.json"
    lock.write_text(json.dumps({**process_identity(os.getpid()), "host": "elsewhere", "token": "t", "job": None}))
    os.utime(lock, (time.time() - age,) * 2)
    before = sorted(folder.iterdir())
    view = RunView.open(folder)
    assert view.state is (State.RUNNING if alive else State.DEAD)
    assert sorted(folder.iterdir()) == before, "a reader left something"
    if not alive:
        assert f"process {os.getpid()} on elsewhere was silent for 65 s" in shown(folder)


def test_the_slowest_rank_of_the_newest_comparison_since_the_start_is_shown(tmp_path: Path) -> None:
    def text(name: str, started: int, behind: float) -> str:
        folder = write(tmp_path / name, events=[{"event": "started", "time": 2.0, "step": started}])
        rows = [row(n) for n in range(1, 11)]
        rows[2] |= {"slowest_rank": 1, "slowest_rank_behind_seconds": 1.5}
        rows[5] |= {"slowest_rank": 7, "slowest_rank_behind_seconds": behind}
        (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
        return shown(folder)

    assert "speed      16 tokens/s, 2 s a step, rank 7 is 25% of it behind the others" in text("slow", 0, 0.5)
    assert "behind" not in text("even", 0, 0.05)
    assert "behind" not in text("started again after it", 6, 0.5)


def test_the_speed_is_that_of_the_start_that_goes_on(tmp_path: Path) -> None:
    """30 steps of 2 s, then a start on a faster machine with the batch of config.json, 4 x 8 tokens: 5 steps of 0.5 s.
    A start that has made no step yet leaves the numbers of the one before."""
    folder = write(tmp_path / "run", 0, events=[{"event": "started", "time": 2.0, "step": 30, "last_step": 40}])
    slow = [row(n, data_wait_seconds=1.0) for n in range(1, 31)]
    fast = [row(n, step_seconds=0.5, data_wait_seconds=0.0, flops_utilization=0.3) for n in range(31, 36)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in slow + fast))
    view = RunView.open(folder)
    assert speed_text(view) == "64 tokens/s, 0.5 s a step, 30.0% of the peak FLOP/s"
    # The peak is of the same steps as the time, though only the newest has a utilization that is read.
    slowest = row(36, step_seconds=1.1, data_wait_seconds=0.0, flops_utilization=0.15)
    other = write(tmp_path / "other", 0)
    (other / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in [*fast, slowest]))
    assert speed_text(RunView.open(other)) == "53 tokens/s, 0.6 s a step, 27.5% of the peak FLOP/s"
    assert summary(view)["seconds_per_step"] == 0.5
    with (folder / "events.jsonl").open("a") as file:
        file.write(json.dumps({"event": "started", "time": 3.0, "step": 35, "last_step": 40}) + "\n")
    view.update()
    assert summary(view)["seconds_per_step"] == 0.5


def test_a_loss_that_is_not_finite_is_said_and_not_left_out(tmp_path: Path) -> None:
    validations = [{"event": "validation", "time": 2.0, "step": 4, "loss": 6.5}]
    folder = write(tmp_path / "run", 0, events=[*validations, {**validations[0], "step": 8, "loss": None}])
    rows = [row(n, loss=7.0 - n / 10 if n < 5 else None) for n in range(1, 9)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    text = shown(folder)
    assert "loss       not finite since step 5, 6.6000 before\n" in text
    assert "validation not finite after step 8, best 6.5000 after step 4\n" in text
    view = RunView.open(folder)
    assert runs_table([view], 0.0).splitlines()[1].count("not finite") == 2  # of training and of validation
    assert summary(view)["newest"]["loss"] is None and "loss" in summary(view)["newest"]
    (folder / "metrics.jsonl").write_text(json.dumps(row(1, loss=None)) + "\n")
    assert "loss       not finite since step 1\n" in shown(folder)


def test_a_start_that_has_not_reached_its_first_step(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", events=[{"event": "opened", "time": 2.0}])
    lock = FolderLock(folder)
    try:
        assert RunView.open(folder).state is State.STARTING
    finally:
        lock.release()


def test_an_empty_run_and_none_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_text("{}")
    assert "dead: nothing was trained here" in shown(empty) and "it begins anew" in shown(empty)
    none = tmp_path / "none"
    none.mkdir()
    for path, words in ((none, "is no run folder"), (tmp_path / "missing", "there is no folder")):
        assert main([str(path)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: RUN: ") and words in error and error.count("\n") == 1
    assert main([str(none), str(empty), str(write(tmp_path / "run"))]) == 0
    printed = capsys.readouterr()
    assert printed.err == f"passed over: {none} is no run folder: it holds none of " + (
        "metrics.jsonl, events.jsonl, config.json\n"
    )
    assert [line.split()[1] for line in printed.out.splitlines()[1:]] == ["dead", "dead"]
    assert main([str(none), str(tmp_path / "missing")]) == 2
    (none / "slurm").mkdir()
    (none / "slurm" / "11.submitted").touch()
    assert main([str(none)]) == 2
    said = f"RUN: {none}: no run has begun yet; job 11 was submitted for it (squeue --job 11; --watch waits for it)"
    assert capsys.readouterr().err.endswith(f"error: {said}\n")


@pytest.mark.parametrize("weights", ["model.safetensors", "model.safetensors.index.json"])
def test_an_export_is_no_run_that_died(tmp_path: Path, capsys: pytest.CaptureFixture[str], weights: str) -> None:
    """It has a config.json too; `dead: nothing was trained here` was said of it, and to start its command again."""
    (tmp_path / "config.json").write_text("{}")
    assert main([str(tmp_path)]) == 0 and "dead" in capsys.readouterr().out
    (tmp_path / weights).touch()
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"error: RUN: {tmp_path} holds the weights of a model, and is no run folder; name runs/NAME\n"
    )


def test_the_folder_of_a_sweep_is_said_to_be_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sweep.json").write_text("{}")
    assert main([str(tmp_path)]) == 2
    assert f"launch/sweep.py --sweep-dir {tmp_path} --table" in capsys.readouterr().err


def test_damage_and_other_versions_are_passed_over(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", exit_code=0, reason="finished", step=10)
    (folder / "config.json").write_text('{"model": 3, "train": []')
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(b"\xff\xfe\n[1]\n" + json.dumps({"step": 11, "loss": None, "new": [1]}).encode() + b'\n{"step": 12')
    with open(folder / "events.jsonl", "a") as file:
        file.write('{"event": "of tomorrow", "what": "x\\u001b[31m", "time": "late"}\n{}\n')
    (folder / "outcome.json").write_text("null")
    view = RunView.open(folder)
    assert view.step == 11 and view.metrics.damaged == 2 and view.damaged_events == 1
    text = screen(view, width=100, now=time.time())
    assert "damaged    3 lines of metrics.jsonl and events.jsonl passed over" in text
    assert "of tomorrow: what x\\x1b[31m" in text and "\x1b" not in text
    assert json.loads(json.dumps(summary(view)))["state"] == "dead"


def test_metrics_that_grow_and_are_rewound(tmp_path: Path) -> None:
    """The columns are those of a reader who begins now, at any time."""
    path, metrics = tmp_path / "metrics.jsonl", Metrics(tmp_path / "metrics.jsonl")
    metrics.update()
    assert len(metrics) == 0
    path.write_text(json.dumps(row(1)) + "\n" + json.dumps(row(2, extra=7.0)) + '\n{"step": 3, "lo')
    metrics.update()
    assert list(metrics.column("step")) == [1, 2] and list(metrics.column("extra"))[1] == 7.0
    with open(path, "a") as file:
        file.write('ss": 1.25}\n')
    metrics.update()
    assert list(metrics.column("loss")) == [4.9, 4.8, 1.25] and metrics.newest == {"step": 3, "loss": 1.25}
    other = tmp_path / "other"
    other.write_text("".join(json.dumps(row(n)) + "\n" for n in (1, 2, 3, 4)))
    other.rename(path)  # as a rewind replaces it, here by a longer one
    metrics.update()
    assert list(metrics.column("step")) == [1, 2, 3, 4] and "extra" not in metrics.names


def test_validations_that_were_computed_again_count_once(tmp_path: Path) -> None:
    def validation(step: int, loss: float) -> dict[str, Any]:
        return {"event": "validation", "time": 3.0, "step": step, "split": "validation", "loss": loss}

    again = [{"event": "started", "time": 4.0, "step": 4, "ranks": 2, "last_step": 40}]
    events = [validation(4, 4.5), validation(8, 9.9), *again, validation(8, 3.5), validation(12, 3.75)]
    view = RunView.open(write(tmp_path / "run", events=events))
    assert view.validations() == [(4, 4.5), (8, 3.5), (12, 3.75)]
    assert "validation 3.7500 after step 12, best 3.5000 after step 8" in shown(view.path)


def test_each_split_that_was_evaluated_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`evaluate.split=test` from the start, or from a resume on."""

    def validation(step: int, loss: float, split: str, **more: float) -> dict[str, Any]:
        return {"event": "validation", "time": 3.0, "step": step, "split": split, "loss": loss, **more}

    tested = [validation(4, 4.5, "test"), validation(8, 3.5, "test", ema_loss=3.25, **{"loss/c4": 3.75})]
    test = write(tmp_path / "test", events=tested)
    both = write(tmp_path / "both", events=[validation(4, 4.25, "validation"), validation(8, 3.5, "test")])
    assert "test       3.5000 after step 8 (c4 3.7500); moving average 3.2500\n" in shown(test)
    assert "validation 4" not in shown(test) and "validation after step 8 on the test split: loss 3.5000" in shown(test)
    assert "validation 4.2500 after step 4\ntest       3.5000 after step 8\n" in shown(both)
    assert main([str(test), str(both)]) == 0
    assert capsys.readouterr().out.count("  3.5000 (test)  ") == 2
    told = summary(RunView.open(test))
    assert told["validations"] == [] and told["test_validations"] == [[4, 4.5], [8, 3.5]]
    assert told["test_validations_by_source"] == [[8, {"c4": 3.75}]]
    assert not [key for key in summary(RunView.open(write(tmp_path / "none"))) if key.startswith("test")]


def test_a_real_run(prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = ("train.steps=4", "checkpoint.every_steps=2", "evaluate.every_steps=2")
    run_ranks(train_runs, 1, [(light_config(prepared, *keys), tmp_path / "run")])
    assert main([str(tmp_path / "run"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["state"], found["newest"]["step"], found["last_step"]) == ("finished", 4, 4)
    assert [step for step, _ in found["validations"]] == [2, 4]
    assert found["checkpoints"][-1] == "step-00000004"
    text = shown(tmp_path / "run", width=60)
    assert "state      finished, " in text and "training loss by step" in text
    assert all(len(line) <= 60 for line in text.splitlines()[:-1])


@pytest.mark.parametrize(
    "seconds, words", [(0.2, "0 s"), (119, "119 s"), (120, "2 min"), (12000, "3 h 20 min"), (2e5, "2 d 7 h")]
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_json_is_json_where_the_loss_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "loss": NaN, "grad_norm": Infinity}\n')
    assert main([str(folder), "--json"]) == 0

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    found = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert found["newest"] == {"step": 11, "loss": None, "grad_norm": None}


def test_a_pipe_in_the_place_of_a_log_is_not_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("metrics.jsonl", "events.jsonl", "config.json", "outcome.json"):
        folder = write(tmp_path / name)
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
        assert main([str(folder)]) == 2
        assert capsys.readouterr().err == f"error: RUN: {folder / name} cannot be read: is no file\n"


@pytest.mark.parametrize("every", ["0", "-1", "nan", "inf", "1e300", "often"])
def test_a_pause_that_is_none_is_refused(every: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        main([str(write(tmp_path / "run")), "--watch", "--every", every])
    assert refused.value.code == 2 and "--every: expected a number above 0" in capsys.readouterr().err


def test_a_small_terminal_keeps_the_state_and_what_to_do(tmp_path: Path) -> None:
    """Of a terminal of 24 lines, as most begin, a watch showed the last ones: no state, no step, no loss."""
    events = [{"event": "checkpoint", "time": 2.0, "step": n, "path": f"step-{n:08d}"} for n in range(6)]
    view = RunView.open(write(tmp_path / "run", events=events))
    whole = screen(view, width=80, now=3.0)
    first, last = whole.splitlines()[0], whole.splitlines()[-1]
    assert whole == screen(view, width=80, now=3.0, height=99) and whole.count("saved") > 5
    sizes = []
    for height in range(99, 7, -1):
        lines = screen(view, width=80, now=3.0, height=height).splitlines()
        used = len(lines) - 1 + math.ceil(len(last) / 80)
        assert lines[0] == first and lines[-1] == last and any(line.startswith("state") for line in lines)
        assert used < height or "training loss by step" not in lines
        sizes.append(used)
        if height == 24:
            assert "training loss by step" in lines and "last events" in lines and used >= 20
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) > 8


def test_events_of_a_run_without_a_loss_have_the_room_of_its_curve(tmp_path: Path) -> None:
    events = [{"event": "checkpoint", "time": 2.0, "step": n, "path": f"step-{n:08d}"} for n in range(6)]
    view = RunView.open(write(tmp_path / "run", 0, events=events))
    whole = screen(view, width=80, now=3.0).splitlines()
    needed = len(whole) + math.ceil(len(whole[-1]) / 80)
    sizes = [len(screen(view, width=80, now=3.0, height=needed - less).splitlines()) for less in (0, 2, 10, 11)]
    assert sizes == [len(whole) - less for less in (0, 2, 10, 14)], "two lines each, and their title goes with the last"


def test_the_heads_of_moa_are_its_experts(tmp_path: Path) -> None:
    """So that the load of the busiest one has its bound, as that of other models."""
    attention = {"type": "moa", "num_heads": 2, "num_experts": 8}
    assert "attention 1.50 of 4;" in balance_text(row(1), {"model": {"attention": attention}})


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path: Path) -> None:
    """From 10^8 steps on their names have more digits."""
    folder = write(tmp_path / "run")
    for name in ("step-100000000", "step-99999999"):
        (folder / "checkpoints" / name).mkdir()
    assert RunView.open(folder).checkpoints == ["step-00000008", "step-99999999", "step-100000000"]
    assert "3 checkpoints, newest step-100000000" in shown(folder)


def test_one_checkpoint_is_not_several(tmp_path: Path) -> None:
    assert "saved      1 checkpoint, newest step-00000008\n" in shown(write(tmp_path / "run"))


def test_a_narrow_screen_loses_no_word(tmp_path: Path) -> None:
    """With the state's 11 columns, `failed: ab` would take one more than the 20 that there are."""
    lines = shown(write(tmp_path / "run", exit_code=1, reason="ab cd"), 20).splitlines()
    assert lines[1:3] == ["state      failed:", "           ab cd"]
    assert max(map(len, lines[:-1])) <= 20


def test_a_file_that_was_replaced_twice_between_two_looks_is_read_anew(tmp_path: Path) -> None:
    """As by two rollbacks. The second file has the first one's number on ext4, which gives freed numbers again; here it
    is the same file with other lines, and longer than what was read."""
    path = tmp_path / "metrics.jsonl"

    def put(*losses: float) -> None:
        path.write_text("".join(json.dumps({"step": n, "loss": loss}) + "\n" for n, loss in enumerate(losses, 1)))

    metrics = Metrics(path)
    put(9.0, 8.0, 58.0, 57.0)
    metrics.update()
    put(9.0, 8.0, 7.25, 6.5, 6.25, 6.0)
    metrics.update()
    assert list(metrics.column("step")) == [1, 2, 3, 4, 5, 6] and metrics.damaged == 0
    assert list(metrics.column("loss")) == [9.0, 8.0, 7.25, 6.5, 6.25, 6.0]
    with path.open("a") as file:
        file.write('{"step": 7, "loss": 5.0}\n')
    assert metrics._file.new_lines() == (False, [b'{"step": 7, "loss": 5.0}'])
