"""`python -m data_prep`; the guard matters because worker processes may import this file again."""

import sys

import common.interruption  # noqa: F401  # before anything that takes long
from data_prep.work.parallel import one_thread

one_thread()  # before numpy loads: workers are forked, which needs a process of one thread

from data_prep.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
