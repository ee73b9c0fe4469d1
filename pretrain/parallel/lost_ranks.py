"""How the end of another rank looks to one that waits for it: an error of a collective, which is not this rank's."""

from __future__ import annotations

import re

import torch.distributed as dist

GLOO = re.compile(
    r"gloo/transport/\S+\] (?P<what>[^\n]*?(closed by peer|reset by peer|pipe|timed out|to host|unreachable|is down)"
    r"( \[[^]]*\])?)"
)
"""What gloo says of a connection that was there: its two ends, and the reason of the system."""
NCCL = "remote process exited or there was a network error"
"""ncclRemoteError in words."""
PORT = re.compile(r"(?<=\]):\d+")


def lost_connection(error: BaseException) -> str | None:
    """What an error says of the connection to another rank, the same on all ranks of a node where that can be; None: it
    is of something else. A rank that ends closes its connections, whatever ended it."""
    if not isinstance(error, RuntimeError):
        return None
    if isinstance(error, dist.DistNetworkError):  # of the store, which is in rank 0's process
        return str(error).partition("\n")[0]
    if NCCL in str(error):
        return NCCL
    found = GLOO.search(str(error))
    return PORT.sub("", found["what"]) if found else None


def lost_text(reason: str, where: str = "") -> str:
    """What a rank says that ends because another one is gone. `reason`: see lost_connection."""
    return f"another rank is gone{where} ({reason}); its output, or the code with which it ended, says why"
