"""What launch/evaluate.py does: opens a checkpoint, runs tasks, prints and writes."""

from __future__ import annotations

import math
import os
import shlex
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from tqdm import tqdm

from common.errors import UserError
from common.paths import find_input
from common.terminal import visible
from common.urls import URL
from pretrain.checkpoint.folder import check_output_folder, while_they_are_there
from pretrain.config.schema import Config
from pretrain.data.sources import Sources, check_held_out, open_sources
from pretrain.evaluate import bits_per_byte, evaluation_windows, target_counts, unigram_perplexity
from pretrain.evaluate import evaluate as validation
from pretrain.evaluation import results
from pretrain.evaluation.examples import Encoder, Example
from pretrain.evaluation.harness_run import Options, evaluate_with_harness, task_specs
from pretrain.evaluation.likelihood import Limits, learned_context
from pretrain.evaluation.models import OpenedModel, evaluation_config, open_model
from pretrain.evaluation.tasks import PreparedTask, TaskResult, find_files
from pretrain.export.loading import as_checkpoint, one_set_of_weights
from pretrain.export.reading import Exported, is_export, open_export
from pretrain.parallel.agreement import agreed, check_same, from_first_rank
from pretrain.report.source_losses import source_losses
from pretrain.saved_model import find_checkpoint
from pretrain.saved_model.loading import config_of, document_end_of


@dataclass(frozen=True, kw_only=True)
class Choices:
    """The options of the command."""

    wanted: dict[str, str | None]
    """Task -> place of its files, if one is named; of a validation the folder of other data than the run's."""
    harness: str | None = None
    shots: int | None = None
    keeps_samples: bool = False
    limit: int | None = None
    batch: int = 16
    context: int | None = None
    data: tuple[str, ...] = ()
    out: Path | None = None
    overrides: tuple[str, ...] = ()
    ema: bool = False
    """The moving average instead of the weights; its results have a folder of their own."""


def evaluate_checkpoint(run: Path, choices: Choices, device: torch.device) -> None:
    """Collective, if there is a process group. Raises UserError: in a group on one rank, and PeerFailed on the
    others."""
    specs = task_specs(choices.harness, choices.shots) if choices.harness is not None else []
    has_group = dist.is_initialized()
    world_size = dist.get_world_size() if has_group else 1
    exported = agreed(lambda: _exported(run, choices, alone=not has_group))
    if exported is not None:
        checkpoint = as_checkpoint(exported)
    else:  # a run that goes on has another newest one for who looks later
        checkpoint = from_first_rank(lambda: find_checkpoint(run)) if has_group else find_checkpoint(run)
    out = (choices.out or results.results_folder(checkpoint, ema=choices.ema)).absolute()
    with while_they_are_there([checkpoint.path], "RUN"):
        config, tokenizer = agreed(
            lambda: evaluation_config(
                checkpoint,
                config_of(checkpoint),
                data=choices.data,
                overrides=choices.overrides,
                batch=choices.batch,
                ranks=world_size,
            )
        )
        agreed(lambda: check_output_folder(out, "--out"))
        weights = None if exported is None else exported.tensors
        opened = open_model(checkpoint, config, tokenizer, device, ema=choices.ema, weights=weights)
    context = choices.context or learned_context(config.model)
    limits = Limits(choices.batch, context, document_end_of(config, tokenizer))
    is_first = opened.place.parallel.is_first
    rows: list[tuple[str, ...]] = []
    notes: list[str] = []

    def show() -> None:
        if is_first and rows:
            of = ", moving average of the weights" if choices.ema else ""
            print(f"{visible(str(checkpoint.path))}: step {checkpoint.progress.step:,}{of}")
            print("\n".join([results.table(rows), *(f"note: {note}" for note in notes)]), flush=True)

    def write(name: str, content: dict[str, Any]) -> None:
        if is_first:
            results.write_result(out, name, content)

    # Before anything is computed, which may take hours: a mistake in the last task is said at once.
    inputs = {name: _open(opened, name, place, choices, limits) for name, place in choices.wanted.items()}
    try:
        for name, place in choices.wanted.items():
            found = _evaluate_one(opened, name, place, inputs[name], choices, limits)
            _refuse_what_is_not_finite(opened, name, found.content)
            rows, notes = rows + found.rows, notes + found.notes
            agreed(partial(write, found.file, found.content))
    except UserError:
        show()  # hours of computing are not lost with the disk that refuses their file
        raise
    show()
    if is_first and rows:
        print(f"{out}: a JSON file for each task", flush=True)
    if specs:
        asked = Options(limit=choices.limit, shots=choices.shots, keeps_samples=choices.keeps_samples)
        evaluate_with_harness(opened, specs, limits, asked, out)


