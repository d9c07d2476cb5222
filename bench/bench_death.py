"""How long do workers outlive their supervisor?  (F10)

Method: a new supervisor with 1, 64 or 1000 sleeping workers each time; SIGKILL; until the pidfd of
each of them is readable.  `left` and `left_idle` are how many of 2 workers, busy or not, are there
one second later: what libraries without a parent-death signal leave behind.

Bias: none known.
"""

import os
import resource
import select
import signal
import time
from collections.abc import Iterator, Sequence

from _harness import main
from pgbgw._bench import IDLE, PATIENCE, Figure, Options, Question, Round, supervisor


def gone(pidfds: Sequence[int], timeout: float) -> int:
    """Wait for the end of processes; how many are left when the time is over."""
    poll, left = select.poll(), set(pidfds)
    for fd in pidfds:
        poll.register(fd, select.POLLIN)
    deadline = time.monotonic() + timeout
    while left and (rest := deadline - time.monotonic()) > 0:
        for fd, _ in poll.poll(rest * 1000):
            poll.unregister(fd)
            left.discard(fd)
    return len(left)


def kill(entry: str, count: int, timeout: float) -> tuple[float, int]:
    """ms until so many workers are gone, and how many are not after the timeout."""
    with supervisor(count + 8, preload=["workers"]) as client:
        handles = [client.register(entry) for _ in range(count)]
        client.wait(handles, PATIENCE, "ALL_STARTED")
        pids = [handle.pid for handle in handles]
        pidfds = [os.pidfd_open(pid) for pid in pids if pid]
        time.sleep(0.05)
        before = time.perf_counter()
        os.kill(client.supervisor_pid, signal.SIGKILL)
        left = gone(pidfds, timeout)
        took = time.perf_counter() - before
    for fd in pidfds:
        os.close(fd)
    return took * 1000, left


def ask(options: Options) -> Iterator[Round]:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    while True:
        yield {
            "death": {count: kill(IDLE, count, PATIENCE)[0] for count in options["workers"]},
            "left": kill("workers:busy", 2, 1.0)[1],
            "left_idle": kill(IDLE, 2, 1.0)[1],
        }


QUESTION = Question(
    "death",
    ask,
    {
        "death": Figure("F10", "ms", "supervisor killed → last worker gone"),
        "left": Figure("F10", "workers", "of 2 busy ones, one second later"),
        "left_idle": Figure("F10", "workers", "of 2 idle ones, one second later"),
    },
    full={"workers": [1, 64, 1000]},
    quick={"workers": [1, 32]},
    axis="workers",
)
PEERS = ("postgresql", "multiprocessing:fork", "concurrent_futures", "loky", "pebble", "billiard")

if __name__ == "__main__":
    main(QUESTION, PEERS, __doc__)
