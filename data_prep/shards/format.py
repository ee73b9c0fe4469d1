"""The shard format: what data_prep writes and the trainer reads. The only definition of it.

A prepared folder holds

    train-00000.tar              a webdataset tar; its members train-00000-000000.tok.bin, ... are token ids,
                                 little-endian uint16 (uint32 when vocab_size > 65,536). Every document ends
                                 with EOS and may span members; a shard starts with a document, ends with EOS.
                                 Bytes and symbols have no EOS: documents follow one another as in the raw
                                 file; with tokenizer.separator the pieces of that text are in its place.
    train-00000.idx.safetensors  int64 member_offset [members]: byte offset of a member's data in the tar,
                                 int64 member_tokens [members], int64 document_start [documents] in tokens.
    tokenizer.model              the SentencePiece model that made the ids; for symbols the byte value of each
                                 id, a byte each; none if the ids are bytes
    manifest.json                sizes and sha256 of all these, totals, provenance, own digest; written last

All of it is data: JSON, raw integers and safetensors, never pickle. Imports: numpy, safetensors and pydantic.
"""

import errno
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors
import safetensors.numpy
from pydantic import PrivateAttr, ValidationError, model_validator

from common.errors import DataError, Problem, UnreadableError, refuse
from common.hashing import sha256_file, sha256_json
from common.splits import SPLITS, SplitName
from data_prep.shards.manifest_records import BYTE_VALUES as BYTE_VALUES
from data_prep.shards.manifest_records import (
    Provenance,
    Record,
    RecordFile,
    Sha256,
    ShardEntry,
    SplitTotals,
    TokenizerEntry,
)

FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
TOKENIZER_FILE = "tokenizer.model"
MEMBER_SUFFIX = ".tok.bin"
INDEX_SUFFIX = ".idx.safetensors"
TAR_BLOCK_BYTES = 512
Part = tuple[int, int]
"""(number, of): of several processes that check a folder together, this one's number and how many they are."""
WHOLE: Part = (0, 1)
Patience = Callable[[Callable[[], object]], object]
"""Makes a check of a file; it may make it again after an UnreadableError, or an OSError, that can pass."""
REBUILD = "prepare the data again with `python -m data_prep run --config CONFIG --force`, or copy them again"


def dtype_name(vocab_size: int) -> Literal["uint16", "uint32"]:
    """The narrowest dtype that holds ids 0 .. vocab_size - 1: uint16 up to 65,536 pieces, else uint32."""
    return "uint16" if vocab_size <= 65536 else "uint32"


def manifest_digest(body: dict[str, Any]) -> str:
    """Hex sha256 of the canonical JSON (sorted keys, no spaces, ASCII) of a manifest without its `digest` and without
    the versions in its provenance: the same bytes made with another Python are the same data set."""
    provenance = {key: value for key, value in body["provenance"].items() if key != "versions"}
    return _hash({**body, "provenance": provenance})


def _hash(body: dict[str, Any]) -> str:
    return sha256_json({key: value for key, value in body.items() if key != "digest"})


