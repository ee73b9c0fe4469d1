"""The folder of an export: written beside its place and renamed, so that it is whole or not there."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from common.errors import UserError
from common.files import intended_name, sync_directory, temporary_path
from common.folders import check_writable_folder, is_full
from pretrain.checkpoint.folder import PARTIAL, check_output_folder

CONFIG, GENERATION, TOKENIZER, TOKENIZER_CONFIG = (
    "config.json",
    "generation_config.json",
    "tokenizer.model",
    "tokenizer_config.json",
)
CARD, LICENSE, ORIGIN = "README.md", "LICENSE", "training.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
CODE_OF_MODEL = ("configuration_switchall.py", "layers_switchall.py", "modeling_switchall.py")
CODE = (*CODE_OF_MODEL, "tokenization_switchall.py")
OWN = {CONFIG, GENERATION, TOKENIZER, TOKENIZER_CONFIG, CARD, LICENSE, ORIGIN, WEIGHTS, INDEX, *CODE}
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


def shard_name(number: int, count: int) -> str:
    """Name of shard `number`, counted from 1, of `count`."""
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def checked_output(out: Path, option: str) -> Path:
    """The folder that `out` is or, being a link, leads to: only a folder is replaced. Raises UserError unless it can
    become an export: it is not there yet, or empty, or an export."""
    check_output_folder(out.absolute(), option)
    out = out.resolve()
    check_output_folder(out, option)
    if os.path.ismount(out):  # at the end it could not be renamed
        raise UserError(f"{option}: {out} is where a disk is mounted, which no folder can replace; name one in it")
    for place in (out, out.with_name(out.name + PARTIAL)):
        if place.is_dir() and (foreign := _foreign_file(place)):
            raise UserError(f"{option}: {place} holds {foreign}, which is not of an export; name another folder")
    check_writable_folder(out.parent, option)
    return out


def _foreign_file(folder: Path) -> str | None:
    """The first thing in a folder that no export writes."""
    for entry in sorted(folder.iterdir()):
        name = intended_name(entry.name)
        if not (name in OWN or SHARD.fullmatch(name)) or entry.is_symlink() or not entry.is_file():
            return entry.name
    return None


@contextlib.contextmanager
def new_folder(out: Path, option: str) -> Iterator[Path]:
    """A folder to write into, which becomes `out` (`checked_output`) when the block ends without an error, in the place
    of an older export. After an error, or if the disk is full, it is gone and `out` is what it was. Raises UserError.
    """
    partial = out.with_name(out.name + PARTIAL)
    try:
        if partial.is_dir():  # of an export that was killed: checked_output has seen that nothing else is in it
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        try:
            yield partial
            _rename(partial, out)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    except OSError as error:
        reason = "the disk is full" if is_full(error) else error.strerror or error
        raise UserError(f"{option}: {error.filename or out} cannot be written: {reason}; name another folder") from None


def _rename(partial: Path, out: Path) -> None:
    sync_directory(partial)
    if not out.exists():
        os.rename(partial, out)
    else:
        older = temporary_path(out)
        os.rename(out, older)
        try:
            os.rename(partial, out)
        except BaseException:
            os.rename(older, out)
            raise
        shutil.rmtree(older)
    sync_directory(out.parent)
