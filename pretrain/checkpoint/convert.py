"""The weights of a checkpoint for other programs: one safetensors file, with what is needed to use it.

What imports torch is imported where it is used: launch/checkpoint.py lists and verifies without it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import replace_file, write_json
from common.hashing import sha256_file
from common.urls import URL
from data_prep.shards.format import Manifest
from pretrain.checkpoint.folder import PARTIAL, Checkpoint, DamagedCheckpoint
from pretrain.config.loading import parse_config

MODEL, CONFIG, WEIGHTS = "model.safetensors", "config.json", "weights.json"


def convert(folder: Path, out: Path, *, data: str | None = None) -> None:
    """Writes the fp32 weights of the checkpoint `folder`, after checking its files, to `out`/model.safetensors, and
    beside them config.json, weights.json and the tokenizer. `data`: where the prepared data are now. Raises UserError;
    `out` then holds what it held before."""
    checkpoint = Checkpoint.open(folder)
    manifest, reason = find_data(checkpoint, data)
    tokenizer = manifest.tokenizer.file if manifest is not None else None
    for name in (MODEL, CONFIG, WEIGHTS, tokenizer or ""):
        if name and os.path.lexists(out / name):
            raise UserError(f"OUT: {out / name} exists; name another folder")
    if problem := checkpoint.damaged_file(read=progress_bar(folder.name, checkpoint.bytes)):
        raise DamagedCheckpoint(f"checkpoint {folder}: {problem}")
    out.mkdir(parents=True, exist_ok=True)
    with _removed_if_it_fails(out) as made:
        if manifest is not None and tokenizer is not None:
            made.append(tokenizer)
            replace_file(out / tokenizer, [(manifest.folder / tokenizer).read_bytes()])
        made += [WEIGHTS, CONFIG, MODEL]
        write_json(out / WEIGHTS, _description(checkpoint, manifest))
        write_json(out / CONFIG, checkpoint.state["config"])
        size = _write_weights(checkpoint, out / (MODEL + PARTIAL))
        os.replace(out / (MODEL + PARTIAL), out / MODEL)  # last: where it is, all is
    count, step = len(checkpoint.state["parameters"]), checkpoint.progress.step
    print(f"{out / MODEL}: {count} tensors, {size:,} bytes, of step {step}", flush=True)
    if manifest is None:
        print(f"no tokenizer was written: {reason}", flush=True)
    else:
        kind = manifest.tokenizer.kind
        print(f"{out / tokenizer}: the tokenizer" if tokenizer else f"no tokenizer: ids are {kind}", flush=True)


def find_data(checkpoint: Checkpoint, place: str | None = None) -> tuple[Manifest | None, str]:
    """The data set that the run read (one of them; they share a tokenizer) if it is where the checkpoint's
    configuration, or `place`, says; else None and why not. Raises UserError if `place` holds another one."""
    from pretrain.data.sources import Sources

    try:
        config = parse_config(checkpoint.state["config"])
        if place is not None:
            if config.data.sources:
                raise UserError(
                    f"--data: the run read {len(config.data.sources)} data sets; leave it out, their places are in its "
                    f"configuration"
                )
            config = config.model_copy(update={"data": config.data.model_copy(update={"manifest": place})})
        locations = [source.manifest for source in config.data.sources] or [config.data.manifest]
        if remote := next((location for location in locations if URL.match(location)), None):
            return None, f"{remote} is behind a URL; name a local copy with --data"
        sources = Sources.load(config)
        if sources.digest != checkpoint.state["manifest_digest"]:
            raise UserError(f"{', '.join(locations)} is not the data set that the run read (another digest)")
        manifest = sources.sources[0].manifest
        entry = manifest.tokenizer
        if entry.file is not None and sha256_file(manifest.folder / entry.file) != entry.sha256:
            raise UserError(f"{manifest.folder / entry.file} does not match its manifest")
    except (UserError, OSError) as error:
        if place is not None:
            raise UserError(str(error)) from None
        return None, f"{error}; name the place of the prepared data with --data"
    return manifest, ""


def _description(checkpoint: Checkpoint, manifest: Manifest | None) -> dict[str, Any]:
    """weights.json: what the weights are of."""
    progress, state = checkpoint.progress, checkpoint.state
    entry = manifest.tokenizer if manifest is not None else None
    return {
        "step": progress.step,
        "tokens": progress.consumed_sequences * state["config"]["model"]["sequence_length"],
        "loss": state["loss"],
        "validation_loss": state["validation_loss"],
        "data_digest": state["manifest_digest"],
        "tokenizer": entry.model_dump(mode="json") if entry is not None else None,
        "versions": state["versions"],
    }


def _write_weights(checkpoint: Checkpoint, path: Path) -> int:
    """Its size in bytes. Holds one parameter at a time."""
    import torch

    from pretrain.checkpoint import state
    from pretrain.checkpoint.fragments import single_fragment
    from pretrain.checkpoint.storage import Entry, Reader, write_safetensors

    reader = Reader(checkpoint)

    def parameter(name: str, shape: list[int]) -> torch.Tensor:
        tensor = torch.empty(shape)
        state.read(reader, checkpoint, {f"master/{name}": single_fragment(tensor)})
        return tensor

    entries = [
        Entry(name, torch.float32, shape, lambda name=name, shape=shape: parameter(name, shape))  # type: ignore[misc]
        for name, shape in checkpoint.state["parameters"].items()
    ]
    return write_safetensors(path, entries)["bytes"]


@contextlib.contextmanager
def _removed_if_it_fails(out: Path) -> Iterator[list[str]]:
    """Removes the files that the block has listed, and their beginnings, if it ends with an error."""
    made: list[str] = []
    try:
        yield made
    except BaseException:
        for name in made:
            for path in (out / name, out / (name + PARTIAL)):
                path.unlink(missing_ok=True)
        raise


def progress_bar(name: str, total: int) -> Callable[[int], None]:
    """A callback for bytes read; silent where standard error is no terminal."""
    from tqdm import tqdm

    bar = tqdm(total=total, desc=name, unit="B", unit_scale=True, leave=False, disable=None)

    def read(count: int) -> None:
        bar.update(count)
        if bar.n >= total:
            bar.close()

    return read
