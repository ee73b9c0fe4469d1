"""Remote shards through a bounded local folder: whole, checked, once per node, least recently used out first."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator
from multiprocessing.synchronize import Event
from pathlib import Path

import fsspec
import numpy as np
import pytest

import data_prep.shards.cache as shard_cache
from common.errors import ConfigError, DataError
from data_prep.shards.cache import ShardCache
from data_prep.shards.cache_folder import NAME
from data_prep.shards.format import Manifest
from data_prep.shards.reader import SplitReader
from pretrain.data.sources import open_sources
from tests.data_prep.split_writer import joined, random_documents, write_data
from tests.pretrain.runs import small_config

DOCUMENTS = random_documents(np.random.default_rng(4), 100, 400)
EVERYTHING = joined(DOCUMENTS)


@pytest.fixture
def remote(tmp_path: Path) -> Path:
    sizes = {"tokens_per_shard": 2000, "tokens_per_member": 500}
    write_data(tmp_path / "remote", DOCUMENTS, vocab_size=400, **sizes)
    return tmp_path / "remote"


@pytest.fixture
def memory(remote: Path) -> Iterator[str]:
    store = fsspec.filesystem("memory")
    store.put(str(remote), "/shards", recursive=True)
    yield "memory://shards"
    store.rm("/shards", recursive=True)


def reader_of(cache: ShardCache, **options: int) -> SplitReader:
    return SplitReader(cache.manifest, "train", True, hold=cache.hold, **options)


def stored(folder: Path) -> int:
    return sum(p.stat().st_size for p in (folder / NAME).glob("*/train-*"))


@pytest.mark.parametrize("name", ["", "/manifest.json", "/"])
def test_a_url_reads_as_the_folder(remote: Path, memory: str, tmp_path: Path, name: str) -> None:
    cache = ShardCache(memory + name, tmp_path / "cache", 10**9)
    assert cache.manifest.digest == Manifest.load(remote).digest
    assert not list((tmp_path / "cache" / NAME).glob("*/train-*")), "nothing is fetched before it is read"
    with reader_of(cache) as reader:
        np.testing.assert_array_equal(reader.read(0, len(EVERYTHING)), EVERYTHING)
    names = {p.name for p in (tmp_path / "cache" / NAME).glob("*/*") if p.is_file()}
    assert names == {p.name for p in remote.iterdir()}


def test_the_folder_is_bounded_and_the_least_recently_used_go(memory: str, tmp_path: Path) -> None:
    entries = ShardCache(memory, tmp_path / "cache", 10**9).manifest.split("train")
    size = max(entry.bytes + entry.index_bytes for entry in entries)
    assert len(entries) > 6
    cache = ShardCache(memory, tmp_path / "cache", 3 * size)
    reader = reader_of(cache)
    draw, most = np.random.default_rng(0), 0
    for start in draw.integers(0, len(EVERYTHING) - 40, 60).tolist():
        np.testing.assert_array_equal(reader.read(start, start + 40), EVERYTHING[start : start + 40])
        most = max(most, stored(tmp_path / "cache"))
    assert size < most <= 3 * size
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path / "cache") in line]
    assert not any("deleted" in line for line in mapped), "what is gone is not mapped, so the disk is free"
    assert len(mapped) <= 3
    folder = cache.manifest.folder
    for entry in entries[:3]:
        with cache.hold(entry):
            time.sleep(0.01)
    os.utime(folder / entries[0].file)
    with cache.hold(entries[3]):
        pass
    assert (folder / entries[0].file).exists() and not (folder / entries[1].file).exists()
    assert not (folder / entries[1].index_file).exists()


def test_what_a_reader_uses_counts_as_used(memory: str, tmp_path: Path) -> None:
    """Also where all of it happens between two ticks of the kernel's clock."""
    entries = ShardCache(memory, tmp_path / "cache", 10**9).manifest.split("train")
    cache = ShardCache(memory, tmp_path / "cache", 3 * max(entry.bytes + entry.index_bytes for entry in entries))
    starts = np.cumsum([0, *(entry.tokens for entry in entries)]).tolist()
    with reader_of(cache) as reader:
        for shard in (0, 1, 2, 0, 2, 3):
            reader.read(starts[shard], starts[shard] + 1)
    left = {entry.file for entry in entries if (cache.manifest.folder / entry.file).exists()}
    assert left == {entries[shard].file for shard in (0, 2, 3)}


