"""benchmarks/gpu/attention.py: torch's fused attention beside fp64, and the FLOPs of its causal half."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.gpu import attention
from benchmarks.gpu.command import Failed, Unavailable
from benchmarks.gpu.timing import HostClock, Work
from tests.benchmarks.gpu.cases import MEASURED, context


def test_what_is_expected_is_a_loop_over_queries() -> None:
    """Values by the formula, one query at a time over the keys up to its own; gradients by differences."""
    torch.manual_seed(0)
    tensors = [torch.randn(2, 1, 3, 4, dtype=torch.float64) for _ in range(4)]
    found = attention.exactly(tensors)

    def value(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = []
        for b in range(2):
            for i in range(3):
                weights = torch.tensor([float(q[b, 0, i] @ k[b, 0, j]) / 2.0 for j in range(i + 1)]).double().exp()
                rows.append(sum(w * v[b, 0, j] for j, w in enumerate(weights / weights.sum())))
        return torch.stack(rows).view(2, 1, 3, 4)

    torch.testing.assert_close(found["output"], value(*tensors[:3]), rtol=1e-6, atol=1e-6)
    for number, name in enumerate("qkv"):
        step = torch.zeros_like(tensors[0])
        step[1, 0, 1, 2] = 1e-3
        both = (value(*(t + sign * step * (n == number) for n, t in enumerate(tensors[:3]))) for sign in (1, -1))
        slope = ((next(both) - next(both)) * tensors[3]).sum() / 2e-3
        assert float(found[f"gradient of {name}"][1, 0, 1, 2]) == pytest.approx(float(slope), rel=1e-2, abs=1e-4)


@pytest.mark.parametrize("fault", ["", "scaled", "one row", "NaN", "wrong gradient", "refused"])
def test_a_wrong_backend_is_seen(fault: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = attention.attended

    def broken(tensors: list[Tensor], backend: Any) -> dict[str, Tensor]:
        if backend is not attention.BACKENDS["math"] or fault == "refused":
            raise RuntimeError("no such kernel\nhere")
        found = right(tensors, backend)
        rows = torch.arange(16)[:, None]
        if fault == "wrong gradient":
            found["gradient of k"] = found["gradient of k"] * 1.03
        elif fault:
            one, nan = torch.ones(16, 1), torch.where(rows == 3, torch.nan, 1.0)
            found["output"] = found["output"] * {"scaled": 1.03 * one, "one row": (rows != 15) * one, "NaN": nan}[fault]
        return found

    monkeypatch.setattr(attention, "attended", broken)
    if fault == "refused":
        with pytest.raises(Unavailable, match="no backend of attention takes this shape"):
            attention.equality(context(tmp_path), model="1b", dtype="bf16")
    elif fault:
        with pytest.raises(Failed, match="math differs by nan" if fault == "NaN" else "math differs by"):
            attention.equality(context(tmp_path), model="1b", dtype="bf16")
    else:
        rows = attention.equality(context(tmp_path), model="1b", dtype="bf16")["backends"]
        assert [row.get("skipped") for row in rows] == [*["no such kernel"] * 3, None]
        assert 0 < rows[-1]["error"] < rows[-1]["worst_row"] < 0.1 and not rows[-1]["failed"]


class OneMillisecond(HostClock):
    def timed(self, replay: Work) -> Callable[[], float]:
        replay()
        return lambda: 1.0


def test_flops_are_those_of_the_causal_half(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """q k^T and its product with v: of T (T + 1) / 2 pairs 2 h FLOPs in each, here counted as T T / 2. Backward five
    such products."""
    monkeypatch.setattr(attention, "clock_of", lambda device: OneMillisecond())
    monkeypatch.setattr(attention, "TINY", attention.Shape(2, 2, 64, 8))
    measured = MEASURED | {"ceiling product": {"flops_per_second": 1e9}}
    found = attention.timing(context(tmp_path, **measured), model="1b")
    pairs = 2 * 2 * 64 * 64 / 2
    assert found["flops"] == 2 * 2 * 8 * pairs
    (math,) = (row for row in found["backends"] if row["backend"] == "math")
    for phase, products in (("forward", 2), ("backward", 5)):
        assert math[phase]["of_ceiling"] == pytest.approx(products * 2 * 8 * pairs / 1e-3 / 1e9, rel=1e-3)
