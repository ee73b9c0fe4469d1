"""From runs and a text to the folder of an analysis."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.arguments import MOST_DIGITS, quoted
from common.errors import UserError
from common.files import replacing_all
from common.folders import making
from common.strict_json import dumps
from common.tables import counted
from pretrain.analysis import numbers, pictures
from pretrain.analysis.findings import Findings
from pretrain.analysis.page import Page
from pretrain.analysis.trace import Request, trace_text
from pretrain.checkpoint.folder import check_output_folder, run_folder
from pretrain.saved_model import SavedModel
from pretrain.views.reading import read_object

PAGE, NUMBERS, DESCRIPTION = "analysis.html", "analysis.safetensors", "analysis.json"
NUMBER = rf"\d{{1,{MOST_DIGITS}}}"
MOST_LAYERS = 6
"""Layers that are drawn unless --layers says which."""


@dataclass(frozen=True)
class Settings:
    """What a user may choose."""

    layers: str | None = None
    """`all`, or numbers and ranges such as 0,4-6; None: all, or MOST_LAYERS evenly spaced ones."""
    tokens: int = 4096
    """Most tokens of the text that are read."""
    map_tokens: int = 64
    """Queries of the attention maps."""
    window: int = 0
    """Which window of sequence_length tokens the maps show, counted from 0."""


def chosen_layers(wanted: str | None, num_layers: int, run: str) -> list[int]:
    """Numbers, rising. Raises UserError."""
    if wanted is None:
        count = min(num_layers, MOST_LAYERS)
        return sorted({round(i * (num_layers - 1) / max(count - 1, 1)) for i in range(count)})
    if wanted.strip() == "all":
        return list(range(num_layers))
    found: set[int] = set()
    for part in wanted.split(","):
        match = re.fullmatch(rf"\s*({NUMBER})(?:\s*-\s*({NUMBER}))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
        if first > last:
            raise UserError(
                f"--layers: {quoted(part.strip())} is no layer; write all, or numbers and ranges such as 0,4-6"
            )
        if last >= num_layers:
            raise UserError(f"--layers: {run} has the layers 0 to {num_layers - 1}, not {last}")
        found |= set(range(first, last + 1))
    return sorted(found)


def encoded(saved: SavedModel, text: str, settings: Settings) -> list[int]:
    """The first `settings.tokens` ids of the text. Raises UserError if it has none in the window of the maps."""
    model = saved.config.model
    try:
        ids = saved.tokenizer.encode(text)[: settings.tokens]
    except UserError as error:
        raise UserError(f"--text: {error}") from None  # without the option the text is a paragraph of the project
    if not ids:
        raise UserError("--text: gives no token; give some sentences")
    if len(ids) <= settings.window * model.sequence_length:
        windows = -(-len(ids) // model.sequence_length)
        raise UserError(
            f"--window: the text has {counted(len(ids), 'token')} in {counted(windows, 'window')} of "
            f"{model.sequence_length}; choose one of them, counted from 1, or read more (--tokens)"
        )
    return ids


def findings_of(
    saved: SavedModel,
    label: str,
    ids: Sequence[int],
    settings: Settings,
    after_window: Callable[[int], object],
    *,
    of_average: bool = False,
) -> Findings:
    """Runs the model over `ids`. `of_average`: `saved` holds the moving average of the weights. Raises UserError where
    its outputs are not finite."""
    layers = chosen_layers(settings.layers, saved.config.model.num_layers, label)
    request = Request(layers, settings.window, settings.map_tokens)
    trace = trace_text(saved.model, ids, request, document_end=saved.document_end, after_window=after_window)
    if not np.isfinite(trace.losses).all():
        raise UserError(
            f"checkpoint {saved.checkpoint.path}: its outputs are not finite, so it has diverged or its numbers "
            f"overflow; name an earlier checkpoint"
        )
    return Findings(
        label=label,
        place=saved.checkpoint.path,
        step=saved.checkpoint.progress.step,
        model=saved.config.model,
        num_parameters=sum(parameter.numel() for parameter in saved.model.parameters()),
        tokens=np.array(ids, np.int64),
        pieces=saved.tokenizer.pieces(ids),
        layers=layers,
        trace=trace,
        of_average=of_average,
    )


def labels(checkpoints: Sequence[Path]) -> list[str]:
    """A name for each run: the folder's, with the step's where two checkpoints are of one run, and with a number where
    that does not tell them apart."""
    names = [run_folder(path).name or "run" for path in checkpoints]
    names = [f"{n} {p.name}" if names.count(n) > 1 else n for n, p in zip(names, checkpoints, strict=True)]
    return [f"{n} ({i + 1})" if names.count(n) > 1 else n for i, n in enumerate(names)]


def default_folder(checkpoints: Sequence[Path], *, of_average: bool = False) -> Path:
    """In the first one's run, or, as the results of an evaluation, in a folder beside a checkpoint elsewhere, which
    holds weights and nothing else; named after its step; several checkpoints, and after the others, so that the page
    of the first alone stays; of moving averages with `-ema`, so that the page of the weights stays."""
    others = [re.sub(r"[^\w.=-]+", "-", label).strip("-.") for label in labels(checkpoints)[1:]]
    name = "-".join([checkpoints[0].name, *(["with", *others] if others else [])])
    first, run = checkpoints[0].absolute(), run_folder(checkpoints[0])
    return (run.parent if run == first else run) / "analysis" / (name[:150] + "-ema" * of_average)


def check_folder(folder: Path) -> None:
    """Refuses a folder that cannot be written, or holds another program's file of our names. Raises UserError."""
    check_output_folder(folder, "--out")
    if any((folder / name).exists() for name in (PAGE, NUMBERS, DESCRIPTION)) and not _is_ours(folder):
        raise UserError(f"--out: {folder} holds {PAGE} or numbers of another program; name another folder")


