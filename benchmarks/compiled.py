"""What the Triton kernels become: compiled ahead of time for three generations of GPUs, on a machine without any.

    python -m benchmarks.compiled [--check] [--arch 80,90,100] [--only REGEX] [--markdown] [--processes 2]

Compiles every `compile_cases()` of every module in model/kernels/triton and reads from metadata and machine code
(SASS): registers, stack, shared memory, tensor-core instructions, width of global loads, atomics on floats. With
--check the exit status is 1 unless every case
- has no stack (a stack means spilled registers or indexed local arrays),
- fits the shared memory of one block (163 KB on sm_80, 227 KB on sm_90 and sm_100) and 512 columns of tensor memory,
- if a GEMM, uses that architecture's own tensor-core instructions (HMMA, HGMMA, UTC*MMA),
- has 16-byte global loads,
- has no atomics on floats.

A compilation takes 1 to 6 s. What it gave is kept in $SWITCHALL_CACHE (default ~/.cache/switchall) under a hash of all
that decides it: source of the kernel and of what it calls, case, architecture, triton's version and this file.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from model.kernels.triton.launch import CompileCase

PACKAGE = "model.kernels.triton"
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

    name: str
    architecture: int
    is_gemm: bool
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
    seconds: float
    """Of the compilation; 0 where it failed."""
    error: str = ""
    """Why the compiler gave nothing."""

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
        if self.load_bytes < 16:
            found.append(f"widest global load {self.load_bytes} bytes")
        if self.float_atomics > 0:
            found.append(f"{self.float_atomics} atomics on floats")
        return found


def cases(modules: Sequence[str]) -> Iterator[CompileCase]:
    for name in modules:
        yield from importlib.import_module(name).compile_cases()


def kernel_modules() -> list[str]:
    package = importlib.import_module(PACKAGE)
    names = [f"{PACKAGE}.{found.name}" for found in pkgutil.iter_modules(package.__path__)]
    return [name for name in names if hasattr(importlib.import_module(name), "compile_cases")]


def compile_case(case: CompileCase, architecture: int) -> Compiled:
    """Runs the compiler, unless an equal compilation is in the cache."""
    path = _cache_folder() / f"{_key(case, architecture)}.json"
    if path.exists():
        return Compiled(**json.loads(path.read_text()) | {"name": case.name})
    result = _compile(case, architecture)
    if not result.error:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        unfinished.write_text(json.dumps(asdict(result)))
        unfinished.replace(path)
    return result


def _compile(case: CompileCase, architecture: int) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(fn=case.kernel, signature=case.signature, constexprs=case.constexprs, attrs=case.attributes)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    start, error = time.perf_counter(), ""
    resources, operations, float_atomics, shared, columns = {"REG": 0, "STACK": 0}, Counter[str](), 0, 0, 0
    try:
        kernel = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    except Exception as caught:  # whatever the compiler dies of belongs in the table
        error = f"{type(caught).__name__}: {str(caught).strip()[-300:]}"
    else:
        shared = kernel.metadata.shared
        columns = getattr(kernel.metadata, "tmem_size", None) or 0
        resources, operations = read_cubin(kernel.asm["cubin"])
        float_atomics = sum(n for name, n in operations.items() if FLOAT_ATOMIC.match(name))
        float_atomics = max(float_atomics, len(FLOAT_ATOMIC_IR.findall(kernel.asm["ttir"])))
    loads = {name: n for name, n in operations.items() if GLOBAL_LOAD.match(name)}
    return Compiled(
        name=case.name,
        architecture=architecture,
        is_gemm=case.is_gemm,
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
        seconds=0 if error else round(time.perf_counter() - start, 2),
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


def _key(case: CompileCase, architecture: int) -> str:
    import triton

    decides = (
        triton.__version__,
        Path(__file__).read_text(),
        case.kernel.cache_key,
        sorted(case.signature.items()),
        sorted((name, str(value)) for name, value in case.constexprs.items()),
        sorted(map(str, case.attributes.items())),
        (case.num_warps, case.num_stages, case.is_gemm, architecture),
    )
    return hashlib.sha256(repr(decides).encode()).hexdigest()


def _cache_folder() -> Path:
    cache = os.environ.get("SWITCHALL_CACHE")
    folder = Path(cache) if cache else Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "switchall"
    return folder / "compiled"


def _work(job: tuple[tuple[str, ...], int, int]) -> Compiled:
    """In a worker: kernels cannot be pickled, so a job names one by its position."""
    modules, position, architecture = job
    return compile_case(list(cases(modules))[position], architecture)


def compile_all(
    modules: Sequence[str], architectures: Sequence[int], *, only: str = "", processes: int = 2
) -> list[Compiled]:
    names = [case.name for case in cases(modules)]
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise ValueError(f"compile_cases() must name each case differently; twice: {', '.join(repeated)}")
    jobs = [
        (tuple(modules), position, architecture)
        for position, name in enumerate(names)
        if re.search(only, name)
        for architecture in architectures
    ]
    with ProcessPoolExecutor(processes) as pool:
        return list(pool.map(_work, jobs))


def table(results: Sequence[Compiled], *, markdown: bool) -> str:
    """One row per case and architecture; `fails` is empty where everything holds."""
    head = (
        "kernel",
        "sm",
        "warps",
        "stages",
        "registers",
        "stack",
        "shared KB",
        "tensor cores",
        "16-byte loads",
        "fails",
    )
    rows = [head]
    for r in results:
        tensor_cores = str(r.tensor_core) if r.is_gemm else "-"
        numbers = (
            r.name,
            r.architecture,
            r.warps,
            r.stages,
            r.registers,
            r.stack_bytes,
            f"{r.shared_bytes / 1024:.0f}",
        )
        rows.append((*map(str, numbers), tensor_cores, f"{r.wide_loads} of {r.loads}", "; ".join(r.failures())))
    if markdown:
        lines = [f"| {' | '.join(row)} |" for row in rows]
        return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.compiled", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="exit status 1 unless every case passes")
    parser.add_argument("--arch", default="80,90,100", help="compute capabilities times ten, comma-separated")
    parser.add_argument("--only", default="", metavar="REGEX", help="cases whose name matches")
    parser.add_argument("--markdown", action="store_true", help="a table for docs/kernels.md")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--modules", default="", help=f"comma-separated, instead of all of {PACKAGE}")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("benchmarks.compiled: TRITON_INTERPRET=1 turns the compiler off: unset it", file=sys.stderr)
        return 2
    architectures = [int(name) for name in options.arch.split(",")]
    unknown = set(architectures) - set(TENSOR_CORE)
    if unknown:
        parser.error(f"--arch: {sorted(unknown)} is not among {', '.join(map(str, TENSOR_CORE))}")
    modules = options.modules.split(",") if options.modules else kernel_modules()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder  # our own cache keeps what matters
        os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"  # what Triton 3.9 does anyway, with a warning
        results = compile_all(modules, architectures, only=options.only, processes=options.processes)
    print(table(results, markdown=options.markdown))
    failed = [r for r in results if r.failures()]
    print(
        f"\n{len(results)} compilations of {len({r.name for r in results})} cases, {len(failed)} not as they "
        f"should be; {time.perf_counter() - start:.0f} s",
        file=sys.stderr if options.markdown else sys.stdout,
    )
    if not results:
        print("benchmarks.compiled: no case matches", file=sys.stderr)
        return 2
    return 1 if failed and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
