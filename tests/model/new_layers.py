"""Two layers that the project does not have, each as a researcher would try it first: in plain PyTorch, on whole
parameters. docs/new-layer.md says what each part is for. (In model/ the section would be in the union of its kind, and
`assert isinstance(config.attention, TopPConfig)` would stand where a cast does here.)"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention.rope import RopeTables, rotate
from model.config import ModelConfig, RopeConfig
from model.distributions import Normal, block_std
from model.documents import Seen, causal_attention
from model.kernels.choice import Backends
from model.layer_section import Lacks, LayerSection, Routers
from model.layers import ATTENTIONS, FEEDFORWARDS
from model.parallel.context import ParallelContext
from model.parameter_spec import Experts, ParameterSpec, Specs
from model.routing import RoutingStatistics, entropy_regularizer


class TopPConfig(LayerSection):
    """SwitchHead whose tokens choose as many experts as it takes for a share of the softmax."""

    label = "top-p SwitchHead"
    lacks: ClassVar[Lacks] = {
        "tensor": "every rank has all of its heads",
        "xl": "it knows rotary positions alone",
        "choices": "a record holds as many experts for each token",
        "maps": "nobody has written its logits down there yet",
        "routing": "tokens choose different numbers of experts",
        "export": "it is not in layers_switchall.py",
    }
    divided: ClassVar[tuple[str, ...]] = ()
    type: Literal["top_p"] = "top_p"
    """Kind of attention."""
    num_heads: int = 2
    """Attention matrices computed per layer (H)."""
    head_dim: int = 6
    """Width of a query, key and value vector (h)."""
    num_experts: int = 4
    """Value and output experts of each head (E)."""
    share: float = 0.7
    """Of the softmax, that the chosen experts have together at least (p)."""

    @property
    def sizes(self) -> str:
        return f"{self.num_heads} heads of {self.head_dim}, up to {self.num_experts} experts for {self.share:g}"

    @property
    def routers(self) -> Routers:
        return Routers(self.num_experts, 1, "softmax")


class TopPAttention(nn.Module):
    """As SwitchHeadAttention, with the chosen probabilities as gates. All experts are multiplied, most of them by 0."""

    @staticmethod
    def parameter_specs(config: ModelConfig) -> Specs:
        own, d = cast("TopPConfig", config.attention), config.d_model
        H, h, E = own.num_heads, own.head_dim, own.num_experts
        experts = Experts(active=E, total=E, exchanged=False)
        inner, outer = block_std(config, d), block_std(config, H * h)

        def spec(*shape: int, std: float = inner, experts: Experts | None = None) -> ParameterSpec:
            return ParameterSpec(shape=shape, divided=None, experts=experts, decayed=True, initial=Normal(std))

        return {
            "query.weight": spec(H * h, d),
            "key.weight": spec(H * h, d),
            "value_experts": spec(H, E, d, h, experts=experts),
            "output_experts": spec(H, E, h, d, std=outer, experts=experts),
            "value_selector": spec(H, E, d),
            "output_selector": spec(H, E, d),
        }

    def __init__(
        self, config: ModelConfig, *, parallel: ParallelContext, backends: Backends, name: str, seed: int
    ) -> None:
        super().__init__()
        assert isinstance(config.position, RopeConfig)
        self.config, self.backends = cast("TopPConfig", config.attention), backends
        d, H, h, E = config.d_model, self.config.num_heads, self.config.head_dim, self.config.num_experts
        self.rope = RopeTables(h, config.position)
        self.query, self.key = (nn.Linear(d, H * h, bias=False) for _ in range(2))
        self.value_experts, self.output_experts = (nn.Parameter(torch.empty(H, E, *s)) for s in ((d, h), (h, d)))
        self.value_selector, self.output_selector = (nn.Parameter(torch.empty(H, E, d)) for _ in range(2))
        self.value_statistics, self.output_statistics = (
            RoutingStatistics((H, E), tracks_probability=False) for _ in range(2)
        )

    def forward(
        self, context: Tensor, num_queries: int, sequence_index: Tensor, documents: Seen | None = None
    ) -> tuple[Tensor, None]:
        B, L, T, H = len(context), context.shape[1], num_queries, self.config.num_heads
        chunk = context[:, L - T :]
        q, k = self.query(chunk).view(B, T, H, -1), self.key(context).view(B, L, H, -1)
        gates = self._gates(context, self.value_selector, self.value_statistics, T)
        v = torch.einsum("blhe,bld,hedk->blhk", gates, context, self.value_experts)
        q, k = rotate(q, k, self.rope(documents, L, context.device), backend=self.backends.elementwise)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        attended = causal_attention(q, k, v, documents, backend=self.backends.causal_attention).transpose(1, 2)
        gates = self._gates(chunk, self.output_selector, self.output_statistics, T)
        y = torch.einsum("bthe,bthk,hekd->btd", gates, attended, self.output_experts)
        return y, None

    def _gates(self, x: Tensor, selector: Tensor, statistics: RoutingStatistics, T: int) -> Tensor:
        """x [B, n, d] -> [B, n, H, E], 0 where an expert is not chosen. Counts the choices of the last T tokens."""
        probability = torch.einsum("bnd,hed->bnhe", x, selector).float().softmax(-1)
        best, index = probability.sort(-1, descending=True)
        chosen = torch.zeros_like(best).scatter(-1, index, (best.cumsum(-1) - best < self.config.share).float())
        if self.training:
            statistics.record(chosen[:, -T:].sum((0, 1)).long(), None)
        return (probability * chosen).to(x.dtype)


class SoftmaxMoEConfig(LayerSection):
    """SwiGLU experts with the softmax of the chosen logits as gates, and sigma-MoE's loss for an even load."""

    label = "softmax MoE"
    lacks: ClassVar[Lacks] = {
        "tensor": "every rank has all of its experts",
        "expert": "it does not send tokens to other ranks",
        "choices": "it calls no `settled`",
        "routing": "pretrain/analysis/routers.py does not know it",
        "export": "it is not in layers_switchall.py",
    }
    divided: ClassVar[tuple[str, ...]] = ()
    type: Literal["softmax_moe"] = "softmax_moe"
    """Kind of feed-forward layer."""
    num_experts: int = 5
    """Experts per layer (E)."""
    expert_size: int = 7
    """Hidden width of one expert (G)."""
    active_experts: int = 2
    """Experts chosen per token (k)."""
    entropy_weight: float = 0.01
    """As sigma-MoE's."""
    entropy_scope: Literal["global_batch", "micro_batch"] = "global_batch"
    """As sigma-MoE's."""

    @property
    def sizes(self) -> str:
        return f"{self.active_experts} of {self.num_experts} experts of {self.expert_size}"

    @property
    def routers(self) -> Routers:
        return Routers(self.num_experts, self.active_experts, "softmax")


