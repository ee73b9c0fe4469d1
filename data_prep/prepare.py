"""From the finished stages to prepared data: what is recorded, whether it is up to date, and how it gets into place.

Shards are built in the work folder and moved into place with the manifest last; while files are being moved there is
no manifest at all. So a manifest never describes files that are not there.
"""

import contextlib
import fcntl
import functools
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
from typing import IO, Any

from data_prep.locations import InputFile, identity, sha256_of, size_and_stamp
from data_prep.plan import Plan
from data_prep.progress import byte_bar
from data_prep.shard_format import INDEX_SUFFIX, MANIFEST_FILE, SPLITS, TOKENIZER_FILE, DataError, Manifest, sha256_file
from data_prep.work import fingerprint, read_json, write_json

# Raise it when the same raw files and config would give other bytes: data made before is then no longer up to
# date.
PREPARATION_VERSION = "4"
LOCK = ".lock"
REMOVED_WORK = ".work.removed"
TOKENIZER_RECORD = "tokenizer.json"  # beside tokenizer.model: its hash and settings, so that `shard` can trust it
RUN_RECORD = "run.json"  # when, where and how long; kept out of the manifest, which must not depend on it
QUARANTINE_FILE = "quarantine.jsonl"
FILTER_SAMPLES_FILE = "filter_samples.jsonl"
DUPLICATE_SAMPLES_FILE = "duplicate_samples.jsonl"
RECORD_FILES = (QUARANTINE_FILE, FILTER_SAMPLES_FILE, DUPLICATE_SAMPLES_FILE)
SHARD_NAME = re.compile(rf"({'|'.join(SPLITS)})-\d{{5,}}(\.tar|{re.escape(INDEX_SUFFIX)})")


def base_versions() -> dict[str, str]:
    """Versions of what decides the output of every stage."""
    packages = {name: package_version(name) for name in ("numpy", "safetensors")}
    return {"data_prep": PREPARATION_VERSION, "python": platform.python_version(), **packages}


@functools.cache  # 1 ms each, and asked for by every stage
def package_version(name: str) -> str:
    return importlib.metadata.version(name)


def versions(plan: Plan) -> dict[str, str]:
    """Versions of what decides the output."""
    names = ["sentencepiece"]
    if plan.config.dedup is not None and plan.config.dedup.near:
        names.append("rensa")
    if plan.config.filter is not None and plan.config.filter.language:
        names.append("py3langid")
    return {**base_versions(), **{name: package_version(name) for name in names}}


def check_tokenizer(plan: Plan) -> Path | None:
    """The model that the `tokenizer` step left in the output, None for bytes. DataError if it is missing or not the
    configured one."""
    if plan.config.tokenizer.type == "bytes":
        return None
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
    return model


def difference(plan: Plan, manifest: Manifest, *, hash_all: bool = False) -> str:
    """In what prepared data differs from what the plan would make; empty if it is up to date. Hashes the raw
    files, unless run.json says that they are the same files with the same size and modification time (`hash_all`: in
    any case)."""
    made_by = manifest.provenance.versions.get("data_prep")
    if made_by != PREPARATION_VERSION:
        return f"it was made by data_prep version {made_by}, this is version {PREPARATION_VERSION}"
    wanted = plan.recorded_config()
    for key in [*wanted, *(key for key in manifest.provenance.config if key not in wanted)]:
        found = manifest.provenance.config.get(key)
        if found != wanted.get(key):
            return f"`{key}` was {json.dumps(found)}, is now {json.dumps(wanted.get(key))}"
    recorded = manifest.provenance.inputs
    if len(recorded) != len(plan.sources):
        return f"it was made from {len(recorded)} raw files, there are now {len(plan.sources)}"
    for source, record in zip(plan.sources, recorded, strict=True):
        if size_and_stamp(source.path)[0] not in (None, record.bytes):
            return f"{source.path} has changed or is another file"
    try:
        run = read_json(plan.output / RUN_RECORD) or {}
    except DataError:  # damaged: it only saves time
        run = {}
    if run.get("inputs") == stamps(plan) and not hash_all:
        return ""
    with byte_bar(total=sum(record.bytes for record in recorded), description="comparing raw files") as bar:
        for source, record in zip(plan.sources, recorded, strict=True):
            seen = (source.split, sha256_of(source.path, on_bytes=bar.update))
            named = record.name in (source.name, source.path.name)  # without folders: made by earlier code
            if not named or seen != (record.split, record.sha256):
                return f"{source.path} has changed or is another file"
    return ""


