"""What is left when the owner of workers is killed, and what workers weigh."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from bench_death import gone
from pgbgw._bench import Round, memory

PATIENCE = 1.0  # seconds


def busy() -> None:
    while True:
        pass


def pss(pids: Sequence[int]) -> float:
    """kB per process."""
    return sum(memory(pid, "Pss") for pid in pids) / len(pids) / 1024


def left_behind(own: Callable[[Callable[[], None] | None], list[int]]) -> Round:
    """How many of 2 workers live on a second after their owner was killed.

    own: makes 2 workers, in a process of its own, gives them a task if it gets one, and returns
    their pids.
    """
    return {"left": _kill(own, busy), "left_idle": _kill(own, None)}


def _kill(own: Callable[[Callable[[], None] | None], list[int]], task: object) -> int:
    reading, writing = os.pipe()
    owner = os.fork()
    if owner == 0:
        try:
            pids = own(task)  # type: ignore[arg-type]
            time.sleep(0.1)  # the task has been taken
            os.write(writing, json.dumps(pids).encode())
            time.sleep(3600)
        finally:
            os._exit(1)
    os.close(writing)
    try:
        pids = json.loads(os.read(reading, 65536) or b"[]")
        pidfds = [os.pidfd_open(pid) for pid in pids]
    finally:
        os.close(reading)
        os.kill(owner, signal.SIGKILL)
        os.waitpid(owner, 0)
    left = gone(pidfds, PATIENCE)
    for fd in pidfds:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(fd, signal.SIGKILL)
        os.close(fd)
    return left
