"""The place of this process in the job, from the environment variables of a launcher. Imports nothing slow."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from common.arguments import MOST_DIGITS, quoted
from common.errors import UserError
from common.slurm import launcher_variables

ON_NODE = "SWITCHALL_RANK_ON_NODE"
"""What LOCAL_RANK was where a rank that sees its own GPU alone has changed it (gpus.own_gpu)."""
LAUNCHER = "start the ranks through a launcher, which sets it (deepspeed --num_gpus N launch/pretrain.py ..., or srun)"

LISTED = 8
"""Parts of a list of ranks."""


@dataclass(frozen=True)
class Ranks:
    """The place of this process in the job, from the environment of the launcher or of srun; a single process without
    one."""

    rank: int
    local_rank: int
    world_size: int
    local_size: int

    @classmethod
    def from_environment(cls) -> Ranks:
        """Under srun also sets the variables that a launcher would have set. Raises UserError, which names the
        variable."""
        env = os.environ
        env.update(launcher_variables(env))
        world_size = _number(env, "WORLD_SIZE", 1, least=1)
        if world_size > 1:
            for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
                if name not in env:
                    raise UserError(
                        f"{name}: is not set although WORLD_SIZE is {world_size}; {LAUNCHER}, or unset WORLD_SIZE"
                    )
        if not env.get("MASTER_ADDR", "127.0.0.1").strip():
            raise UserError("MASTER_ADDR: is empty; set it to the name or address of the node of rank 0, or unset it")
        if "MASTER_PORT" in env:
            _number(env, "MASTER_PORT", 0, least=1, most=65535)
        local_key = "LOCAL_SIZE" if "LOCAL_SIZE" in env else "LOCAL_WORLD_SIZE"  # DeepSpeed's name, torch's name
        local_size = _number(env, local_key, world_size, least=1, most=world_size)
        return cls(
            rank=_below(env, "RANK", "WORLD_SIZE", world_size),
            local_rank=_below(env, "LOCAL_RANK", local_key if local_key in env else "WORLD_SIZE", local_size),
            world_size=world_size,
            local_size=local_size,
        )


def place_on_node(env: Mapping[str, str]) -> tuple[int, int]:
    """Number of this rank among those of its node, and how many they are; once the ranks have met."""
    return int(env.get(ON_NODE) or env["LOCAL_RANK"]), int(env["LOCAL_SIZE"])


def _number(env: Mapping[str, str], name: str, default: int, *, least: int, most: int | None = None) -> int:
    text = env.get(name, str(default)).strip()
    # str.isdigit and int accept the digits of other scripts, torch does not.
    value = int(text) if text.isascii() and text.isdigit() and len(text) <= MOST_DIGITS else None
    if value is None or value < least or (most is not None and value > most):
        allowed = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise UserError(
            f"{name}: is {quoted(text)} in the environment, not a whole number {allowed}; correct it or unset it"
        )
    return value


def _below(env: Mapping[str, str], name: str, of: str, size: int) -> int:
    """A rank below `size`, which is the value of the variable `of`."""
    value = _number(env, name, 0, least=0)
    if value >= size:
        raise UserError(
            f"{name}: is {value}, but {of} is {size}, so that ranks go from 0 to {size - 1}; correct one of the two"
        )
    return value


def ranks_text(ranks: Iterable[int]) -> str:
    """`ranks 0-3, 5` of [0, 1, 2, 3, 5]: short, however many there are."""
    numbers, parts = sorted(ranks), list[list[int]]()
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    texts = ["-".join(map(str, part)) for part in parts]
    if len(texts) > LISTED:
        return f"{len(numbers)} ranks {', '.join([*texts[: LISTED - 2], '...', texts[-1]])}"
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(texts)}"
