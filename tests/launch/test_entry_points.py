"""The entry points as a user starts them: from another directory, dry runs, refusals before anything is allocated.

Every entry point starts once as a process of its own, and launch/pretrain.py also trains, resumes and refuses as one.
What is only a matter of `main` calls `main`: a process imports torch for seconds before it says anything."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from pretrain import gpus
from pretrain.cli.train import main
from pretrain.config.schema import Config
from pretrain.report import memory_text
from pretrain.report.exit_codes import ExitCode
from pretrain.report.startup import DerivedValue

ROOT = Path(__file__).resolve().parents[2]
DRY = ("--dry-run", "--no-step")
"""Steps are rehearsed in tests/pretrain/preflight."""
TINY = str(ROOT / "configs" / "switchall_tiny.json")


@pytest.fixture
def roomy_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for two checkpoints of a billion parameters, whatever this machine has left: a run without is refused."""
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1 << 40, 0, 1 << 40))


def start(
    *arguments: str, cwd: Path, timeout: float = 600, stdout: int = subprocess.PIPE, stderr: int = subprocess.PIPE
) -> subprocess.CompletedProcess[str]:
    """Runs an entry point as a user would: no variable of the test session, another working directory."""
    clean = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "DS_ACCELERATOR", "PYTHONPATH")}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=clean,
        stdout=stdout,
        stderr=stderr,
        text=True,
        timeout=timeout,
        check=False,
    )


def broken_pipe() -> int:
    """A descriptor whose reader has left, as behind `| head`."""
    read, write = os.pipe()
    os.close(read)
    return write


