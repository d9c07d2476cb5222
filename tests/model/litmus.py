"""The memory orders of the slot protocol, one small program per promise, explored exhaustively.

A case is a few threads that do what the C does, in its order of steps.  With the orders of the C
it must keep its promise; with any one of them weakened it must not, else that order would be
superfluous, or the case no test of it.

The memory is that of C11 with release, acquire, relaxed and sequentially consistent accesses, by
views: a location keeps all values it ever had, each with what its writer knew; a thread may read
any value that is not older than one it knows of; an acquire that reads a release takes over what
its writer knew.  A sequentially consistent load reads nothing older than the last sequentially
consistent store.  Left out: load buffering (each store of the protocol depends on the loads before
it, or is a release) and stores that take effect before older ones (a word is written by one
process, or by compare-and-swap).

`python3 litmus.py` prints a line per run.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

RELAXED, ACQUIRE, RELEASE, ACQ_REL, SEQ_CST = "relaxed", "acquire", "release", "acq_rel", "seq_cst"
ACQUIRING = {ACQUIRE, ACQ_REL, SEQ_CST}
RELEASING = {RELEASE, ACQ_REL, SEQ_CST}

Value = Any  # hashable
View = tuple[int, ...]  # by location: the oldest of its values that may still be read


@dataclass(frozen=True)
class Load:
    at: str
    order: str


@dataclass(frozen=True)
class Store:
    at: str
    value: Value
    order: str


@dataclass(frozen=True)
class Update:
    """An atomic read-modify-write; gives the old value.  A new value of None: the compare-and-swap
    fails, which is an acquire load."""

    at: str
    new: Callable[[Any], Value | None]
    order: str


@dataclass(frozen=True)
class After:
    """Wait until a thread has ended, and know all it did: told by the kernel (message, pidfd)."""

    thread: int


Step = Load | Store | Update | After
Run = Generator[Step, Any, Any]
Body = Callable[[], Run]


def exchange(at: str, value: Value, order: str) -> Update:
    return Update(at, lambda old: value, order)


def swap(at: str, expected: Value, desired: Value, order: str) -> Update:
    """Compare and swap: it has succeeded if it gives what was expected."""
    return Update(at, lambda old: desired if old == expected else None, order)


class BrokenPromise(Exception):
    pass


def promise(kept: bool, what: str) -> None:
    if not kept:
        raise BrokenPromise(what)


@dataclass(frozen=True)
class Thread:
    """Where it is follows from what its steps gave: its body is run again with them."""

    given: tuple[Value, ...] = ()
    view: View = ()


@dataclass(frozen=True)
class State:
    memory: tuple[tuple[tuple[Value, View], ...], ...]  # by location: its values, each with a view
    strict: View  # by location: the last sequentially consistent store
    threads: tuple[Thread, ...]


def join(a: View, b: View) -> View:
    return tuple(map(max, a, b))


def raised(view: View, at: int, to: int) -> View:
    return (*view[:at], max(view[at], to), *view[at + 1 :])


def replaced(items: tuple[Any, ...], at: int, item: object) -> tuple[Any, ...]:
    return (*items[:at], item, *items[at + 1 :])


class Exploration:
    """All executions of some threads from an initial memory."""

    def __init__(self, memory: Mapping[str, Value], bodies: Sequence[Body]) -> None:
        self.places = {name: place for place, name in enumerate(memory)}
        self.bodies = bodies
        zero = (0,) * len(memory)
        self.start = State(
            tuple(((value, zero),) for value in memory.values()),
            zero,
            tuple(Thread((), zero) for _ in bodies),
        )
        self._steps: dict[tuple[int, tuple[Value, ...]], tuple[Step | None, Value]] = {}

    def states(self, at_end: Callable[..., None]) -> int:
        """Visit them all; at_end is called with what the threads returned.  How many there are."""
        seen = {self.start}
        todo = [self.start]
        while todo:
            state = todo.pop()
            steps = [self._step(i, thread.given) for i, thread in enumerate(state.threads)]
            if all(step is None for step, _ in steps):
                at_end(*(returned for _, returned in steps))
            for i, (step, _) in enumerate(steps):
                for after in () if step is None else self._outcomes(state, i, step):
                    if after not in seen:
                        seen.add(after)
                        todo.append(after)
        return len(seen)

    def _step(self, i: int, given: tuple[Value, ...]) -> tuple[Step | None, Value]:
        """The next step of a thread that was given this; or None, and what it returned."""
        if (i, given) not in self._steps:
            body = self.bodies[i]()
            try:
                step: Step | None = next(body)
                for value in given:
                    step = body.send(value)
                self._steps[i, given] = step, None
            except StopIteration as end:
                self._steps[i, given] = None, end.value
        return self._steps[i, given]

    def _outcomes(self, state: State, i: int, step: Step) -> list[State]:
        thread = state.threads[i]
        if isinstance(step, After):
            other = state.threads[step.thread]
            if self._step(step.thread, other.given)[0] is not None:
                return []
            return [self._moved(state, i, None, join(thread.view, other.view))]
        place = self.places[step.at]
        history = state.memory[place]
        if isinstance(step, Load):
            return self._loads(state, i, place, step.order, lambda value: True)
        if isinstance(step, Store):
            return [self._written(state, i, place, step.value, None, step.order, inherited=None)]
        old, known = history[-1]  # an update reads the last value: that is what makes it atomic
        outcomes = []
        new = step.new(old)
        if new is not None:
            outcomes.append(self._written(state, i, place, new, old, step.order, inherited=known))
        return outcomes + self._loads(
            state, i, place, ACQUIRE, lambda value: step.new(value) is None
        )

    def _loads(
        self, state: State, i: int, place: int, order: str, wanted: Callable[[Value], bool]
    ) -> list[State]:
        thread = state.threads[i]
        oldest = thread.view[place]
        if order == SEQ_CST:
            oldest = max(oldest, state.strict[place])
        outcomes = []
        for when, (value, known) in enumerate(state.memory[place]):
            if when >= oldest and wanted(value):
                view = raised(thread.view, place, when)
                if order in ACQUIRING:
                    view = join(view, known)
                outcomes.append(self._moved(state, i, value, view))
        return outcomes

    def _written(
        self,
        state: State,
        i: int,
        place: int,
        value: Value,
        given: Value,
        order: str,
        inherited: View | None,
    ) -> State:
        """After a store; or after an update, which goes on with the release that it read."""
        history = state.memory[place]
        when = len(history)
        view = raised(state.threads[i].view, place, when)
        if inherited is not None and order in ACQUIRING:
            view = join(view, inherited)
        told = view if order in RELEASING else raised((0,) * len(view), place, when)
        if inherited is not None:
            told = join(told, inherited)
        memory = replaced(state.memory, place, (*history, (value, told)))
        strict = raised(state.strict, place, when) if order == SEQ_CST else state.strict
        return self._moved(State(memory, strict, state.threads), i, given, view)

    def _moved(self, state: State, i: int, given: Value, view: View) -> State:
        thread = Thread((*state.threads[i].given, given), view)
        return State(state.memory, state.strict, replaced(state.threads, i, thread))


# --------------------------------------------------------------------------------------------
# The cases.  A request word is (state, generation); supervisor and clients are as in the C.
# --------------------------------------------------------------------------------------------

Orders = Mapping[str, str]
Program = tuple[Mapping[str, Value], Sequence[Body], Callable[..., None]]


def nothing_more(*returned: object) -> None:
    """Each thread keeps its promises by itself."""


FREE, CLAIMED, READY = "free", "claimed", "ready"


def publish_and_look(o: Orders) -> Program:
    """client_register, supervisor_look: who sees READY sees the whole record, and of this
    generation.  Two clients use the slot one after the other."""

    def client(generation: int) -> Body:
        def body() -> Run:
            word = yield Load("req", ACQUIRE)
            if word != (FREE, generation):
                return None
            word = yield swap("req", word, (CLAIMED, generation), ACQ_REL)
            if word != (FREE, generation):
                return None
            yield Store("record 0", generation, RELAXED)
            yield Store("record 1", generation, RELAXED)
            yield swap("req", (CLAIMED, generation), (READY, generation), o["publish"])
            return None

        return body

    def supervisor() -> Run:
        for generation in (1, 2):
            word = yield Load("req", o["look"])
            if word != (READY, generation):
                return None
            for part in ("record 0", "record 1"):
                value = yield Load(part, RELAXED)
                promise(value == generation, "a torn or stale record is accepted")
            yield exchange("req", (FREE, generation + 1), ACQ_REL)
        return None

    memory = {"req": (FREE, 1), "record 0": 0, "record 1": 0}
    return memory, [client(1), client(2), supervisor], nothing_more


def free_and_claim(o: Orders) -> Program:
    """supervisor_free, client_claim (I3): who has claimed, and who was told of it by whatever
    means, never reads an older status than that of its generation."""

    def supervisor() -> Run:
        yield Store("st", 2, RELEASE)
        yield exchange("req", (FREE, 2), o["free"])
        return None

    def client() -> Run:
        word = yield Load("req", o["claim"])
        if word != (FREE, 2):
            return False
        word = yield swap("req", word, (CLAIMED, 2), ACQ_REL if o["claim"] == ACQUIRE else RELAXED)
        if word != (FREE, 2):
            return False
        status = yield Load("st", ACQUIRE)
        promise(status == 2, "a status older than the claim")
        return True

    return {"req": (READY, 1), "st": 1}, [supervisor, client], nothing_more


def handle_to_a_third(o: Orders) -> Program:
    """The same for a process that has the handle by a message."""
    memory, (supervisor, _), _ = free_and_claim(o)

    def client() -> Run:
        word = yield swap("req", (FREE, 2), (CLAIMED, 2), o["claim"])
        return word == (FREE, 2)

    def third() -> Run:
        yield After(1)
        word = yield Load("req", RELAXED)
        status = yield Load("st", ACQUIRE)
        return word, status

    def at_end(_: object, claimed: bool, seen: Any) -> None:
        promise(not claimed or seen[1] == 2, "a status older than the handle, in a third process")

    return memory, [supervisor, client, third], at_end


def token_before_slot(o: Orders) -> Program:
    """client_register, supervisor_bind (I6): the token of a published registration is claimed.
    Either compare-and-swap of the slot would do: an update goes on with the release it reads."""

    def client() -> Run:
        yield swap("token", FREE, CLAIMED, ACQ_REL)
        yield swap("req", FREE, CLAIMED, o["swaps"])
        yield swap("req", CLAIMED, READY, o["swaps"])
        return None

    def supervisor() -> Run:
        word = yield Load("req", o["look"])
        if word == READY:
            token = yield Load("token", ACQUIRE)
            promise(token == CLAIMED, "a parallel registration without its token")
        return None

    return {"req": FREE, "token": FREE}, [client, supervisor], nothing_more


def wait_then_register(o: Orders) -> Program:
    """supervisor_free, client_freed: after "gone" the token is free, and a refusal impossible.
    Either segment's word suffices."""

    def supervisor() -> Run:
        yield Store("free_seq", 1, RELAXED)
        yield exchange("token", FREE, ACQ_REL)
        yield Store("st", 2, o["free"])
        yield Store("nfree", 1, RELEASE)
        yield exchange("req", (FREE, 2), o["free"])
        yield Store("free_seq", 2, RELEASE)
        return None

    def waiter() -> Run:
        status = yield Load("st", o["freed"])
        word = yield Load("req", o["freed"])
        if status != 2 or word != (FREE, 2):
            return None
        token = yield Load("token", ACQUIRE)
        promise(token == FREE, "gone, but its token is not free")
        before = yield Load("free_seq", ACQUIRE)
        free = yield Load("nfree", ACQUIRE)
        after = yield Load("free_seq", RELAXED)
        promise(free != 0 or before % 2 == 1 or before != after, "gone, but refused")
        return None

    memory = {"req": (READY, 1), "st": 1, "token": CLAIMED, "free_seq": 0, "nfree": 0}
    return memory, [supervisor, waiter], nothing_more


