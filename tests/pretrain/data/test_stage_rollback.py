"""A rollback that would reach behind a change of the mixture: what is read after it is what a run reads that never went
past."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain.checkpoint import Checkpoint, list_checkpoints
from pretrain.data.sources import Sources
from pretrain.data.windows import TrainingStream
from pretrain.resilience.rollback import Rollback, record
from pretrain.trainer import Trainer
from tests.harness import run_ranks
from tests.pretrain.data.test_stages import ALLOWED, FIRST, SECOND, Expected, G, alone, base, mixed, note_reads, read_at
from tests.pretrain.resilience.faults import spike_on_position, train_with
from tests.pretrain.runs import assert_bit_identical, events, metrics

__all__ = ["base"]

SPIKY = (
    "checkpoint.every_steps=1",
    "checkpoint.keep_last=20",
    "resilience.spike_window_steps=8",
    "resilience.spike_threshold=5",
    "resilience.spike_action=rollback",
    "resilience.spike_skip_steps=4",
)
CHANGE = 6
"""The step after which the weights change."""


def note_reads_and_spike(trainer: Trainer, log: Path, position: int) -> None:
    note_reads(trainer, log)
    spike_on_position(trainer, position)


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_rollback_leaves_out_nothing_from_before_a_change_of_the_weights(
    base: Path, tmp_path: Path, ranks: int
) -> None:
    """The second step of a stage spikes; four steps would reach into the stage before, whose positions would be other
    windows once the stage began earlier."""
    log, twin_log, run, twin = (tmp_path / name for name in ("log", "twin-log", "run", "twin"))
    log.mkdir()

    def take(mix: dict[str, float], until: int, folder: Path, prepare: Callable[..., None], *given: object) -> None:
        config = mixed(base, mix, f"train.stop_after_steps={until}", *SPIKY, ALLOWED, ranks=ranks)
        assert set(run_ranks(train_with, ranks, config, folder, prepare, *given)) == {"FINISHED"}

    take(FIRST, CHANGE, run, note_reads, log)
    shutil.copytree(run, twin)
    shutil.copytree(log, twin_log)
    take(SECOND, 10, run, note_reads_and_spike, log, (CHANGE + 1) * G + 3)
    begin = CHANGE * G
    (rollback,) = events(run, "rollback")
    assert (rollback["at_step"], rollback["first_step"]) == (CHANGE + 2, CHANGE + 1)
    assert rollback["skipped"] == [begin, begin + 2 * G]
    assert [row["step"] for row in metrics(run)] == list(range(1, 11))

    # Two steps of the new stage are left out, and no other window of any source.
    expected = Expected(base, FIRST)
    wanted = dict(enumerate(expected.stage(FIRST, begin) + expected.stage(SECOND, 6 * G)))
    for position in range(*rollback["skipped"]):
        del wanted[position]
    assert read_at(base, log) == wanted
    saved = Checkpoint.open(list_checkpoints(run / "checkpoints")[-1]).progress
    assert [stage.first for stage in saved.stages] == [0, begin]

    # A run that never went there: it is told before the change what to leave out, and is stopped behind the gap.
    record(twin, Rollback("told", CHANGE + 2, CHANGE + 1, (begin, begin + 2 * G)))
    take(SECOND, 8, twin, note_reads, twin_log)
    take(SECOND, 10, twin, note_reads, twin_log)
    assert_bit_identical(run, twin)
    assert read_at(base, log) == read_at(base, twin_log)


@pytest.mark.parametrize("kept", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_what_a_rollback_left_out_is_read_by_another_mixture_that_begins_before_it(
    base: Path, tmp_path: Path, kept: int
) -> None:
    """A step spikes, and two are left out. The run goes on from a checkpoint that was saved before the rollback, or
    from one of after it, which knows of the gap ahead. With other weights the same positions are other windows, and
    none of them is left out; nor where the first weights come back, behind windows of the others."""
    log, run = tmp_path / "log", tmp_path / "run"
    log.mkdir()

    def take(mix: dict[str, float], until: int, prepare: Callable[..., None], *given: object) -> None:
        keys = (*SPIKY, "resilience.spike_skip_steps=2", ALLOWED)
        config = mixed(base, mix, f"train.stop_after_steps={until}", *keys, ranks=1)
        assert set(run_ranks(train_with, 1, config, run, prepare, *given)) == {"FINISHED"}

    def forget(first: int) -> None:
        """As if the run had been killed before each checkpoint from step `first` on."""
        for path in list_checkpoints(run / "checkpoints"):
            if Checkpoint.open(path).progress.step >= first:
                shutil.rmtree(path)

    take(FIRST, CHANGE + 4, note_reads_and_spike, log, (CHANGE + 3) * G + 3)
    (rollback,) = events(run, "rollback")
    assert rollback["skipped"] == [(CHANGE + 2) * G, (CHANGE + 4) * G]
    (stage,) = Checkpoint.open(list_checkpoints(run / "checkpoints")[-1]).progress.stages
    assert rollback["stage"] == stage.to_json()
    begin = (CHANGE + kept) * G
    forget(CHANGE + 1)
    if kept:
        take(FIRST, CHANGE + 1, note_reads, log)
        ahead = Checkpoint.open(list_checkpoints(run / "checkpoints")[-1]).progress.skipped_ranges
        assert ahead == (tuple(rollback["skipped"]),)
    for path in log.iterdir():
        path.unlink()
    take(SECOND, CHANGE + kept + 1, note_reads, log)
    take(FIRST, CHANGE + 5, note_reads, log)  # over the positions that were left out
    expected = Expected(base, FIRST)
    expected.stage(FIRST, begin)
    wanted = expected.stage(SECOND, G) + expected.stage(FIRST, (4 - kept) * G)
    assert read_at(base, log) == dict(enumerate(wanted, begin))


def test_the_sequences_of_a_stage_are_counted_without_what_was_left_out_before_it(base: Path) -> None:
    """Counted one by one."""
    config = mixed(base, FIRST)
    sources = Sources.load(config)
    skipped = ((8, 18), (50, 60), (64, 72), (90, 98))
    read = [position for position in range(200) if not any(first <= position < end for first, end in skipped)]
    for first in (0, 8, 18, 30, 60, 64, 72, 89):
        stage = sources.stage().followed_by(first, sources.stage().sources)
        stream = TrainingStream(
            sources.reader("train", config), config, data_rank=0, data_size=1, skipped=skipped, stage=stage
        )
        for consumed in (72, 90, 120):
            assert stream.read_in_stage(consumed) == sum(position >= first for position in read[:consumed])


@pytest.mark.parametrize("order, together", [("shuffled", 1), ("streams", G)])
def test_what_a_rollback_leaves_out_spans_its_sequences_and_in_streams_their_whole_steps(
    base: Path, order: str, together: int
) -> None:
    config = alone(base, "c4", f"data.order={order}")
    skipped = ((G, 2 * G), (4 * G, 5 * G))
    reader = Sources.load(config).reader("train", config)
    stream = TrainingStream(reader, config, data_rank=0, data_size=1, skipped=skipped)
    read = [position for position in range(20 * G) if not any(first <= position < end for first, end in skipped)]
    for consumed in (0, 3, G - 1, G, 2 * G, 3 * G + 2):
        for count in (1, G - 1, G, G + 1, 3 * G):
            first, last = read[consumed], read[consumed + count - 1]
            units = {position // together for position in range(first, last + 1)}
            expected = [position for position in range(20 * G) if position // together in units]
            assert list(range(*stream.range_of(consumed, count))) == expected
