"""The manifest of finished shards, and the records beside it of what was left out."""

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.files import replacing, write_file
from common.hashing import sha256_file
from common.splits import SplitName
from data_prep.run import publish as prepare
from data_prep.run.output_files import DUPLICATE_SAMPLES_FILE, FILTER_SAMPLES_FILE, QUARANTINE_FILE, RECORD_FILES
from data_prep.shards.format import FORMAT_VERSION, TokenizerEntry, dtype_name
from data_prep.shards.writer import write_manifest
from data_prep.stages import dedup
from data_prep.stages.dedup_result import duplicate_verdicts
from data_prep.stages.filter import filtered_out, summary
from data_prep.stages.ingest import quarantine_file
from data_prep.stages.pack import ShardTask, read_entry, split_totals
from data_prep.stages.selection import Selection
from data_prep.work.folder import finished
from data_prep.work.parts import Part

if TYPE_CHECKING:
    from data_prep.run.pipeline import Pipeline


def write_data_manifest(
    pipeline: "Pipeline", folder: Path, encoded: Path, tokenizer: TokenizerEntry, tasks: Sequence[ShardTask]
) -> None:
    plan, parts = pipeline.plan, pipeline.parts(whole=True)
    splits: dict[SplitName, list[dict[str, Any]]] = {split: [] for split in plan.splits}
    for task in tasks:
        entry = finished(read_entry(task), f"shard {task.name}")
        splits[task.split].append(entry.model_dump())
    inputs, dropped = _inputs_and_dropped(pipeline)
    provenance: dict[str, Any] = {
        "inputs": inputs,
        "config": plan.recorded_config(),
        "versions": prepare.versions(plan),
    }
    if dropped:
        provenance["dropped"] = dropped
    records = _write_records(pipeline, folder)
    if records:
        provenance["records"] = records
    write_manifest(
        folder,
        {
            "format_version": FORMAT_VERSION,
            "dtype": dtype_name(tokenizer.vocab_size),
            # The defaults left out: a SentencePiece manifest is the same as before there were bytes.
            "tokenizer": tokenizer.model_dump(exclude_defaults=True),
            "splits": splits,
            "totals": {split: split_totals(parts, encoded, split).model_dump() for split in plan.splits},
            "provenance": provenance,
        },
    )


def _inputs_and_dropped(pipeline: "Pipeline") -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The records of the raw files, and how many documents each stage left out, by reason."""
    config, selection = pipeline.plan.config, pipeline.selection(deduplicated=True)
    inputs = []
    quarantined: dict[str, int] = {}
    for batch in pipeline.batches(whole=True):
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
            for reason, count in state.rejected.items():
                quarantined[reason] = quarantined.get(reason, 0) + count
    dropped: dict[str, Any] = {"quarantined": dict(sorted(quarantined.items()))} if quarantined else {}
    if config.filter is not None:
        found = summary(pipeline.filter_tasks(whole=True))
        dropped["filtered"] = found.counts
        if config.filter.c4_lines:
            dropped["lines"] = found.lines
    if config.dedup is not None:
        dropped["duplicates"] = dedup.counts(pipeline.dedup_folder())
    return inputs, dropped


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


def _write_records(pipeline: "Pipeline", folder: Path) -> list[dict[str, Any]]:
    """quarantine.jsonl and the examples; their entries for the manifest."""
    config = pipeline.plan.config
    with replacing(folder / QUARANTINE_FILE) as stream:
        for task in pipeline.tasks(whole=True):
            with quarantine_file(task).open("rb") as source:
                shutil.copyfileobj(source, stream)
    if config.filter is not None:
        _write_lines(folder / FILTER_SAMPLES_FILE, summary(pipeline.filter_tasks(whole=True)).samples)
    if config.dedup is not None:
        _write_lines(folder / DUPLICATE_SAMPLES_FILE, dedup.samples(pipeline.join()))
    records = []
    for name in RECORD_FILES:
        path = folder / name
        if path.exists() and path.stat().st_size == 0:
            path.unlink()
        if path.exists():
            records.append({"file": name, "bytes": path.stat().st_size, "sha256": sha256_file(path)})
    return records


def _write_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    write_file(path, "".join(json.dumps(line) + "\n" for line in lines).encode("ascii"))
