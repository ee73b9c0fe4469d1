"""What launch/compare.py says of runs: by hand, of two real layouts, and of what cannot be compared."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from data_prep.shards.format import Manifest
from pretrain.cli.compare import main
from pretrain.views.comparison import differences, differing_facts, losses, open_runs, source_losses_at_end
from pretrain.views.comparison_text import text
from pretrain.views.reading import RunView
from tests.harness import run_ranks
from tests.pretrain.runs import light_config, train_runs
from tests.pretrain.views.compared import of_mixture, row, runs_of, write


def test_losses_at_equal_steps_tokens_and_flops(tmp_path: Path) -> None:
    """The other run takes twice the tokens a step, and three times the FLOPs a token."""
    one = write(tmp_path / "one", [row(n, 10.0 - n / 100) for n in range(1, 401)])
    other = [row(n, 9.0 - n / 100, 200 * n, flops_per_second=9000.0 * n) for n in range(1, 301)]
    runs = runs_of(one, write(tmp_path / "other", other))
    assert [run.flops_per_token for run in runs] == [60.0, 180.0]
    steps = dict(losses(runs, "step"))
    # Means of the last 20 points: step 281 to 300 of both.
    assert steps[300.0] == pytest.approx([10.0 - 2.905, 9.0 - 2.905])
    tokens = dict(losses(runs, "tokens"))
    # The last 20 steps of the first run begin at 38,100 tokens: steps 191 to 200 of the other.
    assert tokens[40_000.0] == pytest.approx([10.0 - 3.905, 9.0 - 1.955])
    flops = dict(losses(runs, "flops"))
    assert max(flops) == 400 * 100 * 60
    assert flops[2_400_000.0] == pytest.approx([10.0 - 3.905, 9.0 - 0.65])  # from 2,286,000 on: steps 64 to 66


def test_runs_that_never_were_at_one_place_are_said_so(tmp_path: Path) -> None:
    """The other begins at step 20, after as many tokens as the first's step 2; neither table is left out."""
    first = write(tmp_path / "first", [row(step, 5.0) for step in range(1, 5)])
    other = write(tmp_path / "other", [row(step, 5.0, tokens=10 * step) for step in range(20, 50, 10)])
    said = text(runs_of(first, other), 0.0)
    assert "Loss at equal steps: no stretch of them is in all runs\n  nothing\n" in said
    assert re.search(r"Loss at equal tokens\n.*\n.*\b200\b", said)


def test_a_branch_is_compared_with_the_same_steps_of_its_origin(tmp_path: Path) -> None:
    """Their losses are the same in every step that both have, so they are at every place, and in the mean of any."""
    whole = [row(n, 10.0 - n / 10) for n in range(1, 61)]
    runs = runs_of(write(tmp_path / "whole", whole), write(tmp_path / "branch", whole[40:]))
    for axis in ("step", "tokens", "flops"):
        found = losses(runs, axis)
        assert len(found) >= 5
        assert [ours for _, (ours, _) in found] == [theirs for _, (_, theirs) in found]
    assert losses(runs, "step")[0] == (41.0, [10.0 - 4.1] * 2)
    assert math.isnan(runs[1].loss_at("step", 40.0)) and math.isnan(runs[1].window_at("step", 40.0))
    assert runs[1].loss_at("step", 41.0) == pytest.approx(10.0 - 4.1)
    assert runs[0].window_at("step", 60.0) == 55.0 and math.isnan(runs[0].window_at("step", 61.0))  # a tenth of 60


def test_a_run_that_is_given_twice_is_told_from_itself(tmp_path: Path) -> None:
    one, other = (write(tmp_path / folder / "run", [row(1, 5.0)]) for folder in "ab")
    assert [run.label for run in runs_of(one, other, one)] == ["a/run (1)", "b/run", "a/run (3)"]
    assert [run.label for run in runs_of(one, one)] == ["run (1)", "run (2)"]


