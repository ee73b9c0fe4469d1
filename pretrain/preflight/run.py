"""The checks of a run whose configuration is known. A start makes them on every rank, before the ranks meet.

Modules that import torch are imported inside functions, because refusals do not wait for them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import UserError
from common.requirements import misfits
from common.tables import counted
from pretrain.config.rules import check_device, choose_backends, rank_problems
from pretrain.config.schema import Config
from pretrain.preflight.checklist import Blocked, Checklist, Outcome

if TYPE_CHECKING:
    from pretrain.checkpoint import Checkpoint
    from pretrain.data.patience import Patience
    from pretrain.data.sources import Sources
    from pretrain.report.disk_space import CheckpointSpace

NO_DATA = "the data sets could not be opened"
MOST_FILES = 5
"""Damaged files of a run's data sets that are named: a folder that was not copied has thousands."""


@dataclass
class PlannedRun:
    """What is checked, and what the checks have found so far."""

    config: Config
    world_size: int
    run_dir: Path | None
    """None: it cannot be a run folder."""
    device: str
    """cuda or cpu: what the ranks compute on."""
    broken: frozenset[str] = frozenset()
    """Names of rules (pretrain/config/rules.py) that the configuration breaks."""
    folder: Path | None = None
    """Where the checkpoints would be written although there can be no run folder, to ask for free space."""
    alone: bool = True
    """False: one of the run's ranks, which leaves out what has to be looked up for every file of the data or of a
    checkpoint. The ranks do that together once they have met (together.py, resume.py)."""
    patience: Patience | None = None
    """For all reads of the data, those of the run too; None: none."""
    data_size: int | None = None
    sources: Sources | None = None
    newest: Checkpoint | None = None
    has_checkpoint: bool | None = None
    """None: not known."""
    passed_over: tuple[str, ...] = ()
    """Why newer checkpoints than the one that a start continues from do not count."""

    def check(self, checks: Checklist, *, thorough: bool) -> None:
        """Makes every check. `thorough`: what else a dry run reads: the newest checkpoint, the files of evaluate.tasks,
        and every shard if data.verify asks for it, which a start does when its ranks have met."""
        data = "data.sources" if self.config.data.sources else "data.manifest"
        checks.do("packages", self._packages)
        checks.do("layout", self._layout)
        checks.do("device", self._device)
        checks.do("costs", self._costs)
        checks.do("optimizer", self._optimizer)
        checks.do("data sets", self._data_sets, key=data)
        checks.do("tokenizer", self._tokenizer, key=data)
        checks.do("text", self._text, key=data)
        checks.do("shards", lambda found: self._shards(found, thorough=thorough), key=data)
        checks.do("checkpoint", lambda found: self._checkpoint(found, thorough=thorough))
        checks.do("disk", self._disk)
        checks.do("evaluation", lambda found: self._evaluation(found, thorough=thorough))
        checks.do("routing record", self._routing)

    def _packages(self, found: Outcome) -> str:
        from pretrain.report.weights_and_biases import check_installed

        monitor = self.config.monitor
        check_installed(monitor)
        found.warnings += misfits() if self.alone else []
        return "wandb is installed" if monitor.wandb != "off" else "no optional package is needed"

    def _layout(self, found: Outcome) -> str:
        problems = list(rank_problems(self.config, self.world_size))
        for error in problems:
            found.problem(error)
        if problems:
            return ""
        parallel, batch = self.config.parallel, self.config.batch
        self.data_size = self.config.data_size(self.world_size)
        expert = f", experts over {parallel.expert} data-parallel ranks" * (parallel.expert > 1)
        micro_steps, rest = divmod(batch.global_sequences, batch.micro_sequences * self.data_size)
        shares = f" = {micro_steps} x {batch.micro_sequences} on each data-parallel rank" if not rest else ""
        return (
            f"{counted(self.world_size, 'rank')} = pipeline {parallel.pipeline} x data {self.data_size:,} x tensor "
            f"{parallel.tensor}{expert}; ZeRO {parallel.zero}; {batch.global_sequences:,} sequences a step{shares}"
        )

    def _device(self, found: Outcome) -> str:
        check_device(self.config, self.device)
        kernels = choose_backends(self.config, self.device)
        return f"{self.config.train.precision} on {self.device}; kernels: {kernels}"

    def _costs(self, found: Outcome) -> str:
        from model.costs import check_costs

        check_costs(self.config.model)
        return "FLOPs and parameters of every layer are known"

    def _optimizer(self, found: Outcome) -> str:
        from pretrain.engine.optimizer import group_problems

        for error in group_problems(self.config):
            found.problem(error)
        return "the model has every group of parameters of optimizer.groups"

    def _data_sets(self, found: Outcome) -> str:
        from pretrain.data.sources import Sources

        if "data" in self.broken:
            raise Blocked("a rule of the data section is broken")
        self.sources = Sources.find(self.config, found.problem, follow_links=self.alone, patience=self.patience)
        if self.sources is None:
            return ""
        return "; ".join(
            f"{source.manifest.folder}, digest {source.manifest.digest[:12]}" for source in self.sources.sources
        )

    def _opened(self) -> Sources:
        if self.sources is None:
            raise Blocked(NO_DATA)
        return self.sources

    def _tokenizer(self, found: Outcome) -> str:
        from pretrain.data.sources import check_vocabulary

        sources = self._opened()
        check_vocabulary(sources, self.config)
        rows = self.config.model.vocab_size
        return f"{sources.tokenizer.vocab_size:,} pieces for model.vocab_size = {rows:,} rows"

    def _text(self, found: Outcome) -> str:
        from pretrain.data.sources import check_text
        from pretrain.data.warnings import text_warnings

        sources = self._opened()
        for source in sources.sources:
            try:
                check_text(source, self.config)
            except UserError as error:  # of one source; the others are checked too
                found.problem(error)
        if found.problems:
            return ""
        found.warnings += text_warnings(self.config, sources)
        held_out = self.config.evaluate.split if self.config.evaluate.sequences else None
        tokens = sum(source.manifest.num_tokens("train") for source in sources.sources)
        return f"{tokens:,} tokens to train on" + (f", and a {held_out} split" if held_out else "")

    def _shards(self, found: Outcome, *, thorough: bool) -> str:
        sources = self._opened()
        if not self.alone:
            return "left to all ranks together"
        is_full = thorough and self.config.data.verify == "full"
        sources.check("full" if is_full else "size", show_progress=is_full, problem=found.problem)
        if (more := len(found.problems) - MOST_FILES) > 1:
            del found.problems[MOST_FILES:]
            found.problem(UserError(f"{sources.key}: {more:,} more of its files are wrong; copy the data set again"))
        shards = sum(len(source.manifest.entries) for source in sources.sources)
        what = "sha256" if is_full else "size (data.verify=full hashes them)"
        return f"{counted(shards, 'shard')}: each has its {what} and may be read; indices and tokenizer by sha256"

    def _checkpoint(self, found: Outcome, *, thorough: bool) -> str:
        from pretrain.data.warnings import epoch_warnings
        from pretrain.resumed_stages import reads_by_end, reads_so_far, stages_of

        text = self._start(found, thorough=thorough)
        if self.sources is not None:  # how often the run reads its data depends on where it continues
            stage = stages_of(self.newest, self.sources, self.config)[-1]
            reads, so_far = (count(self.config, self.newest, stage) for count in (reads_by_end, reads_so_far))
            found.warnings += epoch_warnings(self.config, self.sources, reads, so_far)
        return text

    def _start(self, found: Outcome, *, thorough: bool) -> str:
        from pretrain.checkpoint.folder import AT_ONCE
        from pretrain.checkpoint.initial import KEY, initial_checkpoint
        from pretrain.resilience.rollback import pending, read_rollbacks
        from pretrain.resume import (
            branch_start,
            candidates,
            named_checkpoint,
            newest_committed,
            newest_valid,
            paths_to_try,
        )

        resume = self.config.checkpoint.resume
        if self.broken & {"resume", "initial weights"}:
            raise Blocked("no checkpoint is named")
        if self.run_dir is None and resume in ("auto", "never"):
            raise Blocked("there can be no run folder")
        patience, paths = self.patience or AT_ONCE, [named_checkpoint(resume)] if self.run_dir is None else []
        if self.run_dir is not None:
            paths = candidates(self.config, self.run_dir, patience=patience)
        newest = newest_committed(paths, check_sizes=self.alone, patience=patience)
        undone = ""
        if self.run_dir is not None and (
            rollback := pending(read_rollbacks(self.run_dir, branch_start(self.config, newest)))
        ):
            undone = f", for the last start decided to go back to before step {rollback.first_step:,}"
            paths = paths_to_try(self.config, self.run_dir, rollback, patience)
            newest = newest_committed(paths, check_sizes=self.alone, patience=patience)
        self.newest = newest
        self.has_checkpoint = newest is not None
        if newest is None:
            if self.config.train.init_from is None:
                return f"{'none' if undone else 'none yet'}; the run begins at step 0{undone}"
            known = self._opened().tokenizer.sha256
            world_size = 1 if self.alone else 0
            initial = initial_checkpoint(
                self.config, known, world_size=world_size, run_dir=self.run_dir, patience=patience
            )
            assert initial is not None
            return f"none yet; the run begins with the weights of {initial.path} ({KEY})"
        self._goes_with(newest)
        if thorough:
            valid, damaged = newest_valid(paths, rank=0, world_size=1, gather=lambda found: [found])
            self.passed_over = tuple(f"a checkpoint would be passed over: {reason}" for reason in damaged)
            found.warnings += self.passed_over
            if valid is not None and valid.path != newest.path:
                self.newest = newest = valid
                self._goes_with(valid)
        how = "every file has its sha256" if thorough else "every file has its size"
        where = f"continues from {newest.path}, step {newest.progress.step:,}{undone}"
        return f"{where}: {how}, and its settings go with these"

    def _goes_with(self, checkpoint: Checkpoint) -> None:
        """Raises UserError unless the run may continue from it."""
        from pretrain.checkpoint.shapes import check_shapes
        from pretrain.resume import changed_settings, check_tokenizer

        # Of data sets that could not be opened, nothing is said here.
        digest = self.sources.digest if self.sources is not None else checkpoint.state["manifest_digest"]
        if self.sources is not None and checkpoint.weights_source is None:
            check_tokenizer(checkpoint, self.sources)
        changed_settings(self.config, checkpoint, digest)
        check_shapes(checkpoint, self.config.model, "checkpoint.resume")

    def _disk(self, found: Outcome) -> str:
        space = self.space()
        space.check()
        if warning := space.warning():
            found.warnings.append(warning)
        meanwhile = "with one being written " if space.saved > space.kept else ""
        return (
            f"the run keeps {counted(space.kept, 'checkpoint')} of {space.size:,} bytes; {meanwhile}{space.wanted:,} "
            f"bytes more, {space.free:,} are free"
        )

    def space(self) -> CheckpointSpace:
        """What the checkpoints take. Raises UserError."""
        from pretrain.report.disk_space import checkpoint_space

        folder = self.run_dir or self.folder
        assert folder is not None
        return checkpoint_space(self.config, folder)

    def _evaluation(self, found: Outcome, *, thorough: bool) -> str:
        settings, tasks = self.config.evaluate, self.config.evaluate.tasks
        if not tasks:
            # No rule of configurations: checkpoints of runs that had it would no longer open. And a run that goes on
            # with it, perhaps at night by itself, is none to refuse for what does nothing.
            for key in ("tasks_every_steps", "tasks_limit"):
                if value := getattr(settings, key):
                    words = (
                        f"evaluate.{key}: is {value}, but evaluate.tasks names no task; name some, --set "
                        f'\'evaluate.tasks={{"lambada": "raw/lambada"}}\', or set it to 0'
                    )
                    if self.newest is None:
                        found.problem(UserError(words))
                    else:
                        found.warnings.append(words)
            return "no evaluate.tasks"
        from pretrain.evaluation.training import RunTasks, check_places
        from pretrain.saved_model.tokenizer import TASK_IS_TEXT

        if self.sources is not None and not self.sources.tokenizer.has_text:
            raise UserError(f"evaluate.tasks: {TASK_IS_TEXT}")
        if self.sources is None or not thorough:  # the ranks of a start read them once they have met
            check_places(self.config, found.problem)
            return f"the files of {', '.join(tasks)} are there"
        opened = RunTasks.open(self.config, self.sources, found.problem).prepared
        return ", ".join(f"{len(task.examples):,} examples of {task.task.name}" for task in opened)

    def _routing(self, found: Outcome) -> str:
        train = self.config.train
        if train.replay_routing is None and not train.record_routing:
            return "none is written or replayed"
        from pretrain.resumed_stages import stages_of
        from pretrain.routing.record import check_recording
        from pretrain.routing.tape import open_record, recording

        if self.has_checkpoint is None or "routing record" in self.broken:
            raise Blocked("it is not known which steps of which record are needed")
        first = 0 if self.newest is None else self.newest.progress.step
        last = train.last_step
        sources = self._opened()
        stage = stages_of(self.newest, sources, self.config)[-1]
        if train.record_routing:
            if self.run_dir is None:
                raise Blocked("there can be no run folder")
            folder, content = recording(self.config, sources, stage, self.run_dir)
            return f"{folder} {'goes on' if check_recording(folder, content) else 'will be made'}"
        open_record(self.config, sources, stage).check_steps(range(first + 1, last + 1))
        return f"{train.replay_routing} holds the steps {first + 1:,} to {last:,}"


def preflight(
    config: Config,
    world_size: int,
    run_dir: Path,
    *,
    alone: bool = True,
    patience: Patience | None = None,
) -> tuple[Sources, int, Checkpoint | None]:
    """Checks everything that can be refused without a process group or an allocation, and raises UserError at the first
    fault. Returns the data sets, the DP size and the checkpoint that the run seems to continue from. `alone`,
    `patience`: see PlannedRun."""
    from pretrain.gpus import device_type

    run = PlannedRun(config, world_size, run_dir, device_type(config.train.device), alone=alone, patience=patience)
    run.check(Checklist(stops=True), thorough=False)
    assert run.sources is not None and run.data_size is not None
    return run.sources, run.data_size, run.newest
