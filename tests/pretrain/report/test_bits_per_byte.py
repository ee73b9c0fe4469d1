"""Validation also says bits per byte of the text, in the event, TensorBoard and the printed lines."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from sentencepiece import SentencePieceProcessor

import pretrain.evaluate
from common.errors import DataError, UserError
from data_prep.cli import main as data_prep
from pretrain.config.schema import Config
from pretrain.data.sources import Sources
from pretrain.data.windows import Windows
from pretrain.evaluate import evaluation_windows, target_counts, unigram_perplexity
from pretrain.parallel.agreement import PeerFailed
from tests.harness import run_ranks
from tests.pretrain.runs import events, light_config, train_and_keep_output, train_runs


def prepare_bytes(folder: Path, type: str = "bytes") -> Path:
    """A small file in the format of Enwik8, prepared as bytes or symbols; returns the folder of the manifest."""
    draw = random.Random(5)
    words = [draw.choice(["the ", "größe ", "[[link]] ", "&amp; ", "\n"]) for _ in range(4000)]
    data = "".join(words).encode()[:12_000]
    (folder / "enwik8").write_bytes(data)
    config = {
        "input": str(folder / "enwik8"),
        "output": str(folder / type),
        "format": "enwik8",
        "split_bytes": [10_000, 1_000, 1_000],
        "workers": 1,
        "tokenizer": {"type": type},
    }
    (folder / "data.json").write_text(json.dumps(config))
    assert data_prep(["run", "--config", str(folder / "data.json")]) == 0
    return folder / type


def bytes_of_targets(data: Path, config: Config) -> int:
    """UTF-8 bytes of what a validation predicts, as SentencePiece decodes it behind a document."""
    model = SentencePieceProcessor(model_file=str(data / "tokenizer.model"))
    reader = Sources.load(config).reader("validation", config)
    size = 0
    for window in evaluation_windows(reader, config).ravel():
        _, targets = reader.read(np.array([window]))
        pieces = [piece for piece in targets[0].tolist() if not model.is_control(piece)]
        before = [model.piece_to_id("\u2581")]  # SentencePiece leaves out a blank at the beginning
        size += len(model.decode(before + before + pieces).encode()) - len(model.decode(before + before).encode())
    return size


def test_bits_per_byte_are_of_the_text_whatever_the_tokens(prepared: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    keys = ("train.steps=2", "evaluate.sequences=8")
    config = light_config(prepare_bytes(tmp_path), "model.vocab_size=256", *keys, "monitor.tensorboard=true")
    pieces = light_config(prepared, *keys)
    symbols = light_config(prepare_bytes(tmp_path, "symbols"), "model.vocab_size=64", *keys)
    runs = [(config, tmp_path / "run"), (pieces, tmp_path / "pieces"), (symbols, tmp_path / "symbols")]
    run_ranks(train_and_keep_output, 1, runs, tmp_path / "out")
    printed = (tmp_path / "out").read_text().splitlines()

    def validation(run: str) -> dict[str, float]:
        return events(tmp_path / run, "validation")[0]

    values = validation("run")
    assert values["bits_per_byte"] == pytest.approx(values["loss"] / math.log(2), rel=1e-12)
    of_pieces = validation("pieces")
    size = bytes_of_targets(prepared, pieces)
    bits = of_pieces["loss"] * of_pieces["tokens"] / math.log(2) / size
    assert of_pieces["bits_per_byte"] == pytest.approx(bits, rel=1e-12) and size > 2 * of_pieces["tokens"]
    of_symbols = validation("symbols")  # a symbol is a byte, whatever its number
    assert of_symbols["bits_per_byte"] == pytest.approx(of_symbols["loss"] / math.log(2), rel=1e-12)
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    (scalar,) = board.Scalars("bits per byte/validation")
    assert scalar.step == 2 and scalar.value == pytest.approx(values["bits_per_byte"], rel=1e-6)
    (line,) = [line for line in printed if f"bits per byte {values['bits_per_byte']:.4f}" in line]
    assert line.startswith("validation after step 2: loss")
    (last,) = [line for line in printed if f"({values['bits_per_byte']:.4f} bits per byte)" in line]
    assert last.startswith("validation perplexity")
    assert sum("bits per byte" in line for line in printed) == 6


def end_without_a_second_look(rank: int, config: Config, run_dir: Path) -> str:
    """How a run ends whose held-out windows cannot be read again."""

    def gone(reader: Windows, windows: np.ndarray) -> np.ndarray:
        raise DataError("validation-00000.tar is gone")

    pretrain.evaluate.target_counts = gone  # this process ends with the test
    try:
        train_runs(rank, [(config, run_dir)])
    except (UserError, PeerFailed) as error:
        return type(error).__name__
    return "trained"


def test_the_first_rank_alone_reads_the_windows_again_and_all_hear_if_it_cannot(prepared: Path, tmp_path: Path) -> None:
    config = light_config(prepared, "train.steps=1", "evaluate.sequences=8", ranks=2)
    assert run_ranks(end_without_a_second_look, 2, config, tmp_path / "run") == ["DataError", "PeerFailed"]


def test_the_unigram_perplexity_counts_each_window_once_and_none_of_a_stream_that_has_ended() -> None:
    class Reader:
        def read(self, windows: np.ndarray) -> tuple[None, torch.Tensor]:
            return None, torch.tensor([[0, 0, 0, 7], [1, 1, 2, 9], [1, 1, 1, 1]])[windows]

    frequencies = np.array([3, 2, 1, 1, 1]) / 8
    expected = math.exp(-float((frequencies * np.log(frequencies)).sum()))
    found = target_counts(Reader(), np.array([[0, 1], [-1, -1]]))  # type: ignore[arg-type]
    assert unigram_perplexity(found) == pytest.approx(expected, rel=1e-12)
