"""An event file of TensorBoard, written in the calling thread.

torch's SummaryWriter writes in a thread of its own, which a full disk ends with a traceback; every later call raises.
Here only `flush` touches the disk, and what the disk refuses waits.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from common.errors import kind_of
from common.line_log import append_whole

FLUSH_SECONDS = 30.0
"""Longest time that a point waits for the file, as long as steps come."""
PENDING_BYTES = 1 << 26
"""Most bytes that are kept while the disk refuses them."""
PREFIX = "events.out.tfevents."


def _next_number(folder: Path) -> int:
    """The time in seconds, as other writers name their files, but above every file that is there: TensorBoard reads
    them in the order of their names. The clock may have been set back since, or be another machine's."""
    numbers = (path.name.removeprefix(PREFIX).partition(".")[0] for path in folder.glob(f"{PREFIX}*"))
    return max([int(time.time()), *(int(number) + 1 for number in numbers if number.isdecimal())])


def texts_of(folder: Path) -> Iterator[tuple[str, int, str]]:
    """Tag, step and text of every text that earlier starts wrote there, in the order of TensorBoard. What is torn or
    damaged ends its file. Raises OSError."""
    for path in sorted(folder.glob(f"{PREFIX}*")):
        # What protobuf raises of a damaged event is its own, and it is TensorBoard that depends on it.
        with contextlib.suppress(Exception):
            yield from _texts(path.read_bytes())


def _texts(records: bytes) -> Iterator[tuple[str, int, str]]:
    """A record is its length (8 bytes), a checksum (4), the event, a checksum (4). Where TensorFlow is installed,
    TensorBoard's own reader would import it into the first rank."""
    begin = 0
    while begin < len(records):
        (length,) = struct.unpack_from("<Q", records, begin)
        if begin + 16 + length > len(records):
            return
        event = Event.FromString(records[begin + 12 : begin + 12 + length])
        for value in event.summary.value:
            if value.tensor.string_val:
                yield value.tag, event.step, value.tensor.string_val[0].decode(errors="replace")
        begin += length + 16


class Board:
    """Appends to an event file of its own, which begins with the first point, or by `begin`."""

    def __init__(self, folder: Path, *, first_step: int, supersedes: bool = True) -> None:
        """`first_step`: if this file `supersedes` them, points of later steps that an earlier start wrote are hidden;
        they are computed again. Raises UserError if the folder cannot be made."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            number = _next_number(folder)
        except OSError as error:
            raise kind_of(error)(
                f"monitor.tensorboard: {folder} is to be a folder ({error.strerror}); move what is there away, or set "
                f"monitor.tensorboard to false"
            ) from None
        name = f"{PREFIX}{number:010d}.{socket.gethostname()}.{os.getpid()}"
        self.path = folder / f"{name}.{first_step}"
        self._pending = bytearray()
        self._records = RecordWriter(self)
        self._flushed = time.monotonic()
        self._has_failed = False
        self._head = [Event(wall_time=time.time(), file_version="brain.Event:2")]
        if supersedes:
            start = SessionLog(status=SessionLog.START)
            self._head.append(Event(wall_time=time.time(), step=first_step + 1, session_log=start))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Points of one step by tag."""
        self.add(step, Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]))

    def add(self, step: int, summary: Summary) -> None:
        """Anything else of one step."""
        self._write_head()
        self._records.write(Event(wall_time=time.time(), step=step, summary=summary).SerializeToString())
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def begin(self) -> None:
        """Begins the file now: points that it supersedes are hidden although it has none."""
        self._write_head()
        self.flush()

    def _write_head(self) -> None:
        for part in self._head:
            self._records.write(part.SerializeToString())
        self._head = []

    def write(self, data: bytes) -> None:
        """Called by RecordWriter."""
        self._pending += data

    def flush(self) -> None:
        """Writes the points to the file. What a full disk refuses is kept for the next time; once it is more than
        PENDING_BYTES it is lost: metrics.jsonl has all of it."""
        self._flushed = time.monotonic()
        if not self._pending:
            return
        try:
            append_whole(self.path, bytes(self._pending))
        except OSError as error:
            if not self._has_failed:
                self._has_failed = True
                reason = error.strerror or repr(error)
                print(f"warning: {self.path} cannot be written ({reason})", file=sys.stderr, flush=True)
            if len(self._pending) <= PENDING_BYTES:
                return
        self._pending.clear()
