"""Measuring pgbgw itself: `pgbgw bench`, and what bench/ sets beside PostgreSQL and other peers.

A question's `ask` is a generator: it prepares, measures one round whenever it is asked for the
next, and clears up when it is closed.  A round gives a number for each figure, or numbers by a
point on the question's axis.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from statistics import median, quantiles
from typing import Any, NamedTuple

from pgbgw import _show
from pgbgw.client import Client, attach
from pgbgw.errors import PgbgwError
from pgbgw.handle import WorkerHandle
from pgbgw.supervisor import Supervisor
from pgbgw.worker import MAX_WORKER_PROCESSES_LIMIT, BackgroundWorker

Options = Mapping[str, Any]
Round = dict[str, float | dict[int, float]]

WORKERS = "pgbgw._bench_workers"
NOOP, STAMP, IDLE = (f"{WORKERS}:{name}" for name in ("noop", "stamp", "idle"))
PATIENCE = 60.0  # seconds, until something is wrong

BURST = 512  # registrations at once
CHUNK = 16  # calls between two looks at the clock, which costs about 40 ns


class Figure(NamedTuple):
    id: str
    unit: str
    means: str
    better: str = "less"
    against: str = ""  # the peers' figure that it is compared with, if that has another name


@dataclass(frozen=True)
class Question:
    """What is asked; `figures` by the names that the rounds have."""

    name: str
    ask: Callable[[Options], Iterator[Round]]
    figures: Mapping[str, Figure]
    full: Options = field(default_factory=dict)
    quick: Options = field(default_factory=dict)
    axis: str | None = None


# --- rounds and figures -----------------------------------------------------------------------


def measure(question: Question, quick: bool) -> list[dict[str, Any]]:
    """The figures of pgbgw alone, on this machine."""
    asked = question.ask(question.quick if quick else question.full)
    try:
        rounds = [next(asked) for _ in range(3 if quick else 7)]
    finally:
        asked.close()  # type: ignore[attr-defined]
    return figures(question, "pgbgw", rounds)


def figures(
    question: Question,
    subject: str,
    rounds: Sequence[Round],
    others: Mapping[str, Sequence[Round]] | None = None,
) -> list[dict[str, Any]]:
    """Median and quartiles per figure and point; the median ratio to each of the others."""
    found = []
    for name, figure in question.figures.items():
        for at in _points(rounds, name):
            values = _values(rounds, name, at)
            q1, middle, q3 = quantiles(values, method="inclusive") if values[1:] else values * 3
            line: dict[str, Any] = {
                "figure": figure.id,
                "name": name,
                "subject": subject,
                "unit": figure.unit,
                "better": figure.better,
            }
            if at is not None:
                line |= {"axis": question.axis, "at": at}
            line |= {"median": middle, "q1": q1, "q3": q3, "rounds": len(values)}
            ratios = {
                other: median(a / b for a, b in zip(values, theirs, strict=False) if b)
                for other, measured in (others or {}).items()
                if any(theirs := _values(measured, figure.against or name, at))
            }
            if ratios:
                line["ratio_to"] = ratios
            found.append(line)
    return found


def table(lines: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What people read: a line per figure, its head first."""
    rows = [("FIGURE", "MEDIAN", "QUARTILES", "UNIT", "MEANS")]
    for line in lines:
        at = f" ({line['at']} {line['axis']})" if "at" in line else ""
        means = next(
            q.figures[line["name"]].means for q in QUESTIONS.values() if line["name"] in q.figures
        )
        middle, low, high = (f"{line[key]:.4g}" for key in ("median", "q1", "q3"))
        rows.append((line["name"], middle, f"{low} to {high}", line["unit"], f"{means}{at}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = zip(row, "<>><<", widths, strict=True)
        yield "  ".join(f"{cell:{align}{width}}" for cell, align, width in cells).rstrip()


def _points(rounds: Sequence[Round], name: str) -> list[int | None]:
    """The points where a figure was measured: [None] if it is a number, [] if it was not."""
    points: set[int] = set()
    for values in (one[name] for one in rounds if name in one):
        if not isinstance(values, dict):
            return [None]
        points |= {int(at) for at in values}
    return [*sorted(points)]


def _values(rounds: Sequence[Round], name: str, at: int | None) -> list[float]:
    found = []
    for one in rounds:
        value = one.get(name)
        if isinstance(value, dict):
            value = {int(point): v for point, v in value.items()}.get(at)  # type: ignore[arg-type]
        elif at is not None:
            value = None
        if value is not None:
            found.append(value)
    return found


# --- tools ------------------------------------------------------------------------------------


def until(condition: Callable[[], object], pause: float = 0.0001) -> None:
    """Return as soon as the condition holds."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise PgbgwError("what is measured does not come about")
        time.sleep(pause)


def p99(values: Sequence[float]) -> float:
    return sorted(values)[int(0.99 * len(values))]


def drop(handles: Sequence[WorkerHandle]) -> None:
    """End all, and wait until their slots are free."""
    for handle in handles:
        handle.terminate()
    for handle in handles:
        until(lambda handle=handle: handle._freed)  # type: ignore[misc]


def cpu_ns(pid: int) -> int:
    """What the threads of a process have run so far."""
    total = 0
    for thread in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{thread}/schedstat") as file:
            total += int(file.read().split()[0])
    return total


def memory(pid: int, what: str) -> int:
    """A line of smaps_rollup, in bytes: "Pss" or "Rss"."""
    with open(f"/proc/{pid}/smaps_rollup") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(f"{what}:")) << 10


@contextmanager
def _silence() -> Iterator[None]:
    ours = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(ours, 2)
        os.close(ours)


@contextmanager
def supervisor(slots: int = 8, **arguments: Any) -> Iterator[Client]:
    """A supervisor that has what its workers import, as PostgreSQL has what it preloads.

    Its log, which it and its workers write to the stderr that they inherit, is not kept.
    """
    arguments.setdefault("preload", [WORKERS])
    with ExitStack() as stack:
        with _silence():
            client = stack.enter_context(Supervisor(max_worker_processes=slots, **arguments))
        until(lambda: client._view.sleeping)
        yield client


def holding(slots: int) -> Any:
    """A supervisor that accepts workers and launches none: its startup worker does not return."""
    return supervisor(slots, startup=IDLE)


@contextmanager
def residents(client: Client, count: int) -> Iterator[list[WorkerHandle]]:
    """So many idle workers, running."""
    handles = [client.register(IDLE) for _ in range(count)]
    client.wait(handles, PATIENCE, "ALL_STARTED")
    try:
        yield handles
    finally:
        for handle in handles:
            handle.terminate()
        client.wait(handles, PATIENCE, "ALL_GONE")


@contextmanager
def stamp_file() -> Iterator[tuple[str, Callable[[], int]]]:
    """A path for _bench_workers.stamp(), and a function that reads the time it left there."""
    with tempfile.NamedTemporaryFile() as file:
        yield file.name, lambda: int.from_bytes(os.pread(file.fileno(), 8, 0), "little")


def in_processes(count: int, job: Callable[[], Iterator[Any]]) -> list[Any]:
    """Run a generator in so many forks of this process; what each yields second, as JSON has it.

    Each prepares up to its first yield; when all have, they go on at once.
    """
    ready, here = os.pipe()
    gate, go = os.pipe()
    answers = []
    for _ in range(count):
        answer, mine = os.pipe()
        if os.fork() == 0:
            status = 1
            try:
                for fd in (ready, go, answer):
                    os.close(fd)
                steps = job()
                next(steps)
                os.write(here, b".")
                os.read(gate, 1)
                os.write(mine, json.dumps(next(steps)).encode())
                steps.close()  # type: ignore[attr-defined]
                status = 0
            finally:
                os._exit(status)
        os.close(mine)
        answers.append(answer)
    for fd in (here, gate):
        os.close(fd)
    arrived = 0
    while arrived < count and (data := os.read(ready, count)):
        arrived += len(data)
    os.close(go)
    texts = []
    for answer in answers:
        with open(answer, "rb") as file:
            texts.append(file.read())
    os.close(ready)
    for _ in range(count):
        os.wait()
    if not all(texts):
        raise PgbgwError("a measuring process failed", hint="its traceback is on stderr")
    return [json.loads(text) for text in texts]


def overall(times: Sequence[Sequence[float]]) -> float:
    """From the first beginning to the last end."""
    return max(one[1] for one in times) - min(one[0] for one in times)


def timed(act: Callable[[], object]) -> float:
    """ns per call, if act() makes CHUNK calls: the median of a burst."""
    samples = []
    for _ in range(BURST // CHUNK):
        before = time.perf_counter_ns()
        act()
        samples.append(time.perf_counter_ns() - before)
    return median(samples) / CHUNK


# --- the questions ----------------------------------------------------------------------------


def _register(options: Options) -> Iterator[Round]:
    """Bursts into a table of 1024, nothing launched.  The first call of a burst may ring."""
    worker = BackgroundWorker(entry=NOOP)
    with holding(1024) as client:

        def burst() -> float:
            handles: list[WorkerHandle] = []
            took = timed(lambda: handles.extend([client.register(worker) for _ in range(CHUNK)]))
            drop(handles)
            return took

        def asleep() -> float:
            until(lambda: client._view.sleeping)
            before = time.perf_counter_ns()
            handle = client.register(worker)
            took = time.perf_counter_ns() - before
            drop([handle])
            return took

        def many() -> float:
            workers = [worker] * BURST
            before = time.perf_counter_ns()
            handles = client.register_many(workers)
            took = time.perf_counter_ns() - before
            drop(handles)
            return took / BURST

        while True:
            bursts = range(max(1, options["calls"] // BURST))
            yield {
                "register": median(burst() for _ in bursts),
                "register_asleep": median(asleep() for _ in range(20)),
                "register_many": median(many() for _ in bursts),
            }


REGISTER = Question(
    "register",
    _register,
    {
        "register": Figure("F1", "ns", "client.register() of a prepared worker"),
        "register_asleep": Figure(
            "F1", "ns", "the same, and the supervisor has to be woken", against="register"
        ),
        "register_many": Figure(
            "F1", "ns", "client.register_many(), per worker", against="register"
        ),
    },
    full={"calls": 16 * BURST},
    quick={"calls": 2 * BURST},
)


def _terminate(options: Options) -> Iterator[Round]:
    """Bursts over workers that were accepted and not launched."""
    with holding(1024) as client:
        worker = BackgroundWorker(entry=NOOP)

        def burst() -> float:
            handles = client.register_many([worker] * BURST)
            until(lambda: client._view.sleeping)
            rest = iter(handles)
            took = timed(lambda: [handle.terminate() for handle in islice(rest, CHUNK)])
            drop(handles)
            return took

        while True:
            bursts = range(max(1, options["calls"] // BURST))
            yield {"terminate": median(burst() for _ in bursts)}


TERMINATE = Question(
    "terminate",
    _terminate,
    {"terminate": Figure("F3", "ns", "handle.terminate()")},
    full={"calls": 16 * BURST},
    quick={"calls": 2 * BURST},
)


def _status(options: Options) -> Iterator[Round]:
    """One running worker, asked by several processes at once, each attached by itself."""
    calls = options["calls"]
    with supervisor() as client, residents(client, 1) as [handle]:

        def asking() -> Iterator[Any]:
            with attach(client.address):
                handle.status()
                yield
                begun, cpu = time.perf_counter_ns(), time.process_time_ns()
                for _ in range(calls):
                    handle.status()
                cpu, ended = time.process_time_ns() - cpu, time.perf_counter_ns()
                pid = time.process_time_ns()
                for _ in range(calls):
                    handle.pid  # noqa: B018
                pid = time.process_time_ns() - pid
                yield begun, ended, cpu / calls, pid / calls

        while True:
            found = {n: in_processes(n, asking) for n in options["processes"]}
            yield {
                "status": {n: overall(each) / calls for n, each in found.items()},
                "status_cpu": {n: median(one[2] for one in each) for n, each in found.items()},
                "pid_cpu": {n: median(one[3] for one in each) for n, each in found.items()},
            }


STATUS = Question(
    "status",
    _status,
    {
        "status": Figure("F2", "ns", "handle.status(), by the clock on the wall"),
        "status_cpu": Figure("F2", "ns", "handle.status(), CPU time of the caller"),
        "pid_cpu": Figure("F2", "ns", "handle.pid, CPU time of the caller"),
    },
    full={"calls": 2_000_000, "processes": [1, 2, 4, 8]},
    quick={"calls": 200_000, "processes": [1, 8]},
    axis="processes",
)


def first_lines(client: Client, calls: int) -> list[float]:
    """µs from register() to the first line of the worker, one after another."""
    found = []
    with stamp_file() as (path, stamped):
        worker = BackgroundWorker(entry=STAMP, args=(path,))
        for _ in range(calls):
            until(lambda: client._view.sleeping)
            before = time.monotonic_ns()
            client.register(worker).wait_until_gone(PATIENCE)
            found.append((stamped() - before) / 1000)
    return found


def _launch(options: Options) -> Iterator[Round]:
    """One worker after another; its entry function's first line reads the clock."""
    with supervisor() as cold, supervisor(spares=4) as warm:
        while True:
            colds = first_lines(cold, options["calls"])
            warms = first_lines(warm, options["calls"])
            yield {
                "launch": median(colds),
                "launch_p99": p99(colds),
                "launch_spares": median(warms),
                "launch_spares_p99": p99(warms),
            }


LAUNCH = Question(
    "launch",
    _launch,
    {
        "launch": Figure("F4", "µs", "register → first line of the worker, forked cold"),
        "launch_p99": Figure("F4", "µs", "the same, all but one of 100 are faster"),
        "launch_spares": Figure(
            "F5", "µs", "register → first line, with warm spares", against="launch"
        ),
        "launch_spares_p99": Figure(
            "F5", "µs", "the same, all but one of 100 are faster", against="launch_p99"
        ),
    },
    full={"calls": 200},
    quick={"calls": 20},
)


def cycles(client: Client, worker: BackgroundWorker, calls: int) -> float:
    """Register, started, stopped, one after another, per s."""
    before = time.perf_counter()
    for _ in range(calls):
        handle = client.register(worker)
        handle.wait_for_startup(PATIENCE)
        handle.wait_for_shutdown(PATIENCE)
    return calls / (time.perf_counter() - before)


def _cycle(options: Options) -> Iterator[Round]:
    worker, calls = BackgroundWorker(entry=NOOP), options["calls"]
    with supervisor() as cold, supervisor(spares=4) as warm:
        while True:
            yield {
                "cycle": cycles(cold, worker, calls),
                "cycle_spares": cycles(warm, worker, calls),
            }


CYCLE = Question(
    "cycle",
    _cycle,
    {
        "cycle": Figure("F6", "1/s", "register → started → stopped, one client", "more"),
        "cycle_spares": Figure("F6", "1/s", "the same with warm spares", "more", "cycle"),
    },
    full={"calls": 500},
    quick={"calls": 50},
)


def bursts(client: Client, options: Options) -> float:
    """Workers per s that several clients have run, each registering some at once."""
    worker, each, times = BackgroundWorker(entry=NOOP), options["each"], options["times"]

    def one() -> Iterator[Any]:
        with attach(client.address) as mine:
            yield
            for _ in range(times):
                mine.wait(mine.register_many([worker] * each), PATIENCE, "ALL_GONE")
            yield time.monotonic()

    before = time.monotonic()  # the forks' own time is in it, a few ms
    ends = in_processes(options["clients"], one)
    return float(options["clients"] * each * times / (max(ends) - before))


def _burst(options: Options) -> Iterator[Round]:
    slots = options["clients"] * options["each"]
    with supervisor(slots) as cold, supervisor(slots, spares=4) as warm:
        while True:
            yield {"burst": bursts(cold, options), "burst_spares": bursts(warm, options)}


BURSTS = Question(
    "burst",
    _burst,
    {
        "burst": Figure("F6", "1/s", "workers run from first to last, 8 clients", "more"),
        "burst_spares": Figure("F6", "1/s", "the same with warm spares", "more", "burst"),
    },
    full={"clients": 8, "each": 8, "times": 8},
    quick={"clients": 8, "each": 8, "times": 1},
)


def _memory(options: Options) -> Iterator[Round]:
    """Workers that sleep; the supervisor's memory with the smallest table and the largest."""
    count = options["workers"]
    with (
        supervisor(count) as client,
        supervisor(8) as small,
        supervisor(MAX_WORKER_PROCESSES_LIMIT) as large,
        residents(client, count),
    ):
        pids = [info.pid for info in client.workers() if info.pid]
        while True:
            sizes = [memory(c.supervisor_pid, "Rss") for c in (small, large)]
            yield {
                "memory": sum(memory(pid, "Pss") for pid in pids) / len(pids) / 1024,
                "slot": (sizes[1] - sizes[0]) / (MAX_WORKER_PROCESSES_LIMIT - 8),
            }


MEMORY = Question(
    "memory",
    _memory,
    {
        "memory": Figure("F9", "kB", "PSS of an idle worker, of many"),
        "slot": Figure("F9", "bytes", "memory of an unused slot"),
    },
    full={"workers": 256},
    quick={"workers": 32},
)


def _idle(options: Options) -> Iterator[Round]:
    """One client attached, nothing to do; then the burst, on a supervisor that is new each time."""
    burst = options["burst"]
    while True:
        with supervisor(burst["clients"] * burst["each"]) as client:
            pid = client.supervisor_pid
            before = cpu_ns(pid)
            time.sleep(options["seconds"])
            idle = (cpu_ns(pid) - before) / (options["seconds"] * 1e9)
            resident = memory(pid, "Rss")
            bursts(client, burst)
            loop = _show.loop_json(*client._view.pauses)
            yield {
                "idle_cpu": 100 * idle,
                "resident": resident / (1 << 20),
                "pause_p99": loop["p99_pause"] * 1000,
                "pause": loop["longest_pause"] * 1000,
            }


IDLE_COST = Question(
    "idle",
    _idle,
    {
        "idle_cpu": Figure("F17", "%", "CPU of a supervisor that has nothing to do"),
        "resident": Figure("F17", "MB", "resident memory of the supervisor"),
        "pause_p99": Figure("F17", "ms", "pause of its loop under a burst: 99 of 100 are shorter"),
        "pause": Figure("F17", "ms", "the longest pause"),
    },
    full={"seconds": 5.0, "burst": BURSTS.full},
    quick={"seconds": 1.0, "burst": BURSTS.quick},
)

QUESTIONS = {
    question.name: question
    for question in (REGISTER, STATUS, TERMINATE, LAUNCH, CYCLE, BURSTS, MEMORY, IDLE_COST)
}
