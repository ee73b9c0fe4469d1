"""A small prepared corpus for tests: generated documents in C4 format, through the real data_prep."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import shutil
from pathlib import Path

from data_prep.cli import main as data_prep
from data_prep.shards.format import manifest_digest

VOCAB_SIZE = 400


def write_dump(path: Path, *, documents: int, seed: int) -> None:
    """A C4-format json.gz of sentences drawn from a skewed vocabulary of 200 invented words."""
    draw = random.Random(seed)
    letters = random.Random(0)
    words = [
        "".join(letters.choice("abcdefghijklmnoprstuvw") for _ in range(letters.randint(2, 8))) for _ in range(200)
    ]
    weights = [1 / (rank + 1) for rank in range(len(words))]
    with gzip.open(path, "wt", encoding="utf-8") as file:
        for number in range(documents):
            sentences = [
                " ".join(draw.choices(words, weights, k=draw.randint(4, 12))) for _ in range(draw.randint(2, 8))
            ]
            row = {"text": ".\n".join(sentences), "timestamp": "2024-01-01T00:00:00Z", "url": f"urn:test:{number}"}
            file.write(json.dumps(row) + "\n")


def prepare_corpus(
    folder: Path,
    *,
    seed: int = 0,
    name: str = "prepared",
    documents: int = 800,
    test_documents: int = 0,
    tokenizer: Path | None = None,
) -> Path:
    """Writes dumps under `folder` and prepares them, with a test split if it is to have documents, and with a tokenizer
    that is there already if one is named; returns the folder of the manifest."""
    folder.mkdir(exist_ok=True)
    write_dump(folder / "c4-train.json.gz", documents=documents, seed=seed)
    write_dump(folder / "c4-validation.json.gz", documents=60, seed=seed + 1)
    config = {
        "input": [str(folder / "c4-train.json.gz")],
        "validation_input": [str(folder / "c4-validation.json.gz")],
        "output": str(folder / name),
        "workers": 1,
        "tokenizer": {"vocab_size": VOCAB_SIZE} if tokenizer is None else {"model": str(tokenizer)},
        # Several shards and members, so that windows cross their borders.
        "shard": {"tokens_per_shard": 24_000, "tokens_per_member": 5_000},
    }
    if test_documents:
        write_dump(folder / "c4-test.json.gz", documents=test_documents, seed=seed + 2)
        config["test_input"] = str(folder / "c4-test.json.gz")
    (folder / "data.json").write_text(json.dumps(config))
    assert data_prep(["run", "--config", str(folder / "data.json")]) == 0
    return folder / name


def with_another_tokenizer(data: Path, copy: Path) -> None:
    """A copy of a data set whose ids were made by another tokenizer, as its manifest has it."""
    shutil.copytree(data, copy)
    tokenizer = (copy / "tokenizer.model").read_bytes() + b"\0"
    (copy / "tokenizer.model").write_bytes(tokenizer)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["tokenizer"]["sha256"] = hashlib.sha256(tokenizer).hexdigest()
    manifest["digest"] = manifest_digest(manifest)
    (copy / "manifest.json").write_text(json.dumps(manifest))
