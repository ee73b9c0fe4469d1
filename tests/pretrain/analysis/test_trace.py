"""What a trace keeps: the choices that the routers really made, maps of one window, the losses of the text."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import model.attention.moa
import model.attention.switchhead
import model.feedforward.sigma_moe
from model.attention.switchhead import SwitchHeadAttention
from model.config import RopeConfig, XLConfig
from model.feedforward.sigma_moe import SigmaMoE
from model.kernels.ops.route import route_handing_on
from model.memory import layer_memories
from pretrain.analysis.counting import Counts, Favourite, favourites, gate_matrix
from pretrain.analysis.findings import Findings, shown
from pretrain.analysis.trace import Request, RouterTrace, trace_text
from tests.model.options import ATTENTIONS, check_options, kinds
from tests.pretrain.analysis.models import CASES, some_tokens, tiny

ROUTED = [case for case in CASES if case not in ("dense", "dense xl")]


@pytest.mark.parametrize("case", ROUTED)
def test_the_choices_are_the_routers_own(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network, tokens = tiny(case), some_tokens(18)  # windows of 7, 7 and 4 tokens
    made: list[tuple[torch.Tensor, torch.Tensor]] = []

    def watched(x: torch.Tensor, weight: torch.Tensor, k: int, **options: Any) -> Any:
        handed, routing = route_handing_on(x, weight, k, **options)
        made.append((weight, routing.index))
        return handed, routing

    for module in (model.attention.switchhead, model.feedforward.sigma_moe):
        monkeypatch.setattr(module, "route_handing_on", watched)
    monkeypatch.setattr(model.attention.moa, "route", lambda *given, **options: watched(*given, **options)[1])
    trace = trace_text(network, tokens, Request([0]))
    assert trace.routers
    for router in trace.routers:
        layer = network.get_submodule(".".join(router.name.split(".")[:3]))
        owner = router.name.rpartition(".")[2]
        names = {"feedforward": "router", "attention": "selector"}
        weight = layer.get_parameter(names.get(owner, f"{owner}_selector"))
        heads, own = weight.view(-1, router.num_experts, 12), []
        for weights, index in made:  # of one call several selectors may stand side by side
            for first in range(0, len(weights) - len(heads) + 1, len(heads)):
                if torch.equal(weights[first : first + len(heads)], heads):
                    own.append(index[:, first : first + len(heads)])
        windows = [7, 7, 4]
        assert len(own) == 3
        expected = torch.cat([index[-length:] for length, index in zip(windows, own, strict=True)])
        assert np.array_equal(router.index, expected.numpy()), router.name
        counts = Counter((h, e) for row in expected.tolist() for h, chosen in enumerate(row) for e in chosen)
        load = Counts.of(router).load
        assert {(h, e): n for (h, e), n in np.ndenumerate(load) if n} == dict(counts)


def test_every_option_of_attention_and_of_a_router_is_in_a_model_here() -> None:
    """Maps and gates are computed apart from the layers, which a new option changes."""
    sections = [kind for kind in kinds("maps") if kind in ATTENTIONS]
    sections += [kind for kind in kinds("routing") if kind().routers]
    models = [tiny(case).config for case in CASES]
    check_options(models, "CASES of tests/pretrain/analysis/models.py", RopeConfig, XLConfig, *sections)


@pytest.mark.parametrize("case", ROUTED)
def test_the_gates_are_those_that_multiply_the_experts(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a text of one window: what the layers hand to the ops of their experts, in the order of the layers."""
    used: dict[str, list[np.ndarray]] = {"value": [], "output": [], "moa": [], "feedforward": []}
    select, experts = SwitchHeadAttention._select, SigmaMoE._experts
    expert_linear_sum = model.attention.moa.expert_linear_sum

    def selecting(layer: Any, *given: Any) -> Any:
        found = select(layer, *given)
        for projection in ("value", "output"):
            used[projection].append(found[2][projection].scores[-7:].numpy())
        return found

    def computing(layer: Any, x: torch.Tensor, choice: Any, *given: Any, **options: Any) -> Any:
        used["feedforward"].append(choice.scores[:, None].numpy())
        return experts(layer, x, choice, *given, **options)

    def summing(a: torch.Tensor, choice: Any, *given: Any, **options: Any) -> Any:
        used["moa"].append(choice.scores[:, None].numpy())
        return expert_linear_sum(a, choice, *given, **options)

    monkeypatch.setattr(SwitchHeadAttention, "_select", selecting)
    monkeypatch.setattr(SigmaMoE, "_experts", computing)
    monkeypatch.setattr(model.attention.moa, "expert_linear_sum", summing)
    network = tiny(case)
    trace = trace_text(network, some_tokens(7), Request([0]))
    compared = 0
    for router in trace.routers:
        owner = router.name.rpartition(".")[2]
        gates = used["moa" if owner == "attention" else owner] if owner not in ("query", "key") else []
        if gates:
            assert np.allclose(router.gates, gates[router.layer], atol=1e-6), router.name
            compared += 1
    assert compared >= network.config.num_layers


def test_a_trace_changes_nothing_and_has_the_losses_of_the_text() -> None:
    network, tokens = tiny("switchhead"), some_tokens(18)
    ids = torch.tensor(tokens)
    with torch.no_grad():
        logits = torch.cat([network.logits(ids[None, first : first + 7])[0][0] for first in (0, 7, 14)])
    expected = -logits.double().log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]
    trace = trace_text(network, tokens, Request([1], window=1, map_tokens=5))
    assert np.allclose(trace.losses, expected.numpy(), atol=1e-5)
    assert trace.loss == pytest.approx(float(expected.mean()), abs=1e-5)
    assert list(trace.maps) == [1] and trace.maps[1].shape == (2, 5, 5)
    assert (trace.first_query, trace.first_key) == (7, 7)
    assert not network.blocks[1].get_submodule("attention")._forward_pre_hooks


