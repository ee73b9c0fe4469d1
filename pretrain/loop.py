"""Training, top to bottom: build, resume, step, validate, save."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from model.language_model import build_model
from model.memory import layer_memories
from model.parallel.context import ParallelContext
from pretrain import checkpoint as checkpoints
from pretrain.agreement import agreed, check_same, check_shared
from pretrain.checkpoint import Checkpoint, Retention, Saver
from pretrain.checkpoint.saver import Outcome
from pretrain.config import Config
from pretrain.config_io import to_json
from pretrain.data import Batch, TrainingStream, Windows
from pretrain.device import synchronize
from pretrain.engine import GradientNorm, build_engine, parallel_context, set_learning_rate, step_was_skipped
from pretrain.evaluate import evaluate, evaluation_windows, unigram_perplexity
from pretrain.monitor import Monitor
from pretrain.prefetch import Prefetcher
from pretrain.progress import Progress
from pretrain.resume import branch_start, candidates, changed_settings, environment_changes, newest_valid
from pretrain.rules import choose_backends
from pretrain.run_folder import RunFolder
from pretrain.schedule import learning_rate
from pretrain.sources import Sources
from pretrain.step_sums import StepReducer, StepSums, load_summary
from pretrain.whole import Run, WholeRun

EXIT_DIVERGED = 3
"""Exit code of a run whose loss or gradient norm stopped being a number."""


class Diverged(RuntimeError):
    """Loss or gradient norm is not finite."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step gives, the same on every rank."""

    sums: StepSums
    grad_norm: float | None
    """Global gradient norm before clipping; None where fp16 loss scaling skipped the update."""


@dataclass
class Trainer:
    """Everything a step needs, on this rank."""

    config: Config
    engine: Any
    run: Run
    norm: GradientNorm
    reduce: StepReducer
    sources: Sources
    stream: TrainingStream
    prefetcher: Prefetcher
    validation: Windows | None
    saver: Saver
    parallel: ParallelContext
    device: torch.device

    def step(self, progress: Progress) -> StepResult:
        """The optimizer step after `progress`: all micro-steps, clipping, update. Collective."""
        set_learning_rate(self.engine, learning_rate(self.config, progress.step))
        if self.stream.begins(progress.consumed_sequences):
            for _, memory in layer_memories(self.engine.module):
                memory.forget()
        batches = self._read(progress.consumed_sequences)
        loss_sum, auxiliary_sum = self.run.train(batches)
        for _, memory in layer_memories(self.engine.module):
            memory.advance()
        skipped = step_was_skipped(self.engine)
        sums = self.reduce(loss_sum, auxiliary_sum, len(batches), keep_statistics=not skipped)
        return StepResult(sums, None if skipped else self.norm.value())

    def _read(self, consumed: int) -> list[Batch]:
        """All micro-batches of a step. Taken before the first collective, so that a damaged shard is one rank's message
        and not everybody's hang."""
        return agreed(lambda: self.prefetcher.take(consumed))


def train(config: Config, sources: Sources, run_dir: Path, device: torch.device) -> None:
    """Runs until train.steps or train.stop_after_steps. Collective; the process group must exist.

    Raises UserError (nothing was changed) and Diverged (the last checkpoint stands).
    """
    parallel = parallel_context(config)
    check_same(f"{sources.key} (digest)", sources.digest)
    folder = agreed(lambda: RunFolder(run_dir, writes=parallel.is_first))
    check_shared(run_dir)
    resumed, passed_over, changes = agreed(lambda: find_start(config, sources, run_dir))
    trainer = build_trainer(config, sources, parallel, device, resumed)
    progress = resumed.progress if resumed else Progress(step=0, consumed_sequences=0)
    last = min(config.train.steps, config.train.stop_after_steps or config.train.steps)

    monitor = None
    if parallel.is_first:
        prepare_folder(folder, config, trainer, resumed, passed_over, changes, last)
        monitor = Monitor(config, folder, first_step=progress.step, last_step=last)
    if progress.step >= last:
        run_validation(trainer, monitor, progress.step, is_last=True)

    validation_loss = None
    while progress.step < last:
        synchronize(device)
        started = time.perf_counter()
        result = trainer.step(progress)
        synchronize(device)
        seconds = time.perf_counter() - started
        progress = Progress(progress.step + 1, progress.consumed_sequences + config.batch.global_sequences)
        check_finite(result, progress.step)
        if monitor is not None:
            monitor.step(step_values(trainer, result, progress, seconds), result.sums.load)
        if _is_due(progress.step, config.evaluate.every_steps, last):
            validation_loss = run_validation(trainer, monitor, progress.step, is_last=progress.step == last)
        if _is_due(progress.step, config.checkpoint.every_steps, last):
            if monitor is not None:
                monitor.flush()
            losses = {"loss": result.sums.loss, "validation_loss": validation_loss}
            save(trainer, folder, progress, sources, branch_start(config, resumed), **losses)
        validation_loss = None

    trainer.prefetcher.close()
    trainer.saver.finish()
    if monitor is not None:
        folder.event("finished", step=progress.step)
        print(f"finished at step {progress.step} of {config.train.steps}; run folder {run_dir}", flush=True)
        monitor.close()


