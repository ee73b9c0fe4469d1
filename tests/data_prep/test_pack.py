"""Where shards begin and end, against a loop over documents; and the ids of a part, however many they are."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from common.splits import SPLITS
from data_prep.config.tokenizer import TokenizerConfig
from data_prep.stages import encode
from data_prep.stages.encode import PartEncoder, encoded_splits, read_tokens
from data_prep.stages.id_maker import IdRecipe
from data_prep.stages.pack import ShardTask, cut_shards, read_entry, split_totals, write_shard
from data_prep.work.parts import Part


def write_lengths(folder: Path, lengths: list[list[int]]) -> list[Part]:
    """Parts whose train documents have these lengths, as they are encoded; the other splits are empty."""
    parts = []
    for number, of_part in enumerate(lengths):
        none = np.empty(0, np.int64)
        arrays = {f"{split}_{what}": none for split in SPLITS for what in ("tokens", "bytes")}
        arrays["train_tokens"] = np.array(of_part, np.int64)
        arrays["train_bytes"] = 3 * np.array(of_part, np.int64)
        safetensors.numpy.save_file(arrays, folder / f"p{number}.safetensors")
        parts.append(Part(name=f"p{number}", documents=len(of_part), bytes=1, split="train"))
    return parts


def by_document(lengths: list[list[int]], size: int) -> list[list[tuple[int, int]]]:
    """The (part, document) of each shard: it ends with the document that takes it to `size` or beyond."""
    shards: list[list[tuple[int, int]]] = []
    filled = size
    for part, of_part in enumerate(lengths):
        for document, length in enumerate(of_part):
            if filled >= size:
                shards.append([])
                filled = 0
            shards[-1].append((part, document))
            filled += length
    return shards


@pytest.mark.parametrize("size", [1, 4, 5, 12, 1000])
def test_shards_end_where_a_loop_ends_them(tmp_path: Path, size: int) -> None:
    """Short documents, so that many end exactly at the size; parts without one, and a last shard that is not full."""
    rng = random.Random(size)
    lengths = [[], *([rng.randint(1, 5) for _ in range(rng.randint(0, 9))] for _ in range(20)), [4, 4, 4, 4], []]
    parts = write_lengths(tmp_path, lengths)
    found = list(cut_shards(parts, tmp_path, "train", size))
    documents = [
        [(int(piece.part.name[1:]), number) for piece in pieces for number in range(piece.first, piece.stop)]
        for pieces, _ in found
    ]
    assert documents == by_document(lengths, size)
    assert [tokens for _, tokens in found] == [sum(lengths[p][d] for p, d in shard) for shard in documents]
    assert not list(cut_shards(parts, tmp_path, "validation", size))
    totals = split_totals(parts, tmp_path, ("train", "validation"))
    count = sum(map(sum, lengths))
    assert totals["train"].model_dump() == {
        "documents": sum(map(len, lengths)), "tokens": count, "text_bytes": 3 * count,
    }  # fmt: skip


@pytest.mark.parametrize("length", [6, 7, 8, 9, 40])
def test_ids_are_kept_however_many_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    """Also where a document fills the array to its last place, and its end has none."""
    monkeypatch.setattr(encode, "FIRST_IDS", 8)
    settings = TokenizerConfig.model_validate({"type": "ids", "name": "x", "vocab_size": 90})
    encoder = PartEncoder(tmp_path, "p", IdRecipe(model=None, settings=settings, takes_ids=True, eos_id=1))
    documents = [np.arange(2, 2 + count).astype(np.uint16) for count in (length, 0, 1, length)]
    for ids in documents:
        encoder.add(ids.tobytes(), "train")
    encoder.add(documents[0].tobytes(), "test")
    encoder.finish()
    part = Part(name="p", documents=5, bytes=1, split="train")
    splits = encoded_splits(tmp_path, part)
    assert splits["train"].tokens.tolist() == [len(ids) + 1 for ids in documents]
    expected = np.concatenate([np.append(ids, 1) for ids in (*documents, documents[0])])
    np.testing.assert_array_equal(read_tokens(tmp_path, "p", np.dtype("uint16")), expected)
    assert splits["test"].start == len(expected) - length - 1


@pytest.mark.parametrize("gone", ["file", "index_file"])
def test_a_shard_of_which_a_file_was_moved_is_not_finished(tmp_path: Path, gone: str) -> None:
    """A kill while files are published leaves such ones."""
    settings: dict[str, Any] = {"type": "ids", "name": "x", "vocab_size": 90}
    recipe = IdRecipe(model=None, settings=TokenizerConfig.model_validate(settings), takes_ids=True, eos_id=1)
    encoder = PartEncoder(tmp_path, "p", recipe)
    encoder.add(np.arange(2, 9).astype(np.uint16).tobytes(), "train")
    encoder.finish()
    parts = [Part(name="p", documents=1, bytes=1, split="train")]
    ((pieces, tokens),) = cut_shards(parts, tmp_path, "train", 100)
    task = ShardTask(
        name="train-00000", split="train", pieces=pieces, tokens=tokens, encoded=tmp_path, folder=tmp_path,
        dtype="uint16", tokens_per_member=4,
    )  # fmt: skip
    assert read_entry(task) is None
    write_shard(task)
    entry = read_entry(task)
    assert entry is not None and (entry.tokens, entry.documents) == (8, 1)
    (tmp_path / getattr(entry, gone)).unlink()
    assert read_entry(task) is None
