"""What a preparation puts into `output`, which of the files there are its own, and how finished ones get into place.
Its own files are those that a manifest or run.json lists (while files are being moved, OUTPUT/.work/published.json),
and a tokenizer whose record has its hash. Any other file of such a name is foreign: the preparation refuses it by name
before any work, and replaces it only with --force; it never replaces a raw file.

Shards are built in the work folder and moved into place with the manifest last; while files are being moved there is no
manifest at all. So a manifest never describes files that are not there.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from common.errors import DataError
from common.files import intended_name, replacing, write_json
from common.folders import check_folder, check_permission
from common.hashing import sha256_file
from common.locks import NoLocks, file_lock
from common.splits import SPLITS
from data_prep.config.resolved import ResolvedConfig
from data_prep.shards.format import INDEX_SUFFIX, MANIFEST_FILE, TOKENIZER_FILE, Manifest
from data_prep.stages.model_file import TOKENIZER_RECORD
from data_prep.work.folder import STAGE_FOLDER, WORK, read_json

RUN_RECORD = "run.json"  # when, where and how long; kept out of the manifest, which must not depend on it
QUARANTINE_FILE = "quarantine.jsonl"
FILTER_SAMPLES_FILE = "filter_samples.jsonl"
DUPLICATE_SAMPLES_FILE = "duplicate_samples.jsonl"
RECORD_FILES = (QUARANTINE_FILE, FILTER_SAMPLES_FILE, DUPLICATE_SAMPLES_FILE)
SHARD_NAME = re.compile(rf"({'|'.join(SPLITS)})-\d{{5,}}(\.tar|{re.escape(INDEX_SUFFIX)})")
PUBLISHED = "published.json"
NAMED_IN_ERRORS = 3
LOCK = ".lock"
REMOVED = ".removed"  # in the work folder: stages that are being removed
REMOVED_WORK = ".work.removed"  # where earlier code moved a work folder that it was removing


def is_product(name: str) -> bool:
    """Whether a preparation may write a file of this name into `output`."""
    known = (TOKENIZER_FILE, TOKENIZER_RECORD, RUN_RECORD, MANIFEST_FILE, *RECORD_FILES)
    return name in known or SHARD_NAME.fullmatch(name) is not None


def own_files(output: Path) -> set[str]:
    """Names of the files in `output` that a preparation made."""
    names: set[str] = set()
    with contextlib.suppress(DataError):  # none, damaged, or of something else
        manifest = Manifest.load(output)
        names |= {MANIFEST_FILE, RUN_RECORD, manifest.tokenizer.file or MANIFEST_FILE}
        names |= {name for entry in manifest.entries for name in (entry.file, entry.index_file)}
        names |= {record.file for record in manifest.provenance.records}
    if _is_own_tokenizer(output):
        names |= {TOKENIZER_FILE, TOKENIZER_RECORD, RUN_RECORD}
    with contextlib.suppress(DataError):
        names |= set(read_json(output / WORK / PUBLISHED) or ())
    names |= _recorded(output)
    return {name for name in names if is_product(name)}


def _recorded(output: Path) -> set[str]:
    """Names of run.json and of the files that it lists, if they still have their size: they are known as own even
    without a manifest."""
    try:
        files = json.loads((output / RUN_RECORD).read_bytes())["files"]
        present = {name: output / name for name in files if (output / name).is_file()}
        return {RUN_RECORD} | {name for name, path in present.items() if path.stat().st_size == files[name]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()


def sizes(output: Path) -> dict[str, int]:
    """Bytes of the own files in `output`, for run.json."""
    names = sorted(own_files(output) - {RUN_RECORD})
    return {name: (output / name).stat().st_size for name in names if (output / name).is_file()}


def _is_own_tokenizer(output: Path) -> bool:
    """Whether tokenizer.json is the record of tokenizer.model."""
    try:
        record = json.loads((output / TOKENIZER_RECORD).read_bytes())
        return bool(record["sha256"] == sha256_file(output / TOKENIZER_FILE) and "settings" in record)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def check_output(resolved: ResolvedConfig, *, force: bool) -> None:
    """Raises DataError, with names, if the preparation cannot write into `output` or would lose what it did not make.
    Writes nothing."""
    output = resolved.output
    check_folder(output, "output")
    check_permission(output, "output")
    if not output.is_dir():
        return
    check_folder(resolved.work, "output")
    present = {path.name: path for path in output.iterdir() if is_product(path.name)}
    places = {path.resolve(): name for name, path in present.items()}
    raw = {source.path.resolve() for source in resolved.sources if isinstance(source.path, Path)}
    lost = sorted(places[path] for path in places.keys() & raw)
    if lost:
        raise DataError(
            f"output: {output} holds the raw {_listed(lost)}, which the data would replace; choose another `output`"
        )
    _check_foreign(output, present, force=force)


def check_manifest_is_own(output: Path, *, force: bool) -> None:
    """Raises DataError if `output` holds a manifest.json that no preparation wrote, before it is read as one."""
    path = output / MANIFEST_FILE
    if force or not path.is_file():
        return
    try:
        content = json.loads(path.read_bytes())
        is_own = isinstance(content, dict) and {"format_version", "splits"} <= content.keys()
    except ValueError:
        is_own = bool(own_files(output) - {MANIFEST_FILE})  # damaged, with run.json beside it
    if not is_own:
        raise DataError(
            f"output: {output} holds {MANIFEST_FILE}, which no preparation made and this one would replace; move it "
            "away, choose another `output`, or add --force to lose it"
        )


def _check_foreign(output: Path, names: Iterable[str], *, force: bool) -> None:
    """Raises DataError if a file of one of these names is there and is not a preparation's own."""
    folders = sorted(name for name in names if (output / name).is_dir() and not (output / name).is_symlink())
    if folders:
        raise DataError(
            f"output: {output} holds the folder {folders[0]}, where a file must go; choose another `output`"
        )
    if force:
        return
    foreign = sorted({name for name in names if os.path.lexists(output / name)} - own_files(output))
    if foreign:
        raise DataError(
            f"output: {output} holds {_listed(foreign)}, which no preparation made and this one may replace; move them "
            "away, choose another `output`, or add --force to lose them"
        )


