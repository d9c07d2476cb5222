"""Entry points of the workers that tests register, as "support.workers:function"."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from pgbgw import current_worker


def noop(*args: object, **kwargs: object) -> None:
    """Return: exit code 0."""


def sleep_until_stopped() -> None:
    """Say ready, then sleep until SIGTERM raises WorkerTerminated."""
    worker = current_worker()
    worker.ready()
    while True:
        worker.sleep(3600)


def busy_until_killed() -> None:
    """Compute, without ever waiting or calling pgbgw again."""
    current_worker().ready()
    while True:
        pass


def ignore_sigterm() -> None:
    """Say ready and take no notice of SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    current_worker().ready()
    while True:
        time.sleep(3600)


def fail(message: str = "boom") -> None:
    raise ValueError(message)


def exit_with(code: object) -> None:
    """sys.exit: threads, atexit functions and the clean end run."""
    sys.exit(code)  # type: ignore[arg-type]


def exit_at_once(code: int) -> None:
    """os._exit: no clean end."""
    os._exit(code)


def kill_self(signum: int) -> None:
    os.kill(os.getpid(), signum)
    time.sleep(3600)


def append(path: str, text: str = "x") -> None:
    """Add a line to a file, in one write: several workers may share it."""
    with Path(path).open("a") as file:
        file.write(f"{text}\n")


def append_and_exit(path: str, text: str, code: int) -> None:
    """Leave a trace, then sys.exit(code)."""
    append(path, text)
    sys.exit(code)


def append_and_sleep(path: str, text: str = "x") -> None:
    """Leave a trace, say ready, sleep until stopped."""
    append(path, text)
    sleep_until_stopped()
