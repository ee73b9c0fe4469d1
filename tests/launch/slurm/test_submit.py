"""Submitting: what is refused before a node is taken, what the printed script holds, what sbatch is given."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from common.paths import REPOSITORY
from launch.slurm import job, preparation, training
from pretrain.views.jobs import submitted_jobs
from tests.launch.test_entry_points import start

TINY = str(REPOSITORY / "configs" / "switchall_tiny.json")


def submit(prepared: Path, run_dir: Path, *arguments: str, where: tuple[str, ...] = ("--cpu",)) -> int:
    line = ["--config", TINY, "--nodes", "2", "--time", "30", "--set", f"data.manifest={prepared}", *where]
    return training.main([*line, "--run-dir", str(run_dir), "--allow-local", *arguments])


def calls(record: Path) -> list[list[str]]:
    return [json.loads(line) for line in record.read_text().splitlines()]


@pytest.mark.parametrize("script", ["submit.py", "submit_data_prep.py"])
def test_help_from_another_directory(script: str, tmp_path: Path) -> None:
    done = start(str(job.FOLDER / script), "--help", cwd=tmp_path)
    assert done.returncode == 0 and "usage: launch/slurm/" in done.stdout, done.stderr


def test_dry_run_prints_a_script_and_writes_nothing(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """From another directory; bash accepts what it prints. (The test above starts it as a user does.)"""
    run_dir = tmp_path / "my runs" / "one"
    monkeypatch.chdir(tmp_path)
    arguments = (
        *("--config", TINY, "--nodes", "2", "--cpu", "--ranks-per-node", "4", "--cpus-per-rank", "3", "--time", "1-12"),
        *("--partition", "gpu", "--account", "me", "--set", f"data.manifest={prepared}", "--set", "train.steps=50"),
        *("--set", "batch.micro_sequences=4"),
        *("--run-dir", str(run_dir), "--allow-local", "--setup", "module load cuda", "--dry-run"),
        *("--qos", "high", "--requeues", "7", "--faults", "2", "--repeats", "0", "--excludes", "4"),
    )
    assert training.main([*arguments]) == 0
    printed, said = capfd.readouterr()
    for line in (
        "#SBATCH --job-name=one",
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=4",
        "#SBATCH --cpus-per-task=3",
        "#SBATCH --time=1-12",
        "#SBATCH --signal=USR1@300",
        "#SBATCH --requeue",
        "#SBATCH --open-mode=append",
        "#SBATCH --partition=gpu",
        "#SBATCH --account=me",
        "#SBATCH --qos=high",
        "export REQUEUES=7",
        "export FAULTS=2",
        "export REPEATS=0",
        "export EXCLUDES=4",
        f'#SBATCH --output="{run_dir}/slurm/%j.log"',
        f"#SBATCH --chdir={tmp_path}",
        f"export RUN_DIR='{run_dir}'",
        "export SIGNAL_SECONDS=300",
        "module load cuda",
    ):
        assert f"{line}\n" in printed, line
    assert "#SBATCH --gpus-per-node" not in printed
    assert "parameters, total" in said and re.search(r"data-parallel size +8 ", said)
    config = re.search(r" (\S+/config-\w+\.json)", printed)
    assert config and "note: nothing is submitted; the script reads a copy" in said and config[1] in said
    subprocess.run(["bash", "-n"], input=printed, text=True, check=True)
    assert not list(tmp_path.iterdir()), "a dry run wrote something"


def test_a_submission_keeps_its_own_copy_of_the_config(
    prepared: Path, tmp_path: Path, sbatch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "a run"
    assert submit(prepared, run_dir, "--sbatch=--mail-type=END,FAIL") == 0
    [[parsable, path]] = calls(sbatch)
    assert parsable == "--parsable" and Path(path).parent == run_dir / "slurm"
    text = Path(path).read_text()
    assert "#SBATCH --mail-type=END,FAIL\n" in text
    [copy] = (run_dir / "slurm").glob("config-*.json")
    assert str(copy) in text and copy.read_bytes() == Path(TINY).read_bytes()
    output = capsys.readouterr().out
    assert "submitted job 41: 2 nodes x 1 rank," in output and "  cancel     scancel 41\n" in output
    # As docs/operations.md says it: told to stop, but not to be requeued.
    assert f"tail -F '{run_dir}/slurm/41.log' '{run_dir}/slurm/41.rank0.log'\n" in output
    assert "save, stop scontrol update JobId=41 Requeue=0 && scancel --signal=USR1 41\n" in output


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--nodes", "3"], "batch.global_sequences: 32 is not divisible by batch.micro_sequences x DP = 8 x 3"),
        (["--set", "train.stepz=3"], "train.stepz: unknown key"),
        (["--set", "data.manifest=nowhere"], "data.manifest: there is no"),
        (["--set", "train.precision=fp16"], "train.precision: fp16 needs CUDA"),
        (["--time", "soon"], "--time soon: write minutes"),
        (["--time", "1", "--signal-seconds", "60"], "--signal-seconds 60: must be below --time (60 s)"),
        (["--env", "1A=b"], "--env 1A=b: write it as NAME=VALUE"),
        (["--env", "HF_TOKEN=hf_x"], "--env HF_TOKEN: looks like a secret"),
        (["--env", "HF_TOKEN_2=hf_x"], "--env HF_TOKEN_2: looks like a secret"),
        (["--env", "GCP_CREDENTIALS=hf_x"], "--env GCP_CREDENTIALS: looks like a secret"),
        (["--env", "PROXY=http://me:word@proxy"], "--env PROXY: looks like a secret"),
        (["--sbatch", "gres=gpu:8"], "--sbatch gres=gpu:8: write a long option"),
        (["--sbatch=--nodes=4"], "--sbatch=--nodes=4: --nodes follows from this command's own options"),
        (["--sbatch=--time=9"], "--sbatch=--time=9: --time follows from"),
        (["--sbatch=--array=0-3"], "--sbatch=--array=0-3: each of its tasks would be a job that does the same again"),
        (["--sbatch=--ntasks=8"], "--sbatch=--ntasks=8: how many processes a node starts follows from"),
        (["--sbatch=--tasks-per-node=8"], "--sbatch=--tasks-per-node=8: how many processes a node starts follows from"),
        (["--sbatch=--distribution=cyclic"], "srun places the ranks, and would not follow it; --srun=--distribution"),
        (["--sbatch=--dist=cyclic"], "--sbatch=--dist=cyclic: sbatch may take --dist for --distribution, which is"),
        (["--sbatch=--tim=9"], "--sbatch=--tim=9: sbatch may take --tim for --time, which is refused here; write the"),
        (["--after=7", "--sbatch=--dependency=singleton"], "--sbatch=--dependency=singleton: --after 7 is such a"),
        (["--after=7", "--sbatch=--depend=singleton"], "--sbatch=--depend=singleton: --after 7 is such a"),
        (["--job-name", "a\n#SBATCH --uid=0"], "cannot stand in a job script"),
        (["--set", "description=a\nb"], "cannot stand in a job script"),
        (["--python", "/nowhere/python"], "--python: /nowhere/python cannot be executed"),
    ],
)
def test_refusals(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert submit(prepared, tmp_path / "run", "--dry-run", *arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and words in error
    assert "hf_x" not in error and "word@" not in error
    assert not (tmp_path / "run").exists()


def test_all_that_is_wrong_with_a_configuration_is_said_at_once(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = ("train.stepz=3", "batch.size=8", "parallel.tensor=3", "batch.micro_sequences=5")
    assert submit(prepared, tmp_path / "run", "--dry-run", *(part for key in keys for part in ("--set", key))) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert [line.split()[1] for line in errors] == [
        *("batch.size:", "train.stepz:", "parallel.tensor:", "batch.global_sequences:")
    ]


def test_fp16_is_judged_for_the_nodes_not_for_the_login_node(prepared: Path, tmp_path: Path) -> None:
    gpus = ("--gpus-per-node", "2")
    assert submit(prepared, tmp_path, "--dry-run", "--set", "train.precision=fp16", where=gpus) == 0


def test_without_gpus_a_submission_says_cpu(
    prepared: Path, tmp_path: Path, sbatch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A forgotten --gpus-per-node would take nodes for a night of training on their CPUs."""
    assert submit(prepared, tmp_path / "run", where=()) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == (
        "error: --gpus-per-node: is not given, so the run would get no GPU; add --gpus-per-node N, or --cpu if it is "
        "to train on CPUs"
    )
    assert not sbatch.exists() and not (tmp_path / "run").exists()
    for both in (("--cpu", "--gpus-per-node", "2"), ("--gpus-per-node", "0"), ("--cpu", "--faults", "0")):
        with pytest.raises(SystemExit) as refused:
            submit(prepared, tmp_path / "run", where=both)
        assert refused.value.code == 2
    assert not sbatch.exists()


