"""pebble: a process per call (concurrent.process), and a pool."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from statistics import median

import pebble

from _subject import per_second, repeat, serve
from bench_import import over_bare
from peers._owners import left_behind, pss
from pgbgw._bench import Options, Round, p99, stamp_file
from pgbgw._bench_workers import noop, stamp

run_noop = pebble.concurrent.process(noop)
run_stamp = pebble.concurrent.process(stamp)


def launch(options: Options) -> Iterator[Round]:
    while True:
        found = []
        with stamp_file() as (path, stamped):
            for _ in repeat(options):
                before = time.monotonic_ns()
                run_stamp(path).result()
                found.append((stamped() - before) / 1000)
        yield {"launch": median(found), "launch_p99": p99(found)}


def cycle(options: Options) -> Iterator[Round]:
    while True:
        yield {"cycle": per_second(options, lambda: run_noop().result())}


def filled(count: int) -> pebble.ProcessPool:
    """A pool all of whose workers have run something."""
    pool = pebble.ProcessPool(max_workers=count)
    for future in [pool.schedule(time.sleep, args=[0.2]) for _ in range(count)]:
        future.result()
    return pool


def pids(pool: pebble.ProcessPool) -> list[int]:
    return [*pool._pool_manager.worker_manager.workers]


def memory(options: Options) -> Iterator[Round]:
    pool = filled(min(options["workers"], 64))
    try:
        while True:
            yield {"memory": pss(pids(pool))}
    finally:
        pool.stop()
        pool.join()


def death(options: Options) -> Iterator[Round]:
    def owner(task: Callable[[], None] | None) -> list[int]:
        kept.append(filled(2))
        for _ in range(2 if task else 0):
            kept[0].schedule(task)
        return pids(kept[0])

    kept: list[pebble.ProcessPool] = []
    while True:
        yield left_behind(owner)


def imported(options: Options) -> Iterator[Round]:
    while True:
        yield over_bare({"import": "import pebble"}, options["calls"])


if __name__ == "__main__":
    serve({"launch": launch, "cycle": cycle, "memory": memory, "death": death, "import": imported})
