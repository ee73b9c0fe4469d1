"""Tasks on several processes. A task reads and writes files; what it returns is small.

Each process has one thread: the processes are the parallelism, and threads inside them only fight over the same CPUs.
Nothing imported here loads numpy, so that `one_thread` can be called before it.
"""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from common.errors import PassingError
from common.progress_bar import byte_bar

Task = TypeVar("Task")
Result = TypeVar("Result")
ONE_THREAD = ("RAYON_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
DIED = "a process died (most often: killed for memory)"
LOOK_SECONDS = 1.0
"""Python hears a signal that comes just before it begins to wait only when that wait is over."""


def one_thread() -> None:
    """Sets one thread for the libraries that this process has not loaded yet, and for all processes that it starts."""
    for name in ONE_THREAD:
        os.environ.setdefault(name, "1")


def _start_method() -> str:
    """fork, which spares every worker the imports, if this process has only one thread; else spawn, because a fork
    copies locks that the other threads hold."""
    if sys.platform == "linux":
        for _ in range(10):  # a thread that has been joined is listed for a moment longer
            if len(os.listdir("/proc/self/task")) == 1:
                return "fork"
            time.sleep(0.001)
    return "spawn"


def _done(futures: Iterable[Future[Result]]) -> set[Future[Result]]:
    """At least one; waits for it."""
    while not (done := wait(futures, timeout=LOOK_SECONDS, return_when=FIRST_COMPLETED).done):
        pass
    return done


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle, once
    parent = multiprocessing.parent_process()
    assert parent is not None, "_start_worker is for child processes"

    def leave_with_parent() -> None:
        # After kill -9 of the parent a worker would wait for its next task for ever: it holds both ends of the queue.
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


class Workers:
    """`count` processes, started on first use and kept for the stages that follow; 1 means this process."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool: ProcessPoolExecutor | None = None
        self._one_ends = threading.Lock()  # after a Ctrl-C there are two
        one_thread()

    def run(
        self,
        function: Callable[[Task], Result],
        tasks: Sequence[Task],
        *,
        sizes: Sequence[int],
        description: str,
        done: int = 0,
    ) -> list[Result]:
        """`function` of every task, in the order of the tasks; they run in any order. `sizes`: bytes of each task, for
        the progress bar and so that the large ones start first. `done`: bytes of those that an earlier start has done,
        for the bar too. Raises the first error of a task."""
        results: dict[int, Result] = {}
        order = sorted(range(len(tasks)), key=lambda number: -sizes[number])
        with byte_bar(total=sum(sizes), done=done, description=description, enabled=bool(tasks)) as bar:
            completed = self._unordered(function, [tasks[number] for number in order])
            with contextlib.closing(completed):
                for position, result in completed:
                    results[order[position]] = result
                    bar.update(sizes[order[position]])
        return [results[number] for number in range(len(tasks))]

    def _unordered(
        self, function: Callable[[Task], Result], tasks: Sequence[Task]
    ) -> Generator[tuple[int, Result], None, None]:
        if self.count == 1 or len(tasks) < 2:
            yield from ((number, function(task)) for number, task in enumerate(tasks))
            return
        if self._pool is None:
            self._pool = self._started(_start_method(), self.count)
        waiting: dict[Future[Result], int] = {}
        todo = iter(enumerate(tasks))
        try:
            while True:
                for number, task in todo:
                    waiting[self._pool.submit(function, task)] = number
                    if len(waiting) >= 2 * self.count:
                        break
                if not waiting:
                    return
                for done in _done(waiting):
                    yield waiting.pop(done), done.result()
        except BrokenProcessPool:
            raise PassingError(f"{DIED}; run again with fewer `workers`: it goes on where it was") from None
        except Exception:
            if any(future.running() for future in waiting):
                print("a task failed; the others in work end first, or Ctrl-C drops them", file=sys.stderr, flush=True)
            raise
        finally:
            for future in waiting:
                future.cancel()

    def alone(self, function: Callable[[Task], Result], task: Task) -> Result:
        """Ends the other processes and calls `function(task)` in a new one, whose memory is freed when it ends; in this
        process if it cannot be forked."""
        self.close()
        if _start_method() != "fork":
            return function(task)
        self._pool = self._started("fork", 1)
        try:
            (done,) = _done([self._pool.submit(function, task)])
            result = done.result()
        except BrokenProcessPool:
            raise PassingError(f"{DIED}; run again with less `tokenizer.sample_bytes`") from None
        self.close()
        return result

    @staticmethod
    def _started(method: str, count: int) -> ProcessPoolExecutor:
        context = multiprocessing.get_context(method)
        return ProcessPoolExecutor(count, mp_context=context, initializer=_start_worker)

    def close(self) -> None:
        """Ends the processes; tasks that have not begun are dropped, and on Ctrl-C those that have."""
        try:
            self._end()
        except KeyboardInterrupt:
            self.end_at_once()
            raise

    def end_at_once(self) -> None:
        """Ends the processes and the tasks in work, which may take hours: what they write is whole or absent."""
        for process in multiprocessing.active_children():
            process.terminate()
        self._end()

    def _end(self) -> None:
        """In a thread, where no Ctrl-C comes: Python 3.11 takes a thread for ended whose `join` a Ctrl-C interrupts.
        The executor's, killed with a lock in its hand when the program ends, would let that hang."""
        pool, ended = self._pool, threading.Event()
        if pool is None:
            return

        def end() -> None:
            try:
                with self._one_ends:
                    pool.shutdown(wait=True, cancel_futures=True)
            finally:
                ended.set()

        thread = threading.Thread(target=end, name="end of workers")
        thread.start()
        while not ended.wait(LOOK_SECONDS):
            pass
        thread.join()
        self._pool = None


@contextlib.contextmanager
def worker_pool(count: int) -> Iterator[Workers]:
    """Workers that are closed when the block ends; after Ctrl-C at once."""
    workers = Workers(count)
    try:
        yield workers
    except KeyboardInterrupt:
        workers.end_at_once()
        raise
    finally:
        workers.close()
