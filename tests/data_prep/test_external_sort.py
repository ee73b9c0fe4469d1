"""The external sort gives what numpy's sort gives, whatever the memory."""

import errno
from pathlib import Path

import numpy as np
import pytest

from data_prep.stages import external_sort
from data_prep.stages.external_sort import ExternalSorter


@pytest.mark.parametrize("columns", [1, 2, 3])
@pytest.mark.parametrize("memory_bytes", [1, 4_000, 100_000, 10**9])
@pytest.mark.parametrize("values", [1, 5, 2**64 - 1])
def test_rows_come_back_sorted_and_complete(tmp_path: Path, columns: int, memory_bytes: int, values: int) -> None:
    rng = np.random.default_rng(columns)
    count = 60 if memory_bytes == 1 else 6000  # one row a run in the first case
    rows = rng.integers(0, values, size=(count, columns), dtype=np.uint64, endpoint=True)
    with ExternalSorter(tmp_path, "t", columns=columns, memory_bytes=memory_bytes) as sorter:
        for start in range(0, count, 700):
            sorter.add(rows[start : start + 700])
        sorter.add(rows[:0])
        blocks = list(sorter.blocks())
    found = np.concatenate(blocks)
    np.testing.assert_array_equal(found, rows[np.lexsort(rows.T[::-1])])
    assert all(len(block) for block in blocks)
    assert not list(tmp_path.iterdir())


def test_nothing_gives_nothing(tmp_path: Path) -> None:
    with ExternalSorter(tmp_path, "t", columns=2, memory_bytes=100) as sorter:
        assert list(sorter.blocks()) == []


def test_what_is_added_is_the_sorters_own(tmp_path: Path) -> None:
    """A view would keep the caller's whole array in memory, and change with it."""
    rows = np.arange(6, dtype=np.uint64).reshape(3, 2)
    with ExternalSorter(tmp_path, "t", columns=2, memory_bytes=1000) as sorter:
        sorter.add(rows[:1])
        rows[:] = 7
        assert np.concatenate(list(sorter.blocks())).tolist() == [[0, 1]]


def test_blocks_stay_small_while_merging(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 2**63, size=(200_000, 2), dtype=np.uint64)
    with ExternalSorter(tmp_path, "t", columns=2, memory_bytes=1 << 20) as sorter:
        for start in range(0, len(rows), 10_000):
            sorter.add(rows[start : start + 10_000])
        largest = max(len(block) for block in sorter.blocks())
    assert largest * 16 < 1 << 20


@pytest.mark.parametrize("rows", [1, 300, 100_000])
def test_a_full_disk_is_an_error_however_few_bytes_were_left(tmp_path: Path, rows: int) -> None:
    """numpy's tofile keeps the last block of a run in memory, and says nothing if the disk does not take it."""
    (tmp_path / "t-00000.run").symlink_to("/dev/full")
    with ExternalSorter(tmp_path, "t", columns=1, memory_bytes=32 * rows) as sorter:
        with pytest.raises(OSError) as raised:
            sorter.add(np.arange(rows, dtype=np.uint64)[:, None])
        assert raised.value.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir()), "nothing half-written"


def test_the_merge_looks_into_runs_in_proportion_to_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one merge of all, runs are looked into rows x runs / block times, and blocks shrink as runs grow more: with 16
    times the rows 2,000 times as often."""
    monkeypatch.setattr(external_sort, "MERGED_RUNS", 4)
    monkeypatch.setattr(external_sort, "MIN_MERGE_ROWS", 1)
    looks: list[tuple[int, ...]] = []
    real = external_sort._Run.take

    def counted(run: external_sort._Run, bound: tuple[int, ...]) -> np.ndarray:
        looks.append(bound)
        return real(run, bound)

    monkeypatch.setattr(external_sort._Run, "take", counted)
    found, fewest = [], []
    for runs in (8, 128):
        rows = np.random.default_rng(runs).integers(0, 2**63, size=(64 * runs, 2), dtype=np.uint64)
        looks.clear()
        with ExternalSorter(tmp_path, "t", columns=2, memory_bytes=64 * 16 * 4) as sorter:
            sorter.add(rows)
            assert len(list(tmp_path.iterdir())) == runs
            most, blocks = 0, []
            for block in sorter.blocks():
                most = max(most, len(list(tmp_path.iterdir())))
                blocks.append(block)
        np.testing.assert_array_equal(np.concatenate(blocks), rows[np.lexsort(rows.T[::-1])])
        fewest.append(most)
        assert not list(tmp_path.iterdir())
        found.append(len(looks))
    # 16 times the rows, each of which goes through log 128 / log 8 times as many merges, rounded up to 4 for 2.
    assert found[1] <= 16 * 2 * 1.5 * found[0]
    assert max(fewest) <= 4, "runs that were merged are gone"
