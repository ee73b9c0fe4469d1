"""Data sets of Megatron-LM and arrays of ids become the shards that their text would.

megatron-core takes seconds to import, as it brings torch; so fast tests write its files with numpy, and a slow one
compares these with what megatron-core writes.
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.cli import main
from data_prep.config.tokenizer import TokenizerConfig
from data_prep.raw import token_ids
from data_prep.raw.megatron_index import MegatronIndex
from data_prep.report.show import verify
from data_prep.shards.format import Manifest
from data_prep.stages.id_maker import IdRecipe
from data_prep.stages.tokenizer import TextTokenizer
from tests.data_prep.conftest import Corpus
from tests.data_prep.id_files import (
    EOS,
    ODD,
    Prepare,
    stored_documents,
    write_llm_c,
    write_megatron,
    write_plain,
)
from tests.data_prep.kills import run_with_kills
from tests.data_prep.outcome import one_error, outputs

WRITE_AND_READ = """
import json, sys
import numpy, torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

for prefix, dtype, documents in json.load(sys.stdin):
    builder = IndexedDatasetBuilder(prefix + ".bin", dtype=getattr(numpy, dtype))
    for sentences in documents:
        for sentence in sentences:
            builder.add_item(torch.tensor(sentence, dtype=torch.int64))
        builder.end_document()
    builder.finalize(prefix + ".idx")
    data = IndexedDataset(prefix)
    ends = data.document_indices.tolist()
    print(json.dumps([int(data.sequence_lengths[a:b].sum()) for a, b in zip(ends, ends[1:])]))
"""


@pytest.mark.slow  # megatron-core imports torch; the fast tests read files that are written by its format
@pytest.mark.parametrize("dtype", ["int32", "uint16"])
def test_megatron_core_writes_the_files_of_these_tests_and_reads_the_same_lengths(dtype: str, tmp_path: Path) -> None:
    write_megatron(tmp_path / "ours", dtype, ODD)
    body = json.dumps([(str(tmp_path / "theirs"), dtype, ODD)])
    command = [sys.executable, "-c", WRITE_AND_READ]
    done = subprocess.run(command, input=body, text=True, check=True, capture_output=True)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()
    lengths = np.concatenate(list(MegatronIndex(tmp_path / "theirs.bin").lengths())).tolist()
    assert lengths == json.loads(done.stdout.splitlines()[-1]) == [sum(map(len, document)) for document in ODD]


@pytest.fixture(scope="module")
def text_documents(prepared_once: Path, corpus: Corpus) -> dict[str, list[list[int]]]:
    """The ids of the corpus's documents by split, from its text and the model, without the preparation."""
    tokenizer = TextTokenizer.load(prepared_once / "tokenizer.model")
    texts = {"train": corpus.train, "validation": corpus.validation}
    return {split: [tokenizer.encode(text).tolist() for text in found] for split, found in texts.items()}