class Manifest(Record):
    """A validated manifest.json; `folder` is where it lies."""

    format_version: int
    """Version of this layout; a reader refuses any other."""
    dtype: Literal["uint16", "uint32"]
    """Token dtype, little-endian."""
    tokenizer: TokenizerEntry
    splits: dict[SplitName, tuple[ShardEntry, ...]]
    """Shards of each split in reading order."""
    totals: dict[SplitName, SplitTotals]
    provenance: Provenance
    """Sources, settings and versions."""
    digest: Sha256
    """The identity of the data set: `manifest_digest`; of data that earlier code made, the hash of the versions too."""
    _folder: Path = PrivateAttr(default=Path())
    _root: Path | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _check_sums(self) -> "Manifest":
        names = [name for entries in self.splits.values() for e in entries for name in (e.file, e.index_file)]
        if len(set(names)) != len(names):
            raise ValueError("a shard or index file is listed twice")
        if set(self.splits) | {"test"} != set(SPLITS) or set(self.totals) != set(self.splits):
            raise ValueError("splits and totals must have the keys train, validation and, if there is one, test")
        for split, entries in self.splits.items():
            sums = (sum(e.documents for e in entries), sum(e.tokens for e in entries))
            if sums != (self.totals[split].documents, self.totals[split].tokens):
                raise ValueError(f"totals of split {split!r} are not the sums over its shards")
        tokenizer = self.tokenizer
        if self.dtype != dtype_name(tokenizer.vocab_size) or (tokenizer.eos_id or 0) >= tokenizer.vocab_size:
            raise ValueError("dtype, vocab_size and eos_id contradict each other")
        return self

    @classmethod
    def load(cls, path: str | Path, *, follow_links: bool = True) -> "Manifest":
        """Reads and validates a manifest; `path` is manifest.json or its folder. Raises DataError. `follow_links`
        False: whether a shard is a link that leads elsewhere is left to `check` and to the reader that opens it."""
        file = Path(path)
        if file.is_dir():
            file = file / MANIFEST_FILE
        try:
            raw = file.read_bytes()
        except FileNotFoundError:
            raise DataError(
                f"no prepared data: no file {file}; make it with `python -m data_prep run --config CONFIG`"
            ) from None
        except OSError as error:
            raise UnreadableError(f"cannot read {file}: {said(error)}", str(file), error.errno) from None
        manifest = cls._parse(file, raw)
        manifest._folder = file.parent
        shards = [name for e in manifest.entries for name in (e.file, e.index_file)] if follow_links else []
        for name in [manifest.tokenizer.file or "", *shards, *(r.file for r in manifest.provenance.records)]:
            manifest.inside(name)
        return manifest

    def inside(self, name: str) -> Path:
        """The file `name` of the data set. Raises DataError if a link leads out of the manifest's folder."""
        if self._root is None:
            self._root = self.folder.resolve()
        if not (self._root / name).resolve().is_relative_to(self._root):
            raise DataError(
                f"{self.folder / MANIFEST_FILE}: {name} leads out of the manifest's folder (a link?); store the file "
                f"inside it"
            )
        return self.folder / name

    @classmethod
    def _parse(cls, file: Path, raw: bytes) -> "Manifest":
        try:
            body = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file} is not JSON ({error}); {REBUILD}") from None
        version = body.get("format_version") if isinstance(body, dict) else None
        if version != FORMAT_VERSION:
            raise DataError(f"{file}: format_version is {version!r}, this code reads {FORMAT_VERSION}; {REBUILD}")
        try:
            # From what was parsed above and is hashed below, so that no two readings of odd JSON can differ.
            manifest = cls.model_validate_json(json.dumps(body))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"]) or "manifest"
            raise DataError(f"{file}: {key}: {first['msg']}; {REBUILD}") from None
        found = manifest_digest(body)
        if manifest.digest not in (found, _hash(body)):
            raise DataError(f"{file} was edited: its digest is {manifest.digest}, its content has {found}; {REBUILD}")
        return manifest

    @property
    def folder(self) -> Path:
        """The folder that holds the manifest and every file it names."""
        return self._folder

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """Little-endian numpy dtype of the stored ids."""
        return np.dtype(self.dtype).newbyteorder("<")

    def split(self, name: str) -> tuple[ShardEntry, ...]:
        """Shards of a split in order. Raises DataError for a split that is unknown."""
        for split, entries in self.splits.items():
            if split == name:
                return entries
        raise DataError(f"{self.folder / MANIFEST_FILE} has no split {name!r}; it has {', '.join(self.splits)}")

    @property
    def num_bytes(self) -> int:
        """Of all shards."""
        return sum(entry.bytes for entry in self.entries)

    def num_tokens(self, split: str) -> int:
        """Token ids in a split, EOS included."""
        return sum(entry.tokens for entry in self.split(split))

    def part(self, part: Part) -> list[ShardEntry]:
        """The shards that one of several processes looks at."""
        number, of = part
        return self.entries[number::of]

    @property
    def entries(self) -> list[ShardEntry]:
        """All shards, split by split."""
        return [entry for entries in self.splits.values() for entry in entries]

    def check(
        self,
        level: Literal["size", "full"],
        show_progress: bool = False,
        problem: Problem = refuse,
        part: Part = WHOLE,
        patience: Patience = lambda check: check(),
    ) -> None:
        """Compares the folder with the manifest; one DataError for each file that differs, which names the file, the
        difference and the fix. It is raised, unless `problem` takes it.

        Always: every file is there with its size and may be read; tokenizer and indexes are hashed and the indexes
        validated. `full` also hashes every shard; `show_progress` shows a bar for that. Only the files of `part` are
        looked at, where several processes check a folder together. `patience` makes each check.
        """
        passes, entries = partial(_passes, problem, patience), self.part(part)
        if part[0] == 0:
            passes(self._check_tokenizer)
        whole = [entry for entry in entries if passes(partial(self._check_shard, entry))]
        for entry in entries:
            passes(partial(ShardIndex.load, self, entry))
        if level == "size":
            return
        if part[0] == 0:
            self.check_records(patience, problem)
        self.hash_shards(whole, show_progress, patience, problem)

    def check_records(self, patience: Patience, problem: Problem = refuse) -> None:
        """The part of `check` for the records of the preparation, which training does without."""
        for record in self.provenance.records:
            _passes(problem, patience, partial(_check_record, self.folder / record.file, record))

    def hash_shards(
        self, entries: list[ShardEntry], show_progress: bool, patience: Patience, problem: Problem = refuse
    ) -> None:
        """The part of `check` that takes long: reads these shards, and compares their sha256."""
        from common.progress_bar import byte_bar  # here, so that the read path does not import tqdm

        total = sum(entry.bytes for entry in entries)
        with byte_bar(total=total, description="hashing shards", enabled=show_progress) as bar:
            for entry in entries:
                check = partial(_check_hash, self.folder / entry.file, entry.sha256, bar.update)
                _passes(problem, patience, check)

    def _check_shard(self, entry: ShardEntry) -> None:
        path = self.inside(entry.file)
        check_size(path, entry.bytes)
        try:  # os.access would say no more than that it cannot be read
            os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            raise unreadable(path, error) from None

    def _check_tokenizer(self) -> None:
        if self.tokenizer.file is not None:
            _check_hash(self.folder / self.tokenizer.file, self.tokenizer.sha256)


