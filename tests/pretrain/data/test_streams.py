"""Transformer-XL data: contiguous streams in training, parallel streams with memory in validation."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from common.errors import ConfigError, UserError
from data_prep.shards.format import Manifest
from model.language_model import build_model
from pretrain.checkpoint import Checkpoint, list_checkpoints
from pretrain.cli.evaluate import main as evaluate_checkpoint
from pretrain.config.loading import to_json
from pretrain.config.schema import Config
from pretrain.data.progress import Progress
from pretrain.data.sources import open_sources
from pretrain.data.stages import first_stage
from pretrain.data.windows import TrainingStream, WindowReader
from pretrain.engine.gradient_norm import GradientNorm
from pretrain.engine.micro_steps import PlainExecutor
from pretrain.evaluate import evaluate, evaluation_windows
from pretrain.export.origin import evaluations_of
from pretrain.parallel.context import parallel_context
from pretrain.resumed_stages import stages_of
from tests.corpus import prepare_corpus
from tests.harness import run_ranks
from tests.pretrain.runs import light_config, small_config, train_runs

XL = ("model.position.type=xl",)


def reader_of(config: Config, split: str) -> WindowReader:
    manifest = Manifest.load(config.data.manifest)
    return WindowReader(manifest, split, config.model.sequence_length)


def test_a_stream_is_contiguous_text_and_begins_again_with_the_others(prepared: Path) -> None:
    config = small_config(prepared, *XL, "batch.micro_sequences=2")
    reader, G, T = reader_of(config, "train"), 8, 16
    ranks = [TrainingStream(reader, config, data_rank=rank, data_size=2) for rank in (0, 1)]
    chunks = reader.num_windows // G
    texts: dict[int, list[torch.Tensor]] = {s: [] for s in range(G)}
    for step in range(3):
        for stream in ranks:
            for micro_step in range(stream.micro_steps):
                batch = stream.batch(step * G, micro_step)
                for index, tokens, targets in zip(batch.sequence_index, batch.tokens, batch.targets, strict=True):
                    texts[int(index) % G].append(tokens)
                    assert torch.equal(tokens[1:], targets[:-1])
    whole = torch.cat([reader.read(np.array([w]))[0][0] for w in range(reader.num_windows)])
    for s, parts in texts.items():
        assert torch.equal(torch.cat(parts), whole[s * chunks * T : s * chunks * T + 3 * T])
    for stream in ranks:
        read = [stream.batch(0, micro_step).sequence_index for micro_step in range(stream.micro_steps)]
        assert torch.equal(stream.streams(), torch.cat(read))
    assert sorted(torch.cat([stream.streams() for stream in ranks]).tolist()) == list(range(G))
    begins = [step for step in range(2 * chunks + 1) if ranks[0].begins(step * G)]
    assert begins == [0, chunks, 2 * chunks]
    epoch = ranks[0].windows(np.arange(chunks * G))
    assert sorted(epoch.tolist()) == list(range(chunks * G)), "every window once an epoch"
    assert np.array_equal(ranks[0].windows(np.arange(G) + chunks * G), ranks[0].windows(np.arange(G)))
    assert [ranks[0].epoch(chunks * G)] == ranks[0].source_epochs(chunks * G) == [1.0]


@pytest.mark.parametrize("length, place", [(32, 3), (8, 10), (20, 4)])
def test_streams_go_on_in_their_text_where_windows_become_longer_or_shorter(
    prepared: Path, length: int, place: int
) -> None:
    """After 3 steps of 8 sequences of 16 tokens: nothing is read again, and less than a window of a stream passed
    over. The batch changes too, so the first position of the stage is no multiple of the number of streams."""
    T, G, first = 16, 5, 3 * 8
    batch = (f"batch.global_sequences={G}", f"batch.micro_sequences={G}")
    config = small_config(prepared, "data.order=streams", f"model.sequence_length={length}", *batch)
    sources, reader = open_sources(config), reader_of(config, "train")
    begun = sources.stage()
    # As if the 24 windows had been read of 5 streams: 4.8 of each, of 16 tokens.
    stage = begun.followed_by(first, begun.sources).in_windows_of(length, before=T)
    stream = TrainingStream(reader, config, data_rank=0, data_size=1, stage=stage)
    chunks = reader.num_windows // G
    expected = [s * chunks + place + step for step in range(2) for s in range(G)]
    assert stream.windows(np.arange(first, first + 2 * G)).tolist() == expected
    assert stream.epoch(first) == pytest.approx(place / chunks)
    assert 0 <= place * length - 4.8 * T < length
    assert stream.range_of(first + 1, 1) == (first, first + G)
    begins = [step for step in range(2 * chunks) if stream.begins(first + step * G)]
    assert begins == [chunks - place, 2 * chunks - place]


@pytest.mark.parametrize("batches", [(8, 16), (8, 4), (8, 6, 10), (8, 16, 8)])
def test_another_batch_reads_every_window_once_in_the_streams_that_there_were(
    prepared: Path, batches: tuple[int, ...]
) -> None:
    """Three steps of each batch but the last, with a start from a checkpoint between them."""
    stage, read, progress, saved = None, list[int](), Progress(0, 0), None
    for size in batches:
        keys = (f"batch.global_sequences={size}", f"batch.micro_sequences={size}")
        config = small_config(prepared, "data.order=streams", *keys)
        sources, reader = open_sources(config), reader_of(config, "train")
        if saved is not None:
            checkpoint: Any = SimpleNamespace(progress=progress, state=saved)
            (stage,) = stages_of(checkpoint, sources, config)
        stream = TrainingStream(reader, config, data_rank=0, data_size=1, stage=stage)
        placed = reader.num_windows // batches[0] * batches[0]
        steps = 3 if size != batches[-1] or saved is None else -(-(placed - progress.position) // size)
        for _ in range(steps):
            read += stream.windows(stream.own_positions(progress.consumed_sequences, 0)).tolist()
            progress = progress.after_step(size, updated=True)
        assert stream.epoch(progress.consumed_sequences) == pytest.approx(len(read) / placed)
        progress = replace(progress, stages=(stream.stage,))
        progress = Progress.from_json(json.loads(json.dumps(progress.to_json())))
        saved = {"config": to_json(config), "manifest_digest": sources.digest}
    assert sorted(read[:placed]) == list(range(placed))
    assert set(read[placed:]) <= {s * (placed // batches[0]) for s in range(batches[0])} and len(read) - placed < 16


def test_streams_begin_behind_steps_that_a_rollback_left_out(prepared: Path) -> None:
    """Memory would hold the text before the gap. What is left out are whole steps, of every stream the same ones."""
    config = small_config(prepared, *XL)
    stream = TrainingStream(reader_of(config, "train"), config, data_rank=0, data_size=1, skipped=((16, 32),))
    assert [step for step in range(6) if stream.begins(step * 8)] == [0, 2]
    assert [stream.own_positions(step * 8, 0)[0] for step in range(4)] == [0, 8, 32, 40]
    behind = TrainingStream(reader_of(config, "train"), config, data_rank=0, data_size=1, skipped=((0, 24),))
    assert behind.streams().tolist() == list(range(8)) and behind.own_positions(0, 0)[0] == 24
    assert stream.range_of(8, 8) == (8, 16) and stream.range_of(8, 16) == (8, 40) and stream.range_of(19, 2) == (32, 40)


@pytest.mark.parametrize("order", ["streams", "shuffled"])
def test_longer_sequences_begin_another_stage(prepared: Path, order: str) -> None:
    """Each source stands after as many tokens as before, rounded up to a window."""
    stage = first_stage(["a", "b"], ["0a", "0b"], [2, 1])
    saved = {"manifest_digest": "d", "config": {"model": {"sequence_length": 7}}}
    checkpoint: Any = SimpleNamespace(progress=Progress(3, 24, stages=(stage,)), state=saved)
    sources: Any = SimpleNamespace(stage=lambda: stage, digest="d")
    before, now = stages_of(checkpoint, sources, small_config(prepared, f"data.order={order}"))  # of 16 tokens
    assert before == stage and now.first == 24
    assert [source.read for source in now.sources] == [7, 4]  # 16 and 8 windows of 7 tokens: 112 and 56


def test_other_models_are_shuffled_as_before_and_never_begin(prepared: Path) -> None:
    config = small_config(prepared, "model.position.type=xl", "model.position.memory_chunks=0")
    stream = TrainingStream(reader_of(config, "train"), config, data_rank=0, data_size=1)
    assert not stream.begins(0)
    windows = stream.windows(np.arange(64))
    assert len(set(windows.tolist())) == 64 and (np.diff(windows) != 1).any()


def test_models_without_memory_read_the_same_streams_where_they_are_asked_for(prepared: Path) -> None:
    """The published RoPE runs: windows in the order of the text, 8 streams, no memory to forget."""
    config = small_config(prepared, "data.order=streams")
    stream = TrainingStream(reader_of(config, "train"), config, data_rank=0, data_size=1)
    with_memory = small_config(prepared, *XL)
    other = TrainingStream(reader_of(with_memory, "train"), with_memory, data_rank=0, data_size=1)
    positions = np.arange(3 * 8)
    assert np.array_equal(stream.windows(positions), other.windows(positions))
    assert (np.diff(stream.windows(positions).reshape(3, 8), axis=0) == 1).all()
    with pytest.raises(ConfigError, match=r"data\.order: memory reads contiguous streams"):
        small_config(prepared, *XL, "data.order=shuffled")
    with pytest.raises(ConfigError, match=r"data\.shuffle_block_windows: data\.order is streams, nothing is shuffled"):
        small_config(prepared, "data.order=streams", "data.shuffle_block_windows=4")


def test_max_tokens_decides_where_streams_begin(prepared: Path) -> None:
    """8 streams of 5 windows of 16 tokens, as if the split ended there; one token after them is the last target."""
    config = small_config(prepared, *XL, "data.max_tokens=655")  # 40 windows and a rest that is none
    reader = open_sources(config).reader("train", config)
    assert reader.num_windows == 40
    stream = TrainingStream(reader, config, data_rank=0, data_size=1)
    assert stream.windows(np.arange(8)).tolist() == [0, 5, 10, 15, 20, 25, 30, 35]
    assert stream.begins(5 * 8) and not stream.begins(4 * 8)
    held_out = open_sources(config).reader("validation", config)
    assert held_out.num_windows == reader_of(config, "validation").num_windows
    total = Manifest.load(prepared).num_tokens("train")
    all_but_one = (total - 1) // 16 * 16
    assert open_sources(small_config(prepared, f"data.max_tokens={all_but_one}"))
    with pytest.raises(
        UserError,
        match=rf"data\.max_tokens: the run would read the first {total + 16:,} tokens, but .* holds {total:,}",
    ):
        open_sources(small_config(prepared, f"data.max_tokens={total + 16}"))
    with pytest.raises(UserError, match=r"data\.max_tokens: 15 is less than one window of model\.sequence_length = 16"):
        open_sources(small_config(prepared, "data.max_tokens=15"))
    with pytest.raises(UserError, match=r"batch\.global_sequences: 8 streams with memory need a window each"):
        open_sources(small_config(prepared, *XL, "data.max_tokens=112"))
    sources = json.dumps([{"manifest": str(prepared), "weight": 1}])
    with pytest.raises(ConfigError, match=r"data\.max_tokens: limits one data set"):
        small_config(prepared, "data.max_tokens=640", f"data.sources={sources}")


def test_too_few_windows_for_the_streams_is_refused(prepared: Path) -> None:
    config = small_config(prepared, *XL, "batch.global_sequences=100000", "batch.micro_sequences=10")
    with pytest.raises(UserError, match=r"batch\.global_sequences: 100000 streams with memory need a window each"):
        open_sources(config)


def test_validation_windows_are_parallel_streams_with_memory_and_single_windows_without(prepared: Path) -> None:
    config = small_config(prepared, *XL, "evaluate.sequences=20", "evaluate.streams=6")
    reader = reader_of(config, "validation")
    windows = evaluation_windows(reader, config)
    assert windows.shape == (4, 6) and (windows[:3] >= 0).all() and (windows[3] >= 0).sum() == 2
    assert len(set(windows[windows >= 0].tolist())) == 20 and windows.max() < reader.num_windows
    assert (np.diff(windows[:3], axis=0) == 1).all()
    alone = evaluation_windows(reader, small_config(prepared, "evaluate.sequences=20"))
    assert alone.tolist() == [[i * reader.num_windows // 20 for i in range(20)]]
    everything = evaluation_windows(reader, small_config(prepared, *XL, "evaluate.sequences=1000000"))
    assert sorted(everything[everything >= 0].tolist()) == list(range(reader.num_windows))
    assert evaluation_windows(reader, small_config(prepared, *XL, "evaluate.sequences=100")).shape == (2, 50)


def test_windows_from_the_start_are_streams_of_one_length(prepared: Path) -> None:
    """As the authors' sampler deals them: stream b of n reads windows b c .. b c + c - 1, c = windows // n."""
    start = ("evaluate.placement=start", "evaluate.streams=6")
    with_memory = small_config(prepared, *XL, *start, "evaluate.sequences=20")
    reader = reader_of(with_memory, "validation")
    windows = evaluation_windows(reader, with_memory)
    assert windows.T.tolist() == [[3 * b, 3 * b + 1, 3 * b + 2] for b in range(6)]
    alone = evaluation_windows(reader, small_config(prepared, *start, "evaluate.sequences=20"))
    assert alone.tolist() == [list(range(18))], "the same windows without memory"
    everything = evaluation_windows(reader, small_config(prepared, *XL, *start, "evaluate.sequences=1000000"))
    assert everything.shape == (reader.num_windows // 6, 6) and everything.max() == everything.size - 1
    few = evaluation_windows(reader, small_config(prepared, *XL, *start, "evaluate.sequences=7"))
    assert few.T.tolist() == [[0, 1], [2, 3], [4, 5]], "a stream of one window would not use the memory"


@pytest.mark.parametrize("ranks", [1, 2])
def test_validation_with_memory_equals_one_long_sequence(prepared: Path, ranks: int) -> None:
    """2 streams of 4 and 3 chunks with 3 chunks of memory, also where a block of streams is not full: the mean
    cross-entropy of sequences four times as long, but for the last chunk of the first."""
    keys = ("evaluate.sequences=7", "evaluate.streams=2", "batch.global_sequences=12")
    configs = [
        small_config(prepared, *XL, "model.position.memory_chunks=3", *keys, f"batch.micro_sequences={micro}")
        for micro in (1, 2, 3)
    ]
    reader = reader_of(configs[0], "validation")
    long = small_config(prepared, *XL, "model.position.memory_chunks=0", "model.sequence_length=64", *keys)
    windows = evaluation_windows(reader, configs[0])
    network, losses = build_model(long.model, seed=0).eval(), []
    for column in windows.T:
        tokens, targets = (t.reshape(1, -1) for t in reader.read(column[column >= 0]))
        losses.append(torch.nn.functional.cross_entropy(network.logits(tokens)[0][0], targets[0], reduction="sum"))
    expected = float(sum(losses)) / (7 * 16)
    for results in run_ranks(validation_losses, ranks, configs):
        for values in results:
            assert values["loss"] == pytest.approx(expected, rel=1e-6)
            assert values["tokens"] == 7 * 16


@pytest.fixture(scope="module")
def with_test_split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_corpus(tmp_path_factory.mktemp("splits"), documents=100, test_documents=40)


@pytest.mark.parametrize("ranks", [1, 3])
def test_the_test_split_from_its_start_as_published(with_test_split: Path, ranks: int) -> None:
    """3 streams of 4 windows with 3 chunks of memory: sequences four times as long; rotary positions: each of the same
    12 windows by itself. Whatever the ranks and micro-batches, some of which are not full."""
    published = ("evaluate.split=test", "evaluate.placement=start", "evaluate.sequences=14", "evaluate.streams=3")
    batch = ("batch.global_sequences=12", "batch.micro_sequences=2")
    memory = small_config(with_test_split, *XL, "model.position.memory_chunks=3", *published, *batch)
    rope = small_config(with_test_split, *published, *batch)
    text = reader_of(memory, "test").read(np.arange(12))
    expected = []
    for config, shape in ((memory, (3, 64)), (rope, (12, 16))):
        keys = ("model.position.memory_chunks=0",) if config is memory else ()
        model = small_config(with_test_split, *(XL if keys else ()), *keys, f"model.sequence_length={shape[1]}").model
        tokens, targets = (part.reshape(shape) for part in text)
        with torch.no_grad():
            logits = build_model(model, seed=0).eval().logits(tokens)[0]
        expected.append(float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())))
    for results in run_ranks(validation_losses, ranks, [memory, rope]):
        assert [values["tokens"] for values in results] == [12 * 16, 12 * 16]
        assert [values["loss"] for values in results] == pytest.approx(expected, rel=1e-6)
    of_validation = reader_of(memory, "validation").read(np.arange(12))
    assert not torch.equal(of_validation[0], text[0])


