"""Which backend is chosen, what is refused and why, and that the choice is logged once."""

from __future__ import annotations

import importlib.util
import inspect
import logging
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from model.kernels import backend
from model.kernels.dtypes import cpu_gemm_dtype, multiplies_bf16
from model.kernels.ops.sigma_moe import FUSES_ADDITION


@pytest.fixture(autouse=True)
def _ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice is tested on ops that have and that lack each backend, whatever the real ones have."""
    ops = {
        "route": ("reference", "cpu"),
        "sigma_moe": ("reference", "cpu", "grouped_mm"),
        "linear_cross_entropy": ("reference", "cpu", "triton"),
        "expert_linear": ("reference", "cpu", "grouped_mm", "triton"),
    }
    monkeypatch.setattr(backend, "BACKENDS", ops)
    for cached in (backend._log_choice, backend._warn_slower):
        cached.cache_clear()


@pytest.mark.parametrize(
    "requested, op, device, expected",
    [
        ("auto", "sigma_moe", "cpu", "cpu"),
        ("auto", "sigma_moe", "cuda", "grouped_mm"),
        ("auto", "sigma_moe", "meta", "reference"),
        ("auto", "route", "cpu", "cpu"),
        ("auto", "route", "cuda", "reference"),
        ("auto", "linear_cross_entropy", "cpu", "cpu"),
        ("auto", "linear_cross_entropy", "cuda", "triton"),
        ("auto", "linear_cross_entropy", "meta", "reference"),
        ("auto", "expert_linear", "cuda", "triton"),
        ("triton", "expert_linear", "cpu", "triton"),  # interpreted: conftest sets TRITON_INTERPRET
        ("reference", "sigma_moe", "cuda", "reference"),
        ("grouped_mm", "sigma_moe", "cpu", "grouped_mm"),
    ],
)
def test_choice(requested: str, op: str, device: str, expected: str) -> None:
    assert backend.resolve(requested, op, device) == expected


@pytest.mark.parametrize(
    "requested, op, device, message",
    [
        ("cpu", "sigma_moe", "cuda", "runs on CPU tensors only. Possible: auto, reference, grouped_mm"),
        ("grouped_mm", "route", "cpu", "route has no such backend. Possible: auto, reference, cpu"),
        ("triton", "sigma_moe", "cuda", "sigma_moe has no such backend. Possible: auto, reference, grouped_mm"),
        ("grouped_mm", "sigma_moe", "mps", "F.grouped_mm has no mps kernel"),
        ("triton", "expert_linear", "mps", "Triton has no mps kernels here"),
        ("auto", "dense", "cpu", "no op 'dense'"),
    ],
)
def test_impossible_choice_says_why(requested: str, op: str, device: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        backend.resolve(requested, op, device)
    assert message in str(caught.value)


def test_grouped_mm_falls_back_only_where_auto_asked() -> None:
    """412, the paper's d_model, is no multiple of 8: auto takes another backend, the user's own choice is refused."""
    assert backend.resolve("auto", "sigma_moe", "cuda", dtype=torch.bfloat16, widths=(412, 128)) == "reference"
    with pytest.raises(ValueError, match="412 is no multiple of 8"):
        backend.resolve("grouped_mm", "sigma_moe", "cpu", dtype=torch.bfloat16, widths=(412, 128))
    with pytest.raises(ValueError, match=r"takes bfloat16 on CUDA, not torch\.float32"):
        backend.resolve("grouped_mm", "sigma_moe", "cuda", dtype=torch.float32, widths=(512, 128))


def test_triton_on_the_cpu_only_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="with TRITON_INTERPRET=1 set before the start"):
        backend.resolve("triton", "expert_linear", "cpu")
    assert backend.resolve("triton", "expert_linear", "cuda") == "triton"


def test_models_work_without_triton() -> None:
    """In a process where importing triton fails: everything else imports and computes."""
    code = """
import sys
sys.modules["triton"] = None
import torch
from model.kernels.backend import BACKENDS, resolve
from model.kernels.ops.route import route
import model.language_model
assert {resolve("auto", op, "cpu") for op in BACKENDS} == {"cpu", "reference"}
assert route(torch.ones(3, 4), torch.ones(1, 4, 4), 2, backend="cpu").load.tolist() == [[3, 3, 0, 0]]
try:
    resolve("triton", "route", "cuda")
except ValueError as error:
    assert "triton is not installed" in str(error)
