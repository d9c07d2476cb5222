"""How much do many processes together get out of one table of slots?  (F19)

Method: see bursts.py.  1, 2, 4 and 8 processes on tables of 64 and of 8192 slots, the supervisor
alive, nothing launched: pgbgw's and PostgreSQL's supervisors accept what is registered for a phase
that they have not reached.  `pairs_N` is the figure; `register_N` and `terminate_N` are what one
call costs a process, `supervisor_N` what a pair costs the supervisor.

Subjects: pgbgw from Python; the same core without an interpreter (slot_contention.c); the design it
started from, one lock and a linear scan over the same records (locked_table.c); PostgreSQL, which
has that design, measured in C inside its backends.

Bias: against pgbgw, whose calls are made from Python; PostgreSQL's and both tables' are C.  With
fewer CPUs than processes nobody shows all of its contention.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import bursts
from _harness import main
from pgbgw._bench import (
    NOOP,
    Figure,
    Options,
    Question,
    Round,
    cpu_ns,
    drop,
    holding,
    in_processes,
    until,
)
from pgbgw.client import Client, attach
from pgbgw.worker import BackgroundWorker

SLOTS = (64, 8192)


def bursts_of(address: str, size: int, beats: int) -> Iterator[Any]:
    """What one process does; see in_processes()."""
    # As for PostgreSQL here, nobody is told of a change for which nobody waits.
    worker = BackgroundWorker(entry=NOOP, notify=False)
    with attach(address) as client:
        pid = client.supervisor_pid
        # A claim begins where the last one ended: so all pages of the table are touched.
        for _ in range(client.max_worker_processes // size):
            drop([client.register(worker) for _ in range(size)])
        yield
        rows = []
        at = bursts.beat_after()
        end_at = at + beats * bursts.BEAT
        while at < end_at:
            time.sleep(max(0, at - time.monotonic_ns()) / 1e9)
            before = cpu_ns(pid)
            begun = time.monotonic_ns()
            handles = [client.register(worker) for _ in range(size)]
            registered = time.monotonic_ns()
            for handle in handles:
                handle.terminate()
            terminated = time.monotonic_ns()
            for handle in handles:
                until(lambda handle=handle: handle._freed)
            rows.append((begun, registered, terminated, before, cpu_ns(pid)))
            at = bursts.beat_after()
        yield rows


def ask(options: Options) -> Iterator[Round]:
    with ExitStack() as stack:
        clients: dict[int, Client] = {
            slots: stack.enter_context(holding(slots)) for slots in options["slots"]
        }

        def measure(slots: int, processes: int, size: int) -> dict[str, float]:
            address, beats = clients[slots].address, options["beats"]
            found = in_processes(processes, lambda: bursts_of(address, size, beats))
            return bursts.figures([row for rows in found for row in rows], size)

        while True:
            yield bursts.by_table(options, measure)


def explained(slots: int) -> dict[str, Figure]:
    table = f"a table of {slots} slots"
    return {
        f"pairs_{slots}": Figure(
            "F19", "1/s", f"register + terminate, all processes together, {table}", "more"
        ),
        f"register_{slots}": Figure("F19", "ns", f"one call, {table}"),
        f"terminate_{slots}": Figure("F19", "ns", f"one call, {table}"),
        f"supervisor_{slots}": Figure("F19", "µs", f"supervisor's CPU per pair, {table}"),
    }


QUESTION = Question(
    "slot_contention",
    ask,
    {name: figure for slots in SLOTS for name, figure in explained(slots).items()},
    full={"slots": list(SLOTS), "processes": [1, 2, 4, 8], "beats": 100},
    quick={"slots": list(SLOTS), "processes": [1, 8], "beats": 20},
    axis="processes",
)
PEERS = ("c_program:slot_contention", "c_program:locked_table", "postgresql")

if __name__ == "__main__":
    main(QUESTION, PEERS, __doc__)
