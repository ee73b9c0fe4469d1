"""What a step needs, built from the initial weights or from a checkpoint; and the step itself."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from model.initialization import initialize
from model.memory import layer_memories
from model.parallel.context import ParallelContext
from pretrain.checkpoint import Checkpoint
from pretrain.checkpoint.initial import load_initial
from pretrain.checkpoint.saver import Saver
from pretrain.config.compile_rules import compile_decision
from pretrain.config.graph_rules import graph_decision
from pretrain.config.rules import choose_backends
from pretrain.config.schedule import learning_rate
from pretrain.config.schema import Config
from pretrain.data.progress import Progress
from pretrain.data.sources import Sources
from pretrain.data.training_data import TrainingData, open_training_data
from pretrain.data.windows import Batch
from pretrain.device import graph_maker
from pretrain.engine import zero_1
from pretrain.engine.build import build_engine, build_executor, build_module
from pretrain.engine.compiled import compile_blocks
from pretrain.engine.deepspeed_json import SMALLEST_LOSS_SCALE
from pretrain.engine.details import DetailsReading, Survey
from pretrain.engine.graphed import GraphedForward
from pretrain.engine.micro_steps import Executor
from pretrain.engine.moving_average import MovingAverage
from pretrain.engine.optimizer import set_learning_rate
from pretrain.engine.step_sums import StepReducer, StepReport
from pretrain.evaluation.training import NO_TASKS, RunTasks
from pretrain.late_reading import Laps, Stopwatch
from pretrain.parallel.agreement import agreed, attempt
from pretrain.phases import Phases
from pretrain.report.estimate import SideBySide
from pretrain.report.metrics import StepResult
from pretrain.routing.tape import Flips, Tape


@dataclass(frozen=True)
class RunSetup:
    """What is decided before the first segment of a run and holds for all of them, on this rank."""

    config: Config
    sources: Sources
    parallel: ParallelContext
    device: torch.device
    phases: Phases = field(default_factory=Phases)
    tasks: RunTasks = NO_TASKS
    """evaluate.tasks."""
    side_by_side: SideBySide | None = None
    """On rank 0: says what is expected of this start, and what it takes."""


@dataclass(frozen=True)
class StepInput:
    """What a step reads, on this rank."""

    batches: list[Batch]
    """Its micro-batches, on the device."""
    error: Exception | None
    """Why there are none, for the ranks to agree on."""
    watch: Stopwatch
    """Runs since before the batches were read."""
    wait_seconds: float
    """How long the batches were waited for."""


@dataclass(frozen=True)
class LaunchedStep:
    """A step that the host has queued. Until `read` nobody knows whether it updated the weights, or its loss."""

    report: StepReport
    given: StepInput
    flips: Flips | None
    loss_scale: float | None
    scale_can_fall: bool
    laps: Laps
    """The phases since the end of the step before."""
    details: DetailsReading | None = None

    def read(self) -> StepResult:
        """Waits until the device has ended the step, not for what was queued after it."""
        return StepResult(
            self.report.read(),
            seconds=self.given.watch.seconds(),
            data_wait_seconds=self.given.wait_seconds,
            flips=self.flips,
            loss_scale=self.loss_scale,
            scale_can_fall=self.scale_can_fall,
            phase_seconds=self.laps.seconds(),
            details=None if self.details is None else self.details.read(),
        )


@dataclass(frozen=True)
class HeldOutText:
    """The tokens that each validation of a start predicts; known on rank 0."""

    unigram_perplexity: float
    bytes: int | None
    """Of their text in UTF-8; None where that is not known."""


@dataclass
class Trainer:
    """What a step needs, on this rank."""

    setup: RunSetup
    engine: Any
    """DeepSpeed's."""
    executor: Executor
    reduce: StepReducer
    data: TrainingData
    saver: Saver
    survey: Survey | None = None
    """Takes details of some steps."""
    tape: Tape | None = None
    """Records or replays the choices of routers."""
    average: MovingAverage | None = None
    """Of the weights, with train.ema_decay."""
    held_out_text: HeldOutText | None = None
    """Since the first validation."""

    def __post_init__(self) -> None:
        self._laps = Laps(self.setup.device)
        self.setup.phases.on_enter = self._laps.begin

    def read_input(self, progress: Progress) -> StepInput:
        """The micro-batches of the step after `progress`, on this rank. All are read before the step's first
        collective, so that a damaged shard is one rank's message and not everybody's hang."""
        self.setup.phases.enter("reading batches")
        watch = Stopwatch(self.setup.device)
        batches, error = attempt(lambda: self.data.prefetcher.take(progress.consumed_sequences))
        return StepInput(batches, error, watch, self.data.prefetcher.wait_seconds)

    def launch(self, progress: Progress, given: StepInput) -> LaunchedStep:
        """The optimizer step after `progress`: all micro-steps, clipping, update. Returns when the device has been told
        all, which it may still be computing. Collective; every rank has its batches."""
        config, enter, number = self.setup.config, self.setup.phases.enter, progress.step + 1
        memories = [memory for _, memory in layer_memories(self.engine.module)]
        if self.data.stream.begins(progress.consumed_sequences):
            for memory in memories:
                memory.forget()
        rate, details, scale = learning_rate(config, progress.step), None, self._loss_scale()
        set_learning_rate(self.engine, rate)
        if self.tape is not None:
            enter("reading the recorded choices")
            self.tape.before_step(number, given.batches)

        surveyed = self.survey if self.survey is not None and self.survey.is_due(number) else None
        self.executor.before_update = surveyed.begin() if surveyed is not None else None
        output = self.executor.train(given.batches, self.setup.phases)  # forward, backward, clipping, update
        if self.average is not None:
            self.average.update(output.grad_norm)
        if surveyed is not None:
            enter("details")
            details = surveyed.end(rate)

        enter("adding up over ranks", quick=True)
        report = self.reduce(output, len(given.batches))
        given.watch.stop()
        if memories:
            # Hidden states that gave no finite loss would spoil every step to come.
            is_finite = math.isfinite(report.read().loss)
            for memory in memories:
                memory.advance() if is_finite else memory.forget()
        self.setup.phases.may_take_long()  # choices of routers are written, and a profile
        return LaunchedStep(
            report,
            given,
            laps=self._laps.cut("reading the step's sums"),
            details=details,
            flips=self.tape.after_step(number) if self.tape is not None else None,
            loss_scale=self._loss_scale(),
            scale_can_fall=scale is not None and scale > SMALLEST_LOSS_SCALE,
        )

    def _loss_scale(self) -> float | None:
        """Of the next step; None but for fp16."""
        return float(self.engine.optimizer.loss_scale) if self.engine.fp16_enabled() else None

    def close(self) -> None:
        """Ends the threads and frees what DeepSpeed holds; the rest goes with the last reference to this trainer."""
        if self.tape is not None and self.setup.parallel.is_first:
            print(self.tape.summary(), flush=True)
        self.setup.sources.patience.end()
        self.data.prefetcher.close()
        self.engine.destroy()


