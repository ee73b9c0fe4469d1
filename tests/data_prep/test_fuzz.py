"""Generated corruptions of dumps, shards, indexes and manifests: each is refused or quarantined with its place, or
changes no document; nothing crashes."""

import gzip
import json
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest

from common.errors import DataError
from data_prep.config.schema import DataConfig
from data_prep.raw.documents import RawFile
from data_prep.raw.records import Document, Rejected
from data_prep.shards.format import Manifest
from data_prep.shards.reader import SplitReader
from data_prep.stages.ingest import IngestTask, RawInput, ingest_batch, quarantine_file, read_state
from data_prep.work.parts import read_documents, read_index
from tests.data_prep.conftest import c4_line, make_texts, pes2o_line, write_dump

DUMPS, LINES, PREPARED = 300, 200, 300  # 2 s in all
MORE = pytest.mark.parametrize("times", [1, pytest.param(4, marks=pytest.mark.slow)])
"""The fast ones have every kind of corruption in every kind of file."""


def corrupt(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """One corruption of some bytes, and its kind; the result differs."""
    while True:
        start = rng.randrange(len(data))
        stop = min(len(data), start + rng.choice([1, 2, 7, 64, 512]))
        noise = rng.randbytes(stop - start)
        kind, result = rng.choice(
            [
                ("bit", data[:start] + bytes([data[start] ^ 1 << rng.randrange(8)]) + data[start + 1 :]),
                ("overwrite", data[:start] + noise + data[stop:]),
                ("zeros", data[:start] + bytes(stop - start) + data[stop:]),
                ("cut", data[:start]),
                ("remove", data[:start] + data[stop:]),
                ("insert", data[:start] + noise + data[start:]),
                ("repeat", data[:stop] + data[start:]),
                ("append", data + noise),
                ("header", bytes([*data[: start % 12], rng.randrange(256), *data[start % 12 + 1 :]])),
            ]
        )
        if result != data:
            return kind, result


@MORE
def test_corrupt_dumps_are_quarantined_whole_or_unchanged(tmp_path: Path, times: int) -> None:
    texts = [text for text in make_texts(12, seed=1) if text]
    whole = write_dump(tmp_path / "raw" / "c4.json.gz", [c4_line(text) for text in texts]).read_bytes()
    folder = tmp_path / "work"
    folder.mkdir()
    outcomes: Counter[str] = Counter()
    for number in range(times * DUMPS):
        kind, data = corrupt(whole, random.Random(number))
        path = tmp_path / "raw" / "c4.json.gz"
        path.write_bytes(data)
        task = IngestTask(
            config=DataConfig(input=(str(path),), output=str(tmp_path / "out")),
            files=(RawInput(raw=path, name=path.name, size=len(data)),),
            split="train",
            folder=folder,
            key=f"{number}",
            part_bytes=1 << 20,
        )
        ingest_batch(task)
        batch = read_state(task)
        assert batch is not None
        (state,) = batch.files
        found = []
        for part in batch.parts:
            documents = read_documents(folder, part.name, read_index(folder, part.name).size)
            found += [document.decode() for document in documents]
        quarantine = [json.loads(line) for line in quarantine_file(task).read_text().splitlines()]
        if state.damaged:
            assert found == [] and state.rejected == {"damaged file": 1}
            assert [(line["file"], line["reason"]) for line in quarantine] == [("c4.json.gz", "damaged file")]
            assert "line" in quarantine[0]
            outcomes["quarantined"] += 1
        else:
            # Only what says nothing about the content: time stamp, flags, name of the operating system, zeros behind.
            assert found == texts and quarantine == [], (number, kind)
            outcomes["harmless"] += 1
    assert outcomes["quarantined"] > 0.8 * sum(outcomes.values())


@MORE
def test_a_corrupt_line_is_quarantined_with_its_number_and_costs_no_other(tmp_path: Path, times: int) -> None:
    texts = [f"{number} " + text for number, text in enumerate(make_texts(12, seed=2))]
    lines = [json.dumps(pes2o_line(text)).encode() for text in texts]
    reasons: Counter[str] = Counter()
    for number in range(times * LINES):
        rng = random.Random(number)
        position = rng.randrange(len(lines))
        _, bad = corrupt(lines[position], rng)
        bad = bad.replace(b"\n", b" ")
        path = tmp_path / "a.json.gz"
        path.write_bytes(gzip.compress(b"\n".join([*lines[:position], bad, *lines[position + 1 :]]) + b"\n"))
        records = {record.position: record for record in RawFile(path).read()}
        for line, text in enumerate(texts, 1):
            record = records.pop(line, None)
            if line == position + 1:
                if isinstance(record, Rejected):
                    reasons[record.reason] += 1
                # else still JSON: another text, which no reader can know, or the line is blank now
            else:
                assert isinstance(record, Document) and record.data.decode() == text
        assert not records
    assert {"not JSON", "not UTF-8"} <= reasons.keys()


def all_documents(folder: Path) -> list[list[int]]:
    manifest = Manifest.load(folder)
    manifest.check("full")
    found = []
    for split in manifest.splits:
        with SplitReader(manifest, split, verify_on_first_read=True) as reader:
            found += [reader.document(number).tolist() for number in range(reader.num_documents)]
    return found


@MORE
def test_corrupt_prepared_data_are_refused_with_the_file(prepared_once: Path, tmp_path: Path, times: int) -> None:
    folder = Path(shutil.copytree(prepared_once, tmp_path / "data"))
    expected = all_documents(folder)
    names = ["train-00000.tar", "train-00001.idx.safetensors", "validation-00000.tar", "manifest.json",
             "tokenizer.model", "quarantine.jsonl"]  # fmt: skip
    refused: Counter[str] = Counter()
    for number in range(times * PREPARED):
        rng = random.Random(number)
        path = folder / names[number % len(names)]
        whole = path.read_bytes()
        path.write_bytes(corrupt(whole, rng)[1])
        message = ""
        try:
            assert all_documents(folder) == expected
        except DataError as error:
            message = str(error)
            refused[path.name] += 1
        # Harmless is at most another blank between two values of the manifest.
        assert path.name in message or (path.name == "manifest.json" and not message)
        path.write_bytes(whole)
    assert refused.keys() == set(names)
    assert all(count == times * PREPARED // len(names) for name, count in refused.items() if name != "manifest.json")
    assert refused["manifest.json"] > 0.9 * times * PREPARED / len(names)
