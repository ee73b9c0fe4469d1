"""What a step reports: metrics.jsonl, TensorBoard and the terminal. Rank 0 writes, see metrics.py for the values."""

from __future__ import annotations

import collections
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.tables import listed
from common.units import GIB
from model.costs import training_flops_per_token
from pretrain.checkpoint.state import versions
from pretrain.config.schema import Config
from pretrain.config.watching import MonitorConfig
from pretrain.engine.details import Details
from pretrain.report.curves import Curves
from pretrain.report.estimate import TIMED, SideBySide
from pretrain.report.peak import Peak, find_peak
from pretrain.report.router_load import Collapsed, CollapseWatch, advice, load_text
from pretrain.report.run_folder import RunFolder
from pretrain.report.source_losses import source_losses, sources_text
from pretrain.report.tensorboard import TensorBoard
from pretrain.report.weights_and_biases import WeightsAndBiases
from pretrain.report.writer import Position, Writer


@dataclass(frozen=True)
class Origin:
    """Where a start begins, and where it ends."""

    step: int
    tokens: int
    last_step: int
    device: torch.device
    ranks: int
    extra_flops: int = 0
    """See Progress."""
    hides_all: bool = False
    """Whether the curves of all steps in the folder are another branch's, those before this start too."""


class Monitor:
    """Gives a line per step to the run folder (metrics.jsonl), curves to its boards, a terse line to the terminal."""

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        origin: Origin,
        *,
        facts: Mapping[str, str] | None = None,
        side_by_side: SideBySide | None = None,
    ) -> None:
        """`facts`: title -> text of what tells this start from others. `side_by_side`: what is expected of it. Raises
        UserError if a board cannot be written."""
        self._whole, self._config, self._model = config, config.monitor, config.model
        self._folder, self._origin = folder, origin
        self._first, self._last = origin.step, origin.last_step
        self._start = time.monotonic()
        self._interval = Interval()
        self._collapse = CollapseWatch(config.monitor, config.model)
        self._flops_per_token = training_flops_per_token(config.model)
        self._peak: Peak | None = None
        self._at = self._position(origin.step, origin.tokens)
        self._curves: Curves | None = None
        writers = make_writers(config.monitor, folder.path, self._at, origin.hides_all)
        if writers:
            self._curves = Curves(writers, config, self._at, facts or {})
            folder.listen(self._curves.event)
        self._side_by_side, self._step_seconds = side_by_side, collections.deque[float](maxlen=TIMED)
        self._look()

    def step(
        self,
        values: dict[str, Any],
        load: dict[str, Tensor],
        *,
        phase_seconds: dict[str, float] | None = None,
        details: Details | None = None,
    ) -> None:
        """Records optimizer step values["step"] (from 1); a None is a value that this step does not have."""
        step = int(values["step"])
        values = {**values, **self._speed(step, values["tokens_per_second"])}
        self._folder.metrics(values)
        self._at = self._position(step, int(values.get("tokens", 0)))
        if self._curves is not None:
            self._curves.count(step, load)
            if step % self._config.tensorboard_every_steps == 0 or step == self._last:
                self._curves.step(self._at, values, phase_seconds or {})
            if details is not None and values["grad_norm"] is not None:  # a skipped update has no norm of its own
                self._folder.details(self._curves.details(self._at, details))
        self._interval.add(values, load)
        if step % self._config.print_every_steps == 0 or step in (self._first + 1, self._last):
            print(self._line(step, values), flush=True)
            self._interval = Interval()
        elif values["grad_norm"] is None:
            loss = "loss not finite" if values["loss"] is None else f"loss {values['loss']:.4f}"
            print(f"step {step:>{len(str(self._last))}}/{self._last}  {loss}, update skipped", flush=True)
        self._warn_of_collapse(step, self._collapse.step(load))
        self._step_seconds.append(values["step_seconds"])
        self._look()

    def _look(self) -> None:
        """Says what is expected, and what was measured, as soon as it is known."""
        if self._side_by_side is not None:
            self._side_by_side.look(self._folder.event)

    def measured(self, step: int, memory_bytes: int) -> None:
        """What the steps up to `step` took, on the rank that took most."""
        if self._side_by_side is not None:
            self._side_by_side.measure(step, memory_bytes, self._step_seconds)
            self._look()

    def _position(self, step: int, tokens: int) -> Position:
        return Position(step, tokens, float(tokens) * self._flops_per_token + self._origin.extra_flops)

    def _speed(self, step: int, tokens_per_second: float) -> dict[str, float]:
        """The model's FLOP/s on all ranks and, once the peak is known, the share of it that is used."""
        flops = self._flops_per_token * tokens_per_second
        origin = self._origin
        # A CPU's peak is measured, which costs time, for those alone who look at the board.
        if step == self._first + 1 and (self._curves is not None or origin.device.type != "cpu"):
            self._peak = find_peak(origin.device, self._whole.train.precision, self._config.peak_flops)
            if self._peak is not None and self._curves is not None:
                self._curves.tell("peak of a device", f"{self._peak.flops / 1e12:.3g} TFLOP/s, {self._peak.source}")
        if self._peak is None:
            return {"flops_per_second": flops}
        return {"flops_per_second": flops, "flops_utilization": flops / (self._peak.flops * self._origin.ranks)}

    def _warn_of_collapse(self, step: int, due: list[Collapsed]) -> None:
        if not due:
            return
        print(
            f"warning: step {step}: collapsed routers (share of the choices that the k busiest experts get): "
            f"{listed([str(one) for one in due], 3)}; {advice(self._model, due)} (monitor.collapse_after_steps)",
            flush=True,
        )
        rows = [{"router": c.router, "head": c.head, "busiest_share": c.share, "steps": c.steps} for c in due]
        self._folder.event("router_collapsed", step=step, routers=rows)

    def validation(self, step: int, values: dict[str, Any], *, split: str) -> None:
        """Records a validation on `split` after optimizer step `step`; a None is a value that is not finite."""
        self._folder.event("validation", step=step, split=split, **values)
        if self._curves is not None:
            self._curves.validation(self._at, values, split)
        what = "loss not finite"
        if values["loss"] is not None:
            what = f"loss {values['loss']:.4f}  perplexity {values['perplexity']:.2f}"
        if values.get("bits_per_byte") is not None:
            what += f"  bits per byte {values['bits_per_byte']:.4f}"
        if of_sources := source_losses(values):
            what += f"  ({sources_text(of_sources)})"
        if values.get("ema_loss") is not None:
            what += f"; moving average: loss {values['ema_loss']:.4f}  perplexity {values['ema_perplexity']:.2f}"
        where = "" if split == "validation" else f" on the {split} split"
        print(f"validation after step {step}{where}: {what}", flush=True)

    def evaluation(
        self, step: int, task: str, values: dict[str, Any], *, examples: int, limit: int | None = None
    ) -> None:
        """Records a task of evaluate.tasks after optimizer step `step`; a None is a value that is not finite. `limit`:
        the examples are the first so many of each file."""
        self._folder.event("evaluation", step=step, task=task, **values, examples=examples, limit=limit)
        if self._curves is not None:
            self._curves.evaluation(self._at, task, values)
        numbers = [f"{key} {'not finite' if value is None else f'{value:.4g}'}" for key, value in values.items()]
        print(f"{task} after step {step}: {'  '.join(numbers)} ({examples:,} examples)", flush=True)

    def flush(self) -> None:
        """Brings the curves to the disk; call it at every point that the run may continue from."""
        if self._curves is not None:
            self._curves.flush()

    def close(self) -> None:
        """Ends the thread that draws."""
        if self._curves is not None:
            self._folder.listen(None)
            self._curves.close()

    def _line(self, step: int, values: dict[str, Any]) -> str:
        """The line on the terminal: means since the line before; learning rate and memory of the newest step."""
        interval, elapsed = self._interval, time.monotonic() - self._start
        remaining = elapsed / (step - self._first) * (self._last - step)
        loss, norm = interval.mean("loss"), interval.mean("grad_norm")
        parts = [
            f"step {step:>{len(str(self._last))}}/{self._last}",
            "loss not finite" if loss is None else f"loss {loss:.4f}  ppl {perplexity(loss):.4g}",
            "grad skipped" if norm is None else f"grad {norm:.3f}",
            f"lr {values['lr']:.2e}",
            f"{interval.tokens_per_second:,.0f} tok/s",
            load_text(interval.load, self._model),
            f"mem {values['memory_bytes'] / GIB:.1f}/{values['memory_peak_bytes'] / GIB:.1f} GiB",
            f"elapsed {clock(elapsed)}  ETA {clock(remaining)}",
        ]
        return "  ".join(part for part in parts if part)


