"""Where a run is: kept in checkpoints, with the data that it leaves out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pretrain.data.progress import Progress, Range, data_positions, merged
from pretrain.data.stages import first_stage
from pretrain.export.reading import progress_of
from tests.pretrain.runs import small_config


def test_json_and_files_from_before_there_were_skips_and_stages() -> None:
    first = first_stage(["c4", "books"], ["0a", "0b"], [7, 3])
    stages = (first, first.followed_by(40, first_stage(["books", "math"], ["0b", "0c"], [1, 2]).sources))
    extras = {"extra_tokens": -96, "extra_flops": 10**21 + 1}
    progress = Progress(7, 56, skipped_ranges=((8, 16), (40, 48)), skipped_updates=2, stages=stages, **extras)
    assert Progress.from_json(json.loads(json.dumps(progress.to_json()))) == progress
    assert Progress.from_json({"step": 7, "consumed_sequences": 56}) == Progress(7, 56)


@pytest.mark.parametrize("skipped", [(), ((0, 3),), ((5, 6),), ((2, 4), (5, 9), (11, 12)), ((0, 1), (2, 3), (30, 50))])
def test_positions_leave_out_the_skipped_ranges(skipped: tuple[Range, ...]) -> None:
    left_out = {position for first, end in skipped for position in range(first, end)}
    expected = [position for position in range(100) if position not in left_out][:20]
    assert data_positions(np.arange(20), skipped).tolist() == expected
    assert data_positions(np.arange(7, 20), skipped).tolist() == expected[7:]


def test_the_position_is_that_of_the_next_sequence() -> None:
    assert Progress(2, 16).position == 16
    assert Progress(2, 16, skipped_ranges=((4, 8), (20, 24), (30, 40))).position == 24


def test_what_a_rollback_left_out_is_counted_for_each_source_in_every_stage() -> None:
    """Against the source of each position, one by one."""
    first = first_stage(["c4", "books"], ["0a", "0b"], [2, 1])
    second = first.followed_by(20, first_stage(["books", "math"], ["0b", "0c"], [1, 3]).sources)
    skipped = ((3, 8), (17, 25), (30, 31), (90, 99))
    progress = Progress(5, 30, skipped_ranges=skipped, stages=(first, second))
    expected = {"0a": 0, "0b": 0, "0c": 0}
    for position in (p for a, b in skipped for p in range(a, b) if p < progress.position):
        stage = first if position < 20 else second
        (source,), _ = stage.schedule.sources(np.array([position - stage.first]))
        expected[stage.mixed[source].digest] += 1
    assert progress.left_out() == expected and sum(expected.values()) == 5 + 8 + 1
    assert not Progress(5, 30, skipped_ranges=skipped).left_out(), "a file from before stages"
    assert sum(progress.left_out().values()) + progress.consumed_sequences == progress.position


def test_merged_ranges_are_sorted_and_apart() -> None:
    given = ((8, 16), (30, 33), (0, 2), (16, 20), (12, 14), (31, 40), (1, 3), (50, 51))
    assert merged(given) == ((0, 3), (8, 20), (30, 40), (50, 51))
    assert merged(()) == ()
    for wrong in (((4, 8), (2, 3)), ((4, 8), (8, 9)), ((4, 4),)):
        with pytest.raises(AssertionError, match="not sorted"):
            Progress(0, 0, skipped_ranges=wrong)


def test_updates_skipped_in_a_row() -> None:
    progress = Progress(3, 24).after_step(8, updated=False).after_step(8, updated=False)
    assert progress == Progress(5, 40, skipped_updates=2)
    assert progress.after_step(8) == Progress(6, 48)


def test_tokens_and_flops_of_a_run_whose_sequences_and_model_changed_twice() -> None:
    """Against a count of each part: 10 sequences of 8 tokens at 5 FLOPs a token, 4 of 16 at 7, 6 of 4 at 2."""
    progress = Progress(10, 10)
    progress = progress.in_sequences_of(16, before=8).at_rate(7, before=5, sequence_length=16)
    progress = progress.after_step(4).in_sequences_of(4, before=16).at_rate(2, before=7, sequence_length=4)
    progress = progress.after_step(6)
    assert progress.tokens(4) == 10 * 8 + 4 * 16 + 6 * 4
    assert progress.tokens(4) * 2 + progress.extra_flops == 10 * 8 * 5 + 4 * 16 * 7 + 6 * 4 * 2


def test_the_tokens_of_an_export_are_those_that_its_run_read(prepared: Path) -> None:
    """A run whose context grew has read fewer than its sequences are long now; older exports do not say how many."""
    config, origin = small_config(prepared), {"step": 7, "sequences": 56}
    length = config.model.sequence_length
    assert progress_of(origin, config) == Progress(7, 56)
    found = progress_of({**origin, "tokens": 56 * length - 96}, config)
    assert found.tokens(length) == 56 * length - 96