def refusal_by_count(o: Orders) -> Program:
    """client_find (I10): what was freed before the call began is not refused."""

    def supervisor() -> Run:
        yield Store("free_seq", 1, RELAXED)
        yield Store("nfree", 1, RELEASE)
        yield exchange("req", FREE, ACQ_REL)
        yield Store("free_seq", 2, o["even"])
        return None

    def client() -> Run:
        before = yield Load("free_seq", o["begin"])
        free = yield Load("nfree", ACQUIRE)
        after = yield Load("free_seq", RELAXED)
        promise(not (before == after == 2 and free == 0), "refused, with a slot free all the while")
        return None

    return {"req": READY, "free_seq": 0, "nfree": 0}, [supervisor, client], nothing_more


def refusal_by_scan(o: Orders) -> Program:
    """client_find (I10): slot 0 is freed behind the scan, then slot 1 claimed ahead of it."""

    def supervisor() -> Run:
        yield Store("free_seq", 1, RELAXED)
        yield exchange("req 0", FREE, o["free"])
        yield Store("free_seq", 2, RELEASE)
        return None

    def other() -> Run:
        word = yield Load("req 0", o["see"])
        if word == FREE:
            yield swap("req 1", FREE, CLAIMED, o["claim"])
        return None

    def client() -> Run:
        before = yield Load("free_seq", ACQUIRE)
        first = yield Load("req 0", o["scan"])
        second = yield Load("req 1", o["scan"])
        after = yield Load("free_seq", RELAXED)
        refused = FREE not in (first, second) and before % 2 == 0 and before == after
        promise(not refused, "refused, with a slot free all the while")
        return None

    memory = {"req 0": READY, "req 1": FREE, "free_seq": 0}
    return memory, [supervisor, other, client], nothing_more


