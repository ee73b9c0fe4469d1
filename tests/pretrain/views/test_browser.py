"""A run of 8 ranks, seen by a real browser: TensorBoard's pages, the comparison and the analysis show what they should.

The fast tests of what the pages hold are report/test_curves.py, views/test_comparison.py and cli/test_analyze.py.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import pretrain.cli.analyze
import pretrain.cli.compare
from tests.harness import run_ranks
from tests.pretrain.matrix import Layout, config_of
from tests.pretrain.runs import train_runs

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
WIDTH, HEIGHT = 1400, 1800
SHOWN = os.environ.get("SCREENSHOTS")
"""A folder where the screenshots stay, for a person who wants to look at them."""


@pytest.fixture(scope="module")
def browser() -> str:
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip(f"NOT TESTED: no browser is installed (none of {', '.join(NAMES)}), so no page was looked at")
    return found


@pytest.fixture(scope="module")
def runs(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of `tp2 pp2 dp2`, with everything on, of `one`, the same in one process, and of `dense`."""
    folder = tmp_path_factory.mktemp("runs")
    keys = (
        "train.steps=12",
        "evaluate.every_steps=4",
        "checkpoint.every_steps=6",
        "monitor.tensorboard=true",
        "monitor.details_every_steps=3",
        "resilience.replica_check_every_steps=6",
    )
    eight = Layout(tensor=2, pipeline=2, data=2, recompute="selective")
    run_ranks(train_runs, 8, [(config_of(prepared, "switchall", eight, *keys), folder / "tp2 pp2 dp2")])
    alone = [("switchall", "one"), ("dense", "dense")]
    run_ranks(train_runs, 1, [(config_of(prepared, model, Layout(), *keys), folder / name) for model, name in alone])
    return folder


@pytest.fixture(scope="module")
def board(runs: Path) -> Iterator[str]:
    """Address of TensorBoard on this machine alone."""
    line = [sys.executable, "-m", "tensorboard.main", "--logdir", str(runs), "--host", "127.0.0.1", "--port", "0"]
    log = runs / "tensorboard.log"
    with open(log, "w") as output:
        process = subprocess.Popen([*line, "--load_fast=false"], stdout=output, stderr=output)
    try:
        late = time.monotonic() + 120
        while not (found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text())):
            assert process.poll() is None and time.monotonic() < late, log.read_text()
            time.sleep(0.2)
        yield found[0]
    finally:
        process.terminate()
        process.wait(30)


def look(browser: str, address: str, picture: Path) -> np.ndarray:
    """A screenshot [HEIGHT, WIDTH, 3]."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={WIDTH},{HEIGHT}"]
    user = f"--user-data-dir={picture.parent / 'browser'}"
    subprocess.run(
        [browser, *options, user, "--virtual-time-budget=30000", f"--screenshot={picture}", address],
        capture_output=True,
        timeout=300,
        check=True,
    )
    if SHOWN:
        shutil.copy(picture, SHOWN)
    pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    assert pixels.shape == (HEIGHT, WIDTH, 3)
    return pixels


def text_of(browser: str, address: str, folder: Path) -> str:
    """The document once its scripts have run."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--window-size={WIDTH},{HEIGHT}"]
    user = f"--user-data-dir={folder / 'browser'}"
    line = [browser, *options, user, "--virtual-time-budget=30000", "--dump-dom", address]
    return subprocess.run(line, capture_output=True, timeout=300, check=True, text=True).stdout


def coloured(pixels: np.ndarray) -> int:
    """Pixels of curves and heat maps: neither grey nor pale."""
    return int((pixels.max(-1) - pixels.min(-1) > 90).sum())


def colours(pixels: np.ndarray) -> int:
    return len(np.unique(pixels.reshape(-1, 3), axis=0))


@pytest.mark.slow
def test_the_page_that_tensorboard_opens_on(browser: str, board: str, tmp_path: Path) -> None:
    """Two columns of charts in each category of the custom layout, and a curve in each of the first six."""
    pixels = look(browser, f"{board}/?darkMode=false#custom_scalars", tmp_path / "custom scalars.png")
    for top in (140, 450, 830):
        for left in (380, 730):
            chart = pixels[top : top + 220, left : left + 340]
            assert coloured(chart) > 150, f"no curve at {left}, {top}"


@pytest.mark.slow
def test_time_series_in_plain_words(browser: str, board: str, tmp_path: Path) -> None:
    """Cards with their words and the values of every run. A screenshot may come before the lines, which a worker draws
    here; the tests above and below see lines."""
    pixels = look(browser, f"{board}/?darkMode=false#timeseries", tmp_path / "time series.png")
    assert colours(pixels[300:1700, 300:1130]) > 200, "no cards"
    text = text_of(browser, f"{board}/?darkMode=false#timeseries", tmp_path)
    for words in ("gradient norm by group/experts", "load of the experts/attention output", "tp2 pp2 dp2/tensorboard"):
        assert words in text, words


@pytest.mark.slow
def test_scalars_and_heat_maps(browser: str, board: str, tmp_path: Path) -> None:
    pixels = look(browser, f"{board}/?darkMode=false#scalars&tagFilter=%5Eloss%2F", tmp_path / "scalars.png")
    assert coloured(pixels[100:, 380:]) > 300
    heat = look(browser, f"{board}/?darkMode=false#images", tmp_path / "heat maps.png")[100:, 370:]
    assert colours(heat) > 500 and coloured(heat) > 20_000, "no heat map"
    assert coloured(heat[: HEIGHT // 3]) > 5_000


@pytest.mark.slow
def test_the_comparison_and_the_analysis(
    browser: str, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both pages from files, drawn over the whole width and with their words."""
    out = tmp_path / "comparison"
    assert pretrain.cli.compare.main([str(runs / "tp2 pp2 dp2"), str(runs / "one"), "--out", str(out)]) == 0
    (tmp_path / "text").write_text("a word and another word; and a word once more, another one. " * 20)
    named = [str(runs / name) for name in ("one", "dense")]
    assert (
        pretrain.cli.analyze.main([*named, "--text", str(tmp_path / "text"), "--out", str(tmp_path / "analysis")]) == 0
    )
    capsys.readouterr()
    expected = {
        out / "comparison.html": ("What differs", "parallel.tensor", "Loss at equal steps", "First step at which one"),
        tmp_path / "analysis" / "analysis.html": ("Attention maps", "Load of the experts", "most over-represented"),
    }
    for page, words in expected.items():
        pixels = look(browser, page.as_uri(), tmp_path / f"{page.stem}.png")
        left, right = pixels[100:900, : WIDTH // 2], pixels[100:900, WIDTH // 2 :]
        assert coloured(left) > 500 and coloured(right) > 500, f"{page.name}: nothing is drawn on one side"
        assert colours(pixels) > 300
        text = text_of(browser, page.as_uri(), tmp_path)
        assert all(word in text for word in words), page.name
        assert re.findall(r"<img [^>]*>", text) and "data:image/png;base64," in text
