"""Which runs a sweep has: values and names, and what is no list of values."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.errors import UserError
from common.files import write_file
from launch.sweeps.plan import LONGEST_NAME, combinations, configurations, run_name, values_of, varied

RATE = "optimizer.learning_rate"


def test_a_comma_within_brackets_or_quotes_belongs_to_its_value() -> None:
    assert values_of("1e-3, 2e-3") == ["1e-3", "2e-3"]
    assert values_of('"a,b",c') == ['"a,b"', "c"]
    assert values_of('[0.9,0.95],[0.9,0.99],{"a":[1,2],"b":"],"}') == [
        "[0.9,0.95]",
        "[0.9,0.99]",
        '{"a":[1,2],"b":"],"}',
    ]


def test_names_show_the_values_and_are_safe_as_the_name_of_a_file() -> None:
    assert run_name("x", {RATE: "1e-3"}) == "x,learning_rate=1e-3"
    assert run_name("x", {}) == "x"
    assert run_name("x", {"a": '"naïve σ"'}) == "x,a=na-ve-"
    assert run_name("x", {"data.manifest": "/my data/c4", "optimizer.betas": "[0.9,0.95]"}) == (
        "x,manifest=-my-data-c4,betas=0.9-0.95"
    )
    keys = {"model.attention.num_experts": "4", "model.feedforward.num_experts": "8"}
    assert run_name("x", keys) == "x,model.attention.num_experts=4,model.feedforward.num_experts=8"
    assert run_name("x", {"a": "1" * 40}) == f"x,a={'1' * 40}"


def test_a_key_of_an_entry_of_a_list_is_named_with_the_entry() -> None:
    keys = {"data.sources.0.weight": "0.3", "data.sources.1.weight": "2", "train.seed": "1"}
    assert run_name("x", keys) == "x,sources.0.weight=0.3,sources.1.weight=2,seed=1"


def test_the_mixture_as_one_value_is_named_by_what_its_sources_hold() -> None:
    mix = '[{"manifest": "data/c4", "weight": 3e-1}, {"manifest": "data/math", "weight": 0.7}]'
    assert run_name("x", {"data.sources": mix}) == "x,sources=data-c4-3e-1-data-math-0.7"
    assert run_name("x", {"a": '{"b": [true, null], "c": "d e"}'}) == "x,a=true-null-d-e"


def test_long_values_that_begin_alike_have_names_that_differ() -> None:
    long = [f'[{{"manifest": "data/{"c4" * 30}", "weight": {weight}}}]' for weight in ("0.3", "0.30", "0.7")]
    first, again, other = (run_name("x", {"data.sources": value}) for value in long)
    assert first == again, "the same value, written in another way"
    assert first != other and first[:40] == other[:40]
    assert len(first) == len("x,sources=") + 40
    assert len(combinations(["x"], varied([f"data.sources={long[0]},{long[2]}"], []))) == 2


def test_an_entry_may_be_varied_of_a_list_that_set_gives() -> None:
    given = ["data.sources.0.weight=1,2", "data.sources.1.weight=1,2"]
    assert list(varied(given, ["data.sources=[]"])) == ["data.sources.0.weight", "data.sources.1.weight"]
    with pytest.raises(UserError, match=r"--vary data\.sources: overlaps with data\.sources\.0\.weight"):
        varied(["data.sources=[]"], ["data.sources.0.weight=1"])
    with pytest.raises(UserError, match=r"overlaps with data\.sources"):
        varied(["data.sources=[],[1]", "data.sources.0.weight=1"], [])


def test_a_sweep_has_every_combination_of_configurations_and_values() -> None:
    runs = combinations(["x", "y"], {RATE: ["1e-3", "2e-3"], "train.seed": ["1", "2", "3"]})
    assert len({run.name for run in runs}) == len(runs) == 2 * 2 * 3
    assert [run.name for run in runs[:2]] == ["x,learning_rate=1e-3,seed=1", "x,learning_rate=1e-3,seed=2"]


@pytest.mark.parametrize(
    "given, words",
    [
        (["optimizer.learning_rate"], "--vary optimizer.learning_rate: write it as KEY=A,B"),
        (["a=1,,2"], "write it as KEY=A,B"),
        ([" =1,2"], "write it as KEY=A,B"),
        (["a=1e-3,0.001"], "--vary a: 1e-3,0.001 has a value twice"),
        (["a=0,0.0"], "--vary a: 0,0.0 has a value twice"),
        (["a=[1.0],[1]"], "has a value twice"),
        (['a={"b":1,"c":2},{"c":2,"b":1}'], "has a value twice"),
        (["a.b=1", 'a={"b":1}'], "--vary a: overlaps with a.b, and one would replace the other"),
        (["train.steps.x=1"], "--vary train.steps.x: overlaps with train.steps"),
        (["a=1", "a=2"], "--vary a: stands in another --vary or --set too"),
        (["train.steps=1,2"], "--vary train.steps: stands in another --vary or --set too"),
        (["a=b/c,b c"], "a=b c and a=b/c would share the run folder x,a=b-c"),
        ([f"k{n}={'1' * 40}" for n in range(6)], "is too long for the name of a folder"),
    ],
)
def test_what_is_no_list_of_values_is_refused_with_its_key(given: list[str], words: str) -> None:
    with pytest.raises(UserError) as refused:
        combinations(["x"], varied(given, ["train.steps=3"]))
    assert words in str(refused.value)


def test_a_name_that_no_file_system_takes_is_refused(tmp_path: Path) -> None:
    keys = {f"model.key_of_section_{n}": ["x" * 30] for n in range(4)}
    name = run_name("c", {key: of[0] for key, of in keys.items()})
    config = "c" * (LONGEST_NAME - len(name) + 1)
    (longest,) = combinations([config], keys)
    assert len(longest.name) == LONGEST_NAME
    write_file(tmp_path / f"{longest.name}.log", b"")  # whose name is longer while it is written
    with pytest.raises(UserError, match="is too long for the name of a folder; vary fewer keys"):
        combinations([config + "c"], keys)


def test_a_value_too_deep_for_json_is_kept_for_the_check_of_its_key() -> None:
    deep = "[" * 100_000
    assert varied([f"a={deep}"], []) == {"a": [deep]}


def test_a_configuration_is_named_by_its_file_and_that_of_a_run_by_its_folder(tmp_path: Path) -> None:
    run, plain = tmp_path / "run 1" / "config.json", tmp_path / "plain" / "config.json"
    for path in (run, plain):
        path.parent.mkdir()
        path.touch()
    for name in ("outcome.json", "events.jsonl"):
        (run.parent / name).touch()
    (plain.parent / "x.json").touch()
    given = [str(run.parent), str(plain), str(run.with_name("outcome.json")), str(plain.with_name("x.json"))]
    assert configurations(given) == {
        "run-1": run,
        "config": plain,
        "outcome": run.with_name("outcome.json"),
        "x": plain.with_name("x.json"),
    }


def test_configurations_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="would share the name x"):
        configurations(["a/x.json", "b/x.json"])
    with pytest.raises(UserError, match="--config: is not given"):
        configurations([])


@pytest.mark.parametrize("name", ["[ ].json", "..json", "{}"])
def test_a_configuration_whose_name_leaves_no_letter_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="has no letter that can name a run folder; rename it"):
        configurations([str(tmp_path / name)])
