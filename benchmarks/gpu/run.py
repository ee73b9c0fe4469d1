"""`run`: training through DeepSpeed's launcher on one GPU. It starts, learns, saves, stops at a signal and resumes.

Two ranks on one GPU are refused by NCCL, so there is one. What it needs beyond the machine's packages, its data and the
CPU's losses `python -m benchmarks.gpu carry` gathers (docs/gpu.md).
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
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
SMALLEST, BILLION = "configs/switchall_tiny.json", "configs/switchall_1b.json"
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
    wanted = json.loads(recorded.read_text(encoding="utf-8"))["losses"]
    with _folder() as folder:
        lines = Launch(context, folder, SMALLEST, "8k", [*TINY, f"train.steps={TINY_STEPS}"]).finish()
    losses = _losses(lines)
    result = {"losses": losses, "cpu": wanted, "tokens_per_second": _speed(context, lines)}
    if len(losses) != len(wanted):
        raise Failed(f"{len(losses)} steps, the CPU made {len(wanted)}", result)
    _check_finite(losses, len(wanted), result)
    _check_near(losses, wanted, CPU_TOLERANCE, "losses differ from the CPU's", result)
    return result


def resumed(context: Context, *, steps: int) -> dict[str, Any]:
    """The 1B model: `steps` steps at once, and as many with SIGUSR1 on the way and a second start; equal numbers."""
    start = _training(context, BILLION, "train.deterministic=true", "checkpoint.asynchronous=false")
    with _folder() as folder:
        whole = start(folder / "whole").first(steps)
        shutil.rmtree(folder / "whole")
        stopped_after = start(folder / "stopped").stop_after(steps // 3)
        lines = start(folder / "stopped").first(steps)
    losses = _losses(whole)
    result = {"steps": steps, "stopped_after": stopped_after, "losses": losses}
    result["tokens_per_second"] = _speed(context, whole)
    if not 0 < stopped_after < steps:
        raise Failed(f"SIGUSR1 stopped it after step {stopped_after} of {steps}: nothing was resumed", result)
    _check_same(whole, lines, "after the resume", result)
    _check_falling(context, losses, result)
    return result


def recorded(context: Context, *, name: str, steps: int) -> dict[str, Any]:
    """Micro-steps launched one by one, and recorded as CUDA graphs: equal numbers. Four micro-steps a step."""
    settings = "train.deterministic=true", "batch.micro_sequences=2", "checkpoint.asynchronous=false"
    start = _training(context, {"1b": BILLION, "262m": PUBLISHED}[name], *settings)
    on = "on" if context.device.type == "cuda" else "auto"
    with _folder() as folder:
        one_by_one = start(folder / "off", "train.cuda_graph=off").first(steps)
        shutil.rmtree(folder / "off")
        replayed = start(folder / "on", f"train.cuda_graph={on}").first(steps)
    losses = _losses(replayed)
    result = {"steps": steps, "losses": losses} | _both_speeds(context, replayed, one_by_one)
    _check_finite(losses, steps, result)
    _check_same(one_by_one, replayed, "graphs give", result)
    return result


def compiled(context: Context, *, steps: int) -> dict[str, Any]:
    """The published 262M model with its dropout and memory, its blocks compiled and not: losses that differ by rounding
    alone, and the tokens a second of both."""
    start = _training(context, PUBLISHED, *(("model.dropout=0.2",) if context.tiny else ()))
    with _folder() as folder:
        without = start(folder / "off", "train.compile=off", "train.cuda_graph=off").first(steps)
        shutil.rmtree(folder / "off")
        lines = start(folder / "on", "train.compile=on", "train.cuda_graph=off").first(steps)
    losses, expected = _losses(lines), _losses(without)
    result = {"losses": losses, "losses_without": expected} | _both_speeds(context, lines, without)
    for found in (losses, expected):
        _check_finite(found, steps, result)
    _check_near(losses, expected, COMPILED_TOLERANCE, "compiled blocks give other losses", result)
    return result


def dropped_out(context: Context, *, steps: int) -> dict[str, Any]:
    """The published 262M model with its dropout and Transformer-XL memory: every loss is finite, and they fall."""
    with _folder() as folder:
        start = _training(context, PUBLISHED, *(("model.dropout=0.2",) if context.tiny else ()))
        lines = start(folder).first(steps)
    losses = _losses(lines)
    result = {"losses": losses, "tokens_per_second": _speed(context, lines)}
    _check_finite(losses, steps, result)
    _check_falling(context, losses, result)
    return result


def _training(context: Context, config: str, *settings: str) -> Callable[..., Launch]:
    """Starts a run of many steps in a folder, with further settings: of `config`, or of the tiny model where only the
    commands are tested."""
    if context.tiny:
        config = SMALLEST
    data, base = "32k" if config == BILLION else "8k", TINY if context.tiny else LARGE

    def start(run_dir: Path, *more: str) -> Launch:
        return Launch(context, run_dir, config, data, [*base, f"train.steps={MANY}", *settings, *more])

    return start


# ---------------------------------------------------------------------------------------------------------- the checks


def _losses(lines: Lines) -> list[Any]:
    """By step; None for one that is not finite."""
    return [lines[step]["loss"] for step in sorted(lines)]


def _check_finite(losses: Sequence[Any], steps: int, result: dict[str, Any]) -> None:
    if len(losses) != steps or None in losses:
        raise Failed(f"{len(losses)} of {steps} steps, or a loss that is not finite: {losses}", result)


def _check_near(losses: list[Any], wanted: list[Any], tolerance: float, words: str, result: dict[str, Any]) -> None:
    differences = [abs(a - b) / abs(b) for a, b in zip(losses, wanted, strict=True)]
    result["largest_difference"] = max(differences, key=lambda d: (math.isnan(d), d))  # else a NaN may hide
    if not all(difference <= tolerance for difference in differences):  # a NaN fails
        raise Failed(f"{words}: relative differences {differences}", result)


def _check_same(one: Lines, other: Lines, words: str, result: dict[str, Any]) -> None:
    result["different"] = different(one, other)
    if result["different"]:
        raise Failed(f"{words} other numbers at {', '.join(result['different'][:5])}", result)


def _check_falling(context: Context, losses: Sequence[Any], result: dict[str, Any]) -> None:
    if not (context.tiny or losses[-1] < losses[0]):  # few tokens are noise
        raise Failed("the loss does not fall", result)


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
        line = script(SMALLEST, runs, folder / "data" / "8k", settings)
        subprocess.run([sys.executable, *line], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        losses = _losses(read_lines(runs))
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
        self._until(steps)
        end_all_below(self._process.pid)
        self._process.wait()
        return {step: line for step, line in read_lines(self.run_dir).items() if step <= steps}

    def stop_after(self, step: int) -> int:
        """Sends SIGUSR1 to the rank once `step` steps are recorded; the last step that it made. Raises Failed."""
        self._until(step)
        for pid in ranks_below(self._process.pid):
            os.kill(pid, signal.SIGUSR1)
        self._wait()
        if self._outcome() not in (STOPPED, 0):
            raise Failed(f"SIGUSR1 ended it with {self._outcome()}: {self._said()}")
        return max(read_lines(self.run_dir))

    def _until(self, step: int) -> None:
        while step not in read_lines(self.run_dir):
            if self._process.poll() is not None:
                raise Failed(f"it ended before step {step}: {self._said()}")
            self._check_time()
            time.sleep(0.05)

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


def _both_speeds(context: Context, lines: Lines, without: Lines) -> dict[str, float | None]:
    return {"tokens_per_second": _speed(context, lines), "tokens_per_second_without": _speed(context, without)}


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
