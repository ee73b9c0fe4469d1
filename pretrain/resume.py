"""Whether and where a run continues: which checkpoint, and what is recorded of a start."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from common.errors import PassingError, UserError
from common.tables import counted
from pretrain.checkpoint import Checkpoint, DamagedCheckpoint, list_checkpoints, set_aside_newer
from pretrain.checkpoint.folder import AT_ONCE, STATE_FILE, UnreadCheckpoint, newest_of
from pretrain.config.loading import to_json
from pretrain.config.obstacles import of_a_micro_batch
from pretrain.config.resume_rules import SavedRun, changes_since
from pretrain.config.schema import Config
from pretrain.data.patience import Patience, patient_seconds
from pretrain.data.progress import Progress
from pretrain.data.sources import Sources
from pretrain.parallel.agreement import agreed, from_first_rank, of_all_ranks
from pretrain.report.code_patch import keep_patch
from pretrain.report.event_text import value_text
from pretrain.report.exit_codes import NONE_IS_WHOLE
from pretrain.report.run_folder import RunFolder
from pretrain.resilience.rollback import Rollback, pending, read_rollbacks, record_made, serving, with_skips
from pretrain.resumed_stages import progress_now, stages_of


def candidates(config: Config, run_dir: Path, *, patience: Patience = AT_ONCE) -> list[Path]:
    """Checkpoints to try, best first, following checkpoint.resume. `patience` makes every read. Raises UserError."""
    choice = config.checkpoint.resume
    existing = list_checkpoints(run_dir / "checkpoints", patience=patience)
    if choice == "auto":
        return existing[::-1]
    if choice == "never":
        if existing:
            raise UserError(
                f"checkpoint.resume: is never, but {run_dir} holds {counted(len(existing), 'checkpoint')}; choose "
                f"another --run-dir, or set checkpoint.resume to auto to continue"
            )
        return []
    # A path is where a branch starts. The same command, started again, continues that branch.
    start = named_checkpoint(choice)
    begun, unread = dict[Path, str | None](), None
    for path in existing[::-1]:
        try:
            begun[path] = Checkpoint.open(path, world_size=0, patience=patience).state["branch_start"]
        except UnreadCheckpoint as error:
            unread, patience = error, AT_ONCE  # as in `newest_valid`
        except DamagedCheckpoint:
            continue
    of_branch = [path for path, where in begun.items() if where == str(start)]
    if not of_branch:
        if unread is not None:  # it may be of this branch: a start from its beginning would set it aside
            raise unread
        _refuse_moved_start(begun, start)
    return [*of_branch, start]


def _refuse_moved_start(begun: dict[Path, str | None], start: Path) -> None:
    """Raises UserError where the run's own checkpoints, each with where its branch began, seem to be of this branch: a
    start from `start` would set them aside. Branches are told apart by that path, which a renamed run changes."""
    for path, where in begun.items():
        if where is not None and Path(where).name == start.name and not os.path.exists(where):
            raise UserError(
                f"checkpoint.resume: {path} is of a branch that began at {where}, which is not there any more; if it "
                f"is {start} now, set checkpoint.resume to auto, which continues from {path.name}; for another branch "
                f"choose another --run-dir"
            )


def named_checkpoint(choice: str) -> Path:
    """The checkpoint that checkpoint.resume names. Raises UserError, with the checkpoint that was probably meant, if it
    names something else."""
    path = _absolute(choice)
    if os.path.isfile(path):
        is_part = os.path.exists(path.parent / STATE_FILE)
        meant = f"set it to its folder, {path.parent}" if is_part else "set it to auto, never or a step-... folder"
        raise UserError(f"checkpoint.resume: {path} is a file, not the folder of a checkpoint; {meant}")
    if os.path.exists(path / STATE_FILE) or not os.path.isdir(path):
        return path  # opening it says what is missing
    for folder, what in ((path, "a folder of checkpoints"), (path / "checkpoints", "a run folder")):
        if found := list_checkpoints(folder):
            raise UserError(
                f"checkpoint.resume: {path} is {what}, not a checkpoint; its newest is: set it to {newest_of(found)}"
            )
    raise UserError(
        f"checkpoint.resume: {path} is no checkpoint (it holds no {STATE_FILE}) and no run with checkpoints; set it to "
        f"auto, never or a step-... folder"
    )


def _absolute(choice: str) -> Path:
    # Not pathlib's: those raise for ~NAME of nobody and for links in a circle.
    return Path(os.path.realpath(os.path.expanduser(choice)))


def branch_start(config: Config, resumed: Checkpoint | None) -> str | None:
    """What checkpoints of this start record as their `branch_start`: the path given as checkpoint.resume, if any."""
    if config.checkpoint.resume not in ("auto", "never"):
        return str(_absolute(config.checkpoint.resume))
    return resumed.state["branch_start"] if resumed else None


def changed_settings(config: Config, checkpoint: Checkpoint, manifest_digest: str) -> dict[str, tuple[Any, Any]]:
    """{dotted key: (then, now)} of every setting that differs from the checkpoint's. Raises UserError if one of them
    may not change, or if the checkpoint holds weights alone."""
    if (source := checkpoint.weights_source) is not None:
        raise UserError(
            f"checkpoint.resume: {checkpoint.path} holds weights alone ({source}), nothing of the optimizer; begin a "
            f"new run with them: --set train.init_from={checkpoint.path} and a new --run-dir"
        )
    state = checkpoint.state
    saved = SavedRun(str(checkpoint.path), state["config"], state["manifest_digest"], checkpoint.progress.step)

    def fits() -> bool:
        from pretrain.checkpoint.shapes import full_shapes  # here: it imports model/

        return all(state["parameters"].get(name) == shape for name, shape in full_shapes(config.model).items())

    return changes_since(saved, config, manifest_digest, fits)


def check_tokenizer(checkpoint: Checkpoint, sources: Sources) -> None:
    """Raises UserError if the run has read ids of another tokenizer, which no `checkpoint.allow_changes` allows: the
    same numbers would mean other pieces, and nothing would show it but the loss."""
    ours = sources.tokenizer.sha256
    theirs = checkpoint.state.get("tokenizer_sha256", ours)
    if theirs != ours:
        raise UserError(
            f"{sources.key}: was made with another tokenizer (sha256 {_short(ours)}) than what {checkpoint.path} was "
            f"trained on ({_short(theirs)}), so its ids mean other pieces; prepare it again with that tokenizer, or "
            f"begin a new run in another --run-dir"
        )


def _short(sha256: str | None) -> str:
    return "none: bytes" if sha256 is None else sha256[:12]


def newest_committed(paths: list[Path], *, check_sizes: bool = True, patience: Patience = AT_ONCE) -> Checkpoint | None:
    """The first of `paths` that is committed and, with `check_sizes`, whose files have their sizes; not collective,
    reads no tensor. `patience` makes every read. Raises UserError as `newest_valid`, a PassingError where one of them
    may be whole and could not be read."""
    reasons: list[UserError] = []
    for path in paths:
        try:
            return Checkpoint.open(path, world_size=1 if check_sizes else 0, patience=patience)
        except DamagedCheckpoint as error:
            reasons.append(error)
    _refuse_without(reasons)
    return None


Found = UserError | None
"""What one rank says against a checkpoint: a DamagedCheckpoint where another one may be taken for it; None: it is
whole."""


def newest_valid(
    paths: list[Path],
    *,
    rank: int,
    world_size: int,
    gather: Callable[[Found], list[Found]] | None = None,
    patience: Patience = AT_ONCE,
) -> tuple[Checkpoint | None, list[str]]:
    """The first of `paths` whose files match their sha256, and the reasons why others were passed over. Collective,
    unless `gather` is given: it turns what this rank found into what all ranks found. `patience` makes every read: a
    server that fails over damages no checkpoint.

    Raises UserError, on every rank, if there are checkpoints but none is whole: a run folder with checkpoints never
    asks for a new start from step 0. It is a PassingError where one of them may be whole and could not be read."""
    reasons: list[UserError] = []
    for path in paths:
        checkpoint: Checkpoint | None = None
        own: Found = None
        try:
            checkpoint = Checkpoint.open(path, rank=rank, world_size=world_size, patience=patience)
            damaged = checkpoint.damaged_file(rank=rank, world_size=world_size, patience=patience)
            own = DamagedCheckpoint(f"checkpoint {path}: {damaged}") if damaged else None
        except UserError as error:  # on this rank alone, perhaps, while the others ask what all have found
            own = error
            if isinstance(error, UnreadCheckpoint):
                patience = AT_ONCE  # waited for in vain: for each of many, the wait would pass for a hang
        found = [one for one in (gather or of_all_ranks)(own) if one is not None]
        if not found:
            return checkpoint, list(map(str, reasons))
        # A refusal goes before damage, and damage before what another attempt may read.
        worst = min(found, key=lambda error: (isinstance(error, DamagedCheckpoint), isinstance(error, PassingError)))
        if not isinstance(worst, DamagedCheckpoint):
            raise worst
        reasons.append(worst)
    _refuse_without(reasons)
    return None, []


def _refuse_without(reasons: list[UserError]) -> None:
    """Raises UserError with `reasons` if checkpoints were found, but all of them were passed over."""
    if reasons:
        kind = PassingError if any(isinstance(reason, PassingError) for reason in reasons) else UserError
        raise kind(
            f"{NONE_IS_WHOLE} ({'; '.join(map(str, reasons))}); move them away, choose another --run-dir, or "
            f"name another checkpoint in checkpoint.resume"
        )


def environment_changes(
    checkpoint: Checkpoint, config: Config, engine_layout: dict[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """{name: (then, now)} of data-parallel size and versions that differ from the checkpoint's, and of what a loss over
    a micro-step depends on. The other sizes are keys of the configuration, which `changed_settings` compares."""
    # Here: it imports model/, which a check before the start does not need.
    from pretrain.checkpoint.state import versions

    state = checkpoint.state
    then = {"data-parallel size": state["layout"].get("data"), **state["versions"]}
    now = {"data-parallel size": engine_layout["data"], **versions()}
    for key in of_a_micro_batch(config.model):
        name = f"sequences of a regulariser's batch, and so the loss ({key} = micro_batch)"
        then[name] = state["config"]["batch"]["micro_sequences"] * (then["data-parallel size"] or 1)
        now[name] = config.batch.micro_sequences * engine_layout["data"]
    return {key: (then.get(key), now[key]) for key in now if then.get(key) != now[key]}


def what_stands(config: Config, run_dir: Path, *, is_diverged: bool = False) -> str:
    """From which checkpoint a run that ends by a fault can go on, as a sentence without its stop. `is_diverged`: from
    there it would come to the same end, so the sentence says what to change. Not collective; raises nothing, for it
    must not change how the run ends."""
    rate = "with a lower learning rate (--set optimizer.learning_rate=...)"
    choice, folder = config.checkpoint.resume, run_dir / "checkpoints"
    try:
        paths = list_checkpoints(folder)[::-1] if choice == "never" else candidates(config, run_dir)
        newest = newest_committed(paths, check_sizes=False)
    except (PassingError, OSError) as error:
        return f"Its checkpoints cannot be read now ({error})"
    except UserError as error:
        return f"The same command would be refused: {error}"
    if newest is None:
        return f"Nothing was saved: {f'begin again {rate}' if is_diverged else 'the same command begins anew'}"
    is_own, to_continue = newest.path.parent == folder, " and checkpoint.resume=auto" * (choice == "never")
    named = f"The last whole checkpoint is that of step {newest.progress.step}" if is_own else ""
    named = named or f"Nothing was saved after {newest.path}"
    if is_diverged:
        return (
            f"{named}: resume from it {rate}, --set 'checkpoint.allow_changes=[\"optimizer\"]'{to_continue}, or from "
            f"an earlier one (checkpoint.resume=PATH)"
        )
    return f"{named}: the same command{to_continue.replace(' and', ' with')} goes on from it"


@dataclass(frozen=True)
class StartPoint:
    """Where a segment of the run begins, the same on every rank."""

    checkpoint: Checkpoint | None
    progress: Progress
    rollbacks: list[Rollback]
    """The rollbacks that led here, and earlier ones."""
    damaged: list[str]
    """Why newer checkpoints were passed over, one reason for each."""
    changes: dict[str, tuple[Any, Any]]
    """Settings that differ from the checkpoint's: key -> (then, now)."""
    initial: Path | None = None
    """Without a checkpoint: the one that train.init_from names."""

    @property
    def begins_stage(self) -> bool:
        """Whether the data of this start are another mixture than the checkpoint's."""
        return self.checkpoint is not None and len(self.progress.stages) > max(1, len(self.checkpoint.progress.stages))


