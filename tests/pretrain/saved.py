"""Checkpoints as tests look at them: read without the code that they test."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


def whole_tensors(folder: Path, *, prefixes: tuple[str, ...] = ("",)) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint put together from its rectangles, those of which no two may overlap."""
    index = json.loads((folder / "tensors.json").read_text())
    files = [load_file(folder / name) for name in index["files"]]
    found = {}
    for name, entry in index["tensors"].items():
        if not name.startswith(prefixes):
            continue
        parts = [
            (files[file][f"{name}@{','.join(map(str, offsets))}"], offsets, sizes)
            for file, offsets, sizes in entry["chunks"]
        ]
        tensor = torch.empty(entry["shape"], dtype=parts[0][0].dtype)
        times = torch.zeros(entry["shape"], dtype=torch.uint8)
        for values, offsets, sizes in parts:
            assert list(values.shape) == sizes
            place = tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))
            tensor[place] = values
            times[place] += 1
        assert bool((times == 1).all()), f"{name}: not every element lies in one rectangle"
        found[name] = tensor
    return found


def rewrite_state(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Alters state.json as its writer could have: the commit marker fits."""
    state = json.loads((folder / "state.json").read_text())
    change(state)
    content = json.dumps(state).encode()
    (folder / "state.json").write_bytes(content)
    marker = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "commit.json").write_text(json.dumps(marker))
