"""Alerts: what the command gets and when, and that nothing that it does reaches the run."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest

from common.errors import ConfigError, UserError
from pretrain.config.alert_kinds import DEFAULT_ALERTS, AlertKind
from pretrain.config.schema import Config
from pretrain.config.watching import MonitorConfig
from pretrain.preflight.whole import Examination, Wanted
from pretrain.report import alerts as alerts_module
from pretrain.report.alerts import LONGEST, Alert, Alerts, check_command
from pretrain.report.event_text import describe
from pretrain.report.exit_codes import ExitCode
from pretrain.report.run_folder import RunFolder
from pretrain.resilience.spikes import SpikeDetector
from pretrain.trainer import Trainer
from tests.harness import run_ranks
from tests.pretrain.report.alert_case import WRITES, calls, command
from tests.pretrain.resilience.faults import outcome, spike_in_steps, spoil_losses_of_steps, train_with
from tests.pretrain.runs import light_config, metrics, small_config

HANGS = "sh -c 'cat >/dev/null; echo $$ >\"$0\"; sleep 600'"
"""Reads the event, writes the number of its process to the file that the next word names, and does not end."""


def settings(given: str, **more: Any) -> MonitorConfig:
    return MonitorConfig(alert_command=given, alert_minutes=0.0, **more)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def has_ended(pid: int) -> bool:
    """Whether a process is gone, or dead and only not waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_the_command_gets_its_words_a_sentence_and_the_event_as_json(tmp_path: Path) -> None:
    got, run_dir = tmp_path / "got", tmp_path / "night"
    config = settings(command(tmp_path, WRITES, str(got), "$HOME;*", "~"))
    folder = RunFolder(run_dir, writes=True, alerts=Alerts(config, run_dir))
    folder.event("loss_spike", step=7, reason="first\nsecond \x1b[31m")
    folder.event("validation", step=7, loss=3.0)  # nobody has asked for it
    folder.finish_alerts()
    ((words, _, _),) = [json.loads(line) for line in got.read_text().splitlines()]
    assert words[:-1] == ["$HOME;*", "~"], "a shell has read them"
    ((sentence, told),) = calls(got)
    assert sentence == "run night: loss spike after step 7: first second \\x1b[31m"
    assert told["run"] == str(tmp_path / "night") and told["left_out"] == {}
    assert {**told["event"], "time": 0} == {
        "event": "loss_spike",
        "time": 0,
        "step": 7,
        "reason": "first\nsecond \x1b[31m",
    }
    folder.end(ExitCode.FINISHED, "finished")


@pytest.mark.parametrize(
    "code, reason, kind, was_told",
    [
        (ExitCode.FINISHED, "finished", "finished", True),
        (ExitCode.STOPPED, "SIGTERM", "stopped", True),
        (ExitCode.STOPPED, "SIGTERM during start-up", "stopped", False),
        (ExitCode.INTERRUPTED, "SIGTERM after SIGINT", "stopped", False),
        *((code, "why", "failed", False) for code in ExitCode if code not in (0, 85, 86)),
    ],
)
def test_every_end_of_a_start_is_told_once_with_its_code(
    tmp_path: Path, code: ExitCode, reason: str, kind: str, was_told: bool
) -> None:
    config = settings(command(tmp_path, WRITES, str(tmp_path / "got")), alerts=("finished", "stopped", "failed"))
    folder = RunFolder(tmp_path / "run", writes=True, alerts=Alerts(config, tmp_path / "run"))
    if was_told:
        folder.event(kind, step=4)  # written for events.jsonl
    folder.end(code, reason, step=4)
    folder.end(ExitCode.UNFORESEEN, "not the first")
    folder.finish_alerts()
    ((sentence, told),) = calls(tmp_path / "got")
    assert (told["event"]["event"], told["event"]["exit_code"], told["event"]["step"]) == (kind, code, 4)
    assert kind in sentence and (f"exit code {int(code)}: why" in sentence or kind != "failed")
    # The next start replaces outcome.json, not this event; there is none in a folder that is another run's by then.
    rows = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    ends = [(row["event"], row.get("exit_code")) for row in rows if row["event"] in ("finished", "stopped", "failed")]
    assert ends == ([] if code is ExitCode.FOLDER_LOST else [(kind, None if was_told else int(code))])


