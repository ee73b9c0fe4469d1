"""Whether the output is what a config makes, and the record of this run that the answer is quick by."""

import contextlib
import json
import socket
import sys
import time
from pathlib import Path
from typing import Any

from common.errors import DataError
from common.files import write_json
from common.hashing import sha256_file
from common.progress_bar import byte_bar
from common.terminal import visible
from data_prep.config import versions
from data_prep.config.resolved import ResolvedConfig
from data_prep.config.schema import RECORDED_STOP_WORDS
from data_prep.config.versions import changes_since
from data_prep.raw.locations import InputFile, identity, sha256_of, size_and_stamp
from data_prep.run.output_files import RUN_RECORD, TOKENIZER_RECORD, sizes
from data_prep.shards.format import MANIFEST_FILE, TOKENIZER_FILE, Manifest
from data_prep.work.folder import fingerprint, read_json


def check_tokenizer(resolved: ResolvedConfig) -> None:
    """Raises DataError if the model that the `tokenizer` step leaves in the output is missing, or is not the configured
    one."""
    if not resolved.config.tokenizer.has_file:
        return
    fix = "make it with `python -m data_prep tokenizer --config CONFIG{}`"
    model, record = resolved.output / TOKENIZER_FILE, resolved.output / TOKENIZER_RECORD
    if not model.is_file() or not record.is_file():
        raise DataError(f"no tokenizer in {resolved.output}; {fix.format('')}")
    try:
        found = json.loads(record.read_bytes())
    except ValueError:
        raise DataError(f"{record} is not JSON; {fix.format('')}") from None
    wanted = resolved.tokenizer_settings()
    if found != {"sha256": sha256_file(model), "settings": wanted}:
        then = found.get("settings") if isinstance(found, dict) else None
        changed = isinstance(then, dict) and then != wanted
        what = changed_text("tokenizer", then, wanted) if changed else "it was replaced"
        raise DataError(
            f"{model} was not made with the `tokenizer` section of this config: {what}; {fix.format(' --force')}"
        )


def difference(resolved: ResolvedConfig, manifest: Manifest, *, hash_all: bool = False) -> str:
    """How prepared data differ from what the config makes; empty if they are up to date. Hashes the raw
    files, unless run.json says that they are the same files with the same size and modification time (`hash_all`: in
    any case)."""
    made_by = manifest.provenance.versions.get("data_prep")
    if made_by != versions.PREPARATION_VERSION:
        ours = f"{versions.PREPARATION_VERSION}{changes_since(made_by)}"
        return f"it was made by data_prep version {made_by}, this is version {ours}"
    wanted = resolved.recorded_config()
    for key in [*wanted, *(key for key in manifest.provenance.config if key not in wanted)]:
        found = manifest.provenance.config.get(key)
        if found != wanted.get(key):
            return changed_text(key, found, wanted.get(key))
    recorded = manifest.provenance.inputs
    if len(recorded) != len(resolved.sources):
        return f"it was made from {len(recorded)} raw files, there are now {len(resolved.sources)}"
    for source, record in zip(resolved.sources, recorded, strict=True):
        if size_and_stamp(source.path)[0] not in (None, record.bytes):
            return f"{source.path} has changed or is another file"
    try:
        run = read_json(resolved.output / RUN_RECORD) or {}
    except DataError:  # damaged: it only saves time
        run = {}
    if run.get("inputs") == stamps(resolved) and not hash_all:
        return ""
    with byte_bar(total=sum(record.bytes for record in recorded), description="comparing raw files") as bar:
        for source, record in zip(resolved.sources, recorded, strict=True):
            seen = (source.split, sha256_of(source.path, on_bytes=bar.update))
            named = record.name in (source.name, source.path.name)  # without folders: made by earlier code
            if not named or seen != (record.split, record.sha256):
                return f"{source.path} has changed or is another file"
    return ""


def changed_text(key: str, then: Any, now: Any) -> str:
    if isinstance(then, dict) and isinstance(now, dict):
        if {name for name in then.keys() | now.keys() if then.get(name) != now.get(name)} == {RECORDED_STOP_WORDS}:
            # Which is no key of a config.
            return "`filter.gopher_quality` asked every document for English stop words, now those in English alone"
        if then.keys() == now.keys():
            name = next(name for name in now if then[name] != now[name])
            key, then, now = f"{key}.{name}", then[name], now[name]
    return f"`{key}` was {json.dumps(then)}, is now {json.dumps(now)}"


def stamps(resolved: ResolvedConfig) -> list[list[Any]]:
    """[path, size, modification time or tag, split] of every raw file; for a URL or a command, whose text may hold
    secrets, also a hash of it."""
    return [[str(s.path.resolve()), *_marks(s.path), *size_and_stamp(s.path), s.split] for s in resolved.sources]


def _marks(file: InputFile) -> list[str]:
    return [] if isinstance(file, Path) else [fingerprint(identity(file))]


def is_up_to_date(resolved: ResolvedConfig, *, force: bool) -> bool:
    """Whether the output is already what the config makes. DataError if it is something else and not
    `force`."""
    if force or not (resolved.output / MANIFEST_FILE).exists():
        return False
    manifest = Manifest.load(resolved.output)
    changed = difference(resolved, manifest)
    if changed:
        is_older = bool(changes_since(manifest.provenance.versions.get("data_prep")))
        raise DataError(
            f"{resolved.output} holds other data: {changed}; choose another `output`, or rebuild it with --force"
            f"{' (training reads it as it is)' * is_older}"
        )
    manifest.check("size")
    return True


def name_changed_files(resolved: ResolvedConfig, seen: list[list[Any]]) -> None:
    """Warns on stderr of raw files on disks that have changed since `stamps` gave `seen`; not of those that are
    gone."""
    changed = []
    for source, (*_, size, stamp, _split) in zip(resolved.sources, seen, strict=True):
        with contextlib.suppress(DataError):
            if isinstance(source.path, Path) and size_and_stamp(source.path) != (size, stamp):
                changed.append(source.path)
    if changed:
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        warning = f"warning: {changed[0]}{more} has changed since it was read; --force prepares it as it is now"
        print(visible(warning), file=sys.stderr)


def write_run_record(
    resolved: ResolvedConfig, *, config_path: Path, seconds: dict[str, float], seen: list[list[Any]]
) -> None:
    """Writes run.json: what depends on this host and this moment. `seen`: the `stamps` from before anything was read,
    so that a file which changes meanwhile is not taken for the one that was read."""
    record = {
        "host": socket.gethostname(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "seconds": {step: round(value, 3) for step, value in seconds.items()},
        "workers": resolved.workers,
        "config": str(config_path.resolve()),
        "inputs": seen,
        "output": str(resolved.output),
        "files": sizes(resolved.output),
    }
    write_json(resolved.output / RUN_RECORD, record)
