"""What the Triton kernels become: compiled ahead of time for four kinds of GPUs, on a machine without any.

    python -m benchmarks.compiled [--check] [--update] [--recompile all|sample] [--representative] [--markdown]

Covers every `compile_cases()` of benchmarks/kernel_cases and reads from metadata and machine code (SASS):
registers, stack, shared memory, tensor-core instructions, width of global loads, atomics on floats. With --check the
exit status is 1 unless every case
- has no stack (a stack means spilled registers or indexed local arrays; on sm_120 up to 96 bytes a thread),
- fits the shared memory of one block (163 KB on sm_80, 227 KB on sm_90 and sm_100, 99 KB on sm_120; of sm_80, but for
  attention with wide heads, 99 KB too, which capability 8.6 and 8.9 have) and 512 columns of tensor memory,
- if a GEMM, uses that architecture's own tensor-core instructions (HMMA, HGMMA, UTC*MMA),
- has 16-byte global loads (8 where rows are no multiple of 16 bytes, or single 8-byte numbers are gathered),
- has no atomics on floats.

A compilation takes 1 to 6 s, all of them a quarter of an hour on two cores, so benchmarks/compiled.csv records what
they gave, under a hash of all that decides it: source of the kernel and of what it calls, case, architecture and
Triton's version. The file holds the records of several Tritons: one of every case, of others a part.

The entries of model/kernels/triton/tiles.json, tiles that a card was measured with, are compiled every time but of
--modules and --representative, for their own architecture (benchmarks/compiled_entries.py): no stack, and they fit.

A case without a record of the installed Triton is taken from those of the most complete one, and the output says so. A
case that neither has is compiled. --recompile compiles recorded ones too (all, or the first GEMM of every module, on
the architectures in turn) and fails where the result differs from this Triton's record. --update records what was
compiled, and drops records of cases that are no more; with --representative it compiles whatever of that part has no
record of this Triton.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import os
import pkgutil
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from benchmarks import compiled_entries
from benchmarks.compiled_case import TENSOR_CORE, Compiled, compile_case, kernel_name
from benchmarks.compiled_records import Records, in_one_table, read_records, table, update_document, write_records
from common.arguments import at_least

if TYPE_CHECKING:
    from benchmarks.kernel_cases.case import CompileCase

PACKAGE = "benchmarks.kernel_cases"
RECORDS = Path(__file__).with_name("compiled.csv")
DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "kernels.md"
"""--update writes the summary between its two comments."""
REPRESENTATIVE = re.compile(
    r"(?<!\d)((1024x112|2048x128|d1024 R[48] E4 k2|d2048 R16 E4 k2|d1024 R1 E32 k4|d2048 R1 E64 k8|32000) bf16"
    r"|(259m|1b) bf16$|place R(4|8|16) E4 |place R1 E(32|64) .*64 tokens"
    r"|norm (forward|backward|sum) .*(1024|2048) bf16|entropy \w+ E(32|64)$)"
)
"""Names of the cases of SwitchHead 262M, SwitchAll 259M and 1B."""


def cases(modules: Sequence[str]) -> Iterator[CompileCase]:
    for name in modules:
        yield from importlib.import_module(name).compile_cases()


def case_modules() -> list[str]:
    package = importlib.import_module(PACKAGE)
    names = [f"{PACKAGE}.{found.name}" for found in pkgutil.iter_modules(package.__path__)]
    return [name for name in names if hasattr(importlib.import_module(name), "compile_cases")]


def key(case: CompileCase, architecture: int, triton_version: str) -> str:
    """Of everything that decides the result. Unlike Triton's own key it does not know modules and line numbers."""
    decides = (
        triton_version,
        sorted(_sources(case.kernel, set())),
        sorted(case.signature.items()),
        sorted((name, str(value)) for name, value in case.constexprs.items()),
        sorted(map(str, case.attributes.items())),
        (case.num_warps, case.num_stages, case.is_gemm, case.load_bytes, architecture),
    ) + ((case.registers,) if case.registers else ())
    return hashlib.sha256(repr(decides).encode()).hexdigest()[:20]


def _sources(function: Any, found: set[str]) -> set[str]:
    """Source of a kernel, of all functions of ours that it calls, and its constants. Triton's come with its version."""
    from triton import language
    from triton.runtime.jit import JITFunction

    found.add(function.src)
    words = set(re.findall(r"\w+", function.src))
    scopes = [function.fn.__globals__]
    while scopes:
        scope = scopes.pop()
        for word in sorted(words & scope.keys()):
            value = scope[word]
            if isinstance(value, ModuleType) and value.__name__.split(".")[0] in ("model", "tests"):
                scopes.append(vars(value))
            elif isinstance(value, language.constexpr):
                found.add(f"{word} = {value!r}")
            elif isinstance(value, JITFunction) and value.src not in found:
                _sources(value, found)
    return found


