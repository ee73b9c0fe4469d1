"""benchmarks/traffic.py: what it counts at a small size, and the goals that the kernels keep."""

from __future__ import annotations

import pytest
import torch

from benchmarks.traffic import (
    AUTHORS_PASSES,
    LAYERS,
    Count,
    Layer,
    TorchOperators,
    authors_bytes,
    measure,
    table,
    tiled_bytes,
    useful_flops,
)
from common.paths import REPOSITORY

SMALL = Layer(name="small", heads=2, num_experts=4, active=2, narrow=64, authors_launches=68)


def test_a_small_layer() -> None:
    """Gate-scaled GEMMs compute every expert: E / k times the useful flops where tiles divide the shape."""
    count = measure(SMALL, 128, 128)
    assert count.flops == 2 * useful_flops(SMALL, 128, 128)
    assert count.atomics == 0
    # Of two ops: gates, product; gates, input gradient, weight gradient, gates of the chosen experts.
    assert count.launches == 2 * (2 + 4)
    assert count.requested == sum((count.by_tensor or {}).values()) > count.once


def test_all_results_of_an_operator_count() -> None:
    x, count = torch.ones(3, 5), Count()
    with TorchOperators(count):
        torch.sort(x)
        torch.add(x, x, out=x)
    assert count.by_tensor == {"torch.sort": 3 * 5 * (4 + 4 + 8), "torch.add": 3 * 5 * 4 * 4}
    assert (count.launches, count.requested) == (2, 3 * 5 * 32)


def test_table() -> None:
    count = measure(SMALL, 64, 64)
    plain, markdown = (table([(SMALL, 64, 64, count)], markdown=kind) for kind in (False, True))
    assert len(plain.splitlines()) == 2 and len(markdown.splitlines()) == 3
    assert markdown.startswith("| layer | T |")


def test_authors_arithmetic() -> None:
    """At T = 8192, d = 1024: the slot tensors alone are most of the authors' bytes."""
    assert sum(AUTHORS_PASSES.values()) == 14
    megabytes = [authors_bytes(layer, 8192, 1024) / 1e6 for layer in LAYERS]
    assert megabytes == pytest.approx([1879, 2819, 1879, 940], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
def test_goals(layer: Layer) -> None:
    """At most 1.5 times what separate GEMMs in 64 x 64 tiles request; no atomics; fewer launches than the authors'. The
    page says it."""
    count = measure(layer, 256, 512)
    assert count.requested <= 1.5 * tiled_bytes(layer, 256, 512)
    assert count.atomics == 0 and count.launches <= 12 < layer.authors_launches
    row = table([(layer, 256, 512, count)], markdown=True).splitlines()[-1]
    assert row in (REPOSITORY / "docs" / "kernels.md").read_text(encoding="utf-8"), row


@pytest.mark.slow
def test_little_padding_at_128_tokens_per_expert() -> None:
    layer = LAYERS[-1]
    assert measure(layer, 1024, 256).flops <= 1.3 * useful_flops(layer, 1024, 256)


@pytest.mark.slow
def test_little_padding_of_sorted_projections() -> None:
    """At 384 tokens per expert and head. Beside tiles that are not full, 112 of 128 columns are padding's share."""
    layer = next(layer for layer in LAYERS if 2 * layer.active < layer.num_experts and layer.heads > 1)
    assert measure(layer, 1536, 128).flops <= 1.3 * useful_flops(layer, 1536, 128)