def _exported(run: Path, choices: Choices, *, alone: bool) -> Exported | None:
    """What `run` is, if it is an export. Raises UserError."""
    if not is_export(run):
        return None
    if not alone:
        raise UserError(
            f"RUN: {run} is an export, which one process evaluates: leave the launcher out, or make a checkpoint of "
            f"it, python launch/import_weights.py {shlex.quote(str(run))} --to FOLDER"
        )
    if choices.ema:
        raise one_set_of_weights(run)
    return open_export(run)


class Evaluated(NamedTuple):
    """One task of one checkpoint."""

    file: str
    """Its name, without an ending."""
    content: dict[str, Any]
    """Of its file."""
    rows: list[tuple[str, ...]]
    """Of the table."""
    notes: list[str]


class HeldOut(NamedTuple):
    """What a validation reads."""

    config: Config
    sources: Sources


def _open(
    opened: OpenedModel, name: str, place: str | None, choices: Choices, limits: Limits
) -> HeldOut | PreparedTask:
    """What a task reads: its data, or its texts as ids. Collective. Raises UserError for all that is wrong with it."""
    return _held_out(opened, choices, place) if name == "validation" else _task(opened, name, place, choices, limits)


def _evaluate_one(
    opened: OpenedModel,
    name: str,
    place: str | None,
    found: HeldOut | PreparedTask,
    choices: Choices,
    limits: Limits,
) -> Evaluated:
    began, checkpoint = time.monotonic(), opened.checkpoint
    file = name
    if isinstance(found, HeldOut):
        content = _validate(opened, found, is_other=place is not None)
        of = content.get("data", "")
        file = content["split"] + ("" if place is None else f"-{of}")  # of the two splits none replaces the other
        file += f"-memory-{content['memory_chunks']}" if "memory_chunks" in content else ""
        rows: list[tuple[str, ...]] = [
            (name, of, key, results.number(content[key]), "") for key in VALIDATION_KEYS if key in content
        ]
        rows += [(name, source, "loss", results.number(loss), "") for source, loss in source_losses(content).items()]
        notes: list[str] = []
    else:
        result = _run_task(opened, found, limits)
        content = {**results.described(result), "context": limits.context}
        rows, notes = results.rows_of(result), results.notes_of(result, limits.context)
    content |= {"limit": choices.limit, "checkpoint": str(checkpoint.path.absolute())}
    content |= {"moving_average": True} if choices.ema else {}
    content |= {"step": checkpoint.progress.step, "seconds": time.monotonic() - began}
    return Evaluated(file, content, rows, notes)


VALIDATION_KEYS = ("loss", "perplexity", "bits_per_byte", "unigram_perplexity")


def _refuse_what_is_not_finite(opened: OpenedModel, name: str, content: dict[str, Any]) -> None:
    """Raises UserError, agreed."""

    def check() -> None:
        wrong = any(isinstance(value, float) and not math.isfinite(value) for value in content.values())
        if wrong and opened.place.parallel.is_first:
            raise UserError(
                f"{name}: the outputs of checkpoint {opened.checkpoint.path} are not finite, so it has diverged or its "
                f"numbers overflow; name an earlier checkpoint"
            )

    agreed(check)


def _task(opened: OpenedModel, name: str, place: str | None, choices: Choices, limits: Limits) -> PreparedTask:
    of_run = next((path for task, path in opened.config.evaluate.tasks.items() if task == name), None)
    path, encoder = find_files(name, place or of_run), Encoder(opened.tokenizer)

    def shown(examples: list[Example]) -> Iterable[Example]:
        with _bar(opened, f"{name}: reading", " examples", len(examples)) as progress:
            for example in examples:
                yield example
                progress.update(1)

    prepared = agreed(lambda: PreparedTask.of(name, path, encoder, limits, limit=choices.limit, shown=shown))
    check_same(name, f"files of digest {prepared.digest[:12]}")
    return prepared


