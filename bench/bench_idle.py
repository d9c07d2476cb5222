"""What does a supervisor cost that has nothing to do, and how long is it deaf when it has?  (F17)

Method: CPU time over some seconds with one client attached; resident memory; then the burst of
bench_burst.py on a new supervisor, which counts the pauses of its own loop.

Bias: circus and supervisord supervise one sleeping program and have nobody attached.
"""

from _harness import main
from pgbgw._bench import IDLE_COST

QUESTION = IDLE_COST
PEERS = ("postgresql", "circus", "supervisord")

if __name__ == "__main__":
    main(QUESTION, PEERS, __doc__)
