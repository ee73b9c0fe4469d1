"""SwiGLU feed-forward (arXiv 2002.05202): what most present language models use."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig, SwiGLUConfig
from model.dropout import dropout, site_key
from model.parallel.context import ParallelContext
from model.parallel.regions import enter_region, leave_region


class SwiGLU(nn.Module):
    """y = (SiLU(x W_gate) * x W_up) W_down with dropout on the hidden layer, no biases. [B, T, d] -> [B, T, d]."""

    def __init__(self, config: ModelConfig, *, name: str, seed: int, parallel: ParallelContext | None = None) -> None:
        super().__init__()
        assert isinstance(config.feedforward, SwiGLUConfig)
        self.parallel = parallel or ParallelContext()
        self.hidden_size = config.feedforward.hidden_size
        width = self.parallel.share(self.hidden_size)
        self.gate = nn.Linear(config.d_model, width, bias=False)
        self.up = nn.Linear(config.d_model, width, bias=False)
        self.down = nn.Linear(width, config.d_model, bias=False)
        self.dropout = config.dropout
        self._dropout_key = site_key(seed, f"{name}.hidden")

    def forward(self, x: Tensor, sequence_index: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the output and a zero auxiliary loss (fp32 scalar)."""
        x = enter_region(x, self.parallel)
        hidden = F.silu(self.gate(x)) * self.up(x)
        if self.training and self.dropout > 0.0:
            hidden = dropout(
                hidden,
                probability=self.dropout,
                key=self._dropout_key,
                sequence_index=sequence_index,
                columns=(self.hidden_size, self.parallel.slice_of(self.hidden_size)),
            )
        return leave_region(self.down(hidden), self.parallel), x.new_zeros((), dtype=hidden.dtype).float()
