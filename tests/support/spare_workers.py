"""Workers of test_spares.py."""

from __future__ import annotations

import os
import signal
import sys

from pgbgw import current_worker
from support import workers

_runs = 0


def count(path: str) -> None:
    """Write how often this has run in this process."""
    global _runs
    _runs += 1
    workers.append(path, str(_runs))


def tell(path: str) -> None:
    """Write all that a worker knows of itself; fail, so that it runs again."""
    me = current_worker()
    workers.append(
        path,
        f"{me.worker.name} {me.handle.slot}/{me.handle.generation} {me.main_arg} {me.extra!r} "
        f"{os.environ['PGBGW_TEST_TOLD']} {len(me.shared_memory)} {me.last_outcome}",
    )
    sys.exit(1)


def dirty(path: str) -> None:
    """Write what the first byte of the domain's memory is, change it, and crash."""
    memory = current_worker().shared_memory
    workers.append(path, str(memory[0]))
    memory[0] = 1
    os.kill(os.getpid(), signal.SIGKILL)