def status_and_detail(o: Orders) -> Program:
    """supervisor_publish, client_status: who sees a status sees the detail written before."""

    def supervisor() -> Run:
        yield Store("seq", 1, RELAXED)
        yield Store("detail", "new", RELEASE)
        yield Store("seq", 2, RELEASE)
        yield Store("st", "new", o["publish"])
        return None

    def client() -> Run:
        status = yield Load("st", o["status"])
        if status == "new":
            before = yield Load("seq", ACQUIRE)
            detail = yield Load("detail", ACQUIRE)
            after = yield Load("seq", RELAXED)
            torn = before % 2 == 1 or before != after
            promise(torn or detail == "new", "a detail older than the status")
        return None

    return {"st": "", "detail": "", "seq": 0}, [supervisor, client], nothing_more


def whole_detail(o: Orders) -> Program:
    """detail_open, detail_put, detail_close, map_read_detail: two words of one writing."""

    def supervisor() -> Run:
        for writing in (1, 2):
            yield Store("seq", 2 * writing - 1, RELAXED)
            yield Store("word 0", writing, o["put"])
            yield Store("word 1", writing, o["put"])
            yield Store("seq", 2 * writing, o["close"])
        return None

    def client() -> Run:
        before = yield Load("seq", o["begin"])
        if before % 2 == 1:
            return None
        first = yield Load("word 0", o["read"])
        second = yield Load("word 1", o["read"])
        after = yield Load("seq", RELAXED)
        promise(before != after or first == second, "a detail of two writings")
        return None

    return {"seq": 0, "word 0": 0, "word 1": 0}, [supervisor, client], nothing_more


