"""Questions to libraries with the interface of multiprocessing: Process(target, args), Pool(n)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

from _subject import per_second, repeat
from bench_import import over_bare
from peers._owners import left_behind, pss
from pgbgw._bench import Options, Round, in_processes, p99, stamp_file
from pgbgw._bench_workers import noop, stamp


def sleep() -> None:
    time.sleep(3600)


def questions(module: str, Process: Any, Pool: Any) -> dict[str, Callable[[Options], Any]]:
    def first_lines(options: Options) -> list[float]:
        """µs from the call to the first line of the child."""
        found = []
        with stamp_file() as (path, stamped):
            for _ in repeat(options):
                before = time.monotonic_ns()
                process = Process(target=stamp, args=(path,))
                process.start()
                process.join()
                found.append((stamped() - before) / 1000)
        return found

    def launch(options: Options) -> Iterator[Round]:
        while True:
            found = first_lines(options)
            yield {"launch": median(found), "launch_p99": p99(found)}

    def preload(options: Options) -> Iterator[Round]:
        import heap  # noqa: F401

        while True:
            yield {"preload": median(first_lines(options))}

    def one() -> None:
        process = Process(target=noop)
        process.start()
        process.join()

    def cycle(options: Options) -> Iterator[Round]:
        while True:
            yield {"cycle": per_second(options, one)}

    def burst(options: Options) -> Iterator[Round]:
        clients, each, times = options["clients"], options["each"], options["times"]

        def client() -> Iterator[Any]:
            yield
            for _ in range(times):
                processes = [Process(target=noop) for _ in range(each)]
                for process in processes:
                    process.start()
                for process in processes:
                    process.join()
            yield time.monotonic()

        while True:
            before = time.monotonic()
            ends = in_processes(clients, client)
            yield {"burst": clients * each * times / (max(ends) - before)}

    @contextmanager
    def residents(count: int) -> Iterator[None]:
        processes = [Process(target=sleep) for _ in range(count)]
        for process in processes:
            process.start()
        try:
            yield
        finally:
            for process in processes:
                process.kill() if hasattr(process, "kill") else process.terminate()
            for process in processes:
                process.join()

    def resident(options: Options) -> Iterator[Round]:
        while True:
            found = {}
            for count in options["residents"]:
                with residents(count):
                    found[count] = per_second(options, one)
            yield {"resident": found}

    def memory(options: Options) -> Iterator[Round]:
        with Pool(options["workers"]) as pool:
            pool.map(abs, range(4 * options["workers"]), 1)
            while True:
                yield {"memory": pss([process.pid for process in pool._pool])}

    def death(options: Options) -> Iterator[Round]:
        def owner(task: Callable[[], None] | None) -> list[int]:
            pool = Pool(2)
            kept.append(pool)
            pool.map(abs, range(8), 1)
            for _ in range(2 if task else 0):
                pool.apply_async(task)
            return [process.pid for process in pool._pool]

        kept: list[Any] = []  # a pool that nobody holds ends
        while True:
            yield left_behind(owner)

    def imported(options: Options) -> Iterator[Round]:
        while True:
            yield over_bare({"import": f"import {module}"}, options["calls"])

    return {
        "launch": launch,
        "preload": preload,
        "cycle": cycle,
        "burst": burst,
        "resident": resident,
        "memory": memory,
        "death": death,
        "import": imported,
    }
