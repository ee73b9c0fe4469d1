"""`plan.py fit`: whether a run fits a machine and how long it takes, for a terminal or as JSON."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.strict_json import dumps
from common.tables import counted, text_table
from common.units import GIB
from pretrain.checkpoint import list_checkpoints, step_of
from pretrain.cli.plan_costs import short
from pretrain.cli.plan_machine import WantedPlan
from pretrain.config.loading import to_json
from pretrain.config.obstacles import AnotherLoss, another_loss
from pretrain.planning.fit import FitReport, fit, with_overrides
from pretrain.planning.layout_plan import StepTime
from pretrain.planning.machine import Machine
from pretrain.planning.measured import RESULTS
from pretrain.planning.memory import USABLE
from pretrain.report.run_paths import SAVED_CONFIG, is_run

WIDTH = 120


def print_fit(args: argparse.Namespace, wanted: WantedPlan) -> None:
    """Raises UserError."""
    report = fit(wanted.config, wanted.machine, results=args.results or RESULTS, tell=tell)
    done = steps_done(wanted.path)
    if args.json:
        print(dumps(as_json(report, done), indent=1))
    else:
        print("\n".join(lines_of(wanted.path, report, done)))


def steps_done(path: Path) -> int:
    """Up to the newest checkpoint of the run whose own configuration `path` is; 0 where there is none."""
    if path.name != SAVED_CONFIG or not is_run(path.parent):
        return 0
    return max(map(step_of, list_checkpoints(path.parent / "checkpoints")), default=0)


def tell(line: str) -> None:
    print(f"{line} ...", file=sys.stderr, flush=True)


def lines_of(path: Path, report: FitReport, done: int = 0) -> Iterator[str]:
    """The report for a terminal: the verdict first, what it rests on last. done: steps of the run."""
    yield from _verdict(path, report, done)
    yield from _memory(report)
    yield from _traffic(report)
    yield from _time(report)
    yield from _assumptions(report)


def machine_text(found: Machine) -> str:
    """Nodes, GPUs and the links between them."""
    text = f"{found.num_gpus} x {found.device.what}: {counted(found.num_nodes, 'node')} of {found.gpus_per_node}"
    if found.gpus_per_node > 1:
        text += f", {found.device.link} inside"
    if found.interconnect is not None:
        text += f", {found.ports_per_node} x {found.interconnect.name} between"
    return text


def _verdict(path: Path, report: FitReport, done: int) -> Iterator[str]:
    config, parallel = report.config, report.config.parallel
    yield f"{path} on {machine_text(report.machine)}"
    yield (
        f"layout: data {report.data_size} x tensor {parallel.tensor} x pipeline {parallel.pipeline}, expert "
        f"{parallel.expert}, ZeRO {parallel.zero}, sequence {str(parallel.sequence).lower()}, recompute "
        f"{config.train.recompute}; {counted(report.micro_steps, 'micro-step')} of "
        f"{counted(config.batch.micro_sequences, 'sequence')}"
    )
    yield ""
    yield f"verdict:    {verdict(report)}"
    yield f"constraint: {report.constraint}"
    if report.fits is False:
        yield f"change:     {change_text(report)}"
        if (other := other_loss(report)) is not None:
            keys, then = " and ".join(other.keys), f"{other.sequences} sequences instead of {other.run_sequences}"
            yield f"            which is another loss: {keys} = micro_batch, of micro_sequences x data, {then}"
    if report.time is not None:
        yield f"time:       {whole_run(report, report.time, done)}"
    else:
        yield f"time:       unknown: {report.why_no_time}"


def verdict(report: FitReport) -> str:
    """One sentence."""
    needed, unit = f"{report.needed / GIB:.2f} GiB", report.machine.device.unit
    if report.usable is None or report.machine.capacity is None:
        return f"unknown: a {unit} needs {needed}, but how much it has is not known (--memory GIB)"
    has = f"{report.usable / GIB:.2f} GiB ({USABLE:.0%} of {report.machine.capacity / GIB:.1f})"
    if report.fits:
        return f"fits: the fullest {unit} needs {needed} of {has}"
    return f"does not fit: the fullest {unit} needs {needed}, it has {has}"


def change_text(report: FitReport) -> str:
    """The one change, or that there is none."""
    found = report.change
    if found is None:
        return f"no single one makes it fit ({report.tried} traced); plan.py search tries combinations"
    sets = " ".join(f"--set {override}" for override in found.overrides)
    time = f", {range_text(found.time)} a step" if found.time else ""
    return f"{sets} (then {found.total / GIB:.2f} GiB{time})"


def other_loss(report: FitReport) -> AnotherLoss | None:
    """That the change is one of the loss too, where it is: of a run with a regulariser of a micro-step's batch."""
    if report.change is None:
        return None
    changed = with_overrides(report.config, report.change.overrides)
    return another_loss(report.config, changed, report.machine.num_gpus)


