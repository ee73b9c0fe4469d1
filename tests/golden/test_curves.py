"""The golden curves: this tree trains as the trees before it, to rounding. See curves.py for when they may change."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.golden.curves import FILE, MODELS, STEPS, TOLERANCE, Golden, compute, differences

REMEDY = "tests/golden/curves.py says when `python -m tests.golden.curves --write` is allowed"


@pytest.mark.parametrize("steps", [3, pytest.param(STEPS, marks=pytest.mark.slow)])
def test_training_gives_the_golden_curves(prepared: Path, steps: int) -> None:
    golden: Golden = json.loads(FILE.read_text())
    found = compute(prepared, steps)
    assert found["data"] == golden["data"], f"data_prep makes other shards of the same text; {REMEDY}"
    wrong = {
        name: f"{difference:.1e}" for name, difference in differences(found, golden).items() if difference > TOLERANCE
    }
    assert not wrong, f"relative difference to the golden curve: {wrong}; {REMEDY}"


@pytest.mark.parametrize("name", MODELS)
def test_the_golden_curves_are_of_training(name: str) -> None:
    """They learn, clipping is active, and no two models have the same."""
    curves = json.loads(FILE.read_text())["curves"]
    losses = curves[name]["losses"]
    assert len(losses) == len(curves[name]["grad_norms"]) == STEPS
    assert losses[0] - losses[-1] > 0.3
    assert max(curves[name]["grad_norms"]) > 0.5
    assert sum(other["losses"] == losses for other in curves.values()) == 1
