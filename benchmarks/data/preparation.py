r"""Data preparation, measured: throughput per CPU-second beside datatrove and dolma, scaling, and memory.

    python benchmarks/data/corpus/build.py corpus                                        # 100 MB of text, once
    python -m venv peers && peers/bin/pip install "datatrove[io]" tokenizers
    python -m venv peers-dolma && peers-dolma/bin/pip install dolma==1.2.1 s3fs==2023.6.0 aiobotocore==2.5.4 \
        botocore==1.31.17 boto3==1.28.17        # pinned: alone, pip tries one boto3 after the other
    python -m benchmarks.data.preparation throughput "corpus/*.json.gz" \
        --datatrove peers/bin/python --dolma peers-dolma/bin/python --repeats 5 --keep
    python -m benchmarks.data.preparation memory "corpus/*.json.gz" --keep

throughput: the same raw files through each tool, read, tokenised and written, no filter, no deduplication, one process;
the vocabulary has as many pieces in all. CPU seconds are user and system time of the process and its children, start-up
included; text is UTF-8 bytes of the documents. Tools run in turns, each round in another order; seconds are medians,
ratios medians of those of a round. What each tool wrote is then decoded, and must be the raw files' documents, byte by
byte; tokens may differ as tokenizers do. Megatron-LM's tools/preprocess_data.py is not among them: the megatron-core
package does not hold it.
memory: the largest sum of resident memory over all processes, with filters and deduplication, on 50 MB and on 500 MB.
"""

from __future__ import annotations

import argparse
import glob
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import records, rounds
from benchmarks.data import memory, outputs
from benchmarks.data.peers import SAMPLE_BYTES, VOCAB_SIZE, Tool, peers
from benchmarks.data.process_cost import Cost, prepare
from benchmarks.marked import markdown
from benchmarks.pictures import Bar, draw_bars
from common.errors import DataError, UserError
from common.tables import text_table

BPE, UNIGRAM, TWO = "ours, BPE", "ours, unigram", "ours, BPE, 2 processes"
TRAINED_ON = {"bpe": SAMPLE_BYTES, "unigram": 2_000_000}  # unigram trains 30 times slower
PEERS = {"datatrove": "datatrove, BPE", "dolma": "dolma, BPE"}
MISSING = "not installed here"
HEADER = ["tool", "CPU s", "MB per CPU s", "CPU s over ours, BPE", "over ours, unigram", "wall s", "peak MB", "tokens"]


def own_tools(paths: list[Path], work: Path) -> dict[str, Tool]:
    """Ours, whose tokenizers are trained here."""
    version = f"sentencepiece {records.version('sentencepiece')}"
    for kind, size in TRAINED_ON.items():
        tokenizer = {"vocab_size": VOCAB_SIZE, "type": kind, "sample_bytes": size}
        prepare(work, f"model-{kind}", paths[:1], "tokenizer", tokenizer=tokenizer)

    def tool(kind: str, workers: int) -> Tool:
        name, keys = f"{kind}-{workers}", {"model": str(work / f"model-{kind}" / "tokenizer.model")}
        return Tool(
            version,
            lambda: prepare(work, name, paths, workers=workers, tokenizer=keys),
            lambda: outputs.ours(work / name),
        )

    return {BPE: tool("bpe", 1), UNIGRAM: tool("unigram", 1), TWO: tool("bpe", 2)}


def throughput(paths: list[Path], work: Path, pythons: dict[str, str], repeats: int) -> dict[str, Any]:
    """What each tool costs and wrote. Raises DataError if one did other work, UserError for an interpreter without its
    package."""
    others = peers(paths, work, pythons)
    tools = {**own_tools(paths, work), **{PEERS[package]: tool for package, tool in others.items()}}
    source = outputs.raw(paths)
    costs: dict[str, list[Cost]] = {name: [] for name in tools}
    for name in rounds.orders(list(tools), repeats):
        cost = tools[name].run()
        costs[name].append(cost)
        print(f"{name}: {cost.cpu_seconds:.2f} CPU s, {cost.seconds:.2f} s", file=sys.stderr, flush=True)
    written = {name: tool.written() for name, tool in tools.items()}
    outputs.check(written, source)
    found: dict[str, Any] = {
        name: {
            "version": tool.version,
            "written": written[name]._asdict(),
            "costs": [cost._asdict() for cost in costs[name]],
        }
        for name, tool in tools.items()
    }
    found |= {label: {"missing": MISSING} for package, label in PEERS.items() if package not in others}
    return {
        "source": source._asdict(),
        "files": len(paths),
        "vocab_size": VOCAB_SIZE,
        "repeats": repeats,
        "tools": found,
    }


