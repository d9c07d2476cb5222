"""Is a history of concurrent operations what some sequential order of them would have given?

The search of Wing and Gong with the memory of Lowe: take, of the operations that are not placed
yet, one that began before the first of them ended; place it if the specification allows it in this
state; go back if none fits; never look twice at the same set of placed operations with the same
state.  An operation without an end may take effect at any time later, or never.

Two specifications of the slot table follow: a slot for itself, and the table as it is seen by those
who register.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any, TypeVar

S = TypeVar("S", bound=Hashable)

READS = frozenset(("query", "LIMIT", "used"))  # never change a state


@dataclass(frozen=True)
class Operation:
    """What somebody did, from when to when, and what came out."""

    what: str
    begin: float
    end: float  # inf: it never returned
    arguments: tuple[Any, ...] = ()
    result: Any = None

    @property
    def pending(self) -> bool:
        return self.end == inf


def linearizable(
    history: Sequence[Operation], state: S, allowed: Callable[[S, Operation], Iterable[S]]
) -> bool:
    """allowed gives the states that an operation may lead to: none if it cannot be next."""
    operations = sorted(history, key=lambda o: (o.begin, o.end))
    everything = sum(1 << i for i, o in enumerate(operations) if not o.pending)
    n = len(operations)
    seen: set[tuple[int, S]] = set()
    stack: list[tuple[int, int, S]] = [(0, 0, state)]  # placed (bits), all placed up to here, state
    while stack:
        placed, first, state = stack.pop()
        if placed & everything == everything:
            return True
        while placed >> first & 1:
            first += 1
        earliest_end = inf
        for i in range(first, n):
            o = operations[i]
            if o.begin > earliest_end:
                break
            if placed >> i & 1:
                continue
            earliest_end = min(earliest_end, o.end)
        next_ones: list[tuple[int, S]] = []
        for i in range(first, n):
            o = operations[i]
            if o.begin > earliest_end:
                break
            if placed >> i & 1:
                continue
            states = list(allowed(state, o))
            if o.what in READS and states:  # placed as early as may be, it stands in nobody's way
                next_ones = [(placed | 1 << i, state)]
                break
            next_ones += [(placed | 1 << i, after) for after in states]
        for node in next_ones:
            if node not in seen:
                seen.add(node)
                stack.append((node[0], first, node[1]))
    return False


# --- a slot for itself ------------------------------------------------------------------------


@dataclass(frozen=True)
class Slot:
    """What the specification knows of a slot."""

    generation: int
    status: str = "free"  # pending, accepted, running, stopped
    terminated: bool = False
    pid: int = 0

    def freed(self) -> Slot:
        return Slot(self.generation + 1)


SHOWN = {"pending": "NOT_YET_STARTED", "accepted": "NOT_YET_STARTED", "running": "STARTED"}


def slot_allows(slot: Slot, o: Operation) -> Iterable[Slot]:
    """The sequential specification of a slot.  Arguments: (generation, ...).

    Of clients: register (it succeeded), terminate -> whether it was there, query -> (status, pid;
    None if that was not asked for, 0 for none).
    Of the supervisor: accept, cancel, reject, notice (a terminate), start, stop, free, reclaim.
    """
    ours = o.arguments[0] == slot.generation
    status = slot.status
    if o.what == "query":
        shown = SHOWN.get(status, "STOPPED") if ours else "STOPPED"
        status_told, pid_told = o.result
        pid = slot.pid if shown == "STARTED" else 0
        return (slot,) if status_told == shown and pid_told in (None, pid) else ()
    if o.what == "terminate":
        there = ours and status != "free"
        # True may be said of a worker that is being freed: only False is a fact about the state.
        if o.result is False and there:
            return ()
        return (replace(slot, terminated=True),) if there else (slot,)
    if not ours:
        return ()
    if o.what == "register":
        return (replace(slot, status="pending"),) if status == "free" else ()
    if o.what == "accept":
        return (replace(slot, status="accepted"),) if status == "pending" else ()
    if o.what == "cancel":
        return (slot.freed(),) if status == "pending" and slot.terminated else ()
    if o.what == "notice":
        return (slot,) if status not in ("free", "pending") and slot.terminated else ()
    if o.what == "start":
        fits = status in ("accepted", "stopped")
        return (replace(slot, status="running", pid=o.arguments[1]),) if fits else ()
    if o.what == "stop":
        return (replace(slot, status="stopped", pid=0),) if status == "running" else ()
    if o.what == "free":
        # Not before it ran, unless somebody asked for it.
        fits = status in ("running", "stopped") or (status == "accepted" and slot.terminated)
        return (slot.freed(),) if fits else ()
    if o.what == "reclaim":
        return (slot.freed(),) if status == "free" else ()
    raise ValueError(o.what)


# --- the table, for those who register --------------------------------------------------------


@dataclass(frozen=True)
class Room:
    """Which slots are free, and who holds each parallel token."""

    free: frozenset[int]
    tokens: tuple[Hashable, ...]  # None: nobody


def room_allows(room: Room, o: Operation) -> Iterable[Room]:
    """The sequential specification of capacity.

    take(who), give(who): a token, which comes before the slot.  claim(slot, who or None): a slot,
    with the token of who.  FULL(who or None).  free(slot).  bury(who): with its token, if any.
    LIMIT: no token is free.  used(index): this token is not free.
    """
    free, tokens = room.free, room.tokens
    a = o.arguments
    if o.what == "take":  # any that is free
        return [passed_on(room, None, a[0], i) for i, t in enumerate(tokens) if t is None]
    if o.what == "give":
        return (passed_on(room, a[0], None),) if a[0] in tokens else ()
    if o.what == "bury":  # it may have held one, or none any more
        return (passed_on(room, a[0], None) if a[0] in tokens else room,)
    if o.what == "LIMIT":
        return (room,) if None not in tokens else ()
    if o.what == "used":
        return (room,) if tokens[a[0]] is not None else ()
    if o.what == "claim":
        fits = a[0] in free and (a[1] is None or a[1] in tokens)
        return (replace(room, free=free - {a[0]}),) if fits else ()
    if o.what == "FULL":
        if free or not (a[0] is None or a[0] in tokens):
            return ()
        # What is held from here on is only on its way back.
        return (room if a[0] is None else passed_on(room, a[0], (a[0], "returns")),)
    if o.what == "free":
        return (replace(room, free=free | {a[0]}),) if a[0] not in free else ()
    raise ValueError(o.what)


def passed_on(room: Room, giver: Hashable, taker: Hashable, index: int | None = None) -> Room:
    """The room with a token in other hands."""
    tokens = list(room.tokens)
    tokens[tokens.index(giver) if index is None else index] = taker
    return replace(room, tokens=tuple(tokens))
