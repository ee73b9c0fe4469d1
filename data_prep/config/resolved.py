"""From a config to the files that it means: the raw files of each split, the model, the folder, and what is
recorded."""

import hashlib
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import DataError, PassingError
from common.folders import expanded
from common.limits import usable_cores
from common.paths import REPOSITORY
from common.splits import SPLITS, SourceSplit, SplitName
from common.urls import URL, without_secrets
from data_prep.config.schema import DataConfig
from data_prep.raw.documents import ORIGINS
from data_prep.raw.locations import InputFile, RemoteFile, expand, is_file, match
from data_prep.raw.megatron_index import bin_pattern, index_of
from data_prep.work.folder import WORK


@dataclass(frozen=True, kw_only=True)
class Source:
    """One raw file and where its documents go (`hash`: by the hash of their text; `position`: by their place in
    the file)."""

    path: InputFile
    split: SourceSplit
    name: str
    """Its name in records: the file name, preceded by folders if several files have that name."""


@dataclass(frozen=True, kw_only=True)
class ResolvedConfig:
    """A config with every path resolved. Making one reads no data and writes nothing."""

    config: DataConfig
    sources: tuple[Source, ...]
    """Raw files in reading order; train first."""
    output: Path
    """Folder to write to; it may not exist yet."""
    external_model: Path | None
    """The existing SentencePiece model to use, or None to train one."""
    unread: int = 0
    """Files of `input` that max_input_files leaves out."""

    @property
    def work(self) -> Path:
        """Folder of the finished pieces of every stage."""
        return self.output / WORK

    @property
    def workers(self) -> int:
        """Number of processes, 0 resolved."""
        return self.config.workers or usable_cores()

    @property
    def validation_fraction(self) -> float:
        """The fraction that goes to validation by hash; 0 with predefined splits, and where files are divided."""
        predefined = self.config.validation_input or self.config.format == "enwik8" or self.config.held_out_of_files
        return 0.0 if predefined else self.config.validation_fraction

    @property
    def splits(self) -> tuple[SplitName, ...]:
        """The splits to write: test only if the input has one."""
        has_test = self.config.test_input or (self.config.format == "enwik8" and self.config.enwik8_split_bytes[2] > 0)
        return SPLITS if has_test else ("train", "validation")

    @property
    def may_encode_while_reading(self) -> bool:
        """Whether text can be encoded while it is read: the tokenizer exists already, no stage comes between reading
        and encoding, and the text is not kept for other settings."""
        config = self.config
        given = self.external_model is not None or not config.tokenizer.has_file
        return given and config.filter is None and config.dedup is None and not config.keep_work

    def tokenizer_settings(self) -> dict[str, Any]:
        """What decides the tokenizer: the hash of an existing model, or how it is trained."""
        settings = self.config.tokenizer
        if settings.type == "ids":
            return {"type": "ids", "name": settings.name, "vocab_size": settings.vocab_size}
        if not settings.has_model:
            return {"type": settings.type}
        if self.external_model is not None:
            digest = hashlib.sha256(self.external_model.read_bytes()).hexdigest()
            return {"model_sha256": digest, **settings.encoding_settings()}
        return settings.training_settings()

    def recorded_config(self) -> dict[str, Any]:
        """Every setting that changes the output: no paths, no workers."""
        settings: dict[str, Any] = {
            "format": self.config.format,
            "validation_fraction": self.validation_fraction,
            "tokenizer": self.tokenizer_settings(),
            "shard": self.config.shard.model_dump(mode="json"),
            **self.config.stage_settings(),
        }
        if self.config.format == "enwik8":
            settings["split_bytes"] = list(self.config.enwik8_split_bytes)
        return settings


def resolve(config: DataConfig) -> ResolvedConfig:
    """Finds the files of a config. Raises DataError with the key and the pattern that found nothing."""
    origin = ORIGINS.get(config.format)
    if origin and config.input[0].endswith(".tokens"):
        origin = origin.replace("-raw-", "-")  # the archive of the files with <unk>
    patterns = {"input": config.input, "validation_input": config.validation_input, "test_input": config.test_input}
    if config.format == "megatron":
        patterns = {key: tuple(map(bin_pattern, value)) for key, value in patterns.items()}
    found = {key: _find(key, value, origin=origin) for key, value in patterns.items()}
    matched = len(found["input"])
    found["input"] = found["input"][: config.max_input_files]
    unread = matched - len(found["input"])
    if config.format == "megatron":
        found = {key: _with_indexes(key, value) for key, value in found.items()}
    _check_once(found, format=config.format)
    model = None
    if config.tokenizer.model is not None:
        model = _existing(config.tokenizer.model)
        if not model.is_file():
            raise DataError(f"tokenizer.model: no file {config.tokenizer.model}; null trains a new one")
    train_split: SourceSplit = "train" if found["validation_input"] else "hash"
    if config.format == "enwik8" or config.validation_from == "end":
        train_split = "position"
    names = _names([path for paths in found.values() for path in paths])
    splits: dict[str, SourceSplit] = {"input": train_split, "validation_input": "validation", "test_input": "test"}
    return ResolvedConfig(
        config=config,
        sources=tuple(
            Source(path=path, split=splits[key], name=names[path]) for key, paths in found.items() for path in paths
        ),
        output=output_folder(config),
        external_model=model,
        unread=unread,
    )


