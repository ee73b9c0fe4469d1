"""One case compiled for one architecture: what its metadata and machine code (SASS) say, and which rule it breaks.

For benchmarks/compiled.py, which also says what the rules are for.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.kernel_cases.case import CompileCase

SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""Of a block, by architecture: A100; H100, H200; B200; RTX 5090, RTX PRO 6000."""
STACK_BYTES = {80: 0, 90: 0, 100: 0, 120: 96}
"""Of a thread. A kernel of many rows keeps up to 88 bytes there on sm_120, for which no tiles were chosen."""
SMALL_BYTES = 99 << 10
"""On GPUs of capability 8.6 and 8.9 (A10, A40, RTX 3090; L4, L40S, RTX 4090). For these Triton makes what it makes for
sm_80."""
HMMA = r"HMMA\."
TENSOR_CORE = {80: HMMA, 90: r"HGMMA\.", 100: r"UTC\w*MMA\b", 120: HMMA}
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
    is_for_small: bool = False
    """Whether GPUs with less shared memory launch it too. Of the case, so never recorded."""

    def failures(self) -> list[str]:
        if self.error:
            return [f"does not compile: {self.error}"]
        found = []
        if self.stack_bytes > STACK_BYTES[self.architecture]:
            found.append(f"{self.stack_bytes} bytes of stack per thread")
        if self.shared_bytes > SHARED_BYTES[self.architecture]:
            found.append(f"{self.shared_bytes} bytes of shared memory, {SHARED_BYTES[self.architecture]} fit")
        elif self.architecture == 80 and self.is_for_small and self.shared_bytes > SMALL_BYTES:
            found.append(f"{self.shared_bytes} bytes of shared memory, {SMALL_BYTES} fit on capability 8.6 and 8.9")
        if self.tensor_memory_columns > TENSOR_MEMORY_COLUMNS:
            found.append(f"{self.tensor_memory_columns} columns of tensor memory, {TENSOR_MEMORY_COLUMNS} fit")
        if self.is_gemm and self.tensor_core == 0:
            found.append(f"no tensor-core instruction of sm_{self.architecture} ({self.older_tensor_core} older)")
        if self.load_bytes < self.expected_load_bytes:
            found.append(f"widest global load {self.load_bytes} bytes")
        if self.float_atomics > 0:
            found.append(f"{self.float_atomics} atomics on floats")
        return found


def kernel_name(case: CompileCase) -> str:
    """Module and function."""
    return f"{case.kernel.fn.__module__.rsplit('.', 1)[-1]}.{case.kernel.fn.__name__}"


def compile_case(case: CompileCase, architecture: int) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(fn=case.kernel, signature=case.signature, constexprs=case.constexprs, attrs=case.attributes)
    error = ""
    resources, operations, float_atomics, shared, columns = {"REG": 0, "STACK": 0}, Counter[str](), 0, 0, 0
    try:
        kernel = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=case.options)
    except Exception as caught:  # whatever the compiler dies of belongs in the table
        error = f"{type(caught).__name__}: {' '.join(str(caught).replace('|', '/').split())[-300:]}"
    else:
        shared = kernel.metadata.shared
        columns = getattr(kernel.metadata, "tmem_size", None) or 0
        resources, operations = read_cubin(kernel.asm["cubin"])
        float_atomics = sum(n for name, n in operations.items() if FLOAT_ATOMIC.match(name))
        float_atomics = max(float_atomics, len(FLOAT_ATOMIC_IR.findall(kernel.asm["ttir"])))
    older = sum(n for name, n in operations.items() if re.match(HMMA, name))
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
        older_tensor_core=0 if TENSOR_CORE[architecture] == HMMA else older,
        load_bytes=max((load_width(name) for name in loads), default=0),
        wide_loads=sum(n for name, n in loads.items() if load_width(name) == 16),
        loads=sum(loads.values()),
        float_atomics=float_atomics,
        error=error,
        is_for_small=120 in case.architectures,
    )


def read_cubin(cubin: bytes) -> tuple[dict[str, int], Counter[str]]:
    """-> resource usage of the kernel (REG, STACK, ...) and how often each instruction stands in its machine code."""
    code = _dump(cubin, "--dump-sass")
    operations = Counter(INSTRUCTION.findall(code))
    if not operations:
        raise RuntimeError(f"cuobjdump says nothing of instructions:\n{code[-500:]}")
    return resource_usage(cubin), operations


def resource_usage(cubin: bytes) -> dict[str, int]:
    """What a kernel needs: REG and STACK per thread, SHARED and LOCAL."""
    usage = _dump(cubin, "--dump-resource-usage")
    resources = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    if not {"REG", "STACK"} <= resources.keys():
        raise RuntimeError(f"cuobjdump says nothing of registers or stack:\n{usage[-500:]}")
    return resources


def _dump(cubin: bytes, option: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout


def load_width(instruction: str) -> int:
    """Bytes that one thread loads by a global load such as LDG.E.128 or LDGSTS.E.BYPASS.LTC128B.64."""
    if BULK_LOAD.match(instruction):
        return 16
    parts = instruction.split(".")
    for part, width in (("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("U8", 1), ("S8", 1)):
        if part in parts:
            return width
    return 4