def test_the_evaluation_of_one_split_replaces_none_of_the_other(with_test_split: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_ranks(train_runs, 1, [(light_config(with_test_split, "train.steps=1", "evaluate.sequences=4"), run)])
    for split in ("validation", "test"):
        assert evaluate_checkpoint([str(run), "--set", f"evaluate.split={split}"]) == 0
    (checkpoint,) = list_checkpoints(run / "checkpoints")
    folder = run / "evaluation" / checkpoint.name
    assert sorted(path.name for path in folder.iterdir()) == ["test.json", "validation.json"]
    assert [one["split"] for one in evaluations_of(Checkpoint.open(checkpoint))] == ["test", "validation"]


def test_a_split_that_is_not_there_is_named(prepared: Path) -> None:
    config = small_config(prepared, "evaluate.split=test")
    with pytest.raises(UserError, match=r"evaluate\.split: .* has no test split, only train and validation; set it to"):
        open_sources(config)
    assert open_sources(small_config(prepared, "evaluate.split=test", "evaluate.sequences=0"))


def test_data_that_are_not_there_name_the_configuration_that_prepares_them() -> None:
    """data/paper/c4 is prepared by configs/data/paper/c4.json, not by the modern recipe's configs/data/c4.json."""
    for folder, recipe in (("paper/c4", "paper/c4"), ("paper/enwik8", "paper/enwik8")):
        config = small_config(Path("data") / folder)
        with pytest.raises(UserError, match=rf"data\.manifest: there is no .*--config configs/data/{recipe}\.json"):
            open_sources(config)


@pytest.mark.parametrize(
    "manifest, command",
    [
        ("data/c4_32k", "configs/data/c4_32k.json"),  # where its configuration writes
        ("/shared/data/c4_32k", "configs/data/c4_32k.json --set output=/shared/data/c4_32k"),
        ("/my data/own/manifest.json", "configs/data/own.json --set 'output=/my data/own'"),
        ("elsewhere/mine", "FILE, one of configs/data or your own --set output=elsewhere/mine"),
    ],
)
def test_the_command_that_prepares_them_writes_where_the_run_reads(manifest: str, command: str) -> None:
    with pytest.raises(UserError, match=rf"-m data_prep run --config {re.escape(command)}$"):
        open_sources(small_config(Path(manifest)))


def validation_losses(rank: int, configs: list[Config]) -> list[dict[str, float] | None]:
    """On every rank: `evaluate` of an untrained model, seed 0."""
    found = []
    for config in configs:
        network, parallel = build_model(config.model, seed=0), parallel_context(config)
        engine = _Engine(network)
        run = PlainExecutor(engine, GradientNorm(engine, 0.0, parallel))
        reader = reader_of(config, config.evaluate.split)
        found.append(evaluate(run, reader, config, parallel, torch.device("cpu")))
    return found


class _Engine(SimpleNamespace):
    """What an evaluation uses of a DeepSpeed engine."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__(module=module, eval=module.eval, train=module.train)

    def __call__(self, *batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.module(*batch)
