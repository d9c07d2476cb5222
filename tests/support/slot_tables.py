"""A slot table with both of its sides in one process, and a hand that can write where nobody may.

No process is started: the supervisor's side is driven by the test, so every state between two of
its steps can be held and looked at.
"""

from __future__ import annotations

import mmap
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import NamedTuple

from pgbgw import _kernel, _slots
from pgbgw._slots import NO_SLOT, ClientView, SlotHandle, SupervisorView
from pgbgw.worker import RECORD_HEADER, BackgroundWorker, HandleStatus

# States of an inbox word, its TERM bit, and states of an outbox word: as in _slots.h.
INVALID, FREE, CLAIMED, READY = range(4)
TERM = 4
NONE, ACCEPTED, RUNNING, STOPPED = range(4)

# Where the words of the outbox's header are.
AT_FREE_SEQ, AT_NFREE, AT_SLEEP, AT_PHASE = 128, 136, 192, 256

KICK = 1  # the type of a doorbell message
NOW = 1_700_000_000_000_000_000  # any time will do

_ACTIONS = {
    getattr(_slots, name): name.removeprefix("EVENT_").lower()
    for name in dir(_slots)
    if name.startswith("EVENT_")
}
_epochs = count(1)


class Word(NamedTuple):
    """The parts of an inbox or token word."""

    generation: int
    cid: int
    token: int  # index + 1, 0 = none
    term: bool
    state: int

    @property
    def value(self) -> int:
        return word(self.generation, self.cid, self.token, self.state, self.term)


def word(generation: int, cid: int, token: int, state: int, term: bool = False) -> int:
    return generation << 26 | cid << 14 | token << 3 | (TERM if term else 0) | state


def parts(value: int) -> Word:
    return Word(value >> 26, value >> 14 & 0xFFF, value >> 3 & 0x7FF, bool(value & TERM), value & 3)


class Event(NamedTuple):
    """What the supervisor found at a slot."""

    action: str  # "accepted", "terminated", ...
    slot: int
    generation: int
    cid: int
    reason: str | None


class Handle(SlotHandle):
    """A handle that knows no table but the one that made it."""

    __slots__ = ()


