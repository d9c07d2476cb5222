"""What does it cost to be told that the table is full?  (F8)

Method: a table that is full of workers which are accepted and not launched; one more, again and
again, by try_register(), which makes an exception and drops it.

Bias: PostgreSQL's figure is its C call, which returns false.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack

from _harness import main
from pgbgw._bench import NOOP, Figure, Options, Question, Round, holding, until
from pgbgw.worker import BackgroundWorker


def ask(options: Options) -> Iterator[Round]:
    worker, calls = BackgroundWorker(entry=NOOP), options["calls"]
    with ExitStack() as stack:
        clients = {}
        for slots in options["slots"]:
            client = clients[slots] = stack.enter_context(holding(slots))
            client.register_many([worker] * slots)
            until(lambda client=client: client._view.sleeping)
        while True:
            found = {}
            for slots, client in clients.items():
                before = time.perf_counter_ns()
                for _ in range(calls):
                    assert client.try_register(worker) is None
                found[slots] = (time.perf_counter_ns() - before) / calls
            yield {"refusal": found}


QUESTION = Question(
    "refusal",
    ask,
    {"refusal": Figure("F8", "ns", "a registration that a full table refuses")},
    full={"calls": 20_000, "slots": [8, 1024, 65_536, 262_143]},
    quick={"calls": 2000, "slots": [8, 1024]},
    axis="slots",
)
PEERS = ("postgresql",)

if __name__ == "__main__":
    main(QUESTION, PEERS, __doc__)
