"""The table of measured tiles: what is read, which launches take an entry, and what it may change."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from model.kernels import backend
from model.kernels.triton import route
from model.kernels.triton.tiles import Entry, checked, fits, load, measured, placed
from tests.model.kernels.triton.test_sigma_moe import Shape, check, loop, make_case

NORM = {
    "kernel": "norm forward",
    "capability": "9.0",
    "dtype": "bf16",
    "shape": {"d": 48},
    "rows": 100,
    "tiles": {"warps": 2},
    "measured": {"card": "an H100"},
}
BF16 = torch.bfloat16
pytestmark = pytest.mark.usefixtures("own_tiles")


def written(folder: Path, *entries: dict[str, Any]) -> Path:
    path = folder / "tiles.json"
    path.write_text(json.dumps(entries))
    return path


def test_a_file_is_what_its_entries_say(tmp_path: Path) -> None:
    table = load(written(tmp_path, NORM, NORM | {"capability": "10.0"}))
    assert [entry.as_json() for entry in table.values()] == [NORM, NORM | {"capability": "10.0"}]
    with placed(table.values()):
        assert measured("norm forward", BF16, at=100, d=48) == {"warps": 2}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kernel": "norm"}, "no kernel is called 'norm'"),
        ({"tiles": {"warps": 3}}, "warps 3"),
        ({"tiles": {"warps": 64}}, "warps 64"),
        ({"tiles": {"warps": "4"}}, "warps '4'"),
        ({"tiles": {"warps": 4, "stages": 2}}, "its tiles are warps"),
        ({"kernel": "norm backward", "tiles": {"warps": 4}}, "its tiles are warps, resident"),
        ({"kernel": "route place", "tiles": {"placers": 64, "counts": 0}}, "counts 0"),
        ({"dtype": "int8"}, "dtype 'int8' is not among"),
        ({"shape": {}}, "shape and rows are whole numbers"),
        ({"shape": {"d": 4.5}}, "shape and rows are whole numbers"),
        ({"rows": -1}, "shape and rows are whole numbers"),
        ({"capability": "9"}, "not enough values"),
        ({"more": 1}, "unexpected keyword"),
    ],
    ids=str,
)
def test_an_entry_that_no_kernel_could_launch_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match="tiles.json is no table of tiles: .*" + said):
        load(written(tmp_path, NORM | change))


def test_which_numbers_fit() -> None:
    for name, right, wrong in (
        ("warps", (1, 32), (0, 3, 64)),
        ("stages", (1, 3, 8), (0, 9)),
        ("registers", (0, 24, 168, 248), (8, 16, 100, 256)),
        ("rows", (1, 4096), (0, 48, -64, 64.0, "64")),
    ):
        assert [value for value in (*right, *wrong) if fits(name, value)] == list(right)


def test_two_entries_of_one_shape_are_refused(tmp_path: Path) -> None:
    other = NORM | {"tiles": {"warps": 4}}
    with pytest.raises(ValueError, match="two entries of norm forward"):
        load(written(tmp_path, NORM, other))
    path = tmp_path / "tiles.json"
    for text in ("{", "[1]", '{"a": 1}', ""):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"tiles\.json is no table of tiles"):
            load(path)


def entry(kernel: str, tiles: dict[str, int], rows: int = 0, **shape: int) -> Entry:
    return checked(Entry(kernel=kernel, capability=(9, 0), dtype="bf16", shape=shape, rows=rows, tiles=tiles))


def test_which_launches_take_an_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of its very shape, dtype and card, over its rows or more."""
    with placed([entry("norm forward", {"warps": 2}, rows=100, d=48)]) as table:
        assert measured("norm forward", BF16, at=99, d=48) is None
        assert measured("norm forward", BF16, at=100, d=64) is None
        assert measured("norm forward", torch.float16, at=100, d=48) is None
        assert measured("norm forward", torch.float64, at=100, d=48) is None
        assert measured("norm backward", BF16, at=100, d=48) is None
        assert not table.used
        assert measured("norm forward", BF16, at=100, d=48) == measured("norm forward", BF16, at=999, d=48)
        assert table.used == set(table)
        monkeypatch.setattr(backend, "cuda_capability", lambda: (10, 0))
        assert measured("norm forward", BF16, at=100, d=48) is None
    assert measured("norm forward", BF16, at=100, d=48) is None


