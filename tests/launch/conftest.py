"""What several files of tests of sweeps use."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.views import comparison_page, sweep_picture
from tests.launch.sweep_case import Case


@pytest.fixture
def case(tmp_path: Path, prepared: Path) -> Case:
    return Case(tmp_path, prepared)


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """For sweeps whose pictures would be those that others, and tests/pretrain/views/test_sweep.py, have drawn."""
    monkeypatch.setattr(comparison_page, "drawn", lambda runs: b"")
    monkeypatch.setattr(sweep_picture, "losses_drawn", lambda results, keys: b"")
