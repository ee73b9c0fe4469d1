r"""Random windows of tokens into int64 batches, measured: our reader beside a memory map, webdataset, litdata and MDS.

    python -m benchmarks.data.reading                                # ours, memory maps, webdataset
    python -m venv peers && peers/bin/pip install litdata mosaicml-streaming "torch===2.13.0"   # as torchvision, PyPI's
    python -c "import site; print(*site.getsitepackages())" > peers/lib/python3.11/site-packages/project.pth
    PYTHONPATH=. peers/bin/python -m benchmarks.data.reading --keep

The third line, by the Python in which this project is installed, lends its packages to the new environment. There they
come after what pip put there: NumPy, torch and others may be of other versions, for all readers alike.


Every reader gives the same: inputs and targets [32, 512] int64 in random order, out of the same 40 million ids in the
page cache, in one process without workers.

ours          TrainingStream over webdataset shards: order, reading, batch; sha256 checked before
memmap        what nanoGPT does: a slice of an np.memmap per window, copied to int64, stacked; targets sliced again
memmap, once  the same with one copy per window into the batch: what a memory map can do
webdataset    WebDataset(shards) -> windows of each member -> shuffle(1000) -> batched(32)
litdata       TokensLoader blocks of 513, shuffled, collated by a DataLoader
mds           a sample of 513 ids, shuffled, collated by a DataLoader

Readers take turns, `--repeats` times; a run reads `--batches` batches after one that does not count. Every window of
the first batch of each must stand in the corpus. The table shows medians over rounds, of rates and of the ratio of a
round. Tokens are inputs; CPU seconds are of the whole process.
MDS's threads may still look for the corpus when it is gone: their traceback at the end says nothing of the times.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import records
from benchmarks.marked import markdown
from benchmarks.pictures import Bar, draw_bars
from benchmarks.rounds import orders, quartiles, ratios
from common.errors import DataError
from common.paths import REPOSITORY
from common.tables import text_table
from data_prep.shards.format import Manifest
from data_prep.shards.manifest_records import ShardEntry
from data_prep.shards.writer import ShardWriter, write_manifest
from pretrain.config.loading import load_config
from pretrain.data.sources import Sources
from pretrain.data.windows import TrainingStream

T, B = 512, 32
VOCAB_SIZE = 8000
Batches = Iterator[tuple[Tensor, Tensor]]


def write_corpus(folder: Path, num_tokens: int) -> Manifest:
    """Random ids in documents of 500 on average, as shards of the default sizes, and flat as tokens.bin."""
    rng = np.random.default_rng(0)
    entries: list[ShardEntry] = []
    with (folder / "tokens.bin").open("wb") as flat:
        while (written := sum(entry.tokens for entry in entries)) < num_tokens:
            name = f"train-{len(entries):05d}"
            writer = ShardWriter(folder, name, dtype=np.dtype("<u2"), tokens_per_member=131_072)
            while writer.tokens < min(16_777_216, num_tokens - written):
                document = np.append(rng.integers(2, VOCAB_SIZE, int(rng.integers(100, 900))), 1)
                writer.add_documents(document, np.array([len(document)]))
                flat.write(document.astype("<u2").tobytes())
            entries.append(writer.finish())
    documents, tokens = (sum(getattr(entry, key) for entry in entries) for key in ("documents", "tokens"))
    totals = {"documents": documents, "tokens": tokens, "text_bytes": 4 * (tokens - documents)}
    body = {
        "format_version": 1,
        "dtype": "uint16",
        "tokenizer": {"file": "tokenizer.model", "sha256": "0" * 64, "vocab_size": VOCAB_SIZE, "eos_id": 1},
        "splits": {"train": [entry.model_dump() for entry in entries], "validation": []},
        "totals": {"train": totals, "validation": {"documents": 0, "tokens": 0, "text_bytes": 0}},
        "provenance": {"inputs": [], "config": {}, "versions": {}},
    }
    return write_manifest(folder, body)


def ours(folder: Path) -> Batches:
    keys = [f"data.manifest={folder}", f"model.sequence_length={T}", f"batch.global_sequences={B}"]
    config = load_config(REPOSITORY / "configs/switchall_tiny.json", [*keys, f"batch.micro_sequences={B}"])
    reader = Sources.load(config).reader("train", config)
    reader.read(np.arange(reader.num_windows - 1, 0, -(reader.num_windows // 100)))  # hashes every shard
    stream = TrainingStream(reader, config, data_rank=0, data_size=1)
    for consumed in itertools.count(0, B):
        batch = stream.batch(consumed, 0)
        yield batch.tokens, batch.targets


def memmap(folder: Path) -> Batches:
    data = np.memmap(folder / "tokens.bin", dtype="<u2", mode="r")
    while True:
        starts = torch.randint(len(data) - T - 1, (B,)).tolist()
        x = torch.stack([torch.from_numpy(data[s : s + T].astype(np.int64)) for s in starts])
        y = torch.stack([torch.from_numpy(data[s + 1 : s + 1 + T].astype(np.int64)) for s in starts])
        yield x, y


def memmap_once(folder: Path) -> Batches:
    data, rng = np.memmap(folder / "tokens.bin", dtype="<u2", mode="r"), np.random.default_rng(0)
    while True:
        rows = np.empty((B, T + 1), np.int64)
        for row, start in zip(rows, rng.integers(0, len(data) - T - 1, B).tolist(), strict=True):
            row[:] = data[start : start + T + 1]
        tokens = torch.from_numpy(rows)
        yield tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def webdataset(folder: Path) -> Batches:
    import webdataset as wds

    def windows(samples: Iterator[dict[str, Any]]) -> Iterator[np.ndarray]:
        for sample in samples:
            tokens = np.frombuffer(sample["tok.bin"], "<u2").astype(np.int64)
            for start in range(0, len(tokens) - T, T):
                yield tokens[start : start + T + 1]

    urls = [str(path) for path in sorted(folder.glob("train-*.tar"))]
    while True:
        pipeline = wds.WebDataset(urls, shardshuffle=len(urls)).compose(windows).shuffle(1000)
        for batch in pipeline.batched(B, collation_fn=np.stack, partial=False):
            yield halves(torch.from_numpy(batch))


def litdata(folder: Path) -> Batches:
    import litdata as ld

    target = folder / "litdata"
    loader = ld.TokensLoader(block_size=T + 1)
    if not target.exists():
        inputs = [str(folder / "tokens.bin")]
        ld.optimize(_litdata_chunks, inputs, str(target), item_loader=loader, chunk_bytes="64MB", num_workers=1)
    while True:
        dataset = ld.StreamingDataset(str(target), item_loader=ld.TokensLoader(block_size=T + 1), shuffle=True)
        for batch in ld.StreamingDataLoader(dataset, batch_size=B, num_workers=0, drop_last=True):
            yield halves(batch.long())


def _litdata_chunks(path: str) -> Iterator[Tensor]:
    yield from torch.from_numpy(np.fromfile(path, "<u2")).split(65_536)


def mds(folder: Path) -> Batches:
    from streaming import MDSWriter, StreamingDataset

    target = folder / "mds"
    if not target.exists():
        tokens = np.fromfile(folder / "tokens.bin", "<u2")
        with MDSWriter(out=str(target), columns={"tokens": "ndarray:uint16"}) as out:
            for start in range(0, len(tokens) - T, T):
                out.write({"tokens": tokens[start : start + T + 1]})
    while True:
        dataset = StreamingDataset(local=str(target), shuffle=True, batch_size=B)

        def collate(samples: list[dict[str, np.ndarray]]) -> Tensor:
            return torch.from_numpy(np.stack([s["tokens"] for s in samples]).astype(np.int64))

        for batch in torch.utils.data.DataLoader(dataset, batch_size=B, collate_fn=collate, drop_last=True):
            yield halves(batch)


def halves(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """[B, T + 1] -> inputs and targets."""
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


READERS: dict[str, Callable[[Path], Batches]] = {
    "ours": ours,
    "memmap": memmap,
    "memmap, once": memmap_once,
    "webdataset": webdataset,
    "litdata": litdata,
    "mds": mds,
}


WITH_THREADS = ("litdata", "mds")
"""Their threads go on working when others are measured (ours fell to a tenth at times): these take turns afterwards."""


def measure(batches: Batches, count: int) -> dict[str, float]:
    """Million tokens per second of wall and of CPU time, over `count` batches."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(count):
        x, y = next(batches)
        assert x.shape == y.shape == (B, T) and x.dtype == torch.int64
    tokens = count * B * T / 1e6
    return {"wall": tokens / (time.perf_counter() - wall), "cpu": tokens / (time.process_time() - cpu)}


