"""What does asking for a worker cost?  (F1)

Method: bursts of 512 registrations of one prepared worker into a table of 1024, the supervisor
alive but holding them (its startup worker does not return), so that the calls are timed and not
the launches; chunks of 16 calls per look at the clock.  `register` is what a burst costs per call:
its first call may wake the supervisor.  `register_asleep` waits each time until it sleeps.

Bias: PostgreSQL's figure is its C call, ours the call from Python.  PostgreSQL signals the
postmaster at each call, ours only if it sleeps.
"""

from _harness import main
from pgbgw._bench import REGISTER

QUESTION = REGISTER
PEERS = ("postgresql",)

if __name__ == "__main__":
    main(QUESTION, PEERS, __doc__)
