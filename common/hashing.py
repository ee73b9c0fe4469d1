"""Hashes that decide names, order and identity: their values never change.

sha256 of files and of JSON, a 64-bit mixing function, and numbers that a name decides.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

BLOCK_BYTES = 1 << 22
GOLDEN_RATIO = 0x9E3779B97F4A7C15
"""2^64 divided by the golden ratio: the step of splitmix64's counter."""


def sha256_file(path: Path, on_bytes: Callable[[int], object] | None = None) -> str:
    """Hex sha256 of a file. `on_bytes`, if given, is called with the size of each block that was read."""
    with path.open("rb", buffering=0) as file:
        return sha256_stream(file, on_bytes)


def sha256_stream(stream: IO[bytes], on_bytes: Callable[[int], object] | None = None) -> str:
    """Hex sha256 of what is left in a stream; `on_bytes` as for `sha256_file`."""
    digest = hashlib.sha256()
    while block := stream.read(BLOCK_BYTES):
        digest.update(block)
        if on_bytes is not None:
            on_bytes(len(block))
    return digest.hexdigest()


def sha256_json(value: Any) -> str:
    """Hex sha256 of canonical JSON: sorted keys, no blanks, ASCII."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def number_of(name: str) -> int:
    """The first 64 bits, little-endian, of the sha256 of a name: a number below 2^64 that the name alone decides.
    It may be anybody's text, with halves of surrogate pairs, as a cut JSON string has them."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:8], "little")


def mix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's finaliser: a bijection of uint64 in which every output bit depends on every input bit.

    Products wrap modulo 2^64 on purpose. Source: Steele, Lea and Flood, Fast splittable pseudorandom number generators.
    """
    import numpy as np  # here: the model's dropout hashes names alone, where there may be no numpy

    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def splitmix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's output for each state: one step of its counter, then `mix64`."""
    import numpy as np

    return mix64(values + np.uint64(GOLDEN_RATIO))
