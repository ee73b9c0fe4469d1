"""Raw files to parts: readable records are cleaned and stored, the others are quarantined with file and line."""

import contextlib
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from common.errors import DataError
from common.files import replacing, write_json
from common.splits import SourceSplit
from common.terminal import visible
from data_prep.config.resolved import ResolvedConfig
from data_prep.config.schema import DataConfig
from data_prep.config.versions import base_versions, versions
from data_prep.raw.documents import HARMLESS_REASONS, ID_FORMATS, UNITS, RawFile
from data_prep.raw.locations import InputFile, UnreachableError, identity, sha256_of, size_and_stamp
from data_prep.raw.megatron_index import index_of
from data_prep.raw.records import Document, Rejected
from data_prep.raw.token_ids import IdReading
from data_prep.raw.unpack import DamagedFileError, NoDocumentError
from data_prep.stages.part_cutter import Encoding, PartCutter
from data_prep.work.folder import fingerprint, read_json, stage_folder
from data_prep.work.parts import PART_BYTES, Part

# Formats that are one known file or archive each, in order, or few large files: a damaged one must be fetched again,
# not left out.
STRICT_FORMATS = ("wikitext", "enwik8", *ID_FORMATS)
# Reasons that stand for a whole file.
DAMAGED, NO_DOCUMENT = "damaged file", "no document"
# Small files are read together, because each batch makes some files on disk: alone, a file of one line costs 5 times
# more.
BATCH_BYTES = 1 << 18
BATCH_FILES = 256
RETRY_SECONDS = (1, 10, 60)  # before each further attempt at a file behind a URL
BAD_FILES_NAMED = 10


@dataclass(frozen=True, kw_only=True)
class FileState:
    """What ingest found in one raw file."""

    name: str
    """As in RawInput."""
    sha256: str
    bytes: int
    """As stored."""
    format: str
    split: SourceSplit
    documents: int
    """Documents of it in the parts."""
    rejected: dict[str, int]
    """Records that gave no document, by reason."""
    damaged: str | None
    """What is wrong with the whole file, which then has no document."""


@dataclass(frozen=True, kw_only=True)
class BatchState:
    """What ingest found in the raw files of a batch; the content of KEY.json, which is written last."""

    files: tuple[FileState, ...]
    parts: tuple[Part, ...]

    def to_json(self) -> dict[str, Any]:
        return {"files": [vars(file) for file in self.files], "parts": [part.to_json() for part in self.parts]}

    @classmethod
    def from_json(cls, body: dict[str, Any]) -> "BatchState":
        return cls(
            files=tuple(FileState(**file) for file in body["files"]),
            parts=tuple(Part.from_json(part) for part in body["parts"]),
        )


@dataclass(frozen=True, kw_only=True)
class RawInput:
    """One raw file of a batch."""

    raw: InputFile
    name: str
    """What records call it."""
    size: int | None
    """Bytes as stored; None where that is not known."""


@dataclass(frozen=True, kw_only=True)
class IngestTask:
    """A batch of raw files to ingest, consecutive in reading order: small files together, any other alone."""

    config: DataConfig
    files: tuple[RawInput, ...]
    split: SourceSplit
    folder: Path
    key: str
    """First part of the names of everything made from these files; changes when one of them does."""
    part_bytes: int
    encoding: Encoding | None = None
    """None stores the text for the stages that follow."""

    @property
    def size(self) -> int:
        """Bytes as stored, as far as known."""
        return sum(file.size or 0 for file in self.files)


def ingest_folder(resolved: ResolvedConfig, *, encodes: bool) -> Path:
    """The stage's folder: its settings are the format, the limits that change documents, the versions of the code and,
    if no text is stored, what made the ids."""
    config = resolved.config
    settings: list[Any] = [config.format, config.ingest.max_document_bytes, PART_BYTES, base_versions()]
    settings += [config.reading_settings()] if config.reading_settings() else []
    if config.format == "enwik8":
        settings += [list(config.enwik8_split_bytes)]
    if encodes:
        settings += [
            "ids",
            resolved.tokenizer_settings(),
            resolved.validation_fraction,
            versions(resolved)["sentencepiece"],
        ]
    return stage_folder(resolved.work, "ingest", *settings)