@pytest.fixture(scope="module")
def megatron(text_documents: dict[str, list[list[int]]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data sets. text_DTYPE_0, text_DTYPE_1 and held_out_DTYPE are the corpus: uint16 with EOS at the end
    of each document, as --append-eod puts it, and int32 without."""
    folder = tmp_path_factory.mktemp("megatron")
    train, held_out = text_documents["train"], text_documents["validation"]
    for dtype, end in (("uint16", [EOS]), ("int32", [])):
        write_megatron(folder / f"text_{dtype}_0", dtype, [[ids[:3], [*ids[3:], *end]] for ids in train[:100]])
        write_megatron(folder / f"text_{dtype}_1", dtype, [[[*ids, *end]] for ids in train[100:]])
        write_megatron(folder / f"held_out_{dtype}", dtype, [[[*ids, *end]] for ids in held_out])
    for part in range(3):
        write_megatron(folder / f"part_{part}", "uint16", [[ids] for ids in train[part::3]])
    write_megatron(folder / "odd", "int32", ODD)
    return folder


def shards(folder: Path) -> dict[str, str]:
    return {name: digest for name, digest in outputs(folder).items() if name.startswith(("train-", "validation-"))}


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_a_megatron_data_set_gives_the_shards_that_its_text_gives(
    dtype: str, megatron: Path, prepared_once: Path, prepare_ids: Prepare
) -> None:
    """Byte for byte, and as many bytes of text; with --append-eod and without; from several files and sentences."""
    held_out = f"{megatron}/held_out_{dtype}"
    out = prepare_ids(format="megatron", input=f"{megatron}/text_{dtype}_*", validation_input=held_out)
    assert shards(out) == shards(prepared_once)
    ours, theirs = Manifest.load(out), Manifest.load(prepared_once)
    assert ours.totals == theirs.totals
    assert ours.tokenizer == theirs.tokenizer
    assert [(raw.name, raw.documents, raw.format) for raw in ours.provenance.inputs[:2]] == [
        (f"text_{dtype}_0.bin", 100, "megatron"),
        (f"text_{dtype}_0.idx", 0, "megatron"),
    ]
    verify(ours)


def _npy(path: Path, ids: list[int], dtype: str) -> Path:
    np.save(path, np.array(ids, dtype))
    return path.with_name(path.name + ".npy") if path.suffix != ".npy" else path


ARRAYS: dict[str, tuple[Callable[[Path, list[int]], Path], dict[str, Any]]] = {
    "nanogpt.bin": (lambda path, ids: write_plain(path, ids, "<u2"), {}),
    "wide.bin": (lambda path, ids: write_plain(path, ids, "<u4"), {"id_dtype": "uint32"}),
    "gpt2.bin": (write_llm_c, {}),
    "llama3.bin": (lambda path, ids: write_llm_c(path, ids, dtype="<u4", magic=20240801, version=7), {}),
    "array.npy": (lambda path, ids: _npy(path, ids, "<i8"), {}),
    "big_endian.npy": (lambda path, ids: _npy(path, ids, ">u4"), {}),
    "packed.bin.gz": (lambda path, ids: _packed(path, ids), {}),
}


def _packed(path: Path, ids: list[int]) -> Path:
    path.write_bytes(gzip.compress(np.array(ids, "<u2").tobytes()))
    return path


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("end_first", [False, True], ids=["ended", "begun"])
def test_an_array_of_ids_gives_the_shards_that_its_text_gives(
    name: str,
    end_first: bool,
    text_documents: dict[str, list[list[int]]],
    prepared_once: Path,
    prepare_ids: Prepare,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whether the id ends each document, as nanoGPT writes it, or comes before it, as in llm.c; documents span the
    blocks in which a file is read."""
    monkeypatch.setattr(token_ids, "BLOCK_IDS", 257)
    write, settings = ARRAYS[name]
    end, inputs = 60_000, {}  # no piece of the model
    for split, documents in text_documents.items():
        joined = [number for ids in documents for number in ([end, *ids] if end_first else [*ids, end])]
        inputs[split] = str(write(tmp_path / f"{split}_{name}", joined))
    out = prepare_ids(
        format="token_array",
        input=inputs["train"],
        validation_input=f"file://{inputs['validation']}",
        end_of_document=end,
        **settings,
    )
    assert shards(out) == shards(prepared_once)
    assert Manifest.load(out).totals == Manifest.load(prepared_once).totals


@pytest.mark.parametrize("block", [1, 2, 7, 1 << 20])
def test_odd_documents_are_kept_and_empty_ones_counted(
    block: int, megatron: Path, prepare_ids: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_ids, "BLOCK_IDS", block)
    monkeypatch.setattr("data_prep.raw.megatron_index._DOCUMENTS_AT_ONCE", 3)
    out = prepare_ids(format="megatron", input=f"{megatron}/odd.idx", validation_fraction=0)
    assert stored_documents(out) == [[5, 6, 7], [8] * 5001, [9], [10], [11, 12], [13]]
    assert Manifest.load(out).provenance.dropped["quarantined"] == {"empty": 4}
    assert len(Manifest.load(out).split("train")) == 2
    verify(Manifest.load(out))


@pytest.mark.parametrize("block", [1, 3, 1 << 20])
@pytest.mark.parametrize(
    "ids, documents, empty",
    [
        ([EOS, 5, 6, EOS, 7], [[5, 6], [7]], 0),
        ([5, 6, EOS, EOS, EOS, 7, EOS], [[5, 6], [7]], 2),
        ([EOS, EOS, 5], [[5]], 1),
        ([5], [[5]], 0),
    ],
)
def test_documents_of_an_array_lie_between_end_ids(
    ids: list[int],
    documents: list[list[int]],
    empty: int,
    block: int,
    prepare_ids: Prepare,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(token_ids, "BLOCK_IDS", block)
    array = write_plain(tmp_path / "ids.bin", ids, "<u2")
    out = prepare_ids(format="token_array", input=str(array), validation_fraction=0)
    assert stored_documents(out) == documents
    assert Manifest.load(out).provenance.dropped.get("quarantined", {"empty": 0}) == {"empty": empty}


def test_an_end_of_document_beyond_the_vocabulary_is_stored_as_the_tokenizers_own(
    prepare_ids: Prepare, tmp_path: Path
) -> None:
    """As Megatron-LM's <EOD> behind the pieces of a SentencePiece model."""
    write_megatron(tmp_path / "eod", "int32", [[[5, 6, 502]], [[7, 502]]])
    out = prepare_ids(format="megatron", input=f"{tmp_path}/eod", end_of_document=502, validation_fraction=0)
    assert stored_documents(out) == [[5, 6], [7]]
    verify(Manifest.load(out))


def test_validation_gets_its_fraction_by_a_hash_of_the_ids(
    text_documents: dict[str, list[list[int]]], prepare_ids: Prepare, tmp_path: Path
) -> None:
    """Equal documents go the same way."""
    documents = [*text_documents["train"], *text_documents["train"]]
    array = _npy(tmp_path / "twice.npy", [number for ids in documents for number in [*ids, EOS]], "<u2")
    out = prepare_ids(format="token_array", input=str(array), validation_fraction=0.2)
    train, held_out = stored_documents(out), stored_documents(out, "validation")
    assert len(train) + len(held_out) == len(documents)
    assert 0.1 < len(held_out) / len(documents) < 0.3
    assert not {tuple(ids) for ids in train} & {tuple(ids) for ids in held_out}


def test_a_killed_preparation_of_ids_goes_on_and_ends_with_the_same_bytes(
    megatron: Path,
    id_config: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It dies after every few files that it has finished; a data set that is done is not read again."""
    monkeypatch.setattr("data_prep.stages.ingest.BATCH_BYTES", 1)
    monkeypatch.setattr("data_prep.stages.ingest.PART_BYTES", 20_000)
    settings = {"format": "megatron", "input": f"{megatron}/part_*"}
    assert main(["run", "--config", str(id_config(**settings, output=str(tmp_path / "clean")))]) == 0
    command = ["run", "--config", str(id_config(**settings, output=str(tmp_path / "stopped")))]
    finished = run_with_kills(command, files=10, kills=3)
    states = [file for file in finished if file.parent.name.startswith("ingest-") and file.suffix == ".json"]
    assert len(states) == len(set(states)) == 6, "each of the files was read to its end once"
    assert outputs(tmp_path / "stopped") == outputs(tmp_path / "clean")


def test_a_changed_index_is_noticed(
    id_config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_megatron(tmp_path / "a", "uint16", [[[5, 6]], [[7]]])
    command = ["run", "--config", str(id_config(format="megatron", input=f"{tmp_path}/a", validation_fraction=0))]
    assert main(command) == 0
    assert main(command) == 0
    assert "up to date" in capsys.readouterr().out
    write_megatron(tmp_path / "a", "uint16", [[[5]], [[6, 7]]])
    assert main(command) == 2
    assert "a.idx has changed" in one_error(capsys)
    assert main([*command, "--force"]) == 0
    assert stored_documents(tmp_path / "out") == [[5], [6, 7]]


def test_work_of_another_index_is_not_taken_over(
    id_config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two starts the index alone changes; it is in another batch than its ids, as a large one is."""
    monkeypatch.setattr("data_prep.stages.ingest.BATCH_BYTES", 1)
    write_megatron(tmp_path / "a", "uint16", [[[5, 6]], [[7]]])
    path = id_config(format="megatron", input=f"{tmp_path}/a", validation_fraction=0)
    assert main(["ingest", "--config", str(path)]) == 0
    before = (tmp_path / "a.bin").stat()
    write_megatron(tmp_path / "a", "uint16", [[[5]], [[6, 7]]])
    os.utime(tmp_path / "a.bin", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert main(["run", "--config", str(path)]) == 0
    assert stored_documents(tmp_path / "out") == [[5], [6, 7]]


def test_array_tasks_share_the_files_and_give_the_same_bytes(
    megatron: Path, id_config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_prep.stages.ingest.BATCH_BYTES", 1)
    settings = {"format": "megatron", "input": f"{megatron}/part_*"}
    assert main(["run", "--config", str(id_config(**settings, output=str(tmp_path / "one")))]) == 0
    path = str(id_config(**settings, output=str(tmp_path / "shared")))
    for step, tasks in (("dedup", 2), ("tokenizer", 0), ("encode", 2), ("shard", 0)):
        for task in range(max(tasks, 1)):
            share = ["--task", str(task), "--tasks", str(tasks)] if tasks else []
            assert main([step, "--config", path, *share]) == 0
    assert outputs(tmp_path / "shared").items() >= outputs(tmp_path / "one").items()


def test_ids_that_begin_like_a_packed_file_are_ids(prepare_ids: Prepare, tmp_path: Path) -> None:
    """The first id of a file may have the bytes that open gzip, 0x8b1f = 35,615."""
    array = write_plain(tmp_path / "ids.bin", [35_615, 5, EOS, 7], "<u2")
    out = prepare_ids(format="token_array", input=str(array), validation_fraction=0, end_of_document=35_615)
    assert stored_documents(out) == [[5], [7]]


def test_ids_of_another_name_size_or_end_are_of_another_tokenizer() -> None:
    """Data sets of two are not mixed."""

    def known_by(eos_id: int = 0, **given: Any) -> tuple[str | None, str]:
        settings = TokenizerConfig.model_validate({"type": "ids", "name": "x", "vocab_size": 300, **given})
        recipe = IdRecipe(model=None, settings=settings, takes_ids=True, eos_id=eos_id)
        return recipe.entry().sha256, str(recipe.key())

    found = [known_by(), known_by(name="y"), known_by(vocab_size=301), known_by(eos_id=1)]
    assert len({sha256 for sha256, _ in found}) == len({key for _, key in found}) == 4


@pytest.mark.parametrize("count", range(8))
def test_the_index_gives_every_document_however_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.setattr("data_prep.raw.megatron_index._DOCUMENTS_AT_ONCE", 3)
    documents = [[[5] * number, [6]] for number in range(count)]
    write_megatron(tmp_path / "a", "uint16", documents)
    lengths = [length for some in MegatronIndex(tmp_path / "a.bin").lengths() for length in some.tolist()]
    assert lengths == [number + 1 for number in range(count)]
