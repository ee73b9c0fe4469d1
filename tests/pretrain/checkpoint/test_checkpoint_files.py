"""The parts of saving and of keeping checkpoints one by one, without a run: files, folders, places in memory."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from common.errors import UserError
from model.config import ModelConfig
from model.memory import LayerMemory
from model.parallel.context import ParallelContext
from pretrain.checkpoint.folder import Checkpoint, DamagedCheckpoint, list_checkpoints, newest_of, set_aside_newer
from pretrain.checkpoint.fragments import Chunk, Fragments
from pretrain.checkpoint.loading import _empty_memory, _saved_as
from pretrain.checkpoint.saver import ALIGNMENT, _layout_in_buffer
from pretrain.checkpoint.state import memory_fragments
from pretrain.checkpoint.storage import Entry, Reader, _write_all, commit, write_safetensors
from pretrain.engine.zero_state import _stage_0

CONFIG = ModelConfig(d_model=4, num_layers=1, vocab_size=9, sequence_length=3)


def folders(place: Path, *steps: int) -> list[Path]:
    for step in steps:
        (place / f"step-{step:08d}").mkdir(parents=True)
    return list_checkpoints(place)


def test_checkpoints_are_in_the_order_of_their_steps_however_many_digits_these_have(tmp_path: Path) -> None:
    found = folders(tmp_path, 100_000_000, 99_999_999, 3)
    assert [path.name for path in found] == ["step-00000003", "step-99999999", "step-100000000"]


def test_a_start_sets_aside_later_checkpoints_and_not_its_own(tmp_path: Path) -> None:
    folders(tmp_path, 1, 2, 3, 4)
    moved = set_aside_newer(tmp_path, 2)
    assert [path.name for path in moved] == ["superseded-1-step-00000003", "superseded-1-step-00000004"]
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000001", "step-00000002"]


def test_the_newest_is_the_last_that_was_committed(tmp_path: Path) -> None:
    found = folders(tmp_path, 1, 2, 3)
    assert newest_of(found) == found[2]
    (found[1] / "commit.json").write_text("{}")
    assert newest_of(found) == found[1]


def test_a_checkpoint_takes_the_place_of_one_of_its_step_and_files_outside_are_refused(tmp_path: Path) -> None:
    def save(loss: float, **files: Any) -> Path:
        unfinished, final = tmp_path / "step-00000007.partial", tmp_path / "step-00000007"
        unfinished.mkdir()
        state = {"format_version": 2, "loss": loss}
        commit(unfinished, final, state=state, tensors={"files": [], "tensors": {}}, files=files)
        return final

    save(1.0)
    assert Checkpoint.open(save(2.0)).state["loss"] == 2.0
    assert Checkpoint.open(tmp_path / "superseded-1-step-00000007").state["loss"] == 1.0
    (tmp_path / "x").write_text("elsewhere")
    with pytest.raises(DamagedCheckpoint, match=r"file name '\.\./x' leaves the folder"):
        Checkpoint.open(save(3.0, **{"../x": {"bytes": 9, "sha256": ""}}))
    path = save(4.0)
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**state, "loss": 5.0}))
    with pytest.raises(DamagedCheckpoint, match=r"state\.json does not match commit\.json"):
        Checkpoint.open(path)


def test_ranks_look_for_all_files_together_each_for_its_share(tmp_path: Path) -> None:
    unfinished, path = tmp_path / "step-00000007.partial", tmp_path / "step-00000007"
    unfinished.mkdir()
    names = [f"rank-0000{rank}.safetensors" for rank in range(4)]
    for name in names:
        (unfinished / name).write_bytes(b"123")
    files = {name: {"bytes": 3, "sha256": ""} for name in names}
    commit(unfinished, path, state={"format_version": 2}, tensors={"files": [], "tensors": {}}, files=files)

    def who_misses(size: int) -> list[int]:
        found = []
        for rank in range(size):
            try:
                Checkpoint.open(path, rank=rank, world_size=size)
            except DamagedCheckpoint:
                found.append(rank)
        return found

    for number, name in enumerate([*names, "tensors.json"]):
        content = (path / name).read_bytes()
        (path / name).write_bytes(content[:-1])
        assert [who_misses(size) for size in (1, 2, 3, 7)] == [[0], [number % 2], [number % 3], [number]]
        Checkpoint.open(path, world_size=0)  # looks for none
        (path / name).write_bytes(content)
    assert who_misses(2) == []


def test_tensors_of_a_file_are_aligned(tmp_path: Path) -> None:
    """Whatever the lengths of the names: the header ends at a multiple of 8 bytes, and wide numbers come first."""
    values = {
        "u": torch.arange(3, dtype=torch.uint8),
        "two": torch.ones(5, dtype=torch.bfloat16),
        "four": torch.ones(1),
        "eight": torch.ones(1, dtype=torch.float64),
    }
    for more in range(8):
        entries = [Entry(name + "x" * more, t.dtype, t.shape, lambda t=t: t) for name, t in values.items()]  # type: ignore[misc]
        write_safetensors(tmp_path / "file", entries)
        content = (tmp_path / "file").read_bytes()
        length = int.from_bytes(content[:8], "little")
        assert length % 8 == 0
        header = json.loads(content[8 : 8 + length])
        for name, tensor in values.items():
            begin, end = header[name + "x" * more]["data_offsets"]
            assert begin % tensor.element_size() == 0 and end - begin == tensor.nbytes


def test_a_block_that_a_disk_takes_in_parts_is_written_whole() -> None:
    parts: list[bytes] = []

    def write(view: memoryview) -> int:
        parts.append(bytes(view[:3]))
        return min(3, len(view))

    assert _write_all(SimpleNamespace(write=write), b"0123456789") == 10
    assert b"".join(parts) == b"0123456789"


def test_chunks_lie_apart_and_aligned_in_the_buffer_of_a_save() -> None:
    """Of odd numbers of bytes too, as of a memory in bf16: a view of a wider type needs its own alignment."""
    shapes = [(torch.uint8, 5), (torch.bfloat16, 33), (torch.float64, 9), (torch.float32, 1), (torch.uint8, 64)]
    state = {
        f"{number}": Fragments((2, size), [Chunk((row, 0), torch.zeros(1, size, dtype=dtype)) for row in (0, 1)])
        for number, (dtype, size) in enumerate(shapes)
    }
    places, total = _layout_in_buffer(state)
    spans = sorted((start, start + state[name].chunks[offsets].nbytes) for (name, offsets), start in places.items())
    assert len(spans) == 10 and all(start % ALIGNMENT == 0 for start, _ in spans)
    assert all(end <= following for (_, end), (following, _) in itertools.pairwise(spans))
    assert spans[-1][1] <= total < spans[-1][1] + ALIGNMENT


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_ranks_of_zero_0_save_every_element_once(ranks: int) -> None:
    """Also of parameters whose elements they cannot divide evenly, or that have fewer than there are ranks."""
    for numel in range(1, 20):
        parameter = torch.arange(numel)
        parts = []
        for rank in range(ranks):
            if (located := _stage_0(parameter, rank, ranks, for_saving=True)) is not None:
                start, length, flat, offset = located
                assert start == offset and flat is parameter
                parts.append(parameter[start : start + length])
        assert torch.equal(torch.cat(parts), parameter)
        assert _stage_0(parameter, ranks - 1, ranks, for_saving=False) == (0, numel, parameter, 0)


def test_a_memory_has_a_chunk_for_each_run_of_neighbouring_streams() -> None:
    memory = LayerMemory(2)
    memory.assign(torch.tensor([0, 1, 4, 5, 7, 2]), 9)
    kept = torch.randn(6, 2, 4)
    found = memory_fragments(memory, kept, CONFIG, ParallelContext())
    assert found.shape == (9, 2, 4)
    whole = torch.full((9, 2, 4), float("nan"))
    for offsets, values in found.chunks.items():
        whole[offsets[0] : offsets[0] + len(values)] = values
    assert torch.equal(whole[[0, 1, 4, 5, 7, 2]], kept) and bool(whole[[3, 6, 8]].isnan().all())
    assert len(found.chunks) == 4


def test_an_index_names_no_file_that_is_not_verified(tmp_path: Path) -> None:
    (tmp_path / "tensors.json").write_text(json.dumps({"files": ["a", "b"], "tensors": {}}))
    Reader(Checkpoint(tmp_path, {"files": {"a": {}, "b": {}, "tensors.json": {}}})).read_metadata()
    with pytest.raises(DamagedCheckpoint, match=r"it names files that state\.json does not"):
        Reader(Checkpoint(tmp_path, {"files": {"a": {}, "tensors.json": {}}})).read_metadata()


def test_the_memory_of_other_streams_is_refused() -> None:
    """checkpoint.allow_changes may name batch: the memory decides for itself."""
    memory = LayerMemory(2)
    memory.assign(torch.arange(1), 2)
    saved = {n: SimpleNamespace(size=(n, 2, 4), properties=SimpleNamespace(dtype=torch.bfloat16)) for n in (2, 4)}
    kept = _empty_memory(saved[2], memory, CONFIG, ParallelContext())
    assert kept.shape == (1, 2, 4) and kept.dtype == torch.bfloat16
    with pytest.raises(UserError, match=r"holds the memory of 4 streams .* reads 2; set batch\.global_sequences to 4"):
        _empty_memory(saved[4], memory, CONFIG, ParallelContext())


def test_a_tied_copy_of_the_last_stage_is_read_where_it_was_saved() -> None:
    tied = CONFIG.model_copy(update={"tied_embedding": True})

    def saved_as(*names: str) -> str:
        reader: Any = SimpleNamespace(read_metadata=lambda: SimpleNamespace(state_dict_metadata=dict.fromkeys(names)))
        return _saved_as(reader, "exp_avg", "head.weight", tied)

    assert saved_as("exp_avg/embedding.weight") == "exp_avg/embedding.weight"
    assert saved_as("exp_avg/embedding.weight", "exp_avg/head.weight") == "exp_avg/head.weight"


def test_the_name_of_a_checkpoint_is_on_the_disk_when_it_is_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder that has the name is flushed after the rename: a machine that loses power then still has it."""
    done: list[tuple[str, Any]] = []
    rename, flush = os.rename, os.fsync

    def renaming(source: Path, target: Path) -> None:
        rename(source, target)
        done.append(("rename", os.stat(target).st_ino))

    def flushing(descriptor: int) -> None:
        flush(descriptor)
        done.append(("flush", os.fstat(descriptor).st_ino))

    monkeypatch.setattr(os, "rename", renaming)
    monkeypatch.setattr(os, "fsync", flushing)
    partial, final = tmp_path / "step-00000001.partial", tmp_path / "step-00000001"
    partial.mkdir()
    write_safetensors(partial / "tensors", [])
    commit(partial, final, state={}, tensors={"files": [], "tensors": {}}, files={})
    names = {path.name: path.stat().st_ino for path in final.iterdir()}
    place = done.index(("rename", final.stat().st_ino))
    assert done[place + 1 :] == [("flush", tmp_path.stat().st_ino)]
    assert {("flush", number) for number in names.values()} <= set(done[:place])
