"""Several data sets in one run, and the two-level shuffle: which window every position of a run reads."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.errors import ConfigError, DataError, UserError
from pretrain.cli.train import print_derived
from pretrain.config.data_rules import whole_weights
from pretrain.config.schema import Config
from pretrain.data.mixture import MixtureSchedule
from pretrain.data.order import permute_in_blocks, window_order
from pretrain.data.sources import Sources, open_sources
from pretrain.data.windows import TrainingStream, Windows
from pretrain.resume import changed_settings
from tests.data_prep.split_writer import random_documents, write_data
from tests.pretrain.runs import small_config, train_runs

G = 8


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three data sets of random ids, of one tokenizer, with about 600, 300 and 150 windows of 16 tokens."""
    base, rng, found = tmp_path_factory.mktemp("sources"), np.random.default_rng(0), []
    for name, documents in (("c4", 50), ("pes2o", 25), ("books", 12)):
        sizes = {"tokens_per_shard": 3000, "tokens_per_member": 500}
        write_data(base / name, random_documents(rng, documents, 400), vocab_size=400, **sizes)
        found.append(base / name)
    return found


def mixed(folders: list[Path], weights: tuple[float, ...], *overrides: str) -> Config:
    sources = [{"manifest": str(f), "weight": w} for f, w in zip(folders, weights, strict=False)]
    return small_config(folders[0], f"data.sources={json.dumps(sources)}", "evaluate.sequences=0", *overrides)


def stream_of(config: Config, rank: int = 0, size: int = 1) -> tuple[TrainingStream, Windows]:
    reader = open_sources(config).reader("train", config)
    return TrainingStream(reader, config, data_rank=rank, data_size=size), reader