else:
    raise AssertionError("chosen without being there")
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_auto_on_cuda_warns_where_it_is_not_triton(
    monkeypatch: pytest.MonkeyPatch, logged: list[logging.LogRecord]
) -> None:
    assert backend.resolve("auto", "expert_linear", "cuda", dtype=torch.float64) == "reference"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert backend.resolve("auto", "linear_cross_entropy", "cuda", dtype=torch.bfloat16) == "reference"
    with pytest.raises(ValueError, match="triton is not installed"):
        backend.resolve("triton", "linear_cross_entropy", "cuda")
    warnings = [record.getMessage() for record in logged if record.levelno == logging.WARNING]
    assert len(warnings) == 2
    assert "expert_linear takes backend reference, which is slower than triton: the Triton kernels take" in warnings[0]
    assert "linear_cross_entropy takes backend reference, which is slower than triton: triton is not" in warnings[1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("d", [2, 4, 6, 8, 12, 16])
def test_grouped_mm_limit_is_that_of_torch(d: int, dtype: torch.dtype) -> None:
    """Asks F.grouped_mm itself on CPU: what we allow works, what we refuse fails."""
    x, weight, offsets = torch.ones(5, d, dtype=dtype), torch.ones(2, d, 16, dtype=dtype), torch.tensor([2, 5])
    if backend.grouped_mm_limit("cpu", dtype, (d, 16)) is None:
        assert F.grouped_mm(x, weight, offs=offsets.int()).shape == (5, 16)
    else:
        with pytest.raises(RuntimeError):
            F.grouped_mm(x, weight, offs=offsets.int())


def test_logged_once(logged: list[logging.LogRecord]) -> None:
    for requested in ("auto", "cpu", "auto", "reference"):
        backend.resolve(requested, "sigma_moe", "cpu")
    backend.resolve("auto", "route", "cpu")
    assert [record.getMessage() for record in logged] == [
        "kernels: sigma_moe is computed by backend cpu",
        "kernels: sigma_moe is computed by backend reference",
        "kernels: route is computed by backend cpu",
    ]


def test_half_precision_is_widened_where_the_cpu_cannot_multiply_it() -> None:
    """And with them where many products are added up in one buffer."""
    assert cpu_gemm_dtype(torch.float64) == torch.float64
    assert cpu_gemm_dtype(torch.float16) == torch.float32
    expected = torch.bfloat16 if multiplies_bf16() else torch.float32
    assert cpu_gemm_dtype(torch.bfloat16) == expected
    assert cpu_gemm_dtype(torch.bfloat16, accumulates=True) == torch.float32


def test_every_module_of_the_table_computes_its_op() -> None:
    """The table names files: all of them exist and have the same functions for every backend of an op."""
    for op, modules in backend.IMPLEMENTATIONS.items():
        wanted = {"forward", "sum_forward"} if op == "expert_linear" else {"forward"}
        if op == "elementwise":  # several small ops
            for name in ("dropout", "keep_mask", "layer_norm"):  # plain rotation and entropy stand elsewhere
                functions = [getattr(backend.implementation(op, other), name) for other in modules]
                assert len({str(list(inspect.signature(f).parameters)) for f in functions}) == 1, name
            continue
        if op != "linear_cross_entropy":  # its gradients are computed in the forward pass
            wanted |= {name.replace("forward", "backward") for name in wanted}
        for name in modules:
            module = backend.implementation(op, name)
            assert {n for n in ("forward", "backward", "sum_forward", "sum_backward") if hasattr(module, n)} == wanted
            for function in wanted:
                parameters = [
                    list(inspect.signature(getattr(backend.implementation(op, other), function)).parameters)
                    for other in modules
                ]
                adding = [other in backend.ADDING.get(op, ()) and function == "backward" for other in modules]
                assert [names[-1] == "total" for names in parameters] == adding, (op, function)
                fusing = [op == "sigma_moe" and function == "forward" and b in FUSES_ADDITION for b in modules]
                assert [names[-1] == "residual" for names in parameters] == fusing, (op, function)
                names = [[n for n in found if n not in ("total", "residual")] for found in parameters]
                assert all(found == names[0] for found in names), (op, function)


def test_attention_in_fp32_is_left_to_torch_on_cuda() -> None:
    """Of narrow heads too; the interpreter takes them."""
    said = backend.attention_limit("cuda", torch.float32, (64,))
    assert said == "its Triton kernels take bfloat16 and float16 on CUDA, not torch.float32"
    assert (
        backend.attention_limit("cpu", torch.float32, (64,))
        is None
        is backend.attention_limit("cuda", torch.bfloat16, (64,))
    )
