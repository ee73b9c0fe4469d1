"""The data sets of a run: one manifest, or several that are mixed by weight."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from data_prep.shards.cache import ShardCache
from data_prep.shards.format import Manifest, TokenizerEntry
from common.urls import URL
from pretrain.config.schema import Config
from pretrain.data.windows import MixedReader, WindowReader, Windows, num_windows
from common.errors import UserError
from pretrain.config.source_weights import whole_weights
from common.paths import find_input
from pretrain.config.rules import folder_name, source_names


@dataclass(frozen=True)
class Source:
    """One data set of a run."""

    key: str
    """Its key in the configuration, for messages."""
    name: str
    manifest: Manifest
    weight: int
    """How often it is chosen in a period of the schedule."""
    cache: ShardCache | None = None
    """Where its shards are kept, if the data set is behind a URL."""


@dataclass(frozen=True)
class Sources:
    """All data sets of a run, which share a tokenizer."""

    sources: tuple[Source, ...]

    @classmethod
    def load(cls, config: Config) -> Sources:
        """Loads every manifest. Raises UserError or DataError; reads no shard."""
        data = config.data
        if not data.sources:
            manifest, cache = _load(data.manifest, "data.manifest", config)
            return cls((Source("data.manifest", folder_name(data.manifest), manifest, 1, cache),))
        weights = whole_weights([source.weight for source in data.sources])
        keys = [f"data.sources.{index}.manifest" for index in range(len(weights))]
        loaded = [_load(source.manifest, key, config) for source, key in zip(data.sources, keys, strict=True)]
        manifests, caches = zip(*loaded, strict=True)
        for key, manifest in zip(keys, manifests, strict=True):
            if manifest.tokenizer.sha256 != manifests[0].tokenizer.sha256:
                raise UserError(
                    f"{key}: {manifest.folder} was made with another tokenizer (sha256 "
                    f"{_short(manifest.tokenizer)}) than {manifests[0].folder} ({_short(manifests[0].tokenizer)}), so "
                    f"its ids mean other pieces; prepare one of them again with the other's tokenizer"
                )
            same = next(k for k, other in zip(keys, manifests, strict=True) if other.digest == manifest.digest)
            if same != key:
                raise UserError(f"{key}: is the same data set as {same}; name it once, with the sum of the weights")
        return cls(tuple(map(Source, keys, source_names(config), manifests, weights, caches)))

    @property
    def key(self) -> str:
        """The configuration key that decides what is read."""
        return "data.manifest" if self.sources[0].key == "data.manifest" else "data.sources"

    @property
    def digest(self) -> str:
        """Identifies what training reads: the digest of the only manifest, or of the digests and weights of several, in
        order."""
        if len(self.sources) == 1:
            return self.sources[0].manifest.digest
        parts = [[source.manifest.digest, source.weight] for source in self.sources]
        return hashlib.sha256(json.dumps(parts, separators=(",", ":")).encode()).hexdigest()

    @property
    def tokenizer(self) -> TokenizerEntry:
        """The one tokenizer."""
        return self.sources[0].manifest.tokenizer

    def check(self, level: Literal["size", "full"], show_progress: bool = False) -> None:
        """Calls `Manifest.check` of each data set that is not behind a URL; a shard behind a URL is checked when it is
        fetched."""
        for source in self.sources:
            if source.cache is None:
                source.manifest.check(level, show_progress)

    def reader(self, split: str, config: Config) -> Windows:
        """Reads windows of a split of all sources."""
        readers = [
            WindowReader(
                source.manifest,
                split,
                config.model.sequence_length,
                # A cache hashes what it fetches and what it finds.
                verify_on_first_read=config.data.verify == "size" and source.cache is None,
                hold=source.cache.hold if source.cache else None,
                max_tokens=config.data.max_tokens if split == "train" else None,
            )
            for source in self.sources
        ]
        return readers[0] if len(readers) == 1 else MixedReader(readers)


def open_sources(config: Config) -> Sources:
    """Loads the manifests and checks what needs no shard to be read: the splits are there and fit the model."""
    sources = Sources.load(config)
    vocab_size = sources.tokenizer.vocab_size
    if vocab_size > config.model.vocab_size:
        raise UserError(
            f"model.vocab_size: {config.model.vocab_size} rows cannot hold the tokenizer's {vocab_size} pieces; set it "
            f"to {vocab_size} or more"
        )
    for source in sources.sources:
        _check_splits(source, config)
        _check_train_tokens(source.manifest, config)
    return sources


def _check_splits(source: Source, config: Config) -> None:
    """Checks that the splits that the run reads exist and have at least one window each."""
    manifest, T, held_out = source.manifest, config.model.sequence_length, config.evaluate.split
    if config.evaluate.sequences and held_out not in manifest.splits:
        raise UserError(
            f"evaluate.split: {manifest.folder} has no {held_out} split, only {' and '.join(manifest.splits)}; set it "
            f"to validation, or prepare the data with a test_input"
        )
    for split in ("train", held_out) if config.evaluate.sequences else ("train",):
        if num_windows(manifest, split, T) < 1:
            raise UserError(
                f"{source.key}: the {split} split of {manifest.folder} holds {manifest.num_tokens(split)} tokens, "
                f"fewer than one window of model.sequence_length + 1 = {T + 1}; prepare more text or shorten the "
                f"model's sequences" + ("" if split == "train" else ", or set evaluate.sequences to 0")
            )


def _check_train_tokens(manifest: Manifest, config: Config) -> None:
    """Checks that the train split has data.max_tokens tokens and a window for each stream."""
    T, most, streams = config.model.sequence_length, config.data.max_tokens, config.batch.global_sequences
    windows = num_windows(manifest, "train", T, max_tokens=most)
    if most is not None and windows < most // T:
        raise UserError(
            f"data.max_tokens: the run would read the first {most:,} tokens, but the train split of {manifest.folder} "
            f"holds {manifest.num_tokens('train'):,}; prepare more raw files (max_input_files of its configuration), "
            f"or set data.max_tokens to null"
        )
    if config.reads_streams and windows < streams:
        what = "streams with memory" if config.model.memory_length else "streams"
        raise UserError(
            f"batch.global_sequences: {streams} {what} need a window each, but training reads only {windows} windows "
            f"of model.sequence_length = {T} from {manifest.folder}; prepare more text, or lower one of the two"
        )
    if windows < 1:
        raise UserError(f"data.max_tokens: {most} is less than one window of model.sequence_length = {T}; raise it")


def _load(location: str, key: str, config: Config) -> tuple[Manifest, ShardCache | None]:
    if URL.match(location):
        assert config.data.cache_dir is not None  # rules.py
        folder = Path(os.path.expanduser(config.data.cache_dir)).absolute()
        cache = ShardCache(location, folder, config.data.cache_bytes)
        return cache.manifest, cache
    path = find_input(location)
    if not os.path.exists(path):
        recipe = f"configs/data/{_below_data(location)}.json"
        known = find_input(recipe).is_file()
        raise UserError(
            f"{key}: there is no {path}; prepare the data first: python -m data_prep run --config "
            f"{recipe if known else 'FILE, one of configs/data or your own'}"
        )
    return Manifest.load(path), None


def _below_data(location: str) -> str:
    """The path of a manifest's folder below data/, which is its configuration's path below configs/data (paper/c4);
    only its name if it is elsewhere."""
    path = PurePosixPath(location)
    folder = path.parent if path.suffix == ".json" else path
    return folder.relative_to("data").as_posix() if folder.parts[:1] == ("data",) else folder.name


def _short(tokenizer: TokenizerEntry) -> str:
    return tokenizer.sha256[:12] if tokenizer.sha256 else "none: bytes"
