"""`stats` as a folder: report.md with tables and plots of what is in the shards and of what was left out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.shard_format import Manifest, ShardIndex, SplitName
from data_prep.shard_reader import SplitReader
from data_prep.tokenizer import TextTokenizer

REPORT_FOLDER = "report"
READ_TOKENS = 1 << 20
QUANTILES = {"min": 0.0, "p10": 0.1, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
TOP_PIECES = 20
FIGURE_INCHES = (7.0, 3.2)


def document_tokens(manifest: Manifest, split: str) -> np.ndarray:
    """int64 [documents]: ids of every document of a split, EOS not counted; from the indexes alone."""
    parts = [np.empty(0, np.int64)]
    for entry in manifest.split(split):
        starts = ShardIndex.load(manifest, entry).document_start
        parts.append(np.diff(starts, append=entry.tokens) - manifest.tokenizer.end_tokens)
    return np.concatenate(parts)


def piece_counts(manifest: Manifest, split: str) -> np.ndarray:
    """int64 [vocab_size]: how often each id occurs in a split; reads every token (300 M a second)."""
    counts = np.zeros(manifest.tokenizer.vocab_size, np.int64)
    with SplitReader(manifest, split, verify_on_first_read=False) as reader:
        for start in range(0, reader.num_tokens, READ_TOKENS):
            ids = reader.read(start, min(start + READ_TOKENS, reader.num_tokens))
            counts += np.bincount(ids, minlength=len(counts))
    return counts


def dropped_rows(manifest: Manifest) -> list[tuple[str, str, int]]:
    """(stage, reason, documents) of everything that was left out."""
    return [
        (stage, reason, count)
        for stage, reasons in manifest.provenance.dropped.items()
        if isinstance(reasons, dict)
        for reason, count in reasons.items()
        if isinstance(count, int)
    ]


def write_report(manifest: Manifest, folder: Path) -> Path:
    """Writes report.md and its plots into a folder; the path of report.md. The same data give the same text."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"# Prepared data {manifest.digest[:12]}", ""]
    lines += _totals(manifest)
    lengths = {split: document_tokens(manifest, split) for split in manifest.splits}
    lines += _lengths(lengths, folder)
    lines += _left_out(manifest, folder)
    lines += _vocabulary(manifest, folder)
    lines += _inputs(manifest)
    path = folder / "report.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _markdown(header: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    cells = [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows]
    align = ["---", *["---:"] * (len(header) - 1)]
    return ["| " + " | ".join(row) + " |" for row in [list(header), align, *cells]] + [""]


def _totals(manifest: Manifest) -> list[str]:
    rows = []
    for split, sums in manifest.totals.items():
        ratio = f"{sums.text_bytes / sums.tokens:.3f}" if sums.tokens else "-"
        rows.append((split, len(manifest.split(split)), sums.documents, sums.tokens, sums.text_bytes, ratio))
    return _markdown(("split", "shards", "documents", "tokens", "text bytes", "bytes per token"), rows)


def _lengths(lengths: dict[SplitName, np.ndarray], folder: Path) -> list[str]:
    rows = []
    for split, tokens in lengths.items():
        if len(tokens):
            quantiles = np.quantile(tokens, list(QUANTILES.values()), method="lower")
            rows.append((split, *(int(q) for q in quantiles), f"{tokens.mean():.1f}"))
    with _figure(folder / "lengths.png", "tokens of a document", "share of documents") as axes:
        for split, tokens in lengths.items():
            if len(tokens):
                edges = np.geomspace(1, max(2, tokens.max() + 1), 50)
                weights = np.full(len(tokens), 1 / len(tokens))
                axes.hist(np.maximum(tokens, 1), edges, weights=weights, histtype="step", label=split)
        axes.set_xscale("log")
        axes.legend()
    table = _markdown(("tokens of a document", *QUANTILES, "mean"), rows)
    return ["## Lengths", "", *table, "![lengths](lengths.png)", ""]


