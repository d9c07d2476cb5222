"""What does asking for a worker's state cost, and what if many ask at once?  (F2)

Method: one running worker; 1 to 8 processes, each attached by itself, ask handle.status() in a
loop from a common start.  CPU time per call of the median process is the figure (`status_cpu`):
with more processes than processors the clock on the wall, from the first's beginning to the last's
end, counts the waiting for a processor, too (`status`).

Bias: the loop's own few ns are in ours, which is Python, and not in PostgreSQL's, which is C.
circus and supervisord are asked over their sockets, which is the only way there is.
"""

from _harness import main
from pgbgw._bench import STATUS

QUESTION = STATUS
PEERS = ("postgresql", "floor", "circus", "supervisord")

if __name__ == "__main__":
    main(QUESTION, PEERS, __doc__)