def range_text(time: StepTime) -> str:
    """Seconds of a step."""
    return f"{seconds_text(time.fast.total)} to {seconds_text(time.slow.total)}"


def seconds_text(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def hours_text(hours: float) -> str:
    if hours < 0.01:
        return "<0.01"  # a trial of minutes; no exponent for a person
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}"


def hours_range(fast: float, slow: float) -> str:
    return "less than 0.01" if slow < 0.01 else f"{hours_text(fast)} to {hours_text(slow)}"


def whole_run(report: FitReport, time: StepTime, done: int) -> str:
    """Step, tokens a second and what is left after `done` steps for the next start, in hours and GPU-hours."""
    config, steps, last = report.config, report.config.train.steps, report.config.train.last_step
    tokens = config.batch.global_sequences * config.model.sequence_length
    left = max(0, last - done)
    fast, slow = (left * terms.total / 3600 for terms in time)
    gpus = report.machine.num_gpus
    step = (
        f"{range_text(time)} a step, {short(int(tokens / time.slow.total))} to {short(int(tokens / time.fast.total))} "
        f"tokens a second"
    )
    of = f"{steps:,} steps" if last == steps else f"{last:,} steps to train.stop_after_steps"
    if not left:
        return f"{step}; all {of} are done"
    which = f"the {left:,} of {of} that are left" if done else of
    return (
        f"{step}; {which} take {hours_range(fast, slow)} h, {hours_range(fast * gpus, slow * gpus)} "
        f"{report.machine.device.unit}-hours, without validation and start-up"
    )


def _memory(report: FitReport) -> Iterator[str]:
    yield "\nmemory of a rank at the highest point of a step, GiB; not all of it is there at once"
    names = [name for name in report.stages[0].parts if any(stage.parts[name] for stage in report.stages)]
    rows = [
        [
            str(stage.stage),
            stage.blocks,
            stage.parameters,
            *(f"{stage.parts[name] / GIB:.3f}" for name in names),
            f"{stage.total / GIB:.2f}",
        ]
        for stage in report.stages
    ]
    yield text_table(["stage", "blocks", "parameters", *names, "highest"], rows)
    offloaded = max(stage.offloaded for stage in report.stages)
    if offloaded:
        yield f"CPU memory for the offloaded optimizer: {offloaded / GIB:.3f} GiB a rank"
    staging = max(stage.staging for stage in report.stages)
    if staging and report.machine.device.device_type == "cpu":
        yield "highest is with the copy that a checkpoint is written from (none with checkpoint.asynchronous=false)"
    elif staging:
        node = staging * report.machine.gpus_per_node
        yield (
            f"CPU memory for a checkpoint on its way: {staging / GIB:.3f} GiB a rank, up to {node / GIB:.2f} GiB a "
            "node (none with checkpoint.asynchronous=false)"
        )


def _traffic(report: FitReport) -> Iterator[str]:
    rows = [
        [
            str(stage),
            row.part,
            row.kind,
            f"{row.group} ({row.ranks})",
            row.link,
            row.calls,
            f"{row.tensor_bytes / 1e9:.3f}",
            f"{row.sent / 1e9:.3f}",
        ]
        for stage, rows in enumerate(report.traffic)
        for row in rows
        if row.ranks > 1
    ]
    if not rows:
        yield f"\nno {report.machine.device.unit} sends anything to another one"
        return
    yield "\ncommunication of a rank in a step, GB of tensors and GB that it sends by rings"
    yield text_table(
        ["stage", "when", "kind", "group (ranks)", "link", "calls", "tensors", "sent"], rows, left={0, 1, 2, 3, 4}
    )


TERMS = {
    "compute": "computing",
    "host": "waiting for launches",
    "memory": "adding gradients, Adam",
    "inside": "links inside a node",
    "between": "links between nodes",
    "bubble": "pipeline bubble",
}


