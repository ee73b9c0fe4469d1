"""The plots and tables of `stats`: what misled who looked at them."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from common.errors import DataError
from data_prep.report import show, stats
from data_prep.report.show import _check_content
from data_prep.report.stats import Lengths
from tests.data_prep.split_writer import EOS, joined, random_documents, write_data


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The axes of every plot, by its file name."""
    found: dict[str, Any] = {}
    figure = stats._figure

    @contextlib.contextmanager
    def kept(plots: stats.Plots, name: str, *arguments: Any, **options: Any) -> Iterator[Any]:
        with figure(plots, name, *arguments, **options) as axes:
            found[name] = axes
            yield axes

    monkeypatch.setattr(stats, "_figure", kept)
    return found


def left_out(dropped: dict[str, dict[str, object]]) -> list[str]:
    manifest: Any = SimpleNamespace(provenance=SimpleNamespace(dropped=dropped, records=[]))
    return stats._left_out(manifest, {})


def test_documents_are_counted_in_whole_numbers(drawn: dict[str, Any]) -> None:
    similarity = [0] * 19 + [2]
    lines = left_out({"duplicates": {"exact": 2, "near": 2, "near_similarity": similarity}})
    assert "![near-duplicates](duplicates.png)" in lines
    for ticks in (drawn["left_out.png"].get_xticks(), drawn["duplicates.png"].get_yticks()):
        assert len(ticks) > 1 and np.array_equal(ticks, np.round(ticks))


def test_no_empty_plot_where_there_are_no_near_duplicates(drawn: dict[str, Any]) -> None:
    """Its axis counted documents from -0.04 to 0.04."""
    lines = left_out({"duplicates": {"exact": 2, "near": 0, "near_similarity": [0] * 20}})
    assert list(drawn) == ["left_out.png"] and not any("duplicates.png" in line for line in lines)


def test_shares_of_all_splits_are_of_the_same_bins(drawn: dict[str, Any]) -> None:
    """The bins of a split whose longest document is 3,000,000 tokens were wider than those of one with 20,000."""
    of_train = Lengths(np.array([10, 2_999_999]), np.array([1, 1]))
    of_validation = Lengths(np.array([10, 20_000]), np.array([1, 1]))
    text = "\n".join(stats._lengths({"train": of_train, "validation": of_validation}, {}))
    train, validation = (np.unique(patch.get_xy()[:, 0]) for patch in drawn["lengths.png"].patches)
    assert np.array_equal(train, validation) and train[-1] == pytest.approx(3_000_000)
    assert "| 1,500,004.5 |" in text


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 20])
def test_what_ids_say_is_counted_by_document_whatever_the_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(stats, "READ_TOKENS", block)
    rng = np.random.default_rng(0)
    documents = [np.empty(0, np.int64), *random_documents(rng, 12, 50), np.empty(0, np.int64), np.array([7])]
    manifest = write_data(tmp_path, documents, vocab_size=50, tokens_per_shard=900, tokens_per_member=64)
    sizes, prefixes = rng.integers(1, 20, 50), rng.integers(0, 2, 50)
    sizes[EOS] = prefixes[EOS] = 0
    found = stats.pieces(manifest, "train", sizes, prefixes)
    kept = [ids for ids in documents if len(ids)]
    text = [int(sizes[ids].sum() - prefixes[ids[0]]) for ids in kept]
    assert found.counts.tolist() == np.bincount(joined(documents), minlength=50).tolist()
    assert found.text_bytes == sum(text)
    ratios = [
        min(int(size / len(ids) / stats.RATIO_STEP), stats.RATIO_BINS - 1) for size, ids in zip(text, kept, strict=True)
    ]
    assert found.ratios.tolist() == np.bincount(ratios, minlength=stats.RATIO_BINS).tolist()


@pytest.mark.parametrize("block", [1, 7, 1 << 20])
def test_verification_looks_at_every_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(show, "READ_TOKENS", block)
    documents = [np.arange(2, 50), np.empty(0, np.int64), np.arange(49, 1, -1)]
    _check_content(
        write_data(tmp_path / "good", documents, vocab_size=50, tokens_per_shard=60, tokens_per_member=9), "train"
    )
    for place, number, said in ((47, 50, "holds the id 50, the vocabulary 50"), (20, EOS, "first at token 20;")):
        wrong = [documents[0].copy(), *documents[1:]]
        wrong[0][place] = number
        manifest = write_data(tmp_path / f"{number}", wrong, vocab_size=50, tokens_per_shard=60, tokens_per_member=9)
        with pytest.raises(DataError, match=said):
            _check_content(manifest, "train")


def test_pieces_and_names_stay_in_their_cells() -> None:
    tokenizer: Any = SimpleNamespace(piece=["\t", "\u00a0", "\n|", "`", "ä"].__getitem__)
    name = stats._piece_namer(tokenizer, None)
    assert [name(piece) for piece in range(5)] == ["\\t", "\\xa0", "\\n\\|", "'", "ä"]
    raw: Any = SimpleNamespace(
        name="a|b.jsonl", format="jsonl", split="train", bytes=1, documents=1, quarantined={}, filtered=0, duplicates=0
    )
    manifest: Any = SimpleNamespace(provenance=SimpleNamespace(inputs=[raw], versions={}))
    assert any("| a\\|b.jsonl |" in line for line in stats._inputs(manifest))
