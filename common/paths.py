"""Where relative paths of a configuration point."""

from __future__ import annotations

import os
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


def find_input(path: str) -> Path:
    """An input path: as given if it is absolute or exists, else the same path below the repository, so that the shipped
    configurations work from any directory. Returns the first candidate if neither exists."""
    given = Path(os.path.expanduser(path))  # pathlib raises for an unknown ~NAME, and its exists() for long names
    if given.is_absolute() or os.path.exists(given) or not os.path.exists(REPOSITORY / given):
        return given.absolute()
    return REPOSITORY / given
