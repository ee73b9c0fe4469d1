"""The benchmark's readers that are installed here give the windows they claim to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.reader import READERS, B, T, run, table, write_corpus


@pytest.mark.parametrize("name", ["ours", "memmap", "memmap, once", "webdataset"])
def test_each_reader_gives_windows_of_the_corpus(tmp_path: Path, name: str) -> None:
    write_corpus(tmp_path, 300_000)
    flat = np.fromfile(tmp_path / "tokens.bin", "<u2").astype(np.int64)
    x, y = next(READERS[name](tmp_path))
    assert x.shape == y.shape == (B, T) and x.dtype == y.dtype == torch.int64
    assert torch.equal(x[:, 1:], y[:, :-1])
    view = np.lib.stride_tricks.sliding_window_view(flat, 24)
    for row in x[:4].numpy():
        assert (view == row[:24]).all(1).any()


def test_a_reader_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(folder: Path) -> None:
        raise ModuleNotFoundError("No module named 'elsewhere'")

    monkeypatch.setitem(READERS, "mds", missing)
    found = run(tmp_path, ["ours", "mds"], num_tokens=100_000, batches=2, repeats=2)
    assert len(found["ours"]["cpu"]) == 2
    assert "skipped: ModuleNotFoundError: No module named 'elsewhere'" in table(found)
