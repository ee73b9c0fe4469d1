"""A cache removes only what it made, whatever lies in the folder that the user names."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import shutil
import signal
import time
from collections import namedtuple
from collections.abc import Callable
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import data_prep.shards.cache as shard_cache
import data_prep.shards.cache_folder as shard_cache_folder
from common.errors import DataError, PassingError
from common.locks import file_lock
from data_prep.shards.cache import ShardCache
from data_prep.shards.cache_folder import MARKER, NAME, CacheFolder
from data_prep.shards.format import Manifest
from tests.data_prep.split_writer import write_data
from tests.data_prep.test_shard_cache import DOCUMENTS, EVERYTHING, reader_of, stored

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("remote") / "c4"
    write_data(folder, DOCUMENTS, vocab_size=400, tokens_per_shard=2000, tokens_per_member=500)
    return folder


def largest(remote: Path) -> int:
    return max(entry.bytes + entry.index_bytes for entry in Manifest.load(remote).split("train"))


def content_of(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder; folders too, so that none is added."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


def put_foreign_data(folder: Path, remote: Path) -> None:
    """What other people keep in such a folder, with the names that shards have."""
    shutil.copytree(remote, folder / "prepared")
    digest = hashlib.sha256((remote / "manifest.json").read_bytes()).hexdigest()[:24]
    shutil.copytree(remote, folder / digest)  # as a cache of earlier code, or anyone's, may have left it
    for name in ("imagenet/train-0001.tar", "deep/er/train-00000.idx.safetensors", "a.tar", "b.tar.partial", "lock"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x" * 50_000)


def read_all(cache: ShardCache) -> None:
    with reader_of(cache) as reader:
        np.testing.assert_array_equal(reader.read(0, len(EVERYTHING)), EVERYTHING)


def test_foreign_files_stay_under_pressure_and_do_not_count(remote: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    put_foreign_data(folder, remote)
    before = content_of(folder)
    read_all(ShardCache(f"file://{remote}", folder, 2 * largest(remote)))
    after = content_of(folder)
    assert {name: after[name] for name in before} == before
    assert {name for name in after if name.split("/")[0] not in (NAME,)} == set(before), "no lock beside them either"
    assert 0 < stored(folder) <= 2 * largest(remote)


def test_room_is_counted_and_taken_by_one_process_at_a_time(
    remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or two would count the same room as theirs."""
    held = list[bool]()
    free, truncate = shard_cache_folder.free_bytes, shard_cache_folder.partial

    def looking(function: Callable[[Path], Any]) -> Callable[[Path], Any]:
        def look(path: Path) -> Any:
            with file_lock(tmp_path / NAME / "lock", wait=False) as is_free:
                held.append(not is_free)
            return function(path)

        return look

    monkeypatch.setattr(shard_cache_folder, "free_bytes", looking(free))
    monkeypatch.setattr(shard_cache_folder, "partial", looking(truncate))
    cache = ShardCache(f"file://{remote}", tmp_path, 2 * largest(remote))
    folder, (first, *_) = cache.manifest.folder, cache.manifest.split("train")
    stored_shard = shard_cache_folder.StoredShard(folder / first.file, folder / first.index_file)
    CacheFolder(tmp_path, 2 * largest(remote)).reserve(stored_shard, (first.bytes, first.index_bytes))
    assert len(held) > 2 and all(held)


