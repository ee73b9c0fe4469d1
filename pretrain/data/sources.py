"""The data sets of a run: one manifest, or several that are mixed by weight."""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal

from common.errors import Problem, UserError, refuse
from common.open_files import allow_open_files
from common.paths import find_input
from common.splits import SplitName
from common.urls import URL
from data_prep.shards.cache import ShardCache
from data_prep.shards.format import WHOLE, Manifest, Part, TokenizerEntry, unreadable
from data_prep.shards.reader import MAX_OPEN_SHARDS, Stamp
from pretrain.config.data_rules import folder_name, source_names, whole_weights
from pretrain.config.schema import Config
from pretrain.data.patience import Patience
from pretrain.data.stages import Stage, first_stage
from pretrain.data.verified import VerifiedShard
from pretrain.data.windows import MixedReader, WindowReader, Windows, num_windows


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
    hashed: Mapping[str, Mapping[str, Stamp]] = field(default_factory=dict)
    """Digest of a manifest -> shards whose sha256 was checked at the start, each with the stamp that it had before: no
    reader hashes it while it has that."""
    verified: tuple[VerifiedShard, ...] = ()
    """On rank 0: what was hashed, or is known from an earlier start, on file systems that all nodes share."""
    patience: Patience = field(default_factory=Patience, compare=False)
    """Makes every read of them."""

    @classmethod
    def load(cls, config: Config, *, patience: Patience | None = None) -> Sources:
        """Loads every manifest. Raises UserError or DataError; reads no shard. `patience`: for this and later reads;
        None: an error is raised at once."""
        sources = cls.find(config, refuse, patience=patience)
        assert sources is not None
        return sources

    @classmethod
    def find(
        cls, config: Config, problem: Problem, *, follow_links: bool = True, patience: Patience | None = None
    ) -> Sources | None:
        """As `load`; None if `problem` took that a manifest cannot be loaded. `follow_links`: see `Manifest.load`."""
        data, patience = config.data, patience or Patience()
        keys = [f"data.sources.{index}.manifest" for index in range(len(data.sources))] or ["data.manifest"]
        names = source_names(config) or [folder_name(data.manifest)]
        weights = whole_weights([source.weight for source in data.sources]) or [1]
        found = []
        for location, key, name, weight in zip(data.locations, keys, names, weights, strict=True):
            try:
                manifest, cache = patience(functools.partial(_load, location, key, config, follow_links=follow_links))
            except UserError as error:
                problem(error)
                continue
            found.append(Source(key, name, manifest, weight, cache))
        for source in found:
            _check_beside(source, found, problem)
        return cls(tuple(found), patience=patience) if len(found) == len(keys) else None

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

    def stage(self) -> Stage:
        """The stage of a run that begins with these."""
        return first_stage(
            [source.name for source in self.sources],
            [source.manifest.digest for source in self.sources],
            [source.weight for source in self.sources],
        )

    @property
    def tokenizer(self) -> TokenizerEntry:
        return self.sources[0].manifest.tokenizer

    def check(
        self,
        level: Literal["size", "full"],
        show_progress: bool = False,
        problem: Problem = refuse,
        part_of: Callable[[Manifest], Part] = lambda manifest: WHOLE,
    ) -> None:
        """Calls `Manifest.check` of each data set that is not behind a URL, with this process's part of it; a shard
        behind a URL is checked when it is fetched."""
        for source in self.sources:
            if source.cache is None:
                part = part_of(source.manifest)
                source.manifest.check(level, show_progress, problem, part, self.patience)

    def reader(self, split: str, config: Config) -> Windows:
        """Reads windows of a split of all sources."""
        max_open_shards = open_shards_each(len(self.sources))
        readers = [
            WindowReader(
                source.manifest,
                split,
                config.model.sequence_length,
                hold=source.cache.hold if source.cache else None,  # which hashes what it fetches and what it finds
                max_tokens=config.data.max_tokens if split == "train" else None,
                max_open_shards=max_open_shards,
            )
            for source in self.sources
        ]
        for reader, source in zip(readers, self.sources, strict=True):
            reader.patience = self.patience
            reader.trust(self.hashed.get(source.manifest.digest, {}))
        return readers[0] if len(readers) == 1 else MixedReader(readers)


