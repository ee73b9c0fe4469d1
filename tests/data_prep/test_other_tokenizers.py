"""Token ids of a tokenizer that is not here become shards, of which only numbers are said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_prep.cli import main
from data_prep.shards.format import Manifest
from tests.data_prep.id_files import Prepare, stored_documents, write_megatron, write_plain
from tests.data_prep.outcome import one_error, outputs

END = 50256
DOCUMENTS = [[464, 3290, 318], [0, 50255], [7] * 3000, [11]]
OTHER = {"type": "ids", "name": "gpt2", "vocab_size": 50257}


@pytest.fixture
def array(tmp_path: Path) -> Path:
    """As nanoGPT writes GPT-2's ids: uint16, an end behind each document."""
    return write_plain(tmp_path / "train.bin", [number for ids in DOCUMENTS for number in [*ids, END]], "<u2")


def keys(array: Path, **changes: Any) -> dict[str, Any]:
    given: dict[str, Any] = {"format": "token_array", "input": str(array), "tokenizer": OTHER, "end_of_document": END}
    return {**given, "validation_fraction": 0, **changes}


def test_an_array_keeps_its_ids_and_its_end(array: Path, prepare_ids: Prepare) -> None:
    out = prepare_ids(**keys(array))
    assert stored_documents(out) == DOCUMENTS
    found = Manifest.load(out)
    assert (found.tokenizer.kind, found.tokenizer.file) == ("ids", None)
    assert (found.tokenizer.vocab_size, found.tokenizer.eos_id, found.dtype) == (50257, END, "uint16")
    assert not found.tokenizer.has_text and not found.tokenizer.tokens_are_bytes
    assert found.totals["train"].tokens == sum(len(ids) + 1 for ids in DOCUMENTS)
    assert found.totals["train"].text_bytes == 0 and not (out / "tokenizer.model").exists()


def test_a_data_set_of_megatron_gives_the_same_shards(array: Path, prepare_ids: Prepare, tmp_path: Path) -> None:
    """Ids above 65,535 too, in four bytes each."""
    from_array = outputs(prepare_ids(**keys(array)))
    write_megatron(tmp_path / "set", "uint16", [[ids] for ids in DOCUMENTS])
    changes = {"format": "megatron", "input": f"{tmp_path}/set", "output": str(tmp_path / "megatron")}
    prepare_ids(**keys(array, **changes))
    from_megatron = outputs(tmp_path / "megatron")
    shards = [name for name in from_array if name.startswith("train-")]
    assert shards and [from_array[name] for name in shards] == [from_megatron[name] for name in shards]
    write_megatron(tmp_path / "wide", "int32", [[[128255, 5, 70000]], [[6]]])
    llama = {"type": "ids", "name": "llama3", "vocab_size": 128256}
    wide = {**changes, "input": f"{tmp_path}/wide", "output": str(tmp_path / "wide-out"), "tokenizer": llama}
    prepare_ids(**keys(array, **wide, end_of_document=128001))
    assert stored_documents(tmp_path / "wide-out") == [[128255, 5, 70000], [6]]
    assert Manifest.load(tmp_path / "wide-out").dtype == "uint32"


def test_another_name_size_or_end_is_another_data_set(
    array: Path, prepare_ids: Prepare, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    for number, changes in enumerate(
        ({}, {"tokenizer": {**OTHER, "name": "mine"}}, {"tokenizer": {**OTHER, "vocab_size": 50300}})
    ):
        prepare_ids(**keys(array, output=str(tmp_path / str(number)), **changes))
        found.append(Manifest.load(tmp_path / str(number)))
    assert len({manifest.digest for manifest in found}) == len({manifest.tokenizer.sha256 for manifest in found}) == 3
    capsys.readouterr()
    prepare_ids(**keys(array, output=str(tmp_path / "0")))
    assert capsys.readouterr().out.startswith("up to date")


def test_what_is_said_of_ids_is_numbers(array: Path, prepare_ids: Prepare, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is said of their text, which nobody knows."""
    out = prepare_ids(**keys(array))
    capsys.readouterr()
    assert main(["verify", str(out)]) == 0
    assert "tokenizer: not here; 50257 ids of gpt2" in capsys.readouterr().out
    assert main(["show", str(out), "--count", "2"]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if line[0] != "="] == ["464 3290 318", "0 50255"]
    assert main(["stats", str(out), "--out", str(out / "report")]) == 0
    printed = capsys.readouterr().out
    totals = next(line.split() for line in printed.splitlines() if line.startswith("train"))
    assert totals[2:] == [str(len(DOCUMENTS)), f"{sum(len(ids) + 1 for ids in DOCUMENTS):,}", "-", "-"]
    report = (out / "report" / "report.md").read_text()
    assert "## Bytes per token" not in report and not (out / "report" / "bytes_per_token.png").exists()
    assert "| `7` | 3,000 | " in report


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"end_of_document": None}, "end_of_document: tokenizer.type ids does not say it"),
        ({"end_of_document": 50257}, "end_of_document: 50257 is no id below tokenizer.vocab_size 50257"),
        ({"tokenizer": {"type": "ids", "name": "gpt2"}}, "vocab_size: with type ids nothing else says it"),
        ({"tokenizer": {"type": "ids", "vocab_size": 9}}, "name: with type ids nothing else says it"),
        ({"tokenizer": {**OTHER, "seed": 1}}, "seed has no effect with type ids"),
        ({"tokenizer": {"name": "gpt2"}}, "name: has no effect without type ids"),
        ({"format": "jsonl", "end_of_document": None}, "tokenizer.type: ids is for formats that hold token ids"),
        (
            {"format": "enwik8", "end_of_document": None, "validation_fraction": None},
            'format "enwik8" is bytes; set tokenizer to',
        ),
        ({"tokenizer": {**OTHER, "vocab_size": 300}, "end_of_document": 256}, "token 0 is the id 464, and tokenizer"),
        ({"tokenizer": {**OTHER, "vocab_size": 70000}}, "id_dtype: uint16 holds numbers up to 65,535"),
    ],
)
def test_mistakes(
    changes: dict[str, Any], words: str, array: Path, id_config: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {key: value for key, value in keys(array, **changes).items() if value is not None}
    assert main(["run", "--config", str(id_config(**given))]) == 2
    assert words in one_error(capsys)


def test_a_manifest_of_ids_with_a_model_is_refused(array: Path, prepare_ids: Prepare) -> None:
    out = prepare_ids(**keys(array))
    entry = json.loads((out / "manifest.json").read_text())["tokenizer"]
    assert entry["kind"] == "ids"
    for wrong in ({"file": "tokenizer.model"}, {"eos_id": None}, {"sha256": None}):
        with pytest.raises(ValueError, match="ids need sha256 and eos_id, and have no file"):
            type(Manifest.load(out).tokenizer).model_validate({**entry, **wrong})
