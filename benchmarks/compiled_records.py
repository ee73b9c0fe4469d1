"""benchmarks/compiled.csv: what each Triton gave of the cases, for benchmarks/compiled.py."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from benchmarks.compiled_case import Compiled

Records = dict[str, dict[str, Compiled]]
"""Version of Triton -> key -> what it gave."""


def read_records(path: Path) -> Records:
    """The most complete version first; empty if there is no such file."""
    if not path.exists():
        return {}
    convert: dict[str, Callable[[str], Any]] = {"int": int, "bool": "True".__eq__, "str": str}
    kinds = {field.name: convert[str(field.type)] for field in fields(Compiled)}
    found: Records = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            values = {name: kinds[name](value) for name, value in row.items() if name in kinds}
            found.setdefault(row["triton"], {})[row["key"]] = Compiled(**values)
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def write_records(path: Path, records: Records) -> None:
    names = [field.name for field in fields(Compiled) if field.name not in ("error", "is_for_small")]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["key", "triton", *names], extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for version, results in records.items():
            good = {key: result for key, result in results.items() if not result.error}
            writer.writerows({"key": key, "triton": version, **asdict(result)} for key, result in good.items())


def in_one_table(records: Records) -> Iterable[Compiled]:
    """Every case once: as the most complete version gave it, else as another one did."""
    found: dict[tuple[str, int], Compiled] = {}
    for results in records.values():
        for result in results.values():
            found.setdefault((result.name, result.architecture), result)
    return found.values()