def ring_or_stay_awake(o: Orders) -> Program:
    """client_ring, supervisor_prepare_sleep (I8): the client rings, or the supervisor sees."""

    def client() -> Run:
        yield Update("dirty", lambda old: old | 1, o["mark"])
        sleep = yield Load("sleep", o["asleep"])
        return sleep % 2 == 1  # rings

    def supervisor() -> Run:
        yield Store("sleep", 1, o["sleep"])
        dirty = yield Load("dirty", o["scan"])
        return dirty == 0  # sleeps

    def at_end(rings: bool, sleeps: bool) -> None:
        promise(rings or not sleeps, "a change is slept over")

    return {"dirty": 0, "sleep": 0}, [client, supervisor], at_end


def marked_and_drained(o: Orders) -> Program:
    """client_ring, supervisor_drain: who takes the dirty bit sees the change that it is for."""

    def client() -> Run:
        yield swap("req", CLAIMED, READY, ACQ_REL)
        yield Update("dirty", lambda old: old | 1, o["mark"])
        return None

    def supervisor() -> Run:
        bits = yield exchange("dirty", 0, o["drain"])
        if bits:
            word = yield Load("req", ACQUIRE)
            promise(word == READY, "the bit is taken, the change not seen: it is lost")
        return None

    return {"req": CLAIMED, "dirty": 0}, [client, supervisor], nothing_more