def test_shards_of_another_user_whose_group_may_write_them_are_used(
    memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system lets only a file's owner name a time of use; whoever may write it can make that now."""
    utime, marked = os.utime, []

    def utime_of_another_user(path: Path, times: None = None, *, ns: tuple[int, int] | None = None) -> None:
        if ns is not None:
            raise PermissionError(1, "Operation not permitted", str(path))
        utime(path)
        marked.append(path.name)

    monkeypatch.setattr(os, "utime", utime_of_another_user)
    cache = ShardCache(memory, tmp_path / "cache", 10**9)
    with reader_of(cache) as reader:
        np.testing.assert_array_equal(reader.read(0, len(EVERYTHING)), EVERYTHING)
    assert set(marked) == {entry.file for entry in cache.manifest.split("train")}


def test_a_limit_below_one_shard_is_refused(memory: str, tmp_path: Path) -> None:
    entries = ShardCache(memory, tmp_path / "cache", 10**9).manifest.split("train")
    size = max(entry.bytes + entry.index_bytes for entry in entries)
    with pytest.raises(DataError, match=rf"data\.cache_bytes: {size - 1} holds not even one shard"):
        ShardCache(memory, tmp_path / "cache", size - 1)
    cache = ShardCache(memory, tmp_path / "cache", size)
    with reader_of(cache) as reader:
        np.testing.assert_array_equal(reader.read(0, len(EVERYTHING)), EVERYTHING)
    large = next(entry for entry in entries if entry.bytes + entry.index_bytes == size)
    other = next(entry for entry in entries if entry is not large)
    with (
        cache.hold(large),
        pytest.raises(DataError, match=rf"data\.cache_bytes: {size} are full of shards that other processes are"),
        ShardCache(memory, tmp_path / "cache", size).hold(other),
    ):
        pass
    with cache.hold(large):
        assert stored(tmp_path / "cache") == size, "what is held stays"


def test_a_wrong_or_broken_file_never_stays(remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_cache.time, "sleep", lambda seconds: None)
    cache = ShardCache(f"file://{remote}", tmp_path / "cache", 10**9)
    entry = cache.manifest.split("train")[0]
    shard = remote / entry.file
    content = shard.read_bytes()
    for wrong in (content[:-1], content[:600] + b"x" + content[601:], content + b"x", b""):
        shard.write_bytes(wrong)
        with pytest.raises(DataError, match=f"cannot fetch .*{entry.file}.*sha256"):
            reader_of(cache).read(0, 10)
        assert not list((tmp_path / "cache" / NAME).glob("*/*.tar*"))
    shard.unlink()
    with pytest.raises(DataError, match=f"cannot fetch .*{entry.file}.*FileNotFoundError"):
        reader_of(cache).read(0, 10)
    shard.write_bytes(content)
    np.testing.assert_array_equal(reader_of(cache).read(0, 10), EVERYTHING[:10])
    with pytest.raises(DataError, match=r"data\.manifest: cannot read file://.*nowhere/manifest\.json: No such file"):
        ShardCache(f"file://{remote}/nowhere", tmp_path / "cache", 10**9)
    with pytest.raises(DataError, match=r"cannot read memory://nowhere/manifest\.json: there is no such file"):
        ShardCache("memory://nowhere", tmp_path / "cache", 10**9)


def test_a_server_that_is_not_there_is_tried_again_and_no_secret_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("aiohttp", reason="reading from web servers is UNTESTED: aiohttp is not installed")
    pauses: list[float] = []
    monkeypatch.setattr(shard_cache.time, "sleep", pauses.append)
    with pytest.raises(DataError) as caught:
        ShardCache("http://me:s3cret@127.0.0.1:1/corpus", tmp_path / "cache", 10**9)
    said = str(caught.value)
    assert said.startswith("data.manifest: cannot read http://127.0.0.1:1/corpus/manifest.json: ClientConnector")
    assert said.endswith("(3 attempts)") and "s3cret" not in said and pauses == [0, 0.2, 0.8]


@pytest.mark.parametrize("url", ["https://me:s3cret@host/c4", "https://host/c4?sig=s3cret", "s3://key:s3cret@c4"])
@pytest.mark.parametrize("key", ["manifest", "sources"])
def test_a_url_with_a_secret_is_refused(remote: Path, url: str, key: str) -> None:
    """The files of a run hold the whole configuration."""
    value = url if key == "manifest" else f'[{{"manifest": "{url}", "weight": 1}}]'
    with pytest.raises(ConfigError, match=rf"data\.{key}: the URL of .* has a password or a query") as caught:
        small_config(remote, f"data.{key}={value}")
    assert "s3cret" not in str(caught.value)


def test_what_was_damaged_in_the_cache_is_fetched_again(memory: str, tmp_path: Path) -> None:
    """A lost node may leave files of their full size whose blocks were never written."""
    with reader_of(ShardCache(memory, tmp_path / "cache", 10**9)) as reader:
        reader.read(0, len(EVERYTHING))
        folder = reader._manifest.folder
    shards, indexes = sorted(folder.glob("train-*.tar")), sorted(folder.glob("train-*.safetensors"))
    shards[0].write_bytes(bytes(shards[0].stat().st_size))
    shards[1].write_bytes(shards[1].read_bytes()[:-1])
    shards[2].write_bytes(b"")
    indexes[3].write_bytes(bytes(indexes[3].stat().st_size))
    (folder / "tokenizer.model").write_bytes(b"")
    (folder / "manifest.json").write_bytes(b"")
    untouched = shards[4].stat().st_ino
    cache = ShardCache(memory, tmp_path / "cache", 10**9)
    with SplitReader(cache.manifest, "train", False, hold=cache.hold) as reader:
        np.testing.assert_array_equal(reader.read(0, len(EVERYTHING)), EVERYTHING)
    cache.manifest.check("full")
    assert shards[4].stat().st_ino == untouched, "what is whole is not fetched again"
    indexes[5].unlink()  # of a shard that this process has hashed
    with cache.hold(cache.manifest.split("train")[5]):
        assert indexes[5].exists()


def test_a_broken_connection_is_tried_again(memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, failures = shard_cache.RemoteFile.open, iter([True, True, False] * 100)

    def flaky(self: shard_cache.RemoteFile, mode: str) -> object:
        if self.name.endswith(".tar") and next(failures):
            raise ConnectionResetError("reset")
        return original(self, mode)

    monkeypatch.setattr(shard_cache.RemoteFile, "open", flaky)
    monkeypatch.setattr(shard_cache.time, "sleep", lambda seconds: None)
    with reader_of(ShardCache(memory, tmp_path / "cache", 10**9)) as reader:
        np.testing.assert_array_equal(reader.read(0, len(EVERYTHING)), EVERYTHING)


def test_what_a_killed_process_left_is_overwritten_and_counted(memory: str, tmp_path: Path) -> None:
    cache = ShardCache(memory, tmp_path / "cache", 10**9)
    entries = cache.manifest.split("train")
    size = max(entry.bytes + entry.index_bytes for entry in entries)
    for entry in entries[:2]:
        (cache.manifest.folder / f"{entry.file}.partial").write_bytes(b"z" * (entry.bytes + 5))
    small = ShardCache(memory, tmp_path / "cache", 2 * size)
    with small.hold(entries[2]):
        assert stored(tmp_path / "cache") <= 2 * size
    with reader_of(small) as reader:
        np.testing.assert_array_equal(reader.read(0, len(EVERYTHING)), EVERYTHING)
    assert not list((tmp_path / "cache" / NAME).glob("*/*.partial"))


def _read_randomly(url: str, folder: Path, limit: int, seed: int, failed: Event) -> None:
    reader = reader_of(ShardCache(url, folder, limit), max_open_shards=2)
    draw = np.random.default_rng(seed)
    for start in draw.integers(0, len(EVERYTHING) - 40, 60).tolist():
        if not np.array_equal(reader.read(start, start + 40), EVERYTHING[start : start + 40]):
            failed.set()


def test_processes_of_a_node_share_a_folder_under_pressure(remote: Path, tmp_path: Path) -> None:
    entries = Manifest.load(remote).split("train")
    size = max(entry.bytes + entry.index_bytes for entry in entries)
    context = multiprocessing.get_context("fork")
    failed = context.Event()
    processes = [
        context.Process(target=_read_randomly, args=(f"file://{remote}", tmp_path / "cache", 5 * size, seed, failed))
        for seed in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4 and not failed.is_set()
    assert stored(tmp_path / "cache") <= 5 * size


def test_training_windows_come_through_the_cache(remote: Path, memory: str, tmp_path: Path) -> None:
    keys = (f"data.cache_dir={tmp_path / 'cache'}", "evaluate.sequences=0")
    keys = (*keys, f"data.manifest={memory}")
    sources = open_sources(small_config(remote, *keys))
    sources.check("size")
    config = small_config(remote, "evaluate.sequences=0")
    plain = open_sources(config)
    assert sources.digest == plain.digest
    windows = np.arange(20) * 7
    for ours, theirs in zip(
        sources.reader("train", config).read(windows), plain.reader("train", config).read(windows), strict=True
    ):
        np.testing.assert_array_equal(ours.numpy(), theirs.numpy())
    with pytest.raises(ConfigError, match=r"data\.cache_dir: memory://shards is a URL"):
        small_config(remote, f"data.manifest={memory}")
    with pytest.raises(ConfigError, match=r"data\.verify: full would fetch every shard"):
        small_config(remote, f"data.manifest={memory}", "data.verify=full", *keys)
