"""Units that are shown to people."""

GIB = 1 << 30
"""Bytes of a GiB."""
