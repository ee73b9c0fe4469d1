"""benchmarks/loop: all loops that it compares train the same numbers, and what it prints and records. No timing."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from benchmarks import records
from benchmarks.loop import __main__, speed, start
from benchmarks.loop.loops import Bare, EngineAlone, Given, Peer, our_loop
from benchmarks.loop.nanogpt import GPT, NanoGPT
from common.errors import UserError
from model.language_model import build_model
from pretrain.config.schema import Config
from pretrain.engine import build
from tests.harness import run_ranks
from tests.pretrain.runs import TOLERANCE, small_config

CPU = torch.device("cpu")
STEPS = 4
MEMORY = ('model.position={"type": "xl", "memory_chunks": 1}', "data.order=streams")
"""As the 47M model."""
DENSE = (
    'model.attention={"type": "dense", "num_heads": 3, "head_dim": 10}',
    'model.feedforward={"type": "dense", "hidden_size": 50}',
    "model.initialization=published",
)
"""Heads that together are wider than the model, and 4 of whose 10 dimensions are rotated; the output has a bias."""


def losses(rank: int, config: Config, folder: Path, make: Callable[[Given, torch.device], Peer]) -> list[list[float]]:
    """Of our loop and of a peer."""
    given = Given(config, STEPS)
    with our_loop(config, folder, CPU) as ours:
        theirs = make(given, CPU)
        ours.train(1)
        theirs.train(STEPS)
        ours.train(STEPS - 1)
        found = [ours.losses(), theirs.losses()]
        theirs.close()
    return found


def our_records(rank: int, configs: list[Config], folder: Path) -> list[list[dict[str, float]]]:
    """Lines of metrics.jsonl of each: with all averages that DeepSpeed makes, then without those over one rank."""
    found = []
    for config in configs:
        for name in ("all", "others"):
            run_dir = folder / f"{len(found)}"
            with pytest.MonkeyPatch.context() as patch:
                if name == "all":
                    patch.setattr(build, "_average_only_over_others", lambda engine: None)
                with our_loop(config, run_dir, CPU) as ours:
                    ours.train(STEPS)
                    ours.losses()
            found.append([json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()])
    return found


@pytest.mark.parametrize("keys", [(), MEMORY], ids=["switchall", "memory"])
def test_the_bare_loop_trains_the_same(prepared: Path, tmp_path: Path, keys: tuple[str, ...]) -> None:
    """To rounding: it clips by a norm that is summed in fp32."""
    config = small_config(prepared, "parallel.zero=0", "optimizer.weight_decay=0.1", *keys)
    ours, theirs = run_ranks(losses, 1, config, tmp_path / "run", Bare)[0]
    assert len(ours) == STEPS and ours[0] != ours[-1]
    assert theirs == pytest.approx(ours, rel=TOLERANCE)


def test_the_engine_alone_trains_the_same(prepared: Path, tmp_path: Path) -> None:
    ours, theirs = run_ranks(losses, 1, small_config(prepared, *MEMORY), tmp_path / "run", EngineAlone)[0]
    assert len(ours) == STEPS and theirs == pytest.approx(ours, rel=TOLERANCE)


def test_nanogpts_loop_trains_the_same(prepared: Path, tmp_path: Path) -> None:
    """To rounding, with a model of its own: from our weights, on the same windows."""
    config = small_config(prepared, "parallel.zero=0", "optimizer.weight_decay=0.1", *DENSE)
    ours, theirs = run_ranks(losses, 1, config, tmp_path / "run", NanoGPT)[0]
    assert len(ours) == STEPS and ours[0] != ours[-1]
    assert theirs == pytest.approx(ours, rel=TOLERANCE)


def test_nanogpts_model_is_our_dense_one_in_fp64(prepared: Path) -> None:
    """Loss and the gradient of every weight; only our rotation rounds to fp32."""
    config = small_config(prepared, *DENSE)
    ours = build_model(config.model, seed=3).double()
    theirs = GPT(config.model).double()
    theirs.load_ours(ours)
    batch = Given(config, 1).batches[0][0]
    objective, _, _ = ours(*batch.model_inputs())
    logits, loss = theirs(batch.tokens, batch.targets)
    assert logits.shape == (*batch.tokens.shape, config.model.vocab_size)
    assert loss.item() == pytest.approx(objective.item(), rel=1e-7)
    objective.backward()
    loss.backward()
    gradients = GPT(config.model).double()
    for ours_parameter in ours.parameters():
        assert ours_parameter.grad is not None
        ours_parameter.data = ours_parameter.grad
    gradients.load_ours(ours)
    for (name, found), wanted in zip(theirs.named_parameters(), gradients.parameters(), strict=True):
        assert found.grad is not None and wanted.norm() > 0.0
        assert (found.grad - wanted).norm() < 1e-6 * wanted.norm(), name


@pytest.mark.parametrize(
    "key", ["model.dropout=0.1", "model.tied_embedding=true", 'model.position={"type": "xl", "memory_chunks": 0}']
)
def test_nanogpt_has_only_our_dense_model(prepared: Path, key: str) -> None:
    with pytest.raises(UserError, match=r"--against nanogpt compares dense models; set model\."):
        GPT(small_config(prepared, *DENSE, key).model)


def test_every_peer_can_be_asked_for() -> None:
    assert [comparison.name for comparison in speed.COMPARISONS] == __main__.PEERS


def test_an_average_over_one_rank_changes_no_bit(prepared: Path, tmp_path: Path) -> None:
    configs = [small_config(prepared, "parallel.zero=0", *keys) for keys in ((), MEMORY)]
    runs = run_ranks(our_records, 1, configs, tmp_path)[0]
    for averaged, alone in zip(runs[::2], runs[1::2], strict=True):
        for key in ("loss", "grad_norm"):
            assert [line[key] for line in averaged] == [line[key] for line in alone]


def test_the_config_is_made_small(prepared: Path) -> None:
    for comparison in speed.COMPARISONS:
        config = speed.config_of(comparison, None, [f"data.manifest={prepared}"])
        assert (config.model.d_model, config.model.num_layers, config.train.precision) == (412, 16, "fp32")
        assert (config.model.sequence_length, config.batch.global_sequences) == (128, 4)
        assert config.parallel.zero == comparison.zero


def test_tables_and_records(tmp_path: Path) -> None:
    """The ratio is of tokens per second: ours took 10 s where theirs took 9."""
    pieces = [speed.Piece(10.0, 9.5)] * 3, [speed.Piece(9.0, 9.5)] * 3
    one = speed.kept(speed.COMPARISONS[0], 1024, *pieces, [[2.0, 1.0], [2.0, 1.001]])
    starts = [start.Start(5.0, 4.0, 0.5, 3.0)._asdict(), start.Start(7.0, 4.0, 0.5, 3.0)._asdict()]
    about = records.machine()
    assert about["torch"] == version("torch") and about["date"][:10] in records.heading(about)
    records.keep(tmp_path, "loop-speed", about, {"bare": one})
    records.keep(tmp_path, "loop-start", about, {"python": {"starts": starts}})
    kept = records.read("loop-speed", tmp_path)
    assert kept is not None and kept.about == about and kept.found["bare"]["tokens_of_a_piece"] == 1024
    assert "ZeRO 0 | 102 | 114 | 0.900 | 1.000 | 0.900 to 0.900 | 1e-03 | 0.97: missed |" in speed.page(kept.found)
    kept = records.read("loop-start", tmp_path)
    assert kept is not None and "| python | 6.0 | 5.0 to 7.0 | 6: held | 3.0 | 4.0 | 0.5 |" in start.page(kept.found)


def test_refusals(capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(["start", "--starts", "0"]) == 2
    assert __main__.main(["speed", "--pairs", "0"]) == 2
    assert __main__.main(["speed", "--config", "configs/none.json"]) == 2
    assert capsys.readouterr().err.count("error: ") == 3
