"""Checkpoints as tests look at them: read without the code that they test."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


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


def add_moving_average(folder: Path, average: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gives a checkpoint of one rank what `train.ema_decay` keeps: `average` of each of its weights. Returns them."""
    (shard,) = folder.glob("rank-*.safetensors")
    tensors, index = load_file(shard), json.loads((folder / "tensors.json").read_text())
    for key in [key for key in tensors if key.startswith("master/")]:
        tensors[key.replace("master/", "ema/", 1)] = average(tensors[key])
    for name in [name for name in index["tensors"] if name.startswith("master/")]:
        index["tensors"][name.replace("master/", "ema/", 1)] = index["tensors"][name]
    save_file(tensors, shard)
    (folder / "tensors.json").write_text(json.dumps(index))
    entries = {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in (shard, folder / "tensors.json")
    }
    rewrite_state(folder, lambda state: state["files"].update(entries))
    return {name.removeprefix("ema/"): value for name, value in whole_tensors(folder, prefixes=("ema/",)).items()}
