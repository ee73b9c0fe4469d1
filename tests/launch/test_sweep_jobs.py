"""launch/sweep.py --submit: which runs become jobs, and which of them wait for another."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launch.slurm import training
from launch.sweeps import queue
from launch.sweeps.command import main
from pretrain.cli.refusals import INTERRUPTED
from pretrain.views.reading import State
from pretrain.views.sweep import Result, SweepRun
from tests.launch.slurm.conftest import sbatch
from tests.launch.slurm.test_submit import calls
from tests.launch.sweep_case import RATE, VARY, Case

__all__ = ["sbatch"]

JOB = ("--", "--nodes", "1", "--cpu", "--time", "30", "--allow-local")


def test_every_run_is_submitted_as_a_job_none_twice_and_what_is_in_the_queue_counts_among_those_at_once(
    case: Case, sbatch: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SQUEUE_USERS", "me")  # squeue would leave out what others have submitted of the sweep
    squeue, queue = sbatch.parent / "bin" / "squeue", sbatch.parent / "queue"
    jobs = '$(echo "${3#--jobs=}$SQUEUE_USERS" | tr , "\\n")'
    squeue.write_text(f'#!/bin/sh\necho "no error" >&2\ngrep -x "{jobs}" "{queue}" || true\n')
    squeue.chmod(0o755)
    line = case.line("--vary", f"{RATE}=1e-3,2e-3,3e-3", "--submit", "--at-once", "1", *JOB)

    def submitted(*in_queue: str) -> list[list[str]]:
        """Of every job the rate, and the job for whose end it waits."""
        queue.write_text("".join(f"{job}\n" for job in in_queue))
        before = len(calls(sbatch)) if sbatch.exists() else 0
        assert main(line) == 0
        scripts = [Path(call[-1]) for call in calls(sbatch)[before:]]
        waits = [re.findall(r"(?m)^#SBATCH --dependency=afterany:(\d+)$", path.read_text()) for path in scripts]
        return [[path.parts[-3].partition("=")[2], *job] for path, job in zip(scripts, waits, strict=True)]

    assert submitted() == [["1e-3"], ["2e-3", "41"], ["3e-3", "42"]]
    said = capsys.readouterr()
    assert "cancel  scancel 41 42 43" in said.out
    assert said.err.count("warning: --cpus-per-rank: is not given") == 1, "once, not for every run"
    assert submitted("42") == [["1e-3", "42"], ["3e-3", "44"]]
    assert submitted("42", "44") == [["3e-3", "44"]], "44 was submitted last, though of the first run"
    assert main(["--sweep-dir", str(case.dir), "--table"]) == 0
    table = capsys.readouterr().out
    assert "not begun (job 42)" in table and "not begun (job 44)" in table
    assert "not begun (job 46 has ended)" in table, "refused at its first start, or cancelled"


def test_of_two_at_once_each_job_waits_for_the_last_but_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of those in the queue, in the order of their numbers, of which one may have a digit more."""
    in_queue, submitted = {"a": "101", "b": "99", "c": "", "d": ""}, []

    def submit(line: list[str]) -> tuple[int, str, str]:
        submitted.append(line)
        return 0, f"submitted job {101 + len(submitted)}: 1 node", ""

    sweep: Any = SimpleNamespace(
        result=lambda run: SimpleNamespace(job=in_queue[run.name], state=None),
        arguments=lambda run, config: [run.name],
        note=lambda run, job: None,
    )
    monkeypatch.setattr(queue, "jobs_in_queue", lambda jobs, **options: dict.fromkeys(jobs, "Priority"))
    monkeypatch.setattr(queue, "_submit", submit)
    runs = [SweepRun(name=name, config="x", values={}) for name in in_queue]
    queue.Queue(sweep, [], at_once=2).submit_all(runs)
    wait = "--sbatch=--dependency=afterany:"
    assert submitted == [["c", f"{wait}99"], ["d", f"{wait}101"]]
    assert "cancel  scancel 99 101 102 103" in capsys.readouterr().out