@pytest.mark.parametrize("script", sorted(p.name for p in (ROOT / "launch").glob("[!_]*.py")))
def test_help_from_another_directory(script: str, tmp_path: Path) -> None:
    done = start(str(ROOT / "launch" / script), "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout


def test_what_only_reads_settings_imports_no_torch() -> None:
    """Which takes seconds: --help and what is refused need none."""
    modules = ("pretrain.cli.train", "pretrain.cli.plan_check", "launch.slurm.training", "launch.sweeps.command")
    done = start("-c", f"import sys, {', '.join(modules)}; assert 'torch' not in sys.modules", cwd=ROOT)
    assert done.returncode == 0, done.stderr


INTERRUPTED = """
import os, runpy, signal, sys
class Finder:
    def find_spec(name, *others):
        if "common.interruption" in sys.modules and name.partition(".")[0] != "common":
            sys.meta_path.remove(Finder)
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder)
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv, sys.path[0] = sys.argv[1:], os.path.dirname(sys.argv[1])
if sys.argv[0] == "data_prep":
    runpy.run_module("data_prep", run_name="__main__")
else:
    runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Runs a script, or `python -m data_prep`, and sends it a SIGINT at the first import that may take long."""
ENTRY_POINTS = [
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.py", "slurm/*.py")
    for path in (ROOT / "launch").glob(pattern)
    if "\nsys.path[0] = " in path.read_text()  # launch/console_scripts.py imports nothing of the project
]


@pytest.mark.parametrize("script", [*sorted(ENTRY_POINTS), "data_prep"])
def test_ctrl_c_while_imports_run_is_one_line(script: str) -> None:
    assert len(ENTRY_POINTS) >= 15
    done = start("-c", INTERRUPTED, script, cwd=ROOT)
    assert (done.returncode, done.stderr, done.stdout) == (130, "interrupted\n", "")


LOST = """
import common.interruption, signal, time, weakref
class Thing: pass
thing = Thing()
reference = weakref.ref(thing, lambda dead: signal.raise_signal(signal.SIGINT))
signal.signal(signal.SIGINT, signal.default_int_handler)
del thing
time.sleep(3600)
"""
"""A SIGINT while Python calls back from C, where it drops every exception."""


def test_ctrl_c_that_python_drops_comes_again() -> None:
    done = start("-c", LOST, cwd=ROOT)
    assert (done.returncode, done.stderr, done.stdout) == (130, "interrupted\n", "")


def test_another_exception_that_python_drops_is_still_shown() -> None:
    done = start("-c", LOST.replace("signal.raise_signal(signal.SIGINT)", "1 / 0").replace("3600", "0"), cwd=ROOT)
    assert done.returncode == 0
    assert done.stderr.startswith("Exception ignored ") and "ZeroDivisionError" in done.stderr


def test_another_exception_that_nothing_handles_keeps_its_traceback() -> None:
    done = start("-c", "import common.interruption; raise ValueError('a')", cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback ") and done.stderr.endswith("ValueError: a\n")


def arguments_for(config: str, prepared: Path, *more: str) -> list[str]:
    """Of launch/pretrain.py, with a file of configs/."""
    return ["--config", str(ROOT / "configs" / config), "--set", f"data.manifest={prepared}", *more]


def test_dry_run_prints_the_resolved_tree_and_derived_values(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments_for("switchall_tiny.json", prepared, *DRY, "--ranks", "4")) == 0
    printed = capsys.readouterr().out
    tree, end = json.JSONDecoder().raw_decode(printed)
    assert tree["data"]["manifest"] == str(prepared)
    for words in ("parameters, total", "parameters, active", "micro-steps", "unused vocabulary rows"):
        assert words in printed[end:]
    checks = [line for line in printed.splitlines() if line.startswith(("  ok ", "  warning "))]
    assert printed.splitlines()[-1] == f"all {len(checks)} checks passed; nothing was written"
    assert not list(tmp_path.iterdir()), "a dry run wrote something"


def test_a_dry_run_says_what_fits_a_device(
    prepared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the size that is given, or of this machine's GPU; without either nothing is estimated."""

    def rows(config: Config, data_size: int, device: str, capacity: int) -> list[DerivedValue]:
        return [DerivedValue("largest micro-batch", "2", f"{data_size} ranks, {device}, {capacity} bytes")]

    monkeypatch.setattr(memory_text, "memory_rows", rows)
    for more, gpu, said in (
        (["--device-memory", "1.5"], None, "4 ranks, cpu, 1610612736 bytes"),
        ([], 4096, "4 ranks, cpu, 4096 bytes"),
        ([], None, None),
    ):
        monkeypatch.setattr(gpus, "gpu_memory", lambda gpu=gpu: gpu)
        assert main(arguments_for("switchall_tiny.json", prepared, *DRY, "--ranks", "4", *more)) == 0
        printed = capsys.readouterr().out
        assert ("largest micro-batch" in printed) is (said is not None) and (said or "") in printed


@pytest.mark.usefixtures("roomy_disk")
def test_the_1b_config_dry_runs_without_a_gpu(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ("--set", "evaluate.sequences=0", *DRY, "--ranks", "64")
    assert main(arguments_for("switchall_1b.json", prepared, *more)) == 0
    printed = capsys.readouterr().out
    assert "1,117,441,280" in printed and "437,964,032" in printed


@pytest.mark.usefixtures("roomy_disk")
def test_the_1b_config_never_trains_on_a_cpu_unasked(
    prepared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is for GPUs: a start without one is refused, and a dry run for the CPU is not."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("DS_ACCELERATOR")
    more = ("--set", "evaluate.sequences=0", "--set", "checkpoint.every_steps=1")
    assert main(arguments_for("switchall_1b.json", prepared, *more)) == ExitCode.REFUSED
    message = capsys.readouterr().err
    assert message.startswith(
        "error: train.device: is cuda, but torch finds no usable GPU here; --set train.device=cpu"
    )
    assert message.count("\n") == 1
    assert main(arguments_for("switchall_1b.json", prepared, *more, "--set", "train.device=cpu", *DRY)) == 0


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--set", "train.stepz=3"], "train.stepz: unknown key; the nearest known key is train.steps"),
        (["--set", "train.precision=fp16"], "train.precision: fp16 needs CUDA"),
        (
            [*DRY, "--ranks", "3"],
            "batch.global_sequences: 32 is not divisible by batch.micro_sequences x DP",
        ),
        (["--ranks", "3"], "--ranks: goes with --dry-run"),
        (["--no-step"], "--no-step: goes with --dry-run"),
        (["--device-memory", "80"], "--device-memory: goes with --dry-run"),
    ],
)
def test_refusals_are_one_message_without_traceback(
    prepared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    """More of them: tests/pretrain/config/test_refusals.py."""
    monkeypatch.chdir(tmp_path)
    assert main(arguments_for("switchall_tiny.json", prepared, *arguments)) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1, printed.err
    assert words in printed.err
    assert not list(tmp_path.iterdir()), "something was written before the refusal"


@pytest.mark.parametrize("given", [("--ranks", "0"), ("--device-memory", "0"), ("--device-memory", "inf")])
def test_numbers_of_a_dry_run_are_checked_with_its_arguments(
    given: tuple[str, str], prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments_for("switchall_tiny.json", prepared, *DRY, *given))
    assert f"argument {given[0]}: expected a" in capsys.readouterr().err


@pytest.mark.parametrize("resumes", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_without_the_launcher_and_its_refusal_to_change(prepared: Path, tmp_path: Path, resumes: bool) -> None:
    """The tests of checkpoints resume in a process that has torch already."""
    arguments = [
        "--config",
        TINY,
        "--set",
        f"data.manifest={prepared}",
        "--set",
        "train.steps=4",
        "--set",
        "batch.global_sequences=4",
        "--set",
        "batch.micro_sequences=4",
        "--set",
        "model.sequence_length=32",
        "--set",
        "model.num_layers=1",
        "--set",
        "evaluate.sequences=4",
        "--run-dir",
        "run",
    ]
    script = str(ROOT / "launch" / "pretrain.py")
    nobody_reads = broken_pipe()
    done = start(script, *arguments, "--set", "train.stop_after_steps=2", cwd=tmp_path, stdout=nobody_reads)
    os.close(nobody_reads)
    assert done.returncode == 0, done.stderr
    # torch warns where the machine's name cannot be resolved, as without a network.
    said = [line for line in done.stderr.splitlines() if "[c10d] The hostname" not in line]
    assert len(said) == 1 and said[0].startswith("warning: stdout cannot be written (Broken pipe)"), done.stderr
    run_dir = tmp_path / "run"
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    (lost,) = [event for event in events if event["event"] == "output_lost"]
    assert (lost["stream"], lost["reason"]) == ("stdout", "Broken pipe")
    # A tree that was changed since its commit is kept as a patch too.
    assert {p.name for p in run_dir.iterdir() if p.suffix != ".patch"} == {
        "config.json",
        "metrics.jsonl",
        "details.jsonl",
        "events.jsonl",
        "outcome.json",
        "checkpoints",
        "tensorboard",
    }
    full = os.open("/dev/full", os.O_WRONLY)
    refused = start(script, *arguments, "--set", "optimizer.eps=1e-6", cwd=tmp_path, stdout=full, stderr=full)
    os.close(full)
    assert refused.returncode == 2, "Python would give 120 for what it could not flush, or 1 for the traceback"
    if not resumes:
        return
    done = start(script, *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "resuming from" in done.stdout and "unigram perplexity" in done.stdout
    assert [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4]


def test_the_help_of_training_may_be_read_in_part() -> None:
    """`--help | head -1`: nothing is trained that would go on without stdout."""
    reader, writer = os.pipe()
    os.close(reader)
    line = [sys.executable, str(ROOT / "launch" / "pretrain.py"), "--help"]
    done = subprocess.run(line, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")
