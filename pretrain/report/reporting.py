"""What a run says of itself: the line of a step, validations, and where a start begins."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from common.errors import UserError
from common.strict_json import finite, without_nan
from pretrain import checkpoint as checkpoints
from pretrain.checkpoint import Checkpoint
from pretrain.config.loading import to_json
from pretrain.config.schedule import learning_rate
from pretrain.data.progress import Progress
from pretrain.device import memory_bytes
from pretrain.evaluate import evaluate, evaluation_windows, unigram_perplexity
from pretrain.report.monitor import Monitor
from pretrain.report.router_load import load_summary
from pretrain.report.run_folder import RunFolder
from pretrain.resume import environment_changes
from pretrain.trainer import StepResult, Trainer


def step_values(trainer: Trainer, result: StepResult, progress: Progress, seconds: float) -> dict[str, float | None]:
    """One line of metrics.jsonl. None: a loss that is not a number, the norm of a skipped update."""
    config, sums = trainer.config, result.sums
    memory, memory_peak = memory_bytes(trainer.device)
    values: dict[str, float | None] = {
        "step": progress.step,
        "loss": finite(sums.loss),
        "auxiliary_loss": finite(sums.auxiliary_loss),
        "grad_norm": result.grad_norm,
        "lr": learning_rate(config, progress.step - 1),
        "tokens": progress.consumed_sequences * config.model.sequence_length,
        "tokens_per_second": config.batch.global_sequences * config.model.sequence_length / seconds,
        "step_seconds": seconds,
        "data_wait_seconds": trainer.prefetcher.wait_seconds,
        "epoch": trainer.stream.epoch(progress.consumed_sequences),
        "memory_bytes": memory,
        "memory_peak_bytes": memory_peak,
        **load_summary(sums.load, config.model),
    }
    names = [source.name for source in trainer.sources.sources]
    if len(names) > 1:
        epochs = trainer.stream.source_epochs(progress.consumed_sequences)
        values |= {f"epoch/{name}": epoch for name, epoch in zip(names, epochs, strict=True)}
    if sums.negative_entropy is not None:
        values["routing_negative_entropy"] = finite(sums.negative_entropy)
    if result.flips is not None:
        values |= result.flips.values()
    if trainer.engine.fp16_enabled():
        values["loss_scale"] = float(trainer.engine.optimizer.loss_scale)
    return values


def run_validation(
    trainer: Trainer, monitor: Monitor | None, step: int, *, is_last: bool, stopping: Callable[[], bool]
) -> float | None:
    """Validates on the held-out split; after the last step also prints the unigram perplexity of the same tokens.
    Collective, as `stopping` is, which is asked before every batch. Returns the loss on every rank; None without a
    validation split, if it was to stop, or where the loss is not finite."""
    if trainer.validation is None:
        return None
    trainer.phases.enter("validation")
    values = evaluate(
        trainer.engine.module,
        trainer.executor,
        trainer.validation,
        trainer.config,
        trainer.parallel,
        trainer.device,
        before_batch=lambda: _goes_on(trainer, stopping),
    )
    if values is None or monitor is None:
        return None if values is None else finite(values["loss"])
    if is_last:
        windows = evaluation_windows(trainer.validation, trainer.config)
        values["unigram_perplexity"] = unigram_perplexity(trainer.validation, windows)
    split = trainer.config.evaluate.split
    monitor.validation(step, without_nan(values), split=split)
    if is_last and math.isfinite(values["loss"]):
        below = 100 * (1 - values["perplexity"] / values["unigram_perplexity"])
        bits = f" ({values['bits_per_byte']:.4f} bits per byte)" if "bits_per_byte" in values else ""
        print(
            f"{split} perplexity {values['perplexity']:.2f}{bits}; unigram perplexity of the same "
            f"{values['tokens']:,.0f} tokens {values['unigram_perplexity']:.2f} "
            f"({abs(below):.1f}% {'below' if below >= 0 else 'above'})",
            flush=True,
        )
    return finite(values["loss"])


def _goes_on(trainer: Trainer, stopping: Callable[[], bool]) -> bool:
    trainer.phases.enter("validation")  # every batch is a sign of life
    return not stopping()


def prepare_folder(
    folder: RunFolder,
    trainer: Trainer,
    resumed: Checkpoint | None,
    damaged: list[str],
    changes: dict[str, tuple[Any, Any]],
    last: int,
) -> None:
    """Rank 0, before the first step: sets aside what this start supersedes, records and prints where it begins. Raises
    UserError where the disk refuses."""
    try:
        _prepare_folder(folder, trainer, resumed, damaged, changes, last)
    except OSError as error:
        raise UserError(f"--run-dir: {error.filename or folder.path} cannot be written: {error.strerror}") from None


def _prepare_folder(
    folder: RunFolder,
    trainer: Trainer,
    resumed: Checkpoint | None,
    damaged: list[str],
    changes: dict[str, tuple[Any, Any]],
    last: int,
) -> None:
    step = resumed.progress.step if resumed else 0
    for reason in damaged:
        print(f"passed over a damaged checkpoint: {reason}", flush=True)
        folder.event("checkpoint_passed_over", reason=reason)
    for path in checkpoints.set_aside_newer(folder.checkpoints, step):
        print(f"set aside a checkpoint of a later step: {path}", flush=True)
        folder.event("checkpoint_set_aside", path=path.name)
    folder.rewind_metrics(step)
    folder.write_config(to_json(trainer.config))
    folder.event("started", step=step, ranks=dist.get_world_size(), last_step=last)
    if resumed is None:
        return
    print(f"resuming from {resumed.path} at step {step}", flush=True)
    folder.event("resumed", step=step, path=str(resumed.path))
    layout = checkpoints.layout(trainer.engine, trainer.parallel)
    for key, (then, now) in {**changes, **environment_changes(resumed, layout)}.items():
        print(f"  changed on resume: {key}: {then!r} -> {now!r}", flush=True)
        folder.event("changed_setting", key=key, then=then, now=now)
