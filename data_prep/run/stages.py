"""The stages of a preparation: the list STAGES, from raw files to published shards."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from common.errors import DataError
from data_prep.run.manifest import write_data_manifest
from data_prep.run.preparation import Preparation
from data_prep.shards.format import dtype_name
from data_prep.stages.dedup import DONE, find_duplicates
from data_prep.stages.dedup_task import DedupTask
from data_prep.stages.encode import EncodeTask, encode_part
from data_prep.stages.filter import FilterTask, filter_part, summary
from data_prep.stages.filters import check_languages
from data_prep.stages.ingest import IngestTask, check_limits, ingest_batch, read_state
from data_prep.stages.model_file import TOKENIZER_RECORD, ModelTask, has_model, make_model
from data_prep.stages.pack import ShardTask, cut_shards, read_entry, write_shards
from data_prep.stages.signatures import SignatureTask, sign_part
from data_prep.stages.tokenizer import SampleSource, TrainTask
from data_prep.work.folder import stage_folder
from data_prep.work.parallel import Workers


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A step of a preparation. Finished tasks stay finished: `make` has to do only the others."""

    name: str
    over: Literal["slice", "all"]
    """Whether array tasks share its tasks, or one process needs what all of them have left."""
    tasks: Callable[[Preparation], Sequence[Any]]
    """Its tasks, those of this slice alone where array tasks share them; none if the config turns the stage off."""
    is_done: Callable[[Any], bool]
    """Whether a task's result is in the stage's folder."""
    make: Callable[[Sequence[Any], Sequence[Any], Workers], None]
    """Does tasks: makes their results. The second ones an earlier start has done: progress is of the whole."""
    check: Callable[[Preparation], None] = lambda preparation: None
    """Raises DataError for what this stage would refuse, before any stage runs for hours."""
    finish: Callable[[Preparation, Sequence[Any]], None] = lambda preparation, tasks: None
    """Called with all tasks when they are done."""
    publishes: Callable[[Preparation], Path] | None = None
    """The folder that is published in `output` if this is the last stage of a command."""


def spread(
    function: Callable[[Any], None], description: str, size: Callable[[Any], int]
) -> Callable[[Sequence[Any], Sequence[Any], Workers], None]:
    """The `make` that calls `function` for each task, on all processes. `size`: bytes of a task."""

    def make(tasks: Sequence[Any], finished: Sequence[Any], workers: Workers) -> None:
        sizes, done = [size(task) for task in tasks], sum(map(size, finished))
        workers.run(function, tasks, sizes=sizes, done=done, description=description)

    return make


def one_by_one(function: Callable[[Any, Workers], None]) -> Callable[[Sequence[Any], Sequence[Any], Workers], None]:
    """The `make` that calls `function`, which divides its task among the processes itself."""

    def make(tasks: Sequence[Any], finished: Sequence[Any], workers: Workers) -> None:
        for task in tasks:
            function(task, workers)

    return make


def has_file(suffix: str) -> Callable[[Any], bool]:
    """The `is_done` of tasks that leave a file of this suffix for their part, last of all."""
    return lambda task: (task.folder / f"{task.part.name}{suffix}").exists()


# ingest: batch of raw files -> parts, quarantine


def _check_limits(preparation: Preparation, batches: Sequence[IngestTask]) -> None:
    if preparation.slice.is_all:  # shares of the whole; an array task may have a single, damaged file
        check_limits(batches, preparation.file_states(all_slices=True), preparation.resolved.config)


# filter: part -> verdicts


def filter_tasks(preparation: Preparation, *, all_slices: bool = False) -> Sequence[FilterTask]:
    config = preparation.resolved.config.filter
    if config is None:
        return []
    ingest, folder = preparation.ingest_folder(), preparation.filter_folder()
    parts = preparation.parts(all_slices=all_slices)
    return [FilterTask(config=config, part=part, ingest=ingest, folder=folder) for part in parts]


def _check_languages(preparation: Preparation) -> None:
    config = preparation.resolved.config.filter
    if config is not None and any(read_state(task) is None for task in preparation.batches(all_slices=False)):
        check_languages(config.language)  # loads a model, so only if something is to be read


def _need_unfiltered(preparation: Preparation) -> None:
    """Raises DataError, with the rules, where the filters dropped every document."""
    tasks = filter_tasks(preparation, all_slices=True)
    counts = summary(tasks).counts if tasks else {}
    total = sum(task.part.documents for task in tasks)
    if 0 < total <= sum(counts.values()):
        rules = ", ".join(f"{rule} {count:,}" for rule, count in sorted(counts.items(), key=lambda one: -one[1]))
        raise DataError(
            f"filter: every document was dropped ({rules}); its rules are for English prose as crawled: name the "
            f"language in filter.language, turn rules off, or set filter to null"
        )


# sign: part -> MinHash signatures


def _signature_tasks(preparation: Preparation) -> Sequence[SignatureTask]:
    config = preparation.resolved.config.dedup
    if config is None or not config.near:
        return []
    selection, folder = preparation.selection(deduplicated=False), preparation.signature_folder()
    return [
        SignatureTask(
            part=part,
            selection=selection,
            shingle_words=config.shingle_words,
            threshold=config.threshold,
            folder=folder,
        )
        for part in preparation.parts(all_slices=False)
    ]


# dedup: all signatures -> verdicts


