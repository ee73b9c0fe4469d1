"""nvcc compiles the CUDA C++ without spills; where it is missing, or fails, the user is told."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch

from model.kernels import backend as kernel_backend
from model.kernels.cuda import build
from model.kernels.cuda import route as cuda_route
from model.kernels.ops.route import route

SOURCE = build.FOLDER / "route.cu"
needs_nvcc = pytest.mark.skipif(
    build.find_nvcc() is None, reason="nvcc is not installed: nothing says here that route.cu compiles for a GPU"
)


@pytest.mark.slow
@needs_nvcc
@pytest.mark.parametrize("architecture", ["80", "90a"])
def test_compiles_without_spills(architecture: str, tmp_path: Path) -> None:
    command = [str(build.find_nvcc()), "-O3", "-std=c++17", "-Xptxas=-v", "-cubin", "-o", str(tmp_path / "route.cubin")]
    command += [f"-gencode=arch=compute_{architecture},code=sm_{architecture}", str(SOURCE)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    stacks = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", result.stderr)
    assert len(stacks) == 6 + 1 + 6  # choose and gradient for six widths, sort
    assert set(stacks) == {("0", "0", "0")}
    shared = [int(size) for size in re.findall(r"(\d+) bytes smem", result.stderr)]
    assert max(shared) <= 48 << 10


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SWITCHALL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.slow
@needs_nvcc
@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_the_library_loads_and_says_that_there_is_no_gpu(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = build.build("route")
    assert [path] == list(cache.iterdir())
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    assert build.build("route") == path  # not compiled again
    assert build.why_not("route") is None
    real = cuda_route.Library.open(path, "cpu")
    monkeypatch.setattr(cuda_route, "library", lambda: real)
    with pytest.raises(RuntimeError, match=r"kernels\.backend=cuda, route: .*(driver|device)"):
        route(torch.ones(3, 4), torch.ones(1, 2, 4), 1, backend="cuda")


def test_without_nvcc(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    with pytest.raises(
        RuntimeError, match=r"nvcc, which compiles route\.cu, is neither in \$CUDA_HOME/bin nor in PATH"
    ):
        build.build("route")
    with pytest.raises(ValueError, match=r"kernels\.backend=cuda cannot compute route on cuda: nvcc, which compiles"):
        kernel_backend.resolve("cuda", "route", "cuda")


def test_nvcc_that_fails_is_quoted(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'route.cu(1): error: no' >&2\nexit 1\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert build.find_nvcc() == nvcc
    with pytest.raises(RuntimeError, match=r"(?s)bin/nvcc -O3 .* failed:\nroute\.cu\(1\): error: no"):
        build.build("route")
    assert list(cache.iterdir()) == []
