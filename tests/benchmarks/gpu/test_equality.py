"""benchmarks/gpu/equality.py: how far a backend may be off, and what no tolerance excuses.

The op here is a product whose backends are wrong by as much as they are told, so that a limit is met from both sides.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.gpu import equality, truth
from benchmarks.gpu.command import Failed
from benchmarks.gpu.timing import Inputs, draw
from benchmarks.op_cases import Case
from benchmarks.op_shapes import MODELS, equality_cases, outlines
from model.kernels.backend import BACKENDS
from tests.benchmarks.gpu.cases import CPU, context

LIMITS = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""What rounding leaves of an op whose result is one of fp64 on the same inputs; a wrong sum is off by far more."""
NEAR_TIES = 2e-3


class Product:
    """y = x W, of N = 37 tokens. A backend's y, not its gradients, is off by `off` of it, and what `changed` makes of
    it; the reference is right in fp64."""

    def __init__(self, off: dict[str, float] | None = None, scale: float = 1.0, op: str = "expert_linear") -> None:
        self.off, self.scale, self.op, self.calls = off or {}, scale, op, 0

    def __call__(self) -> Case:
        leaves = {"x": torch.randn(37, 8, dtype=torch.float64) * self.scale}
        leaves["w"] = torch.randn(8, 5, dtype=torch.float64)
        return Case(self.op, "N=37", leaves, {}, self.compute, ("x",))

    def compute(self, t: dict[str, Tensor], backend: str) -> tuple[Tensor, ...]:
        self.calls += 1
        y = t["x"].double() @ t["w"].double()
        if t["x"].dtype != torch.float64:
            y = self.changed(y + self.off.get(backend, 0.0) * y.detach(), backend)
        return (y,)

    def changed(self, y: Tensor, backend: str) -> Tensor:
        return y

    def drawn(self, dtype: torch.dtype) -> Inputs:
        return draw(self, CPU, dtype, 0)


def fails(product: Product, dtype: torch.dtype, backend: str, reference: dict[str, float] | None = None) -> bool:
    row, _ = equality.check(product.drawn(dtype), dtype, backend, None, reference)
    return bool(row["failed"])


EXACT = {"output 0": 0.0, "gradient of x": 0.0, "gradient of w": 0.0}


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_the_limit_of_a_dtype(backend: str, dtype: torch.dtype) -> None:
    reference = None if backend == "reference" else EXACT
    for share in (0.9, 1.1):
        assert fails(Product({backend: share * LIMITS[dtype]}), dtype, backend, reference) is (share > 1)


@pytest.mark.parametrize("op, dtype, limit", [
    ("sigma_moe", torch.float32, NEAR_TIES), ("expert_linear", torch.float32, LIMITS[torch.float32]),
    ("sigma_moe", torch.bfloat16, LIMITS[torch.bfloat16]),
])  # fmt: skip
def test_near_ties_excuse_the_reference_of_one_op(op: str, dtype: torch.dtype, limit: float) -> None:
    for share in (0.9, 1.1):
        assert fails(Product({"reference": share * limit}, op=op), dtype, "reference") is (share > 1)
        exact = fails(Product({"triton": share * limit}, op=op), dtype, "triton", EXACT)
        assert exact is (share > 1 or limit == NEAR_TIES)  # beside a reference that is exact nobody is excused


def test_others_may_be_off_as_far_as_the_reference_and_no_further() -> None:
    off = EXACT | {"output 0": 0.1}
    assert not fails(Product({"triton": 0.104}), torch.float32, "triton", off)
    assert fails(Product({"triton": 0.106}), torch.float32, "triton", off)


class SlopesToo(Product):
    """Gradients are off by 0.01."""

    def changed(self, y: Tensor, backend: str) -> Tensor:
        return y + 0.01 * (y - y.detach())


def test_the_tensor_that_is_named_is_nearest_to_its_own_limit() -> None:
    inputs, off = SlopesToo({"triton": 0.05}).drawn(torch.float32), EXACT | {"output 0": 1.0}
    row, _ = equality.check(inputs, torch.float32, "triton", None, off)
    assert row["failed"] and row["worst"].startswith("gradient of ") and row["errors"]["output 0"] > 0.04
    assert row["error"] == row["errors"][row["worst"]] == pytest.approx(0.01, rel=1e-3)


class OneNaN(Product):
    def changed(self, y: Tensor, backend: str) -> Tensor:
        return y.where(torch.arange(len(y), device=y.device)[:, None] != 7, torch.nan)


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_a_nan_fails_whoever_gives_it(backend: str) -> None:
    """Also in a backend that promises no bits."""
    row, _ = equality.check(OneNaN().drawn(torch.bfloat16), torch.bfloat16, backend, None, EXACT)
    assert row["failed"] and row["worst"] == "output 0"
    assert math.isnan(row["error"]) and math.isnan(row["worst_row"])


