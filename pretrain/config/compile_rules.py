"""Which runs can have their blocks compiled by torch.compile (train.compile, pretrain/engine/compiled.py)."""

from __future__ import annotations

from collections.abc import Iterator

from pretrain.config.obstacles import Obstacle, check, of_the_host
from pretrain.config.schema import Config


def check_compile(config: Config, *, data_size: int | None = None) -> None:
    """Raises ConfigError if train.compile is on where that is impossible. What depends on the number of data-parallel
    ranks counts only where it is given."""
    check("train.compile", config.train.compile, next(_obstacles(config, data_size), None))


def compile_decision(config: Config, *, data_size: int) -> tuple[bool, str]:
    """Whether this run's blocks are compiled, and a line that says so with the reason. `auto` compiles none: on a CPU
    it is slower, and on an H200 CUDA graphs gain more (docs/kernels.md)."""
    wanted, found = config.train.compile, next(_obstacles(config, data_size), None)
    if wanted == "on":
        return True, "compiled by torch.compile (train.compile = on), at the first step of each length of the context"
    if wanted == "off":
        reason = "train.compile = off"
    elif found is not None:
        reason = f"train.compile = auto; {found}"
    else:
        reason = "train.compile = auto, which compiles nothing: it was not the fastest on a CPU or an H200; on does"
    return False, f"operator by operator ({reason})"


def _obstacles(config: Config, data_size: int | None) -> Iterator[Obstacle]:
    parallel, train = config.parallel, config.train
    if parallel.tensor > 1:
        reason = "collectives inside the blocks run beside their backward pass, which torch.compile cannot trace"
        yield Obstacle(f"parallel.tensor = {parallel.tensor}", reason, ", or parallel.tensor to 1")
    if parallel.expert > 1:
        reason = "how many tokens travel to an expert's rank is known at run time alone"
        yield Obstacle(f"parallel.expert = {parallel.expert}", reason, ", or parallel.expert to 1")
    if parallel.zero == 3:
        reason = "parameters are gathered layer by layer by hooks inside the blocks"
        yield Obstacle("parallel.zero = 3", reason, ", or parallel.zero to 2")
    if train.recompute == "selective":
        reason = "torch.compile decides by itself what is computed again"
        yield Obstacle("train.recompute = selective", reason, ", or train.recompute to none or full")
    yield from of_the_host(config, data_size, instead="a program calls other operators")
