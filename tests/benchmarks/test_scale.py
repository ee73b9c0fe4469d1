"""The simulation of many ranks computes with the product's own code, and its figures are what that code does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from benchmarks.scale import sockets
from benchmarks.scale.__main__ import main, simulate, with_ranks
from benchmarks.scale.checkpoint import owned_parts
from pretrain.config.loading import load_config
from pretrain.config.schema import Config
from pretrain.engine.zero_state import pieces
from tests.harness import run_ranks
from tests.pretrain.runs import small_config, trainer_of

TINY = "configs/switchall_tiny.json"
FP32_OF_1B = 12 * 1_117_441_280


def _parts(rank: int, config: Config) -> list[tuple[str, int, int]]:
    trainer = trainer_of(config)
    found = [
        (piece.name, piece.start, piece.master.numel())
        for piece in pieces(trainer.engine, rank=rank, world_size=5, for_saving=True)
    ]
    trainer.engine.destroy()
    dist.barrier()  # others may still make a group with the store that rank 0 holds
    return found


def test_simulated_ranks_own_what_deepspeed_gives_to_real_ones(prepared: Path) -> None:
    config = small_config(prepared, "parallel.zero=1", "batch.global_sequences=10", "batch.micro_sequences=2")
    simulated = owned_parts(config, 5)  # which divides no group of parameters: DeepSpeed pads them
    for rank, real in enumerate(run_ranks(_parts, 5, config)):
        assert sorted(simulated[rank]) == sorted(real), rank


def values(rows: list[dict[str, Any]]) -> dict[str, float]:
    return {f"{row['part']}: {row['what'].strip()}": row["value"] for row in rows}


def test_a_table_and_numbers_of_a_few_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", TINY, "--ranks", "1", "13", "--shards", "20", "--json", str(tmp_path / "found.json")]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["part", "what", "unit", "1", "13"]
    assert any(line.split()[-2:] == ["4", "16"] and "files" in line for line in lines), lines
    found = {int(ranks): values(rows) for ranks, rows in json.loads((tmp_path / "found.json").read_text()).items()}
    config = load_config(Path(TINY), [])
    assert found[13]["control: step message: messages after each other"] == 4  # 2^4 > 13
    assert found[13]["control: sent by a rank"] == 4 * 7 * 8  # pretrain/segment.py has five flags beside the two
    assert found[13]["data: sequences of a step"] == 13 * config.batch.micro_sequences
    assert found[13]["checkpoint: later saves: sent to rank 0 by a rank"] < 200
    assert found[13]["checkpoint: files that all ranks open for the weights"] < 13 * 13
    assert found[1]["checkpoint: files that all ranks open for the weights"] == 1


def test_ranks_that_do_not_meet_end_the_measurement(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(rank: int, ranks: int, port: int, sender: Any) -> None:
        raise SystemExit(1)

    monkeypatch.setattr(sockets, "_rank", fail)
    assert main(["--sockets", "2"]) == 2
    assert "error: --sockets: 2 processes did not meet" in capsys.readouterr().err


def test_a_wrong_number_and_a_missing_file_are_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--ranks", "0"]) == 2 and "at least 1" in capsys.readouterr().err
    assert main(["--config", "nowhere.json"]) == 2 and capsys.readouterr().err.startswith("error: ")


@pytest.mark.slow  # test_a_table_and_numbers_of_a_few_ranks runs the same parts
def test_a_thousand_ranks_of_a_billion_parameters() -> None:
    """What docs/scale.md says of 1,024 ranks, but for times."""
    config = with_ranks(load_config(Path("configs/switchall_1b.json"), []), 1024)
    parts = simulate(config, 1024, steps=2, shards=2000)
    found = values([{"part": part, **figure._asdict()} for part, rows in parts.items() for figure in rows])
    assert found["control: step message: messages after each other"] == 10
    assert found["control: connections of a rank"] == 19
    assert found["checkpoint: files"] == 1027 and found["checkpoint: bytes of tensors"] == FP32_OF_1B
    assert found["checkpoint: files that all ranks open for the weights"] == 2279
    assert found["checkpoint: if each read all weights"] == 1024**2
    assert found["checkpoint: rectangles of all ranks"] == 15847
