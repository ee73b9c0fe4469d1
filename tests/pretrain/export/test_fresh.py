"""Exports where only torch, transformers, safetensors and sentencepiece (and accelerate, for Trainer) are installed.

Slow: pip makes an environment, with torch from where this machine's pip looks first. test_modeling.py compares the same
models, fast, in this environment.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.paths import REPOSITORY
from data_prep.cli import main as data_prep
from data_prep.stages.tokenizer import TextTokenizer
from model.language_model import build_model
from pretrain.export.reading import open_export
from pretrain.export.writing import ExportOptions, export
from tests.pretrain.export.models import MODELS, checkpoint_of, config_of, export_of, our_logits, some_tokens

pytestmark = pytest.mark.slow
TRANSFORMERS = ("5.0.0", "5.12.1", "5.24.0")
"""Releases that exports are tested with."""
SAMPLE = REPOSITORY / "data_prep" / "sample"
TOLERANCE = 1e-5


def pinned(package: str) -> str:
    """Its version in the lock."""
    found = re.search(rf"(?m)^{package}==([^\s;]+)", (REPOSITORY / "constraints.txt").read_text())
    assert found is not None
    return found[1]


def run(*line: str | Path) -> str:
    """Output of a command that must end well, without the project on its path."""
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "DS_ACCELERATOR", "TRITON_INTERPRET")}
    done = subprocess.run(list(map(str, line)), capture_output=True, text=True, check=False, env=clean, cwd="/")
    assert done.returncode == 0, f"{line}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a fresh environment, still without transformers."""
    place = tmp_path_factory.mktemp("fresh") / "venv"
    run(sys.executable, "-m", "venv", place)
    packages = [f"{name}=={pinned(name)}" for name in ("torch", "safetensors", "sentencepiece")]
    run(place / "bin" / "python", "-m", "pip", "install", "-q", *packages)
    return place / "bin" / "python"


@pytest.fixture(scope="module")
def documents() -> list[str]:
    """1,000 of the sample."""
    texts = []
    for path in sorted(SAMPLE.glob("*/*train*.json.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            texts += [json.loads(line)["text"] for line in file]
    return texts[:1000]


@pytest.fixture(scope="module")
def exports(prepared: Path, documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with an export of each model and its logits, and one with a tokenizer of the sample, which comes first."""
    place = tmp_path_factory.mktemp("exports")
    data = place / "data"
    settings = [f"output={data}", "workers=1", "tokenizer.vocab_size=2000", "tokenizer.sample_bytes=2000000"]
    overrides = [word for setting in settings for word in ("--set", setting)]
    assert data_prep(["run", "--config", str(REPOSITORY / "configs" / "data" / "sample.json"), *overrides]) == 0
    models: dict[str, Any] = {
        folder: export_of(name, place / folder, prepared)
        for number, name in enumerate(MODELS, start=1)
        for folder in [f"{number}-{name.split(',')[0].replace(' ', '-')}"]
    }
    wide = build_model(config_of("switchall").model_copy(update={"vocab_size": 2000}), seed=0).eval()
    export(checkpoint_of(wide, place / "step-00000001", data), place / "0-sample", ExportOptions())
    for name, model in {**models, "0-sample": wide}.items():
        tokens = some_tokens(3, 33)
        with torch.no_grad():
            logits = our_logits(model, tokens).contiguous()
        save_file({"tokens": tokens, "logits": logits}, place / f"{name}.safetensors")
    (place / "documents.json").write_text(json.dumps(documents))
    return place


@pytest.mark.parametrize("version", TRANSFORMERS)
def test_exports_work_without_this_project(python: Path, exports: Path, documents: list[str], version: str) -> None:
    run(python, "-m", "pip", "install", "-q", f"transformers=={version}", "accelerate")
    found = json.loads(run(python, Path(__file__).with_name("fresh.py"), exports, "--train").splitlines()[-1])
    assert found.pop("versions")["transformers"] == version and found.pop("project") == []
    losses = found.pop("losses")["0-sample"]
    assert len(losses) == 3 and losses[-1] < losses[0]
    assert len(found) == len(MODELS) + 1
    for name, result in found.items():
        assert result.pop("type") == "switchall" and result.pop("generate"), name
        assert set(result) == {"sdpa", "eager", "hidden", "compiled"} and max(result.values()) < TOLERANCE, name

    tokenized = json.loads((exports / "tokenized.json").read_text())
    reference = TextTokenizer.load(exports / "data" / "tokenizer.model")
    assert len(documents) == 1000 and tokenized["ids"] == [reference.encode(text).tolist() for text in documents]
    assert tokenized["lost"] == 0

    tuned = open_export(exports / "tuned")  # what transformers saved, without training.json
    before = load_file(exports / "0-sample" / "model.safetensors")
    after = {name: read() for name, read in tuned.tensors.items()}
    assert after.keys() == before.keys() and not torch.equal(after["head.bias"], before["head.bias"])
