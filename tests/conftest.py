"""Shared fixtures: one prepared data set of generated text for the whole session."""

from __future__ import annotations

import os

# Before torch: two ranks with two threads each on two cores mostly wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("DS_ACCELERATOR", "cpu")
# Before triton: its kernels run interpreted on CPU tensors. What compiles them runs in a process of its own, without.
os.environ["TRITON_INTERPRET"] = "1"

import gc
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

gc.disable()  # until all is collected: what is imported stays, and a collection of garbage walks through it in vain
pytest.register_assert_rewrite("tests.pretrain.runs")  # whose comparisons should say what differs, as those of tests do

from tests.corpus import prepare_corpus  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test's name may not hold an address: it differs from process to process, and with two workers nothing runs."""
    named = [item.nodeid for item in items if " at 0x" in item.nodeid]
    if named:
        raise pytest.UsageError(f"{named[0]}: the name holds an address; give its parameters ids")


def pytest_collection_finish() -> None:
    """What was imported stays: a collection of garbage need not walk through torch, which took a tenth of the time of
    tests that make many objects."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture
def own_tiles() -> Iterator[None]:
    """No entry in the table of measured tiles, whatever `apply` has written: for what counts on those of the kernels'
    modules."""
    from model.kernels.triton.tiles import placed

    with placed([]) as table:
        table.clear()
        yield


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts a file system of so many bytes, or makes it so large. Skips where that is not allowed."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(size: int) -> Path:
        options = f"size={size}{',remount' if os.path.ismount(place) else ''}"
        line = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        if shutil.which("mount") is None or subprocess.run(line, capture_output=True).returncode:
            pytest.skip("NOT TESTED: only root, where it may mount, can have a disk that is full")
        return place

    yield mount
    if os.path.ismount(place):
        subprocess.run(["umount", str(place)], check=True)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with manifest.json, tokenizer and shards: about 60,000 training tokens, vocabulary 400."""
    return prepare_corpus(tmp_path_factory.mktemp("corpus"))
