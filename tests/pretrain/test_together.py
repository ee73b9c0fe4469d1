"""The ranks of a run look at the files of a data set together: each file once, and a fault of one is everybody's."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import numpy as np
import pytest

import pretrain.together
from common.errors import DataError, UserError
from data_prep.shards.format import Manifest
from pretrain.config.schema import Config
from pretrain.data.sources import open_sources
from pretrain.parallel.agreement import PeerFailed
from pretrain.together import SHARE_BYTES, check_data, hashes_at_start, part_of
from tests.harness import run_ranks
from tests.pretrain.runs import small_config


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-700] ^= 1
    path.write_bytes(content)


def test_the_parts_of_a_check_are_the_whole(prepared: Path, tmp_path: Path) -> None:
    """Whatever file is damaged, one of three processes finds it, and the other two are content."""
    manifest = Manifest.load(prepared)
    names = [name for shard in manifest.split("train") for name in (shard.file, shard.index_file)]
    assert len(names) >= 4
    for name in [*names, "tokenizer.model"]:
        copy = tmp_path / name
        shutil.copytree(prepared, copy)
        flip(copy / name)
        damaged, found = Manifest.load(copy, follow_links=False), []
        for number in range(3):
            with contextlib.suppress(DataError):
                damaged.check("full", part=(number, 3))
                found.append(number)
        assert len(found) == 2, (name, found)


def test_a_link_that_leads_out_is_refused_when_it_is_followed(prepared: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(prepared, copy)
    shard = copy / Manifest.load(copy).split("train")[0].file
    shard.rename(tmp_path / "outside.tar")
    shard.symlink_to(tmp_path / "outside.tar")
    with pytest.raises(DataError, match="leads out of the manifest's folder"):
        Manifest.load(copy)
    config = small_config(copy)
    sources = open_sources(config, follow_links=False)
    with pytest.raises(DataError, match="leads out of the manifest's folder"):
        sources.check("size")
    with pytest.raises(DataError, match="leads out of the manifest's folder"):
        sources.reader("train", config).read(np.array([0]))


def test_many_ranks_hash_all_shards_once_if_the_share_of_each_is_small(
    prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = open_sources(small_config(prepared))
    monkeypatch.setattr(pretrain.together, "part_of", lambda manifest: (0, 16))
    assert hashes_at_start(sources, 16) and not hashes_at_start(sources, 15)
    monkeypatch.setattr(Manifest, "num_bytes", property(lambda self: 16 * SHARE_BYTES + 16))
    assert not hashes_at_start(sources, 16)


def _parts(rank: int, configs: list[Config]) -> tuple[list[object], list[object]]:
    """This rank's part of the data on a disk of its node and on a shared one; and what it made of a check of each
    configuration's data."""
    parts: list[object] = []
    checks: list[object] = []
    for kind in ("ext4", "lustre"):
        pretrain.together.filesystem_type = lambda path, kind=kind: kind  # type: ignore[assignment, misc]
        pretrain.together.os.environ.update(LOCAL_RANK="0", LOCAL_SIZE="1")
        parts.append(part_of(open_sources(configs[0]).sources[0].manifest))
    pretrain.together.MANY_RANKS = 2
    for config in configs:
        try:
            sources = check_data(open_sources(config, follow_links=False), config)
            checks.append((sources.hashed, sources.reader("train", config)._split._verify_on_first_read))  # type: ignore[attr-defined]
        except (UserError, PeerFailed) as error:
            checks.append(f"{type(error).__name__}: {error}")
    return parts, checks


def test_ranks_share_the_files_of_a_shared_disk_and_the_first_says_what_is_wrong(
    prepared: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(prepared, copy)
    shard = Manifest.load(copy).split("train")[1].file  # the second of all files: rank 1's
    flip(copy / shard)
    (first, found), (second, told) = run_ranks(_parts, 2, [small_config(prepared), small_config(copy)])
    assert first == [(0, 1), (0, 2)] and second == [(0, 1), (1, 2)]
    assert found[0] == told[0] == (True, False)
    assert told[1] == "PeerFailed: " and str(found[1]).startswith("UserError:") and shard in str(found[1])
