"""Does it get slower when many workers are there already?  (F7)

Method: the cycle of bench_cycle.py beside 0, 10, 100 and 1000 workers that sleep.

Bias: none known; the floor forks from a process that has so many sleeping children.
"""

from collections.abc import Iterator

from _harness import main
from pgbgw._bench import (
    NOOP,
    Figure,
    Options,
    Question,
    Round,
    cycles,
    residents,
    supervisor,
)
from pgbgw.worker import BackgroundWorker


def ask(options: Options) -> Iterator[Round]:
    worker = BackgroundWorker(entry=NOOP)
    slots = max(options["residents"]) + 8
    with supervisor(slots) as cold, supervisor(slots, spares=4) as warm:
        while True:
            found: dict[str, dict[int, float]] = {"resident": {}, "resident_spares": {}}
            for count in options["residents"]:
                for name, client in zip(found, (cold, warm), strict=True):
                    with residents(client, count):
                        found[name][count] = cycles(client, worker, options["calls"])
            yield found


QUESTION = Question(
    "resident",
    ask,
    {
        "resident": Figure("F7", "1/s", "cycles per s beside idle workers", "more"),
        "resident_spares": Figure("F7", "1/s", "the same with warm spares", "more", "resident"),
    },
    full={"calls": 200, "residents": [0, 10, 100, 1000]},
    quick={"calls": 10, "residents": [0, 32]},
    axis="residents",
)
PEERS = ("postgresql", "floor", "multiprocessing:fork")

if __name__ == "__main__":
    main(QUESTION, PEERS, __doc__)