def test_a_shape_is_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And again where the table is another."""
    with placed([entry("norm forward", {"warps": 2}, d=48)]) as table:
        assert [measured("norm forward", BF16, d=width) for width in (48, 64)] == [{"warps": 2}, None]
        monkeypatch.setattr(table, "get", lambda key: 1 / 0)
        assert [measured("norm forward", BF16, d=width) for width in (48, 64)] == [{"warps": 2}, None]
        with placed([entry("norm forward", {"warps": 8}, d=48)]):
            assert measured("norm forward", BF16, d=48) == {"warps": 8}
    assert measured("norm forward", BF16, d=48) is None


def test_entries_that_are_placed_stand_before_others_and_go() -> None:
    with placed([entry("norm forward", {"warps": 2}, d=48), entry("norm forward", {"warps": 2}, d=64)]):
        with placed([entry("norm forward", {"warps": 8}, d=48)]):
            assert measured("norm forward", BF16, d=48) == {"warps": 8}
            assert measured("norm forward", BF16, d=64) == {"warps": 2}
        wrong = dataclasses.replace(entry("norm forward", {"warps": 8}, d=48), tiles={"warps": 5})
        with pytest.raises(ValueError, match="warps 5"), placed([wrong]):
            pass
        assert measured("norm forward", BF16, d=48) == {"warps": 2}


def test_without_entries_a_launch_asks_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "cuda_capability", lambda: 1 / 0)
    assert measured("norm forward", BF16, d=48) is None


@pytest.mark.parametrize("hidden", [16, pytest.param(32, marks=pytest.mark.slow)])
def test_an_entry_reaches_the_launch_and_results_stay(hidden: int) -> None:
    """σ-MoE forward and backward, in 16 rows instead of 64: right, the same again bit for bit, no races. Also where the
    backward kernel alone takes the hidden layer in chunks."""
    shape = Shape(N=50, d=40, E=5, G=24, k=3)
    common, in_pieces = {"reduce": 16, "out": 16, "warps": 4, "stages": 2}, {"piece": 8, "registers": 0}
    entries = [
        *(
            entry(f"sigma_moe {phase}", {"rows": 16} | common | more, rows=150, d=40, E=5, here=5, k=3, G=24, swiglu=0)
            for phase, more in (("forward", {"hidden": 32}), ("backward", {"hidden": hidden} | in_pieces))
        ),
        *(
            entry("sigma_moe sum", {"tokens": 8, "columns": 32, "warps": 1}, rows=50, d=40, rows_each=3 * chunks)
            for chunks in {1, -(-24 // hidden)}
        ),
        entry(
            "sigma_moe weight gradient",
            {"rows": 16, "hidden": 16, "out": 16, "warps": 4, "stages": 2},
            rows=150, d=40, E=5, here=5, k=3, width=24,
        ),
    ]  # fmt: skip
    case = make_case(shape, BF16)
    own = check(case, loop(case), BF16)
    with placed(entries) as table:
        launches = check(case, loop(case), BF16)
    assert table.used == set(table)
    assert [launch.kernel for launch in launches] == [launch.kernel for launch in own]
    assert all(before.grid != after.grid for before, after in zip(own, launches, strict=True))


def test_a_router_places_by_the_blocks_of_tokens_that_it_chose_in() -> None:
    """In 16 tokens, where the kernels' own are 64; one block a program, so that each begins at its own token."""
    N, d, R, E, k = 150, 16, 2, 4, 2
    shape = {"d": d, "R": R, "E": E, "k": k}
    entries = [
        entry("route choose and place", {"tokens": 16, "depth": 16, "warps": 4, "stages": 2}, rows=N, **shape),
        entry("route place", {"placers": 16, "counts": 4}, rows=N, **shape),
    ]
    draw = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*size, generator=draw).to(BF16) for size in ((N, d), (R, E, d)))
    with placed(entries) as table:
        _, _, index, load, order = route.forward(x, weight, None, k, False)
        assert table.used == set(table)
    slots = index.transpose(0, 1).reshape(R, -1)
    assert torch.equal(order, slots.sort(dim=-1, stable=True).indices)
    assert torch.equal(load, torch.stack([row.bincount(minlength=E) for row in slots]))