def test_places_leave_the_first_hundredth_out(tmp_path: Path) -> None:
    """Losses of the first steps fall so fast that they say nothing of the runs."""
    run = write(tmp_path / "long", [row(n, 5.0) for n in range(1, 2001)])
    assert [place for place, _ in losses(runs_of(run), "step")] == [20.0, 50.0, 126.0, 317.0, 796.0, 2000.0]


def test_a_run_of_long_steps_has_the_loss_of_its_last_one_before_a_place(tmp_path: Path) -> None:
    """It has no point in the stretch that the other's window covers."""
    often = write(tmp_path / "often", [row(n, 5.0) for n in range(1, 31)])
    seldom = write(tmp_path / "seldom", [row(n, 5.0 - n, 1000 * n) for n in range(1, 4)])
    found = dict(losses(runs_of(often, seldom), "tokens"))
    between = [place for place in found if 1000 < place < 2000]
    assert between and all(found[place][1] == 4.0 for place in between)


def test_flops_of_a_run_whose_model_changed_are_those_of_its_steps(tmp_path: Path) -> None:
    """60 FLOPs a token for 10 steps of 100 tokens, then 90 for 10 of 200, as after a resume with a longer context."""
    rows = [row(n, 5.0) for n in range(1, 11)]
    rows += [row(n, 5.0, 1000 + 200 * (n - 10), flops_per_second=4500.0 * n) for n in range(11, 21)]
    (run,) = runs_of(write(tmp_path / "run", rows))
    flops = run.column("flops")
    assert flops[9] == pytest.approx(1000 * 60) and flops[-1] == pytest.approx(1000 * 60 + 2000 * 90)


def test_the_first_step_that_differs(tmp_path: Path) -> None:
    first = [row(n, 5.0, lr=0.1) for n in range(1, 9)]
    second = [row(n, 5.0 + (2e-6 if n >= 3 else 0.0), lr=0.1, step_seconds=n) for n in range(1, 11)]
    second[5]["loss"], second[6]["grad_norm"] = 5.5, None
    a, b = runs_of(write(tmp_path / "a", first), write(tmp_path / "b", second))
    common, found = differences(a, b, 1e-5)
    assert common == 8
    loss, norm = found
    assert (loss.key, loss.step, loss.values, loss.largest_step, loss.beyond) == ("loss", 3, (5.0, 5.000002), 6, 6)
    assert loss.largest == pytest.approx(0.5 / 5.5)
    assert (norm.key, norm.step, norm.largest) == ("grad_norm", 7, math.inf) and math.isnan(norm.values[1])
    assert differences(a, a, 0.0) == (8, [])


def test_losses_that_are_not_finite_are_said_to_be(tmp_path: Path) -> None:
    """A run writes them as null. `-` says that a run has not been there, or was not validated then."""
    well = [row(n, 5.0) for n in range(1, 31)]
    paths = [
        write(tmp_path / "well", well),
        write(tmp_path / "bad", [*well[:9], *(row(n, None) for n in range(10, 31))]),
    ]
    for path, steps, loss in ((paths[0], (10, 20, 30), 4.0), (paths[1], (20, 30), None)):
        rows = [{"event": "validation", "step": n, "loss": loss, "loss/a": loss, "bits_per_byte": loss} for n in steps]
        (path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in rows))
    runs = runs_of(*paths)
    said = text(runs, 1e-5)
    lines = {line.split()[0]: line.split()[1:] for line in said.partition("Loss at equal steps")[2].splitlines()[2:8]}
    assert lines["30"] == ["5.0000", "not", "finite"] and lines["1"] == ["5.0000", "5.0000", "(+0)"]
    table = said.partition("Validation loss at equal steps\n")[2].splitlines()[1:4]
    assert [line.split()[1:] for line in table] == [["4.0000", "-"], *[["4.0000", "not", "finite"]] * 2]
    assert re.search(r"by source after step 30\n.*\na +4\.0000 +not finite\n", said)
    (line,) = (line for line in said.splitlines() if line.startswith("loss "))
    assert re.split(r"  +", line) == ["loss", "10", "5", "not finite", "one is not finite", "10", "10"]
    (bad,) = runs_of(paths[1])
    assert bad.loss_at("step", 30.0) == math.inf


