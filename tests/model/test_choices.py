"""Choices that are recorded and replayed: what a router computes from them, and what is counted as a flip."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from model.choices import Recorder, Replayer, choice_dtype, settled
from model.kernels.ops.route import Routing, route, with_choice
from model.routing import Place, RoutingStatistics

N, R, E, K, D = 12, 3, 5, 2, 8


def routed(backend: str, *, with_keep: bool, drop_scores: bool) -> tuple[Routing, torch.Tensor, dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N, D, generator=generator, requires_grad=True)
    weight = torch.randn(R, E, D, generator=generator)
    keep = (torch.rand(N, R, E, generator=generator) > 0.3) if with_keep else None
    options: dict[str, Any] = {"keep": keep, "drop_scores": drop_scores}
    return route(x, weight, K, backend=backend, **options), x, options


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("with_keep, drop_scores", [(False, False), (True, False), (True, True)])
def test_its_own_choice_gives_a_router_its_own_routing(backend: str, with_keep: bool, drop_scores: bool) -> None:
    own, x, options = routed(backend, with_keep=with_keep, drop_scores=drop_scores)
    again = with_choice(own, own.index, **options)
    for name in ("logits", "index", "load", "order"):
        assert torch.equal(getattr(again, name), getattr(own, name)), name
    torch.testing.assert_close(again.scores, own.scores, rtol=0, atol=1e-7)
    pull = torch.randn(own.scores.shape, generator=torch.Generator().manual_seed(2))
    [ours] = torch.autograd.grad((own.scores * pull).sum(), x, retain_graph=True)
    [theirs] = torch.autograd.grad((again.scores * pull).sum(), x)
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-7)


def test_another_choice_gets_the_scores_of_the_present_logits() -> None:
    own, _, _ = routed("cpu", with_keep=False, drop_scores=False)
    index = torch.stack([(own.index[..., 0] + 1) % E, (own.index[..., 0] + 3) % E], -1)
    other = with_choice(own, index)
    for n in range(N):
        for r in range(R):
            for j in range(K):
                expected = torch.sigmoid(own.logits[n, r, index[n, r, j]])
                torch.testing.assert_close(other.scores[n, r, j], expected, rtol=1e-6, atol=0)
    for r in range(R):
        slots = index[:, r].flatten().tolist()
        assert other.load[r].tolist() == [slots.count(e) for e in range(E)]
        assert other.order[r].tolist() == sorted(range(N * K), key=lambda slot: (slots[slot], slot))


def test_what_is_recorded_is_replayed_whatever_order_and_part_is_asked_for() -> None:
    """Sequences 8 to 11 of the run, of 4 a step, 3 tokens each; read back by other micro-steps, heads and tokens."""
    own, _, _ = routed("cpu", with_keep=False, drop_scores=False)
    router, recorder = RoutingStatistics((R, E), tracks_probability=False), Recorder()
    router.choices = recorder
    recorded = settled(own, [router], torch.arange(8, 12))
    assert torch.equal(recorded.index, own.index)
    router.is_paused = True  # a recomputed block: nothing is written twice
    settled(own, [router], torch.arange(8, 12))
    [piece] = recorder.pieces
    assert piece.index.dtype == torch.uint8 and torch.equal(piece.index.long(), own.index.view(4, 3, R, K))

    replayer = Replayer()
    replayer.recorded = piece.index
    logits = own.logits.view(4, 3, R, E)[[2, 0]][:, 1:, 1:]
    wrong = torch.tensor([3, 4]).expand(2, 2, R - 1, K)
    place = Place(torch.tensor([10, 8]), slice(1, R), 1)
    chosen = replayer.settle(wrong, logits, place, is_repeated=False)
    assert torch.equal(chosen, own.index.view(4, 3, R, K)[[2, 0]][:, 1:, 1:])
    again = replayer.settle(wrong, logits, place, is_repeated=True)
    assert torch.equal(again, chosen) and replayer.num_choices == wrong.numel() and len(replayer.flips) == 1


def test_flips_are_counted_with_their_distance_from_a_tie() -> None:
    logits = torch.tensor(
        [[[[3.0, 2.0, 1.75, 0.0, -1.0]]], [[[3.0, 2.0, 1.0, 0.5, -1.0]]], [[[0.0, 4.0, 4.0, 1.0, 2.0]]]]
    )
    own = torch.tensor([[[[0, 1]]], [[[0, 1]]], [[[1, 2]]]])
    recorded = torch.tensor([[[[2, 0]]], [[[1, 0]]], [[[3, 0]]]])
    replayer = Replayer()
    replayer.recorded = recorded.to(torch.uint8)
    replayer.settle(own, logits, Place(torch.arange(3), slice(None), 0), is_repeated=False)
    # 1 for 2 at a distance of 0.25; the same pair in another order is none; both of the third: 4 is above 0 by 4.
    assert replayer.num_choices == 6 and replayer.flips[0].tolist() == [3.0, 4.0]
    replayer.clear()
    replayer.recorded[2] = own[2]
    replayer.settle(own, logits, Place(torch.arange(3), slice(None), 0), is_repeated=False)
    assert replayer.flips[0].tolist() == [1.0, 0.25]


def test_every_expert_has_a_number() -> None:
    for num_experts in (2, 256, 257, 1 << 15, (1 << 15) + 1):
        assert torch.tensor(num_experts - 1).to(choice_dtype(num_experts)).item() == num_experts - 1
