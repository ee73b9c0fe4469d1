"""What a step reports: metrics.jsonl, TensorBoard and the terminal. Rank 0 writes, all ranks sum."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.language_model import routing_statistics
from model.parallel.context import ParallelContext
from model.routing import negative_entropy
from pretrain.config import Config
from pretrain.run_folder import RunFolder


@dataclass(frozen=True)
class StepSums:
    """Global sums of one optimizer step, the same on every rank."""

    loss: float
    """Mean cross-entropy over the tokens of the global batch, nats."""
    auxiliary_loss: float
    """Mean of the auxiliary losses over micro-steps and ranks."""
    load: dict[str, Tensor]
    """Choices per expert of every router, fp64 [E] or [H, E], by canonical name."""
    negative_entropy: float | None
    """sum_e p_e log p_e of the step's mean routing distribution, averaged over the routers that track it."""


def reduce_step(
    module: nn.Module,
    loss_sum: Tensor,
    auxiliary_sum: Tensor,
    micro_steps: int,
    parallel: ParallelContext,
    *,
    keep_statistics: bool = True,
) -> StepSums:
    """Sums the step's scalars and routing counts over ranks in one collective, and closes the step of every router.

    `loss_sum`, `auxiliary_sum`: this rank's sums over its micro-steps, scalars. Without `keep_statistics` (the update
    was skipped) the routing distribution of the step before stays.
    """
    routers = dict(routing_statistics(module))
    tensors = [loss_sum.double().view(1), auxiliary_sum.double().view(1)]
    tensors += [t.view(-1) for statistics in routers.values() for t in statistics.accumulators()]
    flat = torch.cat(tensors)
    if parallel.data_size > 1:
        dist.all_reduce(flat, group=parallel.data_group)
    for target, summed in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        target.copy_(summed)
    divided = [t.view(-1) for s in routers.values() if s.is_sharded for t in s.accumulators()]
    if parallel.tensor_group is not None and divided:  # heads, or tokens, that another rank counted are zero here
        summed = torch.cat(divided)
        dist.all_reduce(summed, group=parallel.tensor_group)
        for target, value in zip(divided, summed.split([t.numel() for t in divided]), strict=True):
            target.copy_(value)

    load = {name: statistics.load.to("cpu", copy=True) for name, statistics in routers.items()}
    for statistics in routers.values():
        statistics.finish_step(keep=keep_statistics)
    shares = micro_steps * parallel.data_size
    entropies = [negative_entropy(s.probability) for s in routers.values() if s.tracks_probability]
    entropy = torch.stack(entropies).mean().view(1) if entropies else flat.new_zeros(1)
    loss, auxiliary_loss, mean_entropy = torch.cat([flat[:2] / shares, entropy]).tolist()
    return StepSums(loss, auxiliary_loss, load, mean_entropy if entropies else None)


def load_summary(load: dict[str, Tensor]) -> dict[str, float]:
    """Balance of experts, per kind of router, over layers: the busiest expert's load in units of the mean load
    (1 is even), and the share of experts that no token chose."""
    summary: dict[str, float] = {}
    for kind in ("attention", "feedforward"):
        counts = [c.view(-1, c.shape[-1]) for name, c in load.items() if f".{kind}." in name]
        if counts:
            rows = torch.cat(counts)
            mean = rows.mean(-1, keepdim=True).clamp_min(1e-9)
            summary[f"{kind}_load_max"] = float((rows / mean).max())
            summary[f"{kind}_experts_unused"] = float((rows == 0).double().mean())
    return summary


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
            for key, value in {**values, "perplexity": perplexity(values["loss"])}.items():
                if key != "step" and value is not None:
                    self._board.add_scalar(f"train/{key}", value, step)
            for name, counts in load.items():
                share = counts / counts.sum(-1, keepdim=True).clamp_min(1.0) * counts.shape[-1]
                self._board.add_scalar(f"expert_load_max/{name}", float(share.max()), step)
        if step % self._config.print_every_steps == 0 or step in (self._first + 1, self._last):
            print(self._line(step, values), flush=True)

    def validation(self, step: int, values: dict[str, float]) -> None:
        """Records a validation after optimizer step `step`."""
        self._folder.event("validation", step=step, **values)
        if self._board is not None:
            for key, value in values.items():
                self._board.add_scalar(f"validation/{key}", value, step)
        bits = f"  bits per byte {values['bits_per_byte']:.4f}" if "bits_per_byte" in values else ""
        print(
            f"validation after step {step}: loss {values['loss']:.4f}  perplexity {values['perplexity']:.2f}{bits}",
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
        norm = "skipped" if values["grad_norm"] is None else f"{values['grad_norm']:.3f}"
        line = (
            f"step {step:>{width}}/{self._last}  loss {values['loss']:.4f}  ppl {perplexity(values['loss']):.4g}  "
            f"grad {norm}  lr {values['lr']:.2e}  {values['tokens_per_second']:,.0f} tok/s"
        )
        if "feedforward_load_max" in values:
            line += f"  load {values['feedforward_load_max']:.2f}x"
        return line + f"  ETA {clock(remaining)}"


def perplexity(loss: float) -> float:
    """exp(loss), infinity where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def clock(seconds: float) -> str:
    """h:mm:ss, or m:ss below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