def _passes(problem: Problem, patience: Patience, check: Callable[[], object]) -> bool:
    try:
        patience(check)
        return True
    except DataError as error:
        problem(error)
        return False


def _check_record(path: Path, record: RecordFile) -> None:
    check_size(path, record.bytes)
    _check_hash(path, record.sha256)


def _check_hash(path: Path, sha256: str | None, on_bytes: Callable[[int], object] | None = None) -> None:
    try:
        found = sha256_file(path, on_bytes)
    except OSError as error:
        raise unreadable(path, error) from None
    _expect("sha256", path, sha256, found)


def said(error: OSError) -> str:
    """What the system says, with its number: only that tells a stale handle from a disk that fails."""
    name = errno.errorcode.get(error.errno or 0)
    return f"{error.strerror} (errno {error.errno}, {name})" if name else str(error)


def unreadable(path: Path, error: OSError) -> UnreadableError:
    """The error of a file of the data set that could not be read, with the fix where there is one."""
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EISDIR):
        text = f"missing file {path}; {REBUILD}"
    elif error.errno in (errno.EACCES, errno.EPERM):
        text = f"{path} cannot be read: {error.strerror}; let its owner give this user read permission"
    else:
        text = f"{path} cannot be read: {said(error)}"
    return UnreadableError(text, str(path), error.errno)


def _expect(what: str, path: Path, expected: object, found: object) -> None:
    if expected != found:
        raise DataError(f"{path} does not match the manifest: expected {what} {expected}, found {found}; {REBUILD}")


def check_size(path: Path, expected_bytes: int) -> None:
    """Raises DataError unless the file exists with that size, UnreadableError if it cannot be asked."""
    try:
        found = path.stat().st_size
    except OSError as error:
        raise unreadable(path, error) from None
    _expect("bytes", path, expected_bytes, found)


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """Where members and documents of one shard lie; arrays as described at the top of this file."""

    member_offset: np.ndarray
    member_tokens: np.ndarray
    document_start: np.ndarray

    def to_bytes(self) -> bytes:
        """The index file; the same arrays give the same bytes."""
        return safetensors.numpy.save(
            {
                "member_offset": self.member_offset,
                "member_tokens": self.member_tokens,
                "document_start": self.document_start,
            }
        )

    @classmethod
    def load(cls, manifest: Manifest, entry: ShardEntry) -> "ShardIndex":
        """Reads an index, checks its hash, then that it is consistent with the shard. Raises DataError."""
        path = manifest.inside(entry.index_file)
        check_size(path, entry.index_bytes)
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise unreadable(path, error) from None
        _expect("sha256", path, entry.index_sha256, hashlib.sha256(raw).hexdigest())
        try:
            arrays = safetensors.numpy.load(raw)
        except safetensors.SafetensorError as error:
            raise DataError(f"{path} is not a safetensors file ({error}); {REBUILD}") from None
        names = {"member_offset", "member_tokens", "document_start"}
        if set(arrays) != names or any(a.dtype != np.int64 or a.ndim != 1 for a in arrays.values()):
            raise DataError(f"{path}: expected the int64 vectors {', '.join(sorted(names))}; {REBUILD}")
        index = cls(**arrays)
        problem = index.problem(entry, manifest.numpy_dtype.itemsize)
        if problem:
            raise DataError(f"{path}: {problem}, so it does not describe {entry.file}; {REBUILD}")
        return index

    def problem(self, entry: ShardEntry, itemsize: int) -> str:
        """What is inconsistent between this index and its shard; empty if nothing. O(members + documents)."""
        offset, tokens, document = self.member_offset, self.member_tokens, self.document_start
        if len(offset) != len(tokens) or len(offset) == 0:
            return f"{len(offset)} member offsets for {len(tokens)} members"
        if tokens.min() < 1 or tokens.max() > entry.tokens or int(tokens.sum()) != entry.tokens:
            return f"members hold {int(tokens.sum())} tokens, the manifest says {entry.tokens}"
        end = offset + tokens * itemsize
        # Data starts on a tar block after its own 512-byte header, hence the gap between one member and the
        # next.
        gaps = offset - np.concatenate([np.zeros(1, np.int64), end[:-1]])
        if gaps.min() < TAR_BLOCK_BYTES or (offset % TAR_BLOCK_BYTES).any() or end[-1] > entry.bytes:
            return f"member offsets overlap, are off the tar blocks or leave the shard of {entry.bytes} bytes"
        if len(document) != entry.documents:
            return f"{len(document)} document starts, the manifest says {entry.documents}"
        if document[0] != 0 or (np.diff(document) < 1).any() or document[-1] >= entry.tokens:
            return f"document starts must rise from 0 and stay below {entry.tokens}"
        return ""