class SlotClient:
    """An attached client: its view, and the end of its connection where doorbells arrive."""

    def __init__(self, table: Table, cid: int) -> None:
        self.doors, self.sock = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._pidfd = os.pidfd_open(table.supervisor_pid)
        self.cid = cid
        self.view = ClientView(
            table.outbox, table.inbox, self._pidfd, self.sock.fileno(), cid, "nowhere"
        )

    def register(self, image: bytes | None = None, *, parallel: bool = False) -> Handle | int:
        """A handle, or NO_SLOT, LIMIT, NO_MEMORY, AGAIN."""
        return self.view.register(image or record(parallel=parallel), parallel, Handle)

    def must_register(self, image: bytes | None = None, *, parallel: bool = False) -> Handle:
        handle = self.register(image, parallel=parallel)
        assert isinstance(handle, Handle), f"refused: {handle}"
        return handle

    def handle(self, slot: int, generation: int) -> Handle:
        return self.view.handle(slot, generation, Handle)

    def rings(self) -> int:
        """How many doorbells have come since the last call."""
        n = 0
        while True:
            try:
                data = self.doors.recv(64, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return n
            assert int.from_bytes(data[:4], "little") == KICK
            n += 1

    def close(self) -> None:
        self.view.close()
        for end in (self.doors, self.sock):
            end.close()
        os.close(self._pidfd)


class Table:
    """Both segments, the supervisor's view of them, and writable mappings for the test itself."""

    def __init__(self, nslots: int, ntokens: int = 0, *, supervisor_pid: int | None = None) -> None:
        self.nslots, self.ntokens = nslots, ntokens
        self.supervisor_pid = supervisor_pid or os.getpid()
        self.epoch = next(_epochs)
        self.at = _slots.segment_layout(nslots, ntokens)
        self.sizes = _slots.segment_sizes(nslots, ntokens)
        self.outbox = _kernel.memfd(b"test-outbox", self.sizes[0])
        self.inbox = _kernel.memfd(b"test-inbox", self.sizes[1])
        self.view = SupervisorView(self.outbox, self.inbox, nslots, ntokens, self.epoch)
        self.outbox_map = mmap.mmap(self.outbox, self.sizes[0])
        self.inbox_map = mmap.mmap(self.inbox, self.sizes[1])
        self._clients: list[SlotClient] = []

    def client(self) -> SlotClient:
        cid = self.view.new_client()
        assert cid
        client = SlotClient(self, cid)
        self._clients.append(client)
        return client

    # --- the supervisor's steps -------------------------------------------------------------

    def drain(self) -> list[Event]:
        """One bounded look at what clients changed."""
        return self._events(self.view.drain(NOW))

    def settle(self) -> list[Event]:
        """Look at all that clients changed."""
        events = self.drain()
        while self.view.pending:
            events += self.drain()
        return events

    def sweep(self) -> list[Event]:
        """A round of the sweep."""
        events = []
        for _ in range(-(-self.nslots // 16384)):
            events += self._events(self.view.sweep(NOW))
        return events

    def _events(self, events: list[tuple[int, int, int, int, str | None]]) -> list[Event]:
        return [Event(_ACTIONS[action], *rest) for action, *rest in events]

    def gone(self, client: SlotClient) -> list[Event]:
        """The client's process is dead; sweep until its cid is free."""
        self.view.client_gone(client.cid)
        events = []
        while self.view.sweep_due:
            events += self.sweep()
        return events

    # --- words ------------------------------------------------------------------------------

    def req(self, slot: int) -> Word:
        return parts(self.get(self.inbox_map, self.at["controls"] + 64 * slot))

    def set_req(self, slot: int, value: int) -> None:
        self.put(self.inbox_map, self.at["controls"] + 64 * slot, value)

    def token(self, index: int) -> Word:
        return parts(self.get(self.inbox_map, self.at["tokens"] + 64 * index))

    def set_token(self, index: int, value: int) -> None:
        self.put(self.inbox_map, self.at["tokens"] + 64 * index, value)

    def _bits(self, at: int) -> set[int]:
        bitmap = self.inbox_map[at : at + (self.nslots + 63) // 64 * 8]
        bits = int.from_bytes(bitmap, "little")
        return {i for i in range(8 * len(bitmap)) if bits >> i & 1}

    def _set_bits(self, at: int, slots: set[int]) -> None:
        size = (self.nslots + 63) // 64 * 8
        self.inbox_map[at : at + size] = sum(1 << s for s in slots).to_bytes(size, "little")

    @property
    def dirty(self) -> set[int]:
        return self._bits(self.at["dirty"])

    @dirty.setter
    def dirty(self, slots: set[int]) -> None:
        self._set_bits(self.at["dirty"], slots)

    @property
    def hints(self) -> set[int]:
        return self._bits(self.at["hints"])

    @hints.setter
    def hints(self, slots: set[int]) -> None:
        self._set_bits(self.at["hints"], slots)

    def write_record(self, slot: int, data: bytes, offset: int = 0) -> None:
        """Write over a slot's record: what a rogue client, or a wild pointer, would do."""
        at = self.at["records"] + 2048 * slot + offset
        self.inbox_map[at : at + len(data)] = data

    @property
    def free_seq(self) -> int:
        return self.get(self.outbox_map, AT_FREE_SEQ)

    @free_seq.setter
    def free_seq(self, value: int) -> None:
        self.put(self.outbox_map, AT_FREE_SEQ, value)

    @property
    def sleep_word(self) -> int:
        return self.get(self.outbox_map, AT_SLEEP)

    @staticmethod
    def get(where: mmap.mmap, at: int) -> int:
        return int.from_bytes(where[at : at + 8], "little")

    @staticmethod
    def put(where: mmap.mmap, at: int, value: int) -> None:
        where[at : at + 8] = value.to_bytes(8, "little")

    # --- the end ----------------------------------------------------------------------------

    def close(self) -> None:
        for client in self._clients:
            client.close()
        del self.view
        self.outbox_map.close()
        self.inbox_map.close()
        os.close(self.outbox)
        os.close(self.inbox)


@contextmanager
def table(nslots: int, ntokens: int = 0, **settings: int | None) -> Iterator[Table]:
    t = Table(nslots, ntokens, **settings)  # type: ignore[arg-type]
    try:
        yield t
    finally:
        t.close()


def record(*, parallel: bool = False, **fields: object) -> bytes:
    """The image of a plain worker's record."""
    if parallel:
        fields["flags"] = 0x10
    return image(**fields)


def image(**fields: object) -> bytes:
    """A record image with any fields at all: what a client without check() might write."""
    texts = {
        "name": b"worker",
        "type": b"type",
        "entry": b"module:function",
        "extra": b"",
        "payload": b"",
    }
    texts.update({k: fields.pop(k) for k in list(fields) if k in texts})  # type: ignore[misc]
    header = {
        "version": 1,
        "flags": 0,
        "start_time": 2,
        "notify": 1,
        "name_len": len(texts["name"]),
        "type_len": len(texts["type"]),
        "entry_len": len(texts["entry"]),
        "extra_len": len(texts["extra"]),
        "payload_len": len(texts["payload"]),
        "restart_ns": -1,
        "stop_timeout_ns": -1,
        "main_arg": 0,
        "registered_ns": 0,
    }
    assert fields.keys() <= header.keys()
    header.update(fields)  # type: ignore[arg-type]
    sizes = {"name": 96, "type": 96, "entry": 512, "extra": 128}
    body = b"".join(texts[k].ljust(n, b"\0") for k, n in sizes.items())
    payload = texts["payload"]
    return RECORD_HEADER.pack(*header.values()) + body + payload + bytes(-len(payload) % 8)


def image_of(**fields: object) -> bytes:
    """The record image of a BackgroundWorker, which has been checked."""
    worker = BackgroundWorker(**{"entry": "module:function", **fields})  # type: ignore[arg-type]
    worker.check()
    return worker._record


def accepted(t: Table, handle: Handle) -> Handle:
    """Let the supervisor take a registration over."""
    assert [e.action for e in t.settle()] == ["accepted"]
    return handle


def running(t: Table, handle: Handle, pid: int = 4711) -> Handle:
    accepted(t, handle)
    t.view.set_running(handle.slot, pid, NOW)
    return handle


def all_free(t: Table) -> bool:
    """Do all three agree that nothing is in use: the inbox, the outbox, the private view?"""
    words = all(t.req(x) == Word(t.view.generation(x), 0, 0, False, FREE) for x in range(t.nslots))
    tokens = all(t.token(i)[1:] == (0, 0, False, FREE) for i in range(t.ntokens))
    return words and tokens and t.view.free_slots == t.nslots


def assert_usable(t: Table) -> None:
    """Every slot and every token can be registered, run and given back."""
    client = t.client()
    handles = [client.must_register(parallel=i < min(t.ntokens, t.nslots)) for i in range(t.nslots)]
    assert sorted(h.slot for h in handles) == list(range(t.nslots))
    assert client.register() == NO_SLOT
    assert [e.action for e in t.settle()] == ["accepted"] * t.nslots
    for handle in handles:
        t.view.set_running(handle.slot, 4711, NOW)
        assert handle.status() is HandleStatus.STARTED
        t.view.free(handle.slot)
        assert handle.status() is HandleStatus.STOPPED
    assert all_free(t)