def test_of_a_flood_one_is_told_and_the_end_says_how_many_were_left_out(tmp_path: Path) -> None:
    config = settings(command(tmp_path, WRITES, str(tmp_path / "got"))).model_copy(update={"alert_minutes": 60.0})
    alerts = Alerts(config, tmp_path / "run")
    before = threading.active_count()
    for step in range(5000):
        alerts.hear({"event": "skipped_update", "step": step, "loss": "nan"})
    alerts.hear({"event": "loss_spike", "step": 9, "reason": "high"})
    assert threading.active_count() <= before + 2
    alerts.finish()
    alerts.hear({"event": "failed", "exit_code": 3, "reason": "diverged"}, is_end=True)
    alerts.finish()
    told = {given["event"]["event"]: (sentence, given) for sentence, given in calls(tmp_path / "got")}
    assert len(calls(tmp_path / "got")) == 3 and told["skipped_update"][1]["event"]["step"] == 0
    assert told["loss_spike"][1]["left_out"] == {} and told["failed"][1]["left_out"] == {"skipped_update": 4999}
    assert told["failed"][0].endswith("diverged (left out before: 4999 x skipped_update)")


def test_after_the_pause_the_next_one_says_how_many_were_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(command(tmp_path, WRITES, str(tmp_path / "got"))).model_copy(update={"alert_minutes": 1.0})
    alerts, real = Alerts(config, tmp_path / "run"), time.monotonic
    for seconds in (0, 30, 59, 61, 62):
        monkeypatch.setattr(time, "monotonic", lambda seconds=seconds: 1000.0 + seconds)
        alerts.hear({"event": "loss_spike", "step": seconds, "reason": "high"})
        monkeypatch.setattr(time, "monotonic", real)
        alerts.finish()
    assert [(given["event"]["step"], given["left_out"]) for _, given in calls(tmp_path / "got")] == [
        (0, {}),
        (61, {"loss_spike": 2}),
    ]


def test_a_command_that_hangs_is_killed_with_what_it_started_and_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(alerts_module, "LIMIT_SECONDS", 3.0)
    path = tmp_path / "pid"
    alerts = Alerts(settings(f"""sh -c 'sh -c "echo \\$\\$ >{path}; sleep 600; true"; true'"""), tmp_path / "run")
    alerts.hear({"event": "loss_spike", "step": 1, "reason": "high"})
    until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text() != "")
    pid = int((tmp_path / "pid").read_text())
    alerts.hear({"event": "loss_spike", "step": 2, "reason": "high"})  # the first one still runs
    assert alerts._left_out == {"loss_spike": 1}
    until(lambda: has_ended(pid))
    alerts.finish()
    alerts.hear({"event": "rollback", "first_step": 1, "reason": "high"})
    alerts.finish()
    said = capfd.readouterr().err
    assert said.count("warning: ") == 1 and "monitor.alert_command: sh did not end within 3 s and was killed" in said


def test_the_end_of_a_run_waits_for_a_hanging_command_no_longer_than_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(alerts_module, "END_SECONDS", 0.1)
    monkeypatch.setattr(alerts_module, "LIMIT_SECONDS", 600.0)  # which the thread of a process that ends does not see
    alerts = Alerts(settings(f"{HANGS} '{tmp_path / 'pid'}'"), tmp_path / "run")
    alerts.hear({"event": "failed", "exit_code": 1, "reason": "why"}, is_end=True)
    until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text() != "")
    alerts.finish()
    until(lambda: has_ended(int((tmp_path / "pid").read_text())))
    assert "did not end within 0.1 s of the end of the run; it is killed" in capfd.readouterr().err


def test_a_command_that_floods_its_output_and_reads_nothing_costs_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    floods = "import sys\nfor _ in range(300):\n    print('x' * 9999)\n    print('y' * 9999, file=sys.stderr)\n"
    alerts = Alerts(settings(command(tmp_path, floods)), tmp_path / "run")
    alerts.hear({"event": "replicas_differ", "step": 1, "tensors": ["a name " * 50] * 500})  # more than a pipe holds
    alerts.finish()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "program, words",
    [("import sys; sys.exit(3)", "ended with exit code 3"), (None, "there is no program /nowhere/to be here; give")],
)
def test_a_command_that_fails_is_one_warning(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], program: str | None, words: str
) -> None:
    given = "'/nowhere/to be' secret" if program is None else command(tmp_path, program, "secret")
    alerts = Alerts(settings(given), tmp_path / "my $(run)")
    for kind in ("loss_spike", "rollback", "loss_spike"):
        alerts.hear({"event": kind, "step": 1})
        alerts.finish()
    said = capfd.readouterr().err
    assert said.count("warning: monitor.alert_command: ") == said.count("\n") == 1 and words in said
    assert "secret" not in said and f"`python launch/alert.py '{tmp_path}/my $(run)'` tries the command" in said


