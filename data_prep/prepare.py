"""The preparation: tokenizer, then shards, built aside and moved into place with the manifest last.

Everything is written to `OUTPUT/.staging` first. A run that dies leaves the former data as it was; while
files are being moved there is no manifest at all. So a manifest never describes files that are not there.
"""

import contextlib
import fcntl
import importlib.metadata
import json
import os
import platform
import re
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.documents import Chunk, RawFile
from data_prep.encode import EncodedChunk, encode_chunks
from data_prep.plan import Plan
from data_prep.progress import byte_bar
from data_prep.shard_format import (
    BYTE_VALUES,
    FORMAT_VERSION,
    INDEX_SUFFIX,
    MANIFEST_FILE,
    SPLITS,
    TOKENIZER_FILE,
    DataError,
    Manifest,
    SplitName,
    TokenizerEntry,
    dtype_name,
    sha256_file,
)
from data_prep.shard_writer import SplitWriter, write_atomically, write_manifest
from data_prep.tokenizer import TextTokenizer, sample_documents, train_tokenizer

# Raise it when the same raw files and config would give other bytes: data made before is then no longer up to
# date.
PREPARATION_VERSION = "1"
STAGING = ".staging"
LOCK = ".lock"
TOKENIZER_RECORD = "tokenizer.json"  # beside tokenizer.model: its hash and settings, so that `shard` can trust it
RUN_RECORD = "run.json"  # when, where and how long; kept out of the manifest, which must not depend on it
SHARD_NAME = re.compile(rf"({'|'.join(SPLITS)})-\d{{5,}}(\.tar|{re.escape(INDEX_SUFFIX)})")


def tokenizer_step(plan: Plan, folder: Path) -> None:
    """Puts tokenizer.model (trained or copied) and tokenizer.json into a folder; nothing for bytes."""
    settings = plan.config.tokenizer
    if settings.type == "bytes":
        return
    if plan.external_model is not None:
        model = plan.external_model.read_bytes()
    else:
        texts = sample_documents(
            plan.training_files(),
            sample_bytes=settings.sample_bytes,
            seed=settings.seed,
            validation_fraction=plan.validation_fraction,
        )
        model = train_tokenizer(texts, settings)
    found = TextTokenizer(model, name=str(plan.external_model or TOKENIZER_FILE)).vocab_size
    if "vocab_size" in settings.model_fields_set and settings.vocab_size != found:
        raise DataError(f"{plan.external_model} has {found} pieces; set tokenizer.vocab_size to that or leave it out")
    write_atomically(folder / TOKENIZER_FILE, model)
    record = {"sha256": sha256_file(folder / TOKENIZER_FILE), "settings": plan.tokenizer_settings()}
    write_atomically(folder / TOKENIZER_RECORD, (json.dumps(record, indent=2) + "\n").encode("ascii"))


def reuse_tokenizer(plan: Plan, folder: Path) -> None:
    """Copies the tokenizer that the `tokenizer` step left in the output; DataError if it is not the
    configured one. Nothing for bytes."""
    if plan.config.tokenizer.type == "bytes":
        return
    fix = "make it with `python -m data_prep tokenizer --config CONFIG`"
    model, record = plan.output / TOKENIZER_FILE, plan.output / TOKENIZER_RECORD
    if not model.is_file() or not record.is_file():
        raise DataError(f"no tokenizer in {plan.output}; {fix}")
    try:
        found = json.loads(record.read_bytes())
    except ValueError:
        raise DataError(f"{record} is not JSON; {fix}") from None
    if found != {"sha256": sha256_file(model), "settings": plan.tokenizer_settings()}:
        raise DataError(f"{model} was not made with the `tokenizer` section of this config; {fix} --force")
    shutil.copyfile(model, folder / TOKENIZER_FILE)
    shutil.copyfile(record, folder / TOKENIZER_RECORD)


def shard_step(plan: Plan, folder: Path) -> Manifest:
    """Tokenises every source into shards in `folder`, which holds the tokenizer already, and writes the
    manifest."""
    tokenizer = _tokenizer_entry(plan, folder)
    dtype = np.dtype(dtype_name(tokenizer.vocab_size))
    files = plan.raw_files()
    writers = {
        split: SplitWriter(
            folder,
            split,
            dtype=dtype,
            eos_id=tokenizer.eos_id,
            tokens_per_shard=plan.config.shard.tokens_per_shard,
            tokens_per_member=plan.config.shard.tokens_per_member,
        )
        for split in plan.splits
    }
    documents = _write_documents(plan, files, writers, model_path=folder / tokenizer.file if tokenizer.file else None)
    finished = {split: writer.finish() for split, writer in writers.items()}
    if not finished["train"][0]:
        raise DataError("the input holds no document for the train split; check `input` and `validation_fraction`")
    inputs = [
        {**_identity(plan, raw, sha256=raw.sha256, size=raw.bytes), "documents": count, "format": raw.format}
        for raw, count in zip(files, documents, strict=True)
    ]
    return write_manifest(
        folder,
        {
            "format_version": FORMAT_VERSION,
            "dtype": dtype.name,
            # The defaults left out: a SentencePiece manifest is the same as before there were bytes.
            "tokenizer": tokenizer.model_dump(exclude_defaults=True),
            "splits": {split: [entry.model_dump() for entry in entries] for split, (entries, _) in finished.items()},
            "totals": {split: totals.model_dump() for split, (_, totals) in finished.items()},
            "provenance": {"inputs": inputs, "config": plan.recorded_config(), "versions": _versions()},
        },
    )


