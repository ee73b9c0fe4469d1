"""Marks of tests that not every installation can run."""

from __future__ import annotations

import pytest
import torch

HAS_SPACE = " " in torch.__path__[0]
NO_SPACE = pytest.mark.skipif(HAS_SPACE, reason="torch gives its C++ compiler its own path, which may have no space")
"""Where Inductor compiles for the CPU."""
