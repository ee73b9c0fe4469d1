"""Small dumps in the real formats, written by the tests, and data prepared from them once."""

import gzip
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from data_prep.cli import main
from data_prep.shards.format import Manifest

VOCABULARY = (
    "the shard holds tokens of many documents and every reader checks its hash before use while experts "
    "route each token to few values; attention heads select keys 0 1 2 3 42 2048 naïve café größe 中文 "
    "данные 🙂 window batch stream order index manifest"
)
WORDS = VOCABULARY.split()


def make_texts(count: int, *, seed: int) -> list[str]:
    """Texts with what breaks tokenizers: newlines, runs of spaces, U+2581, emoji, empty and long
    documents."""
    rng = random.Random(seed)
    odd = ["\n", "\n\n", "  ", "    ", "\t", "▁", "\r\n", "\x00", "</s>", "\u200b", " ▁ "]
    texts = []
    for number in range(count):
        parts = [rng.choice(WORDS) + " " for _ in range(rng.randint(1, 60))]
        parts += [rng.choice(odd) for _ in range(rng.randint(0, 4))]
        rng.shuffle(parts)
        texts.append(f"{number} " + "".join(parts))
    return [*texts, "", " leading and trailing ", "word " * 3000]


def c4_line(text: str) -> dict[str, Any]:
    return {"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": "https://example.org/a"}


def pes2o_line(text: str) -> dict[str, Any]:
    dates = {"added": "2022-11-29T00:00:00Z", "created": "2019-06-01T00:00:00Z"}
    return {**dates, "id": "1", "source": "s2ag/train", "text": text, "version": "v2"}


def write_dump(path: Path, lines: list[Any]) -> Path:
    """Writes one JSON value a line, gzipped without a time stamp; bytes lines are written as they are."""
    data = b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data, mtime=0))
    return path


@dataclass(frozen=True)
class Corpus:
    """A dump folder, its config and the texts in the order in which they must come back. Each dump also holds an empty
    document, which must not."""

    folder: Path
    config: dict[str, Any]
    train: list[str]
    validation: list[str]

    def write_config(self, path: Path, **changes: Any) -> Path:
        path.write_text(json.dumps({**self.config, **changes}))
        return path


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Two C4 files and one peS2o file for train, one of each for validation; small shards and members."""
    folder = tmp_path_factory.mktemp("raw")
    parts = [make_texts(60, seed=seed) for seed in range(5)]
    write_dump(folder / "c4" / "c4-train.00000-of-00002.json.gz", [c4_line(text) for text in parts[0]])
    write_dump(folder / "c4" / "c4-train.00001-of-00002.json.gz", [c4_line(text) for text in parts[1]])
    write_dump(folder / "pes2o" / "train-00000.json.gz", [pes2o_line(text) for text in parts[2]])
    write_dump(folder / "c4" / "c4-validation.00000.json.gz", [c4_line(text) for text in parts[3]])
    write_dump(folder / "pes2o" / "valid-00000.json.gz", [pes2o_line(text) for text in parts[4]])
    config = {
        "input": [f"{folder}/c4/c4-train.*.json.gz", f"{folder}/pes2o/train-*.json.gz"],
        "validation_input": [f"{folder}/c4/c4-validation.*.json.gz", f"{folder}/pes2o/valid-*.json.gz"],
        "output": str(folder / "unused"),
        "workers": 1,
        "tokenizer": {"vocab_size": 500},
        "shard": {"tokens_per_shard": 5000, "tokens_per_member": 1024},
    }
    texts = [[text for text in part if text] for part in parts]
    return Corpus(folder, config, texts[0] + texts[1] + texts[2], texts[3] + texts[4])


@pytest.fixture(scope="session")
def prepared_once(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    config = corpus.write_config(folder / "config.json", output=str(folder / "out"))
    assert main(["run", "--config", str(config)]) == 0
    return folder / "out"


@pytest.fixture
def prepared(prepared_once: Path, tmp_path: Path) -> Path:
    """A folder of prepared data that the test may damage."""
    return Path(shutil.copytree(prepared_once, tmp_path / "prepared"))


@pytest.fixture
def manifest(prepared: Path) -> Manifest:
    return Manifest.load(prepared)


@pytest.fixture
def id_config(prepared_once: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a config with the model of the corpus and its small shards."""

    def write(**changes: Any) -> Path:
        body = {
            "output": str(tmp_path / "out"),
            "workers": 1,
            "tokenizer": {"model": str(prepared_once / "tokenizer.model")},
            "shard": {"tokens_per_shard": 5000, "tokens_per_member": 1024},
            **changes,
        }
        path = tmp_path / "config.json"
        path.write_text(json.dumps(body))
        return path

    return write


@pytest.fixture
def prepare_ids(id_config: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Runs a preparation; the folder of its data."""

    def run(**changes: Any) -> Path:
        assert main(["run", "--config", str(id_config(**changes))]) == 0
        return tmp_path / "out"

    return run
