"""Other tools for preparing data, as benchmarks/data/preparation.py starts them: each in the environment of its own."""

from __future__ import annotations

import functools
import gzip
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from benchmarks.data import outputs
from benchmarks.data.outputs import Written
from benchmarks.data.process_cost import ONE_THREAD, Cost, measure
from common.errors import UserError

VOCAB_SIZE = 8000
SAMPLE_BYTES = 10_000_000
"""Of text, on which a BPE tokenizer is trained."""
OFFLINE = {**ONE_THREAD, "HF_HUB_OFFLINE": "1"}

TRAIN_TOKENIZER = """
import sys
from tokenizers import Tokenizer, models, trainers, pre_tokenizers, decoders
tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
tokenizer.decoder = decoders.ByteLevel()
trainer = trainers.BpeTrainer(vocab_size=int(sys.argv[3]), special_tokens=["<|endoftext|>"],
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
tokenizer.train([sys.argv[1]], trainer)
tokenizer.save(sys.argv[2])
"""

RUN_DATATROVE = """
import sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer
if __name__ == "__main__":
    folder, tokenizer, output = sys.argv[1:4]
    LocalPipelineExecutor(
        pipeline=[
            JsonlReader(folder, glob_pattern="*.json.gz"),
            DocumentTokenizer(output, tokenizer_name_or_path=tokenizer, eos_token="<|endoftext|>",
                              shuffle_documents=False, batch_size=1000),
        ],
        tasks=1, workers=1, logging_dir=output + "-logs",
    ).run()
"""


class Tool(NamedTuple):
    """What prepares the raw files once."""

    version: str
    run: Callable[[], Cost]
    """Into an empty folder."""
    written: Callable[[], Written]
    """Of the last run."""


def version_of(package: str, python: str) -> str:
    """Of a package and the tokenizers library, in the environment of the interpreter `python`. Raises UserError."""
    names = package, "tokenizers"
    code = f"from importlib.metadata import version; print(*(f'{{name}} {{version(name)}}' for name in {names}))"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(
            f"--{package}: {python} is no Python that has {package} and tokenizers; "
            "make it with the commands of python -m benchmarks.data.preparation --help"
        ) from error
    return done.stdout.strip()


def peers(paths: list[Path], work: Path, pythons: dict[str, str]) -> dict[str, Tool]:
    """Those of datatrove and dolma whose interpreter is given, by name. Both take one tokenizer of the same kind."""
    versions = {package: version_of(package, python) for package, python in pythons.items()}
    if not pythons:
        return {}
    tokenizer, sample = work / "tokenizer.json", work / "sample.txt"
    _write_sample(paths, sample)
    # By the older of the tokenizers libraries, whose file the newer reads too; dolma 1.2.1 wants 0.19 or less.
    trainer = pythons.get("dolma") or pythons["datatrove"]
    train = [trainer, "-c", TRAIN_TOKENIZER, str(sample), str(tokenizer), str(VOCAB_SIZE)]
    measure(train, log=work / "train.log", environment=ONE_THREAD)
    tools = {}
    for package, start, names in (("datatrove", _datatrove, "*.ds"), ("dolma", _dolma, "*.npy")):
        if package in pythons:
            written = functools.partial(outputs.byte_level, work / package, names, tokenizer)
            tools[package] = Tool(versions[package], start(paths, work, pythons[package], tokenizer), written)
    return tools


def _datatrove(paths: list[Path], work: Path, python: str, tokenizer: Path) -> Callable[[], Cost]:
    inputs, program = work / "input", work / "run_datatrove.py"
    inputs.mkdir()
    for path in paths:
        (inputs / path.name).symlink_to(path.resolve())
    program.write_text(RUN_DATATROVE, encoding="utf-8")
    command = [python, str(program), str(inputs), str(tokenizer)]
    return lambda: measure([*command, _fresh(work / "datatrove")], log=work / "datatrove.log", environment=OFFLINE)


def _dolma(paths: list[Path], work: Path, python: str, tokenizer: Path) -> Callable[[], Cost]:
    inputs = work / "with-ids"
    _write_with_ids(paths, inputs)
    command = [python, "-m", "dolma.cli", "tokens", "--documents", str(inputs / "*.json.gz")]
    command += ["--tokenizer.name_or_path", str(tokenizer), "--tokenizer.eos_token_id", "0"]
    command += ["--dtype", "uint16", "--processes", "1"]
    return lambda: measure(
        [*command, "--destination", _fresh(work / "dolma")], log=work / "dolma.log", environment=OFFLINE
    )


def _write_sample(paths: list[Path], target: Path) -> None:
    """The first documents as plain text."""
    written = 0
    with gzip.open(paths[0], "rt", encoding="utf-8") as stream, target.open("w", encoding="utf-8") as output:
        for line in stream:
            written += output.write(json.loads(line)["text"] + "\n")
            if written >= SAMPLE_BYTES:
                return


def _write_with_ids(paths: list[Path], folder: Path) -> None:
    """The same documents with the key `id`, without which dolma passes over a line."""
    folder.mkdir()
    for path in paths:
        with gzip.open(path, "rt", encoding="utf-8") as source, gzip.open(folder / path.name, "wt", 6) as target:
            for number, line in enumerate(source):
                target.write(json.dumps({"id": f"{path.name}:{number}", **json.loads(line)}) + "\n")


def _fresh(folder: Path) -> str:
    for path in (folder, Path(f"{folder}-logs")):
        shutil.rmtree(path, ignore_errors=True)
    return str(folder)
