"""From the finished stages to prepared data: what is recorded, and whether it is up to date.

Shards are built in the work folder and moved into place with the manifest last (`output_files`); while files are being
moved there is no manifest at all. So a manifest never describes files that are not there.
"""

import contextlib
import fcntl
import functools
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from common.errors import DataError
from common.files import write_json
from common.hashing import sha256_file
from data_prep.raw.locations import InputFile, identity, sha256_of, size_and_stamp
from data_prep.run.output_files import PUBLISHED, RUN_RECORD, TOKENIZER_RECORD, sizes
from data_prep.run.plan import Plan
from data_prep.shards.format import MANIFEST_FILE, TOKENIZER_FILE, Manifest
from data_prep.work.folder import STAGE_FOLDER, fingerprint, read_json
from data_prep.work.progress import byte_bar

# Raise it when the same raw files and config would give other bytes: data made before is then no longer up to
# date.
PREPARATION_VERSION = "5"
CHANGES = {
    "4": "more kinds of raw files are read, and a byte order mark is no part of a text",
    "5": "filter.c4 and c4_lines are the published rules, paragraphs end at CRLF too, top n-grams count overlaps once",
}
LOCK = ".lock"
REMOVED = ".removed"  # in the work folder: stages that are being removed
REMOVED_WORK = ".work.removed"  # where earlier code moved a work folder that it was removing


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
        return f"it was made by data_prep version {made_by}, this is version {PREPARATION_VERSION}{_changes(made_by)}"
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


def _changes(made_by: str | None) -> str:
    """In brackets, what later versions than that of some data do in another way; empty if that is not known."""
    later = [
        what for version, what in CHANGES.items() if made_by and made_by.isdecimal() and int(version) > int(made_by)
    ]
    return f" ({'; '.join(later)})" if later else ""


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
    with (output / LOCK).open("a") as lock:
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


def remove_work(plan: Plan) -> None:
    """Removes the stages in the work folder, unless `keep_work`, and what a run that was killed here has left of some;
    what else lies there stays. They are moved aside first: half of a stage would pass for a finished one."""
    removed = plan.work / REMOVED
    _remove_stages(removed)
    _remove_stages(plan.output / REMOVED_WORK)
    if not plan.work.is_dir() or plan.config.keep_work:
        return
    removed.mkdir(exist_ok=True)
    for stage in _stages(plan.work):
        os.replace(stage, removed / stage.name)
    _remove_stages(removed)
    for path in [plan.work / PUBLISHED, *plan.work.glob(f".{PUBLISHED}.*.tmp")]:
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # something else is in it, or it is a link
        plan.work.rmdir()


def _stages(folder: Path) -> list[Path]:
    """The stages' own folders in one."""
    return [path for path in sorted(folder.iterdir()) if STAGE_FOLDER.fullmatch(path.name) and not path.is_symlink()]


def _remove_stages(folder: Path) -> None:
    """Removes a folder of stages; if something else is in it, the stages alone."""
    if folder.is_dir():
        stages = _stages(folder)
        for doomed in [folder] if len(stages) == len(list(folder.iterdir())) else stages:
            shutil.rmtree(doomed, ignore_errors=True)


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
        "files": sizes(plan.output),
    }
    write_json(plan.output / RUN_RECORD, record)
