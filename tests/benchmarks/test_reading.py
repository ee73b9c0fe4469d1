"""The benchmark's readers that are installed here give windows of one corpus, and its table tells of the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.data import reading
from benchmarks.data.reading import READERS, B, T, check_windows, run, write_corpus
from common.errors import DataError

MODULES = {"webdataset": "webdataset", "litdata": "litdata", "mds": "streaming"}


@pytest.mark.parametrize("name", list(READERS))
def test_each_reader_gives_windows_of_the_corpus(tmp_path: Path, name: str) -> None:
    if name in MODULES:
        pytest.importorskip(MODULES[name])
    write_corpus(tmp_path, 300_000)
    x, y = next(READERS[name](tmp_path))
    assert x.shape == y.shape == (B, T) and x.dtype == y.dtype == torch.int64
    check_windows(name, (x, y), (tmp_path / "tokens.bin").read_bytes())


def test_windows_of_another_corpus_are_refused() -> None:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 8000, 5 * T, dtype=np.int64)
    window = torch.from_numpy(ids[7 : 7 + T + 1])[None]
    x, y = window[:, :-1], window[:, 1:]
    check_windows("it", (x, y), ids.astype("<u2").tobytes())
    with pytest.raises(DataError, match="it gave a window that is not in the corpus"):
        check_windows("it", (x + 1, y + 1), ids.astype("<u2").tobytes())
    with pytest.raises(DataError, match="it gave a window that is not in the corpus"):  # there, but between two ids
        check_windows("it", (x, y), b"\0" + ids.astype("<u2").tobytes())
    with pytest.raises(DataError, match="not the inputs shifted by one"):
        check_windows("it", (x, y.roll(1).index_copy(1, torch.tensor([T - 1]), y[:, -1:])), ids.astype("<u2").tobytes())


def test_a_reader_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(folder: Path) -> None:
        raise ModuleNotFoundError("No module named 'elsewhere'")

    monkeypatch.setitem(READERS, "mds", missing)
    found = run(tmp_path, ["ours", "mds"], num_tokens=100_000, batches=2, repeats=2)
    assert len(found["ours"]["cpu"]) == 2
    assert "| mds | not installed here |" in reading.page({"readers": found})


def test_ratios_of_readers_are_medians_of_the_rounds(tmp_path: Path) -> None:
    ours: dict[str, Any] = {"version": "", "wall": [9.0, 9.0, 9.0], "cpu": [8.0, 10.0, 30.0]}
    other = {"version": "1.2", "wall": [4.0, 5.0, 6.0], "cpu": [4.0, 2.0, 10.0]}
    found = {"readers": {"ours": ours, "webdataset": other, "mds": {"missing": reading.MISSING}}}
    assert "| webdataset 1.2 | 5.0 | 4.0 | 3.00 | 2.00 to 5.00 |" in reading.page(found)
    reading.draw(found, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
