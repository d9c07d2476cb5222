"""A worker that forks, as do its children, until the kernel has had enough."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import time

import psutil

from pgbgw import current_worker

ROOM = 60  # processes that it may have
NOBODY = 64007  # a user who has none


def fork_bomb(ignore_sigterm: bool) -> None:
    """Never as root, whom RLIMIT_NPROC does not bind.  Ready when the limit is reached."""
    limit = ROOM
    if os.geteuid() != 0:
        mine = (p for p in psutil.process_iter(["uids", "num_threads"]) if p.info["uids"])
        limit += sum(p.info["num_threads"] for p in mine if p.info["uids"].real == os.getuid())
    resource.setrlimit(resource.RLIMIT_NPROC, (limit, limit))
    if os.geteuid() == 0:
        os.setresuid(NOBODY, NOBODY, NOBODY)
    if ignore_sigterm:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # Not Python's, whose forks die with their parents.
    fork = ctypes.PyDLL(None).fork
    worker, first, told = current_worker(), os.getpid(), False
    while True:
        if fork() < 0:
            if not told and os.getpid() == first:
                told = True
                worker.ready()
            time.sleep(0.001)
