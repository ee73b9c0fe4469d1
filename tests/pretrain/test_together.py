"""The ranks of a run look at the files of a data set together: each file once, and a fault of one is everybody's."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

import data_prep.shards.format
import pretrain.together
from common.errors import DataError, UserError, refuse
from data_prep.shards.format import Manifest
from pretrain.config.schema import Config
from pretrain.data.sources import Sources, open_sources
from pretrain.data.verified import as_it_is, recall, remember
from pretrain.loop import train
from pretrain.parallel.agreement import PeerFailed
from pretrain.together import SHARE_BYTES, check_data, hashes_at_start, in_rounds, part_of, remember_data
from tests.harness import run_ranks
from tests.pretrain.runs import light_config, small_config


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


def unfollowed(config: Config) -> Sources:
    """The data as one of several ranks opens them."""
    sources = Sources.find(config, refuse, follow_links=False)
    assert sources is not None
    return sources


def test_a_link_that_leads_out_is_refused_when_it_is_followed(prepared: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(prepared, copy)
    shard = copy / Manifest.load(copy).split("train")[0].file
    shard.rename(tmp_path / "outside.tar")
    shard.symlink_to(tmp_path / "outside.tar")
    with pytest.raises(DataError, match="leads out of the manifest's folder"):
        Manifest.load(copy)
    config = small_config(copy)
    sources = unfollowed(config)
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

        def filesystem_type(path: Path, mounts: str | None = None, kind: str = kind) -> str:
            return kind

        pretrain.together.filesystem_type = filesystem_type
        pretrain.together.os.environ.update(LOCAL_RANK="0", LOCAL_SIZE="1")
        parts.append(part_of(open_sources(configs[0]).sources[0].manifest))
    pretrain.together.MANY_RANKS = 2
    for config in configs:
        try:
            sources = check_data(unfollowed(config), config, Path("nowhere"))
            reader = sources.reader("train", config)
            hashed = len(reader._split._hashed)  # type: ignore[attr-defined]
            if rank == 0:  # after the start's hash, before the first read of rank 1
                replaced = config.data.manifest + "/" + sources.sources[0].manifest.split("train")[0].file
                shutil.copyfile(replaced, replaced + ".new")
                flip(Path(replaced + ".new"))
                os.replace(replaced + ".new", replaced)
            dist.barrier()
            with pytest.raises(DataError, match="does not match the manifest: expected sha256"):
                reader.read(np.array([0]))
            checks.append(hashed)
        except (UserError, PeerFailed) as error:
            checks.append(f"{type(error).__name__}: {error}")
    return parts, checks


def test_ranks_share_the_files_of_a_shared_disk_and_the_first_says_what_is_wrong(
    prepared: Path, tmp_path: Path
) -> None:
    """And what is replaced after that is hashed by who opens it."""
    copy, whole = tmp_path / "copy", tmp_path / "whole"
    shutil.copytree(prepared, copy)
    shutil.copytree(prepared, whole)
    shard = Manifest.load(copy).split("train")[1].file  # the second of all files: rank 1's
    flip(copy / shard)
    (first, found), (second, told) = run_ranks(_parts, 2, [small_config(whole), small_config(copy)])
    assert first == [(0, 1), (0, 2)] and second == [(0, 1), (1, 2)]
    assert found[0] == told[0] == 5, "every rank knows all shards that were hashed, by whichever rank"
    assert told[1] == "PeerFailed: " and str(found[1]).startswith("UserError:") and shard in str(found[1])


def _hashed_on_uneven_nodes(rank: int, config: Config) -> tuple[bool, int]:
    """Whether this rank alone would hash, the first one of a node of two, the other of a node of its own; and how many
    shards the ranks did hash."""
    sources = open_sources(config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain.together, "filesystem_type", lambda path: "ext4")
        patch.setattr(pretrain.together, "MANY_RANKS", 2)
        patch.setattr(pretrain.together, "SHARE_BYTES", sources.sources[0].manifest.num_bytes - 1)
        patch.setenv("LOCAL_RANK", "0")
        patch.setenv("LOCAL_SIZE", str(2 - rank))
        checked = check_data(sources, config, Path("nowhere"))
        return hashes_at_start(sources, 2), sum(map(len, checked.hashed.values()))


def test_nodes_of_other_sizes_agree_on_whether_to_hash(prepared: Path) -> None:
    assert run_ranks(_hashed_on_uneven_nodes, 2, light_config(prepared, ranks=2)) == [(True, 0), (False, 0)]


def _starts(rank: int, folder: Path) -> list[tuple[str, int]]:
    """What this rank says, and how many shards it hashed, at starts of a run before which something happened to the
    data or to what the run remembers."""
    data, run_dir = folder / "data", folder / "run"
    shard = data / Manifest.load(data).split("train")[1].file  # the second of all files: rank 1's
    memory, hash_file = run_dir / "verified.json", data_prep.shards.format.sha256_file

    def nothing() -> None:
        pass

    def touch() -> None:
        os.utime(shard, ns=(1, 1))

    def damage_unseen() -> None:
        flip_unseen(shard)

    def mend() -> None:
        flip(shard)

    def tear() -> None:
        memory.write_text(memory.read_text()[:-9])

    def replace() -> None:
        memory.write_text("[]")

    def edit() -> None:
        tree = json.loads(memory.read_text())
        tree["data_sets"][0]["shards"][1][2] = 77  # as if the shard had been hashed when it was last changed
        memory.write_text(json.dumps(tree))
        os.utime(shard, ns=(77, 77))

    found: list[tuple[str, int]] = []
    starts = [(nothing, "lustre", "size"), (nothing, "lustre", "size"), (touch, "lustre", "size")]
    starts += [(happens, "lustre", "size") for happens in (tear, replace, edit)]
    starts += [(nothing, "lustre", "full"), (nothing, "ext4", "size"), (damage_unseen, "lustre", "size")]
    starts += [(nothing, "lustre", "full"), (mend, "lustre", "size")]
    for happens, kind, verify in starts:
        if rank == 0:
            happens()
        dist.barrier()
        hashed, config = [], small_config(data, f"data.verify={verify}")

        def counted(path: Path, on_bytes: Any = None, hashed: list[str] = hashed) -> str:
            hashed += [path.name] * (path.suffix == ".tar")
            return hash_file(path, on_bytes)

        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
            patch.setattr(pretrain.together, "MANY_RANKS", 2)
            patch.setattr(pretrain.together, "filesystem_type", lambda path, kind=kind: kind)
            patch.setenv("LOCAL_RANK", str(rank))
            patch.setenv("LOCAL_SIZE", "2")
            patch.setattr(data_prep.shards.format, "sha256_file", counted)
            try:
                sources = check_data(unfollowed(config), config, run_dir)
                assert sources.hashed
                remember_data(run_dir, sources)
            except (UserError, PeerFailed) as error:
                print(type(error).__name__)
        dist.barrier()
        found.append((out.getvalue().strip(), len(hashed)))
    return found


def flip_unseen(path: Path) -> None:
    """Damages a file, whose size and time of change stay."""
    status = path.stat()
    flip(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_start_hashes_what_no_earlier_one_has_verified_as_it_is_now(prepared: Path, tmp_path: Path) -> None:
    shutil.copytree(prepared, tmp_path / "data")
    (tmp_path / "run").mkdir()
    first, second = run_ranks(_starts, 2, tmp_path)
    known, touched = (
        f"data: {new} shards verified, {old} known from an earlier start" for new, old in ((0, 5), (1, 4))
    )
    everything = ("data: 5 shards verified, 0 known from an earlier start", 3)
    assert first[:3] == [everything, (known, 0), (touched, 0)]
    assert first[3:6] == [everything] * 3  # a torn, a foreign and an edited memory
    assert first[6:8] == [everything] * 2  # full; disks of the nodes, which others do not see
    assert first[8:] == [(known, 0), ("UserError", 3), (touched, 0)]  # only full sees what size and time do not tell
    assert [hashed for _, hashed in second] == [2, 0, 1, 2, 2, 2, 2, 2, 0, 1, 1]
    assert [said for said, _ in second] == ["PeerFailed" if n == 9 else "" for n in range(11)]


def test_a_memory_does_not_hold_for_a_copy_or_another_data_set(prepared: Path, tmp_path: Path) -> None:
    shutil.copytree(prepared, tmp_path / "copy")  # with the times of change
    ours, copy = Manifest.load(prepared), Manifest.load(tmp_path / "copy")
    shards = {as_it_is(ours, entry) for entry in ours.split("train")}
    remember(tmp_path, [shard for shard in shards if shard is not None])
    assert recall(tmp_path) == shards and len(shards) == 4
    assert not recall(tmp_path) & {as_it_is(copy, entry) for entry in copy.split("train")}
    assert as_it_is(ours, ours.split("validation")[0]) not in recall(tmp_path)
    assert not recall(tmp_path / "nowhere")


def _runs(rank: int, config: Config, run_dir: Path) -> list[str]:
    """What this rank says of its data at two starts of a run."""
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain.together, "filesystem_type", lambda path: "lustre")
        for _ in range(2):
            with contextlib.redirect_stdout(io.StringIO()) as out:
                train(config, open_sources(config), run_dir, torch.device("cpu"))
            said += [line for line in out.getvalue().splitlines() if line.startswith("data: ")]
    return said


def test_a_run_remembers_its_shards_and_full_hashes_them_again(prepared: Path, tmp_path: Path) -> None:
    config = light_config(prepared, "train.steps=1", "evaluate.sequences=0", "data.verify=full")
    full, again = run_ranks(_runs, 1, config, tmp_path / "run")[0]
    assert full == again == "data: 5 shards verified, 0 known from an earlier start"
    assert {shard.name for shard in recall(tmp_path / "run")} == {path.name for path in prepared.glob("*.tar")}


def _work(rank: int, folder: Path) -> int:
    """How often this rank has met the other, which works until they have met five times."""
    meetings, reduce = [0], dist.all_reduce

    def meeting(*args: Any, **options: Any) -> None:
        reduce(*args, **options)
        meetings[0] += 1
        if meetings[0] == 5:
            (folder / f"met-{rank}").touch()

    def work() -> None:
        deadline = time.monotonic() + 600.0
        while rank == 1 and not (folder / "met-0").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        if rank == 0:
            raise UserError("of rank 0")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", meeting)
        patch.setattr(pretrain.together, "ROUND_SECONDS", 0.01)
        with pytest.raises(UserError, match="of rank 0") if rank == 0 else contextlib.nullcontext():
            in_rounds(work)
    return meetings[0]


def test_ranks_meet_while_one_of_them_hashes(tmp_path: Path) -> None:
    first, second = run_ranks(_work, 2, tmp_path)
    assert first == second >= 5
