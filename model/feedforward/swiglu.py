"""SwiGLU feed-forward (arXiv 2002.05202): what most present language models use."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig, SwiGLUConfig
from model.distributions import dense_layer_weight
from model.dropout import Draw, site_key
from model.kernels.choice import Backends
from model.kernels.ops.elementwise import dropout
from model.linear import region_linear
from model.parallel.context import ParallelContext
from model.parallel.overlap import enter_overlapped
from model.parallel.regions import leave_region
from model.parameter_spec import ParameterSpec, Specs


class SwiGLU(nn.Module):
    """y = (SiLU(x W_gate) * x W_up) W_down with dropout on the hidden layer, no biases. [B, T, d] -> [B, T, d]."""

    @staticmethod
    def parameter_specs(config: ModelConfig) -> Specs:
        """Hidden columns are divided."""
        assert isinstance(config.feedforward, SwiGLUConfig)
        d, width = config.d_model, config.feedforward.hidden_size
        up, down = dense_layer_weight(config, d), dense_layer_weight(config, width)
        return {
            "gate.weight": ParameterSpec(shape=(width, d), divided=0, experts=None, decayed=True, initial=up),
            "up.weight": ParameterSpec(shape=(width, d), divided=0, experts=None, decayed=True, initial=up),
            "down.weight": ParameterSpec(shape=(d, width), divided=1, experts=None, decayed=True, initial=down),
        }

    def __init__(
        self, config: ModelConfig, *, parallel: ParallelContext, backends: Backends, name: str, seed: int
    ) -> None:
        super().__init__()
        assert isinstance(config.feedforward, SwiGLUConfig)
        self.parallel = parallel
        self.hidden_size = config.feedforward.hidden_size
        width = self.parallel.share(self.hidden_size)
        self.gate = nn.Linear(config.d_model, width, bias=False)
        self.up = nn.Linear(config.d_model, width, bias=False)
        self.down = nn.Linear(width, config.d_model, bias=False)
        self.dropout = config.dropout
        self.backend = backends.elementwise
        self._dropout_key = site_key(seed, f"{name}.hidden")

    def forward(self, x: Tensor, sequence_index: Tensor) -> tuple[Tensor, None]:
        """Returns the output, and no auxiliary loss."""
        x, _, (gate, up) = enter_overlapped(x, self.parallel, (self.gate.weight,), (self.up.weight,))
        hidden = F.silu(region_linear(x, gate)) * region_linear(x, up)
        if self.training and self.dropout > 0.0:
            columns = self.hidden_size, self.parallel.slice_of(self.hidden_size)
            draw = Draw(self.dropout, self._dropout_key, sequence_index, columns=columns)
            hidden = dropout(hidden, draw, backend=self.backend)
        return leave_region(self.down(hidden), self.parallel), None
