"""DCP's storage as safetensors and JSON: what lies on the disk can be read, but never executed.

DCP's own FileSystemReader unpickles `.metadata`. Its HuggingFaceStorageWriter (torch 2.13) writes safetensors, but keys
a file by tensor name alone: if one rank owns two rectangles of a tensor, the first is silently lost.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import safetensors
import torch
from torch import Tensor
from torch.distributed.checkpoint import StorageReader, StorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from common.errors import kind_of
from common.files import sync_directory, write_json
from common.folders import room_text
from pretrain.checkpoint.folder import (
    COMMIT_FILE,
    STATE_FILE,
    TENSORS_FILE,
    Checkpoint,
    damaged_by,
    digest_entry,
    remove_partials,
    set_aside,
)

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
}
"""Names of safetensors (https://github.com/huggingface/safetensors, format)."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}
BLOCK_BYTES = 1 << 24
"""Bytes that are written, hashed and, from a GPU, copied at a time; writing takes no more memory than this."""


class Entry(NamedTuple):
    """A tensor to be written."""

    key: str
    dtype: torch.dtype
    shape: Sequence[int]
    source: Callable[[], Tensor]
    """Called when its turn comes; the tensor is not kept."""


def chunk_key(name: str, offsets: Sequence[int]) -> str:
    """The key of a rectangle in a rank's file."""
    return f"{name}@{','.join(map(str, offsets))}"


def write_safetensors(
    path: Path, entries: Sequence[Entry], wrote: Callable[[int], None] = lambda num_bytes: None
) -> dict[str, Any]:
    """Streams tensors to a file in the format of safetensors and flushes it to the disk. Returns its {"bytes",
    "sha256"}. Calls `wrote` with the size of every block. Raises UserError, with the path and the sizes, if the disk
    refuses."""
    ordered = sorted(entries, key=lambda entry: -entry.dtype.itemsize)  # so that every tensor is aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, dtype, shape, _ in ordered:
        begin, end = end, end + dtype.itemsize * torch.Size(shape).numel()
        header[key] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest, written = hashlib.sha256(), 0
    try:
        with open(path, "wb", buffering=0) as file:
            for block in _blocks(text, ordered):
                digest.update(block)
                written += _write_all(file, block)
                wrote(len(block))
            os.fsync(file.fileno())
    except OSError as error:
        wanted, room = 8 + len(text) + end, _room(error, path)
        raise kind_of(error)(f"{path}: {error.strerror} after {written:,} of {wanted:,} bytes{room}") from None
    return {"bytes": written, "sha256": digest.hexdigest()}


def _blocks(header: bytes, entries: Iterable[Entry]) -> Iterator[bytes | memoryview]:
    yield len(header).to_bytes(8, "little") + header
    for key, dtype, shape, source in entries:
        tensor = source().detach()
        assert tensor.dtype == dtype and tensor.shape == torch.Size(shape), f"{key} is not what was planned"
        flat = tensor.reshape(-1)
        step = max(1, BLOCK_BYTES // dtype.itemsize)
        for start in range(0, flat.numel(), step):
            yield memoryview(flat[start : start + step].cpu().contiguous().view(torch.uint8).numpy())  # type: ignore[arg-type]


def _write_all(file: Any, block: Any) -> int:
    """Writes all of `block`: an unbuffered file may take a part of it, and the next call then says why."""
    view, done = memoryview(block), 0
    while done < len(view):
        done += file.write(view[done:])
    return done


def _room(error: OSError, path: Path) -> str:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return ""
    room = room_text(path.parent)
    return f"; {room}" if room else ""


def commit(
    partial: Path, final: Path, *, state: dict[str, Any], tensors: dict[str, Any], files: dict[str, dict[str, Any]]
) -> int:
    """Makes the folder `partial` the checkpoint `final`: index, state, commit marker, in this order, each on the disk
    before the next, and then the name. `tensors`: the content of tensors.json; `state`: that of state.json without the
    files; `files`: {name: {"bytes", "sha256"}} of what is there already. Returns the bytes of all files."""
    write_json(partial / TENSORS_FILE, tensors, indent=None)
    files = {**files, TENSORS_FILE: digest_entry(partial / TENSORS_FILE)}
    write_json(partial / STATE_FILE, {**state, "files": files})
    marker = digest_entry(partial / STATE_FILE)
    write_json(partial / COMMIT_FILE, marker)
    if final.exists():  # left by a run that went back to before this step
        set_aside(final)
    os.rename(partial, final)
    sync_directory(final.parent)
    return int(marker["bytes"]) + sum(int(entry["bytes"]) for entry in files.values())


class Writer(StorageWriter):
    """Writes one checkpoint: a safetensors file per rank, then, on the coordinator, the JSON and the commit."""

    def __init__(self, final: Path, state: dict[str, Any], before: Callable[[], None] = lambda: None) -> None:
        """`final`: the folder's name once it is complete. `state`: the content of state.json without the files.
        `before` is called on the coordinator before anything is written; if it raises OSError, the save ends."""
        self.final, self._state, self._before = final, state, before
        self.partial = final.with_name(final.name + ".partial")
        self.bytes = 0
        """Bytes of all files; known on the coordinator, once committed."""
        self.written = 0
        """Bytes that this rank has written so far; they show whether a slow disk still makes progress."""

    def _wrote(self, num_bytes: int) -> None:
        self.written += num_bytes

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return checkpoint_id is None

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On the coordinator, before any rank writes."""
        try:
            self._before()
        except OSError as error:
            raise kind_of(error)(f"{error.filename or 'a log'}, which a checkpoint needs: {error.strerror}") from None
        try:
            remove_partials(self.final.parent)
            self.partial.mkdir(parents=True)
        except OSError as error:
            raise kind_of(error)(f"{self.partial}: {error.strerror}{_room(error, self.partial)}") from None
        # A plan that is the same as at the save before comes without items and is marked as such.
        return [replace(plan, storage_data=f"rank-{rank:05d}.safetensors") for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        def entry(item: WriteItem) -> Entry:
            data = item.tensor_data
            assert data is not None and data.chunk is not None and item.index.offset is not None
            key = chunk_key(item.index.fqn, item.index.offset)
            source = cast(Callable[[], Tensor], lambda: planner.resolve_data(item))
            return Entry(key, data.properties.dtype, data.chunk.sizes, source)

        file = {"name": plan.storage_data}
        entries = [entry(item) for item in plan.items]
        file |= write_safetensors(self.partial / plan.storage_data, entries, self._wrote)
        result: Future[list[WriteResult]] = Future()
        result.set_result([WriteResult(item.index, item.tensor_storage_size() or 0, file) for item in plan.items])
        return result

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the coordinator, when every rank has written: index, state, commit marker, in this order, each on the disk
        before the next."""
        files = {r.storage_data["name"]: r.storage_data for rank in results for r in rank}
        places = {r.index: r.storage_data["name"] for rank in results for r in rank}
        numbers = {name: number for number, name in enumerate(sorted(files))}
        tensors = {}
        for name, saved in metadata.state_dict_metadata.items():
            assert isinstance(saved, TensorStorageMetadata)
            chunks = [
                [numbers[places[MetadataIndex(name, c.offsets)]], list(c.offsets), list(c.sizes)] for c in saved.chunks
            ]
            tensors[name] = {"dtype": NAMES[saved.properties.dtype], "shape": list(saved.size), "chunks": chunks}
        entries = {name: {"bytes": file["bytes"], "sha256": file["sha256"]} for name, file in files.items()}
        index = {"files": list(numbers), "tensors": tensors}
        try:
            self.bytes = commit(self.partial, self.final, state=self._state, tensors=index, files=entries)
        except OSError as error:
            raise kind_of(error)(f"{self.partial}: {error.strerror}{_room(error, self.partial)}") from None


class Reader(StorageReader):
    """Reads parts of an opened checkpoint by memory map."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._metadata: Metadata | None = None

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return checkpoint_id is None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Parsed once. Raises DamagedCheckpoint."""
        if self._metadata is None:
            try:
                self._metadata = self._parse()
            except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
                raise damaged_by(error)(f"{self.what}: {TENSORS_FILE} cannot be read ({error})") from None
        return self._metadata

    def _parse(self) -> Metadata:
        tree = json.loads((self._checkpoint.path / TENSORS_FILE).read_text(encoding="utf-8"))
        files = tree["files"]
        if not set(files) <= set(self._checkpoint.state["files"]):
            raise ValueError(f"it names files that {STATE_FILE} does not")
        tensors: dict[str, Any] = {}
        places: dict[MetadataIndex, str] = {}
        for name, entry in tree["tensors"].items():
            chunks = [ChunkStorageMetadata(torch.Size(o), torch.Size(s)) for _, o, s in entry["chunks"]]
            properties = TensorProperties(dtype=DTYPES[entry["dtype"]])
            tensors[name] = TensorStorageMetadata(properties, torch.Size(entry["shape"]), chunks)
            places |= {MetadataIndex(name, offsets): files[file] for file, offsets, _ in entry["chunks"]}
        return Metadata(tensors, storage_data=places)

    @property
    def what(self) -> str:
        return f"checkpoint {self._checkpoint.path}"

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self._metadata = metadata

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        assert self._metadata is not None
        by_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            by_file.setdefault(self._metadata.storage_data[item.storage_index], []).append(item)
        for name, items in sorted(by_file.items()):
            try:
                with safetensors.safe_open(self._checkpoint.path / name, framework="pt") as file:
                    for item in items:
                        _read(file, item, planner)
            except (OSError, safetensors.SafetensorError) as error:
                raise damaged_by(error)(f"{self.what}: {name} cannot be read ({error})") from None
        result: Future[None] = Future()
        result.set_result(None)
        return result


def _read(file: Any, item: ReadItem, planner: LoadPlanner) -> None:
    assert item.storage_index.offset is not None
    stored = file.get_slice(chunk_key(item.storage_index.fqn, item.storage_index.offset))
    place = tuple(slice(o, o + n) for o, n in zip(item.storage_offsets, item.lengths, strict=True))
    target = planner.resolve_tensor(item).detach()
    target.copy_(stored[place] if place else stored[...])
    planner.commit_tensor(item, target)
