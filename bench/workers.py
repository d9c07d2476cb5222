"""Entry points of the workers that only bench/ needs; the others are in pgbgw._bench_workers."""

from __future__ import annotations

import sys

from pgbgw import current_worker
from pgbgw._bench_workers import idle, stamp


def fail_once(path: str) -> None:
    """Leave the time and exit with status 1, but sleep when it runs again."""
    if current_worker().last_outcome is None:
        stamp(path)
        sys.exit(1)
    idle()


def busy() -> None:
    """Compute, and take no notice of anything."""
    while True:
        pass
