"""The manifest of finished shards, and the records beside it of what was left out."""

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.files import replacing, write_file
from common.hashing import sha256_file
from common.presence import exists
from common.splits import SplitName
from data_prep.config.versions import versions
from data_prep.run.output_files import DUPLICATE_SAMPLES_FILE, FILTER_SAMPLES_FILE, QUARANTINE_FILE, RECORD_FILES
from data_prep.run.preparation import Preparation
from data_prep.shards.format import FORMAT_VERSION, dtype_name
from data_prep.shards.writer import write_manifest
from data_prep.stages import dedup
from data_prep.stages.dedup_task import DedupTask
from data_prep.stages.filter import FilterTask, Summary, filtered_out, summary
from data_prep.stages.ingest import quarantine_file
from data_prep.stages.pack import ShardTask, read_entry, split_totals
from data_prep.stages.selection import Selection, duplicate_verdicts
from data_prep.work.folder import finished
from data_prep.work.parts import Part


def write_data_manifest(
    preparation: Preparation,
    shards: Sequence[ShardTask],
    filtering: Sequence[FilterTask],
    duplicates: DedupTask | None,
) -> None:
    """Writes manifest.json beside the finished shards, and the records of what was left out. `filtering`: the tasks of
    all parts, none without filters."""
    resolved, parts = preparation.resolved, preparation.parts(all_slices=True)
    encoded, folder = preparation.encode_folder(), preparation.shard_folder()
    tokenizer = preparation.recipe.entry()
    splits: dict[SplitName, list[dict[str, Any]]] = {split: [] for split in resolved.splits}
    for task in shards:
        entry = finished(read_entry(task), f"shard {task.name}")
        splits[task.split].append(entry.model_dump())
    provenance: dict[str, Any] = {
        "inputs": _inputs(preparation),
        "config": resolved.recorded_config(),
        "versions": versions(resolved),
    }
    filtered = None if resolved.config.filter is None else summary(filtering)
    if dropped := _dropped(preparation, filtered, duplicates):
        provenance["dropped"] = dropped
    if records := _write_records(preparation, filtered, duplicates):
        provenance["records"] = records
    write_manifest(
        folder,
        {
            "format_version": FORMAT_VERSION,
            "dtype": dtype_name(tokenizer.vocab_size),
            # Without defaults, so that a SentencePiece manifest is the same as before `bytes` existed.
            "tokenizer": tokenizer.model_dump(exclude_defaults=True),
            "splits": splits,
            "totals": {
                split: totals.model_dump() for split, totals in split_totals(parts, encoded, resolved.splits).items()
            },
            "provenance": provenance,
        },
    )


def _inputs(preparation: Preparation) -> list[dict[str, Any]]:
    """The records of the raw files."""
    selection = preparation.selection(deduplicated=True)
    inputs = []
    for batch in preparation.batch_states(all_slices=True):
        left_out = _left_out(batch.parts, selection)
        for state in batch.files:
            filtered, duplicates = (counts.get(state.name, 0) for counts in left_out)
            record: dict[str, Any] = {
                "name": state.name,
                "sha256": state.sha256,
                "bytes": state.bytes,
                "split": state.split,
                "documents": state.documents - filtered - duplicates,
                "format": state.format,
            }
            optional = {"quarantined": state.rejected, "filtered": filtered, "duplicates": duplicates}
            inputs.append({**record, **{key: value for key, value in optional.items() if value}})
    return inputs


def _dropped(preparation: Preparation, filtered: Summary | None, duplicates: DedupTask | None) -> dict[str, Any]:
    """How many documents each stage left out, by reason."""
    quarantined: Counter[str] = Counter()
    for state in preparation.file_states(all_slices=True):
        quarantined.update(state.rejected)
    dropped: dict[str, Any] = {"quarantined": dict(sorted(quarantined.items()))} if quarantined else {}
    config = preparation.resolved.config.filter
    if config is not None and filtered is not None:
        dropped["filtered"] = filtered.counts
        if config.c4_lines:
            dropped["lines"] = filtered.lines
    if duplicates is not None:
        dropped["duplicates"] = dedup.counts(duplicates)
    return dropped


def _left_out(parts: Sequence[Part], selection: Selection) -> tuple[Counter[str], Counter[str]]:
    """Documents that were filtered, and duplicates, by raw file; the parts of one batch, whose files have different
    names."""
    filtered: Counter[str] = Counter()
    duplicates: Counter[str] = Counter()
    for part in parts:
        if selection.filter is not None:
            filtered.update(part.count_by_file(filtered_out(selection.filter, part)))
        if selection.dedup is not None:
            duplicates.update(part.count_by_file(duplicate_verdicts(selection.dedup, part) > 0))
    return filtered, duplicates


def _write_records(
    preparation: Preparation, filtered: Summary | None, duplicates: DedupTask | None
) -> list[dict[str, Any]]:
    """quarantine.jsonl and the examples; their entries for the manifest."""
    folder = preparation.shard_folder()
    with replacing(folder / QUARANTINE_FILE) as stream:
        for task in preparation.batches(all_slices=True):
            with quarantine_file(task).open("rb") as source:
                shutil.copyfileobj(source, stream)
    if filtered is not None:
        _write_lines(folder / FILTER_SAMPLES_FILE, filtered.samples)
    if duplicates is not None:
        _write_lines(folder / DUPLICATE_SAMPLES_FILE, dedup.samples(duplicates))
    records = []
    for name in RECORD_FILES:
        path = folder / name
        if exists(path) and path.stat().st_size == 0:
            path.unlink()
        if exists(path):
            records.append({"file": name, "bytes": path.stat().st_size, "sha256": sha256_file(path)})
    return records


def _write_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    write_file(path, "".join(json.dumps(line) + "\n" for line in lines).encode("ascii"))
