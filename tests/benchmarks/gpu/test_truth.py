"""`python -m benchmarks.gpu truth` sees what is wrong, and needs torch and triton alone."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import model.dropout
from benchmarks import compiled, op_cases, op_shapes
from benchmarks.fake_cuda import backward, fake_cuda
from benchmarks.gpu import compilation, dropout, equality, launched, sanitizer, truth
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.command import Failed, Late, Unavailable
from benchmarks.gpu.record import ROOT, read
from benchmarks.gpu.timing import Inputs, draw, tensors_of
from benchmarks.launch_counter import LaunchCounter
from model.dropout import Draw
from model.kernels.backend import BACKENDS
from model.kernels.ops import elementwise
from model.kernels.ops.route import Choice
from model.kernels.ops.sigma_moe import HeldExperts
from tests.benchmarks.gpu.cases import CASES, CPU, NAMES, context, on_the_path

SIGMA_MOE = partial(op_cases.sigma_moe_case, 37, 24, 4, 2, 16)


def test_every_backend_is_compared(tmp_path: Path) -> None:
    result = truth.equality(context(tmp_path), build=SIGMA_MOE, dtype="bf16")
    rows = {row["backend"]: row for row in result["backends"]}
    assert rows.keys() == set(BACKENDS["sigma_moe"])
    names = {"output 0", *(f"gradient of {name}" for name in ("x", "scores", "up", "down"))}
    assert all(row["errors"].keys() == names and not row["failed"] for row in rows.values())


def test_what_cannot_run_here_is_named(tmp_path: Path) -> None:
    result = truth.equality(context(tmp_path), build=partial(op_cases.route_case, 37, 24, 2, 5, 3), dtype="fp32")
    skipped = {row["backend"]: row["skipped"] for row in result["backends"] if "skipped" in row}
    assert list(skipped) == ["cuda"] and "cannot compute route on cpu" in skipped["cuda"]


@pytest.mark.parametrize("fault", ["wrong", "NaN", "wrong gradient", "other bits", "raises"])
def test_a_broken_kernel_is_seen(fault: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = op_cases.sigma_moe
    calls = 0

    def broken(x: Tensor, choice: Choice, experts: HeldExperts, *, backend: str, residual: None) -> Tensor:
        nonlocal calls
        calls += 1
        if backend != "triton":
            return right(x, choice, experts, backend=backend)
        if fault == "raises":
            raise RuntimeError("no such kernel")
        if fault == "wrong gradient":
            choice = choice._replace(scores=choice.scores.detach() + 0 * choice.scores)
        y = right(x, choice, experts, backend="reference")
        if fault == "other bits":
            return y + calls * 1e-6
        return y * {"wrong": 1.05, "NaN": torch.nan, "wrong gradient": 1.0}[fault]

    monkeypatch.setattr(op_cases, "sigma_moe", broken)
    with pytest.raises(Failed, match="triton") as caught:
        truth.equality(context(tmp_path), build=SIGMA_MOE, dtype="fp32")
    assert [row["backend"] for row in caught.value.result["backends"] if row.get("failed")] == ["triton"]
    if fault == "other bits":
        with pytest.raises(Failed, match="other bits") as caught:
            truth.repetition(context(tmp_path), build=SIGMA_MOE, dtype="fp32")
        assert caught.value.result["different"] == {"triton": 2}


def test_a_wrong_choice_is_seen() -> None:
    """Each of the three by itself: experts that are not the best, counted and sorted as they should be, too."""
    logits = torch.tensor([[[0.0, 2.0, 1.0]], [[3.0, 1.0, 2.0]]])
    index, load = torch.tensor([[[1, 2]], [[0, 2]]]), torch.tensor([[1, 1, 2]])
    order = torch.tensor([[2, 0, 1, 3]])
    op_cases.check_choice(logits, index, load, order)
    for wrong in (
        (torch.tensor([[[1, 0]], [[0, 2]]]), torch.tensor([[2, 1, 1]]), torch.tensor([[1, 2, 0, 3]])),
        (index, load + 1, order),
        (index, load, torch.tensor([[2, 0, 3, 1]])),  # of one expert the later slot first
    ):
        with pytest.raises(AssertionError):
            op_cases.check_choice(logits, *wrong)


def test_a_choice_is_checked_where_the_backend_makes_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refused(*tensors: Tensor) -> None:
        raise AssertionError("not the best experts")

    monkeypatch.setattr(op_cases, "check_choice", refused)
    with pytest.raises(Failed, match="not the best experts"):
        truth.equality(context(tmp_path), build=partial(op_cases.route_case, 37, 24, 2, 5, 3), dtype="fp32")


@pytest.mark.parametrize("build", CASES, ids=NAMES)
@pytest.mark.parametrize("chunk", [10, 37])
def test_the_reference_in_chunks_is_the_reference(build: op_cases.Build, chunk: int) -> None:
    """Against the whole at once, in fp64 on both sides."""
    drawn = draw(build, CPU, torch.float32, 0)
    exact = {n: t.detach().double().requires_grad_(n in drawn.case.leaves) if t.is_floating_point() else t
             for n, t in drawn.tensors.items()}  # fmt: skip
    inputs = Inputs(drawn.case, exact, [u.double() for u in drawn.upstream])
    whole, left = equality.results(inputs, "reference")
    found = equality.expected(inputs, left, chunk)
    assert found.keys() == whole.keys()
    for name, value in whole.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)


def test_an_op_without_a_case_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert set(truth.every_op_has_a_case(context(tmp_path))["ops"]) == set(BACKENDS)
    monkeypatch.setitem(BACKENDS, "hyper_moe", ("reference",))
    with pytest.raises(Failed, match=r"no case in benchmarks/op_cases\.py for hyper_moe"):
        truth.every_op_has_a_case(context(tmp_path))


class Launched(LaunchCounter):
    """Module and name of every Triton kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: set[tuple[str, str]] = set()

    def launched(self, kernel: Any, args: Any, kwargs: Any) -> None:
        self.kernels.add((kernel.fn.__module__, kernel.fn.__name__))