@pytest.mark.parametrize(
    "error, submitted", [("Unable to contact slurm controller (connect failure)", 2), ("Invalid job id specified", 4)]
)
def test_no_job_is_submitted_again_unless_slurm_says_that_it_has_ended(
    case: Case,
    sbatch: Path,
    error: str,
    submitted: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    squeue = sbatch.parent / "bin" / "squeue"
    squeue.write_text(f'#!/bin/sh\necho "slurm_load_jobs error: {error}" >&2; exit 1\n')
    squeue.chmod(0o755)
    line = case.line(*VARY, "--submit", *JOB)
    assert main(line) == 0
    assert main(line) == (2 if submitted == 2 else 0)
    assert len(calls(sbatch)) == submitted
    if submitted == 2:
        assert (
            f"squeue: does not say whether the jobs 41, 42 have ended (slurm_load_jobs error: {error})"
            in capsys.readouterr().err
        )


def test_an_end_of_squeue_without_a_word_says_nothing_of_a_job(case: Case, sbatch: Path) -> None:
    """As of one that was killed."""
    squeue = sbatch.parent / "bin" / "squeue"
    squeue.write_text("#!/bin/sh\nkill -9 $$\n")
    squeue.chmod(0o755)
    line = case.line(*VARY, "--submit", *JOB)
    assert main(line) == 0
    assert main(line) == 2
    assert len(calls(sbatch)) == 2


@pytest.mark.parametrize("at_dry_run", [True, False])
def test_ctrl_c_ends_the_sweep_whichever_run_is_checked_or_submitted(
    case: Case, sbatch: Path, at_dry_run: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    met = []

    def script(args: argparse.Namespace, *rest: object) -> str:
        if args.dry_run == at_dry_run:
            met.append(args.run_dir)
            raise KeyboardInterrupt
        return "#!/bin/sh\n"

    monkeypatch.setattr(training, "_script", script)
    assert main(case.line(*VARY, "--submit", *JOB)) == INTERRUPTED
    assert len(met) == 1 and capsys.readouterr().err.endswith("interrupted\n")


def test_a_job_that_sbatch_refuses_ends_the_command_with_its_words_and_the_run(
    case: Case,
    sbatch: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (sbatch.parent / "bin" / "sbatch").write_text(
        f'#!/bin/sh\necho x >> "{sbatch}"; echo no such account >&2; exit 1\n'
    )
    assert main(case.line(*VARY, "--submit", *JOB)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: x,learning_rate=1e-3: ") and "no such account" in line
    assert line.endswith("; the same command submits the others") and sbatch.read_text() == "x\n"


def test_a_run_that_another_process_trains_is_submitted_as_no_job(
    case: Case, sbatch: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Result, "state", State.RUNNING)
    assert main(case.line("--vary", f"{RATE}=1e-3", "--submit", *JOB)) == 0
    assert "passed over: another process trains it" in capsys.readouterr().out
    assert not sbatch.exists()


def test_a_dry_run_needs_no_slurm_and_a_submission_says_so_before_all_else(
    case: Case, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(case.folder))
    assert main(case.line(*VARY, "--submit", "--dry-run", *JOB)) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if "submit.py" in line]
    assert len(lines) == 2 and all(line[-len(JOB) + 1 :] == list(JOB[1:]) for line in lines)
    assert main(case.line(*VARY, "--submit", *JOB)) == 2
    printed, said = capsys.readouterr()
    assert printed == "" and said.startswith("error: sbatch is not on the PATH") and not case.dir.exists()


def test_runs_that_have_finished_are_no_jobs_but_a_table(
    case: Case, sbatch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert case.run(*VARY) == 0
    capsys.readouterr()
    assert main(case.line(*VARY, "--submit", *JOB)) == 0
    assert capsys.readouterr().out.count(" finished ") == 2 and not sbatch.exists()


@pytest.mark.parametrize("option", queue.OWN)
def test_an_option_of_the_sweep_is_none_for_its_jobs(
    case: Case, sbatch: Path, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(case.line(*VARY, "--submit", *JOB, f"{option}=x" if option == "--job-name" else option)) == 2
    assert capsys.readouterr().err.startswith(f"error: {option}: stands behind -- and is not for every run of a sweep")


def test_an_option_that_submit_does_not_know_is_refused_for_all_runs_at_once(
    case: Case, sbatch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(case.line(*VARY, "--submit", *JOB, "--nods", "2")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: there is no option --nods; did you mean --nodes?") and line.endswith(
        "(in every run)"
    )
    assert not sbatch.exists()


def test_what_the_job_would_refuse_is_said_before_any_is_submitted(
    case: Case,
    sbatch: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ("--submit", "--", "--nodes", "3", "--cpu", "--time", "30", "--allow-local", "--cpus-per-rank", "2")
    assert main(case.line(*VARY, *options)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "batch.global_sequences" in line]
    assert line.startswith("error: batch.global_sequences: 8 is not divisible") and line.endswith("(in every run)")
    assert not sbatch.exists() and not case.dir.exists()