def test_nothing_is_further_off_than_a_nan() -> None:
    """Wherever it stands: `max` keeps what it has before one."""
    for found in ({"a": 1.0, "b": math.nan, "c": 2.0}, {"b": math.nan, "a": 1.0}, {"a": 1.0, "b": math.nan}):
        assert equality.furthest(found) == equality.furthest(found, dict.fromkeys(found, 0.5)) == "b"
    assert equality.furthest({"a": 1.0, "b": 2.0}) == "b"
    assert equality.furthest({"a": 1.0, "b": 2.0}, {"a": 1.0, "b": 4.0}) == "a"


@pytest.mark.parametrize("scale", [0.0, 1e-5])
def test_where_nothing_or_little_is_expected(scale: float) -> None:
    """Of zeros the difference itself counts, of small numbers its share of them."""

    class More(Product):
        def changed(self, y: Tensor, backend: str) -> Tensor:
            return y + (1e-4 if scale == 0.0 else 0.01 * y.detach())

    assert fails(More(scale=scale), torch.float32, "triton", EXACT)
    assert not fails(Product(scale=scale), torch.float32, "triton", EXACT)


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("what", ["one row", "one number", "the last tokens"])
def test_a_row_that_is_wrong_among_thousands_fails(what: str, dtype: torch.dtype) -> None:
    """As by a mask that ends too early: of 16,384 rows one is 8e-3 of the norm, less than bf16 may be off."""

    class Cut(Product):
        def __call__(self) -> Case:
            case = super().__call__()
            return case._replace(leaves=case.leaves | {"x": torch.randn(16384, 8, dtype=torch.float64)})

        def changed(self, y: Tensor, backend: str) -> Tensor:
            rows = torch.arange(len(y), device=y.device)[:, None]
            right = {"one row": rows != 77, "the last tokens": rows < 16382}
            right["one number"] = y.abs() < y.abs().amax()
            return y - (~right[what] * y).detach()

    row, _ = equality.check(Cut().drawn(dtype), dtype, "triton", None, EXACT)
    assert row["failed"] and set(row["wrong_rows"]) == {"output 0"}
    assert dtype != torch.bfloat16 or row["error"] <= LIMITS[dtype]
    said = truth._said(row)
    assert "of output 0 a row by " in said and said.startswith("triton: output 0 differs by")


def test_how_far_a_row_may_be_off() -> None:
    """Ten times as far as the whole; of σ-MoE three tenths at least. A row much smaller than the others is measured by
    them, one much larger by itself."""
    assert equality.row_limit("route", 2e-2) == pytest.approx(0.2)
    assert [equality.row_limit("sigma_moe", limit) for limit in (2e-5, 0.05)] == [0.3, 0.5]
    wanted = torch.ones(100, 4)
    wanted[0], wanted[1] = 1e-6, 100.0
    rms = float(wanted.square().mean().sqrt()) * 2.0
    off = torch.zeros(100, 4)
    off[0] = 0.01
    (found,) = equality.row_errors({"y": wanted + off}, {"y": wanted.double()}).values()
    assert found == pytest.approx(0.02 / rms, rel=1e-4)
    off[1] = 1.0
    (found,) = equality.row_errors({"y": wanted + off}, {"y": wanted.double()}).values()
    assert found == pytest.approx(0.01, rel=1e-4)
    of_vectors = {"y": torch.tensor([1.0, 2.0, 3.0, 4.4])}, {"y": torch.tensor([1.0, 2.0, 3.0, 4.0]).double()}
    assert equality.row_errors(*of_vectors)["y"] == pytest.approx(0.1, rel=1e-4)
    for shape in ((), (0, 3), (2, 2, 3)):
        same = {"y": torch.ones(shape)}
        assert equality.row_errors(same, {"y": torch.ones(shape).double()}) == {"y": 0.0}
    nothing = {"y": torch.full((3, 2), 0.5)}, {"y": torch.zeros(3, 2).double()}
    assert equality.row_errors(*nothing)["y"] == pytest.approx(0.5**0.5)


class Flickering(Product):
    """The last bit of one number differs from call to call."""

    def changed(self, y: Tensor, backend: str) -> Tensor:
        return y + 1e-12 * self.calls


@pytest.mark.parametrize("backend", ["reference", "cpu", "grouped_mm", *equality.REPEATING])
def test_who_promises_the_same_bits_must_give_them(backend: str) -> None:
    row, _ = equality.check(Flickering().drawn(torch.float32), torch.float32, backend, None, EXACT)
    assert not row["repeats"] and row["failed"] is (backend in ("triton", "cuda", "dense", "sets"))