@functools.cache  # the limit rises once
def open_shards_each(sources: int) -> int:
    """How many shards a reader of each of so many sources may keep mapped. Each holds a descriptor, so all of them, of
    two splits, take half of those that this process may have, at most; where that is too little for MAX_OPEN_SHARDS, it
    raises its limit by what they need, as far as the machine lets it."""
    wanted, limit = 2 * sources * MAX_OPEN_SHARDS, allow_open_files(0)
    spare = limit // 2
    if spare < wanted:
        spare = max(spare, allow_open_files(limit + wanted) - limit)
    return max(1, min(MAX_OPEN_SHARDS, spare // (2 * sources)))


def open_sources(config: Config) -> Sources:
    """Loads the manifests and checks what needs no shard to be read: the splits are there and fit the model."""
    sources = Sources.load(config)
    check_vocabulary(sources, config)
    for source in sources.sources:
        check_text(source, config)
    return sources


def check_vocabulary(sources: Sources, config: Config) -> None:
    """Raises UserError if the tokenizer has more pieces than the model has rows."""
    vocab_size = sources.tokenizer.vocab_size
    if vocab_size > config.model.vocab_size:
        raise UserError(
            f"model.vocab_size: {config.model.vocab_size} rows cannot hold the tokenizer's {vocab_size} pieces; set it "
            f"to {vocab_size} or more"
        )


def check_text(source: Source, config: Config) -> None:
    """Raises UserError if a split that the run reads is not there, or too short."""
    if config.evaluate.sequences:
        check_held_out(source, config)
    _check_length(source, "train", config)
    _check_train_tokens(source.manifest, config)


def _check_beside(source: Source, others: list[Source], problem: Problem) -> None:
    """All have the tokenizer of the first, and none comes twice."""
    first, same = others[0], next(other for other in others if other.manifest.digest == source.manifest.digest)
    theirs, ours = first.manifest, source.manifest
    if ours.tokenizer.sha256 != theirs.tokenizer.sha256:
        problem(
            UserError(
                f"{source.key}: {ours.folder} was made with another tokenizer (sha256 {_short(ours.tokenizer)}) than "
                f"{theirs.folder} ({_short(theirs.tokenizer)}), so its ids mean other pieces; prepare one of them "
                f"again with the other's tokenizer"
            )
        )
    if same is not source:
        problem(
            UserError(f"{source.key}: is the same data set as {same.key}; name it once, with the sum of the weights")
        )


def check_held_out(source: Source, config: Config) -> None:
    """Raises UserError if the split that is evaluated is not there, or has no window."""
    manifest, held_out = source.manifest, config.evaluate.split
    if held_out not in manifest.splits:
        raise UserError(
            f"evaluate.split: {manifest.folder} has no {held_out} split, only {' and '.join(manifest.splits)}; set it "
            f"to validation, or prepare the data with a test_input"
        )
    _check_length(source, held_out, config, ", or set evaluate.sequences to 0")


def _check_length(source: Source, split: SplitName, config: Config, remedy: str = "") -> None:
    manifest, T = source.manifest, config.model.sequence_length
    if split != "train" and not manifest.num_tokens(split):
        raise UserError(
            f"{source.key}: no document of {manifest.folder} went to {split}; prepare the data again, with a larger "
            f"validation_fraction, or with validation_from=end if it is one long text{remedy}"
        )
    if num_windows(manifest, split, T) < 1:
        raise UserError(
            f"{source.key}: the {split} split of {manifest.folder} holds {manifest.num_tokens(split)} tokens, "
            f"fewer than one window of model.sequence_length + 1 = {T + 1}; prepare more text or shorten the "
            f"model's sequences{remedy}"
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


def _load(location: str, key: str, config: Config, *, follow_links: bool) -> tuple[Manifest, ShardCache | None]:
    if URL.match(location):
        assert config.data.cache_dir is not None  # rules.py
        folder = Path(os.path.expanduser(config.data.cache_dir)).absolute()
        cache = ShardCache(location, folder, config.data.cache_bytes)
        return cache.manifest, cache
    path = find_input(location)
    if not _is_there(path):
        named = PurePosixPath(location)
        raise UserError(
            f"{key}: there is no {path}; prepare the data first: python -m data_prep run --config "
            f"{_recipe(named.parent if named.suffix == '.json' else named)}"
        )
    return Manifest.load(path, follow_links=follow_links), None


def _is_there(path: Path) -> bool:
    """As os.path.exists, which takes a file system that does not answer for a missing file. Raises UnreadableError."""
    try:
        path.stat()
    except ValueError:  # a name with a null character
        return False
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP):
            return False
        raise unreadable(path, error) from None
    return True


def _recipe(folder: PurePosixPath) -> str:
    """What prepares `folder`, of a manifest, behind `--config`: the configuration that lies below configs/data as the
    folder lies below data/ (paper/c4). For a folder elsewhere the one of its name, which has to be told the place."""
    ours = folder.parts[:1] == ("data",)
    config = f"configs/data/{folder.relative_to('data').as_posix() if ours else folder.name}.json"
    if not os.path.isfile(find_input(config)):  # pathlib's raises for a long name
        config = "FILE, one of configs/data or your own"
    return config if ours else f"{config} --set {shlex.quote(f'output={folder}')}"


def _short(tokenizer: TokenizerEntry) -> str:
    return tokenizer.sha256[:12] if tokenizer.sha256 else "none: bytes"
