"""Workers of test_edges.py."""

from __future__ import annotations

import os
import threading

from pgbgw import StartTime, current_worker
from support import workers


def fail_beside_a_thread() -> None:
    threading.Thread(target=threading.Event().wait).start()  # it never ends
    current_worker().ready()
    raise ValueError("the thread goes on")


def startup() -> None:
    worker = current_worker().client.register(
        workers.append,
        os.environ["PGBGW_TEST_TRACE"],
        start_time=StartTime.SUPERVISOR_START,
    )
    assert worker.wait_until_gone(30).exitcode == 0


def wait_once(trace: str) -> None:
    worker = current_worker()
    worker.wait(timeout=None)
    workers.append(trace)


def list_standard(path: str) -> None:
    """Write what descriptors 0 to 2 are."""
    for fd in (0, 1, 2):
        workers.append(path, os.readlink(f"/proc/self/fd/{fd}"))
