"""The words of the pictures that launch/analyze.py draws: none lies over another, and all are inside."""

from __future__ import annotations

import io
from functools import partial
from itertools import combinations

import pytest
from matplotlib.transforms import Bbox
from PIL import Image

from pretrain.analysis import pictures
from pretrain.analysis.findings import Findings
from tests.pretrain.analysis.models import findings_of, tiny
from tests.pretrain.words_drawn import note_words

NUM_TOKENS = 21


def findings(case: str, label: str) -> Findings:
    """Of the second window, whose keys begin in the memory of models that have one."""
    return findings_of(tiny(case), label, NUM_TOKENS, window=1)


LONG = "mine" + ",learning_rate=1e-3" * 8


@pytest.mark.parametrize(
    "case, label",
    [
        pytest.param("switchhead xl", "mine", id="a short name", marks=pytest.mark.slow),
        pytest.param("switchhead xl", LONG, id="switchhead xl"),
        pytest.param("moa sigmoid xl", LONG, id="moa sigmoid xl"),
        pytest.param("dense xl", LONG, id="dense xl", marks=pytest.mark.slow),
    ],
)
def test_no_word_lies_over_another(case: str, label: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = note_words(monkeypatch)
    found = findings(case, label)
    drawn = [lambda: pictures.maximum_maps([(found, 0), (found, 1)]), lambda: pictures.head_maps(found, 1)]
    if found.trace.routers:
        drawn += [lambda: pictures.selection(found, 1, NUM_TOKENS), lambda: pictures.together(found, 1) or b""]
        drawn += [partial(pictures.load, found, kind) for kind in found.kinds()]
    for draw_one in drawn:
        words.clear()
        png = draw_one()
        width, height = Image.open(io.BytesIO(png)).size if png else (0, 0)
        for (one, box), (other, its) in combinations(words, 2):
            assert Bbox.intersection(box.padded(-0.5), its.padded(-0.5)) is None, f"{one!r} lies over {other!r}"
        for word, box in words:
            inside = box.x0 >= -0.5 and box.y0 >= -0.5 and box.x1 <= width + 0.5 and box.y1 <= height + 0.5
            assert inside, f"{word!r} is cut off"
        assert len(words) > 3 or not png


def test_the_loads_of_two_runs_of_a_sweep_can_be_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """The names differ in their middle, and the picture of a few experts is narrow."""
    words = note_words(monkeypatch)
    label = "switchall_tiny,learning_rate=1e-3"
    found = findings("switchhead", label)
    for kind in found.kinds():
        words.clear()
        pictures.load(found, kind)
        assert f"{label}, step 20\n{kind}" in [word for word, _ in words]
