"""Gathers what a GPU machine without network and without git lacks, in .carry/, which git ignores:

    python -m benchmarks.gpu carry [--python 3.12] [--skip-wheels] [--text data/NAME]

.carry/wheels           what training needs beyond torch, numpy, safetensors and sentencepiece, pinned as in
                        constraints.txt, for Linux on x86-64; DeepSpeed is built without operators: pure Python
.carry/data             two small data sets of random tokens, for `python -m benchmarks.gpu run`, and the text of --text
.carry/tiny_losses.json the losses of switchall_tiny on this machine's CPU, to which a GPU's are compared
.carry/REVISION         git's revision

There:  python -m pip install --no-index --no-deps --target .site .carry/wheels/*.whl && export PYTHONPATH=.site
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu import record
from benchmarks.gpu.record import ROOT
from common.errors import DataError

FOLDER = ROOT / ".carry"
LOSSES = "tiny_losses.json"
BINARY = ("pydantic", "pydantic-core", "annotated-types", "typing-inspection", "hjson", "megatron-core")
PURE = "deepspeed"
"""Published as source alone."""
PLATFORMS = (*(f"manylinux_2_{minor}_x86_64" for minor in (35, 34, 31, 28, 27, 24, 17)), "manylinux2014_x86_64")
"""pip matches each name exactly."""
DATA = {"8k": 8000, "32k": 32000}
"""Folder -> vocabulary."""
NUM_TOKENS = 1_000_000
TEXT = "text"
"""Folder of the text for `quality`, of 8,000 pieces."""


def add_command(commands: Any) -> None:
    what = "gather wheels, data, losses of the CPU and the revision for a machine without network"
    parser = commands.add_parser("carry", help=what, description=what)
    parser.add_argument("--python", default="3.12", help="Python of the machine with the GPU (default 3.12)")
    parser.add_argument("--skip-wheels", action="store_true", help="where everything is installed there")
    parser.add_argument("--text", type=Path, metavar="FOLDER", help="a prepared text too, for the part `quality`")
    parser.set_defaults(act=act)


def act(options: argparse.Namespace) -> int:
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "REVISION").write_text(record.revision() + "\n", encoding="utf-8")
    if not options.skip_wheels:
        gather_wheels(FOLDER / "wheels", options.python)
    for name, vocab_size in DATA.items():
        write_data(FOLDER / "data" / name, vocab_size, NUM_TOKENS)
    if options.text is not None:
        copy_text(options.text, FOLDER / "data" / TEXT)
    from benchmarks.gpu import run

    run.record_losses(FOLDER)
    print(f"{FOLDER}: {sum(p.stat().st_size for p in FOLDER.rglob('*') if p.is_file()) / 1e6:.1f} MB")
    return 0


def copy_text(source: Path, target: Path) -> None:
    """A prepared data set, whole. DataError for a folder that is none."""
    if not (source / "manifest.json").is_file():
        raise DataError(f"--text: {source} has no manifest.json: name a folder that `data_prep run` wrote")
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)


def pins(text: str) -> dict[str, str]:
    """Package -> version, of constraints.txt."""
    return dict(re.findall(r"^([\w.-]+)==([\w.+]+)", text, re.MULTILINE))


def gather_wheels(folder: Path, python: str) -> None:
    """One version of each; wheels of other versions are removed. Raises subprocess.CalledProcessError."""
    folder.mkdir(parents=True, exist_ok=True)
    versions = pins((ROOT / "constraints.txt").read_text(encoding="utf-8"))
    wanted = {name: versions[name] for name in (*BINARY, PURE)}
    for path in folder.glob("*.whl"):
        path.unlink()
    for line, variables in wheel_commands(folder, python, wanted):
        subprocess.run(line, env=os.environ | variables, check=True)
    found = {path.name.split("-")[0].replace("_", "-"): path.name.split("-")[1] for path in folder.glob("*.whl")}
    assert found == wanted, f"pip gave {found}, wanted {wanted}"


def wheel_commands(folder: Path, python: str, versions: dict[str, str]) -> list[tuple[list[str], dict[str, str]]]:
    """Command lines of pip, each with the variables that it needs."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    download = [*pip, "download", "--no-deps", "--only-binary=:all:", "--python-version", python]
    download += ["--implementation", "cp", "--dest", str(folder)]
    for platform in PLATFORMS:
        download += ["--platform", platform]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    return [
        (download + [f"{name}=={versions[name]}" for name in BINARY], {}),
        ([*build, f"{PURE}=={versions[PURE]}"], {"DS_BUILD_OPS": "0", "DS_ACCELERATOR": "cpu"}),
    ]


def write_data(folder: Path, vocab_size: int, num_tokens: int) -> None:
    """A manifest and one shard of documents whose ids are as frequent as their rank says, 1 / (rank + 10), so that a
    model learns something at once. The same arguments give the same bytes."""
    import numpy as np

    from data_prep.shards.writer import ShardWriter, write_manifest

    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    odds = 1.0 / (np.arange(2, vocab_size) + 10.0)
    writer = ShardWriter(folder, "train-00000", dtype=np.dtype("<u2"), tokens_per_member=131_072)
    while writer.tokens < num_tokens:
        ids = draw.choice(np.arange(2, vocab_size), int(draw.integers(100, 900)), p=odds / odds.sum())
        writer.add_documents(np.append(ids, 1), np.array([len(ids) + 1]))
    entry = writer.finish()
    (folder / "tokenizer.model").write_bytes(b"stand-in")
    totals = {"documents": entry.documents, "tokens": entry.tokens, "text_bytes": 4 * entry.tokens}
    tokenizer = {"file": "tokenizer.model", "sha256": hashlib.sha256(b"stand-in").hexdigest(), "eos_id": 1}
    body = {
        "format_version": 1,
        "dtype": "uint16",
        "tokenizer": tokenizer | {"vocab_size": vocab_size},
        "splits": {"train": [entry.model_dump()], "validation": []},
        "totals": {"train": totals, "validation": {"documents": 0, "tokens": 0, "text_bytes": 0}},
        "provenance": {"inputs": [], "config": {}, "versions": {}},
    }
    write_manifest(folder, body)
