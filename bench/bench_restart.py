"""How long is a worker away that failed?

Method: a worker with restart time 0 leaves the time in a file and exits with status 1; the asker
looks at handle.pid until it is another one.  Each worker is restarted once, then terminated.

Bias: pgbgw waits 10 ms before the first two restarts in a row, and longer from then on, so that
what cannot run does not use up the machine.  PostgreSQL does not, and is the faster one here.
supervisord's program is killed by the asker, and its pid asked for over the socket.
"""

import time
from collections.abc import Iterator
from statistics import median

from _harness import main
from pgbgw._bench import PATIENCE, Figure, Options, Question, Round, stamp_file, supervisor, until
from pgbgw.worker import BackgroundWorker


def ask(options: Options) -> Iterator[Round]:
    with supervisor(preload=["workers"]) as client, stamp_file() as (path, stamped):
        failing = BackgroundWorker(entry="workers:fail_once", args=(path,), restart_time=0.0)

        def one() -> float:
            handle = client.register(failing)
            until(lambda: handle.pid)
            first = handle.pid
            until(lambda: handle.pid not in (first, None), pause=0.00002)
            now = time.monotonic_ns()
            handle.terminate()
            handle.wait_until_gone(PATIENCE)
            return (now - stamped()) / 1000

        while True:
            yield {"restart": median(one() for _ in range(options["calls"]))}


QUESTION = Question(
    "restart",
    ask,
    {"restart": Figure("", "µs", "exit with status 1 → the new pid is visible")},
    full={"calls": 30},
    quick={"calls": 5},
)
PEERS = ("postgresql", "supervisord")

if __name__ == "__main__":
    main(QUESTION, PEERS, __doc__)
