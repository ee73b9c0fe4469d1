"""The small shapes of every op, for an interpreter. Their names are those of what builds them, so that collecting tests
builds nothing."""

from __future__ import annotations

from functools import partial

from benchmarks import op_cases, op_shapes

CASES = op_shapes.equality_cases(small=True)


def _name(build: op_cases.Build) -> str:
    assert isinstance(build, partial)
    return " ".join(map(str, (build.func.__name__.removesuffix("_case"), *build.args, *build.keywords)))


NAMES = [_name(build) for build in CASES]
