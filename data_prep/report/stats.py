"""`stats` as a folder: report.md with tables and plots of what is in the shards and of what was left out."""

import contextlib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import DataError
from common.files import replacing_all
from common.folders import check_writable_folder, expanded, making
from common.splits import SplitName
from data_prep.shards.format import BYTE_VALUES, Manifest, ShardIndex
from data_prep.shards.reader import ShardReader
from data_prep.stages.id_maker import read_symbols
from data_prep.stages.tokenizer import TextTokenizer

REPORT_FOLDER = "report"
TITLE = "# Prepared data "  # then the digest: how a report is known as ours
Plots = dict[str, bytes]
"""PNG by file name."""
PLOTS = ("lengths.png", "bytes_per_token.png", "left_out.png", "duplicates.png", "vocabulary.png")
READ_TOKENS = 1 << 20
RATIO_STEP, RATIO_BINS = 0.05, 240  # bytes per token up to 12
QUANTILES = {"min": 0.0, "p10": 0.1, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
TOTALS = ("split", "shards", "documents", "tokens", "text bytes", "bytes/token")
TOP_PIECES = 20
FIGURE_INCHES = (7.0, 3.2)


@dataclass(frozen=True)
class Lengths:
    """Ids of the documents of a split, EOS not counted, as counts: memory grows with different lengths, not documents
    (C4's 365 million would take 3 GB and twice that to sort)."""

    values: np.ndarray
    """int64 [n], rising."""
    counts: np.ndarray
    """int64 [n]: documents of each length."""

    @classmethod
    def of(cls, manifest: Manifest, split: str) -> "Lengths":
        """From the indexes alone, a shard at a time."""
        values, counts = np.empty(0, np.int64), np.empty(0, np.int64)
        for entry in manifest.split(split):
            starts = ShardIndex.load(manifest, entry).document_start
            tokens = np.diff(starts, append=entry.tokens) - manifest.tokenizer.end_tokens
            found, added = np.unique(tokens, return_counts=True)
            values, place = np.unique(np.concatenate([values, found]), return_inverse=True)
            added = np.concatenate([counts, added])
            counts = np.zeros(len(values), np.int64)
            np.add.at(counts, place, added)
        return cls(values, counts)

    @property
    def documents(self) -> int:
        return int(self.counts.sum())

    @property
    def mean(self) -> float:
        """Ids of a document on average."""
        return float((self.values * self.counts).sum() / self.documents)

    def quantiles(self) -> list[int]:
        """The lengths at QUANTILES, each the one of a document."""
        places = np.floor(np.array(list(QUANTILES.values())) * (self.documents - 1))
        found: list[int] = self.values[np.searchsorted(np.cumsum(self.counts), places, side="right")].tolist()
        return found


@dataclass(frozen=True)
class Pieces:
    """What the ids of a split say."""

    counts: np.ndarray
    """int64 [vocab_size]: how often each id occurs."""
    ratios: np.ndarray
    """int64 [RATIO_BINS]: documents by bytes of text per token, EOS not counted; the last bin holds all above."""
    text_bytes: int
    """Sum over the documents."""


def pieces(manifest: Manifest, split: str, piece_bytes: np.ndarray, prefix_bytes: np.ndarray) -> Pieces:
    """Reads every token of a split. `piece_bytes` and `prefix_bytes`, int64 [vocab_size]: what each id is decoded to,
    and what decoding takes from a document that begins with it."""
    counts, ratios = np.zeros(len(piece_bytes), np.int64), np.zeros(RATIO_BINS, np.int64)
    total = 0
    for entry in manifest.split(split):
        reader = ShardReader(manifest, entry, False)
        starts = reader.document_starts
        before = np.empty(len(starts), np.int64)  # bytes of the shard before each document
        first = np.empty(len(starts), np.int64)
        done = 0
        for start in range(0, reader.num_tokens, READ_TOKENS):
            stop = min(start + READ_TOKENS, reader.num_tokens)
            ids = reader.read(start, stop)
            counts += np.bincount(ids, minlength=len(counts))
            sums = done + np.concatenate([[0], np.cumsum(piece_bytes[ids])])
            low, high = np.searchsorted(starts, [start, stop])
            before[low:high], first[low:high] = (of[starts[low:high] - start] for of in (sums, ids))
            done = int(sums[-1])
        tokens = np.diff(starts, append=entry.tokens) - manifest.tokenizer.end_tokens
        size = np.diff(before, append=done) - np.where(tokens > 0, prefix_bytes[first], 0)
        bins = (size[tokens > 0] / tokens[tokens > 0] / RATIO_STEP).astype(np.int64)
        ratios += np.bincount(np.clip(bins, 0, RATIO_BINS - 1), minlength=RATIO_BINS)
        total += int(size.sum())
        reader.close()
    return Pieces(counts, ratios, total)


def dropped_rows(manifest: Manifest) -> list[tuple[str, str, int]]:
    """(stage, reason, documents) of everything that was left out."""
    return [
        (stage, reason, count)
        for stage, reasons in manifest.provenance.dropped.items()
        if isinstance(reasons, dict)
        for reason, count in reasons.items()
        if isinstance(count, int)
    ]


def check_own(folder: Path) -> None:
    """Raises DataError if a file of a report exists there and is not of a report of ours."""
    found = [name for name in ("report.md", *PLOTS) if (folder / name).exists()]
    report = folder / "report.md"
    own = report.is_file() and report.read_bytes().startswith(TITLE.encode())
    if found and not own:
        raise DataError(f"--out: {folder} holds {found[0]}, which no report of ours is; name another folder with --out")


def write_report(manifest: Manifest, folder: Path) -> Path:
    """Writes report.md and its plots into a folder; the path of report.md. The same data give the same text. After an
    error the folder is what it was; report.md comes first, so that what a kill leaves is known as ours."""
    folder = expanded(str(folder), "--out")
    check_writable_folder(folder, "--out")
    check_own(folder)
    lines, plots = _report(manifest)
    with making(folder), replacing_all(folder) as put:
        put("report.md", ("\n".join(lines) + "\n").encode())
        for name, content in plots.items():
            put(name, content)
    for name in PLOTS:
        if name not in plots:  # of an earlier report
            (folder / name).unlink(missing_ok=True)
    return folder / "report.md"


def _report(manifest: Manifest) -> tuple[list[str], Plots]:
    """The lines of report.md, and the plots that it names."""
    plots: Plots = {}
    lines = [f"{TITLE}{manifest.digest[:12]}", ""]
    lines += _markdown(TOTALS, totals_rows(manifest))
    lines += _lengths({split: Lengths.of(manifest, split) for split in manifest.splits}, plots)
    lines += _left_out(manifest, plots)
    entry = manifest.tokenizer
    model = manifest.folder / (entry.file or "")
    tokenizer = TextTokenizer.load(model) if entry.kind == "sentencepiece" else None
    values = read_symbols(model) if entry.kind == "symbols" else np.arange(BYTE_VALUES)
    sizes = np.ones(entry.vocab_size, np.int64) if tokenizer is None else tokenizer.piece_bytes()
    prefixes = np.zeros(entry.vocab_size, np.int64) if tokenizer is None else tokenizer.prefix_bytes()
    found: dict[str, Pieces] = {
        split: pieces(manifest, split, sizes, prefixes) for split in manifest.splits if manifest.split(split)
    }
    if tokenizer is not None:
        lines += _bytes_per_token(found, plots)
    if "train" in found:
        lines += _vocabulary(found["train"].counts, _piece_namer(tokenizer, values if entry.has_text else None), plots)
    return lines + _inputs(manifest), plots


def _markdown(header: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    cells = [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows]
    align = ["---", *["---:"] * (len(header) - 1)]
    return ["| " + " | ".join(row) + " |" for row in [list(header), align, *cells]] + [""]


def totals_rows(manifest: Manifest) -> list[tuple[object, ...]]:
    """TOTALS of each split."""
    return [
        (split, len(manifest.split(split)), sums.documents, sums.tokens, *_text_sums(manifest, split))
        for split, sums in manifest.totals.items()
    ]


def _text_sums(manifest: Manifest, split: SplitName) -> tuple[object, str]:
    """Bytes of text of a split, and bytes per token; - where nobody knows."""
    sums = manifest.totals[split]
    if not manifest.tokenizer.has_text:
        return "-", "-"
    return sums.text_bytes, f"{sums.text_bytes / sums.tokens:.3f}" if sums.tokens else "-"


def other_tokenizer(manifest: Manifest) -> str:
    """The name that the preparation was given for the tokenizer of ids."""
    settings = manifest.provenance.config.get("tokenizer")
    return str(settings.get("name")) if isinstance(settings, dict) else "another tokenizer"


def _lengths(lengths: dict[str, Lengths], plots: Plots) -> list[str]:
    found = {split: of_split for split, of_split in lengths.items() if of_split.documents}
    rows = [(split, *of_split.quantiles(), f"{of_split.mean:,.1f}") for split, of_split in found.items()]
    longest = max((int(of_split.values[-1]) for of_split in found.values()), default=1)
    edges = np.geomspace(1, max(2, longest + 1), 50)  # of all splits: shares of other bins cannot be compared
    with _figure(plots, "lengths.png", "tokens of a document", "share of documents") as axes:
        for split, of_split in found.items():
            weights = of_split.counts / of_split.documents
            axes.hist(np.maximum(of_split.values, 1), edges, weights=weights, histtype="step", label=split)
        axes.set_xscale("log")
        axes.legend()
    table = _markdown(("tokens of a document", *QUANTILES, "mean"), rows)
    return ["## Lengths", "", *table, "![lengths](lengths.png)", ""]


def _bytes_per_token(found: dict[str, Pieces], plots: Plots) -> list[str]:
    """Documents that stand apart here are in another language, or are tables or code."""
    edges = RATIO_STEP * np.arange(RATIO_BINS + 1)
    highest = 1
    with _figure(plots, "bytes_per_token.png", "bytes per token of a document", "share of documents") as axes:
        for split, of_split in found.items():
            axes.stairs(of_split.ratios / max(1, of_split.ratios.sum()), edges, label=split)
            highest = max(highest, int(np.flatnonzero(of_split.ratios).max(initial=0)) + 1)
        axes.set_xlim(0, edges[highest] + RATIO_STEP)
        axes.legend()
    return ["## Bytes per token", "", "![bytes per token](bytes_per_token.png)", ""]


def _left_out(manifest: Manifest, plots: Plots) -> list[str]:
    rows = dropped_rows(manifest)
    lines = ["## Left out", ""]
    if not rows:
        return [*lines, "Nothing was quarantined, filtered or removed as a duplicate.", ""]
    lines += _markdown(("stage: reason", "documents"), [(f"{stage}: {reason}", count) for stage, reason, count in rows])
    with _figure(plots, "left_out.png", "documents", "", height=1.0 + 0.22 * len(rows)) as axes:
        axes.barh([f"{stage}: {reason}" for stage, reason, _ in reversed(rows)], [c for *_, c in reversed(rows)])
        axes.xaxis.get_major_locator().set_params(integer=True)
    lines += ["![left out](left_out.png)", ""]
    if of_documents := manifest.provenance.dropped.get("lines"):
        lines += [f"Lines of documents that `filter.c4_lines` dropped: {of_documents:,}.", ""]
    duplicates: Any = manifest.provenance.dropped.get("duplicates", {})
    if any(counts := duplicates.get("near_similarity") or []):
        with _figure(plots, "duplicates.png", "estimated Jaccard similarity to the kept one", "documents") as axes:
            width = 1 / len(counts)
            axes.bar([(number + 0.5) * width for number in range(len(counts))], counts, 0.9 * width)
            axes.set_xlim(0.45, 1)
            axes.yaxis.get_major_locator().set_params(integer=True)
        lines += ["![near-duplicates](duplicates.png)", ""]
    names = [record.file for record in manifest.provenance.records]
    return [*lines, "Examples and places: " + ", ".join(f"`{name}`" for name in names) + ".", ""] if names else lines


def _vocabulary(counts: np.ndarray, name: Callable[[int], str], plots: Plots) -> list[str]:
    """`name` says what an id stands for."""
    used, total = int((counts > 0).sum()), int(counts.sum())
    order = np.argsort(-counts, kind="stable")
    with _figure(plots, "vocabulary.png", "rank of the piece", "occurrences in train") as axes:
        axes.plot(np.arange(1, used + 1), counts[order[:used]])
        axes.set_xscale("log")
        axes.set_yscale("log")
    rows = [
        (f"`{name(int(piece))}`", int(counts[piece]), f"{counts[piece] / max(1, total):.2%}")
        for piece in order[:TOP_PIECES]
    ]
    rare = int((counts[counts > 0] < 100).sum())
    summary = f"{used:,} of {len(counts):,} pieces occur in train, {rare:,} of them fewer than 100 times."
    return [
        "## Vocabulary", "", summary, "", "![vocabulary](vocabulary.png)", "",
        *_markdown(("piece", "occurrences", "share"), rows),
    ]  # fmt: skip


def _piece_namer(tokenizer: TextTokenizer | None, values: np.ndarray | None) -> Callable[[int], str]:
    """`values`: the byte that each id stands for, without a tokenizer; None where nobody knows."""
    if tokenizer is None and values is None:
        return str
    if tokenizer is None:
        assert values is not None
        return lambda piece: f"{values[piece]:#04x}"
    return lambda piece: _in_cell(tokenizer.piece(piece)).replace("`", "'")


def _in_cell(text: str) -> str:
    """In a cell of a table: what is not to be seen, as a tab or a blank that does not break, as an escape."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text).replace("|", "\\|")


def _inputs(manifest: Manifest) -> list[str]:
    rows = [
        (
            _in_cell(r.name),
            r.format,
            r.split,
            r.bytes,
            r.documents,
            sum(r.quarantined.values()),
            r.filtered,
            r.duplicates,
        )
        for r in manifest.provenance.inputs
    ]
    header = ("raw file", "format", "split", "bytes", "documents", "quarantined", "filtered", "duplicates")
    settings = ", ".join(f"{name} {version}" for name, version in manifest.provenance.versions.items())
    return ["## Where it comes from", "", *_markdown(header, rows), f"Made with {settings}.", ""]


@contextlib.contextmanager
def _figure(plots: Plots, name: str, x: str, y: str, *, height: float = FIGURE_INCHES[1]) -> Iterator[Any]:
    """Axes of a plot, which is drawn into `plots` when the block ends."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # here: 0.5 s, and only `stats` plots
    from matplotlib.figure import Figure

    figure = Figure(figsize=(FIGURE_INCHES[0], height), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    yield axes
    drawn = io.BytesIO()
    canvas.print_png(drawn, metadata={"Software": None})  # figure.savefig would draw it twice
    plots[name] = drawn.getvalue()
