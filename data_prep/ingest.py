"""Raw files to parts: what can be read is cleaned and stored, what cannot is quarantined with file and line."""

import contextlib
import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.config import DataConfig
from data_prep.documents import HARMLESS_REASONS, RawFile, SourceSplit, stable_fraction
from data_prep.encode import PartEncoder
from data_prep.locations import InputFile, UnreachableError, identity, sha256_of, size_and_stamp
from data_prep.plan import Plan
from data_prep.prepare import base_versions, versions
from data_prep.records import Document, Rejected
from data_prep.shard_format import DataError, SplitName
from data_prep.store import PART_BYTES, PART_DOCUMENTS, Part, PartWriter
from data_prep.unpack import DamagedFileError, NoDocumentError
from data_prep.work import fingerprint, read_json, replacing, stage_folder, write_json

# Formats that are one known file or archive each, in order: a damaged one is fetched again, not done without.
STRICT_FORMATS = ("wikitext", "enwik8")
# Reasons that stand for a whole file.
DAMAGED, NO_DOCUMENT = "damaged file", "no document"
RETRY_SECONDS = (1, 10, 60)  # before each further attempt at a file behind a URL


@dataclass(frozen=True, kw_only=True)
class FileState:
    """What ingest found in one raw file; the content of KEY.json, which is written last."""

    name: str
    """As in IngestTask."""
    sha256: str
    bytes: int
    """As stored."""
    format: str
    split: SourceSplit
    rejected: dict[str, int]
    """Records that gave no document, by reason."""
    damaged: str | None
    """What is wrong with the file as a whole; then it has no parts."""
    parts: tuple[Part, ...]

    @property
    def documents(self) -> int:
        """Documents in all parts."""
        return sum(part.documents for part in self.parts)

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "parts": [part.to_json() for part in self.parts]}

    @classmethod
    def from_json(cls, body: dict[str, Any]) -> "FileState":
        return cls(**{**body, "parts": tuple(Part(**part) for part in body["parts"])})


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How documents become ids while they are read, without text on disk."""

    model: Path | None
    """SentencePiece model; None for bytes."""
    validation_fraction: float
    folder: Path


@dataclass(frozen=True, kw_only=True)
class IngestTask:
    """One raw file to ingest."""

    config: DataConfig
    raw: InputFile
    name: str
    """What records call it."""
    split: SourceSplit
    folder: Path
    key: str
    """First part of the names of everything made from this file; changes when the file does."""
    size: int | None
    """Bytes as stored; None where that is not known."""
    part_bytes: int
    encoding: Encoding | None = None
    """None stores the text for the stages that follow."""


def ingest_folder(plan: Plan, *, encodes: bool) -> Path:
    """The stage's folder: its settings are the format, the limits that change documents and the versions of the code;
    where no text is stored, also what made the ids."""
    config = plan.config
    settings: list[Any] = [config.format, config.ingest.max_document_bytes, PART_BYTES, base_versions()]
    settings += [config.reading_settings()] if config.reading_settings() else []
    if config.format == "enwik8":
        settings += [list(config.enwik8_split_bytes)]
    if encodes:
        settings += ["ids", plan.tokenizer_settings(), plan.validation_fraction, versions(plan)["sentencepiece"]]
    return stage_folder(plan.work, "ingest", *settings)


def ingest_tasks(plan: Plan, encoding: Encoding | None) -> list[IngestTask]:
    """A task for every raw file, in reading order. Raises DataError for one that is gone."""
    folder = ingest_folder(plan, encodes=encoding is not None)
    tasks = []
    for source in plan.sources:
        size, stamp = size_and_stamp(source.path)
        key = fingerprint(identity(source.path), source.name, size, stamp, source.split)
        tasks.append(
            IngestTask(
                config=plan.config,
                raw=source.path,
                name=source.name,
                split=source.split,
                folder=folder,
                key=key,
                size=size,
                part_bytes=PART_BYTES,
                encoding=encoding,
            )
        )
    return tasks


def read_state(task: IngestTask) -> FileState | None:
    """What ingest found in a raw file, or None if it has not been there."""
    body = read_json(task.folder / f"{task.key}.json")
    return None if body is None else FileState.from_json(body)


def quarantine_file(task: IngestTask) -> Path:
    """JSON lines of the records of a raw file that were rejected."""
    return task.folder / f"{task.key}.quarantine.jsonl"


def ingest_file(task: IngestTask) -> None:
    """Reads one raw file into parts, quarantine and state. A damaged file gives no part at all; a broken connection is
    tried again."""
    for seconds in RETRY_SECONDS:
        try:
            return _ingest_file(task)
        except UnreachableError as error:
            print(f"warning: {error}; the file is read again in {seconds} s", file=sys.stderr, flush=True)
            time.sleep(seconds)
    _ingest_file(task)


def _ingest_file(task: IngestTask) -> None:
    raw = RawFile(
        task.raw,
        format=task.config.format,
        split=task.split,
        split_bytes=task.config.enwik8_split_bytes,
        max_document_bytes=task.config.ingest.max_document_bytes,
        text_key=task.config.text_key,
        text_documents=task.config.text_documents,
    )
    splitter = _Splitter(task)
    rejected: Counter[str] = Counter()
    damaged = None
    unit = "byte" if task.config.format in STRICT_FORMATS else "line"
    with contextlib.ExitStack() as stack:
        quarantine = stack.enter_context(replacing(quarantine_file(task)))
        stack.enter_context(splitter)
        last = 0
        try:
            for record in raw.read():
                last = record.position
                if isinstance(record, Document):
                    splitter.add(record)
                else:
                    rejected[record.reason] += 1
                    quarantine.write(_line(task.name, unit, record))
        except DamagedFileError as error:
            if task.config.format in STRICT_FORMATS:
                raise
            damaged = str(error)
            splitter.forget()
            reason = NO_DOCUMENT if isinstance(error, NoDocumentError) else DAMAGED
            rejected = Counter({reason: 1})
            quarantine.seek(0)
            quarantine.truncate()
            # The message without the folder: the same dump elsewhere gives the same quarantine.
            detail = damaged.replace(str(task.raw), task.name)
            quarantine.write(_line(task.name, unit, Rejected(last, reason, detail, b"", raw.bytes)))
        splitter.close()
    state = FileState(
        name=task.name,
        sha256=raw.sha256 or sha256_of(task.raw),
        bytes=raw.bytes or task.size or 0,
        format=raw.format,
        split=task.split,
        rejected=dict(sorted(rejected.items())),
        damaged=damaged,
        parts=tuple(splitter.parts),
    )
    write_json(task.folder / f"{task.key}.json", state.to_json())


class _EncodedPart:
    """A part of which only the ids are written."""

    def __init__(self, encoding: Encoding, name: str, split: SplitName) -> None:
        self._name, self.split, self.bytes, self.documents = name, split, 0, 0
        self._fraction = encoding.validation_fraction if split == "train" else 0.0
        self._encoder = PartEncoder(encoding.folder, name, encoding.model)

    def add(self, data: bytes, position: int) -> None:
        split = self.split
        if self._fraction and stable_fraction(hashlib.sha256(data).digest()) < self._fraction:
            split = "validation"
        self._encoder.add(data, split)
        self.bytes += len(data)
        self.documents += 1

    def finish(self) -> Part:
        self._encoder.finish()
        return Part(name=self._name, documents=self.documents, bytes=self.bytes, split=self.split)

    def discard(self, error: BaseException) -> None:
        """Nothing is written before `finish`."""


class _Splitter:
    """Cuts the documents of a file into parts, each of one split."""

    def __init__(self, task: IngestTask) -> None:
        self._task = task
        self._writer: PartWriter | _EncodedPart | None = None
        self.parts: list[Part] = []

    def _open(self, split: SplitName) -> PartWriter | _EncodedPart:
        name = f"{self._task.key}-{len(self.parts):05d}"
        if self._task.encoding is not None:
            return _EncodedPart(self._task.encoding, name, split)
        return PartWriter(self._task.folder, name, split)

    def add(self, document: Document) -> None:
        writer = self._writer
        if writer is not None:
            full = writer.bytes >= self._task.part_bytes or writer.documents >= PART_DOCUMENTS
            if full or writer.split != document.split:
                self.close()
                writer = None
        if writer is None:
            writer = self._writer = self._open(document.split)
        writer.add(document.data, document.position)

    def close(self) -> None:
        if self._writer is not None:
            self.parts.append(self._writer.finish())
            self._writer = None

    def forget(self) -> None:
        """Removes every part: the file cannot be trusted."""
        self.close()
        encoding = self._task.encoding
        folder = self._task.folder if encoding is None else encoding.folder
        for part in self.parts:
            for suffix in (".zst", ".tok", ".safetensors"):
                (folder / (part.name + suffix)).unlink(missing_ok=True)
        self.parts = []

    def __enter__(self) -> "_Splitter":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None and self._writer is not None:
            self._writer.discard(error)


def _line(name: str, unit: str, rejected: Rejected) -> bytes:
    body = {
        "file": name,
        unit: rejected.position,
        "reason": rejected.reason,
        "detail": rejected.detail,
        "bytes": rejected.size,
        "excerpt": rejected.record.decode("utf-8", errors="backslashreplace"),
    }
    return (json.dumps(body) + "\n").encode("ascii")


def check_limits(tasks: Sequence[IngestTask], states: Sequence[FileState], config: DataConfig) -> None:
    """Raises DataError if more is malformed than `ingest` allows, naming the first place and the limit."""
    if not states:
        return
    damaged = [state for state in states if state.damaged]
    limits = config.ingest
    if damaged and (len(damaged) == len(states) or len(damaged) > max(1, limits.max_bad_files * len(states))):
        raise DataError(
            f"{len(damaged)} of {len(states)} raw files are bad (damaged, or without a document), more than "
            f"ingest.max_bad_files {limits.max_bad_files} allows; the first: {damaged[0].damaged}"
        )
    bad = sum(count for state in states for reason, count in state.rejected.items() if _counts(reason))
    records = sum(state.documents + sum(state.rejected.values()) for state in states)
    if bad > limits.max_bad_records * records:
        first = next(_bad_lines(tasks))
        where = f"{first['file']}:{first['line']}" if "line" in first else f"{first['file']}, byte {first['byte']:,}"
        raise DataError(
            f"{bad} of {records} records are malformed, more than ingest.max_bad_records {limits.max_bad_records} "
            f"allows; the first: {where}: {first['reason']} ({first['detail']}); repair or remove the line; all are in "
            f"{tasks[0].folder}/*.quarantine.jsonl"
        )


def _counts(reason: str) -> bool:
    return reason not in HARMLESS_REASONS and reason not in (DAMAGED, NO_DOCUMENT)


def _bad_lines(tasks: Sequence[IngestTask]) -> Iterator[dict[str, Any]]:
    for task in tasks:
        for line in quarantine_file(task).read_bytes().splitlines():
            body = json.loads(line)
            if _counts(body["reason"]):
                yield body
