"""Entry points of workers that fork and close where they should not."""

from __future__ import annotations

import os
import sys

from pgbgw import WrongProcessError, current_worker

CODE = 7


def fork_and_return_twice() -> None:
    """The fork leaves through our frames as if it were the worker, with another status."""
    worker = current_worker()
    worker.ready()
    pid = os.fork()
    if pid == 0:
        try:
            current_worker()
        except WrongProcessError:
            worker.title("not the worker")  # it may say what it likes
            sys.exit(33)
        sys.exit(34)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    sys.exit(CODE if status == 33 else status)


def close_all_and_exit() -> None:
    os.closerange(3, 4096)
    sys.exit(CODE)


def close_all_and_fail() -> None:
    os.closerange(0, 4096)
    raise ValueError("nobody will read this")


def close_all_and_talk() -> None:
    """Everything that a worker may call is harmless, if useless, without the channel."""
    worker = current_worker()
    os.closerange(3, 4096)
    worker.ready()
    worker.title("deaf and dumb")
    sys.exit(CODE)


def close_all_and_sleep() -> None:
    """Until it is terminated."""
    worker = current_worker()
    worker.ready()
    os.closerange(3, 4096)
    while True:
        worker.sleep(3600)
