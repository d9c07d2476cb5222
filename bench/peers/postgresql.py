"""PostgreSQL's own background workers, timed inside its backends: see postgres/pgbgw_bench.c."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from statistics import fmean, median

import bursts
from _subject import Skip, serve
from pgbgw._bench import BURST, Options, Round, cpu_ns, memory, p99
from postgres.cluster import Cluster, why_not

MOST_SLOTS = 262_000  # MAX_BACKENDS, less the connections
MOST_TAKEN = 8192  # filling a table, or looking at what is in it, takes quadratic time
BEATS = 100  # of bursts in a round
POLLS = 10  # times as many as asked for: in C they are over before all backends have met


def together(pg: Cluster, clients: int, sql: str) -> list[list[int]]:
    """Run it in so many backends from a common moment on, $begin in sql; all rows."""
    begin = bursts.beat_after(0.2 + 0.05 * clients)  # time for all to connect
    statement = sql.replace("$begin", str(begin))
    return [row for rows in pg.rows_at_once([statement] * clients) for row in rows]


def pairs(pg: Cluster, clients: int, size: int, beats: int = BEATS) -> dict[str, float]:
    """Bursts of what is not launched."""
    sql = f"SELECT * FROM bench_pairs({size}, $begin, $begin + {beats * bursts.BEAT})"
    return bursts.figures(together(pg, clients, sql), size)


def register(options: Options) -> Iterator[Round]:
    with Cluster(2 * BURST, standby=True) as pg:
        while True:
            awake, asleep = pairs(pg, 1, BURST), pairs(pg, 1, 1)
            yield {"register": awake["register"], "register_asleep": asleep["register"]}


def terminate(options: Options) -> Iterator[Round]:
    with Cluster(2 * BURST, standby=True) as pg:
        while True:
            yield {"terminate": pairs(pg, 1, BURST)["terminate"]}


def slot_contention(options: Options) -> Iterator[Round]:
    with ExitStack() as stack:
        clusters = {
            slots: stack.enter_context(Cluster(slots, standby=True)) for slots in options["slots"]
        }

        def measure(slots: int, clients: int, size: int) -> dict[str, float]:
            return pairs(clusters[slots], clients, size, options["beats"])

        while True:
            yield bursts.by_table(options, measure)


def table_size(options: Options) -> Iterator[Round]:
    with ExitStack() as stack:
        empty, full = {}, {}
        for slots in options["slots"]:
            if slots <= MOST_SLOTS:
                empty[slots] = stack.enter_context(Cluster(slots, standby=True))
        for slots in options["nearly_full"]:
            if slots <= MOST_TAKEN:
                full[slots] = stack.enter_context(Cluster(slots, standby=True))
                full[slots].residents(slots - 4)
                full[slots].settle()
        beats = min(options["calls"], BEATS)
        while True:
            yield {
                name: {slots: pairs(pg, 1, 1, beats)["supervisor"] for slots, pg in found.items()}
                for name, found in (("table_size", empty), ("nearly_full", full))
            }


def status(options: Options) -> Iterator[Round]:
    calls = options["calls"] * POLLS
    with Cluster(max(options["processes"])) as pg:
        while True:
            found: Round = {"status": {}, "status_cpu": {}}
            for clients in options["processes"]:
                rows = together(pg, clients, f"SELECT * FROM bench_polls({calls}, $begin)")
                found["status"][clients] = median(end - begun for begun, end, _ in rows) / calls
                found["status_cpu"][clients] = median(cpu for _, _, cpu in rows) / calls
            yield found


def launches(pg: Cluster, calls: int) -> list[list[int]]:
    """One worker after another: begun, registered, entered, started, stopped."""
    return pg.rows(f"SELECT * FROM bench_launches({calls}, 1, 0)")


def launch(options: Options) -> Iterator[Round]:
    with Cluster(8) as pg:
        while True:
            rows = launches(pg, options["calls"])
            times = [(entered - begun) / 1000 for begun, _, entered, _, _ in rows]
            yield {"launch": median(times), "launch_p99": p99(times)}


def cycles(pg: Cluster, calls: int) -> float:
    rows = launches(pg, calls)
    return calls / (rows[-1][4] - rows[0][0]) * 1e9


def cycle(options: Options) -> Iterator[Round]:
    with Cluster(8) as pg:
        while True:
            before = pg.cpu_ns()
            rate = cycles(pg, options["calls"])
            cpu = (pg.cpu_ns() - before) / options["calls"] / 1000  # one backend's start in it
            yield {"cycle": rate, "supervisor": cpu}


def burst(options: Options) -> Iterator[Round]:
    clients, each, times = options["clients"], options["each"], options["times"]
    with Cluster(2 * clients * each) as pg:
        while True:
            rows = together(pg, clients, f"SELECT * FROM bench_launches({times}, {each}, $begin)")
            took = max(row[4] for row in rows) - min(row[0] for row in rows)
            yield {"burst": clients * each * times / took * 1e9}


def resident(options: Options) -> Iterator[Round]:
    with ExitStack() as stack:
        clusters = {}
        for count in options["residents"]:
            clusters[count] = stack.enter_context(Cluster(count + 8))
            clusters[count].residents(count)
        while True:
            yield {
                "resident": {count: cycles(pg, options["calls"]) for count, pg in clusters.items()}
            }


def refusal(options: Options) -> Iterator[Round]:
    calls = options["calls"]
    with ExitStack() as stack:
        clusters = {
            slots: stack.enter_context(Cluster(slots))
            for slots in options["slots"]
            if slots <= MOST_TAKEN
        }

        def per_call(pg: Cluster) -> float:
            [[begun, ended]] = pg.rows(f"SELECT * FROM bench_refusals({calls})")
            return (ended - begun) / calls

        while True:
            yield {"refusal": {slots: per_call(pg) for slots, pg in clusters.items()}}


def restart(options: Options) -> Iterator[Round]:
    with Cluster(8) as pg:
        while True:
            rows = pg.rows(f"SELECT * FROM bench_restarts({options['calls']})")
            yield {"restart": median(visible - left for left, visible in rows) / 1000}


def death(options: Options) -> Iterator[Round]:
    def killed(pg: Cluster, count: int) -> float:
        return pg.crash(pg.residents(count)) * 1000

    with Cluster(max(options["workers"])) as pg:
        while True:
            yield {"death": {count: killed(pg, count) for count in options["workers"]}}


def memory_of_workers(options: Options) -> Iterator[Round]:
    """A slot: its part of the table alone, without what PostgreSQL has for each process."""
    count = options["workers"]
    with Cluster(count) as pg:
        workers = pg.residents(count)
        [[table]] = pg.rows(
            "SELECT size FROM pg_shmem_allocations WHERE name = 'Background Worker Data'"
        )
        while True:
            yield {
                "memory": fmean(memory(pid, "Pss") for pid in workers) / 1024,
                "slot": table / count,
            }


def idle(options: Options) -> Iterator[Round]:
    with Cluster(8) as pg:
        while True:
            before = cpu_ns(pg.pid)
            time.sleep(options["seconds"])
            yield {
                "idle_cpu": (cpu_ns(pg.pid) - before) / options["seconds"] / 1e9 * 100,
                "resident": memory(pg.pid, "Rss") / (1 << 20),
            }


def checked(ask: Callable[[Options], Iterator[Round]]) -> Callable[[Options], Iterator[Round]]:
    def asked(options: Options) -> Iterator[Round]:
        if (reason := why_not()) is not None:
            raise Skip(reason)
        yield from ask(options)

    return asked


QUESTIONS = {
    "register": register,
    "terminate": terminate,
    "slot_contention": slot_contention,
    "table_size": table_size,
    "status": status,
    "launch": launch,
    "cycle": cycle,
    "burst": burst,
    "resident": resident,
    "refusal": refusal,
    "restart": restart,
    "death": death,
    "memory": memory_of_workers,
    "idle": idle,
}


def end(*_: object) -> None:
    """SIGTERM, once: take the clusters down."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(1)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, end)
    serve({name: checked(ask) for name, ask in QUESTIONS.items()})