def find_start(config: Config, sources: Sources, run_dir: Path, rollback: Rollback | None) -> StartPoint:
    """The checkpoint to continue from, if any, or to go back to: also for a rollback that an earlier start decided and
    did not live to make. Collective; rank 0's listing of the folder counts. Raises UserError or PeerFailed on every
    rank."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    patience = Patience(patient_seconds(config.resilience), rank=rank)
    paths = from_first_rank(lambda: paths_to_try(config, run_dir, rollback, patience))
    resumed, damaged = agreed(lambda: newest_valid(paths, rank=rank, world_size=world_size, patience=patience))
    changes = agreed(lambda: _checked_changes(config, sources, resumed) if resumed else {})
    branch = branch_start(config, resumed)
    rollbacks = from_first_rank(lambda: read_rollbacks(run_dir, branch))
    if rollback is None and (decided := pending(rollbacks)) is not None:
        if dist.get_rank() == 0:
            print(
                f"going back to before step {decided.first_step}, as the last start decided: {decided.reason}",
                flush=True,
            )
        return find_start(config, sources, run_dir, decided)

    def progress() -> Progress:
        stages = stages_of(resumed, sources, config)
        reached = with_skips(progress_now(config, resumed), stages[-1], sources.digest, rollbacks)
        return replace(reached, stages=stages)

    initial = None
    if resumed is None and (named := config.train.init_from) is not None:
        from pretrain.checkpoint.initial import initial_place  # see environment_changes

        initial = from_first_rank(lambda: initial_place(named, run_dir, patience=patience))
    # Where rank 0 says: new data go on by the name of their folder, and a node may have them in one of its own.
    return StartPoint(resumed, from_first_rank(progress), rollbacks, damaged, changes, initial)


def _checked_changes(config: Config, sources: Sources, resumed: Checkpoint) -> dict[str, tuple[Any, Any]]:
    if resumed.weights_source is None:  # `changed_settings` refuses those
        check_tokenizer(resumed, sources)
    return changed_settings(config, resumed, sources.digest)


def paths_to_try(config: Config, run_dir: Path, rollback: Rollback | None, patience: Patience) -> list[Path]:
    """Checkpoints to continue from, best first, or for a rollback to go back to; as `candidates`."""
    if rollback is None:
        return candidates(config, run_dir, patience=patience)
    if config.checkpoint.resume == "never":  # what this run saved itself
        return serving(list_checkpoints(run_dir / "checkpoints", patience=patience)[::-1], rollback)
    return serving(candidates(config, run_dir, patience=patience), rollback)


def is_other_course(folder: RunFolder, resumed: Checkpoint) -> bool:
    """Whether the steps in metrics.jsonl up to that of `resumed` are of another course than the one that it saved: of
    another branch, which a start from a checkpoint of elsewhere finds in its folder. The loss of its step tells; where
    that is not known, whether it is the folder's own. Raises UserError."""
    step, loss = resumed.progress.step, resumed.state.get("loss")
    newest = folder.newest_metrics(step)
    if newest is None:
        return False
    if newest["step"] == step and loss is not None:
        return bool(newest.get("loss") != loss)
    return not _is_own(folder, resumed)


