"""launch/compare.py says where losses are of other text, and not where the same data have another name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from pretrain.cli.compare import main
from pretrain.views.comparison import differing_facts
from pretrain.views.comparison_text import text
from tests.pretrain.views.compared import of_mixture, row, runs_of, write


@pytest.mark.parametrize(
    "changed, note",
    [
        ({"data": {"manifest": "b"}}, "note: data.manifest differ"),
        ({"data": {"manifest": "b"}, "model": {"vocab_size": 9}}, "note: data.manifest and model.vocab_size differ"),
        ({"train": {"seed": 2}}, ""),
    ],
)
def test_losses_of_other_texts_are_not_left_to_speak_for_themselves(
    tmp_path: Path, changed: dict[str, Any], note: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {"data": {"manifest": "a"}, "model": {"vocab_size": 8}, "train": {"seed": 1}}
    one = write(tmp_path / "one", [row(1, 5.0)], config)
    other = write(tmp_path / "other", [row(1, 5.5)], config | changed)
    assert main([str(one), str(other)]) == 0
    said = capsys.readouterr().out
    page = (one / "comparison" / "other" / "comparison.html").read_text()
    assert (note in said) if note else ("note:" not in said)
    assert ("of different texts or tokenizers" in page) == bool(note)


def test_validations_of_other_weights_of_the_same_sources_are_of_the_same_text(tmp_path: Path) -> None:
    def note(*others: list[dict[str, Any]]) -> str:
        first: dict[str, Any] = {
            "data": {"sources": [{"manifest": "a", "weight": 1.0}, {"manifest": "b", "weight": 1.0}]}
        }
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        configs = [first, *({"data": {"sources": rows}} for rows in others)]
        return text(runs_of(*(write(folder / str(n), [row(1, 5.0)], c) for n, c in enumerate(configs))), 1e-5)

    heavy: list[dict[str, Any]] = [{"manifest": "a", "weight": 1.0}, {"manifest": "b", "weight": 3.0}]
    assert "note: the weights of data.sources differ" in note(heavy) and "different texts" not in note(heavy)
    for others in ([heavy[::-1]], [heavy, heavy[:1]], [[heavy[0], {"manifest": "c", "weight": 3.0}]]):
        assert "note: data.sources differ: losses per token of different texts" in note(*others)
    assert "note:" not in note([{"manifest": "a", "weight": 1.0}, {"manifest": "b", "weight": 1.0}])


@pytest.mark.parametrize(
    "place, digest, note",
    [
        ("a", "2" * 64, "note: data digest differ"),  # prepared anew in its place
        ("b", "1" * 64, ""),  # moved
        ("b", None, "note: data digest and data.manifest differ"),  # of an earlier version
        ("a", None, ""),  # and at the same place
    ],
)
def test_data_are_the_same_by_their_digest_and_not_by_their_place(
    tmp_path: Path, place: str, digest: str | None, note: str, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = []
    for name, manifest, known in (("one", "a", "1" * 64), ("other", place, digest)):
        paths.append(write(tmp_path / name, [row(1, 5.0)], {"data": {"manifest": manifest}}))
        started = {"event": "started", "step": 0, "data_digest": known}
        (paths[-1] / "events.jsonl").write_text(json.dumps(started) + "\n")
    assert main(list(map(str, paths))) == 0
    said = capsys.readouterr().out
    assert (note in said) if note else ("note:" not in said)
    told = digest != "1" * 64 and (place, digest) != ("a", None)
    assert bool(re.search(r"(?m)^data digest +1{12} +(2{12}|-)$", said)) == told


@pytest.mark.parametrize(
    "one, other, differs",
    [
        ("data/c4", "data/c4/manifest.json", False),
        ("data/c4/", "./data/c4", False),
        ("https://host/c4/manifest.json", "https://host/c4", False),
        ("data/c4", "data/c5/manifest.json", True),
        ("data/c4", "data/c4/other.json", True),
        ("https://host/c4", "http://host/c4", True),
        ("data/c4", None, True),
    ],
)
def test_a_folder_of_data_and_the_manifest_in_it_are_the_same(
    tmp_path: Path, one: str, other: str | None, differs: bool
) -> None:
    configs: list[dict[str, Any]] = [{"data": {"manifest": place}} for place in (one, other)]
    sources: list[dict[str, Any]] = [
        {"data": {"sources": [{"manifest": place, "weight": 1.0}] * 2}} for place in (one, other)
    ]
    pairs: dict[str, list[dict[str, Any]]] = {"single": configs, "mixture": sources}
    for name, pair in pairs.items():
        runs = runs_of(*(write(tmp_path / name / str(n), [row(1, 5.0)], config) for n, config in enumerate(pair)))
        assert bool(differing_facts(runs)) == differs
        assert ("note:" in text(runs, 0.0)) == differs


@pytest.mark.parametrize(
    "changed, note",
    [
        ({"evaluate": {"sequences": 64}}, "note: evaluate.sequences differ: validation losses are of other windows"),
        ({"model": {"sequence_length": 64}}, "note: model.sequence_length differ: validation losses are of other"),
        ({"evaluate": {"every_steps": 2}}, None),
    ],
)
def test_validations_of_other_windows_are_said_to_be(tmp_path: Path, changed: dict[str, Any], note: str | None) -> None:
    runs = [of_mixture(tmp_path / name, {4: {}}) for name in ("one", "other")]
    (runs[1] / "config.json").write_text(json.dumps(changed))
    said = text(runs_of(*runs), 0.0)
    assert note in said if note else "note:" not in said
    for run in runs:
        (run / "events.jsonl").unlink()
    assert "note:" not in text(runs_of(*runs), 0.0), "no validation, and nothing to compare"


def test_a_model_with_memory_is_said_to_be_validated_on_other_windows(tmp_path: Path) -> None:
    """Its streams read on from window to window, and begin at other places than the windows of a model without."""
    runs = [of_mixture(tmp_path / name, {4: {}}) for name in ("one", "other", "third")]
    for placement, note in (("spread", True), ("start", False)):
        for run, chunks in zip(runs, (0, 1, 2), strict=True):
            config = {"model": {"position": {"memory_chunks": chunks}}, "evaluate": {"placement": placement}}
            (run / "config.json").write_text(json.dumps(config))
        said = "note: model.position.memory_chunks differ: validation losses are of other windows of the text"
        assert (said in text(runs_of(*runs), 0.0)) == note
        assert "note:" not in text(runs_of(*runs[1:]), 0.0), "both have memory"


def test_a_mixture_is_not_said_to_read_the_one_folder_of_its_file(tmp_path: Path) -> None:
    """`--set data.sources=...` leaves the configuration's data.manifest where it is, unread."""
    mixture = [{"manifest": "data/a", "weight": 1.0}, {"manifest": "data/b", "weight": 1.0}]
    one = write(tmp_path / "one", [row(1, 5.0)], {"data": {"manifest": "data/sample", "sources": mixture}})
    other = write(tmp_path / "other", [row(1, 5.0)], {"data": {"manifest": "data/c", "sources": []}})
    third = write(tmp_path / "third", [row(1, 5.0)], {"data": {"manifest": "data/other", "sources": mixture}})
    assert dict(differing_facts(runs_of(one, other)))["data.manifest"] == [None, "data/c"]
    assert not differing_facts(runs_of(one, third))