def test_a_system_without_threads_or_processes_left_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(error: Exception, *args: Any, **options: Any) -> None:
        raise error

    for place, name, error in (
        (threading.Thread, "start", RuntimeError("no thread")),
        (subprocess, "Popen", BlockingIOError(11, "no process")),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, partial(refuse, error))
            alerts = Alerts(settings("true"), tmp_path)
            alerts.hear({"event": "rollback"})
            alerts.finish()
    said = capfd.readouterr().err
    assert "no thread. The run goes on" in said and "no process. The run goes on" in said


def test_an_alert_outlives_the_sigterm_that_a_launcher_sends_to_all_of_a_rank(tmp_path: Path) -> None:
    got, pid, go = (tmp_path / name for name in ("got", "pid", "go"))
    waits = f"""
import os, time
with open({str(pid)!r}, "w") as file:
    file.write(str(os.getpid()))
while not os.path.exists({str(go)!r}):
    time.sleep(0.01)
"""
    alerts = Alerts(settings(command(tmp_path, waits + WRITES, str(got))), tmp_path / "run")
    alerts.hear({"event": "failed", "exit_code": 1, "reason": "another rank met an error"})
    until(lambda: pid.exists() and pid.read_text() != "")
    os.kill(int(pid.read_text()), signal.SIGTERM)
    go.touch()
    alerts.finish()
    assert len(calls(got)) == 1


def test_a_sentence_is_utf_8_in_a_locale_that_is_not(tmp_path: Path) -> None:
    """In a process of its own, whose arguments Python encodes as ASCII."""
    given = command(tmp_path, "import os, sys\nopen(sys.argv[1], 'wb').write(os.fsencode(sys.argv[2]))", "got")
    told = f"""
from pathlib import Path
from pretrain.config.watching import MonitorConfig
from pretrain.report.alerts import Alerts
from tests.pretrain.report import alert_case
alerts = Alerts(MonitorConfig(alert_command={given!r}), Path("night"))
alerts.hear({{"event": "loss_spike", "step": 1, "reason": "na\\u00efve \\u03c3"}})
alerts.finish()
"""
    ascii_locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment = {**os.environ, **ascii_locale, "PYTHONPATH": str(Path(__file__).resolve().parents[3])}
    subprocess.run([sys.executable, "-c", told], env=environment, cwd=tmp_path, check=True, timeout=300)
    assert (tmp_path / "got").read_bytes().decode() == "run night: loss spike after step 1: naïve σ"


def test_a_sentence_is_short_whatever_the_event_holds(tmp_path: Path) -> None:
    """And keeps its end, where a message says what to do."""
    reason = f"rank 3 {'x' * 9999}; set batch.micro_sequences to 4"
    alert = Alert(tmp_path / "run", {"event": "failed", "exit_code": 1, "reason": reason}, {"loss_spike": 2})
    told = alert.sentence
    assert len(told) == LONGEST and told.startswith("run run: failed with exit code 1: rank 3 xxx") and "x...x" in told
    assert told.endswith("x; set batch.micro_sequences to 4 (left out before: 2 x loss_spike)")
    assert json.loads(alert.line())["event"]["reason"] == reason, "the JSON has it whole"