def test_values_that_both_lack_or_that_are_both_infinite_are_no_difference(tmp_path: Path) -> None:
    ours = [row(1, None, odd=math.inf), row(2, 0.0, odd=1.0), row(3, 2.0, odd=2.0)]
    theirs = [row(1, None, odd=math.inf), row(2, 0.0, odd=1.0), row(3, 2.5, odd=4.0)]
    a, b = runs_of(write(tmp_path / "a", ours), write(tmp_path / "b", theirs))
    _, (loss, odd) = differences(a, b, 0.3)
    assert (loss.key, loss.step, loss.largest, loss.largest_step, loss.beyond) == ("loss", 3, 0.2, 3, None)
    assert (odd.key, odd.step, odd.largest, odd.largest_step, odd.beyond) == ("odd", 3, 0.5, 3, 3)
    assert [found.beyond for found in differences(a, b, 0.5)[1]] == [None, None]


def test_settings_and_software_that_differ(tmp_path: Path) -> None:
    one = write(tmp_path / "one", [row(1, 5.0)], {"model": {"d_model": 8, "x": [1]}, "train": {"seed": 1}})
    later = {"model": {"d_model": 8, "x": [2]}, "train": {"seed": 1, "new": 3}}
    other = write(tmp_path / "other", [row(1, 5.0)], later)
    started = {"event": "started", "ranks": 4, "software": {"torch": "2.13"}, "layout": {"data": 4}}
    (other / "events.jsonl").write_text(json.dumps(started) + "\n")
    assert dict(differing_facts(runs_of(one, other))) == {
        "model.x": [[1], [2]],
        "train.new": [None, 3],
        "ranks": [None, 4],
        "software.torch": [None, "2.13"],
        "layout.data": [None, 4],
    }