class Choosing(Product):
    """y of every token is one of the columns of x W: which one, each backend chooses."""

    def __call__(self) -> Case:
        return super().__call__()._replace(per_token=("x", "index"))

    def compute(self, t: dict[str, Tensor], backend: str) -> tuple[Tensor, ...]:
        if not (backend == "reference" and "index" in t):
            t["index"] = torch.full((37, 1), {"cpu": 1, "triton": 2}.get(backend, 0))
        return (t["x"] @ t["w"]).gather(1, t["index"]), t["x"] * 2


def test_a_backend_that_chooses_is_compared_at_its_own_choice() -> None:
    inputs, wanted = Choosing().drawn(torch.float32), None
    for backend in ("reference", "cpu", "triton"):
        row, wanted = equality.check(inputs, torch.float32, backend, wanted, EXACT | {"output 1": 0.0})
        assert not row["failed"], backend


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_what_is_expected_is_fp64(dtype: torch.dtype) -> None:
    """Of the ops' own references too, which round to the dtype of what they are given."""
    for build in equality_cases(small=True)[1:4]:
        inputs = draw(build, CPU, dtype, 0)
        left = equality.results(inputs, "reference")[1]
        assert {t.dtype for t in equality.expected(inputs, left).values()} == {torch.float64}


def test_all_kernels_of_ours_are_compiled_and_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the part `compile` and under compute-sanitizer: those of `sets` too, which no other backend launches."""
    ran: list[str] = []
    monkeypatch.setattr(equality, "results", lambda inputs, backend: ran.append(backend))
    for build in equality_cases(small=True):
        equality.results_by_triton(draw(build, CPU, torch.bfloat16, 0), torch.bfloat16)
    assert ran.count("triton") == len(equality_cases(small=True)) and ran.count("sets") == 4


# ---------------------------------------------------------------------------------------------------------- the parts


def test_backends_that_are_equally_wrong_all_fail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """None is excused by the one before it."""
    monkeypatch.setattr(truth, "backends_on", lambda *_: dict.fromkeys(("reference", "cpu", "dense", "triton")))
    product = Product(dict.fromkeys(("cpu", "dense", "triton"), 0.05))
    with pytest.raises(Failed) as failure:
        truth.equality(context(tmp_path), build=product, dtype="bf16")
    assert [row["backend"] for row in failure.value.result["backends"] if row["failed"]] == ["cpu", "dense", "triton"]


def test_the_last_of_fifty_repetitions_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of each backend that promises the same bits and runs here."""

    class Last(Product):
        def changed(self, y: Tensor, backend: str) -> Tensor:
            return y + (self.calls == 101)  # before it the shapes on the meta device, 50 of Triton's and 49 of its own

    usable = {"reference": None, "cpu": None, "triton": None, "cuda": "not here", "dense": None}
    monkeypatch.setattr(truth, "backends_on", lambda *_: usable)
    product = Last()
    with pytest.raises(Failed, match="other bits") as failure:
        truth.repetition(context(tmp_path, tiny=False), build=product, dtype="bf16")
    assert failure.value.result["different"] == {"triton": 0, "dense": 1} and product.calls == 101


def test_what_is_compared_and_what_is_repeated() -> None:
    """Every op in every dtype, at shapes of both models and at those that no tile divides; all in bf16 again and again;
    and what a block joins to an op."""
    parts = {part.name: part.compute for part in truth.parts(tiny=False)}
    odd = {f"{case.op} {case.shape}" for case in outlines(equality_cases(small=False))}
    found: dict[str, set[str]] = {}
    for name, compute in parts.items():
        if name.startswith(("equal ", "repeat ")):
            what, model, dtype, case = name.split(" ", 3)
            assert isinstance(compute, functools.partial) and compute.keywords["dtype"] == dtype
            assert compute.func is {"equal": truth.equality, "repeat": truth.repetition}[what]
            found.setdefault(f"{what} {model} {dtype}", set()).add(case)
    for dtype in equality.DTYPES:
        assert found[f"equal odd {dtype}"] == odd
        of_models = [found[f"equal {model} {dtype}"] for model in MODELS]
        assert {case.split()[0] for cases in of_models for case in cases} == BACKENDS.keys()
        assert not odd & set().union(*of_models) or dtype != "fp16"
    assert all(found[f"repeat {model} bf16"] <= found[f"equal {model} bf16"] for model in MODELS)
    assert {case.split()[0] for model in MODELS for case in found[f"repeat {model} bf16"]} == BACKENDS.keys()
    for dtype in ("bf16", "fp32"):
        joined = {case for case in found[f"equal {MODELS[0]} {dtype}"] if case.endswith(("handing on", "residual"))}
        assert {case.split()[0] for case in joined} == {"route", "switchhead_value", "sigma_moe"}
