"""The sum of squares behind the gradient norm, against numpy's in fp64."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pretrain.engine.gradient_norm import ROW, deepspeed_norm, sum_of_squares

SHAPES = [(3,), (ROW,), (ROW + 1,), (8000, 128), (7, 11, 513), (2, ROW * 3), ()]


def tensors(dtype: torch.dtype) -> list[torch.Tensor]:
    """Of skewed values, as gradients are: few are large."""
    generator = torch.Generator().manual_seed(3)
    made = [torch.randn(shape, generator=generator).pow(3) * 10.0**-number for number, shape in enumerate(SHAPES)]
    made.append(torch.randn(600, 700, generator=generator).T)  # not contiguous
    made.append(torch.empty(0))
    return [tensor.to(dtype) for tensor in made]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_tensor_counts(dtype: torch.dtype) -> None:
    made = tensors(dtype)
    for chosen in [made, *([tensor] for tensor in made if tensor.numel())]:
        expected = sum(np.square(tensor.double().numpy()).sum() for tensor in chosen)
        found = sum_of_squares(chosen)
        assert found.dtype == torch.float64 and found.shape == ()
        assert float(found) == pytest.approx(expected, rel=2e-7)


def test_torch_s_own_norm_would_not_do() -> None:
    embedding = torch.randn(8000, 512, generator=torch.Generator().manual_seed(0))
    expected = np.square(embedding.double().numpy()).sum()
    assert abs(float(torch.linalg.vector_norm(embedding)) ** 2 / expected - 1) > 1e-5
    assert float(sum_of_squares([embedding])) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e25])
def test_one_value_that_is_not_finite_or_cannot_be_squared_shows(value: float) -> None:
    for place in (0, 5000):
        made = [torch.ones(3), torch.ones(9000)]
        made[1][place] = value
        assert not torch.isfinite(sum_of_squares(made))


@pytest.mark.parametrize("norm", [torch.tensor(2.0), 2.0])
def test_the_norm_is_on_the_device_of_the_sums_wherever_deepspeed_has_it(norm: torch.Tensor | float) -> None:
    """With an offloaded optimizer it is in CPU memory, and a step's sums, which it joins, are on the GPU."""
    optimizer = SimpleNamespace(overflow=False)
    engine = SimpleNamespace(optimizer=optimizer, get_global_grad_norm=lambda: norm)
    assert deepspeed_norm(engine, torch.device("meta")).device.type == "meta"
    assert float(deepspeed_norm(engine, torch.device("cpu"))) == 2.0
    optimizer.overflow = True
    assert deepspeed_norm(engine, torch.device("meta")).device.type == "meta"
    assert float(deepspeed_norm(engine, torch.device("cpu"))) == float("inf")
