"""Tensors of foreign files, by name, read without executing anything: torch.save's by weights_only, or safetensors."""

from __future__ import annotations

import pickle
import shlex
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from common.errors import UserError


class PlainDict:
    """Stands for the dictionary class of the authors' code when one of their training checkpoints is read: what is made
    is a dict."""

    def __new__(cls) -> dict[str, Any]:  # type: ignore[misc]
        return {}


WRAPPERS = ("module.", "_orig_mod.")
"""Prefixes of DistributedDataParallel's and of torch.compile's."""
STAND_INS: list[Any] = [(PlainDict, "framework.data_structures.dotdict.DotDict")]
"""Classes that a file may name, and what is made instead of theirs."""


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, of a saved state dict, or of the `model` of a training checkpoint. They are
    mapped from the disk where the format allows it. Raises UserError."""
    try:
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "is not there"
            raise UserError(f"SOURCE: {path} {what}; name a file of weights")
        with path.open("rb") as file:
            start = file.read(9)
        if start[8:9] == b"{":  # safetensors: the length of the header, the header in JSON
            return dict(safetensors.torch.load_file(path))
        return _tensors(path, _unpickled(path))
    except OSError as error:
        raise UserError(f"SOURCE: {path} cannot be read: {error.strerror or error}") from None
    except safetensors.SafetensorError as error:
        raise UserError(f"SOURCE: {path} is no safetensors file ({error})") from None


def _unpickled(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(STAND_INS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        reason = next((line.strip() for line in str(error).splitlines() if "GLOBAL" in line or "Can only" in line), "")
        convert = (
            f"import torch; s = torch.load({str(path)!r}, map_location='cpu', weights_only=False); "
            f"torch.save(s.get('model', s), 'weights.pth')"
        )
        raise UserError(
            f"SOURCE: {path} holds more than tensors ({reason.rstrip('.') or 'it is no file of torch.save'}), and to "
            f"read that would run what the file says; if you trust it, write its tensors to a file of their own with "
            f"its own code at hand: python -c {shlex.quote(convert)}"
        ) from None
    except OSError:
        raise
    except Exception as error:  # of torch, pickle, struct or zipfile
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"SOURCE: {path} is damaged or no file of torch.save ({first})") from None


def _tensors(path: Path, found: Any) -> dict[str, Tensor]:
    """The state dict in what torch.save stored, without the prefixes of wrappers."""
    if isinstance(found, Mapping) and isinstance(found.get("model"), Mapping):
        found = found["model"]
    if not isinstance(found, Mapping) or not any(isinstance(value, Tensor) for value in found.values()):
        raise UserError(f"SOURCE: {path} holds no state dict and no `model` that is one; save model.state_dict()")
    tensors = {str(name): value for name, value in found.items() if isinstance(value, Tensor)}
    # In any order: torch.compile goes around DistributedDataParallel, or inside.
    while wrapper := next((one for one in WRAPPERS if all(name.startswith(one) for name in tensors)), None):
        tensors = {name.removeprefix(wrapper): value for name, value in tensors.items()}
    return tensors