def _time(report: FitReport) -> Iterator[str]:
    flops = f"\nFLOPs of a step: {report.model_flops:.4g} that the model needs"
    if report.executed_flops > 1.001 * report.model_flops:
        flops += f", {report.executed_flops:.4g} with the repeated forward passes"
    yield flops
    if report.config.parallel.pipeline > 1:
        yield f"pipeline: stages are idle for {report.bubble:.1%} of the micro-steps"
    if report.time is None:
        return
    fast, slow = report.time
    yield "time of a step, by the slowest stage"
    rows = [
        [name, seconds_text(getattr(fast, term)), seconds_text(getattr(slow, term))]
        for term, name in TERMS.items()
        if getattr(fast, term) or getattr(slow, term)
    ]
    yield text_table(["", "fast", "slow"], [*rows, ["all", seconds_text(fast.total), seconds_text(slow.total)]])


def _assumptions(report: FitReport) -> Iterator[str]:
    yield "\nwhat this rests on"
    machine_lines = [f"assumed: {line}" for line in report.machine.assumed]
    memory = report.machine.device.memory
    if memory is not None:
        machine_lines.append(
            f"memory of a {report.machine.device.unit}: {memory.value / 1e9:.4g} GB = {memory.value / GIB:.1f} GiB, "
            f"of which an estimate may fill {USABLE:.0%} (--memory gives your own) [{memory.source}]"
        )
    if report.machine.device.note:
        machine_lines.append(f"{report.machine.device.name}: {report.machine.device.note}")
    lines = [f"{line.what}: {line.value} [{line.source}]" for line in report.assumptions]
    for line in [*machine_lines, *lines]:
        yield textwrap.fill(
            line, WIDTH, initial_indent="  ", subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
        )
    of_gpus = "CUDA context, NCCL's buffers, " * (report.machine.device.device_type != "cpu")
    yield textwrap.fill(
        f"  not counted: {of_gpus}memory that the allocator cannot use, uneven choices of experts, input, validation, "
        f"checkpoints, stragglers",
        WIDTH,
        subsequent_indent="    ",
    )


def as_json(report: FitReport, done: int = 0) -> dict[str, Any]:
    """Exact numbers: bytes and seconds; `run_hours` are of the whole run, and what is left is of the next start. done:
    steps of it."""
    left = max(0, report.config.train.last_step - done)
    tokens = report.config.batch.global_sequences * report.config.model.sequence_length
    other = other_loss(report)
    time: dict[str, Any] | None = None
    if report.time is not None:
        time = {
            end: dataclasses.asdict(terms)
            | {
                "total": terms.total,
                "tokens_per_second": tokens / terms.total,
                "run_hours": report.config.train.steps * terms.total / 3600,
                "run_gpu_hours": report.config.train.steps * terms.total / 3600 * report.machine.num_gpus,
                "hours_left": left * terms.total / 3600,
            }
            for end, terms in zip(("fast", "slow"), report.time, strict=True)
        }
    return {
        "fits": report.fits,
        "verdict": verdict(report),
        "constraint": report.constraint,
        "change": None
        if report.change is None
        else {
            "set": list(report.change.overrides),
            "needed_bytes": report.change.total,
            "another_loss": None if other is None else other._asdict(),
        },
        "machine": {
            "device": report.machine.device.name,
            "gpus": report.machine.num_gpus,
            "gpus_per_node": report.machine.gpus_per_node,
            "memory_bytes": report.machine.capacity,
            "usable_bytes": report.usable,
            "interconnect": report.machine.interconnect.name if report.machine.interconnect else None,
            "ports_per_node": report.machine.ports_per_node,
        },
        "layout": to_json(report.config)["parallel"] | {"data": report.data_size, "micro_steps": report.micro_steps},
        "stages": [
            {"stage": stage.stage, "blocks": stage.blocks, "parameters": stage.parameters}
            | stage.parts
            | {
                "needed_bytes": stage.total,
                "checkpoint_staging_bytes": stage.staging,
                "offloaded_optimizer_bytes": stage.offloaded,
            }
            for stage in report.stages
        ],
        "traffic": [[row._asdict() for row in rows] for rows in report.traffic],
        "model_flops": report.model_flops,
        "executed_flops": report.executed_flops,
        "pipeline_bubble": report.bubble,
        "why_no_time": report.why_no_time,
        "steps_done": done,
        "steps_left": left,
        "seconds": time,
        "assumptions": [line._asdict() for line in report.assumptions],
        "assumed": list(report.machine.assumed),
    }
