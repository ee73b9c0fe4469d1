"""compute-sanitizer over the kernels that run in 8 warps, at the shipped widths and few tokens.

A part starts `python -m benchmarks.gpu.launched` under the tool: it computes one case, forward and backward, and prints
which kernels it launched in how many warps. docs/gpu.md says which kernels of 8 warps no case reached (`reached`).
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from benchmarks.gpu.command import Context, Failed, Late, Part, Unavailable
from benchmarks.gpu.processes import captured
from benchmarks.gpu.record import ROOT
from benchmarks.op_cases import Build, sigma_moe_case
from benchmarks.op_shapes import MODELS, equality_cases, outlines, shipped_cases

TOOLS = ("racecheck", "memcheck")
TOKENS = 512
FOUND = 9
"""Exit status that the tool is told to give for what it found."""
JOBS = 8
"""Children at a time, at most one for two cores: one spends 20 to 60 s on its start, on compiling and in the tool, and
little on the GPU."""
LAUNCHED = "launched: "
"""Begins the line by which the child names its kernels."""


def cases(model: str, *, tiny: bool) -> list[Build]:
    """The shipped ones, and σ-MoE with so few experts that each has the rows for which tiles of 8 warps are taken."""
    if tiny:
        return equality_cases(small=True)
    d = 2048 if model == "1b" else 1024
    return [*shipped_cases(model, num_tokens=TOKENS), functools.partial(sigma_moe_case, TOKENS, d, 4, 4, 128)]


def parts(*, tiny: bool) -> Iterator[Part]:
    """bf16, as training."""
    for tool in TOOLS:
        for model in ("tiny",) if tiny else MODELS:
            names = [f"{tool} {model} {case.op} {case.shape}" for case in outlines(cases(model, tiny=tiny))]
            together = _Together(tool, model, names)
            for name in names:
                yield Part(name, functools.partial(together.check, name=name), 20.0)


class _Together:
    """The cases of a model under a tool: the first that is checked starts all that are asked for, `JOBS` at a time."""

    def __init__(self, tool: str, model: str, names: Sequence[str]) -> None:
        self._tool, self._model, self._names = tool, model, names
        self._found: dict[str, Future[dict[str, Any]]] = {}

    def check(self, context: Context, *, name: str) -> dict[str, Any]:
        if name not in self._found:
            pool = ThreadPoolExecutor(max(1, min(JOBS, (os.cpu_count() or 2) // 2)))
            asked = [each for each in self._names if each in context.asked and each not in self._found]
            for other in dict.fromkeys([name, *asked]):
                number = self._names.index(other)
                self._found[other] = pool.submit(check, context, tool=self._tool, model=self._model, number=number)
            pool.shutdown(wait=False)  # what is begun goes on
        return self._found[name].result()


def check(context: Context, *, tool: str, model: str, number: int) -> dict[str, Any]:
    """Fails where the tool finds something, with its words."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        raise Unavailable("compute-sanitizer is not on the PATH")
    child = [sys.executable, "-m", "benchmarks.gpu.launched", model, str(number), context.device.type]
    line = [program, "--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "1000", *child]
    # Without torch's cache every tensor is an allocation of its own, at whose end the tool sees an access beyond it.
    variables = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    limit = context.remaining()
    if limit < 1.0:
        raise Late("the time was over before it began")
    done = captured(line, limit, ROOT, variables)
    if done is None:
        raise Late(f"{tool} did not end in {limit:.0f} s")
    said = [text for text in (done.stdout + done.stderr).splitlines() if text.startswith("=========")]
    kernels = [text for text in done.stdout.splitlines() if text.startswith(LAUNCHED)]
    result = {"tool": tool, "said": said[:30], "kernels": json.loads(kernels[0][len(LAUNCHED) :]) if kernels else {}}
    if done.returncode == FOUND:
        found = hazards(said)
        excused = {kernel for kernel, _ in found if tool == "racecheck" and kernel.startswith(LIBRARIES)}
        result["others"] = sorted(excused)
        ours = [text for kernel, text in found if kernel not in excused]
        if ours or not found:
            raise Failed(f"{tool} found: {(ours or said or ['nothing that it names'])[0]}", result)
        if missed := unread(said):
            raise Failed(missed, result)
    if done.returncode not in (0, FOUND) or not kernels:
        unsupported = [text for text in said if "not supported" in text]
        if unsupported:
            raise Unavailable(unsupported[0])
        raise Failed(f"exit status {done.returncode}: {done.stderr[-500:]}", result)
    return result


LIBRARIES = ("nvjet_", "cutlass", "cublas", "sm80_xmma", "sm90_xmma", "cudnn")
"""Beginnings of the names of kernels of cuBLAS and cuDNN, whose asynchronous copies racecheck takes for races."""


def hazards(said: Sequence[str]) -> list[tuple[str, str]]:
    """(kernel, line) of every place that the tool names: `... Read access at KERNEL+0x9f0`, `at KERNEL(...)+0x150`."""
    found = [(re.search(r"\bat (?:void )?(\w+).*\+0x", text), text) for text in said]
    return [(match[1], text) for match, text in found if match is not None]


def unread(said: Sequence[str]) -> str:
    """What keeps `hazards` from being all that racecheck displays, by its own count; empty if nothing does. Else one of
    ours could be excused with a library's beside it."""
    counted = [
        int(match[1]) for text in said if (match := re.search(r"RACECHECK SUMMARY: (\d+) hazards? displayed", text))
    ]
    read = sum("Race reported" in text for _, text in hazards(said))
    if counted == [read]:
        return ""
    return f"racecheck counts {' and '.join(map(str, counted)) or 'no'} hazards, {read} were read of what it says"


def reached(results: Mapping[str, dict[str, Any]]) -> tuple[set[str], set[str]]:
    """Of the kernels that benchmarks/kernel_cases compiles in 8 warps: those that racecheck saw in 8 warps, and the
    others. `results`: part -> result of every part that passed."""
    found: set[str] = set()
    for name, result in results.items():
        if name.startswith("racecheck "):
            found |= {kernel for kernel, warps in result.get("kernels", {}).items() if 8 in warps}
    wanted = _eight_warps()
    return wanted & found, wanted - found


def _eight_warps() -> set[str]:
    from benchmarks import compiled

    shipped = ("1024", "2048", "1b", "259m", "32000", "8000", "attention")
    cases = compiled.cases(compiled.case_modules())
    return {
        case.kernel.fn.__name__
        for case in cases
        if case.num_warps == 8 and case.name.endswith("bf16") and any(width in case.name for width in shipped)
    }
