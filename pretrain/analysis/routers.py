"""What the routers of a layer choose for its input, by the layer's own op and weights."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from model.attention.dense import DenseAttention
from model.attention.moa import MoAAttention
from model.attention.switchhead import PROJECTIONS, SwitchHeadAttention
from model.config import Projection
from model.feedforward.dense import DenseFeedForward
from model.feedforward.sigma_moe import SigmaMoE
from model.feedforward.swiglu import SwiGLU
from model.kernels.ops.route import Routing, route


class Router(NamedTuple):
    """One router of a layer: R heads (1 for a router without), each choosing k of E experts for a token."""

    name: str
    """In its layer, as in the statistics of a run: value, output, ...; "" for the only router of a layer."""
    title: str
    """For people, e.g. `attention output`."""
    weight: Tensor
    """[R, E, d]."""
    active: int
    """Experts that a token chooses (k)."""


def routers_of(layer: nn.Module) -> list[Router]:
    """The routers of an attention or feed-forward layer, the value's before the output's; none of a dense layer."""
    if isinstance(layer, SwitchHeadAttention):
        k = layer.config.active_experts
        owners = [owner for owner in PROJECTIONS if owner in layer.selectors]
        return [Router(owner, _title(layer, owner), getattr(layer, f"{owner}_selector"), k) for owner in owners]
    if isinstance(layer, MoAAttention):
        return [Router("", "attention", layer.selector[None], layer.config.num_heads)]
    if isinstance(layer, SigmaMoE):
        return [Router("", "feed-forward", layer.router[None], layer.config.active_experts)]
    assert isinstance(layer, DenseAttention | DenseFeedForward | SwiGLU), type(layer)
    return []


def _title(layer: SwitchHeadAttention, owner: Projection) -> str:
    """Names the projections whose experts this selector chooses."""
    chosen = [p for p in PROJECTIONS if p in layer.config.expert_projections and layer.config.selector_of(p) == owner]
    return "attention " + " and ".join(chosen)


def routing_of(layer: nn.Module, router: Router, tokens: Tensor) -> Routing:
    """What `router` chooses for `tokens` [N, d], the layer's normed input, without expert dropout: logits [N, R, E],
    scores and index [N, R, k], best first. The scores are the gates: with MoA's softmax router the chosen
    probabilities."""
    assert isinstance(layer, SwitchHeadAttention | MoAAttention | SigmaMoE)
    routing = route(tokens, router.weight, router.active, backend=layer.backends.route)
    if isinstance(layer, MoAAttention) and layer.config.router == "softmax":
        routing = routing._replace(scores=routing.logits.softmax(-1).gather(-1, routing.index))
    return routing
