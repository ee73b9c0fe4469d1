"""launch/analyze.py from a checkpoint to the page: what it writes, and what it refuses."""

from __future__ import annotations

import base64
import errno
import io
import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from common.errors import UserError
from pretrain.analysis.report import Settings, encoded, write
from pretrain.api import open_model
from pretrain.cli.analyze import main
from pretrain.saved_model import load_model
from tests.harness import run_ranks
from tests.pretrain.runs import MOA, small_config, train_runs
from tests.pretrain.saved import add_moving_average

TEXT = "a word & a word, <b>another</b> word;\n" * 12
STEPS = ("train.steps=1", "evaluate.sequences=0")
DENSE = (
    "model.attention.type=dense",
    "model.attention.num_heads=3",
    "model.feedforward.type=dense",
    "model.position.type=xl",
)


@pytest.fixture(scope="module")
def runs(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of `switchall` and `dense`, the second with Transformer-XL's memory."""
    folder = tmp_path_factory.mktemp("runs")
    trained = [(small_config(prepared, *STEPS), folder / "switchall")]
    trained.append((small_config(prepared, *STEPS, *DENSE), folder / "dense"))
    run_ranks(train_runs, 1, trained)
    (folder / "text").write_text(TEXT)
    return folder


class Elements(HTMLParser):
    """All elements of a page, each opened and closed."""

    VOID = ("meta", "img", "br")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check_page(folder: Path) -> list[dict[str, str | None]]:
    """The page stands alone and is well-formed; every picture is drawn. Returns its images."""
    html = (folder / "analysis.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|url\(|@import|<script|<link|<iframe", html)
    elements = Elements(html).found
    images = [attributes for tag, attributes in elements if tag == "img"]
    for attributes in images:
        source = attributes["src"] or ""
        assert source.startswith("data:image/png;base64,") and attributes["alt"]
        picture = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))).convert("RGB")
        assert len(picture.getcolors(1 << 24) or ()) > 20, "nothing is drawn"
    names = {attributes["id"] for _, attributes in elements if "id" in attributes}
    assert {a["href"] for tag, a in elements if tag == "a"} == {f"#{name}" for name in names}
    written = {base64.b64encode(path.read_bytes()).decode() for path in folder.glob("*.png")}
    assert written == {(a["src"] or "").partition(",")[2] for a in images}, "the page and the files differ"
    return images