def hint_is_not_lost(o: Orders) -> Program:
    """supervisor_free, client_claim_hinted (I9): a free slot ends with its hint set."""

    def supervisor() -> Run:
        yield exchange("req", FREE, ACQ_REL)
        yield Update("hint", lambda old: 1, o["set"])
        return None

    def client() -> Run:
        word = yield Load("req", ACQUIRE)
        if word == FREE:
            return False  # claims
        yield Update("hint", lambda old: 0, o["clear"])
        word = yield Load("req", ACQUIRE)
        if word == FREE:
            yield Update("hint", lambda old: 1, RELEASE)
        return True

    def third() -> Run:
        yield After(0)
        yield After(1)
        hint = yield Load("hint", RELAXED)
        return hint

    def at_end(_: object, failed: bool, hint: int) -> None:
        promise(not failed or hint == 1, "a free slot has lost its hint")

    return {"req": READY, "hint": 0}, [supervisor, client, third], at_end


CASES: tuple[tuple[Callable[[Orders], Program], dict[str, str]], ...] = (
    (publish_and_look, {"publish": ACQ_REL, "look": ACQUIRE}),
    (free_and_claim, {"free": ACQ_REL, "claim": ACQUIRE}),
    (handle_to_a_third, {"free": ACQ_REL, "claim": ACQ_REL}),
    (token_before_slot, {"swaps": ACQ_REL, "look": ACQUIRE}),
    (wait_then_register, {"free": ACQ_REL, "freed": ACQUIRE}),
    (refusal_by_count, {"even": RELEASE, "begin": ACQUIRE}),
    (
        refusal_by_scan,
        {"free": ACQ_REL, "see": ACQUIRE, "claim": ACQ_REL, "scan": ACQUIRE},
    ),
    (status_and_detail, {"publish": RELEASE, "status": ACQUIRE}),
    (
        whole_detail,
        {"put": RELEASE, "close": RELEASE, "begin": ACQUIRE, "read": ACQUIRE},
    ),
    (
        ring_or_stay_awake,
        {"mark": SEQ_CST, "asleep": SEQ_CST, "sleep": SEQ_CST, "scan": SEQ_CST},
    ),
    (marked_and_drained, {"mark": SEQ_CST, "drain": ACQ_REL}),
    (hint_is_not_lost, {"set": RELEASE, "clear": ACQ_REL}),
)
# One step weaker where that is the question, else relaxed.
WEAKER = {
    ("ring_or_stay_awake", "mark"): ACQ_REL,
    ("ring_or_stay_awake", "asleep"): ACQUIRE,
    ("ring_or_stay_awake", "sleep"): RELEASE,
    ("ring_or_stay_awake", "scan"): ACQUIRE,
}


@dataclass(frozen=True)
class Result:
    name: str
    weakened: str  # what was, "" for the orders of the C
    states: int
    found: str  # the promise that was broken, "" if none
    seconds: float

    @property
    def as_expected(self) -> bool:
        return bool(self.found) == bool(self.weakened)


def run(case: Callable[[Orders], Program], orders: Orders, weakened: str) -> Result:
    memory, bodies, at_end = case(orders)
    began = time.monotonic()
    states, found = 0, ""
    try:
        states = Exploration(memory, bodies).states(at_end)
    except BrokenPromise as broken:
        found = str(broken)
    name = case.__name__.replace("_", " ")
    return Result(name, weakened, states, found, time.monotonic() - began)


def results() -> list[Result]:
    """Every case with the orders of the C, then with each of them weakened."""
    rows = []
    for case, orders in CASES:
        rows.append(run(case, orders, ""))
        for which in orders:
            weaker = WEAKER.get((case.__name__, which), RELAXED)
            weakened = {**orders, which: weaker}
            rows.append(run(case, weakened, f"{which} {orders[which]} -> {weaker}"))
    return rows


if __name__ == "__main__":
    rows = results()
    for row in rows:
        verdict = "as expected" if row.as_expected else "UNEXPECTED "
        print(f"{verdict}  {row.name:22} {row.weakened or 'as built':30} {row.found or row.states}")
    sys.exit(not all(row.as_expected for row in rows))
