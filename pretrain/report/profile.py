"""What the operators and kernels of a few steps cost (monitor.profile_steps), and what holds the memory of a GPU that
is full (monitor.memory_history)."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from model.parallel.context import ParallelContext
from pretrain.device import synchronize, write_memory_snapshot

ROWS = 40
"""Operators of the table."""


class StepProfiler:
    """Records the steps first .. last on the ranks of the first data-parallel slice: other slices do the same."""

    def __init__(
        self,
        steps: tuple[int, int] | None,
        run_dir: Path,
        parallel: ParallelContext,
        device: torch.device,
        *,
        ahead: range,
    ) -> None:
        """`steps`: both ends included, counted from 1; None: nothing is recorded. `ahead`: the steps that this start
        runs; a warning says that the first of `steps` is not among them, unless they were recorded before."""
        self._steps = steps if steps is not None and parallel.data_rank == 0 else None
        self._run_dir, self._device, self._rank = run_dir, device, dist.get_rank()
        self._profiler: profile | None = None
        if self._steps is not None and self._rank == 0 and self._steps[0] not in ahead and not self._folder.exists():
            run = f"runs steps {ahead[0]} to {ahead[-1]}" if ahead else f"is done, at step {ahead.start - 1}"
            print(
                f"warning: monitor.profile_steps: {list(self._steps)} begins outside of this start, which {run}; "
                f"nothing is profiled",
                file=sys.stderr,
                flush=True,
            )

    @property
    def _folder(self) -> Path:
        assert self._steps is not None
        return self._run_dir / "profile" / f"steps-{self._steps[0]}-{self._steps[1]}"

    def before(self, step: int) -> None:
        """Call before anything of the step is launched."""
        if self._steps is not None and step == self._steps[0] and self._profiler is None:
            kinds = [ProfilerActivity.CPU]
            if self._device.type == "cuda":
                kinds.append(ProfilerActivity.CUDA)
            self._profiler = profile(activities=kinds, profile_memory=True, record_shapes=True)
            self._profiler.start()

    def after(self, step: int) -> None:
        """Call when the step was launched. After the last one: waits for the device, and writes."""
        if self._profiler is not None and self._steps is not None and step >= self._steps[1]:
            synchronize(self._device)
            self.close()

    def close(self) -> None:
        """Writes what was recorded, also of a run that ends early. A disk that refuses it is a warning."""
        if self._profiler is None or self._steps is None:
            return
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        first, last = self._steps
        folder = self._folder
        name = f"rank-{self._rank:05d}"
        by = "self_cpu_time_total" if self._device.type == "cpu" else "self_device_time_total"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            table = profiler.key_averages().table(sort_by=by, row_limit=ROWS, max_name_column_width=60)
            (folder / f"{name}.txt").write_text(table, encoding="utf-8")
            profiler.export_chrome_trace(str(folder / f"{name}.json.gz"))
        except (OSError, RuntimeError) as error:
            print(f"warning: monitor.profile_steps: {folder} cannot be written: {error}", file=sys.stderr, flush=True)
            return
        if self._rank == 0:
            print(f"profile of steps {first} to {last}: {folder} (tables, and traces for ui.perfetto.dev)", flush=True)


def note_full_memory(run_dir: Path, device: torch.device, *, has_history: bool) -> None:
    """After an out-of-memory error on a GPU: what holds its memory, for pytorch.org/memory_viz. `has_history`: whether
    the stacks of allocations were recorded (monitor.memory_history). Never raises."""
    path = run_dir / "memory" / f"rank-{dist.get_rank():05d}.pickle"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if write_memory_snapshot(path, device):
            advice = "a smaller batch.micro_sequences, train.recompute or train.cuda_graph=off needs less"
            shown = "the blocks that hold it, and the lines that allocated them"
            if not has_history:
                shown = "the blocks that hold it, not who allocated them (monitor.memory_history=true records that)"
            print(f"out of memory: {path} shows {shown}; open it at pytorch.org/memory_viz; {advice}", file=sys.stderr)
    except (OSError, RuntimeError) as error:
        print(f"warning: {path} cannot be written: {error}", file=sys.stderr, flush=True)
