"""Does it get slower when the table is large?  (F8)

Method: register and terminate one worker, which is accepted and not launched, and wait until its
slot is free, again; the supervisor's CPU time per worker, its waking up and falling asleep with it.
`table_size` in an empty table; `nearly_full` in one where all slots but 4 are taken.

Bias: none known.  A worker that is terminated before the supervisor has looked is one event and not
two; that is so for PostgreSQL, too.
"""

from collections.abc import Iterator
from contextlib import ExitStack

from _harness import main
from pgbgw._bench import NOOP, Figure, Options, Question, Round, cpu_ns, drop, holding
from pgbgw.client import Client
from pgbgw.worker import BackgroundWorker


def pairs(client: Client, worker: BackgroundWorker, calls: int) -> float:
    """µs of the supervisor per register and terminate."""
    before = cpu_ns(client.supervisor_pid)
    for _ in range(calls):
        drop([client.register(worker)])
    return (cpu_ns(client.supervisor_pid) - before) / calls / 1000


def ask(options: Options) -> Iterator[Round]:
    worker = BackgroundWorker(entry=NOOP)
    with ExitStack() as stack:
        empty, full = {}, {}
        for slots in options["slots"]:
            empty[slots] = stack.enter_context(holding(slots))
        for slots in options["nearly_full"]:
            full[slots] = stack.enter_context(holding(slots))
            full[slots].register_many([worker] * (slots - 4))
        while True:
            yield {
                name: {
                    slots: pairs(client, worker, options["calls"])
                    for slots, client in found.items()
                }
                for name, found in (("table_size", empty), ("nearly_full", full))
            }


QUESTION = Question(
    "table_size",
    ask,
    {
        "table_size": Figure("F8", "µs", "CPU time of the supervisor per register + terminate"),
        "nearly_full": Figure("F8", "µs", "the same with all slots but 4 taken"),
    },
    full={
        "calls": 2000,
        "slots": [8, 64, 1024, 8192, 65_536, 262_143],
        "nearly_full": [8, 1024, 65_536],
    },
    quick={"calls": 200, "slots": [8, 8192], "nearly_full": [1024]},
    axis="slots",
)
PEERS = ("postgresql",)

if __name__ == "__main__":
    main(QUESTION, PEERS, __doc__)
