"""The next step's batches, read by a thread while the step runs."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from pretrain.data.windows import Batch, TrainingStream


class Prefetcher:
    """Gives the stream's batches, and reads them ahead of time. One thread does all reading, so readers need no locks;
    an error of a read is raised by the `take` that asks for its batches, not before. Nothing is saved for a resume,
    because batches are a function of the position."""

    def __init__(self, stream: TrainingStream, device: torch.device, *, global_sequences: int) -> None:
        self._stream, self._device, self._global = stream, device, global_sequences
        self._thread = ThreadPoolExecutor(1, "prefetch")
        self._next: tuple[int, Future[list[Batch]]] | None = None
        self.wait_seconds = 0.0
        """How long the last `take` waited on this rank."""

    def take(self, consumed: int) -> list[Batch]:
        """Returns, on the device, all micro-batches of the step that starts after `consumed` sequences (token ids: a
        few megabytes at most), and begins to read those of the next step. Raises DataError."""
        started = time.perf_counter()
        if self._next is None or self._next[0] != consumed:
            self._next = (consumed, self._thread.submit(self._read, consumed))
        try:
            batches = self._next[1].result()
        finally:
            self._next = None
            self.wait_seconds = time.perf_counter() - started
        following = consumed + self._global
        self._next = (following, self._thread.submit(self._read, following))
        return [batch.to(self._device) for batch in batches]

    def _read(self, consumed: int) -> list[Batch]:
        batches = [self._stream.batch(consumed, m) for m in range(self._stream.micro_steps)]
        # From pinned memory the copy to the GPU is asynchronous.
        return [batch.pinned() for batch in batches] if self._device.type == "cuda" else batches

    def close(self) -> None:
        """Waits for a read that has begun; drops one that has not."""
        self._thread.shutdown(wait=True, cancel_futures=True)
