"""Two-layer feed-forward with ReLU and biases: the dense baseline."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from model.config import DenseFeedForwardConfig, ModelConfig
from model.dropout import dropout, site_key


class DenseFeedForward(nn.Module):
    """y = ReLU(x W_1 + b_1) W_2 + b_2 with dropout on the hidden layer. [B, T, d] -> [B, T, d]."""

    def __init__(self, config: ModelConfig, *, name: str, seed: int) -> None:
        super().__init__()
        assert isinstance(config.feedforward, DenseFeedForwardConfig)
        self.up = nn.Linear(config.d_model, config.feedforward.hidden_size)
        self.down = nn.Linear(config.feedforward.hidden_size, config.d_model)
        self.dropout = config.dropout
        self._dropout_key = site_key(seed, f"{name}.hidden")

    def forward(self, x: Tensor, sequence_index: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the output and a zero auxiliary loss (fp32 scalar)."""
        hidden = F.relu(self.up(x))
        if self.training and self.dropout > 0.0:
            hidden = dropout(hidden, probability=self.dropout, key=self._dropout_key, sequence_index=sequence_index)
        return self.down(hidden), x.new_zeros((), dtype=hidden.dtype).float()