PACKAGES = {"webdataset": "webdataset", "litdata": "litdata", "mds": "mosaicml-streaming"}
MISSING = "not installed here"
HEADER = ["reader", "Mtok per s", "Mtok per CPU s", "ours over it, CPU", "quartiles"]


def check_windows(name: str, batch: tuple[Tensor, Tensor], corpus: bytes) -> None:
    """Raises DataError unless every window of `batch`, x and y [B, T], stands in `corpus`, uint16 ids."""
    x, y = batch
    for window in torch.cat([x, y[:, -1:]], dim=1).numpy().astype("<u2"):
        place = corpus.find(window.tobytes())
        while place % 2:  # between two ids, or -1: nowhere
            if place < 0:
                raise DataError(f"{name} gave a window that is not in the corpus: these times compare nothing")
            place = corpus.find(window.tobytes(), place + 1)
    if not torch.equal(x[:, 1:], y[:, :-1]):
        raise DataError(f"{name} gave targets that are not the inputs shifted by one: these times compare nothing")


def run(folder: Path, chosen: list[str], *, num_tokens: int, batches: int, repeats: int) -> dict[str, Any]:
    """{reader: {version, wall: [...], cpu: [...]}}; a reader that does not run here gets {missing: reason}. Raises
    DataError for a reader whose windows are not the corpus's."""
    write_corpus(folder, num_tokens)
    found: dict[str, Any] = {}
    for group in ([n for n in chosen if n not in WITH_THREADS], [n for n in chosen if n in WITH_THREADS]):
        _run_group(folder, group, found, batches=batches, repeats=repeats)
    return found


