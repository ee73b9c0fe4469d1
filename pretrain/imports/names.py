"""Foreign names as ours: where each layer's tensors are in a state dict."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from common.errors import UserError

OF_BLOCKS = (
    ("self_attn", "attention"),
    ("norm1", "attention_norm"),
    ("norm2", "feedforward_norm"),
    ("pkm", "feedforward"),
    ("linear1", "feedforward.linear1"),
    ("linear2", "feedforward.linear2"),
)
AUTHORS = (
    *(
        (f"{blocks}.{{}}.{old}", f"blocks.{{}}.{new}")
        for blocks in ("unique_layers", "layers")
        for old, new in OF_BLOCKS
    ),
    ("out_norm", "final_norm"),
    ("output", "head"),
)
"""Modules of the authors' language models (github.com/RobertCsordas, models and layers/transformer of moe_attention,
whose blocks are `unique_layers`, and of moe: `layers`), and what they are here. {} is the number of a block."""
NUMBER = "{}"


def parse_rename(text: str) -> tuple[str, str]:
    """OLD=NEW of --rename. Raises UserError."""
    old, sign, new = text.partition("=")
    if not (old and sign and new) or old.count(NUMBER) != new.count(NUMBER) or old.count(NUMBER) > 1:
        raise UserError(
            f"--rename: {text!r} is not OLD=NEW with {{}} for a block's number in both or neither; write e.g. "
            f"'layers.{{}}.att=blocks.{{}}.attention'"
        )
    return old, new


def renamed(name: str, renames: Sequence[tuple[str, str]]) -> str:
    """`name` with the module that it lies in renamed by the first pair that fits."""
    for old, new in renames:
        pattern = re.escape(old).replace(re.escape(NUMBER), r"(\d+)")
        found = re.match(rf"{pattern}(?=\.|$)", name)
        if found is not None:
            number = found.group(1) if NUMBER in old else ""
            return new.replace(NUMBER, number) + name[found.end() :]
    return name


class State:
    """The tensors of a file under our names of modules; what is taken is gone, and what is left was not understood."""

    def __init__(self, source: str, tensors: dict[str, Tensor], renames: Sequence[tuple[str, str]]) -> None:
        """`source`: the file, for messages. Raises UserError if two names become one."""
        self.source = source
        self._tensors: dict[str, Tensor] = {}
        self._original: dict[str, str] = {}
        for name, tensor in tensors.items():
            new = renamed(name, renames)
            if new in self._tensors:
                raise UserError(f"--rename: {name} and {self._original[new]} of {source} both become {new}")
            self._tensors[new], self._original[new] = tensor, name

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def take(self, name: str, *shape: int) -> Tensor:
        """The tensor of our `name`: finite, floating point, of this shape. Raises UserError, which names its key."""
        if name not in self._tensors:
            close = next((n for n in self._tensors if n.startswith(f"{name.rpartition('.')[0]}.")), None)
            hint = f"; there is {self._original[close]}" if close is not None else ""
            raise UserError(
                f"{self.key(name)}: is missing in {self.source}{hint}; correct the model section of the configuration, "
                f"or say with --rename what the module is called there"
            )
        tensor = self._tensors.pop(name)
        if list(tensor.shape) != list(shape):
            raise UserError(
                f"{self.key(name)}: has shape {list(tensor.shape)} in {self.source}, the configuration means "
                f"{list(shape)}; correct its model section"
            )
        if not tensor.is_floating_point():
            raise UserError(f"{self.key(name)}: holds {tensor.dtype} in {self.source}, weights are floating point")
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{self.key(name)}: holds numbers that are not finite in {self.source}; name another file")
        return tensor

    def drop(self, name: str) -> str | None:
        """Leaves a tensor out. Returns its key; None if it is not there."""
        return self.key(name) if self._tensors.pop(name, None) is not None else None

    def key(self, name: str) -> str:
        """What the file calls our `name`."""
        return self._original.get(name, name)

    def blocks(self) -> int:
        """The number of blocks. Raises UserError if one in between is missing."""
        numbers = {int(found[1]) for name in self._tensors if (found := re.match(r"blocks\.(\d+)\.", name))}
        if missing := set(range(len(numbers))) - numbers:
            raise UserError(f"blocks.{min(missing)}: is missing in {self.source}, which has block {max(numbers)}")
        return len(numbers)

    def left(self) -> list[str]:
        """Keys that nothing has taken."""
        return [self._original[name] for name in self._tensors]
