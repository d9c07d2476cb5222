"""Histories of a slot table: several clients at once, killed now and then, and the supervisor.

All of it is the shipped code, each side in a process of its own; only what the supervisor decides
(who starts, exits, is restarted) is drawn by lot.  Each client writes down in shared memory what it
is about to do, and when it has done it what came out: so what was begun by a process that was
killed is known, too.
"""

from __future__ import annotations

import mmap
import os
import random
import signal
import struct
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from math import inf
from typing import NoReturn

from pgbgw import _slots
from pgbgw._slots import AGAIN, LIMIT, NO_SLOT, SlotHandle
from pgbgw.worker import HandleStatus
from support.linearizability import Operation, Room, Slot, linearizable, room_allows, slot_allows
from support.slot_tables import NOW, Handle, SlotClient, Table, record

SLOTS, TOKENS, CLIENTS = 3, 2, 6
CALLS = 7  # of each client in a history
ACTIONS = 30  # of the supervisor; what it must notice may be more

ENTRY = struct.Struct("<8q")  # what, parallel, slot, generation, result, pid, begin, end
REGISTER, TERMINATE, QUERY = 1, 2, 3
PAGE = 4096
BOARD = PAGE - 64  # of each client's page: the handles it made last
STATUSES = list(HandleStatus)
STATUS_OF = (
    HandleStatus.NOT_YET_STARTED,
    HandleStatus.NOT_YET_STARTED,
    HandleStatus.STARTED,
    HandleStatus.STOPPED,
)
NOT_ASKED = -1
now = time.monotonic_ns


@dataclass
class Raw:
    """One history as it was recorded."""

    slots: list[Slot]  # at the beginning
    holders: frozenset[tuple[int, int]]  # registrations that hold a token at the beginning
    operations: list[Operation] = field(default_factory=list)
    owners: dict[tuple[int, int], int] = field(default_factory=dict)  # cids
    exact: bool = True  # were refusals for the limit, too?

    def problems(self) -> Iterable[str]:
        """What no sequential order explains."""
        for o in self.operations:
            if o.what == "impossible":
                yield f"the supervisor met what no client does: {o}"
        for x, slot in enumerate(self.slots):
            part = [o for o in self.operations if o.arguments[:1] == (x,)]
            told = [replace(o, arguments=o.arguments[1:]) for o in part if o.what in OF_A_SLOT]
            if not linearizable(told, slot, slot_allows):
                yield f"slot {x}, {slot}:\n" + listing(told)
        if not self.room_is_right(exact=True):
            # The tokens are looked at one after the other: that each was taken when it was looked
            # at is all that a refusal for the limit says.
            self.exact = False
            if not self.room_is_right(exact=False):
                told = [part for o in self.operations for part in in_the_room(o, True)]
                yield f"the table, {self.room()}:\n" + listing(told)

    def room(self) -> Room:
        free = frozenset(x for x, s in enumerate(self.slots) if s.status == "free")
        return Room(free, tuple(([*sorted(self.holders)] + [None] * TOKENS)[:TOKENS]))

    def room_is_right(self, exact: bool) -> bool:
        told = [part for o in self.operations for part in in_the_room(o, exact)]
        return linearizable(told, self.room(), room_allows)


OF_A_CLIENT = {"register", "terminate", "query"}
OF_THE_SUPERVISOR = {"accept", "cancel", "notice", "start", "stop", "free", "reclaim"}
OF_A_SLOT = OF_A_CLIENT | OF_THE_SUPERVISOR


def listing(operations: list[Operation]) -> str:
    return "\n".join(
        f"  {o.begin} {o.end} {o.what}{o.arguments} -> {o.result}"
        for o in sorted(operations, key=lambda o: o.begin)
    )