def find_start(
    config: Config, sources: Sources, run_dir: Path
) -> tuple[Checkpoint | None, list[str], dict[str, tuple[Any, Any]]]:
    """The checkpoint to continue from, if any, why newer ones were passed over, and the settings that differ from it.
    Collective; rank 0's listing of the folder counts. Raises UserError on every rank alike."""
    paths = [candidates(config, run_dir)]
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if world_size > 1:
        dist.broadcast_object_list(paths, src=0)
    resumed, passed_over = newest_valid(paths[0], rank=rank, world_size=world_size)
    changes = changed_settings(config, resumed, sources.digest) if resumed else {}
    return resumed, passed_over, changes


def check_finite(result: StepResult, step: int) -> None:
    """Raises Diverged where loss or gradient norm is not a number (a skipped fp16 step is not a divergence)."""
    norm = 0.0 if result.grad_norm is None else result.grad_norm
    if not (math.isfinite(result.sums.loss) and math.isfinite(norm)):
        raise Diverged(
            f"step {step}: loss {result.sums.loss}, gradient norm {norm}: not finite. The last checkpoint stands: "
            f"resume from it with a lower learning rate (--set optimizer.learning_rate=... "
            f"--set 'checkpoint.allow_changes=[\"optimizer\"]'), or from an earlier one (checkpoint.resume=PATH)"
        )


def build_trainer(
    config: Config, sources: Sources, parallel: ParallelContext, device: torch.device, resumed: Checkpoint | None
) -> Trainer:
    """Model, engine and data of this rank, from the initial weights or from a checkpoint."""
    # Nothing in training draws from torch's generator; seeded so that code which a user adds is repeatable.
    torch.manual_seed(config.train.seed + dist.get_rank())
    backends = choose_backends(config, device.type)
    if parallel.is_first:
        print(f"kernels: {backends}", flush=True)
    model: nn.Module
    if parallel.pipeline_size > 1:
        from pretrain.pipeline import PipelineRun, Stage  # imports DeepSpeed, which the device module prepares

        model = Stage(config, parallel, backends)
    else:
        model = build_model(config.model, parallel, backends, seed=config.train.seed, recompute=config.train.recompute)
    if resumed is not None:
        agreed(lambda: checkpoints.load_weights(resumed, model, parallel))
    engine = build_engine(model, config, parallel, device)
    norm = GradientNorm(engine, config.optimizer.clip_norm, parallel)
    run: Run = PipelineRun(engine) if parallel.pipeline_size > 1 else WholeRun(engine, norm)

    train_reader = sources.reader("train", config)
    stream = TrainingStream(train_reader, config, data_rank=parallel.data_rank, data_size=parallel.data_size)
    validation = sources.reader("validation", config) if config.evaluate.sequences else None
    for _, memory in layer_memories(engine.module):
        memory.assign(stream.streams().to(device), config.batch.global_sequences)
    if resumed is not None:
        # Memory is of the tokens just before the next ones: other data or another cut of it has none.
        then = resumed.state["config"]["model"]["sequence_length"], resumed.state["manifest_digest"]
        same_text = then == (config.model.sequence_length, sources.digest)
        agreed(lambda: checkpoints.load_training_state(resumed, engine, parallel, with_memory=same_text))
        if config.model.memory_length and not same_text and parallel.is_first:
            print("memory begins empty: the checkpoint's is of other text", flush=True)
    reduce = StepReducer(engine.module, parallel)
    prefetcher = Prefetcher(stream, device, global_sequences=config.batch.global_sequences)
    saver = Saver(engine, parallel, device, asynchronous=config.checkpoint.asynchronous)
    return Trainer(config, engine, run, norm, reduce, sources, stream, prefetcher, validation, saver, parallel, device)


def step_values(trainer: Trainer, result: StepResult, progress: Progress, seconds: float) -> dict[str, float | None]:
    """One line of metrics.jsonl."""
    config, sums = trainer.config, result.sums
    values: dict[str, float | None] = {
        "step": progress.step,
        "loss": sums.loss,
        "auxiliary_loss": sums.auxiliary_loss,
        "grad_norm": result.grad_norm,
        "lr": learning_rate(config, progress.step - 1),
        "tokens": progress.consumed_sequences * config.model.sequence_length,
        "tokens_per_second": config.batch.global_sequences * config.model.sequence_length / seconds,
        "step_seconds": seconds,
        "data_wait_seconds": trainer.prefetcher.wait_seconds,
        "epoch": trainer.stream.epoch(progress.consumed_sequences),
        **load_summary(sums.load),
    }
    names = [source.name for source in trainer.sources.sources]
    if len(names) > 1:
        epochs = trainer.stream.source_epochs(progress.consumed_sequences)
        values |= {f"epoch/{name}": epoch for name, epoch in zip(names, epochs, strict=True)}
    if sums.negative_entropy is not None:
        values["routing_negative_entropy"] = sums.negative_entropy
    if trainer.engine.fp16_enabled():
        values["loss_scale"] = float(trainer.engine.optimizer.loss_scale)
    return values


