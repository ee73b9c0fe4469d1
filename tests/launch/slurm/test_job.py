"""Pieces of launch/slurm/job.py: folders that nodes share, what sbatch reads, and time limits."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from common.errors import UserError
from launch.slurm import job, preparation, training

MOUNTS = """\
overlay / overlay rw 0 0
tmpfs /dev/shm tmpfs rw 0 0
server:/home /home nfs4 rw 0 0
scratch /scratch\\040space lustre rw 0 0
/dev/sdb1 /home/local ext4 rw 0 0
gcs /data fuse.gcsfuse rw 0 0
server:/big /var/tmp nfs4 rw 0 0
tmpfs /fast tmpfs rw 0 0
"""


def test_which_folders_the_nodes_share(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {
        "/home/me/runs": "nfs4",
        "/homework": "overlay",
        "/home/local/x": "ext4",
        "/scratch space/a": "lustre",
        "/data/a": "fuse.gcsfuse",
        "/dev/shm/x": "tmpfs",
    }
    assert {path: job.filesystem_type(Path(path), MOUNTS) for path in kinds} == kinds
    of_host = job.filesystem_type
    monkeypatch.setattr(job, "filesystem_type", lambda path: of_host(path, MOUNTS))
    for shared in ("/home/me/runs", "/scratch space/a", "/data/a", "/var/tmp/x"):
        assert job.check_shared("--run-dir", Path(shared), allow_local=False) is None
    for unknown in ("/homework", "/home/local/x"):
        assert "make sure that every node sees it" in str(
            job.check_shared("--run-dir", Path(unknown), allow_local=False)
        )
    for local in ("/dev/shm/x", "/tmp/x", "/fast/x"):
        with pytest.raises(UserError, match=r"--run-dir: .* do not share; name a folder on a shared file system"):
            job.check_shared("--run-dir", Path(local), allow_local=False)
        assert job.check_shared("--run-dir", Path(local), allow_local=True) is None


@pytest.mark.parametrize(
    "value, written",
    [("a+b,c[1-3]", "a+b,c[1-3]"), ("two words", '"two words"'), (r'a "b\c', r'"a \"b\\c"')],
)
def test_values_are_quoted_for_sbatchs_own_parser(value: str, written: str) -> None:
    template = job.Template(options={"comment": "none"}, body="")
    text = job.script(template, options={"comment": value}, more_options=[], settings={}, setup=[], arguments=["x"])
    assert text.splitlines()[1] == f"#SBATCH --comment={written}"


@pytest.mark.parametrize("value", ["a\nb", "a\rb", "a\x1b[2Kb", "a\x00b"])
def test_what_steers_a_terminal_or_ends_a_line_stands_in_no_script(value: str) -> None:
    template = job.Template(options={}, body="")
    for options, settings, arguments in (({"comment": value}, {}, []), ({}, {"A": value}, []), ({}, {}, [value])):
        with pytest.raises(UserError, match="cannot stand in a job script"):
            job.script(template, options=options, more_options=[], settings=settings, setup=[], arguments=arguments)


@pytest.mark.parametrize(
    "says, words",
    [
        ("echo 41; echo 'no such account' >&2; exit 1", "sbatch refused the job: no such account "),
        ("echo 'thank you'", "sbatch refused the job: thank you "),
    ],
)
def test_a_job_has_a_number_and_an_sbatch_that_did_not_fail(sbatch: Path, says: str, words: str) -> None:
    (sbatch.parent / "bin" / "sbatch").write_text(f"#!/bin/sh\n{says}\n")
    with pytest.raises(UserError) as refused:
        job.submit(sbatch.parent / "a.sbatch")
    assert str(refused.value) == f"{words}(script: {sbatch.parent}/a.sbatch)"


def test_a_controller_that_does_not_answer_is_said(sbatch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hangs(line: list[str], *, timeout: float, **options: object) -> None:
        raise subprocess.TimeoutExpired(line, timeout)

    monkeypatch.setattr(subprocess, "run", hangs)
    with pytest.raises(UserError, match=r"^sbatch gave no answer within 120 s; is the controller up"):
        job.submit(sbatch.parent / "a.sbatch")


def test_a_percent_sign_in_a_folder_begins_no_pattern() -> None:
    assert job.output_pattern(Path("/runs/90%/a")) == "/runs/90%%/a"
    with pytest.raises(UserError, match="holds a backslash"):
        job.output_pattern(Path(r"/runs/a\b"))


@pytest.mark.parametrize(
    "text, seconds",
    [("90", 5400), ("1:30", 90), ("2:00:01", 7201), ("1-2", 93600), ("1-2:03", 93780), ("1-02:03:04", 93784)],
)
def test_time_limits_as_slurm_writes_them(text: str, seconds: int) -> None:
    assert job.seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["soon", "", "1:2:3:4", "9" * 5000])
def test_a_time_limit_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"^--time .*: write minutes") as refused:
        job.seconds_of(text)
    assert len(str(refused.value)) < 200


@pytest.mark.parametrize(
    "given, words",
    [
        (["--mem=64G"], "--mem; --sbatch=--mem=64G hands it on to sbatch"),
        (["--mem", "64G"], "--mem; --sbatch=--mem=... hands it on to sbatch"),
        (["--sbatch", "--exclusive"], "--exclusive; --sbatch=--exclusive hands it on to sbatch"),
        (["--partitio=gpu"], "--partitio; did you mean --partition?"),
    ],
)
@pytest.mark.parametrize("command", [training, preparation])
def test_an_option_of_sbatch_alone_is_named_with_what_hands_it_on(
    command: ModuleType, given: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--mem` was taken for a misspelled `--time`."""
    with pytest.raises(SystemExit):
        command.main(["--config", "a", *given])
    assert f"error: there is no option {words} (see " in capsys.readouterr().err
