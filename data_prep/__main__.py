"""`python -m data_prep`; the guard matters because worker processes import this file again."""

import sys

from data_prep.cli import main

if __name__ == "__main__":
    sys.exit(main())