def test_memory_is_carried_from_window_to_window() -> None:
    network, tokens = tiny("switchhead xl"), some_tokens(18)
    trace = trace_text(network, tokens, Request([0, 1], window=1, map_tokens=5))
    assert (trace.first_query, trace.first_key) == (7, 0)
    assert trace.maps[1].shape == (2, 5, 12)
    assert np.allclose(trace.maps[1].sum(-1), 1.0, atol=1e-6)
    alone = trace_text(network, tokens[7:], Request([1], map_tokens=5))
    assert np.abs(trace.losses[7:13] - alone.losses[:6]).max() > 1e-3, "the memory made no difference"
    streams = [memory.num_streams for _, memory in layer_memories(network)]
    assert streams and not any(streams), "the model's own streams were changed"
    again = trace_text(network, tokens, Request([0, 1], window=1, map_tokens=5))
    assert np.array_equal(again.losses, trace.losses)


def router_trace(*, heads: int = 2, experts: int = 5, k: int = 2, tokens: int = 40) -> RouterTrace:
    draw = np.random.default_rng(5)
    order = draw.random((tokens, heads, experts - 1)).argsort(-1)  # the last expert is dead
    return RouterTrace(
        0, "blocks.0.feedforward", "feed-forward", experts, order[..., :k], draw.random((tokens, heads, k))
    )


def test_counts_by_brute_force() -> None:
    trace = router_trace()
    counts, given = Counts.of(trace), Counts.of(trace).given()
    for head in range(2):
        rows = [set(row) for row in trace.index[:, head].tolist()]
        for e in range(5):
            assert counts.load[head, e] == sum(e in row for row in rows)
            for f in range(5):
                assert counts.together[head, e, f] == sum({e, f} <= row for row in rows)
        assert np.isnan(given[head, 4]).all()
        assert given[head, 1, 2] == counts.together[head, 1, 2] / counts.load[head, 1]
    assert (counts.dead, counts.experts) == (2, 10)
    assert counts.load_max == pytest.approx(counts.load.max() / 16)  # 40 tokens, 2 choices, 5 experts
    share = counts.load / 80
    expected = -sum(s * np.log(s) for s in share.flatten() if s) / 2 / np.log(5)
    assert counts.entropy == pytest.approx(expected)


def test_the_only_expert_is_chosen_evenly() -> None:
    alone = RouterTrace(0, "r", "r", 1, np.zeros((4, 1, 1), np.int64), np.ones((4, 1, 1)))
    counts = Counts.of(alone)
    assert (counts.entropy, counts.load_max, counts.dead) == (1.0, 1.0, 0)


def test_an_expert_that_one_token_chose_is_not_dead_and_the_worst_head_counts() -> None:
    index = np.array([[0, 0], [0, 1], [0, 0], [1, 1]])[..., None]
    counts = Counts.of(RouterTrace(0, "r", "r", 2, index, np.ones(index.shape)))
    assert counts.load.tolist() == [[3, 1], [2, 2]] and (counts.dead, counts.load_max) == (0, 1.5)


def test_gates_stand_at_their_experts() -> None:
    trace = router_trace()
    matrix = gate_matrix(trace, slice(3, 9))
    for n in range(6):
        for head in range(2):
            chosen = dict(zip(trace.index[3 + n, head].tolist(), trace.gates[3 + n, head].tolist(), strict=True))
            for expert in range(5):
                value = matrix[n, head, expert]
                assert value == pytest.approx(chosen[expert]) if expert in chosen else np.isnan(value)


def test_of_favourites_with_the_same_excess_the_more_frequent_comes_first() -> None:
    """Half of all tokens choose expert 1; 3 does once of once, 7 twice of three times: each half a token more."""
    tokens, takes = np.array([3, 7, 7, 7, 9, 9]), np.array([1, 1, 1, 0, 0, 0])
    trace = RouterTrace(0, "r", "r", 2, takes[:, None, None], np.ones((6, 1, 1)))
    assert favourites(trace, tokens, 0)[1] == [Favourite(7, 2, 3), Favourite(3, 1, 1)]


def test_the_tokens_that_are_drawn_begin_with_the_maps_and_end_with_the_text() -> None:
    of_ten: Any = SimpleNamespace(trace=SimpleNamespace(first_query=3), tokens=np.arange(10))
    assert [Findings.drawn(of_ten, count) for count in (4, 20)] == [slice(3, 7), slice(3, 10)]


def test_a_label_shows_what_cannot_be_seen() -> None:
    assert [shown(piece) for piece in (" a", "\n", "\x07", "", "ä")] == ["\u2581a", "\u23ce", "<07>", "<empty>", "ä"]


def test_favourites_are_the_tokens_with_the_largest_excess() -> None:
    trace = router_trace(heads=1)
    tokens = np.array(some_tokens(40)) % 6
    found = favourites(trace, tokens, 0, count=3)
    assert found[4] == []
    for expert in range(4):
        takes = [expert in row for row in trace.index[:, 0].tolist()]
        excess = {}
        for token in set(tokens.tolist()):
            of_token = [take for take, t in zip(takes, tokens, strict=True) if t == token]
            excess[token] = (sum(of_token) - len(of_token) * sum(takes) / 40, sum(of_token), len(of_token))
        best = sorted(excess.items(), key=lambda item: -item[1][0])[:3]
        assert [(f.token, f.taken, f.occurrences) for f in found[expert]] == [(t, n, of) for t, (_, n, of) in best]
