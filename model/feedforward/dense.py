"""Two-layer feed-forward with ReLU and biases: the dense baseline."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from model.config import DenseFeedForwardConfig, ModelConfig
from model.distributions import Constant, dense_layer_weight
from model.dropout import Draw, site_key
from model.kernels.choice import Backends
from model.kernels.ops.elementwise import dropout
from model.linear import aligned_linear, column_linear, filled_linear
from model.parallel.context import ParallelContext
from model.parallel.regions import between_regions, leave_region
from model.parameter_spec import ParameterSpec, Specs


class DenseFeedForward(nn.Module):
    """y = ReLU(x W_1 + b_1) W_2 + b_2 with dropout on the hidden layer. [B, T, d] -> [B, T, d]."""

    @staticmethod
    def parameter_specs(config: ModelConfig) -> Specs:
        """Hidden columns are divided."""
        assert isinstance(config.feedforward, DenseFeedForwardConfig)
        d, width = config.d_model, config.feedforward.hidden_size
        up, down, zero = dense_layer_weight(config, d), dense_layer_weight(config, width), Constant(0.0)
        return {
            "up.weight": ParameterSpec(shape=(width, d), divided=0, experts=None, decayed=True, initial=up),
            "up.bias": ParameterSpec(shape=(width,), divided=0, experts=None, decayed=False, initial=zero),
            "down.weight": ParameterSpec(shape=(d, width), divided=1, experts=None, decayed=True, initial=down),
            "down.bias": ParameterSpec(shape=(d,), divided=None, experts=None, decayed=False, initial=zero),
        }

    def __init__(
        self, config: ModelConfig, *, parallel: ParallelContext, backends: Backends, name: str, seed: int
    ) -> None:
        super().__init__()
        assert isinstance(config.feedforward, DenseFeedForwardConfig)
        self.parallel = parallel
        self.hidden_size = config.feedforward.hidden_size
        self.up = nn.Linear(config.d_model, self.parallel.share(self.hidden_size))
        self.down = nn.Linear(self.parallel.share(self.hidden_size), config.d_model)
        self.dropout = config.dropout
        self.backend = backends.elementwise
        self._dropout_key = site_key(seed, f"{name}.hidden")

    def forward(self, x: Tensor, sequence_index: Tensor) -> tuple[Tensor, None]:
        """Returns the output, and no auxiliary loss."""
        # Biases are added out of place: ZeRO 3's replacement of F.linear adds them in place to a product that selective
        # recomputation has kept, and they would count twice.
        is_whole = self.parallel.tensor_group is None
        if is_whole:
            hidden = F.relu(filled_linear(x, self.up.weight, self.up.bias))
        else:
            hidden = F.relu(column_linear(x, self.up.weight, self.parallel) + self.up.bias)
        if self.training and self.dropout > 0.0:
            held = slice(0, hidden.shape[2]) if is_whole else self.parallel.slice_of(self.hidden_size)
            draw = Draw(self.dropout, self._dropout_key, sequence_index, columns=(self.hidden_size, held))
            hidden = dropout(hidden, draw, backend=self.backend)
        if is_whole:
            y = filled_linear(hidden, self.down.weight, self.down.bias)
            return y[..., : x.shape[2]], None
        y = leave_region(aligned_linear(hidden, self.down.weight), self.parallel)
        return y + between_regions(self.down.bias, self.parallel), None
