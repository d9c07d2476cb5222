"""How long until a worker runs whose supervisor has preloaded 100 MB?  (F16)

Method: as bench_launch.py; a module of 100 MB of small objects is preloaded (heap.py).

Bias: the floor and the peer fork from a process that has imported the same module.
"""

from collections.abc import Iterator
from statistics import median

from _harness import main
from pgbgw._bench import WORKERS, Figure, Options, Question, Round, first_lines, supervisor


def ask(options: Options) -> Iterator[Round]:
    preload = [WORKERS, "heap"]
    with supervisor(preload=preload) as cold, supervisor(preload=preload, spares=4) as warm:
        while True:
            yield {
                "preload": median(first_lines(cold, options["calls"])),
                "preload_spares": median(first_lines(warm, options["calls"])),
            }


QUESTION = Question(
    "preload",
    ask,
    {
        "preload": Figure("F16", "µs", "register → first line, 100 MB preloaded"),
        "preload_spares": Figure("F16", "µs", "the same with warm spares", against="preload"),
    },
    full={"calls": 100},
    quick={"calls": 10},
)
PEERS = ("floor", "multiprocessing:fork")

if __name__ == "__main__":
    main(QUESTION, PEERS, __doc__)
