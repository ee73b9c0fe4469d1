"""What a preparation has made and said, for tests."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from data_prep.cli import main
from data_prep.shards.format import Manifest
from data_prep.shards.reader import SplitReader
from data_prep.stages.tokenizer import TextTokenizer


def outputs(folder: Path) -> dict[str, str]:
    """sha256 of every file but run.json, which tells time and host."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.name not in ("run.json", ".lock", ".work", "report")
    }


def decoded(manifest: Manifest, split: str) -> list[str]:
    tokenizer = TextTokenizer.load(manifest.folder / "tokenizer.model")
    with SplitReader(manifest, split, verify_on_first_read=True) as reader:
        return [tokenizer.decode(reader.document(number)) for number in range(reader.num_documents)]


def run(config: Path, *extra: str, command: str = "run") -> int:
    return main([command, "--config", str(config), *extra])


def one_error(capsys: pytest.CaptureFixture[str]) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]