@dataclass(frozen=True)
class Job:
    """A compilation; kernels cannot be sent to another process, so it names one by module and position."""

    module: str
    position: int
    kernel: str
    name: str
    architecture: int
    key: str
    is_gemm: bool
    is_for_small: bool

    def named(self, record: Compiled) -> Compiled:
        """A record with what it does not know: what the case is called today, and for whom it is."""
        return replace(record, kernel=self.kernel, name=self.name, is_for_small=self.is_for_small)

    def run(self) -> Compiled:
        return compile_case(list(cases([self.module]))[self.position], self.architecture)


def jobs(modules: Sequence[str], triton_version: str) -> list[Job]:
    """Equal cases, such as two models whose shapes take one tile, once. ValueError for different ones of one name."""
    found: dict[str, Job] = {}
    names: dict[tuple[str, int], str] = {}
    for module in modules:
        for position, case in enumerate(cases([module])):
            for architecture in case.architectures:
                named = kernel_name(case), case.name, architecture, key(case, architecture, triton_version)
                job = Job(module, position, *named, case.is_gemm, 120 in case.architectures)
                if names.setdefault((case.name, architecture), job.key) != job.key:
                    raise ValueError(f"compile_cases() of {module}: two different cases are called {case.name!r}")
                found.setdefault(job.key, job)
    return list(found.values())


def sample(all_jobs: Sequence[Job]) -> list[Job]:
    """The first GEMM (first case, where there is none) of every module of kernels, on the architectures in turn."""
    architectures = sorted({job.architecture for job in all_jobs})
    found = []
    for number, module in enumerate(sorted({job.kernel.split(".")[0] for job in all_jobs})):
        architecture = architectures[number % len(architectures)]
        own = [job for job in all_jobs if job.kernel.startswith(f"{module}.") and job.architecture == architecture]
        found += sorted(own, key=lambda job: not job.is_gemm)[:1]
    return found


def representative(all_jobs: Sequence[Job]) -> list[Job]:
    """What a Triton that users get is recorded for: on sm_90 every kernel, at the shapes of 262M and 1B models where it
    has them, else in its first bf16 case (the first of all, where no name has a dtype)."""
    found = []
    of_sm_90 = [job for job in all_jobs if job.architecture == 90]
    for kernel in sorted({job.kernel for job in of_sm_90}):
        own = [job for job in of_sm_90 if job.kernel == kernel]
        others = [job for job in own if not re.search(r"\b(fp16|fp32)\b", job.name)] or own
        found += [job for job in own if REPRESENTATIVE.search(job.name)] or others[:1]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="exit status 1 unless every case passes")
    parser.add_argument("--update", action="store_true", help=f"write {RECORDS.name} and the table in the docs")
    parser.add_argument("--recompile", choices=("none", "sample", "all"), default="none", help="default: none")
    parser.add_argument("--arch", default="80,90,100,120", help="compute capabilities times ten (default: %(default)s)")
    parser.add_argument("--only", default="", metavar="REGEX", help="cases whose name matches")
    parser.add_argument(
        "--representative", action="store_true", help="sm_90 alone: every kernel, at the shapes of 262M and 1B models"
    )
    parser.add_argument("--markdown", action="store_true", help="the table as Markdown")
    parser.add_argument("--processes", type=at_least(1), default=2, help="default: %(default)s")
    parser.add_argument("--modules", default="", help=f"comma-separated, instead of all of {PACKAGE}")
    parser.add_argument("--records", type=Path, default=RECORDS, help=argparse.SUPPRESS)  # for the tests
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("benchmarks.compiled: TRITON_INTERPRET=1 turns the compiler off: unset it", file=sys.stderr)
        return 2
    architectures = [int(name) for name in options.arch.split(",")]
    unknown = set(architectures) - set(TENSOR_CORE)
    if unknown:
        parser.error(f"--arch: {sorted(unknown)} is not among {', '.join(map(str, TENSOR_CORE))}")
    modules = options.modules.split(",") if options.modules else case_modules()
    import triton

    found = read_records(options.records)
    gate = Gate.of(modules, triton.__version__, found)
    all_jobs = representative(gate.jobs) if options.representative else gate.jobs
    all_jobs = [job for job in all_jobs if job.architecture in architectures and re.search(options.only, job.name)]
    if not all_jobs:
        print("benchmarks.compiled: no case matches", file=sys.stderr)
        return 2
    again = {"none": [], "sample": sample(all_jobs), "all": all_jobs}[options.recompile]
    known = gate.records if options.update and options.representative else gate.standing
    todo = [job for job in all_jobs if job.key not in known or job in again]
    start = time.perf_counter()
    compiled = _run(todo, options.processes)
    results = {job.key: compiled.get(job.key) or known[job.key] for job in all_jobs}
    differ = [f"{r.name} sm_{r.architecture}" for k, r in compiled.items() if gate.records.get(k, r) != r]
    failed = [r for r in results.values() if r.failures()]
    print(table(list(results.values()), markdown=options.markdown))
    print(
        f"\n{len(results)} configurations, {len(compiled)} compiled in {time.perf_counter() - start:.0f} s, the others "
        f"as recorded; {len(failed)} not as they should be",
        file=sys.stderr if options.markdown else sys.stdout,
    )
    if borrowed := sum(key not in gate.records and key not in compiled for key in results):
        print(
            f"{borrowed} of them are records of Triton {gate.complete}, and this is Triton {gate.version}, of which "
            f"{RECORDS.name} has {len(gate.records)}; to compile and record them for it: python -m benchmarks.compiled "
            f"--check --update --recompile all (or --representative, the part that is kept for what torch brings)",
            file=sys.stderr,
        )
    if differ:
        print(
            f"benchmarks.compiled: {RECORDS.name} says otherwise of {', '.join(differ)}: --update it", file=sys.stderr
        )
    if options.update:
        _update(options.records, modules, found, gate, compiled)
    is_part = options.modules or options.representative
    wrong = [] if is_part else _check_measured(architectures, options.only)
    return 1 if options.check and (failed or wrong or (differ and not options.update)) else 0