def _with_indexes(key: str, files: list[InputFile]) -> list[InputFile]:
    """Each .bin file of Megatron-LM and its index, which is a raw file too: its hash is recorded and compared."""
    paths = [path for path in files if isinstance(path, Path)]
    if missing := next((path for path in paths if not index_of(path).is_file()), None):
        raise DataError(f"{key}: {missing} has no index beside it; fetch {index_of(missing).name} too")
    return [file for path in paths for file in (path, index_of(path))]


def output_folder(config: DataConfig) -> Path:
    """The absolute path of `output`; ~ is the user's home. Raises DataError."""
    return expanded(config.output, "output")


def _check_once(found: dict[str, list[InputFile]], *, format: str) -> None:
    """No file may be used twice, except a wikitext zip, which holds a member for each split."""
    seen: dict[InputFile, str] = {}
    for key, path in [(key, path) for key, paths in found.items() for path in paths]:
        real = path.resolve()
        if real in seen and not (format == "wikitext" and path.suffix == ".zip" and seen[real] != key):
            raise DataError(f"{path} is matched twice, by `{seen[real]}` and `{key}`; keep it in one of them, once")
        seen[real] = key
    if format == "enwik8" and len(found["input"]) != 1:
        raise DataError(f"input: format enwik8 is one file, {len(found['input'])} are matched; name that one")


def _names(paths: Sequence[InputFile]) -> dict[InputFile, str]:
    """The name of each file, preceded by just enough folders to tell it from others of that name (2019/a.gz,
    2020/a.gz), so that records do not depend on where the dumps lie. Bytes that are not UTF-8 are written as \\xff, and
    the query of a URL is left out; files that differ only in these are numbered."""
    folders: dict[InputFile, list[str]] = {}
    by_name: dict[str, list[InputFile]] = {}
    for path in dict.fromkeys(paths):
        folders[path] = _readable(path).strip("/").split("/")
        by_name.setdefault(folders[path][-1], []).append(path)
    names: dict[InputFile, str] = {}
    for same in by_name.values():
        told_apart = [
            len({tuple(folders[path][-depth:]) for path in same})
            for depth in range(1, max(len(folders[path]) for path in same) + 1)
        ]
        depth = 1 + told_apart.index(max(told_apart))
        seen: dict[str, int] = {}
        for path in same:
            name = "/".join(folders[path][-depth:])
            seen[name] = seen.get(name, 0) + 1
            names[path] = name if seen[name] == 1 else f"{name}~{seen[name]}"
    return names


def _readable(path: InputFile) -> str:
    """Where a file lies, in characters that every record can hold."""
    if isinstance(path, Path):
        return os.fsencode(path.absolute()).decode("utf-8", errors="backslashreplace")
    return str(path) if isinstance(path, RemoteFile) else path.name


def _existing(path: str) -> Path:
    """The path itself (`~` is the home folder), or below the repository root if there is nothing at the path
    itself."""
    found = next((Path(name) for name in (path, os.path.expanduser(path)) if Path(name).exists()), None)
    return found or REPOSITORY / path


def _find(key: str, patterns: tuple[str, ...], *, origin: str | None) -> list[InputFile]:
    """Files in the order of the patterns, each pattern sorted; every pattern must find something. `origin`: where
    a corpus comes from, for the message."""
    files: list[InputFile] = []
    for pattern in itertools.chain.from_iterable(map(expand, patterns)):
        try:
            found = match(Path(), pattern) or match(REPOSITORY, pattern)
        except PassingError:
            raise
        except DataError as error:
            raise DataError(f"{key}: {error}") from None
        for path in found:  # git-annex and DVC leave a dead link for content that is not fetched
            if isinstance(path, Path) and not path.exists():
                raise DataError(
                    f"{key}: {path} is a link to a file that is not there; fetch that file or drop the link"
                )
        matched = [path for path in found if is_file(path)]
        if not matched:
            what = "matches no file"
            if any(isinstance(path, Path) and not path.is_dir() for path in found):
                what = "is a device or a named pipe; write the command that feeds it as pipe:COMMAND"
            elif found:
                what = "is a folder; name its files, for example with a glob"
            fix = f"; fetch {origin} and unpack it there, or name the zip itself" if origin else ""
            folders = " and in ".join(dict.fromkeys([str(Path.cwd()), str(REPOSITORY)]))
            if URL.match(pattern):
                raise DataError(f"{key}: {without_secrets(pattern)!r} {what}")
            raise DataError(f"{key}: {pattern!r} {what} (looked in {folders}){fix}")
        files += matched
    return files
