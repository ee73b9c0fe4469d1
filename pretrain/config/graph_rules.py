"""Which runs can have their micro-steps recorded as CUDA graphs (train.cuda_graph, pretrain/engine/graphed.py)."""

from __future__ import annotations

from collections.abc import Iterator

from pretrain.config.obstacles import Obstacle, check, of_the_host
from pretrain.config.schema import Config


def obstacle(config: Config, *, data_size: int | None, device_type: str | None) -> Obstacle | None:
    """The first one; None where the micro-steps can be recorded. What depends on the number of data-parallel ranks or
    on the device counts only where they are known."""
    return next(_obstacles(config, data_size, device_type), None)


def check_graphs(config: Config, *, data_size: int | None = None, device_type: str | None = None) -> None:
    """Raises ConfigError if train.cuda_graph is on where graphs are impossible."""
    found = obstacle(config, data_size=data_size, device_type=device_type)
    check("train.cuda_graph", config.train.cuda_graph, found)


def takes_graphs(config: Config, *, data_size: int | None, device_type: str) -> bool:
    """Whether the micro-steps of a run are recorded, as far as what is given tells. `auto` records those that were
    recorded on a GPU (docs/gpu.md): not compiled blocks."""
    wanted = config.train.cuda_graph
    if wanted == "auto" and config.train.compile != "on":
        return obstacle(config, data_size=data_size, device_type=device_type) is None
    return wanted == "on"


def graph_decision(config: Config, *, data_size: int, device_type: str) -> tuple[bool, str]:
    """Whether this run's micro-steps are recorded, and a line that says so with the reason."""
    wanted = config.train.cuda_graph
    if takes_graphs(config, data_size=data_size, device_type=device_type):
        return True, f"CUDA graphs (train.cuda_graph = {wanted})"
    found = obstacle(config, data_size=data_size, device_type=device_type)
    reason = f"train.cuda_graph = {wanted}"
    if wanted == "auto":
        reason += f"; {found}" if found is not None else "; no GPU has recorded compiled blocks yet, on takes them"
    return False, f"kernels launched one by one ({reason})"


def _obstacles(config: Config, data_size: int | None, device_type: str | None) -> Iterator[Obstacle]:
    parallel = config.parallel
    if device_type not in (None, "cuda"):
        yield Obstacle("a CPU", "only a GPU has them", "")
    for place, layer in (("attention", config.model.attention), ("feedforward", config.model.feedforward)):
        if (reason := layer.lacks.get("graphs")) is not None:
            yield Obstacle(f"model.{place}.type = {layer.type}", reason, "")
    if parallel.pipeline > 1:
        reason = "DeepSpeed's pipeline engine has several micro-steps under way at once"
        yield Obstacle(f"parallel.pipeline = {parallel.pipeline}", reason, ", or parallel.pipeline to 1")
    if parallel.expert > 1:
        reason = "how many tokens travel to an expert's rank is known on the host alone"
        yield Obstacle(f"parallel.expert = {parallel.expert}", reason, ", or parallel.expert to 1")
    if parallel.tensor > 1:
        reason = "collectives inside the blocks are not recorded"
        yield Obstacle(f"parallel.tensor = {parallel.tensor}", reason, ", or parallel.tensor to 1")
    if parallel.zero == 3:
        reason = "parameters are gathered anew in each micro-step, at other addresses"
        yield Obstacle("parallel.zero = 3", reason, ", or parallel.zero to 2")
    yield from of_the_host(config, data_size, instead="a replay calls nothing")