@pytest.mark.parametrize("look", range(4))
def test_a_shard_that_gets_its_name_while_room_is_counted_counts_once(
    look: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever of its four possible files is looked at just then."""
    shard = shard_cache_folder.StoredShard(tmp_path / "a.tar", tmp_path / "a.idx")
    for path, size in ((shard.shard, 1000), (shard.index, 10)):
        shard_cache_folder.partial(path).write_bytes(bytes(size))
    status, looks = Path.stat, list[Path]()

    def stat(path: Path, **kwargs: Any) -> os.stat_result:
        if len(looks) == look:
            for named in (shard.index, shard.shard):
                os.replace(shard_cache_folder.partial(named), named)
        looks.append(path)
        return status(path, **kwargs)

    monkeypatch.setattr(Path, "stat", stat)
    assert shard.size_and_use()[0] == 1010 and len(looks) == 4


def test_foreign_files_inside_the_caches_own_folder_stay_too(remote: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    cache = ShardCache(f"file://{remote}", folder, 2 * largest(remote))
    put_foreign_data(folder / NAME / "mine", remote)
    made_up = folder / NAME / ("0" * 24)  # looks like a data set of the cache, but its name is not its manifest's hash
    shutil.copytree(remote, made_up)
    (cache.manifest.folder / "notes.tar").write_bytes(b"x" * 50_000)
    elsewhere = shutil.copytree(remote, tmp_path / "elsewhere")
    digest = hashlib.sha256(b"other").hexdigest()[:24]
    (folder / NAME / digest).symlink_to(elsewhere)
    kept = [folder / NAME / "mine", made_up, elsewhere]
    before = [content_of(path) for path in kept]
    read_all(cache)
    assert [content_of(path) for path in kept] == before
    assert (cache.manifest.folder / "notes.tar").stat().st_size == 50_000


def test_a_folder_of_that_name_without_the_marker_is_left_alone(remote: Path, tmp_path: Path) -> None:
    put_foreign_data(tmp_path / "cache" / NAME, remote)
    before = content_of(tmp_path)
    with pytest.raises(DataError, match=rf"^data\.cache_dir: .*{NAME} holds .* not the {MARKER} of a cache, so it is"):
        ShardCache(f"file://{remote}", tmp_path / "cache", 10**9)
    assert content_of(tmp_path) == before


def test_other_data_sets_of_the_cache_make_room_whatever_their_process(remote: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    write_data(other, DOCUMENTS[:40], vocab_size=500, tokens_per_shard=2000, tokens_per_member=500)
    size = max(largest(remote), largest(other))
    first = ShardCache(f"file://{other}", tmp_path / "cache", 2 * size)
    with first.hold(first.manifest.split("train")[0]):
        pass
    read_all(ShardCache(f"file://{remote}", tmp_path / "cache", 2 * size))
    assert stored(tmp_path / "cache") <= 2 * size
    assert not list(first.manifest.folder.glob("train-*")), "used longest ago"


def _stall(remote: Path, folder: Path, limit: int, at: int, reached: Event) -> None:
    """Reads through the cache and stops for good in the middle of the copy number `at`."""
    copies = 0

    class Stalling:
        def __init__(self, stream: Any) -> None:
            self._stream = stream

        def __enter__(self) -> Stalling:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def read(self, size: int = -1) -> bytes:
            nonlocal copies
            copies += 1
            if copies == at:
                reached.set()
                time.sleep(600)
            return self._stream.read(1000)

    original = shard_cache.RemoteFile.open

    def opened(self: shard_cache.RemoteFile, *arguments: Any, **options: Any) -> Any:
        stream = original(self, *arguments, **options)
        return Stalling(stream) if self.name.startswith("train-") else stream

    shard_cache.RemoteFile.open = opened
    read_all(ShardCache(f"file://{remote}", folder, limit))


@pytest.mark.parametrize("at", [1, 3, 30, 71])
def test_a_process_killed_in_a_copy_leaves_nothing_wrong(remote: Path, tmp_path: Path, at: int) -> None:
    folder, limit = tmp_path / "cache", 2 * largest(remote)
    put_foreign_data(folder, remote)
    before = content_of(folder)
    context = multiprocessing.get_context("fork")
    reached = context.Event()
    process = context.Process(target=_stall, args=(remote, folder, limit, at, reached))
    process.start()
    assert process.pid is not None and reached.wait(60)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    read_all(ShardCache(f"file://{remote}", folder, limit))
    after = content_of(folder)
    assert {name: after[name] for name in before} == before
    assert stored(folder) <= limit and not list((folder / NAME).glob("*/*.partial"))


def _make(folder: Path, start: Event, failed: Event) -> None:
    start.wait()
    try:
        CacheFolder(folder, 10**9).add(b"{}")
    except BaseException:
        failed.set()
        raise


def test_many_processes_make_the_folder_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    for number in range(5):
        start, failed = context.Event(), context.Event()
        arguments = (tmp_path / str(number), start, failed)
        processes = [context.Process(target=_make, args=arguments) for _ in range(6)]
        for process in processes:
            process.start()
        start.set()
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0] * 6 and not failed.is_set()
        assert (tmp_path / str(number) / NAME / MARKER).is_file()


def test_a_full_disk_makes_room_first_and_then_names_the_bytes(
    remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size, folder = largest(remote), tmp_path / "cache"
    capacity = 3 * size
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(capacity, 0, max(0, capacity - stored(folder))))
    cache = ShardCache(f"file://{remote}", folder, 10**9)
    read_all(cache)  # the limit alone would keep everything
    assert 0 < stored(folder) <= capacity
    capacity = 0
    with pytest.raises(PassingError) as caught, cache.hold(cache.manifest.split("train")[0]):
        pass
    needed = cache.manifest.split("train")[0].bytes + cache.manifest.split("train")[0].index_bytes
    assert str(caught.value) == (
        f"data.cache_dir: the disk of {folder / NAME} has no room for a shard: {needed:,} bytes are needed, 0 are "
        "free; make room, or name another folder"
    )


def test_a_disk_that_fills_in_the_middle_is_said_once_and_leaves_no_half(
    remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ShardCache(f"file://{remote}", tmp_path / "cache", 10**9)
    entry = cache.manifest.split("train")[0]
    original, attempts = shard_cache.RemoteFile.open, []

    def full(self: shard_cache.RemoteFile, mode: str) -> object:
        if self.name == entry.file:
            attempts.append(self.name)
            raise OSError(28, "No space left on device")
        return original(self, mode)

    monkeypatch.setattr(shard_cache.RemoteFile, "open", full)
    with (
        pytest.raises(PassingError, match=r"^data\.cache_dir: the disk of .* bytes are needed, [0-9,]+ are free"),
        cache.hold(entry),
    ):
        pass
    assert attempts == [entry.file], "another attempt would not make room"
    assert not list(cache.manifest.folder.glob(f"{entry.file}*"))