class SoftmaxMoE(nn.Module):
    """y = sum over the k chosen experts e of g_e (SiLU(x W_1[e]) * x W_3[e]) W_2[e]."""

    @staticmethod
    def parameter_specs(config: ModelConfig) -> Specs:
        own, d = cast("SoftmaxMoEConfig", config.feedforward), config.d_model
        E, G = own.num_experts, own.expert_size
        experts = Experts(active=own.active_experts, total=E, exchanged=False)
        up, down = Normal(block_std(config, d)), Normal(block_std(config, E * G))
        return {
            "router": ParameterSpec(shape=(E, d), divided=None, experts=None, decayed=False, initial=up),
            "up_experts": ParameterSpec(shape=(E, d, 2 * G), divided=None, experts=experts, decayed=True, initial=up),
            "down_experts": ParameterSpec(shape=(E, G, d), divided=None, experts=experts, decayed=True, initial=down),
        }

    def __init__(
        self, config: ModelConfig, *, parallel: ParallelContext, backends: Backends, name: str, seed: int
    ) -> None:
        super().__init__()
        self.config, self.parallel = cast("SoftmaxMoEConfig", config.feedforward), parallel
        d, E, G = config.d_model, self.config.num_experts, self.config.expert_size
        self.router = nn.Parameter(torch.empty(E, d))
        self.up_experts = nn.Parameter(torch.empty(E, d, 2 * G))
        self.down_experts = nn.Parameter(torch.empty(E, G, d))
        self.statistics = RoutingStatistics((E,), tracks_probability=True)

    def forward(self, x: Tensor, sequence_index: Tensor) -> tuple[Tensor, Tensor | None]:
        logits = F.linear(x, self.router).float()
        best, index = logits.topk(self.config.active_experts)
        gates = torch.zeros_like(logits).scatter(-1, index, best.softmax(-1)).to(x.dtype)
        loss = None
        if self.training:
            flat = logits.flatten(0, 1)
            loss, _ = entropy_regularizer(flat, self.config, self.statistics, self.parallel)
            self.statistics.record(torch.zeros_like(logits).scatter(-1, index, 1.0).sum((0, 1)).long(), flat)
        gate, up = torch.einsum("btd,edg->bteg", x, self.up_experts).chunk(2, -1)
        y = torch.einsum("bte,bteg,egd->btd", gates, F.silu(gate) * up, self.down_experts)
        return y, loss


def make_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The line of each in model/layers.py, for one test. The unions of model/config.py are only what reads JSON."""
    tables: tuple[Any, Any] = (ATTENTIONS, FEEDFORWARDS)
    monkeypatch.setitem(tables[0], TopPConfig, TopPAttention)
    monkeypatch.setitem(tables[1], SoftmaxMoEConfig, SoftmaxMoE)
