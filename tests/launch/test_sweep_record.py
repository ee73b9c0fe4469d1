"""The record of a sweep, which several commands write."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from common.errors import UserError
from launch.sweeps.plan import combinations, configurations
from launch.sweeps.record import Sweep
from pretrain.config.loading import to_json
from pretrain.report.run_paths import run_folder
from tests.pretrain.runs import small_config

RATE = "optimizer.learning_rate"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of the sweep."""
    return tmp_path / "sweep"


@pytest.fixture
def configs(tmp_path: Path, prepared: Path) -> dict[str, Path]:
    (tmp_path / "x.json").write_text(json.dumps(to_json(small_config(prepared))))
    return configurations([str(tmp_path / "x.json")])


def test_what_another_command_adds_meanwhile_stays_in_the_record(folder: Path, configs: dict[str, Path]) -> None:
    """Both read the record before either writes: checks of large data take minutes."""
    with pytest.raises(UserError, match=r"another command has begun a sweep in .*; give this command once more"):
        _begin_both(folder, configs, "1e-3", "2e-3")
    _begin_both(folder, configs, "3e-3", "4e-3")
    found = Sweep.load(folder)
    assert found is not None and [run.values[RATE] for run in found.runs.values()] == ["1e-3", "3e-3", "4e-3"]


def _begin_both(folder: Path, configs: dict[str, Path], *rates: str) -> None:
    sweeps = [Sweep.open(folder, [RATE], [], configs) for _ in rates]
    for sweep, rate in zip(sweeps, rates, strict=True):
        sweep.add(combinations(list(configs), {RATE: [rate]}))
        sweep.begin(configs)


def test_a_sweep_may_begin_in_an_empty_folder_and_not_where_a_file_is(folder: Path, configs: dict[str, Path]) -> None:
    folder.mkdir()
    Sweep.open(folder, [RATE], [], configs).begin(configs)
    with pytest.raises(UserError, match=r"^--sweep-dir: .*x\.json is a file"):
        Sweep.open(configs["x"] / "sweep", [RATE], [], configs)


def test_data_may_be_named_by_their_folder_or_by_the_manifest_in_it(
    folder: Path, configs: dict[str, Path], prepared: Path
) -> None:
    Sweep.open(folder, [RATE], [f"data.manifest={prepared}"], configs).begin(configs)
    Sweep.open(folder, [RATE], [f"data.manifest={prepared}/manifest.json"], configs)
    with pytest.raises(UserError, match=r"^data\.manifest: is .* in the runs of .*, and .*other.* in this command"):
        Sweep.open(folder, [RATE], [f"data.manifest={prepared}/other.json"], configs)


def test_what_another_command_noted_while_this_one_checked_its_runs_stays(
    folder: Path, configs: dict[str, Path]
) -> None:
    Sweep.open(folder, [RATE], [], configs).begin(configs)
    one, other = (Sweep.open(folder, [RATE], [], configs) for _ in range(2))
    (first,) = one.add(combinations(["x"], {RATE: ["1e-3"]}))
    (second,) = other.add(combinations(["x"], {RATE: ["2e-3"]}))
    one.begin(configs)
    one.note(first, job="41")
    other.begin(configs)
    found = Sweep.load(folder)
    assert found is not None and found.jobs == {first.name: "41"} and not found.unrecorded
    assert list(found.runs) == [first.name, second.name] == list(other.runs)
    one.note(first, job="43")
    other.note(second, job="44")
    found = Sweep.load(folder)
    assert found is not None and found.jobs == {first.name: "43", second.name: "44"}


