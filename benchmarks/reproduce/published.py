"""The paper's tables as rows of configs/paper. Which configurations a table has, and the published figures, are read
from configs/paper/README.md and from the descriptions of the files, where tests hold them together."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from common.paths import REPOSITORY
from model.config import SigmaMoEConfig
from pretrain.config.loading import load_config
from pretrain.config.schema import Config

FOLDER = REPOSITORY / "configs" / "paper"
RUNS = "runs/paper"
"""Where the commands put their runs."""
MEMORY = re.compile(r"with (\d+) chunks of memory in evaluation")
"""In the description of a model whose figure is of more memory than it was trained with ..."""
MEMORY_STREAMS = 4
"""... and the streams of that evaluation (the σ-MoE paper's test_batch_size)."""


@dataclass(frozen=True)
class Row:
    """One model of one table."""

    name: str
    """Of its file in configs/paper, without .json."""
    published: str | None
    """As printed; None: the figure is not in this repository."""
    split: str
    """That the figure is of."""
    trained_as: str | None = None
    """Title of the table whose run this row evaluates on another split; None: this table trains it."""
    memory_chunks: int | None = None
    """That the figure was computed with; None: those of training."""

    @property
    def measured_on(self) -> str:
        """In words."""
        return self.split + ("" if self.memory_chunks is None else f", {self.memory_chunks} chunks of memory")


@dataclass(frozen=True)
class Table:
    title: str
    rows: tuple[Row, ...]

    @property
    def unit(self) -> str:
        """Of its figures."""
        return "bits per character" if all(in_bits(row.name) for row in self.rows) else "perplexity"


@dataclass(frozen=True)
class _Repeated:
    """A row that the paper repeats in another table, there of the validation split."""

    table: str
    """How its title begins."""
    name: str
    source: str
    """File whose description says the figure of that table ..."""
    pattern: str
    """... and where in it."""


REPEATED = (
    _Repeated("Mixture of Attention Heads", "wt103_switchhead_47m", "wt103_moa_4heads_47m", r"\(SwitchHead (\d+\.\d+)"),
    _Repeated(
        "Mixture of Attention Heads", "wt103_switchhead_262m", "wt103_moa_8heads_262m", r"\(SwitchHead (\d+\.\d+)"
    ),
    _Repeated("Which projections", "wt103_switchhead_47m", "wt103_ablation_o_47m", r"wt103_switchhead_47m: (\d+\.\d+)"),
    _Repeated("Which projections", "wt103_dense_47m", "wt103_ablation_o_47m", r"; dense (\d+\.\d+)"),
    _Repeated("Which projections", "wt103_dense_2heads_47m", "wt103_ablation_o_47m", r"dense with 2 heads (\d+\.\d+)"),
)

ZERO_SHOT = {
    "c4_switchhead_262m": {"lambada": 29.4, "blimp": 79.6, "cbt": 83.3},
    "c4_dense_262m": {"lambada": 28.2, "blimp": 76.1, "cbt": 83.6},
}
"""Published accuracy in percent of models without training for the task."""


@functools.cache
def config_of(name: str) -> Config:
    """configs/paper/NAME.json."""
    return load_config(FOLDER / f"{name}.json")


@functools.cache
def names() -> tuple[str, ...]:
    """Of all files of configs/paper."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.json")))


def in_bits(name: str) -> bool:
    """Whether its figure is in bits per character (Enwik8), not a perplexity."""
    return "bits per byte" in config_of(name).description


def tokens_wanted(name: str) -> int:
    """Tokens of the whole run."""
    config = config_of(name)
    return config.train.steps * config.batch.global_sequences * config.model.sequence_length


def overrides(name: str) -> tuple[str, ...]:
    """What one GPU needs beside the file: with a regulariser over the micro-step, the published batch must be one."""
    config = config_of(name)
    layer, batch = config.model.feedforward, config.batch
    if not isinstance(layer, SigmaMoEConfig) or layer.entropy_scope != "micro_batch":
        return ()
    whole = (f"batch.micro_sequences={batch.global_sequences}",)
    return whole if batch.micro_sequences < batch.global_sequences else ()


def evaluation(row: Row) -> str | None:
    """What makes the figure of a row of its trained run, on one GPU; None: the run has it."""
    words = f"python launch/evaluate.py {RUNS}/{row.name} --device cuda"
    if row.trained_as is not None:
        return f"{words} --set evaluate.split={row.split}"
    if row.memory_chunks is not None:
        return f"{words} --set evaluate.streams={MEMORY_STREAMS} --set model.position.memory_chunks={row.memory_chunks}"
    return None


def training(row: Row) -> str | None:
    """What trains a row, on one GPU; None: another table does."""
    if row.trained_as is not None:
        return None
    words = ["deepspeed --num_gpus 1 launch/pretrain.py", f"--config configs/paper/{row.name}.json"]
    words += [f"--run-dir {RUNS}/{row.name}", *(f"--set {override}" for override in overrides(row.name))]
    return " ".join(words)


def zero_shot_command(name: str) -> str:
    """What evaluates a trained model as the table of zero-shot tasks does."""
    return f"python launch/evaluate.py {RUNS}/{name} --tasks {','.join(ZERO_SHOT[name])} --device cuda"


@functools.cache
def tables(page: Path = FOLDER / "README.md") -> tuple[Table, ...]:
    """In the order of the page. Raises UserError if it has none."""
    found: dict[str, list[Row]] = {}
    title = ""
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            title = line.removeprefix("## ").replace("`", "")
        elif line.startswith("| `"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            name, figure = cells[0].strip("`"), cells[-1]
            memory = MEMORY.search(config_of(name).description)
            chunks = None if memory is None else int(memory[1])
            row = Row(name, None if figure == "-" else figure, config_of(name).evaluate.split, memory_chunks=chunks)
            found.setdefault(title, []).append(row)
    if not found:
        raise UserError(f"{page}: no table of configurations; restore the file")
    trained = {row.name: title for title, rows in found.items() for row in rows}
    return tuple(Table(title, (*rows, *_repeated(title, trained))) for title, rows in found.items())


def _repeated(title: str, trained: dict[str, str]) -> list[Row]:
    rows = []
    for one in REPEATED:
        if title.startswith(one.table):
            figure = re.search(one.pattern, config_of(one.source).description)
            if figure is None:
                raise UserError(f"configs/paper/{one.source}.json: its description lacks the figure of {one.name}")
            rows.append(Row(one.name, figure.group(1), "validation", trained[one.name]))
    return rows
