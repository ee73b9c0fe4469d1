"""All methods of benchmarks.checkpoint save the same state, and its table is that of the record."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed.checkpoint as dcp
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from benchmarks import checkpoint
from benchmarks.checkpoint_run import CONFIG, Measurement, Training, engine_of, measured, methods
from pretrain.config.loading import parse_config
from pretrain.parallel.context import parallel_context
from tests.harness import run_ranks

SMALLER = {
    "d_model": 32,
    "vocab_size": 64,
    "sequence_length": 16,
    "attention": CONFIG["model"]["attention"] | {"head_dim": 8},
    "feedforward": CONFIG["model"]["feedforward"] | {"num_experts": 4, "expert_size": 16, "active_experts": 2},
}


def save_and_measure(rank: int, folder: Path) -> tuple[list[str], dict[str, Any]]:
    """Each method saves into a folder of its own, after two steps; then each is measured. Returns their names and what
    was measured."""
    batch = {"global_sequences": 2, "micro_sequences": 1}
    config = parse_config(CONFIG | {"model": CONFIG["model"] | SMALLER, "batch": batch})
    parallel, device = parallel_context(config), torch.device("cpu")
    engine = engine_of(config, parallel, device)
    training = Training(engine, config, parallel)
    training(2)
    chosen = methods(engine, parallel, device)
    for name, method in chosen.items():
        (folder / name).mkdir(exist_ok=True)
        method.save(folder / name, 1)
        method.finish()
    (folder / "measured").mkdir(exist_ok=True)
    return list(chosen), measured(Measurement(chosen, training, folder / "measured"), list(chosen), 1)


class Done(NamedTuple):
    folder: Path
    names: list[str]
    measured: dict[str, Any]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    folder = tmp_path_factory.mktemp("methods")
    return Done(folder, *run_ranks(save_and_measure, 2, folder)[0])


def of_dcp(folder: Path) -> dict[str, Tensor]:
    """Every tensor, by DCP's own reader."""
    metadata = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    state = {}
    for key, tensor in metadata.items():
        assert isinstance(tensor, TensorStorageMetadata)
        state[key] = torch.empty(tensor.size, dtype=tensor.properties.dtype)
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    return state


def of_ours(folder: Path) -> dict[str, Tensor]:
    """Every rectangle."""
    return {key: value for path in folder.glob("step-*/rank-*.safetensors") for key, value in load_file(path).items()}


def whole(rectangles: dict[str, Tensor], name: str, shape: torch.Size) -> Tensor:
    """A tensor put together."""
    tensor = torch.full(shape, float("nan"))
    for key, values in rectangles.items():
        own, _, offsets = key.rpartition("@")
        if own == name:
            places = [int(offset) for offset in offsets.split(",")]
            tensor[tuple(slice(p, p + n) for p, n in zip(places, values.shape, strict=True))] = values
    return tensor


@pytest.mark.slow  # five ways to save; of ours the fast tests of checkpoints have this
def test_all_methods_save_the_same_state_of_two_ranks(done: Done) -> None:
    folder, names, _ = done
    states = [of_ours(folder / name) if "ours" in name else of_dcp(folder / name / "step-1") for name in names[:-1]]
    first = states[0]
    assert len(first) > 50 and any(value.dtype == torch.float32 and value.any() for value in first.values())
    for state in states[1:]:
        assert state.keys() == first.keys()
        assert all(torch.equal(state[key], first[key]) for key in first)
    weights = get_fp32_state_dict_from_zero_checkpoint(str(folder / names[-1]), tag="step-1")
    for name, tensor in weights.items():
        assert torch.equal(tensor, whole(first, f"master/{name}", tensor.shape)), name


@pytest.mark.slow  # the same five
def test_every_method_is_measured_on_two_ranks(done: Done) -> None:
    found = done.measured
    assert len(found["saves"]) == 5 and found["steps_beside"] >= 1
    for saves in found["saves"].values():
        assert saves[0].keys() == {"stall", "commit", "flush", "files", "plain", "beside"} and saves[0]["files"] > 0


def job(ours: list[float], other: list[float]) -> dict[str, Any]:
    """Stalls; steps of 2 s, of which 4 stand beside a save; what is lost is twice the stall."""
    saves = {
        name: [
            {"stall": s, "commit": 1.0, "flush": 0.5, "files": 332e6, "plain": 8.0, "beside": 8.0 + 2 * s}
            for s in stalls
        ]
        for name, stalls in ((checkpoint.OURS, ours), ("DeepSpeed's save_checkpoint", other))
    }
    return {"parameters": 27_000_000, "state_bytes": 324_000_000, "steps_beside": 4, "saves": saves}


def test_stall_and_loss_are_medians_and_the_share_is_of_the_steps_from_save_to_save(tmp_path: Path) -> None:
    one = job([0.1, 0.2, 0.3], [1.0, 1.0, 1.0])
    found = {"ranks": {"1": one, "2": one}, "repeats": 3, "every": 100}
    text = checkpoint.page(found)
    assert (
        "| 2 | ours, behind | 0.200 | 1.00 | 1.50 | 0.10% | 0.40 | 0.20% | 332 | 1.000 |" in text
    )  # 0.2 / 200.2, 0.4 / 200.4
    assert "| 1 | DeepSpeed's save_checkpoint | 1.000 | 1.00 | 1.50 | 0.50% | 2.00 | 0.99% | 332 | 0.200 |" in text
    assert "a step takes 2.00 s on 1 rank and 2.00 s on 2 ranks" in text
    checkpoint.draw(found, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_save_that_costs_less_than_steps_scatter_has_no_share() -> None:
    assert checkpoint.share(-0.1, job([0.1], [1.0]), 100) == "-"


def test_ranks_that_cannot_share_a_step_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        checkpoint.main(["--ranks", "3"])
    assert "--ranks must divide 8" in capsys.readouterr().err