def _listed(names: list[str]) -> str:
    more = len(names) - NAMED_IN_ERRORS
    return ", ".join(names[:NAMED_IN_ERRORS]) + (f" and {more} more" if more > 0 else "")


def publish(folder: Path, output: Path, *, force: bool) -> None:
    """Moves finished files into the output: old manifest away, other own files that are not made again away, new files
    in, new manifest last. Raises DataError, with nothing touched, for foreign files of these names unless `force`."""
    new = {path.name for path in folder.iterdir() if is_product(path.name)}
    _check_foreign(output, new, force=force)
    own = own_files(output)
    write_json(output / WORK / PUBLISHED, sorted(own | new))  # so that after a kill they are still known as own
    (output / MANIFEST_FILE).unlink(missing_ok=True)
    for name in sorted(own - new - {MANIFEST_FILE, RUN_RECORD}):
        (output / name).unlink(missing_ok=True)
    for name in sorted(new, key=lambda name: (name == MANIFEST_FILE, name)):
        _move(folder / name, output / name)
    (output / WORK / PUBLISHED).unlink()


def _move(source: Path, target: Path) -> None:
    """Gives a finished file its place; by a copy, whole or absent too, where the work folder is on another disk."""
    try:
        os.replace(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        with source.open("rb") as content, replacing(target) as stream:
            shutil.copyfileobj(content, stream)
        source.unlink()


@contextlib.contextmanager
def output_lock(output: Path, *, shared: bool) -> Iterator[None]:
    """Holds the output for this process (or, `shared`, with other array tasks). DataError while another has it."""
    with contextlib.ExitStack() as stack:
        try:
            held = stack.enter_context(file_lock(output / LOCK, shared=shared, wait=False))
        except NoLocks as error:
            print(f"warning: no lock on {output} ({error}); run one preparation at a time", file=sys.stderr)
        else:
            if not held:
                raise DataError(f"another preparation is writing to {output}; wait for it or choose another `output`")
        yield


def remove_work(resolved: ResolvedConfig) -> None:
    """Removes the stages in the work folder, unless `keep_work`, and what a killed process left of a removal or
    half-written in the output; other files stay. Stages are moved aside first, because half of a stage would pass for a
    finished one."""
    for path in resolved.output.glob(".*.tmp"):
        if (intended := intended_name(path.name)) != path.name and is_product(intended):
            path.unlink(missing_ok=True)
    removed = resolved.work / REMOVED
    _remove_stages(removed)
    _remove_stages(resolved.output / REMOVED_WORK)
    if not resolved.work.is_dir() or resolved.config.keep_work:
        return
    removed.mkdir(exist_ok=True)
    for stage in _stages(resolved.work):
        os.replace(stage, removed / stage.name)
    _remove_stages(removed)
    for path in [resolved.work / PUBLISHED, *resolved.work.glob(f".{PUBLISHED}.*.tmp")]:
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # something else is in it, or it is a link
        resolved.work.rmdir()


def _stages(folder: Path) -> list[Path]:
    """The stages' own folders in one."""
    return [path for path in sorted(folder.iterdir()) if STAGE_FOLDER.fullmatch(path.name) and not path.is_symlink()]


def _remove_stages(folder: Path) -> None:
    """Removes a folder of stages; if something else is in it, the stages alone."""
    if folder.is_dir():
        stages = _stages(folder)
        for doomed in [folder] if len(stages) == len(list(folder.iterdir())) else stages:
            shutil.rmtree(doomed, ignore_errors=True)