def test_every_triton_kernel_is_launched_by_some_part(tmp_path: Path) -> None:
    """On fake CUDA tensors, by the cases that `truth` compares in bf16 and its masks of dropout; no more models than
    reach them all."""
    compiled_kernels = {case.kernel.fn for case in compiled.cases(compiled.case_modules())}
    every = {(kernel.__module__, kernel.__name__) for kernel in compiled_kernels}
    # The masks of experts have no gradient: the part `dropout masks` draws them.
    masks = {("model.kernels.triton.dropout", "keep_mask_kernel")}
    with fake_cuda(), Launched() as counter:
        for model in (truth.ODD, *op_shapes.MODELS):
            if every - counter.kernels == masks:
                break
            for build in [*truth.cases_of(model, tiny=False), *truth.sums_of(model, tiny=False)]:
                with torch.device("cuda"):
                    case = build()
                for backend, why_not in equality.backends_on(case.op, "cuda", torch.bfloat16, case.widths).items():
                    if why_not is None and backend in equality.REPEATING and backend != "cuda":
                        outputs = case.compute(tensors_of(case, torch.bfloat16), backend)
                        backward(sum(y.double().sum() for y in outputs if y.requires_grad))  # type: ignore[arg-type]
    assert every - counter.kernels == masks


@pytest.mark.parametrize("backend", BACKENDS["elementwise"])
def test_masks_of_every_backend_are_compared(backend: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = elementwise.keep_mask

    def wrong(shape: tuple[int, ...], draw: Draw, *, backend: str) -> Tensor:
        mask = right(shape, draw, backend=backend)
        return mask ^ (torch.arange(mask.numel()).view(mask.shape) == 7) if backend == chosen else mask

    chosen = ""
    monkeypatch.setattr(elementwise, "keep_mask", wrong)
    assert dropout.masks(context(tmp_path))["shape"] == [2, 8, 24]
    chosen = backend
    with pytest.raises(Failed, match=rf"1 of 384 mask bits differ \({backend}, p 0.1\)"):
        dropout.masks(context(tmp_path))


@pytest.mark.slow  # what the tool says is read in test_what_the_sanitizer_says
def test_the_sanitizer_runs_a_case_and_hears_of_its_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """For real but the tool, which passes the command on."""
    script = 'shift 6; echo "========= RACECHECK SUMMARY: 0 hazards displayed"; exec "$@"'
    on_the_path(tmp_path, "compute-sanitizer", script, monkeypatch)
    number = [case.op for case in op_shapes.outlines(sanitizer.cases("tiny", tiny=True))].index("route")
    result = sanitizer.check(context(tmp_path), tool="racecheck", model="tiny", number=number)
    assert {"choose_kernel", "place_kernel", "gradients_kernel"} <= result["kernels"].keys()
    assert result["kernels"]["gradients_kernel"] == [8]
    assert result["said"] == ["========= RACECHECK SUMMARY: 0 hazards displayed"]
    seen, others = sanitizer.reached({"racecheck tiny route": result, "memcheck tiny route": {"kernels": {"x": [8]}}})
    assert "gradients_kernel" in seen and "value_backward_kernel" in others and "x" not in seen | others


OF_CUBLAS = "echo '========= Error: Race reported between Read access at nvjet_sm90_tss_192x128_h+0x9f0'"
"""What the tool says of kernels that are not ours; the child that named its own has not run here."""
SUMMARY = "echo '========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)'"
OTHER = "echo '====== at void own<float, 4>(const float *, int)+0x1'"


@pytest.mark.parametrize(
    "script, error, words",
    [
        ("echo '========= Error: Race reported between Write and Read'; exit 9", Failed, "racecheck found: .*Race"),
        (
            f"{OF_CUBLAS}; echo '=========     at void choose_kernel(int)+0x150'; exit 9",
            Failed,
            "found: .*choose_kernel",
        ),
        (f"{OF_CUBLAS}; {SUMMARY}; exit 9", Failed, "exit status 9"),
        (f"{OF_CUBLAS}; {SUMMARY}; {OTHER}; exit 9", Failed, "exit status 9"),
        (f"{OF_CUBLAS}; {OF_CUBLAS}; {SUMMARY}; exit 9", Failed, "racecheck counts 1 hazards, 2 were read"),
        (f"{OF_CUBLAS}; exit 9", Failed, "racecheck counts no hazards, 1 were read"),
        (
            f"{OF_CUBLAS}; echo '========= at void own<float, 4>(const float *)+0x1'; exit 9",
            Failed,
            "found: .*own<float",
        ),
        ("echo '========= Error: Device not supported'; exit 1", Unavailable, "Device not supported"),
        ("echo 'Segmentation fault' >&2; exit 139", Failed, "exit status 139: Segmentation fault"),
        ("exit 0", Failed, "exit status 0"),
    ],
)
def test_what_the_sanitizer_says(
    script: str, error: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    on_the_path(tmp_path, "compute-sanitizer", script, monkeypatch)
    with pytest.raises(error, match=words):
        sanitizer.check(context(tmp_path), tool="racecheck", model="tiny", number=0)


def test_how_the_sanitizer_is_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """So that its exit status says what it found, it says all of it, and torch's cache hides no access beyond a
    tensor."""
    script = f'echo "$@" > "{tmp_path}/line"; env > "{tmp_path}/variables"; echo "{sanitizer.LAUNCHED}{{}}"'
    on_the_path(tmp_path, "compute-sanitizer", script, monkeypatch)
    sanitizer.check(context(tmp_path), tool="memcheck", model="tiny", number=0)
    line = (tmp_path / "line").read_text()
    assert line.startswith("--tool memcheck --error-exitcode 9 --print-limit 1000 ")
    assert line.endswith("-m benchmarks.gpu.launched tiny 0 cpu\n")
    assert "PYTORCH_NO_CUDA_MEMORY_CACHING=1\n" in (tmp_path / "variables").read_text()


def test_a_tool_that_is_too_late_has_found_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    on_the_path(tmp_path, "compute-sanitizer", "sleep 600", monkeypatch)
    for remaining, words in ((1.2, "racecheck did not end in 1 s"), (0.5, "the time was over before it began")):
        with pytest.raises(Late, match=words):
            sanitizer.check(context(tmp_path, remaining=remaining), tool="racecheck", model="tiny", number=0)


@pytest.mark.parametrize("cores, most", [(8, 3), (4, 2), (1, 1)])
def test_cases_that_are_asked_for_run_at_the_same_time(
    cores: int, most: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each once, and each part has its own: what one fails of, another does not."""
    parts = [part for part in sanitizer.parts(tiny=True) if part.name.startswith("racecheck")]
    names = [part.name for part in parts]
    begun, running, together = list[int](), list[int](), list[int]()
    first, meeting = (1, 2, 4)[:most], threading.Barrier(most)

    def check(context: Any, *, tool: str, model: str, number: int) -> dict[str, Any]:
        assert (tool, model) == ("racecheck", "tiny")
        begun.append(number)
        running.append(number)
        if number in first:  # a busy machine may begin the last of them when another would have ended
            meeting.wait(60.0)
        time.sleep(0.2)  # for one too many
        together.append(len(running))
        running.remove(number)
        if number == 2:
            raise Failed("a race", {"number": number})
        return {"number": number}

    monkeypatch.setattr(sanitizer, "check", check)
    monkeypatch.setattr(sanitizer.os, "cpu_count", lambda: cores)
    asked = dataclasses.replace(context(tmp_path), asked=frozenset({"compile bf16", *(names[n] for n in (1, 2, 4))}))
    assert parts[1].compute(asked) == {"number": 1}
    with pytest.raises(Failed, match="a race"):
        parts[2].compute(asked)
    assert parts[4].compute(asked) == {"number": 4}
    assert sorted(begun) == [1, 2, 4] and max(together) == most
    assert parts[0].compute(asked) == {"number": 0} and len(begun) == 4  # nobody asked


def test_memcheck_excuses_no_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It reads and writes what an op gave it."""
    on_the_path(tmp_path, "compute-sanitizer", f"{OF_CUBLAS}; {SUMMARY}; echo '{sanitizer.LAUNCHED}{{}}'; exit 9",
                monkeypatch)  # fmt: skip
    assert sanitizer.check(context(tmp_path), tool="racecheck", model="tiny", number=0)["others"] == [
        "nvjet_sm90_tss_192x128_h"
    ]
    with pytest.raises(Failed, match=r"memcheck found: .*nvjet"):
        sanitizer.check(context(tmp_path), tool="memcheck", model="tiny", number=0)


def test_what_racecheck_reached_is_what_it_saw_in_8_warps() -> None:
    by_race = {"kernels": {"gradients_kernel": [4, 8], "value_backward_kernel": [4]}}
    by_memory = {"kernels": {"value_backward_kernel": [8]}}
    seen, others = sanitizer.reached({"racecheck a": by_race, "memcheck a": by_memory})
    assert seen == {"gradients_kernel"} and "value_backward_kernel" in others


def test_a_launch_that_names_no_warps_has_four(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    for kind in (JITFunction, InterpretedFunction):
        monkeypatch.setattr(kind, "run", lambda self, *args, **options: None)
    launches = launched.watch()
    kernel: Any = InterpretedFunction(test_a_wrong_choice_is_seen)
    kernel.run()
    assert launches == {"test_a_wrong_choice_is_seen": {4}}
    kernel.run(num_warps=8)
    assert launches == {"test_a_wrong_choice_is_seen": {4, 8}}


def test_a_kernel_that_does_not_compile_fails_the_part(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The others are compiled all the same."""

    class AtOnce:
        def __init__(self, processes: int, mp_context: Any) -> None:
            self.shutdown = lambda **_: None

        def submit(self, function: Any, number: int, *arguments: Any) -> Future[float]:
            future: Future[float] = Future()
            future.set_exception(RuntimeError("it spills")) if number == 1 else future.set_result(0.5)
            return future

    monkeypatch.setattr(compilation, "ProcessPoolExecutor", AtOnce)
    with pytest.raises(Failed, match=r"sigma_moe .* bf16: RuntimeError: it spills") as failure:
        compilation.compile_all(context(tmp_path), dtype="bf16")
    result = failure.value.result
    assert len(result["errors"]) == 1 and len(result["seconds"]) == len(CASES) - 1 and not result["not_in_time"]


@pytest.mark.parametrize("what", ["keep_mask", "dropout"])
def test_torchs_own_masks_and_what_is_dropped_are_compared(
    what: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The second of two calls, which is the device's, is off by one number."""
    module: Any = model.dropout if what == "keep_mask" else elementwise
    right, calls = getattr(module, what), []

    def second_is_wrong(*arguments: Any, **settings: Any) -> Tensor:
        found: Tensor = right(*arguments, **settings)
        calls.append(found)
        if len(calls) == 2:
            found = found.clone()
            found[0, 0, 0] = ~found[0, 0, 0] if found.dtype == torch.bool else found[0, 0, 0] + 1.0
        return found

    monkeypatch.setattr(module, what, second_is_wrong)
    monkeypatch.setattr(dropout, "backends_on", lambda *_: {})  # which draw masks of their own
    with pytest.raises((Failed, AssertionError), match=r"torch's operators|not close"):
        dropout.masks(context(tmp_path))


ABSENT = ("pydantic", "deepspeed", "megatron", "numpy", "sentencepiece", "webdataset", "pretrain", "data_prep")
"""numpy too: torch does without, and of Triton only the interpreter needs it."""


def blocked(code: str) -> str:
    """Output of `code` in a process that has torch and triton alone."""
    line = [sys.executable, "-W", "ignore", "-c", f"import sys\nsys.modules.update(dict.fromkeys({ABSENT}))\n{code}"]
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(line, cwd=ROOT, env=variables, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_torch_and_triton_are_enough() -> None:
    """Every part is listed, every case built, one computed by the reference, and dropout compared."""
    output = blocked("""
import pathlib, torch
from benchmarks.gpu import kernels, launched, sanitizer, speed, truth
from benchmarks.gpu.command import Context
from benchmarks.gpu.equality import check
from benchmarks.gpu.timing import draw
from benchmarks.op_cases import sigma_moe_case
from functools import partial
cpu = torch.device("cpu")
parts = {part.name: part for part in truth.parts(tiny=False)}
row, _ = check(draw(partial(sigma_moe_case, 37, 24, 4, 2, 16), cpu, torch.float32, 0), torch.float32, "reference", None)
here = Context(device=cpu, tiny=True, results=pathlib.Path("."), remaining=lambda: 1e3)
here.measured.update({"ceiling copy": {"bytes_per_second": 1e9}, "ceiling product": {"flops_per_second": 1e12}})
timed = kernels.compute(here, build=partial(sigma_moe_case, 37, 24, 4, 2, 16))
assert {row["backend"] for row in timed["backends"] if "forward" in row} >= {"cpu", "F.grouped_mm, sorted rows"}
try:
    {part.name: part for part in speed.parts(tiny=False)}["micro-step 1b 8"].compute(here)
except Exception as error:
    print(type(error).__name__, str(error).split(":")[0])
print(len(parts), row["failed"], parts["dropout masks"].compute(here)["shape"], "model.config" in sys.modules)
import model.kernels.triton.sigma_moe, model.kernels.triton.switchhead_value, model.kernels.triton.route
""")
    refused, last = output.splitlines()
    assert refused == "Unavailable pydantic is not installed"
    number, rest = last.split(maxsplit=1)
    assert int(number) > 100 and rest == "False [2, 8, 24] False"


@pytest.mark.slow
def test_every_part_on_the_cpu(tmp_path: Path) -> None:
    words = ["truth", "--device", "cpu", "--tiny", "--results", str(tmp_path), "--seconds", "3000"]
    assert main(words) == 0
    entries = {entry.part: entry.status for entry in read(tmp_path / "cpu" / "truth.jsonl")}
    assert {status for part, status in entries.items() if "check" not in part} == {"passed"}
    assert len(entries) == len(list(truth.parts(tiny=True)))
