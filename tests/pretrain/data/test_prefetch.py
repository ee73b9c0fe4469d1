"""The thread that reads ahead: the same batches, errors at the right step, and time to wait for next to nothing."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import DataError
from pretrain.config.schema import Config
from pretrain.data.prefetch import Prefetcher
from pretrain.data.sources import Sources, open_sources
from pretrain.data.windows import Batch, TrainingStream
from pretrain.loop import train
from pretrain.parallel.agreement import PeerFailed
from tests.harness import run_ranks
from tests.pretrain.runs import light_config, small_config

CPU = torch.device("cpu")


def stream_of(config: Config) -> TrainingStream:
    return TrainingStream(open_sources(config).reader("train", config), config, data_rank=0, data_size=1)


def same(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x.tokens, y.tokens)
        and torch.equal(x.targets, y.targets)
        and torch.equal(x.sequence_index, y.sequence_index)
        for x, y in zip(a, b, strict=True)
    )


def test_it_gives_what_the_stream_gives_also_after_a_jump(prepared: Path) -> None:
    config = small_config(prepared)
    plain, ahead = stream_of(config), Prefetcher(stream_of(config), CPU, global_sequences=8)
    for consumed in (0, 8, 16, 800, 808, 8, 8, 16):
        assert same(ahead.take(consumed), [plain.batch(consumed, m) for m in range(plain.micro_steps)])
    ahead.close()


class _Recorded:
    """A stream that notes who reads what, and fails once at a position."""

    micro_steps = 1

    def __init__(self, bad: int | None = None) -> None:
        self.reads: list[tuple[int, str]] = []
        self.bad = bad

    def batch(self, consumed: int, micro_step: int) -> Batch:
        self.reads.append((consumed, threading.current_thread().name))
        if consumed == self.bad:
            self.bad = None
            raise DataError("damaged")
        index = torch.tensor([consumed])
        return Batch(index[None], index[None], index)


def test_the_next_step_is_read_meanwhile_and_once() -> None:
    stream: Any = _Recorded()
    ahead = Prefetcher(stream, CPU, global_sequences=8)
    for step in range(3):
        assert ahead.take(8 * step)[0].tokens.item() == 8 * step
    ahead.close()
    assert [consumed for consumed, _ in stream.reads] in ([0, 8, 16], [0, 8, 16, 24])
    assert all(name.startswith("prefetch") for _, name in stream.reads)


def test_an_error_is_raised_by_the_step_that_needs_the_batch_and_may_pass() -> None:
    ahead = Prefetcher(_Recorded(bad=8), CPU, global_sequences=8)  # type: ignore[arg-type]
    ahead.take(0)
    with pytest.raises(DataError):
        ahead.take(8)
    assert ahead.take(8)[0].tokens.item() == 8


def test_a_shard_damaged_on_one_rank_stops_all_and_the_wait_is_logged(prepared: Path, tmp_path: Path) -> None:
    outcomes = run_ranks(_train_with_own_copy, 2, prepared, tmp_path)
    assert outcomes[0] == "PeerFailed" and outcomes[1].startswith("DataError") and "sha256" in outcomes[1]
    assert outcomes[2:] == []
    for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        assert 0 <= values["data_wait_seconds"] < values["step_seconds"]


def _train_with_own_copy(rank: int, prepared: Path, tmp_path: Path) -> str:
    config = light_config(prepared, "train.steps=3", "evaluate.sequences=0", ranks=2)
    train(config, Sources.load(config), tmp_path / "whole", CPU)
    copy = Path(shutil.copytree(prepared, tmp_path / f"copy{rank}"))
    if rank == 1:
        for shard in copy.glob("train-*.tar"):
            content = bytearray(shard.read_bytes())
            content[700] ^= 1
            shard.write_bytes(content)
    config = light_config(copy, "train.steps=3", "evaluate.sequences=0", ranks=2)
    try:
        train(config, Sources.load(config), tmp_path / "damaged", CPU)
    except (DataError, PeerFailed) as error:
        return f"{type(error).__name__}: {error}".removesuffix(": ")
    return "trained"