def _goes_on(config: Config, resumed: Checkpoint) -> bool:
    """Whether this start goes on with what began at the checkpoint that checkpoint.resume names, and that is there."""
    named = config.checkpoint.resume
    if named in ("auto", "never"):
        return False
    start = _absolute(named)
    return os.path.realpath(resumed.path) != str(start) and os.path.isdir(start)


def _is_own(folder: RunFolder, resumed: Checkpoint) -> bool:
    return os.path.realpath(resumed.path.parent) == os.path.realpath(folder.checkpoints)


def record_start(
    folder: RunFolder, start: StartPoint, config: Config, layout: dict[str, int], *, data_digest: str, last_step: int
) -> bool:
    """Rank 0, before the first step: sets aside what this start supersedes, records and prints where it begins.
    `layout`: see checkpoint.layout. Returns whether it supersedes all steps in the folder, those before it too, or an
    earlier start that was killed before its first step has done so: its boards may still show them. Raises OSError."""
    from pretrain.checkpoint.state import versions  # see environment_changes

    patch = keep_patch(folder.path)
    software = dict(versions()) if patch is None else {**versions(), "changes": patch}
    about = {"last_step": last_step, "layout": layout, "software": software, "data_digest": data_digest}
    resumed = start.checkpoint
    step = resumed.progress.step if resumed else 0
    for reason in start.damaged:
        print(f"passed over a damaged checkpoint: {reason}", flush=True)
        folder.event("checkpoint_passed_over", reason=reason)
    begins_branch = resumed is not None and is_other_course(folder, resumed)
    hides_all = begins_branch or (folder.has_said("branch") and not folder.has_steps())
    # Those before it too, where they are another branch's: a rollback would go back to one of them.
    is_elsewhere = resumed is not None and not _is_own(folder, resumed)
    for path in set_aside_newer(folder.checkpoints, -1 if begins_branch and is_elsewhere else step):
        print(f"set aside a checkpoint of a later step or another branch: {path}", flush=True)
        folder.event("checkpoint_set_aside", path=path.name)
    if begins_branch:
        print(f"the steps up to {step} that {folder.path} holds are another branch's: set aside too", flush=True)
        folder.event("branch", step=step)
    folder.rewind_metrics(0 if begins_branch else step)
    if (decided := pending(start.rollbacks)) is not None:
        if not folder.has_said_since_start("rollback"):
            folder.event("rollback", **replace(decided, is_pending=False).to_json())
        record_made(folder.path)
    folder.write_config(to_json(config))
    folder.event("started", step=step, ranks=dist.get_world_size(), **about)
    if resumed is None:
        if config.train.init_from is not None:
            from pretrain.checkpoint.initial import INITIAL_WEIGHTS

            folder.event(INITIAL_WEIGHTS, path=config.train.init_from, checkpoint=str(start.initial))
        return hides_all
    print(f"resuming from {resumed.path} at step {step}", flush=True)
    if _goes_on(config, resumed):
        print(
            f"  the newest of what began at {config.checkpoint.resume}; to begin there once more, give its step-... "
            f"folders another name first",
            flush=True,
        )
    folder.event("resumed", step=step, path=str(resumed.path))
    for key, (then, now) in {**start.changes, **environment_changes(resumed, config, layout)}.items():
        if key == "description":  # of a run with --set it names the keys that are said here anyway
            continue
        print(f"  changed on resume: {key}: {value_text(then)} -> {value_text(now)}", flush=True)
        folder.event("changed_setting", key=key, then=then, now=now)
    if start.begins_stage and not config.reads_streams:  # streams read one data set: no mixture begins
        stage = start.progress.stages[-1]
        print(f"a new stage of the data begins: {stage.text()}", flush=True)
        folder.event("data_stage", step=step, text=stage.text(), **stage.to_json())
    return hides_all
