"""What the Triton kernels become: compiled ahead of time for three generations of GPUs, on a machine without any.

    python -m benchmarks.compiled [--check] [--update] [--recompile all|sample] [--only REGEX] [--markdown]

Covers every `compile_cases()` of benchmarks/kernel_cases and reads from metadata and machine code (SASS):
registers, stack, shared memory, tensor-core instructions, width of global loads, atomics on floats. With --check the
exit status is 1 unless every case
- has no stack (a stack means spilled registers or indexed local arrays),
- fits the shared memory of one block (163 KB on sm_80, 227 KB on sm_90 and sm_100) and 512 columns of tensor memory,
- if a GEMM, uses that architecture's own tensor-core instructions (HMMA, HGMMA, UTC*MMA),
- has 16-byte global loads (8 where rows are no multiple of 16 bytes, or single 8-byte numbers are gathered),
- has no atomics on floats.

A compilation takes 1 to 6 s, all of them a quarter of an hour on two cores, so benchmarks/compiled.csv records what
they gave, under a hash of all that decides it: source of the kernel and of what it calls, case, architecture and
Triton's version. A case without an equal record is compiled; --recompile compiles recorded ones too (all, or the first
GEMM of every module, on the architectures in turn) and fails where the result differs from the record; --update writes
the records anew. Under another Triton than that of the records, a record still stands for a case whose source is the
same; what is compiled must pass, but is not compared with it. There --recompile all and --update compile everything.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import importlib
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from benchmarks.compiled_tables import table, update_document

if TYPE_CHECKING:
    from benchmarks.kernel_cases.case import CompileCase

PACKAGE = "benchmarks.kernel_cases"
RECORDS = Path(__file__).with_name("compiled.csv")
DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "kernels.md"
"""--update writes the summary between its two comments."""
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
TENSOR_CORE = {80: r"HMMA\.", 90: r"HGMMA\.", 100: r"UTC\w*MMA\b"}
TENSOR_MEMORY_COLUMNS = 512
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
GLOBAL_LOAD = re.compile(r"(LDG|LDGSTS|UTMALDG|UBLKCP)\b")
BULK_LOAD = re.compile(r"(UTMALDG|UBLKCP)\b")  # by the copy engine, in units of 16 bytes
FLOAT_ATOMIC = re.compile(r"(ATOM|ATOMG|ATOMS|RED|REDG)\b.*\.(F16|F32|F64|BF16)")
FLOAT_ATOMIC_IR = re.compile(r"tt\.atomic_rmw f\w+,|tt\.atomic_cas\b.*\bb?f\d+\b")


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """One case on one architecture."""

    kernel: str
    """Module and function."""
    name: str
    architecture: int
    is_gemm: bool
    expected_load_bytes: int
    """What the layout allows: 16, unless the case gives a reason."""
    warps: int
    stages: int
    registers: int
    """Per thread."""
    stack_bytes: int
    """Per thread; includes spilled registers."""
    shared_bytes: int
    """Per block."""
    tensor_memory_columns: int
    tensor_core: int
    """Instructions of the architecture's own kind in the machine code (not executions)."""
    older_tensor_core: int
    """HMMA where there are HGMMA or UTC*MMA."""
    load_bytes: int
    """Widest global load of one thread."""
    wide_loads: int
    """Global load instructions of 16 bytes."""
    loads: int
    float_atomics: int
    error: str = ""
    """Why the compiler gave nothing; such a result is never recorded."""

    def failures(self) -> list[str]:
        if self.error:
            return [f"does not compile: {self.error}"]
        found = []
        if self.stack_bytes > 0:
            found.append(f"{self.stack_bytes} bytes of stack per thread")
        if self.shared_bytes > SHARED_BYTES[self.architecture]:
            found.append(f"{self.shared_bytes} bytes of shared memory, {SHARED_BYTES[self.architecture]} fit")
        if self.tensor_memory_columns > TENSOR_MEMORY_COLUMNS:
            found.append(f"{self.tensor_memory_columns} columns of tensor memory, {TENSOR_MEMORY_COLUMNS} fit")
        if self.is_gemm and self.tensor_core == 0:
            found.append(f"no tensor-core instruction of sm_{self.architecture} ({self.older_tensor_core} older)")
        if self.load_bytes < self.expected_load_bytes:
            found.append(f"widest global load {self.load_bytes} bytes")
        if self.float_atomics > 0:
            found.append(f"{self.float_atomics} atomics on floats")
        return found


def cases(modules: Sequence[str]) -> Iterator[CompileCase]:
    for name in modules:
        yield from importlib.import_module(name).compile_cases()