def _tokenizer_entry(plan: Plan, folder: Path) -> TokenizerEntry:
    """What the manifest says of the tokenizer that `folder` holds."""
    if plan.config.tokenizer.type == "bytes":
        return TokenizerEntry(kind="bytes", vocab_size=BYTE_VALUES)
    model = folder / TOKENIZER_FILE
    tokenizer = TextTokenizer.load(model)
    return TokenizerEntry(
        file=TOKENIZER_FILE,
        sha256=sha256_file(model),
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
    )


def _write_documents(
    plan: Plan, files: list[RawFile], writers: dict[SplitName, SplitWriter], *, model_path: Path | None
) -> list[int]:
    """Tokenises all files into the writers of their splits; the number of documents of each file."""
    documents = [0] * len(files)
    encoded_chunks = encode_chunks(
        _all_chunks(files),
        model_path=model_path,
        validation_fraction=plan.validation_fraction,
        workers=plan.workers,
    )
    total = sum(source.path.stat().st_size for source in plan.sources)
    with byte_bar(total=total, description="tokenising") as bar, contextlib.closing(encoded_chunks):
        for encoded in encoded_chunks:
            documents[encoded.source] += len(encoded.lengths)
            _write_chunk(writers, encoded)
            bar.update(encoded.stored_bytes)
    return documents


def _all_chunks(files: list[RawFile]) -> Iterator[Chunk]:
    for raw in files:
        yield from raw.chunks()


def _write_chunk(writers: dict[SplitName, SplitWriter], encoded: EncodedChunk) -> None:
    stop = np.cumsum(encoded.lengths)
    for number in range(len(stop)):
        split: SplitName = "validation" if encoded.validation[number] else encoded.split
        ids = encoded.ids[stop[number] - encoded.lengths[number] : stop[number]]
        writers[split].add_document(ids, text_bytes=int(encoded.text_bytes[number]))


def _identity(plan: Plan, raw: RawFile, *, sha256: str, size: int) -> dict[str, Any]:
    return {"name": raw.path.name, "sha256": sha256, "bytes": size, "split": plan.sources[raw.source].split}


def _versions() -> dict[str, str]:
    packages = {name: importlib.metadata.version(name) for name in ("numpy", "safetensors", "sentencepiece")}
    return {"data_prep": PREPARATION_VERSION, "python": platform.python_version(), **packages}


def difference(plan: Plan, manifest: Manifest) -> str:
    """In what prepared data differs from what the plan would make; empty if it is up to date. Hashes the raw
    files."""
    made_by = manifest.provenance.versions.get("data_prep")
    if made_by != PREPARATION_VERSION:
        return f"it was made by data_prep version {made_by}, this is version {PREPARATION_VERSION}"
    wanted = plan.recorded_config()
    for key, value in wanted.items():
        if manifest.provenance.config.get(key) != value:
            return f"`{key}` was {json.dumps(manifest.provenance.config.get(key))}, is now {json.dumps(value)}"
    recorded = manifest.provenance.inputs
    if len(recorded) != len(plan.sources):
        return f"it was made from {len(recorded)} raw files, there are now {len(plan.sources)}"
    for raw, record in zip(plan.raw_files(), recorded, strict=True):
        if raw.path.stat().st_size != record.bytes:
            return f"{raw.path} has changed or is another file"
    total = sum(record.bytes for record in recorded)
    with byte_bar(total=total, description="comparing raw files") as bar:
        for raw, record in zip(plan.raw_files(), recorded, strict=True):
            found = _identity(plan, raw, sha256=sha256_file(raw.path, on_bytes=bar.update), size=record.bytes)
            if found != record.model_dump(include=set(found)):
                return f"{raw.path} has changed or is another file"
    return ""


def is_up_to_date(plan: Plan, *, force: bool) -> bool:
    """Whether the output is already what the plan would make. DataError if it is something else and not
    `force`."""
    if force or not (plan.output / MANIFEST_FILE).exists():
        return False
    manifest = Manifest.load(plan.output)
    changed = difference(plan, manifest)
    if changed:
        raise DataError(
            f"{plan.output} holds other data: {changed}; choose another `output`, or rebuild it with --force"
        )
    manifest.check("size")
    return True


@contextlib.contextmanager
def staging(output: Path) -> Iterator[Path]:
    """An empty staging folder in the output, removed at the end. DataError while another process has one."""
    output.mkdir(parents=True, exist_ok=True)
    # A file opened for writing, because NFS gives no exclusive lock on anything else. It stays: removing
    # it would let two processes each lock a file of that name.
    with (output / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            message = f"another preparation is writing to {output}; wait for it or choose another `output`"
            raise DataError(message) from None
        except OSError as error:  # a file system without locks, such as Lustre mounted without flock
            print(f"warning: no lock on {output} ({error}); run one preparation at a time", file=sys.stderr)
        folder = output / STAGING
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def publish(folder: Path, output: Path) -> None:
    """Moves staged files into the output: old manifest away, old shards and tokenizer away, new files in, new
    manifest last."""
    (output / MANIFEST_FILE).unlink(missing_ok=True)
    for old in output.iterdir():
        if SHARD_NAME.fullmatch(old.name) or old.name in (TOKENIZER_FILE, TOKENIZER_RECORD):
            old.unlink()
    for new in sorted(folder.iterdir(), key=lambda path: (path.name == MANIFEST_FILE, path.name)):
        os.replace(new, output / new.name)


def write_run_record(plan: Plan, folder: Path, *, config_path: Path, seconds: dict[str, float]) -> None:
    """Writes run.json: what depends on this host and this moment."""
    record = {
        "host": socket.gethostname(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "seconds": {step: round(value, 3) for step, value in seconds.items()},
        "workers": plan.workers,
        "config": str(config_path.resolve()),
        "inputs": [str(source.path.resolve()) for source in plan.sources],
        "output": str(plan.output),
    }
    write_atomically(folder / RUN_RECORD, (json.dumps(record, indent=2) + "\n").encode("ascii"))
