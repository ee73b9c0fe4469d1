"""The weights of a checkpoint for other programs: one safetensors file, with what is needed to use it.

Modules that import torch are imported inside functions, because launch/checkpoint.py lists and verifies without it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import replace_file, write_json
from common.folders import making
from common.hashing import sha256_file
from common.paths import find_input
from common.urls import URL
from data_prep.shards.format import Manifest
from pretrain.checkpoint.folder import PARTIAL, Checkpoint, DamagedCheckpoint, check_output_folder
from pretrain.checkpoint.tokenizer_file import StoredTokenizer
from pretrain.config.loading import parse_config
from pretrain.config.schema import Config

MODEL, CONFIG, WEIGHTS = "model.safetensors", "config.json", "weights.json"


def convert(folder: Path, out: Path, *, data: str | None = None, ema: bool = False) -> None:
    """Checks the files of the checkpoint `folder` and writes its fp32 weights to `out`/model.safetensors, with
    config.json, weights.json and the tokenizer beside them. `data`: where the prepared data are now. `ema`: the moving
    average instead of the weights. Raises UserError; `out` then holds what it held before."""
    check_output_folder(out.absolute(), "OUT")
    checkpoint = Checkpoint.open(folder)
    found, reason = StoredTokenizer.inside(checkpoint), ""
    if found is None:
        manifest, reason = find_data(checkpoint, data)
        found = None if manifest is None else StoredTokenizer.of(manifest)
    tokenizer = None if found is None else found.entry.file
    for name in (MODEL, MODEL + PARTIAL, CONFIG, WEIGHTS, tokenizer or ""):
        if name and os.path.lexists(out / name):
            raise UserError(f"OUT: {out / name} exists; name another folder")
    if problem := checkpoint.damaged_file(read=progress_bar(folder.name, checkpoint.bytes)):
        raise DamagedCheckpoint(f"checkpoint {folder}: {problem}")
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


def find_data(checkpoint: Checkpoint, place: str | None = None) -> tuple[Manifest | None, str]:
    """Looks for the data set that the run read (one of them; they share a tokenizer) at the place that the checkpoint's
    configuration, or `place`, names. Returns None and the reason if it is not there. Raises UserError if `place` holds
    another data set."""
    try:
        config = parse_config(checkpoint.state["config"])
        rows = [source.manifest for source in config.data.sources]
        if place is None and len(rows) > 1 and not all(map(_is_local_folder, rows)):
            for row in rows:  # what is left of a mixture has the tokenizer too
                with contextlib.suppress(UserError, OSError):
                    return data_at(checkpoint, config, row), ""
        return data_at(checkpoint, config, place), ""
    except _RemoteData as error:
        return None, f"{error}; name a local copy with --data"
    except (UserError, OSError) as error:
        if place is not None:
            raise UserError(f"--data {place}: {error}") from None
        return None, f"{error}; name the place of the prepared data with --data"


class _RemoteData(UserError):
    """Data behind a URL, which nothing is fetched from."""


def _is_local_folder(location: str) -> bool:
    return not URL.match(location) and find_input(location).exists()


def data_at(checkpoint: Checkpoint, config: Config, place: str | None) -> Manifest:
    """The data set at `place`, which is any of those that the run read; None: all at the places of the configuration,
    of which the first is returned. Raises UserError."""
    from pretrain.data.sources import Sources

    if place is not None:
        config = config.replaced("data", manifest=place, sources=())
    locations = [source.manifest for source in config.data.sources] or [config.data.manifest]
    if remote := next((location for location in locations if URL.match(location)), None):
        raise _RemoteData(f"{remote} is behind a URL")
    sources = Sources.load(config)
    manifest = sources.sources[0].manifest
    if not _was_read(checkpoint, sources.digest, manifest, alone=place is not None):
        what = "is not the data set that the run read"
        if place is not None and len(checkpoint.state["config"]["data"].get("sources") or ()) > 1:
            what = "is none of the data sets that the run read"
        raise UserError(f"{', '.join(locations)} {what} (another digest)")
    entry = manifest.tokenizer
    if entry.file is not None and sha256_file(manifest.folder / entry.file) != entry.sha256:
        raise UserError(f"{manifest.folder / entry.file} does not match its manifest")
    return manifest


def _was_read(checkpoint: Checkpoint, digest: str, manifest: Manifest, *, alone: bool) -> bool:
    """Whether the run read the data `digest`, with `alone` one data set, which may be one of several. Where the
    checkpoint does not know its data, as an imported one, whoever names a data set of its tokenizer is believed."""
    known = {checkpoint.state["manifest_digest"]} - {""}
    if alone and not known:
        return bool(checkpoint.state.get("tokenizer_sha256", "") == manifest.tokenizer.sha256)
    if alone and checkpoint.state["config"]["data"].get("sources"):
        known |= {source.digest for stage in checkpoint.progress.stages for source in stage.sources}
    return digest in known


def moved_data(checkpoint: Checkpoint, config: Config, places: Sequence[str]) -> Config:
    """`config`, the checkpoint's, where each data set that is not at its place is read from the first of `places` that
    holds it."""
    stages, rows = checkpoint.progress.stages, config.data.sources
    if not rows:
        if find_data(checkpoint)[0] is not None:
            return config
        manifest = next((place for place in places if _holds(checkpoint, config, place)), config.data.manifest)
        return config.replaced("data", manifest=manifest)
    recorded = stages[-1].mixed if stages else ()
    if len(recorded) != len(rows):
        return config
    found = []
    for row, source in zip(rows, recorded, strict=True):
        holds = [p for p in (row.manifest, *places) if URL.match(p) or _holds(checkpoint, config, p, source.digest)]
        found.append(row.model_copy(update={"manifest": holds[0] if holds else row.manifest, "name": source.name}))
    return config.replaced("data", sources=tuple(found))


def _holds(checkpoint: Checkpoint, config: Config, place: str, digest: str = "") -> bool:
    """Whether `place` is a data set that the run read; with `digest`, that one."""
    try:
        manifest = data_at(checkpoint, config, place)
    except (UserError, OSError):
        return False
    return not digest or manifest.digest == digest


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

    from pretrain.checkpoint import loading
    from pretrain.checkpoint.fragments import single_fragment
    from pretrain.checkpoint.storage import Entry, Reader, write_safetensors

    reader = Reader(checkpoint)
    loading.check_kind(reader, kind)

    def parameter(name: str, shape: list[int]) -> torch.Tensor:
        tensor = torch.empty(shape)
        loading.read(reader, checkpoint, {f"{kind}/{name}": single_fragment(tensor)})
        return tensor

    entries = [
        Entry(name, torch.float32, shape, lambda name=name, shape=shape: parameter(name, shape))  # type: ignore[misc]
        for name, shape in checkpoint.state["parameters"].items()
    ]
    return write_safetensors(path, entries)["bytes"]


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


def progress_bar(name: str, total: int) -> Callable[[int], None]:
    """A callback that takes the number of bytes read; prints nothing unless standard error is a terminal."""
    from tqdm import tqdm

    bar = tqdm(total=total, desc=name, unit="B", unit_scale=True, leave=False, disable=None)

    def read(count: int) -> None:
        bar.update(count)
        if bar.n >= total:
            bar.close()

    return read
