"""The peak memory of a whole preparation for growing inputs, for benchmarks/data/preparation.py."""

from __future__ import annotations

import gzip
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from benchmarks.data.peers import VOCAB_SIZE
from benchmarks.data.process_cost import prepare
from benchmarks.marked import markdown

DIGITS = str.maketrans("1234567890", "abcdefghij")
HEADER = ["text MB", "peak MB", "over the first", "CPU s"]


def memory(paths: list[Path], work: Path, sizes: list[int], workers: int, *, filters: bool) -> dict[str, Any]:
    """The peak memory of a whole run with deduplication and `filters`, for each size in MB of text."""
    runs = []
    for size in sizes:
        inputs = _inputs_of_size(paths, work / f"input-{size}", size * 1_000_000)
        keys: dict[str, Any] = {"dedup": {}, "tokenizer": {"vocab_size": VOCAB_SIZE}}
        if filters:
            keys["filter"] = {"language": "en", "c4": False}
        cost = prepare(work, f"memory-{size}", inputs, workers=workers, **keys)
        shutil.rmtree(work / f"input-{size}")
        print(f"{size} MB: peak {cost.peak_bytes / 1e6:.0f} MB", file=sys.stderr, flush=True)
        runs.append({"text_mb": size, **cost._asdict()})
    return {"workers": workers, "filters": filters, "runs": runs}


def rows(found: Any) -> list[list[str]]:
    first = found["runs"][0]["peak_bytes"]
    return [
        [
            str(run["text_mb"]),
            f"{run['peak_bytes'] / 1e6:.0f}",
            f"{run['peak_bytes'] / first:.2f}",
            f"{run['cpu_seconds']:.0f}",
        ]
        for run in found["runs"]
    ]


def page(found: Any) -> str:
    """The table of docs/benchmarks.md."""
    return markdown(HEADER, rows(found))


def _inputs_of_size(paths: list[Path], folder: Path, size: int) -> list[Path]:
    """Files with `size` bytes of text: the documents over and over, from the second time with every 5th word changed,
    so that they stay apart as documents and mostly as near-duplicates too."""
    folder.mkdir()
    written, round_number = 0, 0
    inputs: list[Path] = []
    while written < size:
        for path in paths:
            if written >= size:
                break
            inputs.append(folder / f"c4-{len(inputs):05d}.json.gz")
            with gzip.open(path, "rt", encoding="utf-8") as source, gzip.open(inputs[-1], "wt", 1) as target:
                for line in source:
                    record = json.loads(line)
                    words = record["text"].split(" ")
                    if round_number:
                        words[::5] = [word + str(round_number).translate(DIGITS) for word in words[::5]]
                    record["text"] = " ".join(words)
                    target.write(json.dumps(record) + "\n")
                    written += len(record["text"].encode())
                    if written >= size:
                        break
        round_number += 1
    return inputs
