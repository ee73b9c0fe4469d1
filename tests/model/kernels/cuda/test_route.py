"""route.cu without a GPU: emulated on the CPU it equals route_reference under random thread schedules, is clean under
sanitizers, and every barrier that it has is needed. See simt.h; that nvcc compiles it: test_build.py."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from model.kernels import backend as kernel_backend
from model.kernels.cuda import build
from model.kernels.cuda import route as cuda_route
from model.kernels.ops.route import route

FOLDER = Path(__file__).resolve().parent
SOURCE = build.FOLDER / "route.cu"
GXX = shutil.which("g++")
needs_gxx = pytest.mark.skipif(GXX is None, reason="g++, which builds the emulated kernels, is not installed")
NUM_SCHEDULES = 20


class Shape(NamedTuple):
    N: int
    R: int
    E: int
    k: int
    min_chunk_tokens: int
    """Small, so that several blocks share a router; large, so that one sorts more than 256 slots in turn."""


SHAPES = {
    "one token": Shape(1, 1, 4, 2, 32),
    "two experts, all chosen": Shape(9, 3, 2, 2, 4),
    "heads": Shape(37, 4, 5, 3, 16),
    "k is 1": Shape(65, 2, 8, 1, 32),
    "feed-forward": Shape(45, 1, 16, 4, 32),
    "33 experts, empty chunks": Shape(9, 2, 33, 5, 1),
    "64 experts": Shape(70, 1, 64, 8, 70),
    "100 experts, more choices than lanes": Shape(21, 1, 100, 19, 8),
    "one expert": Shape(40, 1, 1, 1, 8),
    "256 experts": Shape(5, 1, 256, 8, 32),
}
DROPOUT = ("none", "attention", "feed-forward")


class Case(NamedTuple):
    logits: Tensor
    keep: Tensor | None
    drop_scores: bool
    grad_logits: Tensor
    grad_scores: Tensor


def make_case(shape: Shape, dropout: str, *, ties: bool = False) -> Case:
    N, R, E, k, _ = shape
    generator = torch.Generator().manual_seed(N + 7 * E)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    logits = normal(N, R, E)
    if ties:  # coarse values, saturated sigmoids, 0.0 beside -0.0
        logits = torch.randint(-2, 3, (N, R, E), generator=generator) * torch.tensor([0.5, 40.0])[N % 2]
        logits[torch.rand(N, R, E, generator=generator) < 0.1] *= -0.0
    keep = None if dropout == "none" else torch.rand(N, R, E, generator=generator) < 0.5
    return Case(logits, keep, dropout == "feed-forward", normal(N, R, E), normal(N, R, k))


def inputs(case: Case) -> tuple[Tensor, Tensor]:
    """One-hot tokens and the weight that give exactly the logits of the case, whatever multiplies them."""
    return torch.eye(case.logits.shape[0]).requires_grad_(), case.logits.permute(1, 2, 0).contiguous().requires_grad_()


def compile_emulated(to: Path, *flags: str) -> Path:
    """With optimisation: that -O1 merges loads is part of what a missing barrier breaks."""
    command = ["g++", "-std=c++17", "-O1", "-g", "-DSIMT_EMULATOR", f"-I{FOLDER}", "-Wall", "-Wextra", "-Werror"]
    command += ["-Wno-unknown-pragmas", *flags, "-o", str(to)]  # #pragma unroll is nvcc's
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return to


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> cuda_route.Library:
    path = tmp_path_factory.mktemp("emulated") / "route.so"
    return cuda_route.Library.open(compile_emulated(path, "-shared", "-fPIC", "-xc++", str(SOURCE)), "cpu")


@pytest.fixture
def library(emulated: cuda_route.Library, monkeypatch: pytest.MonkeyPatch) -> cuda_route.Library:
    monkeypatch.setattr(cuda_route, "library", lambda: emulated)
    emulated.functions.simt_schedule(0, 0)
    return emulated


def run(case: Case, k: int, backend: str) -> tuple[list[Tensor], list[Tensor]]:
    x, weight = inputs(case)
    r = route(x, weight, k, keep=case.keep, drop_scores=case.drop_scores, backend=backend)
    grads = torch.autograd.grad((r.logits, r.scores), (x, weight), (case.grad_logits, case.grad_scores))
    return [t.detach() for t in r], list(grads)


def assert_equal(actual: tuple[list[Tensor], list[Tensor]], expected: tuple[list[Tensor], list[Tensor]]) -> None:
    for name, a, b in zip(("logits", "scores", "index", "load", "order"), actual[0], expected[0], strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape, name
        if name == "scores":
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
        else:
            assert torch.equal(a, b), name
    for name, a, b in zip(("x", "weight"), actual[1], expected[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


def check_schedules(
    name: str, dropout: str, schedules: range, library: cuda_route.Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal to the reference, and bit for bit to each other; ties in the second half of the schedules."""
    shape = SHAPES[name]
    monkeypatch.setattr(cuda_route, "MIN_CHUNK_TOKENS", shape.min_chunk_tokens)
    cases = {ties: make_case(shape, dropout, ties=ties) for ties in (False, True)}
    expected = {ties: run(case, shape.k, "reference") for ties, case in cases.items()}
    first: dict[bool, tuple[list[Tensor], list[Tensor]]] = {}
    for schedule in schedules:
        ties = schedule > NUM_SCHEDULES // 2
        library.functions.simt_schedule(schedule, 0)
        actual = run(cases[ties], shape.k, "cuda")
        assert_equal(actual, expected[ties])
        again = first.setdefault(ties, actual)
        assert all(torch.equal(a, b) for a, b in zip([*actual[0], *actual[1]], [*again[0], *again[1]], strict=True))


