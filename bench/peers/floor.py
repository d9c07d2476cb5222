"""The floor: bare system calls from the same interpreter, which nobody can supervise."""

from __future__ import annotations

import mmap
import os
import signal
import time
from collections.abc import Iterator
from statistics import median
from typing import Any

from _subject import per_second, serve
from pgbgw._bench import Options, Round, in_processes, overall, p99


def first_lines(calls: int) -> list[float]:
    """µs from os.fork() to the first line of the child."""
    place, found = mmap.mmap(-1, 8), []
    for _ in range(calls):
        before = time.monotonic_ns()
        pid = os.fork()
        if pid == 0:
            place[:] = time.monotonic_ns().to_bytes(8, "little")
            os._exit(0)
        os.waitpid(pid, 0)
        found.append((int.from_bytes(place[:], "little") - before) / 1000)
    return found


def one() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)


def status(options: Options) -> Iterator[Round]:
    """Signal 0: is there a process of that number?"""
    calls, pid = options["calls"] // 10, os.getpid()

    def asking() -> Iterator[Any]:
        yield
        begun, cpu = time.perf_counter_ns(), time.process_time_ns()
        for _ in range(calls):
            os.kill(pid, 0)
        yield begun, time.perf_counter_ns(), (time.process_time_ns() - cpu) / calls

    while True:
        found = {n: in_processes(n, asking) for n in options["processes"]}
        yield {
            "status": {n: overall(each) / calls for n, each in found.items()},
            "status_cpu": {n: median(one[2] for one in each) for n, each in found.items()},
        }


def launch(options: Options) -> Iterator[Round]:
    while True:
        found = first_lines(options["calls"])
        yield {"launch": median(found), "launch_p99": p99(found)}


def preload(options: Options) -> Iterator[Round]:
    import heap  # noqa: F401

    while True:
        yield {"preload": median(first_lines(options["calls"]))}


def cycle(options: Options) -> Iterator[Round]:
    while True:
        yield {"cycle": per_second(options, one)}


def burst(options: Options) -> Iterator[Round]:
    clients, each, times = options["clients"], options["each"], options["times"]

    def client() -> Iterator[Any]:
        yield
        for _ in range(times):
            pids = []
            for _ in range(each):
                pids.append(os.fork())
                if pids[-1] == 0:
                    os._exit(0)
            for pid in pids:
                os.waitpid(pid, 0)
        yield time.monotonic()

    while True:
        before = time.monotonic()
        ends = in_processes(clients, client)
        yield {"burst": clients * each * times / (max(ends) - before)}


def resident(options: Options) -> Iterator[Round]:
    while True:
        found, pids = {}, []
        try:
            for count in sorted(options["residents"]):
                while len(pids) < count:
                    pids.append(os.fork())
                    if pids[-1] == 0:
                        signal.pause()
                        os._exit(0)
                found[count] = per_second(options, one)
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        yield {"resident": found}


if __name__ == "__main__":
    serve(
        {
            "status": status,
            "launch": launch,
            "preload": preload,
            "cycle": cycle,
            "burst": burst,
            "resident": resident,
        }
    )
