r"""Data preparation, measured: throughput per CPU-second beside datatrove and dolma, scaling, and memory.

    python benchmarks/corpus/build.py corpus                                        # 100 MB of text, once
    python -m venv peers && peers/bin/pip install "datatrove[io]" tokenizers
    python -m venv peers-dolma && peers-dolma/bin/pip install dolma==1.2.1 s3fs==2023.6.0 aiobotocore==2.5.4 \
        botocore==1.31.17 boto3==1.28.17        # pinned: alone, pip tries one boto3 after the other
    python -m benchmarks.data_prep throughput "corpus/*.json.gz" \
        --datatrove peers/bin/python --dolma peers-dolma/bin/python
    python -m benchmarks.data_prep memory "corpus/*.json.gz"

throughput: the same raw files through each tool, read, tokenised and written, no filter, no deduplication, one process;
the vocabulary has as many pieces in all. CPU seconds are user and system time of the process and its children, start-up
included; text is UTF-8 bytes of the documents. Tools run one after the other, `--repeats` times; the best counts.
Megatron-LM's tools/preprocess_data.py is not among them: the megatron-core package does not hold it.
memory: the largest sum of resident memory over all processes, with filters and deduplication, on 50 MB and on 500 MB.
"""

import argparse
import contextlib
import glob
import gzip
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.paths import REPOSITORY
from common.tables import text_table

