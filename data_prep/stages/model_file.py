"""The tokenizer's file: a copy of a given model, a model that is trained, or the list of the bytes that occur."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.files import write_file, write_json
from common.hashing import sha256_file
from data_prep.config.tokenizer import TokenizerConfig
from data_prep.shards.format import BYTE_VALUES, TOKENIZER_FILE
from data_prep.stages.id_maker import symbols_of
from data_prep.stages.lossy import check_vocab_size
from data_prep.stages.tokenizer import TextTokenizer, TrainTask, train_on_sample
from data_prep.work.parallel import Workers
from data_prep.work.parts import Part

TOKENIZER_RECORD = "tokenizer.json"  # beside tokenizer.model: its hash and settings, so that `shard` can trust it


@dataclass(frozen=True, kw_only=True)
class ModelTask:
    """A tokenizer's file to make in a folder."""

    folder: Path
    config: TokenizerConfig
    settings: dict[str, Any]
    """What decides the file, for its record."""
    given: Path | None
    """The model that is there already."""
    training: TrainTask | None
    """What a model is trained on; None with a given model."""
    parts: tuple[Part, ...] = ()
    """All parts, in which bytes are counted for a tokenizer of type symbols."""

    @property
    def model(self) -> Path:
        return self.folder / TOKENIZER_FILE

    @property
    def record(self) -> Path:
        return self.folder / TOKENIZER_RECORD


def has_model(task: ModelTask) -> bool:
    """Whether the file is there: its record comes last."""
    return task.record.exists()


def make_model(task: ModelTask, workers: Workers) -> None:
    """Writes tokenizer.model, then its record."""
    if task.training is None:
        write_model(task)
    elif task.config.has_model:
        _write(task, workers.alone(train_on_sample, task.training))
    else:
        _write(task, _symbols(task, task.training))


def write_model(task: ModelTask) -> None:
    """A copy of the given model, so that it stays the same until the end."""
    assert task.given is not None, "there is nothing to copy"
    _write(task, task.given.read_bytes())


def _write(task: ModelTask, content: bytes) -> None:
    if task.config.has_model:
        name = str(task.given or TOKENIZER_FILE)
        check_vocab_size(TextTokenizer(content, name=name), task.config, name)
    write_file(task.model, content)
    write_json(task.record, {"sha256": sha256_file(task.model), "settings": task.settings}, indent=2)


def _symbols(task: ModelTask, training: TrainTask) -> bytes:
    """The byte values that occur in any split, in rising order."""
    counts = np.zeros(BYTE_VALUES, np.int64)
    for part in task.parts:
        for _, data in training.selection.documents(part):
            counts += np.bincount(np.frombuffer(data, np.uint8), minlength=BYTE_VALUES)
    return symbols_of(counts, task.config)
