"""Where relative paths of a configuration point."""

from __future__ import annotations

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


def find_input(path: str) -> Path:
    """An input path: as given if absolute or there, else the same below the repository, so that the shipped
    configurations work from any directory. Returns the first candidate if neither exists."""
    given = Path(path).expanduser()
    if given.is_absolute() or given.exists() or not (REPOSITORY / given).exists():
        return given.absolute()
    return REPOSITORY / given