def _left_out(manifest: Manifest, folder: Path) -> list[str]:
    rows = dropped_rows(manifest)
    lines = ["## Left out", ""]
    if not rows:
        return [*lines, "Nothing was quarantined, filtered or removed as a duplicate.", ""]
    lines += _markdown(("stage: reason", "documents"), [(f"{stage}: {reason}", count) for stage, reason, count in rows])
    with _figure(folder / "left_out.png", "documents", "", height=1.0 + 0.22 * len(rows)) as axes:
        axes.barh([f"{stage}: {reason}" for stage, reason, _ in reversed(rows)], [c for *_, c in reversed(rows)])
    lines += ["![left out](left_out.png)", ""]
    duplicates: Any = manifest.provenance.dropped.get("duplicates", {})
    if duplicates.get("near_similarity"):
        counts = duplicates["near_similarity"]
        with _figure(folder / "duplicates.png", "estimated Jaccard similarity to the kept one", "documents") as axes:
            width = 1 / len(counts)
            axes.bar([(number + 0.5) * width for number in range(len(counts))], counts, 0.9 * width)
            axes.set_xlim(0.45, 1)
        lines += ["![near-duplicates](duplicates.png)", ""]
    names = [record.file for record in manifest.provenance.records]
    return [*lines, "Examples and places: " + ", ".join(f"`{name}`" for name in names) + ".", ""] if names else lines


def _vocabulary(manifest: Manifest, folder: Path) -> list[str]:
    counts = piece_counts(manifest, "train")
    used, total = int((counts > 0).sum()), int(counts.sum())
    order = np.argsort(-counts, kind="stable")
    with _figure(folder / "vocabulary.png", "rank of the piece", "occurrences in train") as axes:
        axes.plot(np.arange(1, used + 1), counts[order[:used]])
        axes.set_xscale("log")
        axes.set_yscale("log")
    name = _piece_namer(manifest)
    rows = [
        (f"`{name(piece)}`", int(counts[piece]), f"{counts[piece] / max(1, total):.2%}") for piece in order[:TOP_PIECES]
    ]
    rare = int((counts[counts > 0] < 100).sum())
    summary = f"{used:,} of {len(counts):,} pieces occur in train, {rare:,} of them fewer than 100 times."
    return [
        "## Vocabulary", "", summary, "", "![vocabulary](vocabulary.png)", "",
        *_markdown(("piece", "occurrences", "share"), rows),
    ]  # fmt: skip


def _piece_namer(manifest: Manifest) -> Any:
    if manifest.tokenizer.file is None:
        return lambda piece: f"{piece:#04x}"
    tokenizer = TextTokenizer.load(manifest.folder / manifest.tokenizer.file)
    return lambda piece: tokenizer.piece(int(piece)).replace("\n", "\\n").replace("|", "\\|").replace("`", "'")


def _inputs(manifest: Manifest) -> list[str]:
    rows = [
        (r.name, r.format, r.split, r.bytes, r.documents, sum(r.quarantined.values()), r.filtered, r.duplicates)
        for r in manifest.provenance.inputs
    ]
    header = ("raw file", "format", "split", "bytes", "documents", "quarantined", "filtered", "duplicates")
    settings = ", ".join(f"{name} {version}" for name, version in manifest.provenance.versions.items())
    return ["## Where it comes from", "", *_markdown(header, rows), f"Made with {settings}.", ""]


class _figure:
    """A plot that is saved when the block ends."""

    def __init__(self, path: Path, x: str, y: str, *, height: float = FIGURE_INCHES[1]) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # here: 0.5 s, and only `stats` plots
        from matplotlib.figure import Figure

        self._path = path
        self._figure = Figure(figsize=(FIGURE_INCHES[0], height), dpi=100, layout="constrained")
        FigureCanvasAgg(self._figure)
        self._axes = self._figure.add_subplot()
        self._axes.set_xlabel(x)
        self._axes.set_ylabel(y)

    def __enter__(self) -> Any:
        return self._axes

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if error is None:
            self._figure.savefig(self._path, metadata={"Software": None})
