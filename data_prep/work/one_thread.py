"""One thread a process: the processes are the parallelism, and threads inside them only fight over the same CPUs."""

import os

VARIABLES = ("RAYON_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def one_thread() -> None:
    """For the libraries of this process that are not loaded yet, and for all of the processes that it starts."""
    for name in VARIABLES:
        os.environ.setdefault(name, "1")