def test_what_two_commands_note_at_once_is_both_in_the_record(
    folder: Path, configs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one comes when this one has read the record and is about to write it."""
    sweep = Sweep.open(folder, [RATE], [], configs)
    first, second = sweep.add(combinations(["x"], {RATE: ["1e-3", "2e-3"]}))
    sweep.begin(configs)
    other = threading.Thread(target=Sweep.open(folder, [RATE], [], configs).note, args=(second,), kwargs={"job": "44"})
    save = Sweep.save

    def save_late(self: Sweep) -> None:
        if self is sweep:
            other.start()
            other.join(0.2)
        save(self)

    monkeypatch.setattr(Sweep, "save", save_late)
    sweep.note(first, job="43")
    other.join()
    found = Sweep.load(folder)
    assert found is not None and found.jobs == {first.name: "43", second.name: "44"}


def test_the_record_holds_the_newest_outcome_that_a_run_did_not_record_itself(
    folder: Path, configs: dict[str, Path]
) -> None:
    sweep = Sweep.open(folder, [RATE], [], configs)
    first, second = sweep.add(combinations(["x"], {RATE: ["1e-3", "2e-3"]}))
    for _ in range(2):
        sweep.begin(configs)  # the second time the sweep is no new one
    for run, code, noted in (
        (first, 2, {first.name: 2}),
        (second, 0, {first.name: 2, second.name: 0}),
        (first, None, {second.name: 0}),
    ):
        (folder / "sweep.json").unlink()  # a record that is lost is written again
        sweep.note(run, unrecorded=code)
        found = Sweep.load(folder)
        assert found is not None and found.unrecorded == noted and list(found.runs) == [first.name, second.name]


def test_a_sweep_keeps_its_own_copy_of_a_configuration_that_is_edited(folder: Path, configs: dict[str, Path]) -> None:
    (path,) = configs.values()
    before = path.read_bytes()
    Sweep.open(folder, [RATE], [], configs).begin(configs)
    tree = json.loads(before)
    tree["optimizer"]["clip_norm"] = 1.0
    path.write_text(json.dumps(tree))
    again = Sweep.open(folder, [RATE], ["optimizer.clip_norm=0.5"], configs)  # the same runs, said in another way
    again.begin(configs)
    assert again.config("x").read_bytes() == before


def test_a_description_may_be_edited_and_keys_may_be_given_in_any_order(folder: Path, configs: dict[str, Path]) -> None:
    (path,) = configs.values()
    keys = [RATE, "train.seed"]
    Sweep.open(folder, keys, [], configs).begin(configs)
    tree = json.loads(path.read_text())
    path.write_text(json.dumps(tree | {"description": "what it is for, in better words"}))
    assert Sweep.open(folder, keys[::-1], [], configs).keys == keys


def test_a_record_of_an_earlier_version_is_read(folder: Path, configs: dict[str, Path]) -> None:
    """That knew no --equal-parameters."""
    sweep = Sweep.open(folder, [RATE], [], configs)
    sweep.begin(configs)
    record = json.loads((folder / "sweep.json").read_text())
    assert record.pop("solved") is None
    (folder / "sweep.json").write_text(json.dumps(record))
    found = Sweep.load(folder)
    assert found is not None and found.solved is None and found.keys == [RATE]


def test_a_key_that_an_edit_adds_or_removes_is_refused_as_not_given(folder: Path, configs: dict[str, Path]) -> None:
    (path,) = configs.values()
    whole = path.read_text()
    tree = json.loads(whole)
    del tree["optimizer"]["clip_norm"]
    for number, (before, after, words) in enumerate(
        (
            (whole, json.dumps(tree), "is 0.5 in the runs of .*, and not given in this command"),
            (json.dumps(tree), whole, "is not given in the runs of .*, and 0.5 in this command"),
        )
    ):
        path.write_text(before)
        Sweep.open(folder / str(number), [RATE], [], configs).begin(configs)
        path.write_text(after)
        with pytest.raises(UserError, match=rf"^optimizer\.clip_norm: {words}"):
            Sweep.open(folder / str(number), [RATE], [], configs)


def test_the_weight_of_a_source_that_is_varied_may_be_edited_and_the_others_may_not(
    folder: Path, configs: dict[str, Path]
) -> None:
    (path,) = configs.values()
    tree = json.loads(path.read_text())
    sources = tree["data"]["sources"] = [{"manifest": "data/c4", "weight": 1}, {"manifest": "data/math", "weight": 1}]
    path.write_text(json.dumps(tree))
    keys = ["data.sources.1.weight"]
    Sweep.open(folder, keys, [], configs).begin(configs)
    sources[1]["weight"] = 3
    path.write_text(json.dumps(tree))
    Sweep.open(folder, keys, [], configs)
    sources[0]["weight"] = 3
    path.write_text(json.dumps(tree))
    with pytest.raises(UserError, match=r"^data\.sources: is .* in the runs of"):
        Sweep.open(folder, keys, [], configs)


def test_a_mixture_that_lost_the_source_whose_weight_is_varied_is_another_mixture(
    folder: Path, configs: dict[str, Path]
) -> None:
    """Said as that, and not of a setting that nobody gave."""
    two = 'data.sources=[{"manifest": "data/c4", "weight": 1}, {"manifest": "data/math", "weight": 1}]'
    one = 'data.sources=[{"manifest": "data/c4", "weight": 1}]'
    keys = ["data.sources.1.weight"]
    Sweep.open(folder, keys, [two], configs).begin(configs)
    with pytest.raises(UserError, match=r"^data\.sources: is .* in the runs of .* and \[.*c4[^}]*\}\] in this command"):
        Sweep.open(folder, keys, [one], configs)


@pytest.mark.parametrize("keys", [[RATE, "train.seed"], [], ["train.seed"]])
def test_a_run_with_values_of_other_keys_is_a_damaged_record(folder: Path, keys: list[str]) -> None:
    folder.mkdir()
    run = {"name": "x", "config": "x", "values": {RATE: "1e-3"}}
    tree = {"keys": keys, "overrides": [], "unrecorded": {}, "jobs": {}, "runs": [run]}
    (folder / "sweep.json").write_text(json.dumps(tree))
    with pytest.raises(UserError, match=r"^--sweep-dir: .* is no record of a sweep; "):
        Sweep.load(folder)


def test_no_run_and_no_sweep_begins_among_the_checkpoints_of_another_run(
    tmp_path: Path, configs: dict[str, Path]
) -> None:
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / "step-00000001").mkdir(parents=True)
    place = checkpoints / "step-00000002"
    with pytest.raises(UserError, match=r"^--sweep-dir: .* would pass for, a checkpoint "):
        Sweep.open(place, [RATE], [], configs)
    with pytest.raises(UserError, match=r"^--run-dir: .* would pass for, a checkpoint "):
        run_folder(tmp_path / "x.json", place / "mine")
    assert run_folder(tmp_path / "x.json", tmp_path / "run") == tmp_path / "run" and not place.exists()