def in_the_room(o: Operation, exact: bool) -> Iterable[Operation]:
    """The steps of an operation that are about capacity."""

    def step(what: str, *arguments: object) -> Operation:
        return Operation(what, o.begin, o.end, arguments)

    if o.what == "register" or o.what == "claimed":
        slot, generation, parallel = o.arguments
        who = (slot, generation) if parallel else None
        if parallel:
            yield step("take", who)
        yield step("claim", slot, who)
    elif o.what == "refused":
        who, parallel = o.arguments[1:]
        if o.result == "LIMIT":
            yield from [step("LIMIT")] if exact else [step("used", i) for i in range(TOKENS)]
        elif o.result == "AGAIN":  # no answer about slots; but it held a token
            yield step("take", who)
            yield step("give", who)
        elif parallel:
            yield step("take", who)
            yield step("FULL", who)
            yield step("give", (who, "returns"))
        else:
            yield step("FULL", None)
    elif o.what == "cut short":  # killed, and never seen to have a slot
        yield step("take", o.arguments[1])
        yield step("give", o.arguments[1])
    elif o.what == "bury":
        yield step("bury", o.arguments[1])
    elif o.what in ("free", "cancel"):
        slot, generation, parallel = o.arguments
        if parallel:
            yield step("give", (slot, generation))
        yield step("free", slot)
    elif o.what == "reclaim":  # its token is freed when its owner is buried
        yield step("free", o.arguments[0])


# --- a client -----------------------------------------------------------------------------------


def client_process(table: Table, cid: int, shared: mmap.mmap, number: int, orders: int) -> NoReturn:
    """Do what the orders' seeds say, and take notes, until there are no more orders."""
    status = 1
    try:
        client = SlotClient(table, cid)
        images = [record(), record(parallel=True)]
        page, last = number * PAGE, 0
        while seed := os.read(orders, 8):
            rng = random.Random(int.from_bytes(seed, "little"))
            for i in range(CALLS):
                at = page + 64 + i * ENTRY.size
                if rng.random() < 0.4:
                    parallel = rng.random() < 0.5
                    ENTRY.pack_into(shared, at, REGISTER, parallel, 0, 0, 0, 0, now(), 0)
                    made = client.register(images[parallel], parallel=parallel)
                    end = now()
                    if isinstance(made, Handle):
                        place = (REGISTER, parallel, made.slot, made.generation, 1, 0)
                        last = i % 4
                        on_board = page + BOARD + 8 * last
                        shared[on_board : on_board + 8] = struct.pack(
                            "<q", made.generation << 8 | made.slot
                        )
                    else:
                        place = (REGISTER, parallel, 0, 0, made, 0)
                    put(shared, at, place, end)
                else:
                    mine = rng.random() < 0.5  # then the last: one that was just made, often
                    whose, which = (
                        (number, last) if mine else (rng.randrange(CLIENTS), rng.randrange(4))
                    )
                    on_board = whose * PAGE + BOARD + 8 * which
                    word = struct.unpack_from("<q", shared, on_board)[0]
                    handle = client.handle(word & 255, word >> 8)
                    what = TERMINATE if rng.random() < 0.35 else QUERY
                    place = (what, 0, handle.slot, handle.generation)
                    ENTRY.pack_into(shared, at, *place, 0, 0, now(), 0)
                    if what == TERMINATE:
                        result, pid = int(handle._set_terminate()), 0
                    else:
                        result, pid = look(handle, rng.random() < 0.5)
                    put(shared, at, (*place, result, pid), now())
                if rng.random() < 0.5:
                    time.sleep(rng.random() * 0.0003)  # the supervisor must get on, too
            shared[page] = 1  # done
        status = 0
    finally:
        os._exit(status)


def look(handle: SlotHandle, plainly: bool) -> tuple[int, int]:
    """The status as users ask for it; or, by one load, with the pid."""
    if plainly:
        return STATUSES.index(handle.status()), NOT_ASKED
    generation, state, _, pid = handle._view.status(handle.slot)
    shown = STATUS_OF[state] if generation == handle.generation else HandleStatus.STOPPED
    return STATUSES.index(shown), pid if shown is HandleStatus.STARTED else 0