@needs_gxx
@pytest.mark.parametrize("dropout", DROPOUT)
def test_equals_torch_under_random_schedules(
    dropout: str, library: cuda_route.Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Schedule 0 (threads in order) and twenty random ones, shared out among the kinds of dropout. The kernel waits for
    a time on a GPU and no configuration takes it by itself: all shapes, sanitizers and barriers are slow tests."""
    schedules = range(DROPOUT.index(dropout), NUM_SCHEDULES + 1, len(DROPOUT))
    check_schedules("heads", dropout, schedules, library, monkeypatch)


@pytest.mark.slow
@needs_gxx
@pytest.mark.parametrize("dropout", DROPOUT)
@pytest.mark.parametrize("name", SHAPES)
def test_equals_torch_under_all_schedules(
    name: str, dropout: str, library: cuda_route.Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_schedules(name, dropout, range(NUM_SCHEDULES + 1), library, monkeypatch)


@needs_gxx
def test_no_tokens_and_one_of_two_gradients(library: cuda_route.Library) -> None:
    x, weight = torch.ones(0, 8, requires_grad=True), torch.ones(2, 4, 8, requires_grad=True)
    r = route(x, weight, 2, backend="cuda")
    assert [tuple(t.shape) for t in r] == [(0, 2, 4), (0, 2, 2), (0, 2, 2), (2, 4), (2, 0)]
    assert r.load.eq(0).all()
    assert torch.autograd.grad(r.scores.sum(), weight)[0].eq(0).all()
    case = make_case(SHAPES["heads"], "none")
    _, both = run(case, 3, "cuda")
    r = route(*inputs(case), 3, backend="cuda")
    one, other = inputs(case), inputs(case)
    a = torch.autograd.grad(route(*one, 3, backend="cuda").logits, one, case.grad_logits)
    b = torch.autograd.grad(route(*other, 3, backend="cuda").scores, other, case.grad_scores)
    for sum_, only_logits, only_scores in zip(both, a, b, strict=True):
        torch.testing.assert_close(sum_, only_logits + only_scores)


@needs_gxx
def test_strides_and_half_precision(library: cuda_route.Library) -> None:
    case = make_case(SHAPES["heads"], "attention")
    assert case.keep is not None
    strided = case._replace(
        keep=case.keep.transpose(0, 1).contiguous().transpose(0, 1),
        grad_logits=torch.tensor(0.3).expand_as(case.grad_logits),
        grad_scores=case.grad_scores.transpose(0, 2).contiguous().transpose(0, 2),
    )
    assert_equal(run(strided, 3, "cuda"), run(strided, 3, "reference"))
    for dtype in (torch.bfloat16, torch.float16):
        half = case._replace(logits=case.logits.to(dtype))  # representable: the logits are equal again
        results = []
        for backend in ("cuda", "reference"):
            x, weight = (t.detach().to(dtype).requires_grad_() for t in inputs(half))
            r = route(x, weight, 3, keep=half.keep, backend=backend)
            results.append(([t.detach() for t in r], torch.autograd.grad(r.scores.sum(), (x, weight))))
        for a, b in zip(results[0][0], results[1][0], strict=True):
            torch.testing.assert_close(a, b)
        for a, b in zip(results[0][1], results[1][1], strict=True):
            assert a.dtype == dtype
            torch.testing.assert_close(a, b)


@needs_gxx
def test_numbers_that_are_none(library: cuda_route.Library) -> None:
    """NaN is chosen first, as by torch.sort; nothing is read or written outside."""
    logits = make_case(SHAPES["64 experts"], "none").logits
    logits[::3, 0, 5], logits[1::3, 0, ::2], logits[2::3] = torch.nan, -torch.inf, torch.nan
    nothing = torch.zeros(())
    case = Case(logits, None, False, nothing.expand_as(logits), nothing.expand(70, 1, 8))
    chosen = []
    for backend in ("cuda", "reference"):
        # One-hot tokens would spread NaN to every token: d = 1, and the logits are a weight per token and expert.
        rows = [route(torch.ones(1, 1), row[..., None], 8, backend=backend).index for row in case.logits[:6]]
        chosen.append(torch.cat(rows))
    assert torch.equal(*chosen)


# --------------------------------------------------------------------------------------- sanitizers, missing barriers


class Program(NamedTuple):
    """route_schedules.cpp, compiled in one way, and a folder for its inputs."""

    path: Path
    folder: Path

    def run(
        self, shape: Shape, case: Case, *, schedules: int, removed_barrier: int = 0
    ) -> subprocess.CompletedProcess[str]:
        arrays = {"logits": case.logits, "grad_logits": case.grad_logits, "grad_scores": case.grad_scores}
        if case.keep is not None:
            arrays["keep"] = case.keep
        for name, tensor in arrays.items():
            tensor.numpy().tofile(self.folder / name)
        chunks = min(cuda_route.MAX_CHUNKS, -(-shape.N // shape.min_chunk_tokens))
        numbers = [*shape[:4], chunks, int(case.drop_scores), int(case.keep is not None), schedules, removed_barrier]
        command = [str(self.path), str(self.folder), *map(str, numbers)]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)

    def read(self, name: str, like: Tensor) -> Tensor:
        array = np.fromfile(self.folder / name, dtype=like.numpy().dtype)
        return torch.from_numpy(array).view(like.shape)


def compile_program(folder: Path, *flags: str, source: Path = SOURCE) -> Program:
    sources = ("-include", str(source), str(FOLDER / "route_schedules.cpp"))
    return Program(compile_emulated(folder / "route_schedules", *flags, *sources), folder)


@pytest.fixture(scope="module")
def with_address_sanitizer(tmp_path_factory: pytest.TempPathFactory) -> Program:
    return compile_program(tmp_path_factory.mktemp("asan"), "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


@pytest.fixture(scope="module")
def with_thread_sanitizer(tmp_path_factory: pytest.TempPathFactory) -> Program:
    return compile_program(tmp_path_factory.mktemp("tsan"), "-fsanitize=thread", "-DROUTE_THREADS=128")


def barriers() -> list[int]:
    """Lines of route.cu that are barriers."""
    return [i for i, line in enumerate(SOURCE.read_text().splitlines(), 1) if line.strip() == "__syncthreads();"]


RACY = Shape(70, 1, 64, 8, 24)
"""Three chunks of 192 slots: with 128 threads every loop of the kernels is passed more than once."""


def assert_clean(program: Program, name: str, dropout: str, schedules: int) -> None:
    shape = SHAPES[name]
    case = make_case(shape, dropout, ties=True)
    result = program.run(shape, case, schedules=schedules)
    output = "".join(line for line in result.stderr.splitlines(True) if "ASan doesn't fully support" not in line)
    assert result.returncode == 0 and output == "", output[-3000:]
    expected = run(case, shape.k, "reference")[0]
    for position, what in ((2, "index"), (3, "load"), (4, "order")):
        assert torch.equal(program.read(what, expected[position]), expected[position]), what


@pytest.mark.slow
@needs_gxx
@pytest.mark.parametrize("dropout", DROPOUT)
@pytest.mark.parametrize("name", SHAPES)
def test_clean_under_sanitizers_everywhere(
    name: str, dropout: str, with_address_sanitizer: Program, with_thread_sanitizer: Program
) -> None:
    assert_clean(with_address_sanitizer, name, dropout, NUM_SCHEDULES)
    assert_clean(with_thread_sanitizer, name, dropout, NUM_SCHEDULES)


@pytest.mark.slow
@needs_gxx
@pytest.mark.parametrize("line", barriers())
def test_every_barrier_is_needed(line: int, with_thread_sanitizer: Program) -> None:
    """The race detector reports what happens without it."""
    result = with_thread_sanitizer.run(RACY, make_case(RACY, "none"), schedules=2, removed_barrier=line)
    assert result.returncode != 0
    assert "WARNING: ThreadSanitizer: data race" in result.stderr


@pytest.mark.slow
@needs_gxx
def test_schedules_show_missing_barriers_without_a_race_detector(tmp_path: Path) -> None:
    """The random schedules alone find them too: by results that differ, or by a crash."""
    program, case = compile_program(tmp_path, "-DROUTE_THREADS=128"), make_case(RACY, "none")
    assert program.run(RACY, case, schedules=NUM_SCHEDULES).returncode == 0
    for line in barriers():
        result = program.run(RACY, case, schedules=NUM_SCHEDULES, removed_barrier=line)
        assert result.returncode != 0, line


@pytest.mark.slow
@needs_gxx
def test_an_overrun_is_caught(tmp_path: Path) -> None:
    """Of shared memory one element too small for five experts."""
    shape = SHAPES["heads"]
    text = SOURCE.read_text()
    assert "SHARED(int[MAX_EXPERTS], histogram)" in text
    (tmp_path / "route.cu").write_text(text.replace("SHARED(int[MAX_EXPERTS], histogram)", "SHARED(int[4], histogram)"))
    program = compile_program(tmp_path, "-fsanitize=address", source=tmp_path / "route.cu")
    result = program.run(shape, make_case(shape, "none"), schedules=1)
    assert result.returncode != 0 and "ERROR: AddressSanitizer" in result.stderr


@pytest.mark.slow
@needs_gxx
def test_a_barrier_that_not_all_threads_reach_is_an_error(tmp_path: Path) -> None:
    text = SOURCE.read_text().replace("    __syncthreads();\n", "    if (threadIdx.x != 7) __syncthreads();\n", 1)
    (tmp_path / "route.cu").write_text(text)
    path = compile_emulated(tmp_path / "route.so", "-shared", "-fPIC", "-xc++", str(tmp_path / "route.cu"))
    library = cuda_route.Library.open(path, "cpu")
    logits, out = torch.zeros(1, 1, 4), torch.zeros(64, dtype=torch.int64)
    addresses = [ctypes.c_void_p(out.data_ptr())] * 6
    code = library.functions.switchall_route(logits.data_ptr(), None, 0, 1, 1, 4, 1, 1, *addresses, 0, None)
    with pytest.raises(RuntimeError, match="route: threads wait for others that never come"):
        library.check(code)


# ----------------------------------------------------------------------------------------------------------- refusals


def test_is_chosen_by_name_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "why_not", lambda name: None)
    assert kernel_backend.resolve("cuda", "route", "cuda", dtype=torch.bfloat16) == "cuda"
    assert kernel_backend.resolve("auto", "route", "cuda", dtype=torch.bfloat16) != "cuda"
    with pytest.raises(ValueError, match="route on cpu: it runs on CUDA tensors only"):
        kernel_backend.resolve("cuda", "route", "cpu")
    with pytest.raises(ValueError, match="it computes in float32"):
        kernel_backend.resolve("cuda", "route", "cuda", dtype=torch.float64)


@needs_gxx
def test_refuses_what_it_cannot(emulated: cuda_route.Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_route, "library", lambda: emulated._replace(device_type="cuda"))
    with pytest.raises(RuntimeError, match="computes routing on cuda tensors, not cpu"):
        route(torch.ones(3, 4), torch.ones(1, 2, 4), 1, backend="cuda")
    with pytest.raises(RuntimeError, match=r"at most 256 experts, .*, not 257, 1 and 3: use another backend"):
        route(torch.ones(3, 4), torch.ones(1, 257, 4), 1, backend="cuda")
    with pytest.raises(RuntimeError, match=r"and 2\^30 slots, not 4, 1 and 1073741826"):
        route(torch.ones(1, 1).expand(2**29 + 1, 1), torch.ones(1, 4, 1), 2, backend="cuda")
    with pytest.raises(RuntimeError, match="in fp32: use reference for float64"):
        route(torch.ones(3, 4).double(), torch.ones(1, 2, 4).double(), 1, backend="cuda")