def test_a_full_disk_of_the_run_folder_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Both logs fail; without a pause the second would be told where the first one's command has ended by then.
    config = MonitorConfig(alert_command=command(tmp_path, WRITES, str(tmp_path / "got")), alert_minutes=1.0)
    folder = RunFolder(tmp_path / "run", writes=True, alerts=Alerts(config, tmp_path / "run"))

    def refuse(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("common.line_log.append_whole", refuse)
        for step in range(3):
            folder.metrics({"step": step})
    folder.finish_alerts()
    ((sentence, _),) = calls(tmp_path / "got")
    assert sentence.startswith("run run: ") and sentence.endswith(".jsonl cannot be written: No space left on device")
    folder.event("started", step=0)
    rows = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [row["file"] for row in rows if row["event"] == "log_not_written"] == ["metrics.jsonl", "events.jsonl"]
    folder.end(ExitCode.FINISHED, "finished")


def train_failing(rank: int, runs: list[tuple[Config, Path]], steps: tuple[int, ...]) -> list[str]:
    """One run after the other: a spike in step 12, and in `steps` a loss on rank 1 that is no number."""
    os.environ["RANK"] = str(rank)

    def prepare(trainer: Trainer) -> None:
        spike_in_steps(trainer, (12,))
        spoil_losses_of_steps(trainer, steps, 1)

    return [train_with(rank, config, run_dir, prepare) for config, run_dir in runs]


def test_rank_0_alone_tells_what_happens_and_how_it_ended_and_training_is_the_same(
    prepared: Path, tmp_path: Path
) -> None:
    """Two ranks: a spike, an update that is skipped because of rank 1, and three in a row that end the run."""
    keys = (
        "train.steps=20",
        "evaluate.sequences=0",
        "resilience.spike_window_steps=8",
        "resilience.max_skipped_updates=3",
    )
    runs = [(light_config(prepared, *keys, ranks=2), tmp_path / "silent")]
    for name, given in (("told", command(tmp_path, WRITES, str(tmp_path / "got"), "$TOKEN")), ("broken", "/not/here")):
        told = f"monitor.alert_command={json.dumps(given)}"
        runs.append((light_config(prepared, *keys, told, ranks=2), tmp_path / name))
    for ended in run_ranks(train_failing, 2, runs, (14, 16, 17, 18)):
        assert all(text.startswith("DIVERGED: step 18") for text in ended)
    assert all(outcome(run_dir)["exit_code"] == ExitCode.DIVERGED for _, run_dir in runs)
    losses = [[(row["step"], row["loss"], row["grad_norm"]) for row in metrics(run_dir)] for _, run_dir in runs]
    assert len(losses[0]) == 18 and losses[0] == losses[1] == losses[2]
    assert {json.loads(line)[2] for line in (tmp_path / "got").read_text().splitlines()} == {"0"}
    told = {given["event"]["event"]: given for _, given in calls(tmp_path / "got")}
    assert len(calls(tmp_path / "got")) == len(told) == 3
    assert (told["loss_spike"]["event"]["step"], told["skipped_update"]["event"]["step"]) == (12, 14)
    assert told["failed"]["event"]["exit_code"] == ExitCode.DIVERGED
    assert told["failed"]["left_out"] == {"skipped_update": 3}
    saved = json.loads((tmp_path / "told" / "config.json").read_text())["monitor"]["alert_command"]
    assert saved.endswith("'$TOKEN'"), "not the words as given"


def test_a_dry_run_refuses_a_command_that_is_no_program(prepared: Path, tmp_path: Path) -> None:
    config = small_config(prepared, 'monitor.alert_command="no-such-program --now"')
    path = tmp_path / "one.json"
    path.write_text(json.dumps(config.model_dump(mode="json")))
    examination = Examination(Wanted(config=path, option="--config", run_dir=tmp_path / "run"))
    examination.check_settings()
    (problem,) = examination.checks.problems
    assert str(problem).startswith("monitor.alert_command: there is no program no-such-program here; give the path of")
    with pytest.raises(UserError, match=r"monitor\.alert_command: there is no program ~/mine here"):
        check_command(settings("~/mine"))
    check_command(MonitorConfig())


@pytest.mark.parametrize(
    "key, message",
    [
        ("alert_command=it's", r"^monitor\.alert_command: it's cannot be split into words: no closing quotation"),
        ("alert_command= ", r"^monitor\.alert_command: has no word; name a program"),
        ('alerts=["nothing"]', r"^monitor\.alerts.*'finished', 'failed'"),
    ],
)
def test_a_wrong_setting_is_refused_by_its_key(prepared: Path, key: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small_config(prepared, f"monitor.{key}")


def test_the_page_has_every_kind_and_says_which_are_told_by_default() -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "monitoring.md").read_text(encoding="utf-8")
    section = page.partition("\n## Alerts\n")[2].partition("\n## ")[0]
    rows = [line.split("|") for line in section.splitlines() if line.startswith("| `")]
    shown = {kind: default.strip() for _, kinds, *_, default, _ in rows for kind in re.findall("`([a-z_]+)`", kinds)}
    assert shown == {kind: "yes" if kind in DEFAULT_ALERTS else "" for kind in get_args(AlertKind)}


def test_the_page_shows_the_sentence_of_a_spike() -> None:
    spikes = SpikeDetector(threshold=10.0, window=128)
    for step in range(128):
        assert spikes.see(2.6107 + (-1) ** step * 0.14871) is None
    text = describe({"event": "loss_spike", "step": 41200, "reason": spikes.see(5.1021)})
    page = (Path(__file__).resolve().parents[3] / "docs" / "monitoring.md").read_text(encoding="utf-8")
    assert f" run night: {text} " in " ".join(page.split())
