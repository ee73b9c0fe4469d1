"""An event of events.jsonl as a line that a person reads."""

from __future__ import annotations

import json
import time
from typing import Any

from common.line_log import Row
from common.tables import counted, listed
from pretrain.report.source_losses import source_losses, sources_text

LAST_TIME = 1e11
"""Seconds since the epoch, in the year 5138: localtime refuses what is far out."""


def event_text(event: Row, now: float) -> str:
    """When it was, and what; an event of another version is shown as it is."""
    when = event.get("time")
    clock = "?"
    if isinstance(when, int | float) and 0 <= when < LAST_TIME:
        same_day = time.strftime("%F", time.localtime(when)) == time.strftime("%F", time.localtime(now))
        clock = time.strftime("%H:%M:%S" if same_day else "%F %H:%M", time.localtime(when))
    return f"{clock}  {describe(event)}"


def describe(event: Row) -> str:
    """What it was, without the time."""
    text = TEXTS.get(event["event"])
    return text(event) if text is not None else _plain(event)


def value_text(value: Any) -> str:
    """A setting as a configuration and --set have it: null, not None."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _plain(event: Row) -> str:
    rest = ", ".join(f"{key} {value}" for key, value in event.items() if key not in ("event", "time"))
    return f"{event['event'].replace('_', ' ')}{': ' if rest else ''}{rest}"


def _step(event: Row) -> str:
    return f"step {event.get('step', '?')}"


def _ranks(event: Row) -> str:
    ranks = event.get("ranks")
    return counted(ranks, "rank") if isinstance(ranks, int) else "? ranks"


def _number(value: Any, form: str = ".4f") -> str:
    return format(value, form) if isinstance(value, int | float) else "not finite"


def _validation(event: Row) -> str:
    of_sources = source_losses(event)
    told = f" ({sources_text(of_sources)})" if of_sources else ""
    average = f"; moving average: loss {_number(event['ema_loss'])}" if "ema_loss" in event else ""
    where = "" if event.get("split", "validation") == "validation" else f" on the {event['split']} split"
    return f"validation after {_step(event)}{where}: loss {_number(event.get('loss'))}{told}{average}"


def _replicas(event: Row) -> str:
    tensors = event.get("tensors")
    names = [str(tensor) for tensor in tensors] if isinstance(tensors, list) else []
    node = f"; suspect: {event['node']}" if event.get("node") else ""
    return f"{_step(event)}: replicas differ: {listed(names, 3, '; ') or '?'}{node}"


def _collapsed(event: Row) -> str:
    routers = event.get("routers")
    names = [str(r.get("router")) for r in routers if isinstance(r, dict)] if isinstance(routers, list) else []
    return f"{_step(event)}: collapsed routers: {listed(names, 3)}"


def _slow(event: Row) -> str:
    ranks = event.get("ranks")
    known = [one for one in ranks if isinstance(one, dict)] if isinstance(ranks, list) else []
    names = [f"rank {one.get('rank', '?')} on {one.get('host', '?')} ({one.get('phase', '?')})" for one in known[:3]]
    count = event.get("count")
    more = f" and {count - 3} more" if isinstance(count, int) and count > 3 else ""
    return f"{_step(event)}: slow: {', '.join(names) or '?'}{more}"


def _compared(event: Row) -> str:
    warnings = event.get("warnings")
    warned = [f"warning: {text}" for text in warnings] if isinstance(warnings, list) else []
    return "; ".join([f"estimate and measurement after {_step(event)}: {event.get('text', '?')}", *warned])


TEXTS = {
    "started": lambda e: f"started after {_step(e)} on {_ranks(e)}",
    "branch": lambda e: f"a branch begins after {_step(e)}: what stood here of the steps before is another one's",
    "initial_weights": lambda e: f"began with the weights of {e.get('checkpoint') or e.get('path', '?')}",
    "finished": lambda e: f"finished at {_step(e)}",
    "stopped": lambda e: f"stopped{f' after {_step(e)}' if 'step' in e else ''}: {e.get('reason', '?')}",
    "failed": lambda e: f"failed with exit code {e.get('exit_code', '?')}: {e.get('reason', '?')}",
    "checkpoint": lambda e: (
        f"checkpoint {e.get('path', '?')} saved in {_number(e.get('seconds'), '.1f')} s, training stood still for "
        f"{_number(e.get('stall_seconds'), '.1f')} s"
    ),
    "checkpoint_failed": lambda e: f"checkpoint of {_step(e)} failed: {e.get('reason', '?')}",
    "checkpoint_passed_over": lambda e: f"passed over: {e.get('reason', '?')}",
    "checkpoint_set_aside": lambda e: f"set aside a checkpoint of a later step or another branch: {e.get('path', '?')}",
    "validation": _validation,
    "evaluation": lambda e: f"{e.get('task', '?')} after {_step(e)}: accuracy {_number(e.get('accuracy'))}",
    "log_not_written": lambda e: f"{e.get('file', '?')} cannot be written: {e.get('reason', '?')}",
    "loss_spike": lambda e: f"loss spike after {_step(e)}: {e.get('reason', '?')}",
    "skipped_update": lambda e: f"{_step(e)}: update skipped, loss {e.get('loss', '?')}",
    "rollback": lambda e: f"goes back to before step {e.get('first_step', '?')}: {e.get('reason', '?')}",
    "replicas_differ": _replicas,
    "router_collapsed": _collapsed,
    "slow_ranks": _slow,
    "changed_setting": lambda e: (
        f"setting {e.get('key', '?')} changed from {value_text(e.get('then'))} to {value_text(e.get('now'))}"
    ),
    "data_stage": lambda e: f"new stage of the data: {e.get('text', '?')}",
    "lock_taken_over": lambda e: f"took the folder over from {e.get('owner', '?')}, which was dead",
    "estimated": lambda e: f"memory of a rank: {e.get('text', '?')}",
    "estimate_compared": _compared,
    "data_waited": lambda e: (
        f"{_step(e)}: rank {e.get('rank', '?')} waited {_number(e.get('seconds'), '.1f')} s for {e.get('file', '?')}: "
        f"{e.get('reason', '?')}"
    ),
    "hang": lambda e: f"hung: {str(e.get('message', '')).removeprefix('hang: ').partition('. ')[0]}",
}
"""By kind."""
