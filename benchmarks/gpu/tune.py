"""`tune`: which tiles of the Triton kernels are the fastest on this card, beside those that they have today.

A part is a kernel at one shape. Candidates that spill or do not fit are rejected before they run, those with another
result before they are timed. What is timed is every launch of the kernel in one phase of its op, replayed with the
tensors that the op gave it, as `speed` times ops: by CUDA graphs, rotating through sets of inputs, the L2 cache
overwritten. Nothing is applied: `python -m benchmarks.gpu apply` writes what won into the table of measured tiles.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.compiled_case import SHARED_BYTES
from benchmarks.gpu import tuned_kernels
from benchmarks.gpu.command import Context, Failed, Part, Unavailable
from benchmarks.gpu.equality import TOLERANCE, errors, furthest, results, row_errors, row_limit, same_bits
from benchmarks.gpu.tile_compilation import Compiler, Launch, Resources
from benchmarks.gpu.tile_search import Search, Tiles, candidates, pruned, text, tiles_of, warps_of
from benchmarks.gpu.timing import Clock, Inputs, clock_of, draw_sets, measure

ROUNDS = 50
LEAST_SECONDS = 20.0
"""A part is not begun with less, and gives up where a candidate would begin with less than a quarter of it."""
COMPILE_SECONDS = 120.0
"""Of waiting for the candidates of a part, which a compiler that hangs must not hold up for ever."""
TINY_CANDIDATES = 2

Resourceful = Callable[[Context, Search, Sequence[Tiles]], list[Resources]]
"""From candidates to what each needs."""


def parts(*, tiny: bool) -> Iterator[Part]:
    searches = list(tuned_kernels.searches(tiny=tiny))
    compiled = (lambda context, search, tried: [Resources()] * len(tried)) if tiny else _Ahead(searches)
    for search in searches:
        yield Part(search.name, functools.partial(compute, search=search, compiled=compiled), LEAST_SECONDS)


class _Ahead:
    """Compiles the candidates of all parts that are not recorded, from the first one on, while earlier ones are
    timed."""

    def __init__(self, searches: Sequence[Search]) -> None:
        self._searches = searches
        self._compiler: Compiler | None = None

    def __call__(self, context: Context, search: Search, tried: Sequence[Tiles]) -> list[Resources]:
        if self._compiler is None:
            self._compiler = Compiler(architecture_of(context))
            for each in self._searches[self._searches.index(search) :]:
                if each.name not in context.measured or each is search:
                    self._compiler.begin(each, tried_of(context, each))
        return self._compiler.resources(search, min(COMPILE_SECONDS, context.remaining()))


def architecture_of(context: Context) -> int:
    """10 times the compute capability; that of an H100 on a CPU. Unavailable for one whose limits are not known."""
    major, minor = torch.cuda.get_device_capability() if context.device.type == "cuda" else (9, 0)
    if 10 * major + minor not in SHARED_BYTES:
        raise Unavailable(f"what fits a GPU of capability {major}.{minor} is not known: benchmarks/compiled_case.py")
    return 10 * major + minor


def tried_of(context: Context, search: Search) -> list[Tiles]:
    found = candidates(search, pruned(architecture_of(context)).get(search.name, ()))
    return found[:TINY_CANDIDATES] if context.tiny else found


def compute(context: Context, *, search: Search, compiled: Resourceful) -> dict[str, Any]:
    """Today's tiles are timed first and last, the best ones again after them: of many candidates the fastest reading is
    a lucky one. Failed where today's are the ones that do not work."""
    clock, rounds, tried = clock_of(context.device), 2 if context.tiny else ROUNDS, tried_of(context, search)
    sets = draw_sets(search.build, context.device, torch.bfloat16, clock.l2_bytes, tiny=context.tiny)
    wanted, _ = outcome(search, search.today, sets[0])
    rows: list[dict[str, Any]] = []
    for tiles, needs in zip(tried, compiled(context, search, tried), strict=True):
        if context.remaining() < LEAST_SECONDS / 4:
            raise Unavailable(f"the time was over after {len(rows)} of {len(tried)} candidates")
        row: dict[str, Any] = {"tiles": tiles, "registers": needs.registers, "stack_bytes": needs.stack_bytes}
        row["shared_bytes"] = needs.shared_bytes
        why = needs.rejected(architecture_of(context), warps_of(tiles)) if tiles != search.today else ""
        row |= {"rejected": why} if why else timed(search, tiles, sets, wanted, clock, rounds)
        rows.append(row)
    again = timed(search, search.today, sets, wanted, clock, rounds)
    result: dict[str, Any] = {
        "kernels": list(search.kernels),
        "sets": len(sets),
        "candidates": rows,
        "today_again": again,
    }
    result["entry"] = search.entry(search.today).as_json()
    if "rejected" in rows[0] or "rejected" in again:
        raise Failed(f"today's tiles: {rows[0].get('rejected') or again['rejected']}", result)
    if (best := fastest(rows)) is not None:
        result["best_again"] = timed(search, best["tiles"], sets, wanted, clock, rounds)
    return result | chosen(rows, again, result.get("best_again", {}))