def case_modules() -> list[str]:
    package = importlib.import_module(PACKAGE)
    names = [f"{PACKAGE}.{found.name}" for found in pkgutil.iter_modules(package.__path__)]
    return [name for name in names if hasattr(importlib.import_module(name), "compile_cases")]


def kernel_name(case: CompileCase) -> str:
    """Module and function."""
    return f"{case.kernel.fn.__module__.rsplit('.', 1)[-1]}.{case.kernel.fn.__name__}"


def compile_case(case: CompileCase, architecture: int) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(fn=case.kernel, signature=case.signature, constexprs=case.constexprs, attrs=case.attributes)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    error = ""
    resources, operations, float_atomics, shared, columns = {"REG": 0, "STACK": 0}, Counter[str](), 0, 0, 0
    try:
        kernel = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    except Exception as caught:  # whatever the compiler dies of belongs in the table
        error = f"{type(caught).__name__}: {' '.join(str(caught).replace('|', '/').split())[-300:]}"
    else:
        shared = kernel.metadata.shared
        columns = getattr(kernel.metadata, "tmem_size", None) or 0
        resources, operations = read_cubin(kernel.asm["cubin"])
        float_atomics = sum(n for name, n in operations.items() if FLOAT_ATOMIC.match(name))
        float_atomics = max(float_atomics, len(FLOAT_ATOMIC_IR.findall(kernel.asm["ttir"])))
    loads = {name: n for name, n in operations.items() if GLOBAL_LOAD.match(name)}
    return Compiled(
        kernel=kernel_name(case),
        name=case.name,
        architecture=architecture,
        is_gemm=case.is_gemm,
        expected_load_bytes=case.load_bytes,
        warps=case.num_warps,
        stages=case.num_stages,
        registers=resources["REG"],
        stack_bytes=resources["STACK"],
        shared_bytes=shared,
        tensor_memory_columns=columns,
        tensor_core=sum(n for name, n in operations.items() if re.match(TENSOR_CORE[architecture], name)),
        older_tensor_core=sum(n for name, n in operations.items() if name.startswith("HMMA.")) * (architecture > 80),
        load_bytes=max((load_width(name) for name in loads), default=0),
        wide_loads=sum(n for name, n in loads.items() if load_width(name) == 16),
        loads=sum(loads.values()),
        float_atomics=float_atomics,
        error=error,
    )


def read_cubin(cubin: bytes) -> tuple[dict[str, int], Counter[str]]:
    """-> resource usage of the kernel (REG, STACK, ...) and how often each instruction stands in its machine code."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("--dump-resource-usage", "--dump-sass")
        )
    resources = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    operations = Counter(INSTRUCTION.findall(code))
    if not {"REG", "STACK"} <= resources.keys() or not operations:
        raise RuntimeError(f"{tool} says nothing of registers, stack or instructions:\n{usage[-500:]}{code[-500:]}")
    return resources, operations


def load_width(instruction: str) -> int:
    """Bytes that one thread loads by a global load such as LDG.E.128 or LDGSTS.E.BYPASS.LTC128B.64."""
    if BULK_LOAD.match(instruction):
        return 16
    parts = instruction.split(".")
    for part, width in (("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("U8", 1), ("S8", 1)):
        if part in parts:
            return width
    return 4


def key(case: CompileCase, architecture: int, triton_version: str) -> str:
    """Of everything that decides the result. Unlike Triton's own key it does not know modules and line numbers."""
    decides = (
        triton_version,
        sorted(_sources(case.kernel, set())),
        sorted(case.signature.items()),
        sorted((name, str(value)) for name, value in case.constexprs.items()),
        sorted(map(str, case.attributes.items())),
        (case.num_warps, case.num_stages, case.is_gemm, case.load_bytes, architecture),
    )
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


def read_records(path: Path) -> dict[str, Compiled]:
    """By key; none if there is no such file."""
    if not path.exists():
        return {}
    convert: dict[str, Callable[[str], Any]] = {"int": int, "bool": "True".__eq__, "str": str}
    kinds = {field.name: convert[str(field.type)] for field in fields(Compiled)}
    with path.open(newline="") as file:
        return {
            row.pop("key"): Compiled(**{name: kinds[name](value) for name, value in row.items() if name in kinds})
            for row in csv.DictReader(file)
        }


def recorded_triton(path: Path) -> str | None:
    """The version of Triton that gave the records, which is one for all; None if there are no records."""
    if not path.exists():
        return None
    with path.open(newline="") as file:
        return next((row["triton"] for row in csv.DictReader(file)), None)


