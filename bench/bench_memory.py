"""What does a worker that sleeps weigh, and what a slot that nobody uses?  (F9)

Method: the proportional set size (PSS: a shared page counts in parts) of sleeping workers; the
resident memory of a supervisor with 262 143 slots over that of one with 8, per slot.

Bias: fewer workers where each is an interpreter of its own (loky).  PSS counts what is shared with
the supervisor in parts, so that many workers weigh less each.
"""

from _harness import main
from pgbgw._bench import MEMORY

QUESTION = MEMORY
PEERS = (
    "postgresql",
    "multiprocessing:fork",
    "concurrent_futures",
    "loky",
    "pebble",
    "billiard",
)

if __name__ == "__main__":
    main(QUESTION, PEERS, __doc__)