VOCAB_SIZE = 8000
SAMPLE_BYTES = {"bpe": 10_000_000, "unigram": 2_000_000}  # unigram trains 30 times slower
ONE_THREAD = {"RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

TRAIN_HF = """
import sys, tokenizers
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


@dataclass(frozen=True)
class Cost:
    """What a command used."""

    cpu_seconds: float
    seconds: float
    peak_bytes: int
    """Largest sum of resident memory over the process and its children, sampled every 50 ms."""


def measure(command: list[str], *, log: Path, environment: dict[str, str] | None = None) -> Cost:
    """Runs a command to its end. Raises RuntimeError with the end of its output if it fails."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, cwd=REPOSITORY, env={**os.environ, **(environment or {})}
        )
        with _sampled_memory(process.pid) as peak:
            code = process.wait()
    if code:
        raise RuntimeError(f"{command[:4]} failed: {log.read_text(errors='replace')[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return Cost(cpu, time.monotonic() - started, peak[0])


@contextlib.contextmanager
def _sampled_memory(root: int) -> Iterator[list[int]]:
    peak, done = [0], threading.Event()

    def sample() -> None:
        while not done.wait(0.05):
            peak[0] = max(peak[0], sum(_resident_bytes(pid) for pid in _family(root)))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    yield peak
    done.set()
    thread.join()


def _family(root: int) -> set[int]:
    """A process and all its descendants."""
    parents = {}
    for path in glob.glob("/proc/[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = Path(path).read_text().rpartition(")")[2].split()
            parents[int(path.split("/")[2])] = int(fields[1])
    family = {root}
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    return family


def _resident_bytes(pid: int) -> int:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()
    return 0


def text_bytes(paths: list[Path]) -> int:
    """UTF-8 bytes of all documents."""
    total = 0
    for path in paths:
        with gzip.open(path) as stream:
            total += sum(len(json.loads(line)["text"].encode()) for line in stream)
    return total


def write_sample(paths: list[Path], target: Path, size: int) -> None:
    """The first documents as plain text, for training the peers' tokenizer."""
    written = 0
    with gzip.open(paths[0], "rt", encoding="utf-8") as stream, target.open("w", encoding="utf-8") as output:
        for line in stream:
            written += output.write(json.loads(line)["text"] + "\n")
            if written >= size:
                return


def config(work: Path, name: str, paths: list[Path], **keys: Any) -> Path:
    """A configuration file."""
    body = {"input": [str(path) for path in paths], "output": str(work / name), "workers": 1, **keys}
    (work / f"{name}.json").write_text(json.dumps(body))
    return work / f"{name}.json"


def prepare(work: Path, name: str, paths: list[Path], command: str = "run", **keys: Any) -> Cost:
    """One run of our own preparation into an empty folder."""
    shutil.rmtree(work / name, ignore_errors=True)
    file = config(work, name, paths, **keys)
    log = work / f"{name}.log"
    return measure([sys.executable, "-m", "data_prep", command, "--config", str(file)], log=log, environment=ONE_THREAD)


def table(rows: list[tuple[str, ...]]) -> None:
    print(text_table(rows[0], rows[1:]))


def throughput(paths: list[Path], work: Path, datatrove: str | None, dolma: str | None, repeats: int) -> None:
    """Prints MB per CPU-second of each tool and ours over theirs, and what a second process gains."""
    size = text_bytes(paths) / 1e6
    models = {}
    for kind, sample_bytes in SAMPLE_BYTES.items():
        tokenizer = {"vocab_size": VOCAB_SIZE, "type": kind, "sample_bytes": sample_bytes}
        prepare(work, f"model-{kind}", paths[:1], "tokenizer", tokenizer=tokenizer)
        models[kind] = str(work / f"model-{kind}" / "tokenizer.model")
    runs: dict[str, Callable[[], Cost]] = {
        "ours, BPE": lambda: prepare(work, "bpe", paths, tokenizer={"model": models["bpe"]}),
        "ours, unigram": lambda: prepare(work, "unigram", paths, tokenizer={"model": models["unigram"]}),
        "ours, BPE, 2 processes": lambda: prepare(work, "two", paths, workers=2, tokenizer={"model": models["bpe"]}),
    }
    environment = {**ONE_THREAD, "HF_HUB_OFFLINE": "1"}
    hf = work / "hf.json"
    if datatrove:
        write_sample(paths, work / "sample.txt", SAMPLE_BYTES["bpe"])
        # By the oldest of the tokenizers libraries, whose file the others read too; dolma 1.2.1 wants 0.19 or less.
        train = [dolma or datatrove, "-c", TRAIN_HF, str(work / "sample.txt"), str(hf), str(VOCAB_SIZE)]
        measure(train, log=work / "train.log")
        (work / "input").mkdir()
        for path in paths:
            (work / "input" / path.name).symlink_to(path.resolve())
        (work / "run_datatrove.py").write_text(RUN_DATATROVE)
        runs["datatrove, BPE"] = lambda: measure(
            [datatrove, str(work / "run_datatrove.py"), str(work / "input"), str(hf), _fresh(work / "datatrove")],
            log=work / "datatrove.log",
            environment=environment,
        )
    if dolma and datatrove:
        _write_with_ids(paths, work / "with-ids")
        runs["dolma, BPE"] = lambda: measure(
            [
                *(dolma, "-m", "dolma.cli", "tokens", "--documents", str(work / "with-ids" / "*.json.gz")),
                *("--destination", _fresh(work / "dolma"), "--tokenizer.name_or_path", str(hf)),
                *("--tokenizer.eos_token_id", "0", "--dtype", "uint16", "--processes", "1"),
            ],
            log=work / "dolma.log",
            environment=environment,
        )
    costs: dict[str, list[Cost]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            costs[name].append(run())
            cost = costs[name][-1]
            print(f"{name}: {cost.cpu_seconds:.2f} CPU s, {cost.seconds:.2f} s", file=sys.stderr, flush=True)
    best = {name: min(found, key=lambda cost: cost.cpu_seconds) for name, found in costs.items()}
    rows: list[tuple[str, ...]] = [
        ("tool", "CPU s", "wall s", "MB/CPU s", "ours, BPE over it", "ours, unigram over it")
    ]
    bpe, unigram = best["ours, BPE"].cpu_seconds, best["ours, unigram"].cpu_seconds
    for name, cost in best.items():
        ratios = (f"{cost.cpu_seconds / bpe:.2f}", f"{cost.cpu_seconds / unigram:.2f}")
        rows.append((name, f"{cost.cpu_seconds:.1f}", f"{cost.seconds:.1f}", f"{size / cost.cpu_seconds:.2f}", *ratios))
    print(f"{size:.1f} MB of text in {len(paths)} files, {VOCAB_SIZE} pieces, best of {repeats}")
    table(rows)
    one = min(cost.seconds for cost in costs["ours, BPE"])
    two = min(cost.seconds for cost in costs["ours, BPE, 2 processes"])
    print(f"2 processes: {one / two:.2f} times the throughput of one (wall clock)")


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


def memory(paths: list[Path], work: Path, sizes: list[int], workers: int, *, filters: bool) -> None:
    """Prints the peak memory of a whole run with deduplication and `filters`, for growing inputs."""
    print("text MB  peak MB  over the first  CPU s", flush=True)
    first = 0
    for size in sizes:
        inputs = _inputs_of_size(paths, work / f"input-{size}", size * 1_000_000)
        keys: dict[str, Any] = {"dedup": {}, "tokenizer": {"vocab_size": VOCAB_SIZE}}
        if filters:
            keys["filter"] = {"language": "en", "c4": False}
        cost = prepare(work, f"memory-{size}", inputs, workers=workers, **keys)
        shutil.rmtree(work / f"input-{size}")
        first = first or cost.peak_bytes
        ratio = cost.peak_bytes / first
        print(f"{size:7} {cost.peak_bytes / 1e6:8.0f} {ratio:15.3f} {cost.cpu_seconds:6.0f}", flush=True)


def _inputs_of_size(paths: list[Path], folder: Path, size: int) -> list[Path]:
    """Files with `size` bytes of text: the documents over and over, from the second time with every 5th word changed,
    so that they stay apart as documents and mostly as near-duplicates too."""
    folder.mkdir()
    written, round_number = 0, 0
    inputs: list[Path] = []
    while written < size:
        for path in paths:
            if written >= size:
                break
            inputs.append(folder / f"c4-{len(inputs):05d}.json.gz")
            with gzip.open(path, "rt", encoding="utf-8") as source, gzip.open(inputs[-1], "wt", 1) as target:
                for line in source:
                    record = json.loads(line)
                    words = record["text"].split(" ")
                    if round_number:
                        words[::5] = [word + "abcdefghi"[round_number - 1] for word in words[::5]]
                    record["text"] = " ".join(words)
                    target.write(json.dumps(record) + "\n")
                    written += len(record["text"].encode())
                    if written >= size:
                        break
        round_number += 1
    return inputs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("throughput", "memory"))
    parser.add_argument("input", help="glob of raw C4 files")
    parser.add_argument("--datatrove", metavar="PYTHON", help="interpreter of an environment with datatrove")
    parser.add_argument("--dolma", metavar="PYTHON", help="interpreter of an environment with dolma")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--sizes", type=int, nargs="+", default=[50, 500], help="MB of text (memory)")
    parser.add_argument("--workers", type=int, default=2, help="processes (memory)")
    parser.add_argument("--no-filters", action="store_true", help="deduplication alone (memory)")
    arguments = parser.parse_args()
    paths = [Path(path).resolve() for path in sorted(glob.glob(arguments.input))]
    if not paths:
        parser.error(f"{arguments.input} matches no file")
    with tempfile.TemporaryDirectory() as folder:
        if arguments.what == "throughput":
            throughput(paths, Path(folder), arguments.datatrove, arguments.dolma, arguments.repeats)
        else:
            memory(paths, Path(folder), arguments.sizes, arguments.workers, filters=not arguments.no_filters)


if __name__ == "__main__":
    main()