def write_records(path: Path, results: dict[str, Compiled], triton_version: str) -> None:
    names = [field.name for field in fields(Compiled) if field.name != "error"]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["key", "triton", *names], extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        good = {key: result for key, result in results.items() if not result.error}
        writer.writerows({"key": key, "triton": triton_version, **asdict(result)} for key, result in good.items())


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

    def run(self) -> Compiled:
        return compile_case(list(cases([self.module]))[self.position], self.architecture)


def jobs(modules: Sequence[str], triton_version: str) -> list[Job]:
    """Equal cases, such as two models whose shapes take one tile, once. ValueError for different ones of one name."""
    found: dict[str, Job] = {}
    names: dict[tuple[str, int], str] = {}
    for module in modules:
        for position, case in enumerate(cases([module])):
            for architecture in TENSOR_CORE:
                decides = key(case, architecture, triton_version)
                job = Job(module, position, kernel_name(case), case.name, architecture, decides, case.is_gemm)
                if names.setdefault((case.name, architecture), job.key) != job.key:
                    raise ValueError(f"compile_cases() of {module}: two different cases are called {case.name!r}")
                found.setdefault(job.key, job)
    return list(found.values())


def sample(all_jobs: Sequence[Job]) -> list[Job]:
    """The first GEMM (first case, where a module has none) of every module, on the architectures in turn."""
    architectures = sorted({job.architecture for job in all_jobs})
    found = []
    for number, module in enumerate(sorted({job.module for job in all_jobs})):
        architecture = architectures[number % len(architectures)]
        own = [job for job in all_jobs if job.module == module and job.architecture == architecture]
        found += sorted(own, key=lambda job: not job.is_gemm)[:1]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.compiled", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="exit status 1 unless every case passes")
    parser.add_argument("--update", action="store_true", help=f"write {RECORDS.name} and the table in the docs anew")
    parser.add_argument("--recompile", choices=("none", "sample", "all"), default="none")
    parser.add_argument("--arch", default="80,90,100", help="compute capabilities times ten, comma-separated")
    parser.add_argument("--only", default="", metavar="REGEX", help="cases whose name matches")
    parser.add_argument("--markdown", action="store_true", help="the table as Markdown")
    parser.add_argument("--processes", type=int, default=2)
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

    recorded = recorded_triton(options.records) or triton.__version__
    same_triton = recorded == triton.__version__
    everything = jobs(modules, triton.__version__ if options.update or options.recompile == "all" else recorded)
    all_jobs = [job for job in everything if job.architecture in architectures and re.search(options.only, job.name)]
    if not all_jobs:
        print("benchmarks.compiled: no case matches", file=sys.stderr)
        return 2
    found = read_records(options.records)
    # A key knows neither the case's name nor the kernel's module: both may have changed since.
    records = {j.key: replace(found[j.key], kernel=j.kernel, name=j.name) for j in everything if j.key in found}
    again = {"none": [], "sample": sample(all_jobs), "all": all_jobs}[options.recompile]
    todo = [job for job in all_jobs if job.key not in records or job in again]
    start = time.perf_counter()
    compiled = _run(todo, options.processes)
    results = {job.key: compiled.get(job.key) or records[job.key] for job in all_jobs}
    differ = [f"{r.name} sm_{r.architecture}" for k, r in compiled.items() if same_triton and records.get(k, r) != r]
    failed = [r for r in results.values() if r.failures()]
    print(table(list(results.values()), markdown=options.markdown))
    print(
        f"\n{len(results)} configurations, {len(compiled)} compiled in {time.perf_counter() - start:.0f} s, the others "
        f"as recorded; {len(failed)} not as they should be",
        file=sys.stderr if options.markdown else sys.stdout,
    )
    if not same_triton:
        print(f"the records are Triton {recorded}'s, this is {triton.__version__}", file=sys.stderr)
    if differ:
        print(
            f"benchmarks.compiled: {RECORDS.name} says otherwise of {', '.join(differ)}: --update it", file=sys.stderr
        )
    if options.update:
        # What was not asked for keeps its record; records of no case are dropped.
        kept = {job.key: results.get(job.key) or records.get(job.key) for job in everything}
        known = {key: result for key, result in kept.items() if result is not None}
        write_records(options.records, known, triton.__version__)
        if options.records == RECORDS:
            update_document(DOCUMENT, list(known.values()))
    return 1 if options.check and (failed or (differ and not options.update)) else 0


def _run(todo: Sequence[Job], processes: int) -> dict[str, Compiled]:
    if not todo:
        return {}
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(processes) as pool:
        os.environ["TRITON_CACHE_DIR"] = folder  # read by the workers, which start at the first job
        os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"  # what Triton 3.9 does anyway, with a warning
        return {job.key: result for job, result in zip(todo, pool.map(Job.run, todo), strict=True)}


if __name__ == "__main__":
    sys.exit(main())