def make_writers(config: MonitorConfig, run_dir: Path, start: Position, hides_all: bool) -> list[Writer]:
    """The boards that a run writes to; another one is one more line here. What they have of steps after `start` counts
    no more; with `hides_all` nothing that they have. Raises UserError."""
    writers: list[Writer] = []
    if config.tensorboard:
        board = TensorBoard(run_dir / "tensorboard", Position(0, 0, 0.0) if hides_all else start)
        if hides_all:
            board.begin()
        writers.append(board)
    if config.wandb != "off":
        writers.append(WeightsAndBiases(run_dir, config, {"software": versions()}, anew=hides_all))
    return writers


class Interval:
    """The steps between two lines on the terminal."""

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = {"loss": [], "grad_norm": []}
        self._tokens = self._seconds = 0.0
        self.load: dict[str, Tensor] = {}
        """Choices per expert of every router, summed over the steps."""

    def add(self, values: dict[str, Any], load: dict[str, Tensor]) -> None:
        for key, found in self._values.items():
            if values[key] is not None:
                found.append(values[key])
        self._tokens += values["tokens_per_second"] * values["step_seconds"]
        self._seconds += values["step_seconds"]
        for name, counts in load.items():
            self.load[name] = self.load[name] + counts if name in self.load else counts

    def mean(self, key: str) -> float | None:
        """Mean of `loss` or `grad_norm` over the steps that have it; None if none has."""
        found = self._values[key]
        return sum(found) / len(found) if found else None

    @property
    def tokens_per_second(self) -> float:
        """Tokens of the steps over their seconds."""
        return self._tokens / self._seconds


def perplexity(loss: float) -> float:
    """exp(loss), infinity where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def clock(seconds: float) -> str:
    """h:mm:ss, or m:ss below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
