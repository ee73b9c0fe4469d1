"""The loops that are compared: ours as a user runs it, a bare one of PyTorch, and DeepSpeed's engine without us.

All three train the same model, from the same weights, on the same micro-batches with the same learning rates, and all
take torch's AdamW. Each keeps its loss of every step, which shows that they do the same work. A fourth loop, which has
a model of its own, is in benchmarks/loop/nanogpt.py.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from model.language_model import build_model, routing_statistics
from model.memory import layer_memories
from pretrain.config.rules import choose_backends
from pretrain.config.schedule import learning_rate
from pretrain.config.schema import Config
from pretrain.data.sources import open_sources
from pretrain.data.windows import Batch, TrainingStream
from pretrain.engine.deepspeed_json import deepspeed_json
from pretrain.engine.optimizer import parameter_groups
from pretrain.parallel.agreement import agreed
from pretrain.parallel.context import parallel_context
from pretrain.report.run_folder import RunFolder
from pretrain.resilience.guard import guarded
from pretrain.resilience.signals import Stop
from pretrain.resume import find_start
from pretrain.segment import Segment
from pretrain.segment_start import build_segment
from pretrain.trainer import RunSetup


class Loop(Protocol):
    """A model in training."""

    def train(self, steps: int) -> None:
        """So many steps more. What they write is written when this returns."""

    def losses(self) -> list[float]:
        """Of every step so far. The last thing that is asked."""


class Peer(Loop, Protocol):
    """Another loop than ours."""

    def close(self) -> None:
        """Frees what it holds of this process."""


class Ours:
    """The steps of pretrain.loop.train: reading ahead, agreeing, metrics.jsonl, TensorBoard, routing statistics, the
    watchdog. Nothing is validated or saved, and the process that estimates a run at its start has ended by then."""

    def __init__(self, segment: Segment, run_dir: Path) -> None:
        self._segment, self._run_dir, self._step = segment, run_dir, 0

    def train(self, steps: int) -> None:
        # The last step of this call is reported in the next one, as every step is; that of the call before in this.
        self._step += steps
        self._segment.advance(self._step)
        if self._segment.monitor is not None:  # of the first rank
            self._segment.monitor.flush()

    def losses(self) -> list[float]:
        self.train(1)  # which reports the step before
        return [json.loads(line)["loss"] for line in (self._run_dir / "metrics.jsonl").read_text().splitlines()]


@contextlib.contextmanager
def our_loop(config: Config, run_dir: Path, device: torch.device) -> Iterator[Ours]:
    """Ours, from its start to its end, as pretrain.loop.train builds it. Collective."""
    sources = open_sources(config)
    setup = RunSetup(config, sources, parallel_context(config), device)
    folder, stop = agreed(lambda: RunFolder(run_dir, writes=setup.parallel.is_first)), Stop()
    with guarded(config.resilience, folder, stop, setup.phases) as control:
        segment = build_segment(setup, folder, control, find_start(config, sources, run_dir, None))
        try:
            yield Ours(segment, run_dir)
        finally:
            segment.close()


class Given:
    """What the other loops are given, in memory: the micro-batches and learning rates of the first steps."""

    def __init__(self, config: Config, steps: int) -> None:
        stream = TrainingStream(open_sources(config).reader("train", config), config, data_rank=0, data_size=1)
        self.config, self._streams = config, stream.streams()
        micro_steps, sequences = range(stream.micro_steps), config.batch.global_sequences
        self.batches = [[stream.batch(step * sequences, number) for number in micro_steps] for step in range(steps)]
        T = config.model.sequence_length
        self.offsets = [
            [stream.windows(stream.own_positions(step * sequences, number)) * T for number in micro_steps]
            for step in range(steps)
        ]
        """Of each step and micro-step, the first token of each sequence in the training split, [B] int64."""
        self.rates = [learning_rate(config, step) for step in range(steps)]

    def model(self, device: torch.device) -> nn.Module:
        """Ours, with its initial weights."""
        config = self.config
        backends = choose_backends(config, device.type)
        model = build_model(config.model, None, backends, seed=config.train.seed, recompute=config.train.recompute)
        for _, memory in layer_memories(model):
            memory.assign(self._streams, config.batch.global_sequences)
        for _, statistics in routing_statistics(model):
            # What is counted for the curves alone is a cost of ours.
            statistics.is_paused = not (statistics.tracks_probability or statistics.tracks_balance)
        return model

    def optimizer(self, model: nn.Module) -> torch.optim.AdamW:
        """The same as ours: torch's, fused, which is the fastest that torch has."""
        o = self.config.optimizer
        groups = parameter_groups(model, self.config)
        return torch.optim.AdamW(groups, lr=o.learning_rate, betas=o.betas, eps=o.eps, fused=True)


class OwnState:
    """What belongs to the model itself, and every loop must see to: its memory of the text before, and the means of its
    balancing losses."""

    def __init__(self, model: nn.Module) -> None:
        self._memories = [memory for _, memory in layer_memories(model)]
        self._statistics = [found for _, found in routing_statistics(model) if not found.is_paused]

    def end_step(self) -> None:
        for memory in self._memories:
            memory.advance()
        for statistics in self._statistics:
            statistics.finish_step()


class Bare:
    """What one writes without any framework: forward, backward, clipping, AdamW."""

    def __init__(self, given: Given, device: torch.device) -> None:
        self._given, self._model = given, given.model(device)
        self._optimizer, self._own = given.optimizer(self._model), OwnState(self._model)
        self._losses: list[Tensor] = []

    def train(self, steps: int) -> None:
        model, optimizer, clip_norm = self._model, self._optimizer, self._given.config.optimizer.clip_norm
        first = len(self._losses)
        for step in range(first, first + steps):
            batches: list[Batch] = self._given.batches[step]
            for group in optimizer.param_groups:
                group["lr"] = self._given.rates[step]
            losses = []
            for batch in batches:
                objective, sequence_loss, _ = model(*batch.model_inputs())
                (objective / len(batches)).backward()
                losses.append(sequence_loss.detach().mean())
            if clip_norm > 0.0:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
            optimizer.step()
            optimizer.zero_grad()
            self._own.end_step()
            self._losses.append(torch.stack(losses).mean())

    def losses(self) -> list[float]:
        return [float(loss) for loss in self._losses]

    def close(self) -> None:
        """It holds nothing of the process."""


class EngineAlone:
    """DeepSpeed's engine with the keys that we give it, called as its documentation says."""

    def __init__(self, given: Given, device: torch.device) -> None:
        import deepspeed  # here: device.start prepares its import

        self._given, model = given, given.model(device)
        self._own = OwnState(model)
        with contextlib.redirect_stdout(io.StringIO()):
            self._engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=given.optimizer(model),
                config=deepspeed_json(given.config, data_size=1),
                dist_init_required=False,
            )
        self._losses: list[Tensor] = []

    def train(self, steps: int) -> None:
        engine: Any = self._engine
        first = len(self._losses)
        for step in range(first, first + steps):
            for group in engine.optimizer.param_groups:
                group["lr"] = self._given.rates[step]
            losses = []
            for batch in self._given.batches[step]:
                objective, sequence_loss, _ = engine(*batch.model_inputs())
                engine.backward(objective)
                engine.step()
                losses.append(sequence_loss.detach().mean())
            self._own.end_step()
            self._losses.append(torch.stack(losses).mean())

    def losses(self) -> list[float]:
        return [float(loss) for loss in self._losses]

    def close(self) -> None:
        self._engine.destroy()
