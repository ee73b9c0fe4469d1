"""`run`: training through DeepSpeed's launcher on one GPU. It starts, learns, saves, stops at a signal and resumes.

Two ranks on one GPU are refused by NCCL, so there is one. What it needs beyond the machine's packages, its data and the
CPU's losses `python -m benchmarks.gpu carry` gathers (docs/gpu.md).
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import carry, quality_run
from benchmarks.gpu.command import Context, Failed, Part, Unavailable
from benchmarks.gpu.processes import end_all_below, ranks_below
from benchmarks.gpu.record import ROOT
from common.ports import free_port

STOPPED = 85
"""Exit code of a run that a signal stopped: start it again."""
TINY_STEPS = 20
MANY = 1000
"""Steps of a run of which the first are compared; then it is killed, since it would write its last checkpoint."""
CPU_TOLERANCE = 1e-3
"""Relative, of fp32 losses on a GPU and on a CPU: rounding decides a few near ties of the routers."""
COMPILED_TOLERANCE = 1e-2
"""Relative, of bf16 losses with and without torch.compile, which rounds elsewhere."""
COMPARED = ("loss", "grad_norm")
SMALL = ("evaluate.sequences=0", "monitor.tensorboard=false", "train.seed=0")
LARGE = (
    *SMALL,
    "data.max_tokens=null",
    "batch.global_sequences=8",
    "batch.micro_sequences=8",
    "schedule.warmup_steps=5",
)
TINY = (*LARGE, "train.precision=fp32")
PUBLISHED = "configs/paper/c4_switchhead_262m.json"
SHRUNK = ("model.num_layers=1", "model.sequence_length=16")
"""Of every model, where only the commands are tested."""

Lines = dict[int, dict[str, Any]]
"""Step -> its line of metrics.jsonl; of a step that was computed twice the last."""


def parts(*, tiny: bool) -> Iterator[Part]:
    yield Part("tiny fp32", tiny_losses, 60.0)
    yield Part("1b stop and resume", functools.partial(resumed, steps=8 if tiny else 30), 150.0)
    for name in ("262m", "1b"):
        graphs = functools.partial(recorded, name=name, steps=4 if tiny else 10)
        yield Part(f"cuda graphs {name}", graphs, 100.0)
    yield Part("compiled blocks 262m", functools.partial(compiled, steps=3 if tiny else 10), 120.0)
    yield Part("262m dropout", functools.partial(dropped_out, steps=4 if tiny else 12), 60.0)
    if not tiny:
        yield Part("quality", quality_run.quality, 200.0)


# ----------------------------------------------------------------------------------------------------------- the parts


def tiny_losses(context: Context) -> dict[str, Any]:
    """switchall_tiny in fp32 beside the losses that the CPU gave."""
    recorded = _carried(context) / carry.LOSSES
    if not recorded.exists():
        raise Unavailable(f"there is no {recorded.name}: make it with `python -m benchmarks.gpu carry` and carry it")
    wanted = json.loads(recorded.read_text(encoding="utf-8"))
    settings = [*TINY, f"train.steps={TINY_STEPS}"]
    with _folder() as folder:
        lines = Launch(context, folder, "configs/switchall_tiny.json", "8k", settings).finish()
    losses = [lines[step]["loss"] for step in sorted(lines)]
    result = {"losses": losses, "cpu": wanted["losses"], "tokens_per_second": _speed(context, lines)}
    if len(losses) != len(wanted["losses"]):
        raise Failed(f"{len(losses)} steps, the CPU made {len(wanted['losses'])}", result)
    if None in losses:
        raise Failed(f"a loss is not finite: {losses}", result)
    differences = [abs(a - b) / abs(b) for a, b in zip(losses, wanted["losses"], strict=True)]
    result["largest_difference"] = max(differences)
    if not all(difference <= CPU_TOLERANCE for difference in differences):  # a NaN fails
        raise Failed(f"losses differ from the CPU's: relative differences {differences}", result)
    return result


def resumed(context: Context, *, steps: int) -> dict[str, Any]:
    """The 1B model: `steps` steps at once, and as many with SIGUSR1 on the way and a second start; equal numbers."""
    settings = [*LARGE, f"train.steps={MANY}", "train.deterministic=true", "checkpoint.asynchronous=false"]
    config = "configs/switchall_1b.json"
    if context.tiny:
        config, settings = "configs/switchall_tiny.json", [*TINY, f"train.steps={MANY}"]
    data = "8k" if context.tiny else "32k"
    with _folder() as folder:
        whole = Launch(context, folder / "whole", config, data, settings).first(steps)
        shutil.rmtree(folder / "whole")
        launch = Launch(context, folder / "stopped", config, data, settings)
        stopped_after = launch.stop_after(steps // 3)
        lines = Launch(context, folder / "stopped", config, data, settings).first(steps)
    result: dict[str, Any] = {
        "steps": steps,
        "stopped_after": stopped_after,
        "losses": [whole[step]["loss"] for step in sorted(whole)],
        "tokens_per_second": _speed(context, whole),
    }
    if not 0 < stopped_after < steps:
        raise Failed(f"SIGUSR1 stopped it after step {stopped_after} of {steps}: nothing was resumed", result)
    result["different"] = different(whole, lines)
    if result["different"]:
        raise Failed(f"after the resume other numbers at {', '.join(result['different'][:5])}", result)
    if not (context.tiny or whole[steps]["loss"] < whole[1]["loss"]):  # few tokens are noise
        raise Failed("the loss does not fall", result)
    return result


def recorded(context: Context, *, name: str, steps: int) -> dict[str, Any]:
    """Micro-steps launched one by one, and recorded as CUDA graphs: equal numbers. Four micro-steps a step."""
    config, data = {"1b": ("configs/switchall_1b.json", "32k"), "262m": (PUBLISHED, "8k")}[name]
    settings = [*LARGE, f"train.steps={MANY}", "train.deterministic=true"]
    if context.tiny:
        config, data, settings = "configs/switchall_tiny.json", "8k", [*TINY, f"train.steps={MANY}"]
    settings += ["batch.micro_sequences=2", "checkpoint.asynchronous=false"]
    on = "on" if context.device.type == "cuda" else "auto"
    with _folder() as folder:
        one_by_one = Launch(context, folder / "off", config, data, [*settings, "train.cuda_graph=off"]).first(steps)
        shutil.rmtree(folder / "off")
        replayed = Launch(context, folder / "on", config, data, [*settings, f"train.cuda_graph={on}"]).first(steps)
    result: dict[str, Any] = {
        "steps": steps,
        "losses": [replayed[step]["loss"] for step in sorted(replayed)],
        "tokens_per_second": _speed(context, replayed),
        "tokens_per_second_without": _speed(context, one_by_one),
        "different": different(one_by_one, replayed),
    }
    if len(replayed) != steps or None in result["losses"]:
        raise Failed(f"{len(replayed)} of {steps} steps, or a loss that is not finite: {result['losses']}", result)
    if result["different"]:
        raise Failed(f"graphs give other numbers at {', '.join(result['different'][:5])}", result)
    return result


def compiled(context: Context, *, steps: int) -> dict[str, Any]:
    """The published 262M model with its dropout and memory, its blocks compiled and not: losses that differ by rounding
    alone, and the tokens a second of both."""
    config, settings = PUBLISHED, [*LARGE, f"train.steps={MANY}"]
    if context.tiny:
        config, settings = "configs/switchall_tiny.json", [*TINY, f"train.steps={MANY}", "model.dropout=0.2"]
    with _folder() as folder:
        without = Launch(
            context, folder / "off", config, "8k", [*settings, "train.compile=off", "train.cuda_graph=off"]
        ).first(steps)
        shutil.rmtree(folder / "off")
        lines = Launch(
            context, folder / "on", config, "8k", [*settings, "train.compile=on", "train.cuda_graph=off"]
        ).first(steps)
    losses, expected = ([run[step]["loss"] for step in sorted(run)] for run in (lines, without))
    result: dict[str, Any] = {
        "losses": losses,
        "losses_without": expected,
        "tokens_per_second": _speed(context, lines),
        "tokens_per_second_without": _speed(context, without),
    }
    if len(losses) != steps or len(expected) != steps or None in losses + expected:
        raise Failed(f"{len(losses)} of {steps} steps, or a loss that is not finite: {losses}", result)
    differences = [abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True)]
    result["largest_difference"] = max(differences)
    if not all(difference <= COMPILED_TOLERANCE for difference in differences):  # a NaN fails
        raise Failed(f"compiled blocks give other losses: relative differences {differences}", result)
    return result


def dropped_out(context: Context, *, steps: int) -> dict[str, Any]:
    """The published 262M model with its dropout and Transformer-XL memory: every loss is finite, and they fall."""
    config = PUBLISHED
    settings = [*LARGE, f"train.steps={MANY}"]
    if context.tiny:
        config, settings = "configs/switchall_tiny.json", [*TINY, f"train.steps={MANY}", "model.dropout=0.2"]
    with _folder() as folder:
        lines = Launch(context, folder, config, "8k", settings).first(steps)
    losses = [lines[step]["loss"] for step in sorted(lines)]
    result = {"losses": losses, "tokens_per_second": _speed(context, lines)}
    if len(losses) != steps or None in losses:
        raise Failed(f"{len(losses)} of {steps} steps, or a loss that is not finite: {losses}", result)
    if not (context.tiny or losses[-1] < losses[0]):  # few tokens are noise
        raise Failed("the loss does not fall", result)
    return result


def different(one: Lines, other: Lines) -> list[str]:
    """Where the numbers of two runs are not the same to the last bit, or a step is missing."""
    return [
        f"step {step} {key}"
        for step in sorted(one.keys() | other.keys())
        for key in COMPARED
        if one.get(step, {}).get(key, "missing") != other.get(step, {}).get(key, "absent")
    ]


def record_losses(folder: Path, changes: Sequence[str] = ()) -> None:
    """switchall_tiny on this machine's CPU, for `tiny_losses` elsewhere: `folder`/tiny_losses.json."""
    settings = [*TINY, f"train.steps={TINY_STEPS}", "train.device=cpu", *changes]
    with _folder() as runs:
        line = script("configs/switchall_tiny.json", runs, folder / "data" / "8k", settings)
        subprocess.run([sys.executable, *line], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        losses = [line["loss"] for _, line in sorted(read_lines(runs).items())]
    text = json.dumps({"steps": TINY_STEPS, "losses": losses}) + "\n"
    (folder / carry.LOSSES).write_text(text, encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------- a launch


class Launch:
    """One start of launch/pretrain.py by DeepSpeed's launcher, with one rank. Raises Unavailable where the launcher or
    the data are missing."""

    def __init__(self, context: Context, run_dir: Path, config: str, data: str, settings: list[str]) -> None:
        if importlib.util.find_spec("deepspeed") is None:
            raise Unavailable("deepspeed is not installed: carry the wheels (docs/gpu.md)")
        manifest = _carried(context) / "data" / data
        if not manifest.exists():
            raise Unavailable(f"there is no {manifest.name} data set: `python -m benchmarks.gpu carry` makes it")
        self._context, self.run_dir = context, run_dir
        settings = [*settings, f"train.device={context.device.type}", *(SHRUNK if context.tiny else ())]
        line = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "1", "--master_port"]
        line += [str(free_port()), *script(config, run_dir, manifest, settings)]
        variables = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "OMP_NUM_THREADS")}
        if context.device.type == "cpu":
            variables["DS_ACCELERATOR"] = "cpu"
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        self._log = run_dir.with_suffix(".log")
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(line, cwd=ROOT, env=variables, stdout=log, stderr=log)

    def finish(self) -> Lines:
        """Waits for its good end. Raises Failed."""
        code = self._wait()
        if code != 0 or self._outcome() != 0:
            raise Failed(f"launch/pretrain.py ended with {code}: {self._said()}")
        return read_lines(self.run_dir)

    def first(self, steps: int) -> Lines:
        """The lines of so many steps, after which it is killed: its last checkpoint would take longer than they. Raises
        Failed."""
        while len(read_lines(self.run_dir)) < steps:
            if self._process.poll() is not None:
                raise Failed(f"it ended before step {steps}: {self._said()}")
            self._check_time()
            time.sleep(0.05)
        end_all_below(self._process.pid)
        self._process.wait()
        return {step: line for step, line in read_lines(self.run_dir).items() if step <= steps}

    def stop_after(self, step: int) -> int:
        """Sends SIGUSR1 to the rank once `step` steps are recorded; the last step that it made. Raises Failed."""
        while not read_lines(self.run_dir).get(step):
            if self._process.poll() is not None:
                raise Failed(f"it ended before step {step}: {self._said()}")
            self._check_time()
            time.sleep(0.05)
        for pid in ranks_below(self._process.pid):
            os.kill(pid, signal.SIGUSR1)
        self._wait()
        if self._outcome() not in (STOPPED, 0):
            raise Failed(f"SIGUSR1 ended it with {self._outcome()}: {self._said()}")
        return max(read_lines(self.run_dir))

    def _wait(self) -> int:
        while self._process.poll() is None:
            self._check_time()
            time.sleep(0.1)
        return self._process.returncode

    def _check_time(self) -> None:
        if self._context.remaining() <= 0:
            end_all_below(self._process.pid)
            self._process.kill()
            self._process.wait(30)
            raise Unavailable(f"the time was over: {self._said()}")  # so it is tried again

    def _outcome(self) -> int | None:
        path = self.run_dir / "outcome.json"
        return json.loads(path.read_text(encoding="utf-8"))["exit_code"] if path.exists() else None

    def _said(self) -> str:
        """Its own error, or the exception that ended it; the launcher's last lines name the command line alone."""
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        errors = [line for line in lines if line.startswith("error:")]
        raised = [line for line in lines if re.match(r"(\[rank\d+\]: )?[\w.]*(Error|Exception|Interrupt)\b", line)]
        return (errors or raised or lines or ["nothing"])[-1][-500:]


