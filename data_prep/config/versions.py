"""Versions of the code and the packages that decide what a preparation makes."""

import functools
import importlib.metadata
import platform

from data_prep.config.resolved import ResolvedConfig

# Raise it when the same raw files and config would give other bytes: data made before is then no longer up to
# date.
PREPARATION_VERSION = "5"
CHANGES = {
    "4": "more kinds of raw files are read, and a byte order mark is no part of a text",
    "5": "filter.c4 and c4_lines are the published rules, paragraphs end at CRLF too, top n-grams count overlaps once",
}


def base_versions() -> dict[str, str]:
    """Versions of what decides the output of every stage."""
    packages = {name: package_version(name) for name in ("numpy", "safetensors")}
    return {"data_prep": PREPARATION_VERSION, "python": platform.python_version(), **packages}


@functools.cache  # every stage asks for them
def package_version(name: str) -> str:
    return importlib.metadata.version(name)


def versions(resolved: ResolvedConfig) -> dict[str, str]:
    """Versions of what decides the output."""
    names = ["sentencepiece"]
    if resolved.config.dedup is not None and resolved.config.dedup.near:
        names.append("rensa")
    if resolved.config.filter is not None and resolved.config.filter.language:
        names.append("py3langid")
    return {**base_versions(), **{name: package_version(name) for name in names}}


def changes_since(made_by: str | None) -> str:
    """In brackets, what versions after `made_by` do differently; empty if that is not known."""
    later = [
        what for version, what in CHANGES.items() if made_by and made_by.isdecimal() and int(version) > int(made_by)
    ]
    return f" ({'; '.join(later)})" if later else ""
