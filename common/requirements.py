"""The packages that pyproject.toml asks for, and the versions that are installed. Uses the standard library alone, and
`packaging` where it is there: launch/doctor.py runs before anything is installed, also on an old Python."""

from __future__ import annotations

import importlib
import importlib.metadata
import re

from common.paths import REPOSITORY


def requirements() -> list[str]:
    """As pyproject.toml writes them: "torch>=2.11,<2.16"."""
    import tomllib  # new in 3.11: an older Python must get as far as its own line

    dependencies: list[str] = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["dependencies"]
    return dependencies


def name_of(requirement: str) -> str:
    return re.split(r"[\s<>=!~\[;]", requirement, maxsplit=1)[0]


def installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def fits(requirement: str, version: str) -> bool:
    """Whether the version meets the requirement; true if the package that can tell is missing."""
    try:
        packaging = importlib.import_module("packaging.requirements")
    except ImportError:
        return True
    return bool(packaging.Requirement(requirement).specifier.contains(version, prereleases=True))


def misfits() -> list[str]:
    """A warning for each package whose installed version this code was not written for: pip takes any where it is told
    to, and DeepSpeed's and megatron-core's inner names, which the code reads, change with every release. Of a package
    that is not there its import tells, and a copy of the code without pyproject.toml asks for none."""
    if not (REPOSITORY / "pyproject.toml").is_file():
        return []
    found = ((requirement, name_of(requirement)) for requirement in requirements())
    versions = ((requirement, name, installed(name)) for requirement, name in found)
    return [
        f"{name} {version} is installed, and {requirement} is what this code is written for; `make -B install`, or "
        f"python -m pip install '{requirement}'"
        for requirement, name, version in versions
        if version is not None and not fits(requirement, version)
    ]