def put(shared: mmap.mmap, at: int, place: tuple[int, ...], end: int) -> None:
    """The result first, the time of return last: who is killed before that never returned."""
    begin = ENTRY.unpack_from(shared, at)[6]
    ENTRY.pack_into(shared, at, *place, begin, 0)
    shared[at + 56 : at + 64] = struct.pack("<q", end)


# --- the recorder -------------------------------------------------------------------------------


class Recorder:
    """The supervisor of a small table, and its clients."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.table = Table(SLOTS, TOKENS)
        self.shared = mmap.mmap(-1, CLIENTS * PAGE)
        self.clients: list[tuple[int, int, int]] = []  # pid, cid, pipe
        self.slots = [Slot(1) for _ in range(SLOTS)]
        self.parallel: set[tuple[int, int]] = set()
        self.pids = 1000
        self.killed = self.dead_cid = 0
        for number in range(CLIENTS):
            self.clients.append(self.client(number))

    def client(self, number: int) -> tuple[int, int, int]:
        cid = self.table.view.new_client()
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(write)
            for n, (_, _, other) in enumerate(self.clients):
                if n != number:
                    os.close(other)
            client_process(self.table, cid, self.shared, number, read)
        os.close(read)
        return pid, cid, write

    def record(self) -> Raw:
        raw = self.raw = Raw(list(self.slots), frozenset(self.parallel))
        rng = self.random
        victim = rng.randrange(CLIENTS) if rng.random() < 0.5 else None
        patience = rng.randrange(1, 40)
        for number, (_, _, orders) in enumerate(self.clients):
            page = number * PAGE
            self.shared[page : page + 64 + CALLS * ENTRY.size] = bytes(64 + CALLS * ENTRY.size)
            os.write(orders, rng.randbytes(8))
        dead = None
        while any(not self.shared[n * PAGE] for n in range(CLIENTS) if n != dead):
            self.step()
            patience -= 1
            if patience == 0 and victim is not None:
                dead = victim
                self.kill(dead)
        while self.step() or self.table.view.pending:
            pass
        for number in range(CLIENTS):
            self.read_notes(number)
        self.learn_tokens()
        if dead is not None:
            self.clients[dead] = self.client(dead)
        return raw

    def note(self, what: str, begin: int, *arguments: object) -> None:
        self.raw.operations.append(Operation(what, begin, now(), arguments))

    def kill(self, number: int) -> None:
        """One client dies; the procedure of its death is done at once."""
        pid, cid, orders = self.clients[number]
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(orders)
        self.killed += 1
        self.dead_cid = cid
        begin = now()
        self.table.view.client_gone(cid)
        while self.table.view.sweep_due:
            self.act(self.table.view.sweep, NOW)
        self.note("bury", begin, None, cid)

    # --- the supervisor's part ------------------------------------------------------------------

    def act(self, call: Callable[..., list[tuple[int, int, int, int, str | None]]], *a: int) -> int:
        begin = now()
        events = call(*a)
        for action, x, generation, cid, _ in events:
            # A claim has no owner that the supervisor knows by name; only one client can be dead.
            reclaimed = action == _slots.EVENT_RECLAIMED
            if action != _slots.EVENT_TERMINATED:  # else it may be of an earlier history
                self.raw.owners[x, generation] = self.dead_cid if reclaimed else cid
            if action == _slots.EVENT_ACCEPTED:
                self.slots[x] = Slot(generation, "accepted")
                if self.table.req(x).token:
                    self.parallel.add((x, generation))
                self.note("accept", begin, x, generation)
            elif action == _slots.EVENT_TERMINATED:
                self.slots[x] = replace(self.slots[x], terminated=True)
                self.note("notice", begin, x, generation)
            elif action == _slots.EVENT_CANCELLED:
                self.slots[x] = Slot(generation + 1)
                self.note("cancel", begin, x, generation, None)
            elif action == _slots.EVENT_RECLAIMED:
                self.slots[x] = Slot(generation + 1)
                self.note("reclaim", begin, x, generation)
            else:
                self.note("impossible", begin, x, generation, action)
        return len(events)

    def step(self) -> int:
        """Notice, then do something by lot; how much there was to notice."""
        found = self.act(self.table.view.drain, NOW)
        if len(self.raw.operations) >= ACTIONS:
            return found
        for x in range(SLOTS):
            self.decide(x)
        return found

    def decide(self, x: int) -> None:
        view, rng, slot, begin = self.table.view, self.random, self.slots[x], now()
        place = (x, slot.generation)
        if slot.terminated or (slot.status in ("running", "stopped") and rng.random() < 0.4):
            view.set_outcome(x, 1, 0, 0, 0, True, NOW, b"")
            view.free(x)
            self.note("free", begin, *place, place in self.parallel)
            self.parallel.discard(place)
            self.slots[x] = slot.freed()
        elif slot.status in ("accepted", "stopped"):
            self.pids += 1
            view.set_running(x, self.pids, NOW)
            self.note("start", begin, *place, self.pids)
            self.slots[x] = Slot(slot.generation, "running", False, self.pids)
        elif slot.status == "running" and rng.random() < 0.4:
            view.set_stopped(x)
            self.note("stop", begin, *place)
            self.slots[x] = Slot(slot.generation, "stopped")

    # --- the clients' part ------------------------------------------------------------------------

    def read_notes(self, number: int) -> None:
        _, cid, _ = self.clients[number]
        for i in range(CALLS):
            at = number * PAGE + 64 + i * ENTRY.size
            what, parallel, x, generation, result, worker, begin, end = ENTRY.unpack_from(
                self.shared, at
            )
            if not what or not begin:
                break
            returned = end or inf
            add = self.raw.operations.append
            if what == REGISTER:
                if end and result == 1:
                    add(Operation("register", begin, end, (x, generation, bool(parallel))))
                elif end and result == NO_SLOT:
                    who = ("refused", number, i)
                    add(Operation("refused", begin, end, (None, who, bool(parallel)), "FULL"))
                elif end and result == AGAIN and parallel:
                    add(
                        Operation(
                            "refused", begin, end, (None, ("again", number, i), True), "AGAIN"
                        )
                    )
                elif end and result == LIMIT:
                    add(Operation("refused", begin, end, (None, None, True), "LIMIT"))
                elif not end:
                    self.unfinished(cid, begin, bool(parallel))
            elif what == TERMINATE:
                seen = bool(result) if end else None
                add(Operation("terminate", begin, returned, (x, generation), seen))
            elif end:
                shown = (STATUSES[result].name, None if worker == NOT_ASKED else worker)
                add(Operation("query", begin, end, (x, generation), shown))

    def unfinished(self, cid: int, begin: int, parallel: bool) -> None:
        """A registration whose process died in it: the supervisor knows what became of it."""
        operations = self.raw.operations
        known = {o.arguments[:2] for o in operations if o.what == "register"}
        reclaimed = {o.arguments[:2] for o in operations if o.what == "reclaim"}
        for place, owner in self.raw.owners.items():
            if owner == cid and place not in known:
                what = "claimed" if place in reclaimed else "register"
                operations.append(Operation(what, begin, inf, (*place, parallel)))
                if place in reclaimed:
                    self.bury_with(place)
                return
        if parallel:
            operations.append(Operation("cut short", begin, inf, (None, cid)))

    def bury_with(self, place: tuple[int, int]) -> None:
        """The dead client's token is known by the slot that it had claimed."""
        self.raw.operations = [
            replace(o, arguments=(None, place)) if o.what == "bury" else o
            for o in self.raw.operations
        ]

    def learn_tokens(self) -> None:
        """What was cancelled had a token if those who registered it say so."""
        operations = self.raw.operations
        parallel = {o.arguments[:2]: o.arguments[2] for o in operations if o.what == "register"}
        self.raw.operations = [
            replace(o, arguments=(*o.arguments[:2], parallel.get(o.arguments[:2], False)))
            if o.what == "cancel"
            else o
            for o in operations
        ]

    def close(self) -> None:
        for pid, _, orders in self.clients:
            os.close(orders)
            os.waitpid(pid, 0)
        self.table.close()
        self.shared.close()
