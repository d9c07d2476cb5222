"""How many workers can many clients run at once?  (F6)

Method: 8 processes register 8 workers each at once, wait until all are gone, again; from a common
start until the last is gone.

Bias: the clients of the Python peers and of the floor are their own supervisors, 8 of them on all
processors; pgbgw's and PostgreSQL's have one supervisor together.
"""

from _harness import main
from pgbgw._bench import BURSTS

QUESTION = BURSTS
PEERS = ("postgresql", "floor", "multiprocessing:fork", "billiard")

if __name__ == "__main__":
    main(QUESTION, PEERS, __doc__)