def build_trainer(
    setup: RunSetup, resumed: Checkpoint | None, *, progress: Progress | None = None, initial: Path | None = None
) -> Trainer:
    """Model, engine and data of this rank, from the initial weights (random, or those of train.init_from) or from a
    checkpoint. `progress` (default: the checkpoint's) says which data is left out; `initial`, which checkpoint
    train.init_from names (default: looked up). Collective."""
    config, parallel, device, phases = setup.config, setup.parallel, setup.device, setup.phases
    progress = progress or (resumed.progress if resumed else Progress(0, 0))
    # Nothing in training draws from torch's generator; seeded so that code which a user adds is repeatable.
    torch.manual_seed(config.train.seed + dist.get_rank())
    phases.enter("building the model")
    backends = choose_backends(config, device.type)
    if parallel.is_first:
        print(f"kernels: {backends}", flush=True)
    model = build_module(config, parallel, backends)
    if resumed is not None:
        from pretrain.checkpoint.loading import load_weights_together  # with torch.distributed.checkpoint: 2 s

        phases.enter("loading the weights")
        load_weights_together(resumed, model, parallel)
    elif config.train.init_from is None:
        initialize(model, config.model, parallel, seed=config.train.seed)
    else:
        load_initial(config, setup.sources.tokenizer.sha256, model, parallel, place=initial)
    phases.enter("building the engine")
    engine = build_engine(model, config, parallel, device)
    _compile_blocks(setup, engine)
    _record_micro_steps(setup, engine)
    data = open_training_data(config, setup.sources, parallel, device, progress)
    for _, memory in layer_memories(engine.module):
        memory.assign(data.stream.streams().to(device), config.batch.global_sequences)
    average = MovingAverage(engine, config.train.ema_decay) if config.train.ema_decay else None
    if resumed is not None:
        phases.enter("loading the training state")
        _load_training_state(setup, resumed, engine)
    reduce = StepReducer(engine.module, parallel, device)
    has_board = config.monitor.tensorboard or config.monitor.wandb != "off"
    return Trainer(
        setup,
        engine,
        build_executor(engine, config, parallel),
        reduce,
        data,
        Saver(engine, parallel, device, asynchronous=config.checkpoint.asynchronous, alive=phases.alive),
        survey=Survey(engine, config, parallel, device, reduce.router_names) if has_board else None,
        average=average,
    )


def _compile_blocks(setup: RunSetup, engine: Any) -> None:
    """Lets torch.compile compute the blocks where train.compile says so, and says what was decided."""
    wanted, why = compile_decision(setup.config, data_size=setup.parallel.data_size)
    if setup.parallel.is_first:
        print(f"blocks: {why}", flush=True)
    if wanted:
        compile_blocks(engine.module, setup.config.model)


def _record_micro_steps(setup: RunSetup, engine: Any) -> None:
    """Lets the micro-steps be recorded as CUDA graphs where train.cuda_graph says so, and says what was decided."""
    config, device = setup.config, setup.device
    wanted, why = graph_decision(config, data_size=setup.parallel.data_size, device_type=device.type)
    if setup.parallel.is_first:
        print(f"micro-steps: {why}", flush=True)
    if wanted:
        engine.module.forward = GraphedForward(engine.module, graph_maker(device), taken_at_once=zero_1.is_used(config))


def _load_training_state(setup: RunSetup, resumed: Checkpoint, engine: Any) -> None:
    """Loads optimizer, routing statistics and, if the data order goes on with the same text, memory."""
    from pretrain.checkpoint.loading import load_training_state

    config, saved = setup.config, resumed.state["config"]
    # Memory holds the tokens that precede the next ones, so it is useless after a change of data or sequence length.
    then = saved["model"]["sequence_length"], saved["data"].get("max_tokens"), resumed.state["manifest_digest"]
    same_text = then == (config.model.sequence_length, config.data.max_tokens, setup.sources.digest)
    agreed(lambda: load_training_state(resumed, engine, setup.parallel, with_memory=same_text))
    if config.model.memory_length and not same_text and setup.parallel.is_first:
        print("memory begins empty: the checkpoint's memory is of other text", flush=True)
