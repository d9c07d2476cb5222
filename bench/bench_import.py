"""What does it cost to import?  (F18)

Method: `python -c "import pgbgw"`, and each first use of its main names, over `python -c pass`,
one after another; the median.

Bias: bytecode is cached; the disk is not asked.
"""

import subprocess
import sys
import time
from collections.abc import Iterator
from statistics import median

from _harness import main
from pgbgw._bench import Figure, Options, Question, Round

NAMES = ("attach", "Supervisor", "current_worker", "BackgroundWorker")


def seconds(code: str) -> float:
    before = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - before


def over_bare(codes: dict[str, str], calls: int) -> Round:
    """ms of each program over that of a bare interpreter."""
    found: dict[str, list[float]] = {name: [] for name in codes}
    for _ in range(calls):
        bare = seconds("pass")
        for name, code in codes.items():
            found[name].append((seconds(code) - bare) * 1000)
    return {name: median(values) for name, values in found.items()}


def ask(options: Options) -> Iterator[Round]:
    codes = {f"import_{name}": f"import pgbgw; pgbgw.{name}" for name in NAMES}
    while True:
        yield over_bare({"import": "import pgbgw"} | codes, options["calls"])


QUESTION = Question(
    "import",
    ask,
    {"import": Figure("F18", "ms", "import pgbgw, over a bare interpreter")}
    | {
        f"import_{name}": Figure("F18", "ms", f"the same and pgbgw.{name}", against="import")
        for name in NAMES
    },
    full={"calls": 20},
    quick={"calls": 3},
)
PEERS = ("multiprocessing", "concurrent_futures", "loky", "pebble", "billiard")

if __name__ == "__main__":
    main(QUESTION, PEERS, __doc__)
