"""Marks of tests that not every installation can run."""

from __future__ import annotations

import pytest
import torch

NO_SPACE = pytest.mark.skipif(
    " " in torch.__path__[0], reason="torch gives its C++ compiler its own path, which may have no space"
)
"""Where Inductor compiles for the CPU."""
