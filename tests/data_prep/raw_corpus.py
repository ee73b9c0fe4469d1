"""A raw corpus with everything that goes wrong: damage, duplicates, other languages, repetition. For tests of the
stages; the good text is the project's own sample."""

import gzip
import json
from pathlib import Path
from typing import Any

from common.paths import REPOSITORY
from tests.data_prep.conftest import c4_line, pes2o_line, write_dump

SAMPLE = REPOSITORY / "data_prep" / "sample"
GERMAN = (
    "Der Zug nach Hamburg fährt heute wegen einer Störung später ab. Die Reisenden warten geduldig auf dem Bahnsteig. "
    "Viele lesen eine Zeitung oder trinken einen Kaffee. Niemand weiß genau, wann es weitergeht. "
)


def sample_texts(count: int, *, kind: str = "c4", skip: int = 0) -> list[str]:
    """English texts of the sample, of 2 to 20 KB."""
    path = next(iter(sorted((SAMPLE / kind).glob("*train*.json.gz" if kind == "c4" else "train*.json.gz"))))
    with gzip.open(path) as stream:
        lines = [next(stream) for _ in range(skip + count)]
    return [json.loads(line)["text"] for line in lines[skip:]]


def near_copy(text: str) -> str:
    """The text with a word in the middle replaced: Jaccard similarity above 0.95."""
    words = text.split(" ")
    words[len(words) // 2] = "different"
    return " ".join(words)


def write_corpus(folder: Path, *, documents: int = 60) -> dict[str, Any]:
    """Writes six raw files and returns a config without `output`."""
    texts = sample_texts(documents)
    first: list[Any] = [c4_line(text) for text in texts[: documents // 2]]
    first[5:5] = [b"{not json", c4_line(""), b'{"text": "\xff"}', {"url": "no text"}]
    write_dump(folder / "c4-train.00000.json.gz", first)
    odd = [GERMAN * 20, "spam and more spam, " * 200, "short.", texts[3], near_copy(texts[4]), near_copy(texts[20])]
    second = [c4_line(text) for text in texts[documents // 2 :] + odd]
    write_dump(folder / "c4-train.00001.json.gz", second)
    whole = write_dump(folder / "c4-train.00002.json.gz", [c4_line(text) for text in sample_texts(9, skip=documents)])
    whole.write_bytes(whole.read_bytes()[:-100])
    papers = sample_texts(documents // 4, kind="pes2o")
    write_dump(folder / "pes2o-train.json.gz", [pes2o_line(text) for text in papers])
    lines = [json.dumps({"text": text, "meta": 1}) for text in sample_texts(9, skip=documents + 20)]
    (folder / "own.jsonl").write_text("\n".join(lines))
    held_out = [c4_line(text) for text in [*sample_texts(6, skip=documents + 40), texts[7]]]
    write_dump(folder / "c4-validation.json.gz", held_out)
    return {
        "input": [f"{folder}/c4-train.*.json.gz", f"{folder}/pes2o-*.json.gz", f"{folder}/own.jsonl"],
        "validation_input": f"{folder}/c4-validation.json.gz",
        "workers": 1,
        "filter": {"language": "en", "c4": False, "samples": 2},
        "dedup": {"memory_bytes": 1_048_576},
        "tokenizer": {"vocab_size": 600, "sample_bytes": 100_000},
        "shard": {"tokens_per_shard": 40_000, "tokens_per_member": 4096},
    }


def write_config(raw: tuple[Path, dict[str, Any]], output: str, **changes: Any) -> Path:
    """`raw`: the folder of a test, and the config of the corpus in it."""
    folder, body = raw
    path = folder / f"{output}.json"
    path.write_text(json.dumps({**body, "output": str(folder / output), **changes}))
    return path