def _check_measured(architectures: Sequence[int], only: str) -> list[str]:
    """What is wrong with the entries of model/kernels/triton/tiles.json, which are compiled every time."""
    count, wrong = compiled_entries.check(architectures, only)
    if count:
        print(f"{count} measured tiles compiled, {len(wrong)} not as they should be", file=sys.stderr)
    for why in wrong:
        print(f"benchmarks.compiled: tiles.json: {why}", file=sys.stderr)
    return wrong


@dataclass(frozen=True)
class Gate:
    """Every case, and what is recorded of it."""

    version: str
    """Of the installed Triton."""
    complete: str
    """The version with the most records; the installed one if there are none."""
    jobs: list[Job]
    records: dict[str, Compiled]
    """Of the installed Triton, by key."""
    standing: dict[str, Compiled]
    """These and, for other cases, those of the most complete version: by the key of the installed one."""

    @classmethod
    def of(cls, modules: Sequence[str], version: str, found: Records) -> Gate:
        complete = next(iter(found), version)
        own, others = jobs(modules, version), jobs(modules, complete)
        # A key knows neither the case's name nor the kernel's module: both may have changed since.
        records, standing = {}, {}
        for job, other in zip(own, others, strict=True):
            record = found.get(version, {}).get(job.key)
            substitute = record or found.get(complete, {}).get(other.key)
            if record is not None:
                records[job.key] = job.named(record)
            if substitute is not None:
                standing[job.key] = job.named(substitute)
        return cls(version, complete, own, records, standing)


def _update(path: Path, modules: Sequence[str], found: Records, gate: Gate, compiled: dict[str, Compiled]) -> None:
    """What was not compiled keeps its record; records of no case are dropped, of every version."""
    kept = {job.key: compiled.get(job.key) or gate.records.get(job.key) for job in gate.jobs}
    updated = {gate.version: {key: result for key, result in kept.items() if result is not None}}
    for version in found.keys() - {gate.version}:
        named = {job.key: job for job in jobs(modules, version)}
        updated[version] = {key: named[key].named(result) for key, result in found[version].items() if key in named}
    updated = dict(sorted(updated.items(), key=lambda item: -len(item[1])))
    write_records(path, updated)
    if path == RECORDS:
        update_document(DOCUMENT, list(in_one_table(updated)))


def _run(todo: Sequence[Job], processes: int) -> dict[str, Compiled]:
    if not todo:
        return {}
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(processes) as pool:
        os.environ["TRITON_CACHE_DIR"] = folder  # read by the workers, which start at the first job
        os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"  # what Triton 3.9 does anyway, with a warning
        return {job.key: result for job, result in zip(todo, pool.map(Job.run, todo), strict=True)}


if __name__ == "__main__":
    sys.exit(main())
