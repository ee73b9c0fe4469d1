"""Training, top to bottom: build, resume, step, validate, save."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data_prep.shard_format import Manifest
from model.language_model import build_model
from model.parallel.context import ParallelContext
from pretrain import checkpoint as checkpoints
from pretrain.checkpoint import Checkpoint, Progress
from pretrain.config import Config
from pretrain.config_io import to_json
from pretrain.data import TrainingStream, WindowReader
from pretrain.device import synchronize
from pretrain.engine import GradientNorm, build_engine, parallel_context, set_learning_rate
from pretrain.evaluate import evaluate, evaluation_windows, unigram_perplexity
from pretrain.monitor import Monitor, StepSums, load_summary, reduce_step
from pretrain.resume import candidates, changed_settings, newest_valid
from pretrain.run_folder import RunFolder
from pretrain.schedule import learning_rate

EXIT_DIVERGED = 3
"""Exit code of a run whose loss or gradient norm stopped being a number."""


class Diverged(RuntimeError):
    """Loss or gradient norm is not finite."""


@dataclass
class Trainer:
    """Everything a step needs, on this rank."""

    config: Config
    engine: Any
    stream: TrainingStream
    validation: WindowReader | None
    parallel: ParallelContext
    device: torch.device

    def step(self, step: int) -> tuple[StepSums, float]:
        """Optimizer step `step` (from 0): all micro-steps, clipping, update. Returns global sums and gradient norm."""
        set_learning_rate(self.engine, learning_rate(self.config, step))
        norm = GradientNorm(self.engine)
        loss_sum, auxiliary_sum = torch.zeros((2,), device=self.device).unbind()
        for micro_step in range(self.stream.micro_steps):
            batch = self.stream.batch(step, micro_step, self.device)
            objective, sequence_loss = self.engine(batch.tokens, batch.targets, batch.sequence_index)
            self.engine.backward(objective)
            loss_sum = loss_sum + sequence_loss.mean()
            auxiliary_sum = auxiliary_sum + objective.detach() - sequence_loss.mean()
            if micro_step == self.stream.micro_steps - 1:
                norm.before_step()
            self.engine.step()
        sums = reduce_step(self.engine.module, loss_sum, auxiliary_sum, self.stream.micro_steps, self.parallel)
        return sums, norm.value()


def train(config: Config, manifest: Manifest, run_dir: Path, device: torch.device) -> None:
    """Runs until train.steps or train.stop_after_steps. Collective; the process group must exist.

    Raises UserError (nothing was changed) and Diverged (the last checkpoint stands).
    """
    parallel = parallel_context()
    resumed, passed_over = newest_valid(
        candidates(config, run_dir), rank=parallel.data_rank, world_size=parallel.data_size
    )
    changes = changed_settings(config, resumed, manifest.digest) if resumed else {}
    trainer = build_trainer(config, manifest, parallel, device, resumed)
    progress = resumed.progress if resumed else Progress(step=0, consumed_sequences=0)
    last = min(config.train.steps, config.train.stop_after_steps or config.train.steps)

    is_writer = parallel.data_rank == 0
    folder = RunFolder(run_dir) if is_writer else None
    monitor = None
    if folder is not None:
        folder.rewind_metrics(progress.step)
        folder.write_config(to_json(config))
        _report_start(folder, resumed, passed_over, changes, progress, last)
        monitor = Monitor(config, folder, first_step=progress.step, last_step=last)

    for step in range(progress.step, last):
        synchronize(device)
        started = time.perf_counter()
        sums, grad_norm = trainer.step(step)
        synchronize(device)
        seconds = time.perf_counter() - started
        if not (math.isfinite(sums.loss) and math.isfinite(grad_norm)):
            raise Diverged(
                f"step {step + 1}: loss {sums.loss}, gradient norm {grad_norm}: not finite. Nothing was saved "
                f"after the last checkpoint; lower optimizer.learning_rate or resume from an earlier one"
            )
        progress = Progress(step=step + 1, consumed_sequences=(step + 1) * config.batch.global_sequences)
        if monitor is not None:
            monitor.step(step_values(config, trainer, sums, grad_norm, progress, seconds), sums.load)
        if _is_due(progress.step, config.evaluate.every_steps, last):
            run_validation(trainer, monitor, progress.step, is_last=progress.step == last)
        if _is_due(progress.step, config.checkpoint.every_steps, last):
            save(trainer, run_dir, progress, manifest, folder)

    if monitor is not None and folder is not None:
        folder.event("finished", step=progress.step)
        print(f"finished at step {progress.step} of {config.train.steps}; run folder {run_dir}", flush=True)
        monitor.close()


def build_trainer(
    config: Config, manifest: Manifest, parallel: ParallelContext, device: torch.device, resumed: Checkpoint | None
) -> Trainer:
    """Model, engine and data of this rank, from the initial weights or from a checkpoint."""
    # Nothing in training draws from torch's generator; seeded so that code which a user adds is repeatable.
    torch.manual_seed(config.train.seed + parallel.data_rank)
    model = build_model(config.model, parallel, seed=config.train.seed)
    if resumed is not None:
        checkpoints.load_weights(resumed, model)
    engine = build_engine(model, config, parallel, device)
    if resumed is not None:
        checkpoints.load_training_state(resumed, engine)

    def reader(split: str) -> WindowReader:
        first_read = config.data.verify == "size"
        return WindowReader(manifest, split, config.model.sequence_length, verify_on_first_read=first_read)

    stream = TrainingStream(reader("train"), config, data_rank=parallel.data_rank, data_size=parallel.data_size)
    validation = reader("validation") if config.evaluate.sequences else None
    return Trainer(config, engine, stream, validation, parallel, device)


def step_values(
    config: Config, trainer: Trainer, sums: StepSums, grad_norm: float, progress: Progress, seconds: float
) -> dict[str, float]:
    """One line of metrics.jsonl."""
    tokens_per_step = config.batch.global_sequences * config.model.sequence_length
    values: dict[str, float] = {
        "step": progress.step,
        "loss": sums.loss,
        "auxiliary_loss": sums.auxiliary_loss,
        "grad_norm": grad_norm,
        "lr": learning_rate(config, progress.step - 1),
        "tokens": progress.consumed_sequences * config.model.sequence_length,
        "tokens_per_second": tokens_per_step / seconds,
        "step_seconds": seconds,
        "epoch": trainer.stream.epoch(progress.step),
        **load_summary(sums.load),
    }
    if sums.negative_entropy:
        values["routing_negative_entropy"] = sum(sums.negative_entropy.values()) / len(sums.negative_entropy)
    return values


def run_validation(trainer: Trainer, monitor: Monitor | None, step: int, *, is_last: bool) -> None:
    """Validates on the held-out split; after the last step also prints the unigram perplexity of the same tokens."""
    if trainer.validation is None:
        return
    values = evaluate(trainer.engine, trainer.validation, trainer.config, trainer.parallel, trainer.device)
    if monitor is None:
        return
    if is_last:
        windows = evaluation_windows(trainer.validation, trainer.config)
        values["unigram_perplexity"] = unigram_perplexity(trainer.validation, windows)
    monitor.validation(step, values)
    if is_last:
        below = 100 * (1 - values["perplexity"] / values["unigram_perplexity"])
        print(
            f"validation perplexity {values['perplexity']:.2f}; unigram perplexity of the same "
            f"{values['tokens']:,.0f} tokens {values['unigram_perplexity']:.2f} ({below:.1f}% below)",
            flush=True,
        )


def save(trainer: Trainer, run_dir: Path, progress: Progress, manifest: Manifest, folder: RunFolder | None) -> None:
    """Writes a checkpoint (collective) and logs it."""
    started = time.perf_counter()
    path = checkpoints.save(
        trainer.engine,
        run_dir / "checkpoints",
        progress,
        extra={
            "config": to_json(trainer.config),
            "manifest_digest": manifest.digest,
            "tokenizer_sha256": manifest.tokenizer.sha256,
        },
        keep_last=trainer.config.checkpoint.keep_last,
    )
    if folder is not None:
        folder.event("checkpoint", step=progress.step, path=path.name, seconds=time.perf_counter() - started)


def _is_due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


def _report_start(
    folder: RunFolder,
    resumed: Checkpoint | None,
    passed_over: list[str],
    changes: dict[str, tuple[Any, Any]],
    progress: Progress,
    last: int,
) -> None:
    for reason in passed_over:
        print(f"passed over a damaged checkpoint: {reason}", flush=True)
        folder.event("checkpoint_passed_over", reason=reason)
    folder.event("started", step=progress.step, ranks=dist.get_world_size(), last_step=last)
    if resumed is None:
        return
    print(f"resuming from {resumed.path} at step {progress.step}", flush=True)
    folder.event("resumed", step=progress.step, path=str(resumed.path))
    for key, (then, now) in changes.items():
        print(f"  changed on resume: {key}: {then!r} -> {now!r}", flush=True)
        folder.event("changed_setting", key=key, then=then, now=now)