def test_two_runs_side_by_side(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = runs / "switchall" / "analysis" / "step-00000001-with-dense"
    named = [str(runs / "switchall"), str(runs / "dense"), "--text", str(runs / "text")]
    assert main([*named, "--layers", "1", "--map-tokens", "9", "--window", "2"]) == 0
    assert f"{out / 'analysis.html'}: the page" in capsys.readouterr().out
    # The maximum, the heads of two runs; of the one with experts three loads, the selection, and what is together.
    assert len(check_page(out)) == 1 + 2 + 3 + 1 + 1
    html = (out / "analysis.html").read_text(encoding="utf-8")
    assert "<b>another" not in html and "attention value, head 1" in html and "share dead" in html

    saved = load_model(runs / "switchall")
    ids = saved.tokenizer.encode(TEXT)
    arrays, told = load_file(out / "analysis.safetensors"), json.loads((out / "analysis.json").read_text())
    assert arrays["switchall/tokens"].tolist() == ids and told["runs"][0]["pieces"] == saved.tokenizer.pieces(ids)
    with torch.no_grad():
        windows = [saved.model.logits(torch.tensor([ids[i : i + 16]]))[0][0] for i in range(0, len(ids), 16)]
    expected = torch.nn.functional.cross_entropy(torch.cat(windows)[:-1], torch.tensor(ids[1:]))
    assert told["runs"][0]["loss"] == pytest.approx(float(expected), abs=1e-5)
    assert arrays["switchall/blocks.1.attention/weights"].shape == (2, 9, 9)
    assert arrays["dense/blocks.1.attention/weights"].shape == (3, 9, 16 + 9)  # a window of memory
    assert arrays["switchall/blocks.0.feedforward/index"].shape == (len(ids), 1, 2)
    assert arrays["switchall/blocks.1.attention.output/load"].sum() == len(ids) * 2 * 2
    assert [r["name"] for r in told["runs"][0]["routers"]][:3] == [
        "blocks.0.attention.value",
        "blocks.0.attention.output",
        "blocks.0.feedforward",
    ]
    for router in told["runs"][0]["routers"]:
        load = arrays[f"switchall/{router['name']}/load"]
        assert router["load_max"] == pytest.approx(float((load.max(1) / load.mean(1)).max()))
        assert (router["experts"], router["dead_experts"]) == (load.size, int((load == 0).sum()))
    assert not told["runs"][1]["routers"]


def test_of_a_checkpoint_in_no_run_the_page_goes_beside_the_weights(runs: Path, tmp_path: Path) -> None:
    """As for the results of an evaluation: a folder of weights, to be copied or published, holds nothing else."""
    copy = shutil.copytree(runs / "dense" / "checkpoints" / "step-00000001", tmp_path / "mean")
    before = sorted(copy.rglob("*"))
    assert main([str(copy), "--text", str(runs / "text"), "--layers", "0", "--map-tokens", "9"]) == 0
    assert (tmp_path / "analysis" / "mean" / "analysis.html").exists() and sorted(copy.rglob("*")) == before


def test_the_page_of_the_moving_average_says_so_and_leaves_that_of_the_weights(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(runs / "dense", tmp_path / "run")
    add_moving_average(run / "checkpoints" / "step-00000001", lambda weight: weight.flip(-1) + 0.05)
    of_weights, of_average = (run / "analysis" / f"step-00000001{end}" for end in ("", "-ema"))
    options = ["--text", str(runs / "text"), "--layers", "0", "--map-tokens", "9"]
    assert main([str(run), *options]) == 0
    before = {path.name: path.read_bytes() for path in of_weights.iterdir()}
    assert "average" not in capsys.readouterr().out
    assert main([str(run), *options, "--ema"]) == 0
    assert "run, step 1, moving average: " in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in of_weights.iterdir()} == before
    told = [json.loads((folder / "analysis.json").read_text())["runs"][0] for folder in (of_weights, of_average)]
    assert [one["moving_average"] for one in told] == [False, True] and told[0]["loss"] != told[1]["loss"]
    pages = [(folder / "analysis.html").read_text(encoding="utf-8") for folder in (of_weights, of_average)]
    assert ["moving average" in page for page in pages] == [False, True]
    losses = [open_model(run, ema=ema).loss(TEXT).mean for ema in (False, True)]
    assert [one["loss"] for one in told] == pytest.approx(losses, rel=1e-5)


def test_the_program_of_the_page(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = Path(__file__).resolve().parents[3] / "docs" / "analysis.md"
    (program,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").symlink_to(runs / "switchall")
    monkeypatch.chdir(tmp_path)
    exec(compile(program, str(page), "exec"), {})
    assert "'blocks.1.attention.output', 'blocks.1.feedforward'" in capsys.readouterr().out


def test_the_window_of_the_maps_is_one_that_the_tokens_fill() -> None:
    """Of 9 tokens, in windows of 4: three, of which the first 8 tokens have two."""
    tokenizer = SimpleNamespace(encode=lambda text: list(range(9)))
    saved: Any = SimpleNamespace(tokenizer=tokenizer, config=SimpleNamespace(model=SimpleNamespace(sequence_length=4)))
    assert encoded(saved, "", Settings(window=2)) == list(range(9))
    assert encoded(saved, "", Settings(tokens=8, window=1)) == list(range(8))
    for settings, said in (
        (Settings(window=3), "9 tokens in 3 windows"),
        (Settings(tokens=8, window=2), "8 tokens in 2"),
    ):
        with pytest.raises(UserError, match=rf"^--window: the text has {said}"):
            encoded(saved, "", settings)


def test_a_second_analysis_leaves_no_picture_of_the_first(tmp_path: Path) -> None:
    write(tmp_path / "out", [], {"a-0.png": b"first", "b.png": b"first"}, "text")
    (tmp_path / "out" / "mine.png").write_bytes(b"mine")
    write(tmp_path / "out", [], {"b.png": b"second"}, "text")
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").glob("*.png")} == {
        "b.png": b"second",
        "mine.png": b"mine",
    }


def test_a_text_in_a_file_whose_name_is_no_utf_8_has_a_page(tmp_path: Path) -> None:
    write(tmp_path / "out", [], {}, "caf\udce9.txt")
    assert "caf\\udce9.txt" in (tmp_path / "out" / "analysis.html").read_text()


def test_a_full_disk_leaves_the_page_of_before_and_no_folder_that_was_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "out", [], {"a-0.png": b"first", "b.png": b"first"}, "text")
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def full(runs: object) -> bytes:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("pretrain.analysis.report.numbers.arrays", full)
        for folder in ("out", "new/deep"):
            with pytest.raises(OSError, match="No space left"):
                write(tmp_path / folder, [], {"b.png": b"second"}, "text")
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_model_that_has_diverged_is_refused(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opened = open_model(runs / "switchall")
    opened.model.get_parameter("final_norm.weight").fill_(math.nan)
    diverged = opened.save(tmp_path / "diverged")
    assert main([str(diverged), "--out", str(tmp_path / "out")]) == 2 and not (tmp_path / "out").exists()
    assert re.search("diverged: its outputs are not finite, .* name an earlier checkpoint", capsys.readouterr().err)
    (tmp_path / "letter").write_text("a")
    assert main([str(runs / "switchall"), "--text", str(tmp_path / "letter"), "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.startswith("switchall, step 1: 1 token\n"), "whose loss is not known"


def test_refusals(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = {
        "empty": b" \n\n",
        "latin": "caf\xe9".encode("latin-1"),
        "binary": b"PNG\0\0",
        "long": b"word " * (1 << 20),
        "fine": TEXT.encode(),
    }
    for name, content in texts.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "analysis.html").write_text("mine")

    def refused(words: str, *arguments: str, run: str = "switchall") -> None:
        try:
            code: object = main([str(runs / run), "--out", str(tmp_path / "out"), *arguments])
        except SystemExit as end:  # an option that argparse refuses
            code = end.code
        assert code == 2
        printed = capsys.readouterr().err
        assert re.search(words, printed) and printed.count("\n") == 1, printed

    refused("--text: .*gone cannot be read: No such file", "--text", str(tmp_path / "gone"))
    refused("--text: .*empty is empty", "--text", str(tmp_path / "empty"))
    refused("--text: .*latin is no text in UTF-8 .byte 3.; convert .* iconv", "--text", str(tmp_path / "latin"))
    refused("--text: .*binary holds zero bytes", "--text", str(tmp_path / "binary"))
    refused("--text: .*long is larger than 4 MiB", "--text", str(tmp_path / "long"))
    refused("--text: .* cannot be read: Is a directory", "--text", str(tmp_path))
    refused("--layers: switchall has the layers 0 to 1, not 2", "--layers", "0,1-2")
    refused("--layers: '1-0' is no layer", "--layers", "1-0")
    refused("--layers: 'x' is no layer", "--layers", "x")
    refused("--layers: '9+'... .5,000 characters. is no layer", "--layers", "9" * 5000)
    refused("--window: the text has .* windows of 16", "--window", "400")
    refused("--tokens: expected a whole number of at least 2, not '1'", "--tokens", "1")
    refused("--device: is cuda, but torch finds no usable GPU", "--device", "cuda")
    refused("--out: .*foreign holds analysis.html", "--out", str(tmp_path / "foreign"))
    refused("--out: .*empty is a file", "--out", str(tmp_path / "empty"))
    refused("RUN: .*text is a file", run="text")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow  # the fast tests above load two ranks' checkpoint (saved_model) and draw one (here)
def test_every_attention_from_a_layout_of_its_own(prepared: Path, tmp_path: Path) -> None:
    layouts = {
        "tensor": (2, ("parallel.tensor=2", "model.feedforward.num_experts=6")),
        "pipeline": (2, ("parallel.pipeline=2", "model.feedforward.num_experts=6")),
        "zero3": (2, ("parallel.zero=3", "model.position.type=xl")),
        "moa": (1, (MOA,)),
        "moa-xl": (1, (MOA, "model.position.type=xl")),
        "dense": (1, ("model.attention.type=dense",)),
    }
    for name, (ranks, keys) in layouts.items():
        run_ranks(train_runs, ranks, [(small_config(prepared, *STEPS, *keys), tmp_path / name)])
    (tmp_path / "text").write_text(TEXT)
    folders = [str(tmp_path / name) for name in layouts]
    assert main([*folders, "--text", str(tmp_path / "text"), "--out", str(tmp_path / "out")]) == 0
    check_page(tmp_path / "out")
    arrays = load_file(tmp_path / "out" / "analysis.safetensors")
    for layer in range(2):
        # One step of one batch: the layouts that differ in nothing else have the same weights up to rounding.
        maps = [arrays[f"{name}/blocks.{layer}.attention/weights"] for name in ("tensor", "pipeline")]
        assert np.abs(maps[0] - maps[1]).max() < 1e-4