def _run_group(folder: Path, group: list[str], found: dict[str, Any], *, batches: int, repeats: int) -> None:
    live: dict[str, Batches] = {}
    corpus = (folder / "tokens.bin").read_bytes()
    for name in group:
        try:
            stream = READERS[name](folder)
            batch = next(stream)
        except ModuleNotFoundError:
            found[name] = {"missing": MISSING}
            continue
        except Exception as error:
            found[name] = {"missing": f"does not run here: {type(error).__name__}: {error}".splitlines()[0][:100]}
            continue
        check_windows(name, batch, corpus)
        live[name] = stream
        found[name] = {"version": version(PACKAGES[name]) if name in PACKAGES else "", "wall": [], "cpu": []}
    del corpus
    for name in orders(list(live), repeats if live else 0):
        # Another one begins each round: what ran before leaves the processor's caches to its liking.
        next(live[name])
        for key, value in measure(live[name], batches).items():
            found[name][key].append(value)
    for stream in live.values():
        stream.close()  # type: ignore[attr-defined]


def over(found: Any, name: str) -> list[float]:
    """Tokens per CPU-second of ours over those of a reader, by round."""
    return ratios(found["ours"]["cpu"], found[name]["cpu"])


def rows(found: Any) -> list[list[str]]:
    """A line for each reader."""
    lines = []
    for name, runs in found.items():
        if "missing" in runs:
            lines.append([name, runs["missing"], *[""] * (len(HEADER) - 2)])
            continue
        rates = [f"{statistics.median(runs[key]):.1f}" for key in ("wall", "cpu")]
        lines.append([f"{name} {runs['version']}".strip(), *rates, *quartiles(over(found, name))])
    return lines


def page(found: Any) -> str:
    """The table of docs/benchmarks.md."""
    return markdown(HEADER, rows(found["readers"]))


def draw(found: Any, path: Path) -> None:
    """PNG: million tokens per CPU-second of each reader, and ours over it."""
    readers = found["readers"]
    bars = []
    for name, runs in readers.items():
        if "missing" not in runs:
            rate = statistics.median(runs["cpu"])
            note = "" if name == "ours" else f" (ours is {statistics.median(over(readers, name)):.2f} times as fast)"
            bars.append(Bar(name, rate, f"{rate:.1f}{note}"))
    draw_bars({f"random windows of {T} tokens": bars}, "million tokens per CPU-second", path)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.data.reading",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tokens", type=int, default=40_000_000, help="of the corpus (default: %(default)s)")
    parser.add_argument("--batches", type=int, default=200, help="of a run (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=7, help="rounds (default: %(default)s)")
    parser.add_argument("--readers", nargs="+", choices=list(READERS), default=list(READERS), help="default: all")
    records.add_option(parser)
    args = parser.parse_args(arguments)
    if min(args.tokens // (100 * (T + 1)), args.batches, args.repeats) < 1:
        parser.error(f"--batches and --repeats must be at least 1, --tokens at least {100 * (T + 1):,}")
    torch.set_num_threads(1)
    about = records.machine()
    folder = Path(tempfile.mkdtemp(prefix="reader-"))
    try:
        chosen = ["ours", *(name for name in args.readers if name != "ours")]
        found = run(folder, chosen, num_tokens=args.tokens, batches=args.batches, repeats=args.repeats)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    kept = {"readers": found, "tokens": args.tokens, "batches": args.batches, "repeats": args.repeats}
    records.show(args.keep, "reading", about, kept, text_table(HEADER, rows(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
