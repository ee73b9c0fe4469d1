"""Checkpoints as folders: opening, checking, listing, removing. Nothing here computes or communicates."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import PassingError, UserError, kind_of
from common.files import intended_name
from common.folders import check_writable_folder
from common.hashing import sha256_file
from common.presence import exists, is_dir, is_file
from pretrain.config.validated import WINDOWS, has_effect, setting
from pretrain.data.patience import Patience
from pretrain.data.progress import Progress

FORMAT_VERSION = 2
STATE_FILE, TENSORS_FILE, COMMIT_FILE = "state.json", "tensors.json", "commit.json"
TOKENIZER_FILE = "tokenizer.model"
"""Only in checkpoints of weights alone, see weights.py."""
PARTIAL = ".partial"
CONVERTED = "weights.json"
"""In what `checkpoint.py convert` writes, which has a config.json too, and nothing that a command goes on from."""
CHECKPOINT_NAME = re.compile(r"step-\d{8,}")
"""Of a folder that a run writes, and continues from."""
OWN_FILE = re.compile(
    rf"(rank-\d{{5,}}\.safetensors|tensors\.json|state\.json|commit\.json|tokenizer\.model)({re.escape(PARTIAL)})?"
)


AT_ONCE = Patience()
"""Raises each error as it is."""


class DamagedCheckpoint(UserError):
    """The folder does not hold a whole checkpoint; another checkpoint may be whole."""


class UnreadCheckpoint(DamagedCheckpoint, PassingError):
    """It could not be read, which may pass: it may be whole itself."""


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: its folder and parsed state.json."""

    path: Path
    state: dict[str, Any]

    @property
    def progress(self) -> Progress:
        return Progress.from_json(self.state["progress"])

    @property
    def bytes(self) -> int:
        """Bytes of all files except the two that list the sizes."""
        return sum(entry["bytes"] for entry in self.state["files"].values())

    @property
    def weights_source(self) -> str | None:
        """Of a checkpoint of weights alone (weights.py): where they come from. None for one of a run."""
        entry = self.state.get("weights_only")
        return None if entry is None else str(entry["source"])

    @classmethod
    def open(cls, path: Path, *, rank: int = 0, world_size: int = 1, patience: Patience = AT_ONCE) -> Checkpoint:
        """Checks the commit marker, parses state.json and checks that the files are there with their sizes: this rank's
        share of them; none of them where world_size is 0. `patience` makes every read.

        Raises DamagedCheckpoint, or a plain UserError for a checkpoint that is whole but has another format."""
        try:
            if not patience(lambda: is_dir(path)):
                raise UserError(
                    f"checkpoint.resume: there is no checkpoint folder {path}; use auto, never or a step-... folder"
                )
            content = patience((path / STATE_FILE).read_bytes)
            state = json.loads(content)
            version, files = state["format_version"], state["files"]
            if version != 1:  # in version 1 the rename alone was the commit
                marker = json.loads(patience((path / COMMIT_FILE).read_bytes))
                if (len(content), hashlib.sha256(content).hexdigest()) != (marker["bytes"], marker["sha256"]):
                    raise DamagedCheckpoint(f"checkpoint {path}: {STATE_FILE} does not match {COMMIT_FILE}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, UserError) and not isinstance(error, PassingError):
                raise
            raise _unread(path, error) from None
        if version != FORMAT_VERSION:
            raise UserError(
                f"checkpoint {path}: has format {version}, but this version reads {FORMAT_VERSION}; continue with the "
                f"version that wrote it, or choose another --run-dir"
            )
        for name in files:
            if Path(name).name != name:
                raise DamagedCheckpoint(f"checkpoint {path}: file name {name!r} leaves the folder")
        for name in sorted(files)[rank::world_size] if world_size else ():
            _check_size(path, name, files[name]["bytes"], patience)
        return cls(path, state)

    def damaged_file(
        self,
        *,
        rank: int = 0,
        world_size: int = 1,
        read: Callable[[int], None] | None = None,
        patience: Patience = AT_ONCE,
    ) -> str | None:
        """Checks this rank's share of the sha256 sums. Returns the first file that does not match, with the reason, or
        None. Calls `read` with the number of bytes after each read. `patience` reads each file. Raises UnreadCheckpoint
        where one cannot be read now."""
        for name in sorted(self.state["files"])[rank::world_size]:
            try:
                found = patience(functools.partial(sha256_file, self.path / name, read))
            except (OSError, PassingError) as error:
                if kind_of(error) is PassingError:
                    raise _unread(self.path, error) from None
                return _unreadable(error)
            if found != self.state["files"][name]["sha256"]:
                return f"{name} does not match its sha256"
        return None

    def check_files(self, *, rank: int = 0, world_size: int = 1) -> None:
        """Raises DamagedCheckpoint where `damaged_file` finds one. A single process shows a progress bar."""
        from common.progress_bar import count_bytes  # here, so that a run does not import tqdm

        read = count_bytes(self.path.name, self.bytes) if world_size == 1 else None
        if problem := self.damaged_file(rank=rank, world_size=world_size, read=read):
            raise DamagedCheckpoint(f"checkpoint {self.path}: {problem}; name an earlier one")


@contextlib.contextmanager
def while_they_are_there(checkpoints: Sequence[Path], argument: str) -> Iterator[None]:
    """What cannot be read inside because a run that goes on has removed one of the checkpoints is raised as a UserError
    that says so; `argument` of the command named it. Of several ranks the one that has met it says it: what the others
    raise, that a peer has failed or is gone, stays what it is."""
    try:
        yield
    except (UserError, OSError):
        gone = next((path for path in checkpoints if not path.is_dir()), None)
        if gone is None:
            raise
        raise UserError(
            f"{argument}: {gone} was removed while it was read, by a run that goes on (checkpoint.keep_last); give the "
            f"command again for the newest one"
        ) from None


def _check_size(path: Path, name: str, expected: int, patience: Patience) -> None:
    """Raises DamagedCheckpoint unless the file `name` of the checkpoint `path` has this size."""
    size: int | None = None
    try:
        size = patience((path / name).stat).st_size
    except FileNotFoundError:
        pass
    except (OSError, PassingError) as error:
        raise _unread(path, error) from None
    if size != expected:
        found = "missing" if size is None else f"{size} bytes, not {expected} bytes"
        raise DamagedCheckpoint(f"checkpoint {path}: {name} is {found}")


def damaged_by(error: Exception) -> type[DamagedCheckpoint]:
    """What to raise where a checkpoint's file was not read for `error`, or makes no sense."""
    return UnreadCheckpoint if kind_of(error) is PassingError else DamagedCheckpoint


def _unread(path: Path, error: Exception) -> DamagedCheckpoint:
    return damaged_by(error)(f"checkpoint {path}: {_unreadable(error)}")


def _unreadable(error: Exception) -> str:
    if isinstance(error, OSError):
        name = Path(error.filename).name if error.filename else "a file"
        return f"{name} cannot be read ({error.strerror or error})"
    if isinstance(error, PassingError):
        return str(error)
    return f"{STATE_FILE} or {COMMIT_FILE} cannot be read ({error})"


def digest_entry(path: Path) -> dict[str, Any]:
    """{"bytes", "sha256"} of a file."""
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def list_checkpoints(folder: Path, *, patience: Patience = AT_ONCE) -> list[Path]:
    """Complete checkpoints of a run, oldest first. Only folders named step-NNNNNNNN count: a copy under another name
    belongs to the user, and no run resumes from it by itself or removes it. `patience` lists them. Raises UserError if
    the folder cannot be read."""
    try:
        found = patience(lambda: [p for p in folder.iterdir() if CHECKPOINT_NAME.fullmatch(p.name) and is_dir(p)])
    except FileNotFoundError:
        return []
    except OSError as error:
        raise kind_of(error)(f"--run-dir: {folder} cannot be read: {error.strerror}") from None
    return sorted(found, key=step_of)


def newest_of(checkpoints: Sequence[Path]) -> Path:
    """The newest that was committed, of one or more, oldest first; the last if none was. Raises UserError."""
    try:
        return next((path for path in reversed(checkpoints) if is_file(path / COMMIT_FILE)), checkpoints[-1])
    except OSError as error:
        raise kind_of(error)(f"{error.filename} cannot be read: {error.strerror}") from None


def check_output_folder(folder: Path, option: str) -> None:
    """Raises UserError where a command must not write into `folder`, which is absolute: it is no folder that this user
    may write, or stands among a run's checkpoints. There it would pass for the newest one, which the run could not
    read, or go with a checkpoint that the run removes."""
    check_writable_folder(folder, option)
    for place in (folder, *folder.parents):
        if is_among_checkpoints(place):
            raise UserError(
                f"{option}: {place} is, or would pass for, a checkpoint that a run continues from and removes by "
                f"itself; name a folder outside of {place.parent}"
            )


def check_not_converted(folder: Path, option: str) -> None:
    """Raises UserError for a folder that launch/checkpoint.py convert wrote."""
    if (folder / CONVERTED).exists() and not (folder / STATE_FILE).exists():
        raise UserError(
            f"{option}: {folder} is what launch/checkpoint.py convert wrote for other programs; name the checkpoint "
            f"that it was made of, or the run"
        )


def check_no_export(folder: Path, option: str) -> None:
    """Raises UserError for a folder of weights that are no checkpoint: launch/export.py, transformers or
    launch/checkpoint.py convert wrote it."""
    check_not_converted(folder, option)
    if (folder / "generation_config.json").exists() and not (folder / STATE_FILE).exists():
        raise UserError(
            f"{option}: {folder} is an export; make a checkpoint of it, python launch/import_weights.py "
            f"{shlex.quote(str(folder))} --to FOLDER, and name that"
        )


def is_among_checkpoints(folder: Path) -> bool:
    """Whether a run takes the folder, which is absolute and need not be there, for one of its checkpoints."""
    beside = folder.parent
    return bool(beside.name == "checkpoints" and CHECKPOINT_NAME.fullmatch(folder.name) and list_checkpoints(beside))


def run_folder(checkpoint: Path) -> Path:
    """Of a checkpoint in a run's `checkpoints`; of a copy elsewhere the copy itself."""
    checkpoint = checkpoint.absolute()
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint


def names_of(checkpoints: Sequence[Path]) -> list[str]:
    """Run and step of each, without a place on this machine, for what goes to other machines; runs of one name have a
    number. Of a copy outside of a run its own name."""
    paths = [Path(os.path.abspath(path)) for path in checkpoints]
    places = list(dict.fromkeys(map(run_folder, paths)))

    def label(place: Path) -> str:
        alike = [other for other in places if other.name == place.name]
        return place.name if len(alike) == 1 else f"{place.name} ({alike.index(place) + 1})"

    found = [(path, run_folder(path)) for path in paths]
    return [label(run) if run == path else f"{label(run)} {path.name}" for path, run in found]


def check_new_checkpoint(folder: Path, option: str) -> None:
    """Raises UserError, which names `option`, where weights alone cannot become the new checkpoint `folder`: it is
    there, or a run would take it for its own."""
    if os.path.lexists(folder):
        raise UserError(f"{option}: {folder} exists; name a folder that does not")
    if is_among_checkpoints(folder.absolute()):
        raise UserError(
            f"{option}: {folder} would pass for a checkpoint of the run, which does not continue from weights alone; "
            f"name a folder outside of checkpoints, such as mean"
        )


def step_of(path: Path) -> int:
    """The optimizer step that a checkpoint folder is named after."""
    return int(path.name.removeprefix("step-"))


def set_aside_newer(folder: Path, step: int) -> list[Path]:
    """Renames the checkpoints of steps after `step`, which a run that starts there will write anew. Returns the new
    names; nothing is deleted."""
    return [set_aside(path) for path in list_checkpoints(folder) if step_of(path) > step]


def set_aside(path: Path) -> Path:
    """Renames a checkpoint, so that no run resumes from it or removes it. Returns its new name."""
    number = 1
    while exists(target := path.with_name(f"superseded-{number}-{path.name}")):
        number += 1
    return path.rename(target)


def remove_partials(folder: Path) -> None:
    """Removes what interrupted saves and removals left."""
    for stale in folder.glob(f"step-*{PARTIAL}"):
        if CHECKPOINT_NAME.fullmatch(stale.name.removesuffix(PARTIAL)) and holds_checkpoint_files_alone(stale):
            shutil.rmtree(stale)


def holds_checkpoint_files_alone(path: Path) -> bool:
    """Whether a folder holds only files that a checkpoint writes, so that a run may remove it."""
    return (
        path.is_dir()
        and not path.is_symlink()
        and all(OWN_FILE.fullmatch(intended_name(entry.name)) for entry in path.iterdir())
    )


@dataclass(frozen=True, kw_only=True)
class Retention:
    """Which checkpoints outlive a newer one."""

    keep_last: int
    """How many of the newest are kept, at least 1."""
    keep_every_steps: int = 0
    """Checkpoints of steps divisible by this are kept; 0: none for this reason."""
    keep_best: int = 0
    """How many with the lowest validation loss are kept; of two equal ones the older. Losses on other data, other
    splits or other windows say nothing of each other: if a resume changed that, so many of each."""

    def kept(self, paths: list[Path]) -> set[Path]:
        """Those of `paths` (oldest first) that are kept. A checkpoint whose loss cannot be read counts as one without a
        loss."""
        kept = set(paths[-self.keep_last :])
        if self.keep_every_steps:
            kept |= {path for path in paths if step_of(path) % self.keep_every_steps == 0}
        if self.keep_best:
            losses: dict[str, list[tuple[float, Path]]] = {}
            for path in paths:
                if (found := validation_loss(path)) is not None:
                    losses.setdefault(found[0], []).append((found[1], path))
            for alike in losses.values():
                kept |= {path for _, path in sorted(alike, key=lambda entry: entry[0])[: self.keep_best]}
        return kept

    def apply(self, folder: Path) -> None:
        """Removes the others, except folders that hold other files too. What an interrupted removal leaves no longer
        has the name of a checkpoint."""
        paths = list_checkpoints(folder)
        kept = self.kept(paths)
        for path in paths:
            if path not in kept and holds_checkpoint_files_alone(path):
                doomed = path.with_name(path.name + PARTIAL)
                path.rename(doomed)
                shutil.rmtree(doomed)


def validation_loss(path: Path) -> tuple[str, float] | None:
    """The validation loss that a checkpoint was saved with, nats, behind what was read for it; None: there was no
    validation at its step."""
    try:
        state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        return None if state["validation_loss"] is None else (_validated(state), state["validation_loss"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        return None


def _validated(state: dict[str, Any]) -> str:
    """Which windows of which data a validation reads: the same text for the same ones. Weights of a mixture change the
    digest of its data, but not these."""
    config, stages = state.get("config", {}), state.get("progress", {}).get("stages")
    digests = [source["digest"] for source in stages[-1]["sources"] if source["weight"]] if stages else []
    keys = [key for key in ("evaluate.split", *WINDOWS) if has_effect(key, config)]
    windows = {key: setting(config, key) for key in keys}
    return json.dumps([windows, digests or [state.get("manifest_digest")]])
