"""Workers of test_edges.py."""

from __future__ import annotations

import os
import sys
import threading
import time

from pgbgw import StartTime, current_worker
from support import workers


def fail_beside_a_thread(trace: str) -> None:
    """Fail; a thread that never ends leaves a trace once the main thread waits for it."""

    def linger() -> None:
        while threading.main_thread().is_alive():  # not any more, to Python, when it joins others
            time.sleep(0.001)
        workers.append(trace)
        threading.Event().wait()

    threading.Thread(target=linger).start()
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


def ask_for_clients(times: int) -> None:
    """Ask for a client connection again and again, and close what comes."""
    worker = current_worker()
    for _ in range(times):
        _, fds = worker._join()
        for fd in fds:
            os.close(fd)


def become_somebody_else() -> None:
    """Change the group, which takes the parent-death signal away, and wait for a stop."""
    os.setgid(os.getgid() + 1)
    current_worker().ready()
    current_worker().sleep(3600)


def close_the_streams(code: int) -> None:
    sys.stdout.close()
    sys.stderr.detach()
    sys.exit(code)
