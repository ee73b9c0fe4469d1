"""The choices of a run's routers on the disk, to be replayed by another run: RUN_DIR/routing.

    record.json                             what was recorded: routers, sizes, data, seed
    step-00000012/rank-00003.safetensors    what rank 3 chose in step 12 (counted from 1): per router
        NAME/index  [n, L, H, k] uint8 (or wider): of n sequences, L tokens and this rank's H heads
        NAME/place  [n + 2] int64: the first head, the first token, and each sequence's position in the run

A step takes (tokens per step) x (choices per token) bytes in every layout. Ranks write what they chose, and a reader in
any layout puts the pieces together. Nothing that is read is executed.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from safetensors.torch import save
from torch import Tensor

from common.errors import UserError, kind_of
from common.files import intended_name, write_file, write_json
from model.choices import Piece, choice_dtype
from model.language_model import build_on_meta, routing_statistics
from pretrain.config.schema import Config
from pretrain.data.stages import Stage

FORMAT = 1
KEY = "train.replay_routing"


def step_folder(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


WINDOW_KEYS = ("max_tokens", "shuffle_block_windows", "shuffle_blocks", "document_mask")
"""Keys of the data section, apart from its order, that decide what a window is and when it comes."""


def description(config: Config, digest: str, stage: Stage) -> dict[str, Any]:
    """What two runs must have in common so that one can take the other's choices. `routers`: per router of the
    whole model [heads, experts, choices]. `stage`: of the data that the run reads."""
    model, choices = config.model, {}
    for part, settings in (("attention", model.attention), ("feedforward", model.feedforward)):
        # MoA's heads are its active experts.
        choices[part] = getattr(settings, "active_experts", getattr(settings, "num_heads", 0))
    shapes = {name: statistics.shape for name, statistics in routing_statistics(build_on_meta(model))}
    return {
        "routers": {
            name: [shape[0] if len(shape) == 2 else 1, shape[-1], choices[name.split(".")[-2]]]
            for name, shape in shapes.items()
        },
        "sequence_length": model.sequence_length,
        "memory_length": model.memory_length,
        "global_sequences": config.batch.global_sequences,
        "data_digest": digest,
        "seed": config.train.seed,
        # These decide, with digest and seed, which windows a step reads; else choices for other text would be taken
        # silently.
        "data.order": "streams" if config.reads_streams else "shuffled",
        **{f"data.{name}": getattr(config.data, name) for name in WINDOW_KEYS},
        # Where a stage begins and where its sources stood decides its windows too; the first has neither.
        **({"data.streams": stage.streams} if stage.streams is not None else {}),
        **({"data stage": [stage.first, [[s.read, s.shuffle] for s in stage.mixed]]} if stage.first else {}),
    }


class Replay(NamedTuple):
    """One router's choices of one step."""

    choices: Tensor
    """[S, L, H, k] of `choice_dtype`, in the order of the run's sequences modulo S."""
    positions: Tensor
    """[S] int64: position in the run of each sequence."""


