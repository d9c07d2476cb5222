"""How many workers can one client run, one after another?  (F6)

Method: register, wait for its start, wait for its end, again; the worker does nothing.

Bias: a peer starts a process and joins it; where it has no processes of its own to start (circus,
supervisord) a program is registered, started, ended and removed.  The floor is os.fork, os._exit,
os.waitpid.
"""

from _harness import main
from pgbgw._bench import CYCLE

QUESTION = CYCLE
PEERS = (
    "postgresql",
    "floor",
    "multiprocessing:fork",
    "multiprocessing:spawn",
    "loky",
    "pebble",
    "billiard",
    "circus",
    "supervisord",
)

if __name__ == "__main__":
    main(QUESTION, PEERS, __doc__)