def stamps(plan: Plan) -> list[list[Any]]:
    """[path, size, modification time or tag, split] of every raw file; of a URL or a command, whose text may hold what
    is secret, a hash of it too."""
    return [[str(s.path.resolve()), *_marks(s.path), *size_and_stamp(s.path), s.split] for s in plan.sources]


def _marks(file: InputFile) -> list[str]:
    return [] if isinstance(file, Path) else [fingerprint(identity(file))]


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
def output_lock(output: Path, *, shared: bool) -> Iterator[None]:
    """Holds the output for this process (or, `shared`, with other array tasks). DataError while another has it."""
    output.mkdir(parents=True, exist_ok=True)
    # A file opened for writing, because NFS gives no exclusive lock on anything else. It stays: removing
    # it would let two processes each lock a file of that name.
    with (output / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            message = f"another preparation is writing to {output}; wait for it or choose another `output`"
            raise DataError(message) from None
        except OSError as error:  # a file system without locks, such as Lustre mounted without flock
            print(f"warning: no lock on {output} ({error}); run one preparation at a time", file=sys.stderr)
        # A forked worker gives its copy back: it would hold the lock for a moment after a kill of this process.
        with _closed_after_fork(lock):
            yield


_held: set[IO[str]] = set()
os.register_at_fork(after_in_child=lambda: [lock.close() for lock in _held] and None)


@contextlib.contextmanager
def _closed_after_fork(lock: IO[str]) -> Iterator[None]:
    _held.add(lock)
    try:
        yield
    finally:
        _held.discard(lock)


def publish(folder: Path, output: Path) -> None:
    """Moves finished files into the output: old manifest away, old shards, tokenizer and records away, new files in,
    new manifest last. Files whose names begin with a dot, and states, stay."""
    (output / MANIFEST_FILE).unlink(missing_ok=True)
    for old in output.iterdir():
        if SHARD_NAME.fullmatch(old.name) or old.name in (TOKENIZER_FILE, TOKENIZER_RECORD, *RECORD_FILES):
            old.unlink()
    new = [path for path in folder.iterdir() if _is_published(path.name)]
    for path in sorted(new, key=lambda path: (path.name == MANIFEST_FILE, path.name)):
        os.replace(path, output / path.name)


def _is_published(name: str) -> bool:
    known = (TOKENIZER_FILE, TOKENIZER_RECORD, MANIFEST_FILE, *RECORD_FILES)
    return name in known or SHARD_NAME.fullmatch(name) is not None


def remove_work(plan: Plan) -> None:
    """Removes the work folder, unless `keep_work`, and what a run that was killed here has left of one. It gets
    another name first: half of it would pass for finished stages."""
    removed = plan.output / REMOVED_WORK
    shutil.rmtree(removed, ignore_errors=True)
    if plan.work.exists() and not plan.config.keep_work:
        os.replace(plan.work, removed)
        shutil.rmtree(removed, ignore_errors=True)


def write_run_record(plan: Plan, *, config_path: Path, seconds: dict[str, float]) -> None:
    """Writes run.json: what depends on this host and this moment."""
    record = {
        "host": socket.gethostname(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "seconds": {step: round(value, 3) for step, value in seconds.items()},
        "workers": plan.workers,
        "config": str(config_path.resolve()),
        "inputs": stamps(plan),
        "output": str(plan.output),
    }
    write_json(plan.output / RUN_RECORD, record)
