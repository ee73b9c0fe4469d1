"""A dense decoder and its training loop as nanoGPT has them, in one page: no framework, and nothing of ours inside.

Our dense model without dropout and memory is the same mathematics. So this one takes our initial weights, reads the
same windows and must have our losses. Like nanoGPT it has one product for queries, keys and values, all logits at once,
and a batch that is copied out of one memory-mapped file of tokens. As in our model, and not in nanoGPT, are rotary
positions on a part of each head, ReLU, and biases in the feed-forward, the norms and the output layer alone. Nothing is
compiled, as nanoGPT's README advises for a CPU.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.loop.loops import Given
from common.errors import UserError
from data_prep.shards.reader import SplitReader
from model.config import DenseAttentionConfig, DenseFeedForwardConfig, ModelConfig, RopeConfig
from pretrain.config.schema import Config
from pretrain.data.sources import open_sources

TOKENS_AT_ONCE = 2**22


class Block(nn.Module):
    """Pre-LN: causal attention, then two layers with a ReLU."""

    def __init__(self, d: int, heads: int, head_dim: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.feedforward_norm = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv = nn.Linear(d, 3 * heads * head_dim, bias=False)
        self.output = nn.Linear(heads * head_dim, d, bias=False)
        self.up, self.down = nn.Linear(d, hidden), nn.Linear(hidden, d)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """`x` [B, T, d] -> the same shape."""
        B, T, _ = x.shape
        q, k, v = self.qkv(self.attention_norm(x)).view(B, T, 3, self.heads, -1).unbind(2)
        q, k, v = (t.transpose(1, 2) for t in (rotated(q, cos, sin), rotated(k, cos, sin), v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.output(y.transpose(1, 2).reshape(B, T, -1))
        return x + self.down(F.relu(self.up(self.feedforward_norm(x))))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x` [B, T, H, h] with its first dimensions turned in pairs (i, i + n); `cos`, `sin` [T, 1, n]."""
    n = cos.shape[-1]
    a, b, rest = x[..., :n], x[..., n : 2 * n], x[..., 2 * n :]
    return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], -1)


class GPT(nn.Module):
    """The decoder."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        """Raises UserError for a model that is not this one."""
        super().__init__()
        attention, position, feedforward = config.attention, config.position, config.feedforward
        if (
            not isinstance(attention, DenseAttentionConfig)
            or not isinstance(position, RopeConfig)
            or not isinstance(feedforward, DenseFeedForwardConfig)
            or (config.memory_length, config.dropout, config.tied_embedding) != (0, 0.0, False)
        ):
            raise UserError(
                "--against nanogpt compares dense models; set model.attention.type=dense, model.position.type=rope "
                "without memory_chunks, model.feedforward.type=dense, model.dropout=0 and model.tied_embedding=false"
            )
        d, heads, head_dim = config.d_model, attention.num_heads, attention.head_dim
        self.embedding = nn.Embedding(config.vocab_size, d)
        self.blocks = nn.ModuleList(
            Block(d, heads, head_dim, feedforward.hidden_size) for _ in range(config.num_layers)
        )
        self.final_norm, self.head = nn.LayerNorm(d), nn.Linear(d, config.vocab_size)
        n = int(position.fraction * head_dim) // 2
        frequencies = position.base ** (-torch.arange(n, dtype=torch.float64) / max(n, 1))
        angles = torch.outer(torch.arange(config.sequence_length, dtype=torch.float64), frequencies).float()
        self.register_buffer("cos", angles.cos()[:, None], persistent=False)
        self.register_buffer("sin", angles.sin()[:, None], persistent=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """`tokens`, `targets` [B, T] int64 -> logits [B, T, V] and their mean cross-entropy in nats."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        logits = self.head(self.final_norm(x))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def load_ours(self, model: nn.Module) -> None:
        """Takes the weights of our model."""
        state = {
            name.replace(".attention.", ".").replace(".feedforward.", "."): weight
            for name, weight in model.state_dict().items()
        }
        for number in range(len(self.blocks)):
            parts = [state.pop(f"blocks.{number}.{part}.weight") for part in ("query", "key", "value")]
            state[f"blocks.{number}.qkv.weight"] = torch.cat(parts)
        self.load_state_dict(state)


class NanoGPT:
    """The loop: a batch, forward, backward, clipping, AdamW."""

    def __init__(self, given: Given, device: torch.device) -> None:
        """Raises UserError for a configuration that it cannot train."""
        o = given.config.optimizer
        self._given, self._device, self._clip_norm = given, device, o.clip_norm
        self._model = GPT(given.config.model).to(device)
        self._model.load_ours(given.model(device))
        decayed = [p for p in self._model.parameters() if p.dim() >= 2]
        others = [p for p in self._model.parameters() if p.dim() < 2]
        groups = [{"params": decayed, "weight_decay": o.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self._optimizer = torch.optim.AdamW(groups, lr=o.learning_rate, betas=o.betas, eps=o.eps, fused=True)
        self._folder = tempfile.TemporaryDirectory()
        self._tokens = one_file(given.config, Path(self._folder.name) / "train.bin")
        self._losses: list[float] = []

    def batch(self, step: int, micro_step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets [B, T] int64. The offsets are our loop's, where nanoGPT draws random ones."""
        T, offsets = self._given.config.model.sequence_length, self._given.offsets[step][micro_step].tolist()
        x, y = (
            torch.stack([torch.from_numpy(self._tokens[i + late : i + late + T].astype(np.int64)) for i in offsets])
            for late in (0, 1)
        )
        return x.to(self._device), y.to(self._device)

    def train(self, steps: int) -> None:
        model, optimizer, first = self._model, self._optimizer, len(self._losses)
        for step in range(first, first + steps):
            for group in optimizer.param_groups:
                group["lr"] = self._given.rates[step]
            micro_steps, total = len(self._given.offsets[step]), 0.0
            for micro_step in range(micro_steps):
                _, loss = model(*self.batch(step, micro_step))
                (loss / micro_steps).backward()
                total += loss.item() / micro_steps
            if self._clip_norm > 0.0:
                torch.nn.utils.clip_grad_norm_(model.parameters(), self._clip_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            self._losses.append(total)

    def losses(self) -> list[float]:
        return self._losses

    def close(self) -> None:
        del self._tokens
        self._folder.cleanup()


def one_file(config: Config, path: Path) -> np.memmap:
    """The training split as nanoGPT keeps it: one file of token ids, mapped. Raises UserError for several data sets."""
    sources = open_sources(config).sources
    if len(sources) != 1:
        raise UserError("--against nanogpt reads one data set; set data.manifest in the place of data.sources")
    manifest = sources[0].manifest
    reader = SplitReader(manifest, "train", verify_on_first_read=False)
    with path.open("wb") as file:
        for start in range(0, reader.num_tokens, TOKENS_AT_ONCE):
            stop = min(start + TOKENS_AT_ONCE, reader.num_tokens)
            reader.read(start, stop).astype(manifest.numpy_dtype).tofile(file)
    return np.memmap(path, dtype=manifest.numpy_dtype, mode="r")
