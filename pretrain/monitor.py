"""What a step reports: metrics.jsonl, TensorBoard and the terminal. Rank 0 writes, see step_sums.py for the values."""

from __future__ import annotations

import math
import time
from typing import Any

from torch import Tensor

from pretrain.config import Config
from pretrain.run_folder import RunFolder


class Monitor:
    """Writes one line per step to metrics.jsonl, scalars to TensorBoard, and a terse line to the terminal."""

    def __init__(self, config: Config, folder: RunFolder, *, first_step: int, last_step: int) -> None:
        self._config = config.monitor
        self._folder = folder
        self._first, self._last = first_step, last_step
        self._start = time.monotonic()
        self._board: Any = None
        if config.monitor.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # purge_step hides what a killed run wrote after its last checkpoint.
            self._board = SummaryWriter(str(folder.path / "tensorboard"), purge_step=first_step + 1)

    def step(self, values: dict[str, Any], load: dict[str, Tensor]) -> None:
        """Records optimizer step values["step"] (from 1); a None is a value that this step does not have."""
        step = int(values["step"])
        self._folder.metrics(values)
        if self._board is not None and (step % self._config.tensorboard_every_steps == 0 or step == self._last):
            for key, value in {**values, "perplexity": _perplexity(values["loss"])}.items():
                if key != "step" and value is not None:
                    self._board.add_scalar(f"train/{key}", value, step)
            for name, counts in load.items():
                share = counts / counts.sum(-1, keepdim=True).clamp_min(1.0) * counts.shape[-1]
                self._board.add_scalar(f"expert_load_max/{name}", float(share.max()), step)
        is_due = step % self._config.print_every_steps == 0 or step in (self._first + 1, self._last)
        if is_due or values["grad_norm"] is None:
            print(self._line(step, values), flush=True)

    def validation(self, step: int, values: dict[str, float], *, split: str) -> None:
        """Records a validation on `split` after optimizer step `step`."""
        self._folder.event("validation", step=step, split=split, **values)
        if self._board is not None:
            for key, value in values.items():
                self._board.add_scalar(f"validation/{key}", value, step)
        bits = f"  bits per byte {values['bits_per_byte']:.4f}" if "bits_per_byte" in values else ""
        print(
            f"validation after step {step}{'' if split == 'validation' else f' on the {split} split'}: "
            f"loss {values['loss']:.4f}  perplexity {values['perplexity']:.2f}{bits}",
            flush=True,
        )

    def flush(self) -> None:
        """Brings TensorBoard's file to the disk; call where the run may be continued from."""
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        if self._board is not None:
            self._board.close()

    def _line(self, step: int, values: dict[str, Any]) -> str:
        done = step - self._first
        remaining = (time.monotonic() - self._start) / done * (self._last - step)
        width = len(str(self._last))
        loss = "loss not finite"
        if values["loss"] is not None:
            loss = f"loss {values['loss']:.4f}  ppl {perplexity(values['loss']):.4g}"
        norm = "skipped" if values["grad_norm"] is None else f"{values['grad_norm']:.3f}"
        line = (
            f"step {step:>{width}}/{self._last}  {loss}  "
            f"grad {norm}  lr {values['lr']:.2e}  {values['tokens_per_second']:,.0f} tok/s"
        )
        if "feedforward_load_max" in values:
            line += f"  load {values['feedforward_load_max']:.2f}x"
        return line + f"  ETA {clock(remaining)}"


def perplexity(loss: float) -> float:
    """exp(loss), infinity where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def _perplexity(loss: float | None) -> float | None:
    return None if loss is None else perplexity(loss)


def clock(seconds: float) -> str:
    """h:mm:ss, or m:ss below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
