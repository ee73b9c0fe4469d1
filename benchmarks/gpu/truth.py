"""`truth`: whether everything is equal, repeatable and free of races on this card.

Parts, in their order: two ceilings; all kernels of a dtype compiled at once, in processes, before its first op; every
op, backend and dtype at the shapes of the 1B and the 262M models against fp64; 50 repetitions of each; attention's
backends and dropout; odd shapes; compute-sanitizer's racecheck and memcheck of the kernels that run in 8 warps.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from benchmarks.gpu import attention, ceilings, compilation, dropout, sanitizer
from benchmarks.gpu.command import Context, Failed, Part, Unavailable
from benchmarks.gpu.equality import DTYPES, REPEATING, backends_on, check, results, same_bits
from benchmarks.gpu.timing import draw
from benchmarks.op_cases import Build
from benchmarks.op_shapes import MODELS, equality_cases, handing_on_cases, outlines, shipped_cases
from model.kernels.backend import BACKENDS

REPETITIONS = 50
ODD = "odd"
"""The model whose shapes are no multiple of a tile."""


def cases_of(model: str, *, tiny: bool) -> list[Build]:
    if model == ODD or tiny:
        return equality_cases(small=tiny)
    return shipped_cases(model)


def sums_of(model: str, *, tiny: bool) -> list[Build]:
    return handing_on_cases(small=tiny) if tiny or model == MODELS[0] else []


def parts(*, tiny: bool) -> Iterator[Part]:
    """`tiny` has one model, of the small shapes."""
    yield Part(ceilings.COPY, ceilings.copy)
    yield Part(ceilings.PRODUCT, ceilings.product)
    models = ("tiny",) if tiny else MODELS
    for dtype in ("bf16", "fp32"):
        if not tiny or dtype == "bf16":  # an interpreter compiles nothing, which one part shows
            yield _compile(dtype)
        for model in models:
            yield from _op_parts(
                "equal", equality, model, dtype, cases_of(model, tiny=tiny) + sums_of(model, tiny=tiny)
            )
    for model in models:
        yield from _op_parts("repeat", repetition, model, "bf16", cases_of(model, tiny=tiny))
    yield from attention.truth_parts()
    yield from dropout.parts()
    if not tiny:
        yield _compile("fp16")
    for model in models:
        yield from _op_parts("equal", equality, model, "fp16", cases_of(model, tiny=tiny))
    if not tiny:
        for dtype in DTYPES:
            yield from _op_parts("equal", equality, ODD, dtype, cases_of(ODD, tiny=tiny))
    yield Part("cases", every_op_has_a_case)
    yield from sanitizer.parts(tiny=tiny)


def _compile(dtype: str) -> Part:
    return Part(f"compile {dtype}", functools.partial(compilation.compile_all, dtype=dtype), 30.0)


def _op_parts(what: str, compute: Any, model: str, dtype: str, builds: list[Build]) -> Iterator[Part]:
    for build, case in zip(builds, outlines(builds), strict=True):
        name = f"{what} {model} {dtype} {case.op} {case.shape}"
        yield Part(name, functools.partial(compute, build=build, dtype=dtype))


def equality(context: Context, *, build: Build, dtype: str) -> dict[str, Any]:
    """All backends of one case, on the same inputs, each twice."""
    kind = DTYPES[dtype]
    inputs = draw(build, context.device, kind, seed=0)
    case = inputs.case
    rows: list[dict[str, Any]] = []
    wanted = reference = None
    for backend, why_not in backends_on(case.op, context.device.type, kind, case.widths).items():
        if why_not is not None:
            rows.append({"backend": backend, "skipped": why_not})
            continue
        try:
            row, wanted = check(inputs, kind, backend, wanted, reference)
            if backend == "reference":
                reference = row["errors"]
        except Exception as error:  # one broken kernel must not hide the others
            row = {"backend": backend, "failed": True, "reason": f"{type(error).__name__}: {str(error)[:1000]}"}
        rows.append(row)
    result = {"op": case.op, "shape": case.shape, "dtype": dtype, "backends": rows}
    bad = [row for row in rows if row.get("failed")]
    if bad:
        raise Failed("; ".join(_said(row) for row in bad), result)
    return result


def _said(row: dict[str, Any]) -> str:
    if "reason" in row:
        return f"{row['backend']}: {row['reason']}"
    bits = "" if row["repeats"] else ", other bits when repeated"
    rows = "".join(f", of {name} a row by {error:.1e}" for name, error in row.get("wrong_rows", {}).items())
    return f"{row['backend']}: {row['worst']} differs by {row['error']:.1e}{rows}{bits}"


def repetition(context: Context, *, build: Build, dtype: str) -> dict[str, Any]:
    """Forward and backward `REPETITIONS` times by every backend that promises the same bits."""
    kind, times = DTYPES[dtype], 3 if context.tiny else REPETITIONS
    inputs = draw(build, context.device, kind, seed=1)
    case = inputs.case
    usable = backends_on(case.op, context.device.type, kind, case.widths)
    promised = [name for name in REPEATING if usable.get(name, "absent") is None]
    if not promised:
        raise Unavailable(f"no backend of {case.op} that promises the same bits runs here")
    different: dict[str, int] = {}
    for backend in promised:
        first, _ = results(inputs, backend)
        different[backend] = sum(not same_bits(first, results(inputs, backend)[0]) for _ in range(times - 1))
    result = {"op": case.op, "shape": case.shape, "dtype": dtype, "repetitions": times, "different": different}
    if any(different.values()):
        raise Failed(f"other bits in repetitions: {different}", result)
    return result


def every_op_has_a_case(context: Context) -> dict[str, Any]:
    """An op that joins the registry without a case would be checked by nothing."""
    builds = [b for model in MODELS for b in shipped_cases(model)] + equality_cases(small=False)
    found = {case.op for case in outlines(builds)}
    missing = sorted(set(BACKENDS) - found)
    if missing:
        raise Failed(f"no case in benchmarks/op_cases.py for {', '.join(missing)}")
    return {"ops": sorted(found)}
