"""How long until a worker runs?  (F4 forked cold, F5 with warm spares)

Method: one worker after another, from the call to the first line of its entry function, which reads
the clock; the next one is not asked for until the last is gone and the supervisor sleeps.

Bias: the module of the entry is preloaded, as the library of PostgreSQL's is, and as what a forking
library's parent has imported is.  Executors are made new for each call: theirs is the time until a
*new* process runs, not until an idle one does.
"""

from _harness import main
from pgbgw._bench import LAUNCH

QUESTION = LAUNCH
PEERS = (
    "postgresql",
    "floor",
    "multiprocessing:fork",
    "multiprocessing:spawn",
    "concurrent_futures",
    "loky",
    "pebble",
    "billiard",
)

if __name__ == "__main__":
    main(QUESTION, PEERS, __doc__)
