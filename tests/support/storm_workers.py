"""Entry points of workers that nothing but SIGKILL ends, and of those that end at once."""

from __future__ import annotations

import os
import signal
import socket
import time

from pgbgw import current_worker
from support.workers import append


def never_done() -> None:
    """As startup worker: keep the supervisor in its first phase."""
    while True:
        time.sleep(3600)


def busy_in_c() -> None:
    """Compute in C, where no Python signal handler runs."""
    current_worker().ready()
    sum(range(1 << 60))


def blocked_in_read() -> None:
    """Read from a pipe, or a socket, that nobody ever writes to."""
    ours, theirs = socket.socketpair()
    read, _write = os.pipe()
    current_worker().ready()
    while True:
        if os.getpid() % 2:
            ours.recv(1)
        else:
            os.read(read, 1)
    theirs.close()


def deaf() -> None:
    """Ignore and block all signals that can be."""
    for signum in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(signum, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    current_worker().ready()
    while True:
        time.sleep(3600)


def note_and_leave(path: str, code: int) -> None:
    """Write down who this is and when it was, then end without further ado."""
    slot = current_worker().handle.slot
    append(path, f"{slot} {time.monotonic_ns()} {time.time_ns()}")
    os._exit(code)
