"""The tables of benchmarks/launches.py, and what docs/kernels.md makes of them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

import pytest

from benchmarks import launches
from benchmarks.launch_counter import Counts, Tally
from benchmarks.marked import with_table


def counts(kernels: int) -> Counts:
    """Of a model with so many layers, beside which one kernel stands."""
    places = {"layer": Tally(kernels=kernels, bytes=10 * kernels), "other": Tally(kernels=1)}
    operators = Counter({("layer", "mm"): kernels, ("other", "sum"): 1})
    return Counts(places, operators, Counter({"item": kernels}), to_host=kernels, to_device=2 * kernels)


def test_further_layers_add_what_the_second_adds() -> None:
    assert counts(1).plus(counts(2).plus(counts(1), -1), 4) == counts(5)


def test_a_wrong_configuration_is_a_sentence_before_any_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    assert launches.main(["--config", str(launches.CONFIGS / "switchall_tiny.json"), "nowhere.json"]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: --config: there is no file nowhere.json") and not said.out


def test_table() -> None:
    rows = launches.place_table(launches.CONFIGS / "switchall_tiny.json")
    assert {len(row) for row in rows} == {len(launches.HEAD)}
    assert [row[0] for row in rows][-4:] == [
        "all",
        "of it elementwise",
        "copies between host and GPU",
        "waits of the host",
    ]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def attention_row(rows: Mapping[str, Sequence[str]]) -> str:
    """What docs/kernels.md says of a model's attention kernels, without what they keep."""
    one, whole = rows["attention"], rows["all"]
    first, second = (f"{float(one[place].replace(',', '')):,.0f}" for place in (2, 4))
    return f"{one[1]} + {one[3]} | {first} + {second} | {whole[5]} | {whole[6]}"


def test_what_the_page_says_of_now_is_in_its_tables() -> None:
    text = launches.DOCS.read_text(encoding="utf-8")
    generated = text.partition("<!-- benchmarks.launches: begin -->")[2].partition("<!-- benchmarks.launches: end -->")
    tables = [
        {row[0]: row for row in map(cells, table.splitlines()) if len(row) == 9}
        for table in re.split(r"(?m)^\w+, \d+ x \d+ tokens", generated[0])[1:]
    ]
    said = {row[0]: row for row in map(cells, generated[2].splitlines()) if len(row) == 5}
    assert len(tables) == 2
    for now, rows in zip((2, 4), tables, strict=True):
        whole, host = rows["all"], "copies between host and GPU"
        expected = {
            "launches of a micro-step": whole[5],
            "GB of a micro-step": whole[6],
            "of it elementwise": rows["of it elementwise"][6],
            "launches of an optimizer step": whole[7],
            "of it for statistics": rows["statistics"][7],
            "MB of an optimizer step": f"{float(whole[8].replace(',', '')):,.0f}",
            host: str(int(rows[host][5]) + int(rows[host][7])),
            "waits of the host": str(int(rows["waits of the host"][5]) + int(rows["waits of the host"][7])),
        }
        assert {name: said[name][now] for name in expected} == expected
    row = next(line for line in text.splitlines() if line.startswith("| c4_switchhead_262m, kernels"))
    launched, moved, _, *micro_step = cells(row)[1:]
    assert " | ".join([launched, moved, *micro_step]) == attention_row(tables[1])


@pytest.mark.slow
def test_the_tables_in_the_documentation_are_current() -> None:
    text = launches.DOCS.read_text()
    current = with_table(text, "benchmarks.launches", launches.markdown())
    assert text == current, "run: python -m benchmarks.launches --markdown"
    dense = {row[0]: row for row in launches.place_table(launches.CONFIGS / "paper" / "c4_dense_262m.json")}
    row = next(line for line in text.splitlines() if line.startswith("| c4_dense_262m, kernels"))
    launched, moved, _, *micro_step = cells(row)[1:]
    assert " | ".join([launched, moved, *micro_step]) == attention_row(dense)
