"""A trained model for a program, from wherever it lies: a run, a checkpoint, or an export."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from common.errors import UserError
from model.decoding import prefer_single_tokens
from model.language_model import LanguageModel, prepare_to_answer
from pretrain.checkpoint.folder import Checkpoint
from pretrain.checkpoint.shapes import full_shapes
from pretrain.checkpoint.weights import state_of
from pretrain.export.reading import Exported, is_export, open_export
from pretrain.gpus import usable_device
from pretrain.saved_model import SavedModel, Tokenizer, load_model
from pretrain.saved_model.loading import backends_of


def load_any(
    place: str | Path, *, device: str = "cpu", data: Sequence[str | Path] = (), ema: bool = False
) -> SavedModel:
    """As `pretrain.saved_model.load_model`, of an export too, and ready to generate (`prefer_single_tokens`). Raises
    UserError."""
    folder = Path(place)
    if not is_export(folder):
        saved = load_model(folder, device=device, data=data, ema=ema)
    elif ema:
        raise one_set_of_weights(folder)
    else:
        saved = load_export(folder, device=device)
    prefer_single_tokens(saved.model)
    return saved


def one_set_of_weights(folder: Path) -> UserError:
    """Of a folder of which the moving average is wanted."""
    return UserError(f"--ema: {folder} is an export, which holds one set of weights; leave the option out")


def as_checkpoint(exported: Exported) -> Checkpoint:
    """What says of an export what a checkpoint of its weights would say, without files: its tokenizer is found in the
    folder, its weights are read by `exported.tensors`."""
    return Checkpoint(
        exported.folder, {**state_of(exported.weights_origin(), full_shapes(exported.config.model)), "files": {}}
    )


def load_export(folder: Path, *, device: str = "cpu") -> SavedModel:
    """A folder that launch/export.py, or transformers' save_pretrained, wrote. Its `checkpoint` is this folder, with
    the progress that the export records (else step 0). Raises UserError."""
    exported = open_export(folder)
    config, place = exported.config, usable_device(device)
    model = LanguageModel(config.model, backends=backends_of(config, place), seed=config.train.seed)
    model.requires_grad_(False)
    for name, read in exported.tensors.items():  # a tied output layer is the embedding's
        model.get_parameter(name).copy_(read())
    prepare_to_answer(model, place)
    return SavedModel(model, Tokenizer(exported.tokenizer), config, as_checkpoint(exported))
