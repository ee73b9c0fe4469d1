"""What a step needs, built from the initial weights or from a checkpoint; and the step itself."""

from __future__ import annotations

import gc
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from model.language_model import build_model
from model.memory import layer_memories
from model.parallel.context import ParallelContext
from pretrain import checkpoint as checkpoints
from pretrain.checkpoint import Checkpoint, Saver
from pretrain.config.rules import choose_backends
from pretrain.config.schedule import learning_rate
from pretrain.config.schema import Config
from pretrain.data.prefetch import Prefetcher
from pretrain.data.progress import Progress
from pretrain.data.sources import Sources
from pretrain.data.windows import Batch, TrainingStream, Windows
from pretrain.engine.build import build_engine
from pretrain.engine.gradient_norm import GradientNorm
from pretrain.engine.micro_steps import Executor, PlainExecutor
from pretrain.engine.optimizer import set_learning_rate
from pretrain.engine.step_sums import StepReducer, StepSums
from pretrain.parallel.agreement import agreed
from pretrain.phases import Phases
from pretrain.routing.tape import Flips, Tape


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step gives, the same on every rank."""

    sums: StepSums
    grad_norm: float | None
    """Global gradient norm before clipping; None where the update was skipped, because it or the loss is not finite."""
    flips: Flips | None = None
    """With train.replay_routing."""


@dataclass
class Trainer:
    """Everything a step needs, on this rank."""

    config: Config
    engine: Any
    executor: Executor
    reduce: StepReducer
    sources: Sources
    stream: TrainingStream
    prefetcher: Prefetcher
    validation: Windows | None
    saver: Saver
    phases: Phases
    parallel: ParallelContext
    device: torch.device
    tape: Tape | None = None
    """Records or replays the choices of routers."""

    def step(self, progress: Progress) -> StepResult:
        """The optimizer step after `progress`: all micro-steps, clipping, update. Collective."""
        memories = [memory for _, memory in layer_memories(self.engine.module)]
        set_learning_rate(self.engine, learning_rate(self.config, progress.step))
        if self.stream.begins(progress.consumed_sequences):
            for memory in memories:
                memory.forget()
        self.phases.enter("reading batches")
        batches = self._read(progress.consumed_sequences)
        if self.tape is not None:
            self.phases.enter("reading the recorded choices")
            self.tape.before_step(progress.step + 1, batches)
        output = self.executor.train(batches, self.phases)
        self.phases.enter("adding up over ranks")
        sums = self.reduce(output, len(batches))
        for memory in memories:
            # Hidden states that gave no finite loss would spoil every step to come.
            memory.advance() if math.isfinite(sums.loss) else memory.forget()
        flips = self.tape.after_step(progress.step + 1) if self.tape is not None else None
        return StepResult(sums, output.grad_norm, flips)

    def _read(self, consumed: int) -> list[Batch]:
        """All micro-batches of a step. Taken before the first collective, so that a damaged shard is one rank's message
        and not everybody's hang."""

        def take() -> list[Batch]:
            batches = self.prefetcher.take(consumed)
            self.phases.enter("waiting for the batches of other ranks")
            return batches

        return agreed(take)

    def close(self) -> None:
        """Gives its memory back; nothing of it works afterwards."""
        if self.tape is not None and self.parallel.is_first:
            print(self.tape.summary(), flush=True)
        self.prefetcher.close()
        self.engine.destroy()
        self.engine = self.executor = self.reduce = self.saver = None  # type: ignore[assignment]
        gc.collect()


def build_trainer(
    config: Config,
    sources: Sources,
    parallel: ParallelContext,
    device: torch.device,
    resumed: Checkpoint | None,
    *,
    progress: Progress | None = None,
    phases: Phases | None = None,
) -> Trainer:
    """Model, engine and data of this rank, from the initial weights or from a checkpoint. `progress` (default: the
    checkpoint's) says which data is left out."""
    phases = phases or Phases()
    progress = progress or (resumed.progress if resumed else Progress(0, 0))
    # Nothing in training draws from torch's generator; seeded so that code which a user adds is repeatable.
    torch.manual_seed(config.train.seed + dist.get_rank())
    backends = choose_backends(config, device.type)
    if parallel.is_first:
        print(f"kernels: {backends}", flush=True)
    phases.enter("building the model")
    model: nn.Module
    if parallel.pipeline_size > 1:
        # Imports DeepSpeed, which pretrain/device.py must prepare before.
        from pretrain.engine.pipeline import PipelineExecutor, PipelineStage

        model = PipelineStage(config, parallel, backends)
    else:
        model = build_model(config.model, parallel, backends, seed=config.train.seed, recompute=config.train.recompute)
    if resumed is not None:
        phases.enter("loading the weights")
        agreed(lambda: checkpoints.load_weights(resumed, model, parallel))
    phases.enter("building the engine")
    engine = build_engine(model, config, parallel, device)
    executor: Executor
    if parallel.pipeline_size > 1:
        executor = PipelineExecutor(engine)
    else:
        executor = PlainExecutor(engine, GradientNorm(engine, config.optimizer.clip_norm, parallel))

    train_reader = sources.reader("train", config)
    stream = TrainingStream(
        train_reader,
        config,
        data_rank=parallel.data_rank,
        data_size=parallel.data_size,
        skipped=progress.skipped_ranges,
    )
    validation = sources.reader(config.evaluate.split, config) if config.evaluate.sequences else None
    for _, memory in layer_memories(engine.module):
        memory.assign(stream.streams().to(device), config.batch.global_sequences)
    if resumed is not None:
        phases.enter("loading the training state")
        # Memory is of the tokens just before the next ones: other data or another cut of it has none.
        saved = resumed.state["config"]
        then = saved["model"]["sequence_length"], saved["data"].get("max_tokens"), resumed.state["manifest_digest"]
        same_text = then == (config.model.sequence_length, config.data.max_tokens, sources.digest)
        agreed(lambda: checkpoints.load_training_state(resumed, engine, parallel, with_memory=same_text))
        if config.model.memory_length and not same_text and parallel.is_first:
            print("memory begins empty: the checkpoint's is of other text", flush=True)
    reduce = StepReducer(engine.module, parallel)
    prefetcher = Prefetcher(stream, device, global_sequences=config.batch.global_sequences)
    saver = Saver(engine, parallel, device, asynchronous=config.checkpoint.asynchronous, alive=phases.alive)
    return Trainer(
        config=config,
        engine=engine,
        executor=executor,
        reduce=reduce,
        sources=sources,
        stream=stream,
        prefetcher=prefetcher,
        validation=validation,
        saver=saver,
        phases=phases,
        parallel=parallel,
        device=device,
    )
