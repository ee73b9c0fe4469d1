"""From a config to the files it means: which raw files go to which split, which model, which folder, what is
recorded."""

import glob
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data_prep.config import REPOSITORY, DataConfig
from data_prep.documents import RawFile
from data_prep.shard_format import DataError


@dataclass(frozen=True, kw_only=True)
class Source:
    """One raw file and where its documents go (`hash`: by the hash of their text)."""

    path: Path
    split: Literal["train", "validation", "hash"]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A config with every path resolved. Making one reads no data and writes nothing."""

    config: DataConfig
    sources: tuple[Source, ...]
    """Raw files in reading order; train first."""
    output: Path
    """Folder to write to; it may not exist yet."""
    external_model: Path | None
    """The existing SentencePiece model to use, or None to train one."""

    @property
    def workers(self) -> int:
        """Number of tokenising processes, 0 resolved."""
        # The CPUs that SLURM or taskset left to this process; macOS has no such call.
        available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return self.config.workers or available or 1

    @property
    def validation_fraction(self) -> float:
        """The fraction that goes to validation by hash; 0 with separate validation files."""
        return 0.0 if self.config.validation_input else self.config.validation_fraction

    def raw_files(self) -> list[RawFile]:
        """A fresh reader for every source, in order."""
        return [
            RawFile(source.path, source=number, format=self.config.format) for number, source in enumerate(self.sources)
        ]

    def training_files(self) -> list[RawFile]:
        """The raw files that a tokenizer is trained on: all but those of the validation split."""
        return [raw for raw in self.raw_files() if self.sources[raw.source].split != "validation"]

    def tokenizer_settings(self) -> dict[str, Any]:
        """What decides the tokenizer: the hash of an existing model, or how it is trained."""
        if self.external_model is not None:
            return {"model_sha256": hashlib.sha256(self.external_model.read_bytes()).hexdigest()}
        return self.config.tokenizer.model_dump(mode="json", exclude={"model"})

    def recorded_config(self) -> dict[str, Any]:
        """Every setting that changes the output: no paths, no workers."""
        return {
            "format": self.config.format,
            "validation_fraction": self.validation_fraction,
            "tokenizer": self.tokenizer_settings(),
            "shard": self.config.shard.model_dump(mode="json"),
        }


def make_plan(config: DataConfig) -> Plan:
    """Finds the files of a config. Raises DataError with the key and the pattern that found nothing."""
    train = _find("input", config.input)
    validation = _find("validation_input", config.validation_input)
    seen: dict[Path, str] = {}
    for key, path in [("input", p) for p in train] + [("validation_input", p) for p in validation]:
        real = path.resolve()
        if real in seen:
            raise DataError(f"{path} is matched twice, by `{seen[real]}` and `{key}`; keep it in one of them, once")
        seen[real] = key
    model = None
    if config.tokenizer.model is not None:
        model = _existing(config.tokenizer.model)
        if not model.is_file():
            raise DataError(f"tokenizer.model: no file {config.tokenizer.model}; null trains a new one")
    train_split: Literal["train", "hash"] = "train" if validation else "hash"
    return Plan(
        config=config,
        sources=(
            *(Source(path=path, split=train_split) for path in train),
            *(Source(path=path, split="validation") for path in validation),
        ),
        output=Path(config.output).absolute(),
        external_model=model,
    )


def _existing(path: str) -> Path:
    """The path itself, or below the repository root if there is nothing at the path itself."""
    return Path(path) if Path(path).exists() else REPOSITORY / path


def _find(key: str, patterns: tuple[str, ...]) -> list[Path]:
    """Files in the order of the patterns, each pattern sorted; every pattern must find something."""
    files: list[Path] = []
    for pattern in patterns:
        found = _match(Path(), pattern) or _match(REPOSITORY, pattern)
        matched = [path for path in found if path.is_file()]
        if not matched:
            what = "is a folder; name its files, for example with a glob" if found else "matches no file"
            raise DataError(f"{key}: {pattern!r} {what} (looked in {Path.cwd()} and in {REPOSITORY})")
        files += matched
    return files


def _match(root: Path, pattern: str) -> list[Path]:
    """What a pattern finds below a root, sorted. A name that exists is meant literally, even with
    [brackets]."""
    whole = root / pattern
    return [whole] if whole.exists() else [Path(name) for name in sorted(glob.glob(str(whole), recursive=True))]
