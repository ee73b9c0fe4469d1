"""What tools for preparing data wrote is read back, and times of tools that did other work are refused."""

from __future__ import annotations

import gzip
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from benchmarks.data import memory, outputs, preparation, process_cost
from benchmarks.data.outputs import Written
from benchmarks.data.peers import version_of
from benchmarks.data.process_cost import Cost, measure
from common.errors import DataError, UserError

TEXTS = ["One line.\nAnother, with naïve σ.", "", "12 tabs\t\tand a ▁ sign"]


def write_raw(path: Path) -> Path:
    with gzip.open(path, "wt", encoding="utf-8") as stream:
        for text in TEXTS:
            stream.write(json.dumps({"text": text}) + "\n")
    return path


def write_byte_level(folder: Path) -> Path:
    """A tokenizer of the tokenizers library whose pieces are bytes, and its ids of TEXTS. Returns the tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|endoftext|>": 0, **{character: number for number, character in enumerate(alphabet, 1)}}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = [number for text in TEXTS for number in (*tokenizer.encode(text).ids, 0)]
    for name in ("x.ds", "x.npy"):
        np.array(ids, "<u2").tofile(folder / name)
    return folder / "tokenizer.json"


def test_the_files_of_datatrove_and_dolma_hold_the_raw_documents(tmp_path: Path) -> None:
    source = outputs.raw([write_raw(tmp_path / "raw.json.gz")])
    tokenizer = write_byte_level(tmp_path)
    assert source.documents == 3 and source.text_bytes == sum(len(text.encode()) for text in TEXTS)
    for names in ("*.ds", "*.npy"):
        written = outputs.byte_level(tmp_path, names, tokenizer)
        assert written == source._replace(tokens=source.text_bytes + 3)
        outputs.check({"it": written}, source)


def test_our_output_holds_the_raw_documents(prepared: Path) -> None:
    written = outputs.ours(prepared)
    totals = json.loads((prepared / "manifest.json").read_text())["totals"].values()
    assert written.documents == sum(total["documents"] for total in totals)
    assert written.tokens == sum(total["tokens"] for total in totals)
    assert written.text_bytes == sum(total["text_bytes"] for total in totals)


def test_documents_are_the_same_in_any_order_and_differ_by_a_letter() -> None:
    assert outputs.content([b"a", b"bc"], 5) == outputs.content([b"bc", b"a"], 5)
    assert outputs.content([b"a", b"bc"], 5).digest != outputs.content([b"a", b"bd"], 5).digest


@pytest.mark.parametrize("other", [{"documents": 2}, {"text_bytes": 99}, {"digest": "0"}])
def test_a_tool_that_wrote_another_text_is_refused(other: dict[str, Any]) -> None:
    source = Written(3, 0, 100, "f")
    with pytest.raises(DataError, match=r"dolma wrote .* these times compare nothing"):
        outputs.check({"ours": source._replace(tokens=50), "dolma": source._replace(tokens=50, **other)}, source)


def test_tokens_that_no_tokenizer_explains_are_refused() -> None:
    source = Written(3, 0, 100, "f")
    outputs.check({"ours": source._replace(tokens=50), "dolma": source._replace(tokens=60)}, source)
    with pytest.raises(DataError, match="tokens differ by more than tokenizers do"):
        outputs.check({"ours": source._replace(tokens=50), "dolma": source._replace(tokens=90)}, source)


def test_an_interpreter_without_the_peer_is_named() -> None:
    with pytest.raises(UserError, match="--dolma: no-such-python is no Python that has dolma and tokenizers; make it"):
        version_of("dolma", "no-such-python")


def test_the_cost_of_a_command_is_that_of_its_children_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The child stays until it was seen: how soon that is depends on the machine."""
    seen, resident = tmp_path / "seen", process_cost._resident_bytes

    def looked(process: psutil.Process) -> int:
        found = resident(process)
        if found > 60e6:
            seen.touch()
        return found

    monkeypatch.setattr(process_cost, "_resident_bytes", looked)
    code = (
        "import pathlib, sys, time\nx, seen = b'x' * 60_000_000, pathlib.Path(sys.argv[1])\n"
        "for _ in range(6000):\n  if seen.exists(): break\n  time.sleep(0.01)"
    )
    child = f"{shlex.join([sys.executable, '-c', code, str(seen)])}; true"
    assert measure(["bash", "-c", child], log=tmp_path / "l").peak_bytes > 60e6
    with pytest.raises(RuntimeError, match="no such thing"):
        measure(["bash", "-c", "echo no such thing; exit 3"], log=tmp_path / "l")


def found() -> dict[str, Any]:
    """A record of two rounds, in which ours took 2 and 4 CPU-seconds, datatrove 6 and 16."""

    def one(*seconds: float) -> dict[str, Any]:
        costs = [Cost(cpu, cpu / 2, 100_000_000)._asdict() for cpu in seconds]
        return {"version": "x 1", "written": Written(3, 50, 12_000_000, "f")._asdict(), "costs": costs}

    tools = {
        preparation.BPE: one(2.0, 4.0),
        preparation.UNIGRAM: one(1.0, 2.0),
        preparation.TWO: one(1.0, 2.0),
        "datatrove, BPE": one(6.0, 16.0),
        "dolma, BPE": {"missing": preparation.MISSING},
    }
    source = Written(3, 0, 12_000_000, "f")._asdict()
    return {"source": source, "files": 1, "vocab_size": 8000, "repeats": 2, "tools": tools}


def test_ratios_of_preparation_are_medians_of_the_rounds_and_a_missing_tool_is_said(tmp_path: Path) -> None:
    text = preparation.page(found())
    assert "| datatrove, BPE (x 1) | 11.0 | 1.09 | 3.50 | 7.00 | 5.5 | 100 | 50 |" in text
    assert "| dolma, BPE | not installed here |" in text
    assert "2.00 times as fast with two processes" in text
    preparation.draw(found(), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_an_input_may_have_its_documents_more_than_ten_times(tmp_path: Path) -> None:
    """Each time other ones."""
    raw = write_raw(tmp_path / "raw.json.gz")
    size = sum(len(text.encode()) for text in TEXTS)
    found = memory._inputs_of_size([raw], tmp_path / "input", 25 * size)
    texts = [json.loads(line)["text"] for path in found for line in gzip.decompress(path.read_bytes()).splitlines()]
    first = [text.split(" ")[0] for text in texts[::3]]
    assert len(first) > 20 and len(set(first)) == len(first)
    assert first[:2] == ["One", "Onea"] and "Oneaj" in first and "Onebb" in first


def test_memory_is_told_beside_that_of_the_smallest_input() -> None:
    runs = [{"text_mb": mb, **Cost(9.0, 5.0, peak)._asdict()} for mb, peak in ((50, 400_000_000), (500, 500_000_000))]
    assert "| 500 | 500 | 1.25 | 9 |" in memory.page({"workers": 2, "filters": True, "runs": runs})