def cut_batches(sizes: Sequence[tuple[SourceSplit, int | None]]) -> list[range]:
    """Divides the raw files, given (split, bytes) of each in reading order, into those that are read together:
    consecutive files of a split, up to BATCH_BYTES and BATCH_FILES. The division depends on nothing else, and so does
    no result."""
    batches: list[range] = []
    filled = 0
    for number, (split, size) in enumerate(sizes):
        last = batches[-1] if batches else range(0)
        joins = len(last) > 0 and sizes[last[0]][0] == split and len(last) < BATCH_FILES
        if joins and size is not None and sizes[last[-1]][1] is not None and filled + size <= BATCH_BYTES:
            batches[-1] = range(last.start, number + 1)
            filled += size
        else:
            batches.append(range(number, number + 1))
            filled = size or 0
    return batches


def ingest_tasks(resolved: ResolvedConfig, encoding: Encoding | None) -> list[IngestTask]:
    """The batches of raw files, in reading order. Raises DataError for a file that is gone."""
    folder = ingest_folder(resolved, encodes=encoding is not None)
    stamps = [size_and_stamp(source.path) for source in resolved.sources]
    tasks = []
    for batch in cut_batches([(source.split, stamps[number][0]) for number, source in enumerate(resolved.sources)]):
        sources = [(resolved.sources[number], *stamps[number]) for number in batch]
        marks: list[Any] = [
            (identity(source.path), source.name, size, stamp, source.split) for source, size, stamp in sources
        ]
        if resolved.config.format == "megatron":  # which documents a file gives, its index decides
            marks += [
                size_and_stamp(index_of(source.path)) for source, _, _ in sources if isinstance(source.path, Path)
            ]
        tasks.append(
            IngestTask(
                config=resolved.config,
                files=tuple(RawInput(raw=source.path, name=source.name, size=size) for source, size, _ in sources),
                split=sources[0][0].split,
                folder=folder,
                key=fingerprint(*marks),
                part_bytes=PART_BYTES,
                encoding=encoding,
            )
        )
    return tasks


def read_state(task: IngestTask) -> BatchState | None:
    """What ingest found in a batch of raw files, or None if it has not read the batch."""
    body = read_json(task.folder / f"{task.key}.json")
    return None if body is None else BatchState.from_json(body)


def quarantine_file(task: IngestTask) -> Path:
    """JSON lines of the records of a batch of raw files that were rejected."""
    return task.folder / f"{task.key}.quarantine.jsonl"


def ingest_batch(task: IngestTask) -> None:
    """Reads a batch of raw files into parts, quarantine and state. A damaged file gives no document at all; a broken
    connection is tried again."""
    with contextlib.ExitStack() as stack:
        quarantine = stack.enter_context(replacing(quarantine_file(task)))
        cutter = stack.enter_context(PartCutter(task.folder, task.key, task.part_bytes, task.encoding))
        files = tuple(_ingest_file(task, file, cutter, quarantine) for file in task.files)
        cutter.close()
    state = BatchState(files=files, parts=tuple(cutter.parts))
    write_json(task.folder / f"{task.key}.json", state.to_json())


def _ingest_file(task: IngestTask, file: RawInput, cutter: PartCutter, quarantine: IO[bytes]) -> FileState:
    begin = quarantine.tell()
    for seconds in RETRY_SECONDS:
        try:
            return _read_file(task, file, cutter, quarantine)
        except UnreachableError as error:
            warning = visible(f"warning: {error}; the file is read again in {seconds} s")
            print(warning, file=sys.stderr, flush=True)
            cutter.forget(error, reads_again=True)
            quarantine.seek(begin)
            quarantine.truncate()
            time.sleep(seconds)
    return _read_file(task, file, cutter, quarantine)