def _is_ours(folder: Path) -> bool:
    return read_object(folder / DESCRIPTION).get("kind") == numbers.MARK


def drawn(runs: Sequence[Findings], settings: Settings, after_picture: Callable[[str], object]) -> dict[str, bytes]:
    """Every picture by file name. Numbers in names count the runs, and for maxima the drawn layers, from 0."""
    found: dict[str, bytes] = {}

    def add(name: str, content: bytes | None) -> None:
        if content is not None:
            found[name] = content
        after_picture(name)

    for number in range(max(len(run.map_layers) for run in runs)):
        rows = [(run, run.map_layers[number]) for run in runs if number < len(run.map_layers)]
        add(f"attention-maximum-{number}.png", pictures.maximum_maps(rows))
    for index, run in enumerate(runs):
        for kind in run.kinds():
            add(f"load-{index}-{kind.replace(' ', '-')}.png", pictures.load(run, kind))
        for layer in run.layers:
            if layer in run.map_layers:
                add(f"attention-heads-{index}-layer-{layer}.png", pictures.head_maps(run, layer))
            if run.trace.routers:
                add(f"selection-{index}-layer-{layer}.png", pictures.selection(run, layer, settings.map_tokens))
                add(f"together-{index}-layer-{layer}.png", pictures.together(run, layer))
    return found


def write(folder: Path, runs: Sequence[Findings], images: dict[str, bytes], text_name: str) -> None:
    """Writes the folder; the pictures of an earlier analysis that this one does not have are removed. After an error
    the folder is what it was. analysis.json gets its name first, so that what a kill leaves is known as ours."""
    before = read_object(folder / DESCRIPTION).get("pictures", []) if _is_ours(folder) else []
    with making(folder), replacing_all(folder) as put:
        put(DESCRIPTION, dumps(numbers.description(runs, sorted(images)), indent=1).encode() + b"\n")
        for name, content in images.items():
            put(name, content)
        put(NUMBERS, numbers.arrays(runs))
        # A name of a file that is no UTF-8 has letters that no encoding has.
        put(PAGE, Page(runs, images, text_name).html().encode("utf-8", errors="backslashreplace"))
    for name in before:
        if isinstance(name, str) and re.fullmatch(r"[a-z0-9-]+\.png", name) and name not in images:
            (folder / name).unlink(missing_ok=True)