@pytest.mark.parametrize(
    "weights", [[1], [7, 3], [1, 999], [1, 1, 1], [50, 30, 20], [1, 2, 3, 4, 5], [997, 2, 1], [13, 1, 1, 1, 7, 41]]
)
def test_a_schedule_keeps_to_its_weights_at_every_moment(weights: list[int]) -> None:
    schedule, total = MixtureSchedule(weights), sum(weights)
    sources, turns = schedule.sources(np.arange(2 * total))
    chosen = sources[:, None] == np.arange(len(weights))
    counts = np.cumsum(chosen, axis=0)
    expected = np.arange(1, 2 * total + 1)[:, None] * np.array(weights) / total
    assert np.abs(counts - expected).max() <= 1 - 1 / max(1, 2 * len(weights) - 2) + 1e-9, "Tijdeman's bound"
    assert counts[total - 1].tolist() == weights
    for source in range(len(weights)):
        assert turns[sources == source].tolist() == list(range(2 * weights[source]))
    for consumed in (0, 1, total // 2, total, total + 1):
        assert schedule.counts(consumed) == np.bincount(sources[:consumed], minlength=len(weights)).tolist()


def test_weights_are_taken_as_written() -> None:
    assert whole_weights([0.7, 0.3]) == [7, 3]
    assert whole_weights([151, 40.5]) == [302, 81]
    assert whole_weights([1e-3, 0.999]) == [1, 999]
    assert whole_weights([0.2, 0.6]) == whole_weights([2, 6]) == whole_weights([500, 1500]) == [1, 3]


@pytest.mark.parametrize("block", [0, 24])
@pytest.mark.parametrize("weights", [(1,), (0.7, 0.3), (0.5, 0.3, 0.2)])
def test_every_window_of_every_source_is_read_once_per_epoch(
    folders: list[Path], weights: tuple[float, ...], block: int
) -> None:
    config = mixed(folders, weights, f"data.shuffle_block_windows={block}", "data.shuffle_blocks=3")
    stream, reader = stream_of(config)
    epochs = 3
    count = round(epochs * reader.sizes[0] * sum(weights) / weights[0])
    windows = stream.windows(np.arange(count))
    first = 0
    for source, size in enumerate(reader.sizes):
        own = windows[(windows >= first) & (windows < first + size)] - first
        for epoch in range(len(own) // size):
            assert sorted(own[epoch * size : (epoch + 1) * size].tolist()) == list(range(size))
        seed = "17" if len(weights) == 1 else f"17/source {source}"
        order = window_order(np.arange(len(own)), size, seed=seed, block_windows=block, blocks=3)
        assert np.array_equal(own, order), "another order than that of earlier versions"
        assert stream.source_epochs(count)[source] == len(own) / size
        first += size
    assert stream.source_epochs(count)[0] == pytest.approx(epochs, abs=2 / reader.sizes[0])
    assert stream.epoch(count) == count / reader.num_windows


@pytest.mark.parametrize("kind", ["one", "mixture", "blocks", "streams"])
def test_the_sequence_of_windows_is_the_same_however_the_run_is_cut(folders: list[Path], kind: str) -> None:
    """1, 2 and 4 ranks, interrupted anywhere and with another world size from there, over epochs: one order."""
    overrides = {
        "one": [],
        "mixture": [],
        "blocks": ["data.shuffle_block_windows=8", "data.shuffle_blocks=2"],
        "streams": ["model.position.type=xl"],
    }[kind]
    weights = (0.6, 0.4) if kind in ("mixture", "blocks") else (1.0,)

    def step(consumed: int, size: int, micro: int) -> list[int]:
        streams = [made[size, micro, rank] for rank in range(size)]
        order = [s.windows(s.own_positions(consumed, m)) for m in range(streams[0].micro_steps) for s in streams]
        return np.concatenate(order).tolist()

    made = {}
    for size, micro in ((1, 8), (1, 2), (2, 4), (2, 1), (4, 2), (4, 1)):
        config = mixed(folders, weights, *overrides, f"batch.micro_sequences={micro}")
        for rank in range(size):
            made[size, micro, rank], reader = stream_of(config, rank, size)
    layouts = sorted({key[:2] for key in made})
    steps = 2 * reader.num_windows // G + 3
    whole = [step(n * G, 1, 8) for n in range(steps)]
    draw = np.random.default_rng(1)
    for _ in range(5):  # each step in a layout of its own: interrupted everywhere
        chosen = draw.integers(0, len(layouts), steps)
        assert [step(n * G, *layouts[c]) for n, c in enumerate(chosen)] == whole
    if kind == "one":
        order = [w for part in whole for w in part]
        n = reader.num_windows
        assert sorted(order[:n]) == sorted(order[n : 2 * n]) == list(range(n))


@pytest.mark.parametrize("mask", [False, True])
def test_a_batch_holds_the_tokens_and_documents_of_its_sources(folders: list[Path], mask: bool) -> None:
    config = mixed(folders, (0.5, 0.5), "batch.micro_sequences=8", f"data.document_mask={str(mask).lower()}")
    stream, reader = stream_of(config)
    alone = [Sources.load(small_config(f)).reader("train", config) for f in folders[:2]]
    assert reader.tokens_are_bytes == alone[0].tokens_are_bytes
    batch = stream.batch(24, 0).to(torch.device("cpu"))
    assert len(batch.model_inputs()) == 3 + mask and (batch.documents is not None) == mask
    windows = stream.windows(np.arange(24, 32))
    sizes: Counter[int] = Counter()
    for row, window in enumerate(windows):
        source = int(window >= alone[0].num_windows)
        sizes[source] += 1
        own = np.array([window - source * alone[0].num_windows])
        tokens, targets = alone[source].read(own)
        assert torch.equal(batch.tokens[row], tokens[0]) and torch.equal(batch.targets[row], targets[0])
        if batch.documents is not None:
            assert torch.equal(batch.documents[row], alone[source].documents(own)[0])
    assert sizes == {0: 4, 1: 4}


def test_one_source_reads_as_the_manifest_alone(folders: list[Path]) -> None:
    of_sources, of_manifest = mixed(folders, (3.0,)), small_config(folders[0], "evaluate.sequences=0")
    assert Sources.load(of_sources).digest == Sources.load(of_manifest).digest
    positions = np.arange(2000)
    assert np.array_equal(stream_of(of_sources)[0].windows(positions), stream_of(of_manifest)[0].windows(positions))


@pytest.mark.parametrize(
    "windows, options, expected",
    [
        (10, {"seed": 5}, [3, 4, 7, 2, 5, 6, 8, 1, 0, 9, 7, 9]),
        (4, {"seed": 5}, [3, 2, 0, 1, 0, 2, 3, 1, 1, 2, 3, 0]),
        (5, {"seed": 5}, [3, 4, 1, 2, 0, 2, 1, 0, 4, 3, 4, 1]),
        (10, {"seed": "5/source 1"}, [3, 8, 9, 5, 0, 2, 7, 1, 4, 6, 9, 7]),
        (10, {"seed": 5, "block_windows": 3, "blocks": 2}, [9, 4, 0, 2, 1, 3, 7, 6, 5, 8, 2, 8]),
    ],
    ids=["default", "a power of four", "and one more", "source of a mixture", "blocks"],
)
def test_orders_are_those_of_earlier_versions(windows: int, options: dict[str, Any], expected: list[int]) -> None:
    """A run that resumes under another order reads windows twice and leaves others out."""
    assert window_order(np.arange(12), windows, **options).tolist() == expected


@pytest.mark.parametrize(
    "size, block, blocks", [(1, 1, 1), (7, 3, 2), (100, 7, 4), (100, 10, 5), (5, 50, 2), (64, 8, 1)]
)
def test_blocks_are_a_bijection(size: int, block: int, blocks: int) -> None:
    for key in ("0/0", "0/1"):
        image = permute_in_blocks(np.arange(size), size, block, blocks, key=key)
        assert sorted(image.tolist()) == list(range(size))


def test_two_levels_read_few_places_at_a_time_and_still_mix() -> None:
    size, block, blocks = 10_000, 100, 4
    order = window_order(np.arange(size), size, seed=0, block_windows=block, blocks=blocks)
    part = np.sort(order[: block * blocks])
    assert (np.diff(part) > 1).sum() <= blocks, "a group is a few runs of neighbours"
    assert len(np.unique(window_order(np.arange(400), size, seed=0) // block)) > 90, "one level reads everywhere"
    assert (np.diff(order) == 1).mean() < 0.02
    assert (order[: size // 2] < size // 2).mean() == pytest.approx(0.5, abs=0.15)
    again = window_order(np.arange(size, 2 * size), size, seed=0, block_windows=block, blocks=blocks)
    assert (again == order).mean() < 0.01


@pytest.mark.parametrize(
    "weights, overrides, words",
    [
        ((0.5, 0.5), ["model.position.type=xl"], ["data.sources", "memory", "memory_chunks to 0"]),
        ((1.0,), ["model.position.type=xl", "data.shuffle_block_windows=4"], ["data.shuffle_block_windows", "to 0"]),
        ((0.123457, 0.7654321), [], ["data.sources", "10000", "round"]),
        ((0.0, 1.0), [], ["data.sources.0.weight"]),
    ],
)
def test_refused_mixtures(folders: list[Path], weights: Any, overrides: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as refusal:
        mixed(folders, weights, *overrides)
    assert all(word in str(refusal.value) for word in words), refusal.value


def test_sources_that_do_not_go_together(folders: list[Path], prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.sources\.1\.manifest.*another tokenizer"):
        Sources.load(mixed([folders[0], prepared], (1, 1)))
    (tmp_path / "copy").symlink_to(folders[0])
    with pytest.raises(UserError, match=r"data\.sources\.1\.manifest: is the same data set"):
        Sources.load(mixed([folders[0], tmp_path / "copy"], (1, 1)))
    with pytest.raises(ConfigError, match=r"data\.sources: two sources are called c4"):
        mixed([folders[0], folders[0]], (1, 1))
    with pytest.raises((UserError, DataError), match=r"data\.sources\.1\.manifest: there is no"):
        Sources.load(mixed([folders[0], tmp_path / "nowhere"], (1, 1)))


def test_a_mixture_trains_reports_epochs_and_refuses_other_weights(
    folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pretrain.checkpoint import Checkpoint, list_checkpoints
    from tests.harness import run_ranks

    config = mixed(folders, (0.7, 0.3), "train.steps=3")
    run_ranks(train_runs, 1, [(config, tmp_path / "run")])
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    sizes = Sources.load(config).reader("train", config).sizes
    assert last["epoch/c4"] == pytest.approx(17 / sizes[0]) and last["epoch/pes2o"] == pytest.approx(7 / sizes[1])
    checkpoint = Checkpoint.open(list_checkpoints(tmp_path / "run" / "checkpoints")[-1])
    assert changed_settings(config, checkpoint, Sources.load(config).digest) == {}
    other = mixed(folders, (0.6, 0.4), "train.steps=3")
    with pytest.raises(UserError, match=r"data\.sources \(digest\).*allow_changes"):
        changed_settings(other, checkpoint, Sources.load(other).digest)
    allowed = mixed(folders, (0.6, 0.4), "train.steps=3", 'checkpoint.allow_changes=["data.sources"]')
    assert "data.sources (digest)" in changed_settings(allowed, checkpoint, Sources.load(allowed).digest)
    print_derived(config, 1, Sources.load(config), tmp_path / "run")
    output = capsys.readouterr().out
    assert "source c4" in output and "7 of 10 sequences" in output and "epochs" in output


def test_many_sources_keep_as_many_shards_open_as_the_process_may(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight with 128 each would be more files than most processes may open; tests/pretrain/test_connections.py has the
    numbers."""
    config = mixed(folders, (3, 2, 1))
    monkeypatch.setattr("pretrain.data.sources.open_shards_each", lambda sources: 6 // sources)
    reader = open_sources(config).reader("train", config)
    reader.read(np.arange(reader.num_windows))
    opened = [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert [sum(name.startswith(f"{folder}/") for name in opened) for folder in folders] == [2, 2, 1]
