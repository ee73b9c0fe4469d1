"""Submitting from wherever a user is: within another job, for a container, with variables of another run, through a
cluster's own sbatch."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from common.paths import REPOSITORY
from data_prep.run import disk_estimate
from launch.slurm import job, preparation, training
from pretrain.config.loading import load_config
from tests.launch.slurm.test_submit import TINY, calls, raw_config, submit


def test_a_job_inherits_nothing_of_the_job_around_it(
    prepared: Path, tmp_path: Path, sbatch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Submitted from a shell on a compute node. SLURM 22.05's sbatch hands all of these on, and srun in the new job
    then ends with "SLURM_MEM_PER_CPU, SLURM_MEM_PER_GPU, and SLURM_MEM_PER_NODE are mutually exclusive"."""
    record = tmp_path / "environment"
    (tmp_path / "bin" / "sbatch").write_text(f"#!/bin/sh\nenv >'{record}'\necho 41\n")

    def handed_on() -> set[str]:
        return {line.partition("=")[0] for line in record.read_text().splitlines() if line.startswith("SLURM")}

    for name in ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT", "SLURM_TIME_FORMAT"):
        monkeypatch.setenv(name, "of the cluster")
    for name in ("SLURM_MEM_PER_NODE", "SLURM_CPU_BIND", "SLURM_RESTART_COUNT", "SLURMD_NODENAME"):
        monkeypatch.setenv(name, "1")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert submit(prepared, tmp_path / "run") == 0
    assert "SLURM_CPU_BIND" in handed_on(), "outside of a job it is the user's own"
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    assert submit(prepared, tmp_path / "run") == 0
    assert handed_on() == {"SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT", "SLURM_TIME_FORMAT"}