def ratio(found: Any, name: str, to: str, key: str = "cpu_seconds") -> float:
    """The median over rounds of one tool's costs over another's."""
    own, other = ([cost[key] for cost in found["tools"][tool]["costs"]] for tool in (name, to))
    return rounds.ratio(own, other)


def rows(found: Any) -> list[list[str]]:
    """A line for each tool."""
    lines = []
    for name, one in found["tools"].items():
        if "missing" in one:
            lines.append([name, one["missing"], *[""] * (len(HEADER) - 2)])
            continue
        cpu, wall, peak = (statistics.median(cost[key] for cost in one["costs"]) for key in Cost._fields)
        rate = found["source"]["text_bytes"] / 1e6 / cpu
        lines.append(
            [
                f"{name} ({one['version']})",
                *(f"{cpu:.1f}", f"{rate:.2f}", f"{ratio(found, name, BPE):.2f}", f"{ratio(found, name, UNIGRAM):.2f}"),
                *(f"{wall:.1f}", f"{peak / 1e6:.0f}", f"{one['written']['tokens']:,}"),
            ]
        )
    return lines


def remarks(found: Any) -> str:
    """What was prepared, and what a second process gains."""
    source = found["source"]
    return (
        f"{source['text_bytes'] / 1e6:.1f} MB of text, {source['documents']:,} documents in {found['files']} files, "
        f"{found['vocab_size']:,} pieces, medians of {found['repeats']}. All tools wrote the same documents, byte by "
        f"byte when decoded. By the clock ours, BPE, is {ratio(found, BPE, TWO, 'seconds'):.2f} times as fast with two "
        "processes as with one."
    )


def page(found: Any) -> str:
    """The table of docs/benchmarks.md."""
    return f"{markdown(HEADER, rows(found))}\n\n{remarks(found)}"


def draw(found: Any, path: Path) -> None:
    """PNG: MB per CPU-second of each tool in one process, and ours, BPE, over it."""
    bars = []
    for name, one in found["tools"].items():
        if "missing" not in one and name != TWO:
            rate = found["source"]["text_bytes"] / 1e6 / statistics.median(c["cpu_seconds"] for c in one["costs"])
            note = "" if name == BPE else f" (ours, BPE, is {ratio(found, name, BPE):.2f} times as fast)"
            bars.append(Bar(name, rate, f"{rate:.1f}{note}"))
    draw_bars({"read, tokenise, write": bars}, "MB of text per CPU-second", path)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.data.preparation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=("throughput", "memory"))
    parser.add_argument("input", help="glob of raw C4 files")
    parser.add_argument("--datatrove", metavar="PYTHON", help="interpreter of an environment with datatrove")
    parser.add_argument("--dolma", metavar="PYTHON", help="interpreter of an environment with dolma")
    parser.add_argument("--repeats", type=int, default=1, help="rounds (throughput; default: %(default)s)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[50, 500], help="MB of text (memory; default: 50 500)")
    parser.add_argument("--workers", type=int, default=2, help="processes (memory; default: 2)")
    parser.add_argument("--no-filters", action="store_true", help="deduplication alone (memory)")
    records.add_option(parser)
    args = parser.parse_args(arguments)
    paths = [Path(path).resolve() for path in sorted(glob.glob(args.input))]
    if not paths:
        parser.error(f"{args.input} matches no file")
    if min(args.repeats, args.workers, *args.sizes) < 1:
        parser.error("--repeats, --sizes and --workers must be at least 1")
    about = records.machine()
    pythons = {package: python for package in PEERS if (python := getattr(args, package)) is not None}
    with tempfile.TemporaryDirectory() as folder:
        try:
            if args.what == "throughput":
                found = throughput(paths, Path(folder), pythons, args.repeats)
                what, text = "preparation", f"{text_table(HEADER, rows(found))}\n{remarks(found)}"
            else:
                found = memory.memory(paths, Path(folder), args.sizes, args.workers, filters=not args.no_filters)
                what, text = "preparation-memory", text_table(memory.HEADER, memory.rows(found), left=set())
        except (UserError, DataError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    records.show(args.keep, what, about, found, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