class Record:
    """A recorded run."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError if `folder` holds no record."""
        self.folder = folder if os.path.exists(folder / "record.json") else folder / "routing"
        path = self.folder / "record.json"
        try:
            self.content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if self.content["format"] != FORMAT:
                raise ValueError
        except FileNotFoundError:
            raise UserError(
                f"{KEY}: {folder} holds no record.json; name the run folder of a run with train.record_routing = true"
            ) from None
        except OSError as error:
            raise kind_of(error)(f"{KEY}: {path} cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f"{KEY}: {path} is not a record of choices that this version reads") from None

    def check(self, expected: dict[str, Any]) -> None:
        """Raises UserError unless the recorded run has the `description` that is `expected`."""
        for name in {**expected, **self.content}:
            then, now = self.content.get(name), expected.get(name)
            if then != now and name != "format":
                raise UserError(f"{KEY}: {self.folder} does not fit: {_difference(name, then, now)}")

    def check_steps(self, steps: Iterable[int]) -> None:
        """Raises UserError unless the record holds them."""
        try:  # one listing: a look at each step would be as many calls of every rank
            held = {int(path.name[5:]) for path in self.folder.iterdir() if re.fullmatch(r"step-\d+", path.name)}
        except OSError as error:
            raise kind_of(error)(f"{KEY}: {self.folder} cannot be read: {error.strerror}") from None
        missing = next((step for step in steps if step not in held), None)
        if missing is not None:
            range_held = f"steps {min(held)} to {max(held)}" if held else "no step"
            raise UserError(
                f"{KEY}: {self.folder} holds {range_held}, but this run takes step {missing} too; record "
                f"more steps, or end it earlier with train.stop_after_steps"
            )

    def load(self, step: int, routers: Iterable[str], context_lengths: Iterable[int]) -> dict[str, Replay]:
        """What `routers` chose in `step`. Raises UserError if the record is incomplete or damaged, or if its sequences
        have other lengths (with memory) than `context_lengths`."""
        folder, lengths = step_folder(self.folder, step), set(context_lengths)
        parts: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in routers}
        try:
            for path in sorted(folder.glob("rank-*.safetensors")):
                with safetensors.safe_open(path, "pt") as file:
                    for name in {key.rpartition("/")[0] for key in file.keys()} & parts.keys():  # noqa: SIM118
                        parts[name].append((file.get_tensor(f"{name}/index"), file.get_tensor(f"{name}/place")))
            return {name: self._assemble(name, found, lengths) for name, found in parts.items()}
        except (OSError, safetensors.SafetensorError, ValueError, IndexError, RuntimeError) as error:
            raise kind_of(error)(f"{KEY}: {folder} cannot be replayed: {error}") from None

    def _assemble(self, name: str, parts: list[tuple[Tensor, Tensor]], lengths: set[int]) -> Replay:
        heads, num_experts, k = self.content["routers"][name]
        sequences = self.content["global_sequences"]
        tokens = max((int(place[1]) + index.shape[1] for index, place in parts), default=0)
        if parts and tokens not in lengths:
            raise ValueError(
                f"its sequences have {tokens} tokens with memory, this run's {' or '.join(map(str, sorted(lengths)))}; "
                f"let both begin at the same step"
            )
        choices = torch.zeros(sequences, tokens, heads, k, dtype=choice_dtype(num_experts))
        seen = torch.zeros(sequences, tokens, heads, dtype=torch.bool)
        positions = torch.full((sequences,), -1, dtype=torch.int64)
        for index, place in parts:
            head, token = place[:2].tolist()
            rows = place[2:] % sequences
            where = (rows, slice(token, token + index.shape[1]), slice(head, head + index.shape[2]))
            choices[where], seen[where], positions[rows] = index, True, place[2:]
        if not parts or not seen.all():
            raise ValueError(f"{name} is incomplete, so a rank did not write")
        ordered = choices.int().sort(-1).values
        if int(ordered[..., -1].max()) >= num_experts or bool((ordered.diff(dim=-1) == 0).any()):
            raise ValueError(f"{name} names experts that are not {k} different ones of {num_experts}")
        return Replay(choices, positions)


def check_recording(folder: Path, content: dict[str, Any]) -> bool:
    """Whether `folder` holds choices already, those of this run. Raises UserError if they are another's, and
    OSError."""
    path = folder / "record.json"
    if not path.exists():
        return False
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise UserError(f"train.record_routing: {path} is not a record of choices; move it away") from None
    if held != {"format": FORMAT, **content}:
        raise UserError(
            f"train.record_routing: {folder} holds the choices of another run; move it away, or give the run "
            f"another --run-dir"
        )
    return True


def begin_record(folder: Path, content: dict[str, Any], step: int) -> None:
    """Rank 0: prepares the folder for the choices after `step`, and removes those of later steps, which will be
    computed again. Raises UserError if it holds another run's."""
    try:
        if check_recording(folder, content):
            remove_after(folder, step)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "record.json", {"format": FORMAT, **content})
    except OSError as error:
        raise kind_of(error)(f"train.record_routing: {folder} cannot be written: {error.strerror}") from None


def remove_after(folder: Path, step: int) -> None:
    """The choices of later steps."""
    for path in folder.glob("step-*"):
        if re.fullmatch(r"step-\d{8,}", path.name) and int(path.name[5:]) > step:
            for file in path.iterdir():
                if re.match(r"rank-\d{5,}\.safetensors", intended_name(file.name)):
                    file.unlink()
            path.rmdir()


def write_step(folder: Path, step: int, rank: int, pieces: dict[str, list[Piece]]) -> None:
    """This rank's choices of one step, whole or not at all. Raises UserError."""
    tensors = {}
    for name, parts in pieces.items():
        first = parts[0].place
        place = [torch.tensor([first.heads.start or 0, first.first_token]), *(p.place.sequence_index for p in parts)]
        tensors[f"{name}/index"] = torch.cat([part.index for part in parts]).cpu().contiguous()
        tensors[f"{name}/place"] = torch.cat([t.cpu() for t in place])
    path = step_folder(folder, step) / f"rank-{rank:05d}.safetensors"
    try:
        path.parent.mkdir(exist_ok=True)
        write_file(path, save(tensors))
    except OSError as error:
        raise kind_of(error)(
            f"train.record_routing: {path} cannot be written: {error.strerror}; make room there, and the same command "
            f"continues from the newest checkpoint, or without the record (train.record_routing=false)"
        ) from None


def _difference(name: str, then: Any, now: Any) -> str:
    if name != "routers" or not isinstance(then, dict):
        return f"its {name} is {then}, this run's {now}"
    for router in {**then, **now}:
        if then.get(router) != now.get(router):
            return f"its router {router} is {then.get(router)}, this run's {now.get(router)} (heads, experts, choices)"
    raise AssertionError