def test_a_greeting_of_the_cluster_is_no_refusal(
    prepared: Path, tmp_path: Path, sbatch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bin" / "sbatch").write_text("#!/bin/sh\necho 'Welcome; 3 nodes are down'\necho '41;cluster'\n")
    assert submit(prepared, tmp_path / "run") == 0
    assert "submitted job 41: " in capsys.readouterr().out


def test_an_interpreter_may_be_in_the_ranks_container_alone(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ("--dry-run", "--python", "/nowhere/bin/python")
    assert submit(prepared, tmp_path / "run", *line, "--srun=--container-image=/shared/torch.sqsh") == 0
    assert "export PYTHON=/nowhere/bin/python\n" in capsys.readouterr().out
    assert submit(prepared, tmp_path / "run", *line, "--srun=--cpu-bind=none") == 2


def test_an_interpreter_that_nobody_may_execute_is_refused(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also for a container, where it has no path of the container's."""
    (tmp_path / "python").touch()
    in_container = ("--srun=--container-image=/shared/torch.sqsh",)
    for name, more in ((str(tmp_path / "python"), ()), ("no-such-python", in_container)):
        assert submit(prepared, tmp_path / "run", "--dry-run", "--python", name, *more) == 2
        assert f"error: --python: {name} cannot be executed here" in capsys.readouterr().err


def put(path: Path, content: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)


def prepare(folder: Path, *arguments: str) -> int:
    return preparation.main(["--config", str(raw_config(folder)), "--tasks", "3", "--dry-run", *arguments])


def test_a_preparation_runs_in_a_container_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ("--time", "60", "--allow-local", "--python", "/nowhere/bin/python")
    assert prepare(tmp_path, *line, "--srun=--container-image=/shared/a b.sqsh") == 0
    printed = capsys.readouterr().out
    assert printed.count("export PYTHON=/nowhere/bin/python\n") == len(preparation.STEPS)
    option = shlex.quote("'--container-image=/shared/a b.sqsh'")
    assert printed.count(f"export SRUN_OPTIONS={option}\n") == len(preparation.STEPS)
    assert prepare(tmp_path, *line) == 2
    assert prepare(tmp_path, *line[:3], "--srun=cpu-bind") == 2
    assert "error: --srun cpu-bind: write a long option of srun" in capsys.readouterr().err


def test_what_a_preparation_reads_must_be_shared_but_a_configuration_that_is_copied(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    local, shared = tmp_path / "local", tmp_path / "shared"
    monkeypatch.setattr(job, "LOCAL_FOLDERS", (str(local),))  # wherever this repository and its Python are
    monkeypatch.setattr(job, "filesystem_type", lambda path: "ext4")
    local.mkdir()
    shared.mkdir()
    raw_config(shared)
    to_output = ("--time", "60", "--set", f"output={shared / 'out'}")
    assert prepare(local, *to_output) == 2
    assert f"error: raw files: {local} is below {local}" in capsys.readouterr().err
    assert prepare(local, *to_output, "--set", f"input={shared}/raw-*.jsonl") == 0
    printed, said = capsys.readouterr()
    assert f"--config {shared}/out/slurm/config-" in printed
    for what in ("output", "the repository", "--python", "raw files"):
        assert said.count(f"warning: {what}: ") == 1, said
    put(local / "given.model", (prepared / "tokenizer.model").read_bytes())
    given = ("--set", f"tokenizer.model={local}/given.model", "--set", "tokenizer.allow_lossy=true")
    assert prepare(shared, *to_output, *given) == 2
    assert f"error: tokenizer.model: {local}/given.model is below {local}" in capsys.readouterr().err
    secret = local / "secret.json"
    secret.write_text('{"input": "pipe:cat /dev/null", "output": "%s"}' % (shared / "out"))
    assert preparation.main(["--config", str(secret), "--tasks", "1", "--dry-run", "--time", "60"]) == 2
    assert f"error: --config: {secret} is below {local}" in capsys.readouterr().err


def test_the_submitting_interpreter_is_taken_where_none_is_named(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit(prepared, tmp_path / "run", "--dry-run", "--srun=--container-image=/shared/torch.sqsh") == 0
    assert f"export PYTHON={shlex.quote(sys.executable)}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "time, given, seconds",
    [("2:00:00", (), 300), ("0:08:00", (), 240), ("0:00:01", (), 1), ("2:00:00", ("--signal-seconds", "900"), 900)],
)
def test_the_signal_comes_in_time_also_to_a_short_job(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], time: str, given: tuple[str, ...], seconds: int
) -> None:
    """Five minutes before the limit, as docs/training.md says, or when half of the time is over."""
    assert submit(prepared, tmp_path / "run", "--dry-run", "--time", time, *given) == 0
    printed = capsys.readouterr().out
    assert f"#SBATCH --signal=USR1@{seconds}\n" in printed and f"export SIGNAL_SECONDS={seconds}\n" in printed


def test_a_preparation_that_is_done_or_would_be_refused_waits_in_no_queue(
    prepared: Path, sbatch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["--config", str(prepared.parent / "data.json"), "--tasks", "1", "--time", "9", "--allow-local"]
    assert preparation.main(line) == 0
    assert capsys.readouterr().err == f"up to date: {prepared}; nothing is submitted\n"
    other = [*line, "--set", "tokenizer.vocab_size=300"]
    assert preparation.main(other) == 2
    assert f"error: {prepared} holds other data: `tokenizer.vocab_size` was 400, is now 300" in capsys.readouterr().err
    assert not sbatch.exists()
    assert preparation.main([*other, "--force", "--dry-run"]) == 0
    scripts = capsys.readouterr().out
    assert scripts.count("#!/bin/bash\n") == len(preparation.STEPS)
    assert len(re.findall(r"(?m)^set -- .* --force$", scripts)) == len(preparation.STEPS)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda out: out.touch(), "output: {out} is a file"),
        (
            lambda out: put(out / "manifest.json", b'{"name": "an app"}'),
            "{out} holds manifest.json, which no preparation",
        ),
        (lambda out: put(out / "tokenizer.model", b"somebody's"), "output: {out} holds tokenizer.model"),
        (lambda out: put(out.with_name("given.model"), b"none"), "given.model"),
        (lambda out: None, "make room, or choose another `output`"),
    ],
    ids=["output", "manifest", "files", "tokenizer", "disk"],
)
def test_what_every_job_of_a_preparation_would_refuse_waits_in_no_queue(
    tmp_path: Path,
    sbatch: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    make: Callable[[Path], None],
    words: str,
) -> None:
    out = tmp_path / "out"
    make(out)
    if "room" in words:
        monkeypatch.setattr(disk_estimate, "free_bytes", lambda folder: 0)
    given = ("--set", f"tokenizer.model={tmp_path}/given.model") if "given" in words else ()
    line = ["--config", str(raw_config(tmp_path)), "--tasks", "3", "--time", "60", "--allow-local"]
    assert preparation.main([*line, "--set", f"output={out}", *given]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and words.format(out=out) in said and not sbatch.exists()


@pytest.mark.parametrize("time, seconds", [("2:00:00", 60), ("1", 30)])
def test_a_task_of_a_preparation_is_not_ended_as_soon_as_it_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], time: str, seconds: int
) -> None:
    assert prepare(tmp_path, "--time", time, "--allow-local") == 0
    assert capsys.readouterr().out.count(f"#SBATCH --signal=TERM@{seconds}\n") == len(preparation.STEPS)


def test_data_behind_urls_lie_in_no_folder_that_nodes_must_share() -> None:
    keys = ["data.manifest=https://example.org/c4", "data.cache_dir=/cache"]
    assert training._future_data(load_config(Path(TINY), keys)) == []
    assert training._future_data(load_config(Path(TINY), ["data.manifest=/shared/c4"])) == [Path("/shared/c4")]


