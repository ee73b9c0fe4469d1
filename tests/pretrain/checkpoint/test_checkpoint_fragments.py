"""Flat pieces as rectangles: every element once, in order, few, and read back through DCP from any other cut."""

from __future__ import annotations

import itertools
import math
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint.default_planner import _validate_global_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan

from common.errors import UserError
from pretrain.checkpoint.folder import Checkpoint, DamagedCheckpoint
from pretrain.checkpoint.fragments import (
    Chunk,
    Fragments,
    Rectangle,
    fault_in,
    flat_range,
    rectangles,
    single_fragment,
)
from pretrain.checkpoint.loading import read
from pretrain.checkpoint.planners import AgreedPlan, SavePlanner
from pretrain.checkpoint.storage import Entry, Reader, Writer, write_safetensors

SHAPES = [(), (1,), (7,), (1, 5), (3, 4), (4, 1), (2, 3, 4), (3, 1, 2), (2, 2, 3, 2)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rectangles_are_the_range(shape: tuple[int, ...]) -> None:
    number = torch.arange(math.prod(shape)).view(shape)
    for start, stop in itertools.combinations_with_replacement(range(math.prod(shape) + 1), 2):
        parts = rectangles(shape, start, stop)
        assert len(parts) <= max(1, 2 * len(shape) - 1)
        elements: list[int] = []
        for offsets, sizes in parts:
            elements += number[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))].flatten().tolist()
        assert elements == list(range(start, stop))


def save(folder: Path, state: dict[str, Fragments]) -> Checkpoint:
    """One rank's save of `state`; several ranks' saves are in the matrix of layouts."""
    writer = Writer(folder / "step-00000001", {"format_version": 2})
    dcp.save(state, storage_writer=writer, planner=SavePlanner(), no_dist=True)
    return Checkpoint.open(folder / "step-00000001")


