"""Entry points of workers that note monotonic times."""

from __future__ import annotations

import sys
import time

from pgbgw import current_worker
from support.workers import append


def note_and_fail(path: str) -> None:
    """Note when this run began and when it ends, then exit 1."""
    begin = time.monotonic_ns()
    append(path, f"{begin} {time.monotonic_ns()}")
    sys.exit(1)


def note_sleeps(path: str, seconds: float) -> None:
    """Note how long current_worker().sleep() really takes, until stopped."""
    worker = current_worker()
    worker.ready()
    while True:
        begin = time.monotonic()
        worker.sleep(seconds)
        append(path, str(time.monotonic() - begin))