@pytest.mark.parametrize(
    "option",
    ["--gres=gpu:4", "--gres=nvme:1,gpu:h100:4", "--gpus=8", "--gpus-per-task=1", "--tres-per-task=cpu:6,gres/gpu:1"],
)
def test_gpus_may_be_asked_for_in_sbatchs_own_words(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    """The run is then checked for GPUs: fp16, which CPUs refuse, passes."""
    line = (f"--sbatch={option}", "--set", "train.precision=fp16", "--set", "batch.micro_sequences=4", "--dry-run")
    assert submit(prepared, tmp_path / "run", *line, where=("--ranks-per-node", "4")) == 0
    script = capsys.readouterr().out
    assert f"#SBATCH {option}\n" in script and "#SBATCH --ntasks-per-node=4\n" in script
    for where, words in (
        ((), f"--ranks-per-node: is not given, and --sbatch={option} does not say it; add --ranks-per-node N"),
        (("--cpu",), f"--sbatch={option}: asks for GPUs, and --cpu for a run on CPUs; remove one of the two"),
    ):
        assert submit(prepared, tmp_path / "run", *line, where=where) == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {words}")


@pytest.mark.parametrize("option", ["--gres=nvme:1", "--gpu-bind=closest", "--constraint=gpu", "--exclusive"])
def test_other_options_of_sbatch_ask_for_no_gpu(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    assert submit(prepared, tmp_path / "run", f"--sbatch={option}", "--dry-run", where=()) == 2
    assert "--gpus-per-node: is not given, so the run would get no GPU" in capsys.readouterr().err
    assert submit(prepared, tmp_path / "run", f"--sbatch={option}", "--dry-run") == 0


def test_training_waits_for_its_data(tmp_path: Path, sbatch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--after: submitted while there are no data yet, behind the job that makes them; what can be checked is."""
    future = tmp_path / "data to come"
    assert submit(future, tmp_path / "run", "--after", "44") == 0
    [call] = calls(sbatch)
    assert call[:-1] == ["--parsable", "--dependency=afterok:44", "--kill-on-invalid-dep=yes"]
    text = Path(call[-1]).read_text()
    assert "dependency" not in text, "submitted by hand later, the script must not wait for a job that is gone"
    error = capsys.readouterr().err
    assert f"--after 44: data ({future}) and an earlier checkpoint are checked when the job starts, not now" in error
    for wrong, words in (
        (["--nodes", "3"], "batch.global_sequences: 32 is not divisible"),
        (["--set", "train.precision=fp16"], "train.precision: fp16 needs CUDA"),
        (["--set", "optimizer.groups.feedforward.weight_decay=1"], "optimizer.groups.feedforward.weight_decay: this"),
    ):
        assert submit(future, tmp_path / "run", "--after", "44", *wrong) == 2
        assert words in capsys.readouterr().err.splitlines()[-1]
    assert len(calls(sbatch)) == 1
    (tmp_path / "bin" / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: Job dependency problem' >&2; exit 1\n")
    assert submit(future, tmp_path / "run", "--after", "44") == 2
    assert "has ended well and is forgotten, leave --after out" in capsys.readouterr().err


def test_a_smoke_test_runs_another_program_and_never_again(
    prepared: Path, tmp_path: Path, sbatch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit(prepared, tmp_path / "run", "--smoke") == 0
    [[_, path]] = calls(sbatch)
    text = Path(path).read_text()
    assert Path(path).name.startswith("smoke-") and "#SBATCH --job-name=run-smoke\n" in text
    assert "export PROGRAM=smoke.py\n" in text and "export REQUEUES=0\n" in text
    assert "  verdict    grep smoke: " in capsys.readouterr().out
    assert submit(prepared, tmp_path / "run") == 0
    text = Path(calls(sbatch)[1][1]).read_text()
    assert "export PROGRAM" not in text and "export REQUEUES=100\n" in text
    assert submitted_jobs(tmp_path / "run") == ["42"], "the job that will train, and not the one that tests"


def test_data_to_come_must_be_shared_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    local = tmp_path / "local"
    monkeypatch.setattr(job, "LOCAL_FOLDERS", (str(local),))  # wherever this repository and its Python are
    monkeypatch.setattr(job, "filesystem_type", lambda path: "ext4")
    line = ["--config", TINY, "--nodes", "2", "--time", "30", "--cpu", "--after", "44", "--dry-run"]
    line += ["--run-dir", str(REPOSITORY / "runs" / "one"), "--set", f"data.manifest={local / 'data'}"]
    assert training.main(line) == 2
    assert f"error: data: {local / 'data'} is below {local}" in capsys.readouterr().err


def test_without_sbatch_the_message_says_where_to_go(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert submit(prepared, tmp_path / "run") == 2
    assert "sbatch is not on the PATH: run this on a login node" in capsys.readouterr().err


def test_sbatchs_own_refusal_is_passed_on(
    prepared: Path, tmp_path: Path, sbatch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bin" / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid partition: x' >&2; exit 1\n")
    assert submit(prepared, tmp_path / "run") == 2
    assert "error: sbatch refused the job: sbatch: error: invalid partition: x" in capsys.readouterr().err


def raw_config(folder: Path) -> Path:
    for number in range(3):
        (folder / f"raw-{number}.jsonl").write_text('{"text": "one"}\n')
    config = folder / "data.json"
    config.write_text(json.dumps({"input": str(folder / "raw-*.jsonl"), "output": str(folder / "out put")}))
    return config


def test_data_preparation_is_four_jobs_in_a_row(
    tmp_path: Path, sbatch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = raw_config(tmp_path)
    line = ["--config", str(config), "--tasks", "3", "--time", "60", "--cpus-per-task", "2", "--allow-local"]
    assert preparation.main([*line, "--requeues", "2", "--env", "TMPDIR=/scratch"]) == 0
    submitted = calls(sbatch)
    assert [call[:-1] for call in submitted] == [
        ["--parsable"],
        *(["--parsable", f"--dependency=afterok:{n}", "--kill-on-invalid-dep=yes"] for n in (41, 42, 43)),
    ]
    texts = [Path(call[-1]).read_text() for call in submitted]
    # The user's file may be edited, or be gone, before the last job begins.
    (copy,) = (tmp_path / "out put" / "slurm").glob("config-*.json")
    assert copy.read_bytes() == config.read_bytes()
    for text, (step, is_array) in zip(texts, preparation.STEPS, strict=True):
        assert "export REQUEUES=2\n" in text and "CONFIG_SUM=" not in text.partition("\nset -- ")[0]
        assert "export TMPDIR=/scratch\n" in text and "#SBATCH --cpus-per-task=2\n" in text
        place = f"--config '{copy}' --set 'output={tmp_path}/out put'"
        assert f"set -- {step} {place}\n" in text
        assert ("#SBATCH --array=0-2\n" in text) == is_array == ("export TASKS=3\n" in text)
        pattern = "%A_%a" if is_array else "%j"
        assert f'#SBATCH --output="{tmp_path}/out put/slurm/{pattern}.log"\n' in text
    said = capsys.readouterr()
    assert said.err == "", "that they are submitted is no error"
    chain = re.search(r"^  train +python (\S+) (.*)$", said.out, re.MULTILINE)
    assert chain is not None and (REPOSITORY / chain[1]).is_file()
    assert chain[2].endswith(f"--set 'data.manifest={tmp_path}/out put' --after 44")


def test_an_output_that_the_command_line_gives_is_handed_on_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = raw_config(tmp_path)
    line = ["--config", str(config), "--tasks", "3", "--time", "60", "--allow-local", "--dry-run"]
    overrides = ["--set", "workers=1", "--set", f"output={tmp_path}/else"]
    assert preparation.main([*line, *overrides]) == 0
    printed, said = capsys.readouterr()
    assert said.count("note: nothing is submitted") == 1
    given = [text for text in printed.splitlines() if text.startswith("set -- ")]
    assert len(given) == 4 and all(text.endswith(f"--set workers=1 --set output={tmp_path}/else") for text in given)


def test_a_preparation_whose_file_may_hold_a_secret_is_not_copied_and_must_stay_as_it_is(
    tmp_path: Path, sbatch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "data.json"
    config.write_text('{"input": "pipe:cat \\/dev\\/null # s3cret", "output": "%s"}' % (tmp_path / "out"))
    line = ["--config", str(config), "--tasks", "1", "--time", "60", "--allow-local"]
    assert preparation.main(line) == 0
    said = capsys.readouterr().err
    assert said.startswith(f"note: {config} may hold a secret") and "leave it as it is until they have ended" in said
    sha256 = hashlib.sha256(config.read_bytes()).hexdigest()
    for call in calls(sbatch):
        text = Path(call[-1]).read_text()
        assert f"export CONFIG_SUM='{sha256}  {config}'\n" in text and f" --config {config} " in text
    assert not [
        path for path in tmp_path.rglob("*") if path != config and path.is_file() and b"s3cret" in path.read_bytes()
    ]


def test_what_was_submitted_before_an_interruption_is_said(
    tmp_path: Path, sbatch: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C ended it with a traceback, and left two jobs in the queue that nobody named."""
    submit_job = job.submit

    def interrupted(path: Path, *arguments: str) -> str:
        if path.name.startswith("encode"):
            raise KeyboardInterrupt
        return submit_job(path, *arguments)

    monkeypatch.setattr(job, "submit", interrupted)
    line = ["--config", str(raw_config(tmp_path)), "--tasks", "3", "--time", "60", "--allow-local"]
    assert preparation.main(line) == 130
    assert capsys.readouterr().err.splitlines()[-2:] == ["interrupted", "already submitted: 41 42; cancel with scancel"]


def test_a_printed_script_may_be_read_in_part(prepared: Path, tmp_path: Path) -> None:
    """`--dry-run | head -1`."""
    of_data = ["submit_data_prep.py", "--config", str(raw_config(tmp_path)), "--tasks", "1"]
    of_run = ["submit.py", "--config", TINY, "--nodes", "1", "--cpu", "--cpus-per-rank", "1"]
    of_run += ["--set", f"data.manifest={prepared}", "--run-dir", str(tmp_path / "run")]
    for script, *arguments in (of_data, of_run):
        reader, writer = os.pipe()
        os.close(reader)
        line = [sys.executable, str(job.FOLDER / script), *arguments, "--time", "60", "--allow-local", "--dry-run"]
        done = subprocess.run(line, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
        os.close(writer)
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr


def test_more_tasks_than_raw_files_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["--config", str(raw_config(tmp_path)), "--tasks", "4", "--time", "60", "--allow-local", "--dry-run"]
    assert preparation.main(line) == 2
    assert "--tasks 4: there are 3 raw files" in capsys.readouterr().err


def test_the_configuration_of_a_run_submits_that_run(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "night"
    (run_dir / "checkpoints").mkdir(parents=True)
    config = json.loads(Path(TINY).read_text())
    (run_dir / "config.json").write_text(json.dumps({**config, "data": {"manifest": str(prepared)}}))
    line = ["--config", str(run_dir), "--nodes", "1", "--time", "1:00:00", "--cpu", "--allow-local", "--dry-run"]
    assert training.main(line) == 0
    assert f"RUN_DIR={run_dir}\n" in capsys.readouterr().out
    assert training.main([*line, "--run-dir", ""]) == 2
    assert capsys.readouterr().err.startswith("error: --run-dir: is empty")


@pytest.mark.parametrize(
    "value",
    [
        "pipe:curl https://me:s3cret@host/a?sig=s3cret",
        "https://me:s3cret@host/a.jsonl",
        '["raw/*.gz", "https://host/a.jsonl?sig=s3cret"]',
        'pipe:curl -H "Authorization: s3cret" host/a',
    ],
)
def test_no_secret_of_an_override_is_written_to_a_job_script(
    value: str, tmp_path: Path, sbatch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "data.json"
    config.write_text(json.dumps({"input": "raw/*.gz", "output": str(tmp_path / "out")}))
    line = ["--config", str(config), "--tasks", "1", "--time", "10", "--allow-local", "--set", f"input={value}"]
    assert preparation.main(line) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: --set input: a command, and a URL with") and "s3cret" not in said
    assert not sbatch.exists() and sorted(p.name for p in tmp_path.iterdir()) == ["bin", "data.json"]