def test_data_to_come_are_looked_for_where_a_start_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the current folder, then in the repository."""
    monkeypatch.chdir(tmp_path)
    config = load_config(Path(TINY), ["data.manifest=configs"])
    assert training._future_data(config) == [REPOSITORY / "configs"]
    (tmp_path / "configs").mkdir()
    assert training._future_data(config) == [tmp_path / "configs"]


@pytest.mark.parametrize("where, device", [(("--cpu",), "cpu"), (("--gpus-per-node", "2"), "cuda")])
def test_the_job_computes_where_it_was_submitted_for(
    prepared: Path,
    tmp_path: Path,
    sbatch: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: tuple[str, ...],
    device: str,
) -> None:
    """With train.device=auto the variable decides: the shell's would train on the CPUs of GPU nodes, and without one a
    node with a driver and no GPU for the job refuses to train on its CPUs."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert submit(prepared, tmp_path / "run", where=where) == 0
    [[_, path]] = calls(sbatch)
    text = Path(path).read_text().partition("\nset -- ")[0]
    assert f"export DS_ACCELERATOR={device}\n" in text
    assert ("#SBATCH --gpus-per-node=2\n" in text) == (device == "cuda")
    assert submit(prepared, tmp_path / "run", "--env", "DS_ACCELERATOR=mine", where=where) == 0
    assert "export DS_ACCELERATOR=mine\n" in Path(calls(sbatch)[1][1]).read_text(), "what is asked for by name"


def test_a_node_may_have_other_ranks_than_gpus(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ("--gpus-per-node", "4", "--ranks-per-node", "2", "--sbatch=--gpus=8")
    assert submit(prepared, tmp_path / "run", "--dry-run", where=where) == 0
    printed = capsys.readouterr().out
    for option in ("ntasks-per-node=2", "gpus-per-node=4", "gpus=8"):
        assert f"#SBATCH --{option}\n" in printed


@pytest.mark.parametrize(
    "where, wanted, fix",
    [
        (("--cpu",), "cuda", "but the job is for cpu; remove --cpu, or --set train.device=cpu"),
        (("--gpus-per-node", "2"), "cpu", "but the job is for cuda; add --cpu, or --set train.device=cuda"),
    ],
)
def test_a_device_that_the_job_has_not_is_refused(
    prepared: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    where: tuple[str, ...],
    wanted: str,
    fix: str,
) -> None:
    assert submit(prepared, tmp_path / "run", "--dry-run", "--set", f"train.device={wanted}", where=where) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"error: train.device: is {wanted}, {fix}"


@pytest.mark.parametrize(
    "given, warns",
    [
        ((), True),
        (("--sbatch=--mem=0",), True),
        (("--cpus-per-rank", "4"), False),
        (("--sbatch=--cpus-per-task=4",), False),
        (("--sbatch=--cpus-per-gpu=4",), False),
        (("--sbatch=--exclusive",), False),
    ],
)
def test_ranks_of_one_core_are_warned_of(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], given: tuple[str, ...], warns: bool
) -> None:
    assert submit(prepared, tmp_path / "run", "--dry-run", *given) == 0
    assert ("warning: --cpus-per-rank: is not given" in capsys.readouterr().err) == warns


def test_what_a_run_reads_and_writes_must_be_shared(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Unless it is in the container."""
    monkeypatch.setattr(job, "LOCAL_FOLDERS", ())
    monkeypatch.setattr(job, "filesystem_type", lambda path: "ext4")
    line = ["--config", TINY, "--nodes", "2", "--time", "30", "--cpu", "--dry-run", "--run-dir", str(tmp_path / "run")]
    line += ["--set", f"data.manifest={prepared}"]
    assert training.main(line) == 0
    said = capsys.readouterr().err
    for what in ("--run-dir", "the repository", "--python", "data"):
        assert said.count(f"warning: {what}: ") == 1, said
    container = ("--python", "/nowhere/bin/python", "--srun=--container-image=/shared/torch.sqsh")
    assert training.main([*line, *container]) == 0
    assert "--python: " not in capsys.readouterr().err


@pytest.mark.parametrize(
    "script, names",
    [("pretrain", {"REQUEUES", "FAULTS", "REPEATS", "EXCLUDES", "SIGNAL_SECONDS"}), ("data_prep", {"REQUEUES"})],
)
def test_a_job_that_is_submitted_by_hand_has_the_same_settings(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], script: str, names: set[str]
) -> None:
    """Those that the script has where nothing is exported."""
    own = dict(re.findall(r"(?m)^([A-Z_]+)=\$\{\1:-([0-9]+)\}", job.Template.load(f"{script}.sbatch").body))
    if script == "pretrain":
        assert submit(prepared, tmp_path / "run", "--dry-run", "--time", "2:00:00") == 0
    else:
        assert prepare(tmp_path, "--time", "60", "--allow-local") == 0
    printed = capsys.readouterr().out
    exported = dict(re.findall(r"(?m)^export ([A-Z_]+)=([0-9]+)$", printed))
    assert {name: own[name] for name in names} == {name: exported[name] for name in names}
    if script == "data_prep":
        cpus = job.Template.load("data_prep.sbatch").options["cpus-per-task"]
        assert printed.count(f"#SBATCH --cpus-per-task={cpus}\n") == len(preparation.STEPS)


def test_a_run_folder_that_keeps_no_note_of_the_job_is_submitted_all_the_same(
    prepared: Path,
    tmp_path: Path,
    sbatch: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The job is in the queue already, and its user needs its number."""

    def full(run_dir: Path, number: str) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(training, "mark_submitted", full)
    assert submit(prepared, tmp_path / "run") == 0
    assert "submitted job 41: " in capsys.readouterr().out
