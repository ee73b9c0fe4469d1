"""A checkpoint of a running segment: when it is due by time, what goes into it besides the state, and what is said of
it."""

from __future__ import annotations

import sys
from time import monotonic

from pretrain.checkpoint import Retention
from pretrain.checkpoint.saver import Outcome, Saver
from pretrain.checkpoint.tokenizer_file import StoredTokenizer
from pretrain.config.loading import to_json
from pretrain.data.progress import Progress
from pretrain.report.run_folder import RunFolder
from pretrain.trainer import Trainer


def save(
    trainer: Trainer, folder: RunFolder, progress: Progress, branch_start: str | None, losses: dict[str, float | None]
) -> None:
    """Writes a checkpoint of `progress`, or begins to write it. Collective. The result is logged, and printed if it is
    a failure. `branch_start`: see resume.branch_start; `losses`: of the last step and its validation."""
    config, sources = trainer.setup.config, trainer.setup.sources

    def report(outcome: Outcome) -> None:
        times = {"seconds": outcome.seconds, "stall_seconds": outcome.stall_seconds}
        if outcome.error is None:
            folder.event("checkpoint", step=outcome.step, path=outcome.path.name, bytes=outcome.bytes, **times)
            print(
                f"checkpoint saved: {outcome.path} ({outcome.bytes / 2**20:,.1f} MiB in {outcome.seconds:.1f} s, "
                f"training stood still for {outcome.stall_seconds:.1f} s)",
                flush=True,
            )
        else:
            folder.event("checkpoint_failed", step=outcome.step, reason=outcome.error, **times)
            print(f"checkpoint of step {outcome.step} failed: {outcome.error}", file=sys.stderr, flush=True)

    settings = config.checkpoint
    trainer.saver.save(
        folder.checkpoints,
        progress,
        extra={
            "config": to_json(config),
            "manifest_digest": sources.digest,
            "tokenizer_sha256": sources.tokenizer.sha256,
            "tokenizer_use": StoredTokenizer.of(sources.sources[0].manifest).use,
            "branch_start": branch_start,
            **losses,
        },
        retention=Retention(
            keep_last=settings.keep_last,
            keep_every_steps=settings.keep_every_steps,
            keep_best=settings.keep_best,
        ),
        before=folder.make_durable,
        report=report,
    )


class SaveTimer:
    """Whether a checkpoint is due by time (checkpoint.every_minutes), by this rank's clock. Not collective: rank 0's
    answer counts."""

    def __init__(self, minutes: float, saver: Saver) -> None:
        """Begins to count. 0 minutes: nothing is ever due."""
        self._seconds, self._saver = 60.0 * minutes, saver
        self._since = monotonic()

    def is_due(self) -> bool:
        """Not while the last one is being written: the next would make training wait for the disk."""
        return 0.0 < self._seconds <= monotonic() - self._since and not self._saver.is_writing

    def restart(self) -> None:
        """Counts from now on: training goes on after a save."""
        self._since = monotonic()
