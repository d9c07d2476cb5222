"""Entry points of the workers that _bench measures with.  Imports nothing that a worker has not."""

from __future__ import annotations

import os
import time

from pgbgw._child import current_worker


def noop() -> None:
    """Return at once."""


def stamp(path: str) -> None:
    """Leave the time of this function's first line in a file: CLOCK_MONOTONIC, 8 bytes."""
    now = time.monotonic_ns()
    fd = os.open(path, os.O_WRONLY)
    os.pwrite(fd, now.to_bytes(8, "little"), 0)
    os.close(fd)


def idle() -> None:
    """Sleep until stopped; also the startup worker that keeps a supervisor in its first phase."""
    while True:
        current_worker().sleep(3600)
