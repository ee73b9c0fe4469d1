"""The weights of a checkpoint for other programs: one safetensors file, with what is needed to use it.

Modules that import torch are imported inside functions, because launch/checkpoint.py lists and verifies without it.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import replace_file, write_json
from common.folders import making
from pretrain.checkpoint.folder import CONVERTED, PARTIAL, Checkpoint, check_output_folder
from pretrain.checkpoint.prepared_data import stored_tokenizer_of
from pretrain.checkpoint.tokenizer_file import StoredTokenizer

MODEL, CONFIG, WEIGHTS = "model.safetensors", "config.json", CONVERTED


def convert(folder: Path, out: Path, *, data: str | None = None, ema: bool = False) -> None:
    """Checks the files of the checkpoint `folder` and writes its fp32 weights to `out`/model.safetensors, with
    config.json, weights.json and the tokenizer beside them. `data`: where the prepared data are now. `ema`: the moving
    average instead of the weights. Raises UserError; `out` then holds what it held before."""
    check_output_folder(out.absolute(), "--to")
    checkpoint = Checkpoint.open(folder)
    found, reason = stored_tokenizer_of(checkpoint, data)
    tokenizer = None if found is None else found.entry.file
    for name in (MODEL, MODEL + PARTIAL, CONFIG, WEIGHTS, tokenizer or ""):
        if name and os.path.lexists(out / name):
            raise UserError(f"--to: {out / name} exists; name another folder")
    checkpoint.check_files()
    with making(out), _removed_if_it_fails(out) as made:
        if found is not None and tokenizer is not None:
            made.append(tokenizer)
            replace_file(out / tokenizer, [(found.folder / tokenizer).read_bytes()])
        made += [WEIGHTS, CONFIG, MODEL]
        write_json(out / WEIGHTS, _description(checkpoint, found, ema=ema))
        write_json(out / CONFIG, checkpoint.state["config"])
        size = _write_weights(checkpoint, out / (MODEL + PARTIAL), "ema" if ema else "master")
        os.replace(out / (MODEL + PARTIAL), out / MODEL)  # last: if it is there, everything is
    count, step = len(checkpoint.state["parameters"]), checkpoint.progress.step
    average = ", moving average of the weights" if ema else ""
    print(f"{out / MODEL}: {count} tensors, {size:,} bytes, of step {step}{average}", flush=True)
    if found is None:
        print(f"no tokenizer was written: {reason}", flush=True)
    else:
        without = "ids are bytes" if found.entry.has_text else "the data are token ids of one that is not here"
        print(f"{out / tokenizer}: the tokenizer" if tokenizer else f"no tokenizer: {without}", flush=True)


def _description(checkpoint: Checkpoint, tokenizer: StoredTokenizer | None, *, ema: bool) -> dict[str, Any]:
    """The content of weights.json: where the weights come from. The losses are those of the weights, so the moving
    average has none."""
    progress, state = checkpoint.progress, checkpoint.state
    return {
        "step": progress.step,
        "tokens": progress.tokens(state["config"]["model"]["sequence_length"]),
        "loss": None if ema else state["loss"],
        "validation_loss": None if ema else state["validation_loss"],
        "data_digest": state["manifest_digest"],
        "tokenizer": tokenizer.entry.model_dump(mode="json") if tokenizer is not None else None,
        "versions": state["versions"],
        "moving_average": ema,
    }


def _write_weights(checkpoint: Checkpoint, path: Path, kind: str) -> int:
    """Returns the size of the file in bytes. Holds one parameter in memory at a time."""
    import torch

    from common.progress_bar import count_bytes
    from pretrain.checkpoint.loading import whole_parameters
    from pretrain.checkpoint.storage import Entry, write_safetensors

    parameter, shapes = whole_parameters(checkpoint, kind), checkpoint.state["parameters"]
    entries = [Entry(name, torch.float32, shape, partial(parameter, name)) for name, shape in shapes.items()]
    wrote = count_bytes(MODEL, sum(4 * math.prod(shape) for shape in shapes.values()))
    return write_safetensors(path, entries, wrote)["bytes"]


@contextlib.contextmanager
def _removed_if_it_fails(out: Path) -> Iterator[list[str]]:
    """If the block ends with an error, removes the files that it has listed, finished or not."""
    made: list[str] = []
    try:
        yield made
    except BaseException:
        for name in made:
            for path in (out / name, out / (name + PARTIAL)):
                path.unlink(missing_ok=True)
        raise