def _run_task(opened: OpenedModel, prepared: PreparedTask, limits: Limits) -> TaskResult:
    with _bar(opened, prepared.task.name, " texts", len(prepared.queries)) as progress:

        def goes_on(done: int) -> bool:
            progress.update(done - progress.n)
            return True

        result = prepared.evaluate(opened.evaluator, limits, opened.place, goes_on=goes_on)
    assert result is not None
    return result


def _bar(opened: OpenedModel, name: str, unit: str, total: int | None = None) -> Any:
    """On a terminal, and of the first rank."""
    is_first = opened.place.parallel.is_first
    return tqdm(total=total, desc=name, unit=unit, leave=False, disable=None if is_first else True)


def _held_out(opened: OpenedModel, choices: Choices, folder: str | None) -> HeldOut:
    """The data of the run, or those in `folder`, with the keys of the run's evaluate section."""
    config = opened.config
    if folder is not None:
        config = config.replaced("data", manifest=folder, sources=())
    if choices.limit is not None:
        config = config.replaced("evaluate", sequences=choices.limit)
    if config.evaluate.sequences == 0:
        raise UserError("validation: evaluate.sequences is 0 in this run; set it, --set evaluate.sequences=256")
    sources = agreed(lambda: _data(opened, config) if folder is None else _other_data(opened, config, folder))
    check_same(f"validation: {sources.key} (digest)", sources.digest)
    return HeldOut(config, sources)


def _validate(opened: OpenedModel, found: HeldOut, *, is_other: bool) -> dict[str, Any]:
    """The held-out split. `is_other`: of other data than the run's."""
    (config, sources), place = found, opened.place
    reader = sources.reader(config.evaluate.split, config)
    windows = evaluation_windows(reader, config)
    # What a batch lacks is computed too, and not counted.
    share = -(-windows.shape[1] // place.parallel.data_size)
    config = config.replaced("batch", micro_sequences=min(config.batch.micro_sequences, share))
    with _bar(opened, "validation", " batches") as bar:

        def before_batch(done: int, total: int) -> bool:
            bar.total = total
            bar.update(done - bar.n)
            return True

        values = validation(opened.evaluator, reader, config, place.parallel, place.device, before_batch=before_batch)
    assert values is not None
    counts = target_counts(reader, windows)
    if size := opened.tokenizer.bytes_of(counts):
        values["bits_per_byte"] = bits_per_byte(values["loss"], values["tokens"], size)
    unigram = unigram_perplexity(counts)
    content: dict[str, Any] = {"task": "validation", "split": config.evaluate.split, **values}
    content["unigram_perplexity"] = unigram
    chunks = opened.config.model.position.memory_chunks
    if chunks != config_of(opened.checkpoint).model.position.memory_chunks:
        content |= {"task": "validation with other memory", "memory_chunks": chunks}  # not what a model card shows
    if not is_other:
        return content
    # Another task's name: a model card shows what is of the run's own data.
    manifest = sources.sources[0].manifest
    data = Path(os.path.abspath(manifest.folder)).name  # of "." too
    return {**content, "task": "validation of other data", "data": data, "digest": manifest.digest}


def _data(opened: OpenedModel, config: Config) -> Sources:
    try:
        sources, known = open_sources(config), opened.checkpoint.state.get("tokenizer_sha256")
    except UserError as error:
        if all(URL.match(place) or find_input(place).exists() for place in config.data.locations):
            raise
        raise UserError(f"validation: {error}; name the place of the prepared data with --data") from None
    if known is not None and sources.tokenizer.sha256 != known:
        raise UserError(
            f"validation: the data of {sources.key} were made with another tokenizer than the model's; name those that "
            f"the run read with --data"
        )
    return sources


def _other_data(opened: OpenedModel, config: Config, folder: str) -> Sources:
    """The data in `folder`, which `config` names, and whose train split nobody reads. Raises UserError unless they were
    made with the model's tokenizer."""
    try:
        if URL.match(folder):
            raise UserError("is behind a URL; name a local copy")
        sources = Sources.load(config)
        check_held_out(sources.sources[0], config)
    except UserError as error:
        raise UserError(f"--tasks validation={folder}: {str(error).removeprefix('data.manifest: ')}") from None
    ours = sources.tokenizer.sha256
    if opened.checkpoint.state.get("tokenizer_sha256", ours) != ours:
        raise UserError(
            f"--tasks validation={folder}: was made with another tokenizer than the model's; prepare its text again "
            f"with that one: --set tokenizer.model=DATA/tokenizer.model, DATA being what the run read"
        )
    return sources
