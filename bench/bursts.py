"""What bursts of registrations and terminations say: one computation for all who measure them.

Method: each of N processes registers `size` workers, terminates them, waits until the table has let
them go, and begins again on the next beat of a clock that all share, so that the bursts of all
begin together.  Together they fill the table: size is the number of slots by that of processes.
Nothing is launched.  Pages have been touched before.

Only the calls are timed.  "Pairs per second, all processes together" is the number of pairs in
bursts that overlapped, by the time from the first beginning to the last end of these; of that the
median over all bursts.  So processes that take turns on too few CPUs are not counted as if each had
one of its own, waiting for the supervisor is not counted at all, and a process that somebody else's
load has stopped in mid-burst spoils one value and not the sum.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import median

from pgbgw._bench import Options, Round

BEAT = 1_000_000  # ns; also in pgbgw_bench.c and contention.h

# begun, registered, terminated: CLOCK_MONOTONIC; the supervisor's CPU time before and after; ns
Burst = Sequence[int]


def beat_after(seconds: float = 0.0) -> int:
    """The first beat that comes after so many seconds from now."""
    return (time.monotonic_ns() + int(seconds * 1e9)) // BEAT * BEAT + BEAT


def figures(bursts: Sequence[Burst], size: int) -> dict[str, float]:
    """What all bursts of all processes say."""
    rates = []  # one for each burst
    for together in _overlapping(bursts):
        took = max(burst[2] for burst in together) - together[0][0]
        rates += [len(together) * size / took * 1e9] * len(together)
    supervisor = max(burst[4] for burst in bursts) - min(burst[3] for burst in bursts)
    return {
        "pairs": median(rates),  # per s
        "register": median((registered - begun) / size for begun, registered, *_ in bursts),  # ns
        "terminate": median((end - registered) / size for _, registered, end, *_ in bursts),  # ns
        "supervisor": supervisor / (len(bursts) * size) / 1000,  # µs per pair
    }


def _overlapping(bursts: Iterable[Burst]) -> Iterator[list[Burst]]:
    """Bursts between whose calls there was no pause, in order."""
    together: list[Burst] = []
    end = 0
    for burst in sorted(bursts):
        if together and burst[0] > end:
            yield together
            together = []
        together.append(burst)
        end = max(end, burst[2])
    yield together


def by_table(options: Options, measure: Callable[[int, int, int], dict[str, float]]) -> Round:
    """A round: for each number of slots figures by the number of processes; measure() is told the
    slots, the processes and the size of a burst."""
    found: dict[str, dict[int, float]] = {}
    for slots in options["slots"]:
        for processes in options["processes"]:
            for name, value in measure(slots, processes, slots // processes).items():
                found.setdefault(f"{name}_{slots}", {})[processes] = value
    return found
