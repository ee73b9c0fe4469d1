"""A model, back from a checkpoint that any layout wrote, in one process and without DeepSpeed."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from common.errors import ConfigError, UserError
from data_prep.shards.format import Manifest
from model.config import ModelConfig
from model.kernels.choice import Backends
from model.language_model import LanguageModel, prepare_to_answer
from model.parallel.context import ParallelContext
from pretrain.checkpoint.folder import (
    CHECKPOINT_NAME,
    STATE_FILE,
    Checkpoint,
    DamagedCheckpoint,
    check_not_converted,
    list_checkpoints,
    while_they_are_there,
)
from pretrain.checkpoint.prepared_data import find_data, same_tokenizer
from pretrain.checkpoint.tokenizer_file import StoredTokenizer
from pretrain.config.loading import parse_config
from pretrain.config.schema import Config
from pretrain.gpus import usable_device
from pretrain.saved_model.tokenizer import Tokenizer


class SavedModel(NamedTuple):
    """What `load_model` returns."""

    model: LanguageModel
    """fp32, in evaluation mode: `model.logits(tokens)` of int64 [B, T]. No parameter asks for a gradient."""
    tokenizer: Tokenizer
    config: Config
    checkpoint: Checkpoint
    """Where it comes from: path, and what its state.json says (`progress.step`, losses)."""

    @property
    def document_end(self) -> int | None:
        """See `document_end_of`."""
        return document_end_of(self.config, self.tokenizer)


def load_model(
    run_or_checkpoint: str | Path,
    *,
    device: str = "cpu",
    data: Sequence[str | Path] = (),
    verify: bool = True,
    ema: bool = False,
) -> SavedModel:
    """The model of a checkpoint (step-...), or of the newest checkpoint of a run folder, and its tokenizer.

    `device`: cpu, cuda, or one of several GPUs as cuda:1. `data`: folders of prepared data, where to look for the
    tokenizer if the data are no longer where the run read them. `verify`: compare every file with its sha256 first.
    `ema`: the moving average of the weights (train.ema_decay) instead of the weights. Raises UserError: no checkpoint
    yet, a damaged one, one of another version, no tokenizer or another model's, no moving average, no such device.
    """
    data = [data] if isinstance(data, str | Path) else data
    checkpoint, place = find_checkpoint(Path(run_or_checkpoint)), usable_device(device)
    with while_they_are_there([checkpoint.path], "RUN"):
        config = config_of(checkpoint)
        tokenizer = tokenizer_of(checkpoint, config.model, data)
        if verify:
            checkpoint.check_files()
        backends = backends_of(config, place)
        model = LanguageModel(config.model, backends=backends, seed=config.train.seed)
        from pretrain.checkpoint.loading import load_weights  # imports DCP, which a start of training does without

        load_weights(checkpoint, model, ParallelContext(), kind="ema" if ema else "master")
    prepare_to_answer(model, place)
    return SavedModel(model, tokenizer, config, checkpoint)


def _transformers_type(folder: Path) -> str | None:
    """The model_type of a folder of Hugging Face transformers; None for other folders."""
    try:
        found = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    kind = found.get("model_type") if isinstance(found, dict) else None
    return kind if isinstance(kind, str) else None


def _said_of_export(folder: Path, kind: str) -> str:
    """What is wrong with a folder of transformers where a checkpoint is wanted."""
    if kind != "switchall":
        return f"is a model of another program for transformers ({kind}); name a run folder (runs/NAME) or a checkpoint"
    if not any(folder.glob("model*.safetensors*")):
        return "is an export without its weights (model.safetensors); copy the whole folder again"
    return (
        f"is an export, which launch/generate.py, launch/evaluate.py and pretrain.api.open_model read; for other "
        f"commands make a checkpoint of it: python launch/import_weights.py {shlex.quote(str(folder))} --to FOLDER"
    )


def document_end_of(config: Config, tokenizer: Tokenizer) -> int | None:
    """The id (EOS) behind which a model that was trained with data.document_mask sees nothing of what stands before.
    None: it sees all, or its tokenizer has no id that ends a document, so a text passes for one."""
    return tokenizer.eos_id if config.data.document_mask else None


def find_checkpoint(place: Path) -> Checkpoint:
    """The checkpoint `place`, or the newest of the run folder (or checkpoints folder) `place`. Raises UserError."""
    if not place.is_dir():
        there = "is a file" if place.exists() else "is not there"
        raise UserError(f"RUN: {place} {there}; name a run folder (runs/NAME) or a checkpoint (step-...)")
    is_run = (place / "checkpoints").is_dir()  # which may have any name
    if (place / STATE_FILE).exists() or (CHECKPOINT_NAME.fullmatch(place.name) and not is_run):
        try:
            return Checkpoint.open(place)
        except DamagedCheckpoint as error:
            raise type(error)(f"{error}; copy the whole folder again, or name another checkpoint") from None
    folder = place / "checkpoints" if is_run else place
    found = list_checkpoints(folder)
    if not found:
        if (kind := _transformers_type(place)) is not None:
            raise UserError(f"RUN: {place} {_said_of_export(place, kind)}")
        if (place / "sweep.json").exists():  # SWEEP_RECORD of pretrain/report/run_paths.py, a room above
            raise UserError(f"RUN: {place} is the folder of a sweep; name a run in it")
        check_not_converted(place, "RUN")
        is_run = is_run or (place / "config.json").exists()
        raise UserError(
            f"RUN: {place} has no checkpoint yet; wait for the first (checkpoint.every_steps of its configuration)"
            if is_run
            else f"RUN: {place} is no run folder, no checkpoint and no export; name runs/NAME or a step-... folder"
        )
    try:
        return Checkpoint.open(found[-1])
    except UserError as error:
        if not found[-1].is_dir():
            return find_checkpoint(place)  # a run that goes on has removed it: there is a newer one
        if not isinstance(error, DamagedCheckpoint):
            raise
        earlier = f"; name an earlier one, such as {found[-2]}" if len(found) > 1 else ""
        raise type(error)(f"{error}{earlier}") from None


def backends_of(config: Config, device: torch.device) -> Backends:
    """What a saved model is computed with, fp32."""
    mask = config.data.document_mask
    return Backends.choose("auto", config.model, device_type=device.type, dtype=torch.float32, document_mask=mask)


def config_of(checkpoint: Checkpoint) -> Config:
    """The configuration of the run that wrote a checkpoint. Raises UserError."""
    try:
        return parse_config(checkpoint.state["config"])
    except ConfigError as error:
        raise UserError(f"checkpoint {checkpoint.path}: another version wrote its configuration ({error})") from None
    except KeyError:
        raise DamagedCheckpoint(f"checkpoint {checkpoint.path}: {STATE_FILE} has no configuration") from None


def tokenizer_of(checkpoint: Checkpoint, model: ModelConfig, data: Sequence[str | Path]) -> Tokenizer:
    """What `find_tokenizer` finds, to encode and decode with. Raises UserError, also if it has ids that the model has
    not."""
    tokenizer = Tokenizer(find_tokenizer(checkpoint, data)[0])
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"checkpoint {checkpoint.path}: its tokenizer has {tokenizer.vocab_size:,} ids, but model.vocab_size is "
            f"{model.vocab_size:,}, so they do not belong together; name the data of this run with --data"
        )
    return tokenizer


def find_tokenizer(checkpoint: Checkpoint, data: Sequence[str | Path]) -> tuple[StoredTokenizer, Manifest | None]:
    """The tokenizer inside the checkpoint, else that of the data that the configuration names, else that of the first
    folder of `data` that fits; and the manifest of these data, where they were looked for. Else the same tokenizer of
    other data at one of these places, without their manifest. Raises UserError."""
    if (inside := StoredTokenizer.inside(checkpoint)) is not None:
        return inside, None
    manifest, reason = find_data(checkpoint)
    refusals = []
    for place in data if manifest is None else ():
        try:
            manifest, _ = find_data(checkpoint, str(place))
            break
        except UserError as error:
            refusals.append(str(error))
    if manifest is None:
        if (same := same_tokenizer(checkpoint, [str(place) for place in data])) is not None:
            return same, None
        raise UserError(f"checkpoint {checkpoint.path}: no tokenizer: {refusals[0] if refusals else reason}")
    return StoredTokenizer.of(manifest), manifest
