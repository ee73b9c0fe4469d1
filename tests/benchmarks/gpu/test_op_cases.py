"""benchmarks/op_cases.py: what a case asks beside values and gradients, and what it computes by itself."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from benchmarks import op_cases
from benchmarks.gpu import equality
from benchmarks.gpu.timing import draw
from tests.benchmarks.gpu.cases import CPU


def test_some_targets_are_ignored() -> None:
    """And they alone, wherever chunks of tokens begin."""
    case = op_cases.loss_case(37, 8, 50)
    targets = case.constants["targets"]
    assert set(targets[targets < 0].tolist()) == {-100} and 4 <= int((targets < 0).sum()) <= 8
    assert case.share is not None and case.share({"targets": targets}) == (targets >= 0).sum()


@pytest.mark.parametrize("off", [0.0, 1e-5])
def test_the_sums_of_probabilities_are_checked(off: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """They have no gradient and are no output: nothing else would see them."""
    right = op_cases.entropy

    def wrong(logits: Tensor, probability: Tensor, weight: float, *, backend: str) -> tuple[Tensor, Tensor]:
        value, sums = right(logits, probability, weight, backend=backend)
        return value, sums * (1.0 + off)

    monkeypatch.setattr(op_cases, "entropy", wrong)
    inputs = draw(partial(op_cases.entropy_case, 37, 5), CPU, torch.float32, 0)
    if off == 0.0:
        equality.results(inputs, "cpu")
    else:
        with pytest.raises(AssertionError):
            equality.results(inputs, "cpu")


def test_the_reference_scores_the_experts_that_a_backend_chose() -> None:
    """Whichever they are: near ties are chosen by rounding."""
    inputs = draw(partial(op_cases.route_case, 9, 6, 2, 5, 3), CPU, torch.float32, 0)
    t, index = dict(inputs.tensors), torch.rand(9, 2, 5).topk(3).indices
    wanted = torch.einsum("nd,red->nre", t["x"], t["weight"]).sigmoid().gather(-1, index)
    _, scores = inputs.case.compute(t | {"index": index}, "reference")
    torch.testing.assert_close(scores, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["", "joint", "memory", "documents"])
def test_rotation_is_a_product_of_complex_numbers(kind: str) -> None:
    """Of the pairs (i, i + half) of a head, by the angle of its token; what is behind them stays."""
    B, T, H, h, half = 2, 7, 3, 8, 3
    t = (case := op_cases.rotate_case(B, T, H, h, half, kind)).leaves | case.constants
    q, k = t["joint"].split(H, 2) if kind == "joint" else (t["q"], t["k"])
    for x, found in zip((q, k), case.compute(t, "reference"), strict=True):
        angle = torch.complex(t["cos"], t["sin"]).to(torch.complex128)
        angle = angle[..., angle.shape[-3] - x.shape[1] :, :, :]
        pairs = torch.complex(x[..., :half], x[..., half : 2 * half]) * angle
        wanted = torch.cat([pairs.real, pairs.imag, x[..., 2 * half :]], -1)
        torch.testing.assert_close(found, wanted)
