"""Compiles the CUDA C++ of this folder into shared libraries with a C interface, each once per source text.

    python -m model.kernels.cuda.build

builds all of them ahead of a run (say on a login node, into a cache that the compute nodes share) and prints where they
are. Libraries know nothing of torch and Python, so one library serves every version of both.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).resolve().parent
FLAGS = (
    "-O3",
    "-std=c++17",
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90a,code=sm_90a",
    "-gencode=arch=compute_80,code=compute_80",  # PTX, which the driver compiles for every other GPU from Ampere on
)
SHARED_LIBRARY = ("-shared", "-Xcompiler=-fPIC", "-cudart=static")


def find_nvcc() -> Path | None:
    """nvcc of $CUDA_HOME, else of PATH, else of /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME")
    candidates = [Path(home) / "bin" / "nvcc"] if home else []
    on_path = shutil.which("nvcc")
    candidates += [Path(on_path)] if on_path else []
    candidates += [Path("/usr/local/cuda/bin/nvcc")]
    return next((path for path in candidates if os.access(path, os.X_OK)), None)


def library_path(name: str) -> Path:
    """Where the library of NAME.cu is, or will be: named after source and flags, below $SWITCHALL_CACHE."""
    key = hashlib.sha256("\0".join((*FLAGS, *SHARED_LIBRARY, (FOLDER / f"{name}.cu").read_text())).encode())
    cache = os.environ.get("SWITCHALL_CACHE")
    folder = Path(cache) if cache else Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "switchall"
    return folder / f"{name}-{key.hexdigest()[:16]}.so"


def why_not(name: str) -> str | None:
    """Why there is no library of NAME.cu here and none can be compiled; None if there is or can be."""
    if library_path(name).exists() or find_nvcc() is not None:
        return None
    return (
        f"nvcc, which compiles {name}.cu, is neither in $CUDA_HOME/bin nor in PATH; install the CUDA toolkit, or run "
        f"`python -m model.kernels.cuda.build` where there is one and share $SWITCHALL_CACHE"
    )


def build(name: str) -> Path:
    """Compiles NAME.cu unless that was done before. RuntimeError with the reason, or with nvcc's own words."""
    path = library_path(name)
    if path.exists():
        return path
    reason = why_not(name)
    if reason is not None:
        raise RuntimeError(f"kernels.backend=cuda: {reason}")
    path.parent.mkdir(parents=True, exist_ok=True)
    # Ranks that start together each compile into a folder of their own (10 s); the last rename wins, and all are equal.
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        command = [str(find_nvcc()), *FLAGS, *SHARED_LIBRARY, "-o", str(made), str(FOLDER / f"{name}.cu")]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise RuntimeError(f"kernels.backend=cuda: {' '.join(command)} failed:\n{result.stderr[-2000:]}")
        made.replace(path)
    logger.info("kernels: compiled %s", path)
    return path


def main() -> None:
    for source in sorted(FOLDER.glob("*.cu")):
        print(build(source.stem))


if __name__ == "__main__":
    main()