def test_two_layouts_of_one_run(prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = ("train.steps=4", "evaluate.sequences=0")
    one, two = tmp_path / "one rank", tmp_path / "<two>"
    run_ranks(train_runs, 1, [(light_config(prepared, *keys), one)])
    run_ranks(train_runs, 2, [(light_config(prepared, *keys, "parallel.zero=3", ranks=2), two)])
    capsys.readouterr()
    assert main([str(one), str(two)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"(?m)^parallel\.zero +1 +3$", printed) and re.search(r"(?m)^ranks +1 +2$", printed)
    assert re.search(r"(?m)^layout\.data +1 +2$", printed)
    digests = [open_runs([RunView.open(path)])[0].view.last("started")["data_digest"] for path in (one, two)]
    assert digests == [Manifest.load(prepared).digest] * 2
    assert "First step at which <two> differs from one rank (4 steps of both)" in printed
    lines = re.findall(r"(?m)^(loss|grad norm) .* never$", printed)
    assert set(lines) <= {"loss", "grad norm"} and "over 1e-05 from" in printed
    assert not re.search(r"(?m)^(step seconds|memory bytes|tokens per second) ", printed)
    page = (one / "comparison" / "two" / "comparison.html").read_text()
    assert "<two>" not in page and "&lt;two&gt;" in page and not re.search(r"(src|href)=.https?:", page)
    (data,) = re.findall(r"data:image/png;base64,([^\"]+)", page)
    assert len(Image.open(io.BytesIO(base64.b64decode(data))).getcolors(1 << 24) or ()) > 100
    assert (one / "comparison" / "two" / "comparison.png").read_bytes() == base64.b64decode(data)


def test_equal_runs_are_said_to_be_equal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row(n, 5.0) for n in range(1, 4)]
    one, other = (write(tmp_path / name, rows) for name in ("a", "b"))
    assert main([str(one), str(other), "--out", str(tmp_path / "page")]) == 0
    printed = capsys.readouterr().out
    assert "differs from a (3 steps of both): none, every value is the same in every bit" in printed
    assert {path.name for path in (tmp_path / "page").iterdir()} == {"comparison.html", "comparison.png"}


def test_a_single_run_has_its_curves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write(tmp_path / "a", [row(n, 6.0 - n) for n in range(1, 4)])
    validations = [{"event": "validation", "time": 0.0, "step": n, "loss": 5.0 + n / 8} for n in range(20)]
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in validations))
    assert main([str(run)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Loss by steps\nsteps ") and re.search(r"(?m)^3 +3\.0000$", printed)
    assert "Loss by tokens" not in printed, "the same losses once more"
    listed = re.findall(r"(?m)^(\d+) +(\d\.\d{4})$", printed.partition("Validation loss by steps\n")[2])
    assert [int(step) for step, _ in listed] == [0, 3, 5, 8, 11, 14, 16, 19]
    assert all(float(loss) == 5.0 + int(step) / 8 for step, loss in listed)
    assert "differs" not in printed and f"{run / 'curves' / 'comparison.html'}: the page" in printed
    page = (run / "curves" / "comparison.html").read_text()
    assert "<title>Curves of a</title>" in page and "data:image/png" in page


def test_the_accuracies_of_tasks_are_compared_after_the_last_step_of_all(tmp_path: Path) -> None:
    def evaluated(name: str, *rows: tuple[str, int, float | None]) -> Path:
        path = write(tmp_path / name, [row(1, 5.0)])
        lines = [{"event": "evaluation", "task": task, "step": step, "accuracy": value} for task, step, value in rows]
        (path / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return path

    one = evaluated("one", ("lambada", 4, 0.25), ("lambada", 8, 0.5), ("blimp", 8, 0.75), ("cbt", 8, 0.5))
    other = evaluated("other", ("lambada", 4, 0.3125), ("lambada", 6, 0.75), ("blimp", 6, 0.75), ("cbt", 8, None))
    third = evaluated("third")
    said = text(runs_of(one, other, third), 0.0).partition("Accuracy of tasks\n")[2].splitlines()
    assert said[0].split() == ["task", "after", "step", "one", "other", "third"]
    assert said[1].split() == ["cbt", "8", "50.00%", "-", "-"]
    assert said[2].split() == ["lambada", "4", "25.00%", "31.25%", "(+6.25)", "-"] and said[3] == ""
    assert "Accuracy" not in text(runs_of(third), 0.0)
    for path, limit in ((one, 20), (other, 20), (third, 0)):  # a run without tasks has accuracies of no examples
        (path / "config.json").write_text(json.dumps({"evaluate": {"tasks_limit": limit}}))
    assert "note:" not in text(runs_of(one, other, third), 0.0)
    (other / "config.json").write_text(json.dumps({"evaluate": {"tasks_limit": 30}}))
    assert "note: evaluate.tasks_limit differ: accuracies of tasks" in text(runs_of(one, other, third), 0.0)


def test_each_split_has_a_table_of_its_own(tmp_path: Path) -> None:
    """Two runs on the test split, by source, and one on the other."""
    one = of_mixture(tmp_path / "one", {4: {}, 8: {"c4": 3.5}}, split="test", loss=4.5)
    other = of_mixture(tmp_path / "other", {8: {"c4": 3.25}}, split="test", loss=4.25)
    third = of_mixture(tmp_path / "third", {8: {"c4": 3.0}})
    longer = of_mixture(tmp_path / "longer", {8: {"c4": 3.0}, 12: {"c4": 2.5}})
    assert source_losses_at_end(runs_of(third, longer)) == (8, [("c4", [3.0, 3.0])])
    said = text(runs_of(one, other), 0.0)
    assert re.search(r"\nTest loss at equal steps\n.*\n4 +4\.5000 +-\n8 +4\.5000 +4\.2500 \(-0\.2500\)\n", said)
    assert (
        re.search(r"\nTest loss by source after step 8\n.*\nc4 +3\.5000 +3\.2500 ", said) and "Validation" not in said
    )
    said = text(runs_of(one, third), 0.0)
    assert re.search(r"\nValidation loss at equal steps\n.*\n8 +- +4\.0000\n", said)
    assert re.search(r"\nTest loss at equal steps\n.*\n4 +4\.5000 +-\n8 +4\.5000 +-\n", said)


@pytest.mark.parametrize(
    "names, words",
    [
        (["good", "missing"], "RUN: there is no folder"),
        (["good", "none"], "is no run folder"),
        (["good", "empty"], "has no step in metrics.jsonl yet"),
        (["good", "good", "--tolerance=-1"], "--tolerance: is -1.0; it must be 0 or more"),
    ],
)
def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str], names: list[str], words: str) -> None:
    write(tmp_path / "good", [row(1, 5.0)])
    write(tmp_path / "empty", [])
    (tmp_path / "none").mkdir()
    assert main([name if name.startswith("--") else str(tmp_path / name) for name in names]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and words in printed.err and printed.err.count("\n") == 1
    assert not (tmp_path / "good" / "comparison").exists()


def test_damaged_lines_runs_without_common_steps_and_other_versions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = write(tmp_path / "one", [row(n, 5.0) for n in (1, 2)])
    late = write(tmp_path / "late", [{"step": n, "loss": None} for n in (7, 8)])
    with open(late / "metrics.jsonl", "a") as file:
        file.write("{not json}\n")
    assert main([str(one), str(late)]) == 0
    printed = capsys.readouterr()
    assert printed.err == "late: 1 damaged line passed over\n"
    assert "(0 steps of both): they have no step in common" in printed.out


def test_a_source_keeps_its_name_where_values_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = "epoch/c4_en"
    folders = [write(tmp_path / name, [row(1, 3.0) | {key: value}]) for name, value in (("a", 0.1), ("b", 0.2))]
    assert main([str(folder) for folder in folders]) == 0
    assert f"\n{key} " in capsys.readouterr().out


def test_the_legend_names_every_run_whatever_its_folder_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """matplotlib leaves out labels that begin with _, and takes what stands between two $ for a formula."""
    drawn_labels: list[list[str]] = []
    print_png = FigureCanvasAgg.print_png

    def noted(canvas: FigureCanvasAgg, *given: Any, **options: Any) -> Any:
        drawn_labels.extend([text.get_text() for text in legend.get_texts()] for legend in canvas.figure.legends)
        return print_png(canvas, *given, **options)

    monkeypatch.setattr(FigureCanvasAgg, "print_png", noted)
    names = ["_old", r"a$\frac$b", "<b>&x", "plain"]
    assert main([str(write(tmp_path / name, [row(n, 5.0) for n in (1, 2)])) for name in names]) == 0
    assert drawn_labels == [names]


def test_a_folder_that_cannot_be_written_is_named_with_its_option_after_the_tables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write(tmp_path / "run", [row(1, 5.0)])
    (tmp_path / "file").write_text("mine")
    assert main([str(run), "--out", str(tmp_path / "file")]) == 2
    printed = capsys.readouterr()
    assert printed.out.startswith("Loss by steps") and printed.err.startswith("error: --out: ")
    assert printed.err.count("\n") == 1 and (tmp_path / "file").read_text() == "mine"


def test_long_settings_are_shown_where_they_differ(tmp_path: Path) -> None:
    long = "a configuration whose batch and rates are those of a larger one, and which varies "
    texts = [long + "train.seed", long + "train.steps", None]
    configs = [{"description": text} if text else {} for text in texts]
    runs = [write(tmp_path / str(n), [row(1, 5.0)], config) for n, config in enumerate(configs)]
    (line,) = (line for line in text(runs_of(*runs), 0.0).splitlines() if line.startswith("description"))
    assert line.split()[1:] == ["...which", "varies", "train.seed", "...which", "varies", "train.steps", "-"]
    # What differs within the first letters is cut at its end, as before.
    other = write(tmp_path / "other", [row(1, 5.0)], {"description": "b" + long})
    (line,) = (line for line in text(runs_of(runs[0], other), 0.0).splitlines() if line.startswith("description"))
    assert line.count("a configuration whose") == 2 and line.count("...") == 2


def test_a_name_that_is_no_text_is_drawn_with_escapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder of an older system, with the name in Latin-1; another in letters that the font of pictures lacks."""
    latin, han = (write(tmp_path / name, [row(1, 5.0)]) for name in (os.fsdecode(b"caf\xe9"), "漢"))
    assert main([str(latin), str(han), "--out", str(tmp_path / "out")]) == 0
    assert "caf\\udce9" in (tmp_path / "out" / "comparison.html").read_text() and capsys.readouterr().err == ""


def test_of_damaged_metrics_nobody_waits_for_a_first_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "run", [])
    (folder / "metrics.jsonl").write_text("torn\nlines\n")
    assert main([str(folder)]) == 2
    said = capsys.readouterr().err
    assert "whose 2 lines are damaged" in said and "wait" not in said


def test_the_text_has_the_width_of_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every number of the wide text is there, and the manifests, which end alike, are shown where they differ."""
    paths = [
        write(
            tmp_path / f"tiny,learning_rate={n}e-3,weight_decay=0.1",
            [row(step, 9.0 - n * step / 100) for step in range(1, 9)],
            {"data": {"manifest": f"/a/long/way/to/the/data/of/c4_{n}/manifest.json"}},
        )
        for n in range(3)
    ]
    monkeypatch.setenv("COLUMNS", "40")
    assert main([*map(str, paths), "--out", str(tmp_path / "out")]) == 0
    narrow = capsys.readouterr().out.partition(str(tmp_path))[0]
    tables = [line for line in narrow.splitlines() if not line.startswith(("First", "note"))]
    assert max(map(len, tables)) <= 40
    assert all(f"c4_{n}" in narrow for n in range(3))
    assert "largest difference\n" in narrow and " (relative)" in narrow
    wide = text(runs_of(*paths), 1e-5)
    numbers = set(re.findall(r"\d+\.\d{4}\b", wide))
    assert numbers and numbers <= set(re.findall(r"\d+\.\d{4}\b", narrow))
    assert max(map(len, wide.splitlines())) > 100


def of_text(folder: Path, digest: str, *validations: tuple[int, float, float | None]) -> Path:
    """A run of the data with that digest, validated after these steps with these losses and bits per byte."""
    path = write(folder, [row(step, 5.0) for step in range(1, 9)], {"data": {"manifest": f"data/{digest}"}})
    events: list[dict[str, Any]] = [{"event": "started", "step": 0, "time": 1e9, "data_digest": digest * 64}]
    for step, loss, bits in validations:
        known = {} if bits is None else {"bits_per_byte": bits}
        events.append({"event": "validation", "time": 1e9, "step": step, "split": "validation", "loss": loss, **known})
    (path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return path


def test_runs_of_other_tokenizers_are_compared_by_bits_per_byte(tmp_path: Path) -> None:
    small = of_text(tmp_path / "small", "a", (4, 4.0, 1.9), (8, 3.5, 1.75))
    large = of_text(tmp_path / "large", "b", (4, 6.0, 1.8), (8, 5.0, 1.5))
    said = text(runs_of(small, large), 1e-5)
    (table,) = re.findall(r"Validation bits per byte at equal steps\n(?:.+\n)+", said)
    assert [line.split() for line in table.splitlines()[-2:]] == [
        ["4", "1.9000", "1.8000", "(-0.1000)"],
        ["8", "1.7500", "1.5000", "(-0.2500)"],
    ]
    assert "note: data digest and data.manifest differ: losses per token of different texts or tokenizers say " in said
    assert "; bits per byte of validations compare models of different tokenizers on the same text\n" in said
    # Of the same text and tokens the losses say it all.
    assert "bits per byte" not in text(runs_of(small, of_text(tmp_path / "again", "a", (8, 3.0, 1.5))), 1e-5)


def test_of_runs_without_bits_per_byte_it_is_said_how_to_get_them(tmp_path: Path) -> None:
    """Of an earlier version."""
    runs = runs_of(of_text(tmp_path / "new", "a", (8, 3.5, 1.75)), of_text(tmp_path / "old", "b", (8, 5.0, None)))
    said = text(runs, 1e-5)
    assert "those of old are not recorded: python launch/evaluate.py RUN computes them" in said
    (table,) = re.findall(r"Validation bits per byte at equal steps\n(?:.+\n)+", said)
    assert table.splitlines()[-1].split() == ["8", "1.7500", "-"]