@pytest.mark.parametrize("dim, parts", [(0, 1), (0, 3), (1, 2), (2, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8])
def test_another_cut_reads_the_same_elements(tmp_path: Path, dim: int, parts: int, dtype: torch.dtype) -> None:
    """Saved as flat pieces of shards along `dim`, read as flat pieces of shards along another dimension."""
    full = torch.arange(3 * 4 * 6).view(3, 4, 6).to(dtype)
    chunks: list[Chunk] = []
    for part, shard in enumerate(full.chunk(parts, dim)):
        flat, offset = shard.reshape(-1).clone(), part * shard.shape[dim]
        for start, stop in itertools.pairwise([0, 1, 5, 6, flat.numel()]):
            piece = flat_range(
                flat[start:stop], start, local_shape=shard.shape, shape=full.shape, dim=dim, offset=offset
            )
            chunks += [Chunk(tuple(place), values) for place, values in piece.chunks.items()]
    checkpoint = save(tmp_path, {"x": Fragments(full.shape, chunks), "scalar": single_fragment(torch.tensor(3.5))})
    for other, pieces in ((0, 1), (1, 4), (2, 3)):
        for part, shard in enumerate(full.chunk(pieces, other)):
            target = torch.zeros(shard.numel(), dtype=dtype)[2:-1]
            where = {"dim": other, "offset": part * shard.shape[other]}
            piece = flat_range(target, 2, local_shape=shard.shape, shape=full.shape, **where)
            scalar = torch.tensor(0.0)
            read(Reader(checkpoint), {"x": piece, "scalar": single_fragment(scalar)})
            assert torch.equal(target, shard.reshape(-1)[2:-1]) and scalar == 3.5


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    checkpoint = save(tmp_path, {"x": Fragments((4,), [Chunk((0,), torch.ones(3))])})
    state: dict[str, Any]
    for state, words in [
        ({"x": single_fragment(torch.empty(4))}, r"x is incomplete \(3 of 4 elements\)"),
        ({"x": single_fragment(torch.empty(5))}, r"x has shape \[4\], the model's is \[5\]"),
        ({"y": single_fragment(torch.empty(4))}, "holds no y"),
    ]:
        with pytest.raises(UserError, match=words):
            read(Reader(checkpoint), state)
    (checkpoint.path / "tensors.json").write_text('{"files": ["../x"], "tensors": {}}')
    with pytest.raises(
        DamagedCheckpoint, match=r"tensors\.json cannot be read .*names files that state\.json does not"
    ):
        Reader(checkpoint).read_metadata()


def test_overlapping_rectangles_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    twice = Fragments((4,), [Chunk((0,), torch.ones(3)), Chunk((2,), torch.ones(2))])
    with pytest.raises(dcp.CheckpointException, match="overlapping chunks"):
        save(tmp_path, {"x": twice})
    assert not list(tmp_path.iterdir())


def places(metadata: Metadata) -> set[MetadataIndex]:
    """Name and beginning of every rectangle."""
    found = metadata.state_dict_metadata.items()
    tensors = [(name, saved) for name, saved in found if isinstance(saved, TensorStorageMetadata)]
    return {MetadataIndex(name, chunk.offsets) for name, saved in tensors for chunk in saved.chunks}


def test_what_all_ranks_together_leave_out_or_hold_twice_is_refused() -> None:
    def planned(start: int, size: int) -> Metadata:
        """The first rank has elements 0 and 1 of 4, the second `size` from `start` on."""
        planners = SavePlanner(), SavePlanner()
        for planner, (offset, length) in zip(planners, ((0, 2), (start, size)), strict=True):
            planner.set_up_planner({"x": Fragments((4,), [Chunk((offset,), torch.ones(length))])})
        return planners[0].create_global_plan([planner.create_local_plan() for planner in planners])[1]

    assert places(planned(2, 2)) == {MetadataIndex("x", torch.Size([place])) for place in (0, 2)}
    with pytest.raises(ValueError, match=r"^x: 3 of 4 elements$"):
        planned(2, 1)
    with pytest.raises(ValueError, match=r"^x: overlapping chunks"):
        planned(1, 2)


def test_what_a_rank_had_before_is_sent_no_more_and_planned_again_only_beside_something_new() -> None:
    agreed = AgreedPlan(), AgreedPlan()

    def save_on_both(*of_second: str) -> tuple[list[int], list[list[str]], Metadata]:
        """How many rectangles each rank sends, the names of those that it writes, and what the first rank planned."""
        planners = [SavePlanner(known) for known in agreed]
        for number, (planner, more) in enumerate(zip(planners, ((), of_second), strict=True)):
            half = Fragments((4,), [Chunk((2 * number,), torch.ones(2))])
            planner.set_up_planner({"x": half} | {name: single_fragment(torch.ones(3)) for name in more})
        sent = [planner.create_local_plan() for planner in planners]
        told, metadata = planners[0].create_global_plan(sent)
        written = [planner.finish_plan(plan) for planner, plan in zip(planners, told, strict=True)]
        names = [[item.index.fqn for item in plan.items] for plan in written]
        assert {item.index for plan in written for item in plan.items} == places(metadata)
        return [len(plan.items) for plan in sent], names, metadata

    planned = []
    for more, sent in (((), [1, 1]), ((), [0, 0]), (("y",), [0, 2]), (("y",), [0, 0]), (("z",), [0, 2])):
        *found, metadata = save_on_both(*more)
        assert found == [sent, [["x"], ["x", *more]]]
        planned.append(metadata)
    assert planned[0] is planned[1] and planned[2] is planned[3], "the first rank plans nothing"
    assert [sorted(metadata.state_dict_metadata) for metadata in planned[1::2]] == [["x"], ["x", "y"]]


def random_cuts(random: Random, shape: tuple[int, ...], pieces: int) -> list[Rectangle]:
    """The rectangles of flat ranges that together are the tensor."""
    cuts = sorted(random.sample(range(1, math.prod(shape)), pieces - 1))
    return [part for start, stop in pairwise([0, *cuts, math.prod(shape)]) for part in rectangles(shape, start, stop)]


def test_faults_of_rectangles_are_those_that_dcp_finds() -> None:
    """Whole, or with a rectangle that is missing, there twice, moved or longer."""
    random, seen = Random(3), set()
    for _ in range(300):
        shape = tuple(random.randint(2, 9) for _ in range(random.randint(1, 3)))
        parts = random_cuts(random, shape, random.randint(2, min(6, math.prod(shape))))
        random.shuffle(parts)
        offsets, sizes = parts[0]
        axis = random.randrange(len(shape))
        longer = tuple(n + (d == axis) for d, n in enumerate(sizes))
        moved = tuple(o + random.choice((-1, 1)) * (d == axis) for d, o in enumerate(offsets))
        for others in ([parts[0]], [], [parts[0], parts[0]], [(moved, sizes)], [(offsets, longer)]):
            given = [*parts[1:], *others]
            chunks = [ChunkStorageMetadata(torch.Size(o), torch.Size(n)) for o, n in given if min(o) >= 0]
            if len(chunks) < len(given):
                assert "leaves the shape" in fault_in(shape, given, whole=True)
                continue
            saved = TensorStorageMetadata(TensorProperties(), torch.Size(shape), chunks)
            expected = bool(_validate_global_plan([SavePlan([])] * 2, Metadata({"x": saved})))
            assert bool(fault_in(shape, given, whole=True)) == expected, (shape, given)
            seen.add((len(others), expected))
    assert seen == {(1, False), (1, True), (0, True), (2, True)}


def test_files_are_plain_safetensors_with_their_sha256(tmp_path: Path) -> None:
    from common.hashing import sha256_file

    tensors = {
        "odd": torch.arange(5, dtype=torch.uint8),
        "large": torch.randn(3, 1 << 21),  # more than a block
        "slice": torch.arange(12.0).view(3, 4)[:, 1:3],
        "empty": torch.zeros(0, 3, dtype=torch.float64),
        "scalar": torch.tensor(2, dtype=torch.int64),
    }
    entries = [Entry(name, t.dtype, t.shape, lambda t=t: t) for name, t in tensors.items()]  # type: ignore[misc]
    written = write_safetensors(tmp_path / "file", entries)
    assert written == {"bytes": (tmp_path / "file").stat().st_size, "sha256": sha256_file(tmp_path / "file")}
    found = load_file(tmp_path / "file")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], value) for name, value in tensors.items())
