"""How many files this process may have open: 1,024 on most machines, though most let it raise that."""

from __future__ import annotations

import resource
import sys


def allow_open_files(wanted: int) -> int:
    """Raises the limit of this process to `wanted` open files if it is lower, as far as the machine lets it. Returns
    the limit that it has then."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = (sys.maxsize if limit == resource.RLIM_INFINITY else limit for limit in limits)
    allowed = max(soft, min(wanted, hard))
    if allowed > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, limits[1]))
    return allowed