def _read_file(task: IngestTask, file: RawInput, cutter: PartCutter, quarantine: IO[bytes]) -> FileState:
    """Reads one raw file; what it gives is taken back if it turns out to be damaged."""
    raw = RawFile(
        file.raw,
        format=task.config.format,
        split=task.split,
        split_bytes=task.config.enwik8_split_bytes,
        max_document_bytes=task.config.ingest.max_document_bytes,
        text_key=task.config.text_key,
        text_documents=task.config.text_documents,
        held_out=task.config.held_out_of_files,
        ids=_id_reading(task),
    )
    rejected: Counter[str] = Counter()
    damaged = None
    begin, last, documents = quarantine.tell(), 0, 0
    cutter.begin(file.name)
    try:
        for record in raw.read():
            last = record.position
            if isinstance(record, Document):
                cutter.add(record)
                documents += 1
            else:
                rejected[record.reason] += 1
                quarantine.write(_line(file.name, raw.unit, record))
        cutter.end()
    except DamagedFileError as error:
        if task.config.format in STRICT_FORMATS:
            raise
        damaged = str(error)
        cutter.forget(error, reads_again=False)
        reason = NO_DOCUMENT if isinstance(error, NoDocumentError) else DAMAGED
        rejected, documents = Counter({reason: 1}), 0
        quarantine.seek(begin)
        quarantine.truncate()
        # The message without the folder: the same dump elsewhere gives the same quarantine.
        detail = damaged.replace(str(file.raw), file.name)
        quarantine.write(_line(file.name, raw.unit, Rejected(last, reason, detail, b"", raw.bytes)))
    return FileState(
        name=file.name,
        sha256=raw.sha256 or sha256_of(file.raw),
        bytes=raw.bytes or file.size or 0,
        format=raw.format,
        split=task.split,
        documents=documents,
        rejected=dict(sorted(rejected.items())),
        damaged=damaged,
    )


def _id_reading(task: IngestTask) -> IdReading | None:
    config = task.config
    if config.format not in ID_FORMATS:
        return None
    assert task.encoding is not None, "ids are stored as they are read"
    maker = task.encoding.recipe.maker()
    assert maker.eos_id is not None, "without tokenizer.separator, a model has it, and ids end_of_document"
    end = config.end_of_document
    if end is not None and (piece := maker.text_piece(end)) is not None:
        raise DataError(
            f"end_of_document: {end} is the piece {piece!r} of tokenizer.model, which stands inside texts; give the id "
            "that ends documents, or null for the model's own EOS"
        )
    return IdReading(
        vocab_size=maker.vocab_size,
        has_model=config.tokenizer.has_model,
        eos_id=maker.eos_id,
        end_id=maker.eos_id if config.end_of_document is None else config.end_of_document,
        array_dtype=config.id_dtype,
        max_bytes=config.ingest.max_document_bytes,
        dtype=maker.dtype,
    )


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


def name_bad_files(states: Sequence[FileState]) -> None:
    """Names on stderr the raw files that were left out whole, BAD_FILES_NAMED at most, and what to do."""
    bad = [state.damaged for state in states if state.damaged]
    for damaged in bad[:BAD_FILES_NAMED]:
        print(visible(f"warning: left out: {damaged}"), file=sys.stderr)
    if len(bad) > BAD_FILES_NAMED:
        print(f"warning: {len(bad) - BAD_FILES_NAMED} more raw files were left out whole", file=sys.stderr)


def check_limits(tasks: Sequence[IngestTask], states: Sequence[FileState], config: DataConfig) -> None:
    """Raises DataError if more is malformed than `ingest` allows, naming the first place and the limit; the bad files
    are named on stderr before."""
    if not states:
        return
    damaged = [state for state in states if state.damaged]
    limits = config.ingest
    if damaged and (len(damaged) == len(states) or len(damaged) > max(1, limits.max_bad_files * len(states))):
        name_bad_files(states)
        over = f"more than ingest.max_bad_files {limits.max_bad_files} allows"
        raise DataError(
            f"{len(damaged)} of {len(states)} raw files are bad (damaged, or without a document), "
            f"{'so nothing is left' if len(damaged) == len(states) else over}; the first: {damaged[0].damaged}"
        )
    bad = sum(count for state in states for reason, count in state.rejected.items() if _counts(reason))
    records = sum(state.documents + sum(state.rejected.values()) for state in states)
    if bad > limits.max_bad_records * records:
        first = next(_bad_lines(tasks))
        unit = next(unit for unit in UNITS if unit in first)
        where = f"{first['file']}:{first[unit]}" if unit == "line" else f"{first['file']}, {unit} {first[unit]:,}"
        raise DataError(
            f"{bad} of {records} records are malformed, more than ingest.max_bad_records {limits.max_bad_records} "
            f"allows; the first: {where}: {first['reason']} ({first['detail']}); repair or remove the line; all are in "
            f"{tasks[0].folder}/*.quarantine.jsonl"
        )


def _counts(reason: str) -> bool:
    return reason not in HARMLESS_REASONS and reason not in (DAMAGED, NO_DOCUMENT)


def _bad_lines(tasks: Sequence[IngestTask]) -> Iterator[dict[str, Any]]:
    for task in tasks:
        with quarantine_file(task).open("rb") as lines:
            yield from (body for body in map(json.loads, lines) if _counts(body["reason"]))
