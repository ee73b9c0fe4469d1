"""Checkpoints of weights alone: imported, averaged, or back from another program's format.

They have the format of every other checkpoint without what only training needs: `master/NAME` is all that they hold.
state.json has one entry more, `weights_only`: what the weights come from, and the tokenizer, which lies beside them as
tokenizer.model, because the data that made the ids may be nowhere near. No run continues from such a checkpoint; a new
one begins with its weights (train.init_from).
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError
from common.files import write_file
from pretrain.checkpoint.folder import (
    FORMAT_VERSION,
    PARTIAL,
    TOKENIZER_FILE,
    Checkpoint,
    check_new_checkpoint,
    digest_entry,
    holds_checkpoint_files_alone,
)
from pretrain.checkpoint.shapes import full_shapes
from pretrain.checkpoint.state import code_versions
from pretrain.checkpoint.storage import NAMES, Entry, chunk_key, commit, write_safetensors
from pretrain.checkpoint.tokenizer_file import StoredTokenizer
from pretrain.config.loading import to_json
from pretrain.config.schema import Config
from pretrain.data.progress import Progress

RANK_FILE = "rank-00000.safetensors"


@dataclass(frozen=True, kw_only=True)
class WeightsOrigin:
    """What is recorded beside the weights."""

    config: Config
    """Of the run that they are for: its model decides names and shapes."""
    source: str
    """Where they come from, in a few words."""
    tokenizer: StoredTokenizer | None
    """What the model reads, to be put beside the weights; None: it must be found with the data."""
    tokenizer_sha256: str | None = None
    """Of the tokenizer's file, where it is known without it."""
    manifest_digest: str = ""
    """Of the data that the weights were trained on; empty if it is not known."""
    progress: Progress = field(default_factory=lambda: Progress(0, 0))
    """How far the run was that trained them; unknown: step 0."""
    loss: float | None = None
    validation_loss: float | None = None


def write_weights(
    folder: Path,
    origin: WeightsOrigin,
    tensors: Mapping[str, Callable[[], Tensor]],
    *,
    option: str = "--to",
    wrote: Callable[[int], None] = lambda num_bytes: None,
) -> Checkpoint:
    """Writes the new checkpoint `folder`, whole or not at all, and returns it opened.

    `tensors`: by canonical name (`checkpoint.shapes.full_shapes`; a tied output layer has none of its own), functions
    that give the whole parameter in fp32; each is called once, and one result is held at a time. `wrote` is called with
    the size of every block. Raises UserError, which names `option` if the folder is there already, a tensor that is
    missing, unknown or of the wrong shape, and what the disk refuses.
    """
    shapes = full_shapes(origin.config.model)
    for name in sorted(tensors.keys() ^ shapes.keys()):
        has, lacks = (origin.source, "the model") if name in tensors else ("the model", origin.source)
        raise UserError(f"{name}: {has} has this parameter, {lacks} has not; correct the configuration's model section")

    def checked(name: str) -> Tensor:
        tensor = tensors[name]()
        if list(tensor.shape) != shapes[name]:
            raise UserError(
                f"{name}: has shape {list(tensor.shape)} in {origin.source}, the model's is {shapes[name]}; correct "
                f"the configuration's model section"
            )
        return tensor.to(torch.float32)

    entries = [Entry(_key(name, shape), torch.float32, shape, partial(checked, name)) for name, shape in shapes.items()]
    index = {
        f"master/{name}": {"dtype": NAMES[torch.float32], "shape": shape, "chunks": [[0, [0] * len(shape), shape]]}
        for name, shape in shapes.items()
    }
    unfinished = _unfinished(folder, option)
    try:
        files = {RANK_FILE: write_safetensors(unfinished / RANK_FILE, entries, wrote)}
        files |= _write_tokenizer(unfinished, origin.tokenizer)
        tensor_list = {"files": [RANK_FILE], "tensors": index}
        commit(unfinished, folder, state=state_of(origin, shapes), tensors=tensor_list, files=files)
    except BaseException as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(f"{option}: {error.filename or folder}: {error.strerror}") from None
        raise
    return Checkpoint.open(folder)


def _key(name: str, shape: list[int]) -> str:
    return chunk_key(f"master/{name}", [0] * len(shape))


def _unfinished(folder: Path, option: str) -> Path:
    """Makes the folder that becomes `folder`; takes away what an interrupted attempt left of it."""
    check_new_checkpoint(folder, option)
    unfinished = folder.with_name(folder.name + PARTIAL)
    try:
        if os.path.lexists(unfinished):
            if not holds_checkpoint_files_alone(unfinished):
                raise UserError(f"{option}: {unfinished} is in the way; move it, or name another folder")
            shutil.rmtree(unfinished)
        unfinished.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{option}: {error.filename or unfinished}: {error.strerror}; name another folder") from None
    return unfinished


def _write_tokenizer(unfinished: Path, tokenizer: StoredTokenizer | None) -> dict[str, dict[str, Any]]:
    if tokenizer is None or tokenizer.path is None:
        return {}
    write_file(unfinished / TOKENIZER_FILE, tokenizer.path.read_bytes())
    found = digest_entry(unfinished / TOKENIZER_FILE)
    if found["sha256"] != tokenizer.entry.sha256:
        raise UserError(f"{tokenizer.path} is not the tokenizer that its data set names (another sha256)")
    return {TOKENIZER_FILE: found}


def state_of(origin: WeightsOrigin, shapes: dict[str, list[int]]) -> dict[str, Any]:
    """The content of state.json without the files. `shapes`: of all parameters (`full_shapes`)."""
    tokenizer: dict[str, Any] | None = None
    if origin.tokenizer is not None:
        entry = origin.tokenizer.entry
        inside = entry.model_copy(update={"file": None if entry.file is None else TOKENIZER_FILE})
        tokenizer = {"entry": inside.model_dump(mode="json"), "by_line": origin.tokenizer.by_line}
    return {
        "format_version": FORMAT_VERSION,
        "parameters": shapes,
        "layout": {"data": 1, "tensor": 1, "pipeline": 1, "expert": 1, "zero": 0},
        "versions": code_versions(),
        "time": time.time(),
        "progress": origin.progress.to_json(),
        "optimizer_steps": 0,
        "loss_scaler": None,
        "config": to_json(origin.config),
        "manifest_digest": origin.manifest_digest,
        "tokenizer_sha256": origin.tokenizer_sha256 if origin.tokenizer is None else origin.tokenizer.entry.sha256,
        "branch_start": None,
        "loss": origin.loss,
        "validation_loss": origin.validation_loss,
        "weights_only": {"source": origin.source, "tokenizer": tokenizer},
    }
