"""What does asking for a worker's end cost?  (F3)

Method: 512 workers that were accepted and not launched, terminated one after another; chunks of 16
calls per look at the clock.  What the supervisor does with it is not in it.

Bias: PostgreSQL's figure is its C call, which signals the postmaster each time.
"""

from _harness import main
from pgbgw._bench import TERMINATE

QUESTION = TERMINATE
PEERS = ("postgresql",)

if __name__ == "__main__":
    main(QUESTION, PEERS, __doc__)
