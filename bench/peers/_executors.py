"""Questions to libraries with the interface of concurrent.futures: make(n) gives an executor."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

from _subject import per_second, repeat
from bench_import import over_bare
from peers._owners import left_behind, pss
from pgbgw._bench import Options, Round, p99, stamp_file
from pgbgw._bench_workers import noop, stamp


def questions(
    module: str, make: Callable[[int], Any], most: int
) -> dict[str, Callable[[Options], Iterator[Round]]]:
    """most: workers that are enough to tell what one weighs."""

    def filled(count: int) -> Any:
        """An executor all of whose workers have run something."""
        executor = make(count)
        for future in [executor.submit(time.sleep, 0.2) for _ in range(count)]:
            future.result()
        return executor

    def launch(options: Options) -> Iterator[Round]:
        while True:
            found = []
            with stamp_file() as (path, stamped):
                for _ in repeat(options):
                    before = time.monotonic_ns()
                    with make(1) as executor:
                        executor.submit(stamp, path).result()
                    found.append((stamped() - before) / 1000)
            yield {"launch": median(found), "launch_p99": p99(found)}

    def one() -> None:
        with make(1) as executor:
            executor.submit(noop).result()

    def cycle(options: Options) -> Iterator[Round]:
        while True:
            yield {"cycle": per_second(options, one)}

    def memory(options: Options) -> Iterator[Round]:
        with filled(min(options["workers"], most)) as executor:
            while True:
                yield {"memory": pss([*executor._processes])}

    def death(options: Options) -> Iterator[Round]:
        def owner(task: Callable[[], None] | None) -> list[int]:
            executor = filled(2)
            for _ in range(2 if task else 0):
                executor.submit(task)
            kept.append(executor)
            return [*executor._processes]

        kept: list[Any] = []
        while True:
            yield left_behind(owner)

    def imported(options: Options) -> Iterator[Round]:
        while True:
            yield over_bare({"import": f"import {module}"}, options["calls"])

    return {
        "launch": launch,
        "cycle": cycle,
        "memory": memory,
        "death": death,
        "import": imported,
    }
