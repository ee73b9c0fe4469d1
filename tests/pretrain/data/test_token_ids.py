"""A run on ids that came as ids is the run on their text."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from data_prep.cli import main as data_prep
from data_prep.shards.format import Manifest
from data_prep.shards.reader import SplitReader
from pretrain.cli.generate import main as generate
from tests.harness import run_ranks
from tests.pretrain.runs import curve, small_config, train_runs


def test_training_on_ids_gives_the_losses_of_their_text_and_a_model_that_writes(prepared: Path, tmp_path: Path) -> None:
    """In the order of the files: shuffled, the order would follow from the digest, in which the raw files are."""
    manifest = Manifest.load(prepared)
    eos = manifest.tokenizer.eos_id
    assert eos is not None
    for split in ("train", "validation"):
        with SplitReader(manifest, split, verify_on_first_read=True) as reader:
            documents = [reader.document(number) for number in range(reader.num_documents)]
        ended = [np.append(ids, eos) for ids in documents]
        np.save(tmp_path / f"{split}.npy", np.concatenate(ended).astype(np.uint16))
    config = {
        "format": "token_array",
        "input": str(tmp_path / "train.npy"),
        "validation_input": str(tmp_path / "validation.npy"),
        "output": str(tmp_path / "data"),
        "workers": 1,
        "tokenizer": {"model": str(prepared / "tokenizer.model")},
    }
    (tmp_path / "data.json").write_text(json.dumps(config))
    assert data_prep(["run", "--config", str(tmp_path / "data.json")]) == 0
    settings = ("data.order=streams", "train.steps=3", "evaluate.sequences=8")
    folders = {"text": prepared, "ids": tmp_path / "data"}
    run_ranks(train_runs, 1, [(small_config(folders[name], *settings), tmp_path / name) for name in folders])
    assert curve(tmp_path / "ids") == curve(tmp_path / "text")
    assert len(curve(tmp_path / "ids")) == 3
    assert generate([str(tmp_path / "ids"), "--prompt", "a", "--tokens", "3"]) == 0