def run_validation(trainer: Trainer, monitor: Monitor | None, step: int, *, is_last: bool) -> float | None:
    """Validates on the held-out split; after the last step also prints the unigram perplexity of the same tokens.
    Returns the loss on every rank; None without a validation split."""
    if trainer.validation is None:
        return None
    values = evaluate(
        trainer.engine.module, trainer.run, trainer.validation, trainer.config, trainer.parallel, trainer.device
    )
    if monitor is None:
        return values["loss"]
    if is_last:
        windows = evaluation_windows(trainer.validation, trainer.config)
        values["unigram_perplexity"] = unigram_perplexity(trainer.validation, windows)
    monitor.validation(step, values)
    if is_last:
        below = 100 * (1 - values["perplexity"] / values["unigram_perplexity"])
        bits = f" ({values['bits_per_byte']:.4f} bits per byte)" if "bits_per_byte" in values else ""
        print(
            f"validation perplexity {values['perplexity']:.2f}{bits}; unigram perplexity of the same "
            f"{values['tokens']:,.0f} tokens {values['unigram_perplexity']:.2f} "
            f"({abs(below):.1f}% {'below' if below >= 0 else 'above'})",
            flush=True,
        )
    return values["loss"]


def save(
    trainer: Trainer,
    folder: RunFolder,
    progress: Progress,
    sources: Sources,
    started_from: str | None,
    *,
    loss: float | None = None,
    validation_loss: float | None = None,
) -> None:
    """Writes a checkpoint, or begins to (collective); its end is logged, and printed if it failed. `loss` and
    `validation_loss` are those of this very step, if there are any."""
    folder.make_durable()
    settings = trainer.config.checkpoint

    def report(outcome: Outcome) -> None:
        times = {"seconds": outcome.seconds, "stall_seconds": outcome.stall_seconds}
        if outcome.error is None:
            folder.event("checkpoint", step=outcome.step, path=outcome.path.name, bytes=outcome.bytes, **times)
        else:
            folder.event("checkpoint_failed", step=outcome.step, reason=outcome.error, **times)
            print(f"checkpoint of step {outcome.step} failed: {outcome.error}", file=sys.stderr, flush=True)

    trainer.saver.save(
        folder.checkpoints,
        progress,
        extra={
            "config": to_json(trainer.config),
            "manifest_digest": sources.digest,
            "tokenizer_sha256": sources.tokenizer.sha256,
            "branch_start": started_from,
            "loss": _number(loss),
            "validation_loss": _number(validation_loss),
        },
        retention=Retention(
            keep_last=settings.keep_last,
            keep_every_steps=settings.keep_every_steps,
            keep_best=settings.keep_best,
        ),
        report=report,
    )


def _number(value: float | None) -> float | None:
    """JSON has no NaN."""
    return value if value is not None and math.isfinite(value) else None


def prepare_folder(
    folder: RunFolder,
    config: Config,
    trainer: Trainer,
    resumed: Checkpoint | None,
    passed_over: list[str],
    changes: dict[str, tuple[Any, Any]],
    last: int,
) -> None:
    """Rank 0, before the first step: sets aside what this start supersedes, records and prints where it begins."""
    step = resumed.progress.step if resumed else 0
    for reason in passed_over:
        print(f"passed over a damaged checkpoint: {reason}", flush=True)
        folder.event("checkpoint_passed_over", reason=reason)
    for path in checkpoints.set_aside_newer(folder.checkpoints, step):
        print(f"set aside a checkpoint of a later step: {path}", flush=True)
        folder.event("checkpoint_set_aside", path=path.name)
    folder.rewind_metrics(step)
    folder.write_config(to_json(config))
    folder.event("started", step=step, ranks=dist.get_world_size(), last_step=last)
    if resumed is None:
        return
    print(f"resuming from {resumed.path} at step {step}", flush=True)
    folder.event("resumed", step=step, path=str(resumed.path))
    layout = checkpoints.layout(trainer.engine, trainer.parallel)
    for key, (then, now) in {**changes, **environment_changes(resumed, layout)}.items():
        print(f"  changed on resume: {key}: {then!r} -> {now!r}", flush=True)
        folder.event("changed_setting", key=key, then=then, now=now)


def _is_due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)