def script(config: str, run_dir: Path, manifest: Path, settings: list[str]) -> list[str]:
    line = [str(ROOT / "launch" / "pretrain.py"), "--config", str(ROOT / config), "--run-dir", str(run_dir)]
    for setting in [f"data.manifest={manifest}", *settings]:
        line += ["--set", setting]
    return line


def read_lines(run_dir: Path) -> Lines:
    path = run_dir / "metrics.jsonl"
    whole = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return {line["step"]: line for line in map(json.loads, whole)}


def _carried(context: Context) -> Path:
    """Where data and losses lie; a test of the commands on a CPU makes its own beside its records."""
    if not context.tiny:
        return carry.FOLDER
    folder = context.results.resolve() / "carried"
    if not (folder / carry.LOSSES).exists():
        carry.write_data(folder / "data" / "8k", carry.DATA["8k"], 50_000)
        record_losses(folder, SHRUNK)
    return folder


def _speed(context: Context, lines: Lines) -> float | None:
    """Tokens a second of the second half of the steps: the first compile. None where others use the GPU too."""
    if context.shared:
        return None
    later = [line["tokens_per_second"] for step, line in lines.items() if 2 * step > max(lines)]
    return round(statistics.median(later), 1)


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """For run folders, removed afterwards: a checkpoint of the 1B model has 16 GB."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "runs"