def timed(
    search: Search, tiles: Tiles, sets: Sequence[Inputs], wanted: dict[str, Tensor], clock: Clock, rounds: int
) -> dict[str, Any]:
    """Times of a candidate, and how far its results are from today's; or why it is rejected."""
    try:
        found, launches = outcome(search, tiles, sets[0])
        off = errors(found, wanted)
        worst = furthest(off)
        if not off[worst] <= TOLERANCE[torch.bfloat16]:  # not so for a NaN either
            return {"rejected": f"another result: {worst} is off by {off[worst]:.1e}"}
        op = sets[0].case.op
        # Another rounding may decide a near tie of a router, and then a row of its gradient is another one.
        for name, error in ({} if op == "route" else row_errors(found, wanted)).items():
            if not error <= row_limit(op, TOLERANCE[torch.bfloat16]):
                return {"rejected": f"another result: a row of {name} is off by {error:.1e}"}
        works = [functools.partial(replay, launches)]
        works += [functools.partial(replay, outcome(search, tiles, inputs)[1]) for inputs in sets[1:]]
        return measure(clock, works, rounds).as_result() | {"error": off[worst], "same_bits": same_bits(found, wanted)}
    except Exception as error:  # what the compiler or the driver refuse rejects the candidate alone
        return {"rejected": f"{type(error).__name__}: {str(error)[:300]}"}


def fastest(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Of the candidates that were timed, without today's tiles, which are first."""
    return min((row for row in rows[1:] if "ms" in row), key=lambda row: row["ms"], default=None)


def chosen(rows: Sequence[dict[str, Any]], again: dict[str, Any], best_again: dict[str, Any]) -> dict[str, Any]:
    """Today's tiles, the fastest ones, and how much less time those need: their worse time in percent of the better of
    today's two, so that neither a slow round of the one nor a lucky one of the other is a gain. 0 where today's are the
    fastest."""
    today = min(rows[0]["ms"], again["ms"])
    tiles, best = rows[0]["tiles"], today
    if (found := fastest(rows)) is not None and (slower := max(found["ms"], best_again.get("ms", math.inf))) < today:
        tiles, best = found["tiles"], slower
    return {
        "today": {"tiles": rows[0]["tiles"], "ms": today},
        "best": {"tiles": tiles, "ms": best},
        "gain_percent": round(100 * (1 - best / today), 1),
        "rejected": sum("rejected" in row for row in rows),
    }


def outcome(search: Search, tiles: Tiles, inputs: Inputs) -> tuple[dict[str, Tensor], list[Launch]]:
    """`results`, with `tiles` in the phase of the search, and the launches of its kernels there."""
    found: list[Launch] = []

    def within(phase: str) -> contextlib.AbstractContextManager[None]:
        return _searched(search, tiles, found) if phase == search.phase else contextlib.nullcontext()

    computed, _ = results(inputs, search.backend, within)
    if not found:
        raise RuntimeError(f"the op launched no {' or '.join(search.kernels)}")
    return computed, found


@contextlib.contextmanager
def _searched(search: Search, tiles: Tiles, found: list[Launch]) -> Iterator[None]:
    """`tiles` instead of today's; launches of the kernels are done, and noted in `found`."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    def noting(run: Callable[..., Any]) -> Callable[..., Any]:
        def launch(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
            if self.fn.__name__ in search.kernels:
                found.append(Launch(self, grid, args, kwargs))
            return run(self, *args, grid=grid, warmup=warmup, **kwargs)

        return launch

    with contextlib.ExitStack() as stack:
        for kind in (JITFunction, InterpretedFunction):
            stack.enter_context(mock.patch.object(kind, "run", noting(kind.run)))
        stack.enter_context(tiles_of(search, tiles))
        yield


def replay(launches: Sequence[Launch]) -> None:
    for launch in launches:
        launch.kernel.run(*launch.args, grid=launch.grid, warmup=False, **launch.kwargs)


def summary(result: dict[str, Any]) -> tuple[str, str, str]:
    """Today's tiles and the best, each with its time, and the gain."""
    today, best = (f"{text(result[key]['tiles'])}: {result[key]['ms']:.4g} ms" for key in ("today", "best"))
    return today, best, f"{result['gain_percent']:.1f}%"
