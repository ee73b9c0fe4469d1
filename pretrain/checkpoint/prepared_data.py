"""The prepared data that the run of a checkpoint read: where they are now, and the tokenizer they were made with."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from common.errors import UserError
from common.hashing import sha256_file
from common.paths import find_input
from common.urls import URL
from data_prep.shards.format import Manifest
from pretrain.checkpoint.folder import Checkpoint
from pretrain.checkpoint.tokenizer_file import StoredTokenizer
from pretrain.config.loading import parse_config
from pretrain.config.schema import Config


def stored_tokenizer_of(checkpoint: Checkpoint, place: str | None = None) -> tuple[StoredTokenizer | None, str]:
    """The tokenizer inside the checkpoint, else that of the data that `find_data` finds, else the same one of other
    data there; or None and the reason. Raises UserError."""
    if (inside := StoredTokenizer.inside(checkpoint)) is not None:
        return inside, ""
    try:
        manifest, reason = find_data(checkpoint, place)
    except UserError:
        # Of `place` alone: a mistyped one would else go unseen where the configuration's own place has the tokenizer.
        if place is None or (same := same_tokenizer(checkpoint, [place])) is None:
            raise
        return same, ""
    same = same_tokenizer(checkpoint, places_of(checkpoint)) if manifest is None else StoredTokenizer.of(manifest)
    return same, "" if same is not None else reason


def same_tokenizer(checkpoint: Checkpoint, places: Sequence[str]) -> StoredTokenizer | None:
    """The tokenizer of data that the run did not read, as those that another version has made anew of the same text: of
    the first of `places` that has it, by its sha256, and uses it as the run's data did (`StoredTokenizer.use`, which
    checkpoints of older versions do not say)."""
    sha256, use = checkpoint.state.get("tokenizer_sha256"), checkpoint.state.get("tokenizer_use")
    for place in places if sha256 else ():
        with contextlib.suppress(UserError, OSError):
            if URL.match(place):
                continue
            found = StoredTokenizer.of(Manifest.load(find_input(place)))
            is_same = found.entry.sha256 == sha256 and use in (None, found.use)
            if is_same and found.path is not None and sha256_file(found.path) == sha256:
                return found
    return None


def places_of(checkpoint: Checkpoint) -> list[str]:
    """Those that the checkpoint's configuration names, where it can be read."""
    with contextlib.suppress(UserError):
        return parse_config(checkpoint.state["config"]).data.locations
    return []


def find_data(checkpoint: Checkpoint, place: str | None = None) -> tuple[Manifest | None, str]:
    """Looks for the data set that the run read (one of them; they share a tokenizer) at the place that the checkpoint's
    configuration, or `place`, names. Returns None and the reason if it is not there. Raises UserError if `place` holds
    another data set, or nothing that can be read."""
    try:
        config = parse_config(checkpoint.state["config"])
        rows = [source.manifest for source in config.data.sources]
        if place is None and len(rows) > 1 and not all(map(_is_local_folder, rows)):
            for row in rows:  # what is left of a mixture has the tokenizer too
                with contextlib.suppress(UserError, OSError):
                    return data_at(checkpoint, config, row), ""
        return data_at(checkpoint, config, place), ""
    except _RemoteData as error:
        if place is not None:
            raise UserError(f"--data {place}: is behind a URL; name a local copy") from None
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
    locations = config.data.locations
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