def dedup_tasks(preparation: Preparation) -> Sequence[DedupTask]:
    config = preparation.resolved.config.dedup
    if config is None:
        return []
    task = DedupTask(
        config=config,
        parts=tuple(preparation.parts(all_slices=True)),
        selection=preparation.selection(deduplicated=False),
        signatures=preparation.signature_folder() if config.near else None,
        folder=preparation.dedup_folder(),
    )
    return [task]


# tokenizer: sample of all parts -> model


def _model_tasks(preparation: Preparation) -> Sequence[ModelTask]:
    resolved = preparation.resolved
    config = resolved.config.tokenizer
    if preparation.takes_published_model or not config.has_file:
        return []
    if resolved.external_model is not None:
        return [preparation.given_model()]
    parts = preparation.parts(all_slices=True)
    _need_unfiltered(preparation)
    preparation.need_train([part.split for part in parts])
    task = ModelTask(
        folder=preparation.tokenizer_folder(),
        config=config,
        settings=resolved.tokenizer_settings(),
        given=None,
        training=_training(preparation),
        parts=tuple(parts),
    )
    return [task]


def _training(preparation: Preparation) -> TrainTask:
    resolved = preparation.resolved
    sampled = frozenset(source.name for source in resolved.sources[: resolved.config.tokenizer.sample_files])
    sources = []
    for batch in preparation.batch_states(all_slices=True):
        parts = [part for part in batch.parts if part.split == "train" and sampled & dict(part.files).keys()]
        sources.append(SampleSource(parts=tuple(parts), files=sampled))
    return TrainTask(
        sources=tuple(sources),
        selection=preparation.selection(deduplicated=True),
        config=resolved.config.tokenizer,
        validation_fraction=resolved.validation_fraction,
    )


def _model_to_publish(preparation: Preparation) -> Path:
    folder = stage_folder(preparation.resolved.work, "publish")
    _copy_model(preparation, folder)
    return folder


def _copy_model(preparation: Preparation, folder: Path) -> None:
    if (model := preparation.model) is not None:
        for path in (model, model.with_name(TOKENIZER_RECORD)):
            shutil.copyfile(path, folder / path.name)


# encode: part -> ids


def _encode_tasks(preparation: Preparation) -> Sequence[EncodeTask]:
    selection, folder = preparation.selection(deduplicated=True), preparation.encode_folder()
    recipe = preparation.recipe
    return [
        EncodeTask(
            part=part,
            selection=selection,
            recipe=recipe,
            validation_fraction=preparation.resolved.validation_fraction,
            folder=folder,
        )
        for part in preparation.parts(all_slices=False)
    ]


# shard: ids -> shards, manifest


def _shard_tasks(preparation: Preparation) -> Sequence[ShardTask]:
    parts, settings = preparation.parts(all_slices=True), preparation.resolved.config.shard
    encoded, folder = preparation.encode_folder(), preparation.shard_folder()
    dtype = dtype_name(preparation.recipe.entry().vocab_size)
    tasks = [
        ShardTask(
            name=f"{split}-{number:05d}",
            split=split,
            pieces=pieces,
            tokens=tokens,
            encoded=encoded,
            folder=folder,
            dtype=dtype,
            tokens_per_member=settings.tokens_per_member,
        )
        for split in preparation.resolved.splits
        for number, (pieces, tokens) in enumerate(cut_shards(parts, encoded, split, settings.tokens_per_shard))
    ]
    if not tasks:
        _need_unfiltered(preparation)
    preparation.need_train([task.split for task in tasks])
    return tasks


def _write_manifest(preparation: Preparation, shards: Sequence[ShardTask]) -> None:
    _copy_model(preparation, preparation.shard_folder())
    duplicates = next(iter(dedup_tasks(preparation)), None)
    write_data_manifest(preparation, shards, filter_tasks(preparation, all_slices=True), duplicates)


STAGES = (
    Stage(
        name="ingest",
        over="slice",
        tasks=lambda preparation: preparation.batches(all_slices=False),
        is_done=lambda task: read_state(task) is not None,
        make=spread(ingest_batch, "reading raw files", lambda task: task.size),
        finish=_check_limits,
    ),
    Stage(
        name="filter",
        over="slice",
        check=_check_languages,
        tasks=filter_tasks,
        is_done=has_file(".json"),
        make=spread(filter_part, "filtering", lambda task: task.part.bytes),
    ),
    Stage(
        name="sign",
        over="slice",
        tasks=_signature_tasks,
        is_done=has_file(".safetensors"),
        make=spread(sign_part, "signing", lambda task: task.part.bytes),
    ),
    Stage(
        name="dedup",
        over="all",
        tasks=dedup_tasks,
        is_done=lambda task: (task.folder / DONE).exists(),
        make=one_by_one(find_duplicates),
    ),
    Stage(
        name="tokenizer",
        over="all",
        tasks=_model_tasks,
        is_done=has_model,
        make=one_by_one(make_model),
        publishes=_model_to_publish,
    ),
    Stage(
        name="encode",
        over="slice",
        tasks=_encode_tasks,
        is_done=has_file(".safetensors"),
        make=spread(encode_part, "tokenising", lambda task: task.part.bytes),
    ),
    Stage(
        name="shard",
        over="all",
        tasks=_shard_tasks,
        is_done=lambda task: read_entry(task) is not None,
        make=write_shards,
        finish=_write_manifest,
        publishes=Preparation.shard_folder,
    ),
)
