"""A client that keeps to nothing: its own hand on a live supervisor's inbox, and on the wire."""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import select
import socket
import time
from contextlib import ExitStack, suppress
from types import TracebackType

from pgbgw import Client, _attachment, _runtime, _slots
from pgbgw._wire import HEAD, HELLO, PROTOCOL, Message, pack, receive, unpack
from support.slot_tables import AT_NFREE, AT_SLEEP, CLAIMED, FREE, READY, Word, parts, word

GUARD = 30.0  # seconds

# What one may send again and again.
GARBAGE = {
    "doorbells": [pack(Message.KICK), pack(Message.KICK, 3, 1)],
    "garbage": [bytes(40), b"\xff" * 1024, b"short", pack(Message.NOTIFY), HEAD.pack(99, 0, 0)],
    "subscriptions": [pack(Message.SUBSCRIBE, slot, 1) for slot in range(64)],
}


class Rogue:
    """Attached as any client is (in a process that already is one: by a further connection), with
    the inbox mapped for its own purposes."""

    def __init__(self, address: str, nslots: int, ntokens: int) -> None:
        self.nslots, self.ntokens = nslots, ntokens
        self.at = _slots.segment_layout(nslots, ntokens)
        attachment = _attachment.connect(
            _runtime.resolve(address), time.monotonic() + GUARD, first=False
        )
        self.cid, self.sock = attachment.cid, attachment.sock
        self.outbox, self._inbox = attachment.outbox, attachment.inbox
        self._pidfd = attachment.supervisor
        self.inbox = mmap.mmap(self._inbox, 0)
        self._outbox_map = mmap.mmap(self.outbox, 0, prot=mmap.PROT_READ)

    @classmethod
    def of(cls, client: Client) -> Rogue:
        return cls(client.address, client.max_worker_processes, client.max_parallel_workers)

    def _put(self, at: int, value: int) -> None:
        self.inbox[at : at + 8] = value.to_bytes(8, "little")

    def _get(self, at: int) -> int:
        return int.from_bytes(self.inbox[at : at + 8], "little")

    def req(self, slot: int) -> Word:
        return parts(self._get(self.at["controls"] + 64 * slot))

    def set_req(self, slot: int, value: int) -> None:
        self._put(self.at["controls"] + 64 * slot, value)

    def token(self, index: int) -> Word:
        return parts(self._get(self.at["tokens"] + 64 * index))

    def set_token(self, index: int, value: int) -> None:
        self._put(self.at["tokens"] + 64 * index, value)

    def states(self) -> list[int]:
        """Of all slots, then of all tokens."""
        slots = [self.req(x).state for x in range(self.nslots)]
        return slots + [self.token(i).state for i in range(self.ntokens)]

    @property
    def sleep_word(self) -> int:
        """The supervisor's, odd while it sleeps."""
        return int.from_bytes(self._outbox_map[AT_SLEEP : AT_SLEEP + 8], "little")

    @property
    def free_slots(self) -> int:
        """What the supervisor says that it has."""
        return int.from_bytes(self._outbox_map[AT_NFREE : AT_NFREE + 4], "little")

    def claim(self, cid: int) -> tuple[int, int]:
        """Leave a free slot and a free token as a client does that is stopped in the middle of a
        parallel registration; (slot, token index)."""
        slot = next(x for x in range(self.nslots) if self.req(x).state == FREE)
        index = next(i for i in range(self.ntokens) if self.token(i).state == FREE)
        self.set_token(index, word(self.token(index).generation, cid, 0, CLAIMED))
        self.set_req(slot, word(self.req(slot).generation, cid, index + 1, CLAIMED))
        return slot, index

    def damage(self, rng: random.Random, cids: list[int]) -> None:
        """Write something wrong somewhere.  cids: whose names may be taken in vain."""
        slot, index = rng.randrange(self.nslots), rng.randrange(self.ntokens)
        forged = word(
            self.req(slot).generation + rng.choice([-1, 0, 0, 0, 1]),
            rng.choice(cids),
            rng.randrange(self.ntokens + 2),
            rng.choice([0, FREE, CLAIMED, READY]),
            rng.random() < 0.3,
        ) % (1 << 64)
        bitmap = (self.nslots + 63) // 64 * 8
        what = rng.randrange(8)
        if what == 0:
            self.set_req(slot, rng.getrandbits(64))
        elif what == 1:
            self.set_req(slot, 0)
        elif what <= 3:
            self.set_req(slot, forged)
        elif what == 4:
            self.set_token(index, rng.choice([0, rng.getrandbits(64), forged]))
        elif what == 5:
            at = self.at[rng.choice(["dirty", "hints"])]
            self.inbox[at : at + bitmap] = rng.randbytes(bitmap)
        elif what == 6:
            at = self.at["records"] + 2048 * slot + 8 * rng.randrange(250)
            self.inbox[at : at + 8] = rng.randbytes(8)
        else:
            at = rng.randrange(0, 4096 - 64)
            self.inbox[at : at + 64] = rng.randbytes(64)

    def close(self) -> None:
        self.inbox.close()
        self._outbox_map.close()
        self.sock.close()
        for fd in (self.outbox, self._inbox, self._pidfd):
            os.close(fd)

    def __enter__(self) -> Rogue:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


_libc = ctypes.CDLL(None, use_errno=True)
_PUNCH_HOLE = 0x03  # and keep the size


def punch(fd: int, start: int, length: int) -> None:
    """Give a file's memory back: it reads as zeros then."""
    if _libc.fallocate(fd, _PUNCH_HOLE, ctypes.c_int64(start), ctypes.c_int64(length)) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def raw_connection(client: Client) -> socket.socket:
    """A connection on which nothing has been said."""
    address = _runtime.resolve(client.address)
    dirfd = _runtime.open_directory(address, create=False)
    try:
        return _runtime.connect(address, dirfd)
    finally:
        os.close(dirfd)


def hear(sock: socket.socket) -> tuple[int, int, int, bytes] | None:
    """The next message, without descriptors that come along; None if the supervisor hangs up."""
    assert select.select([sock], [], [], GUARD)[0], "the supervisor neither answers nor hangs up"
    try:
        data, fds = receive(sock)
    except ConnectionResetError:
        return None
    for fd in fds:
        os.close(fd)
    return unpack(data)


def welcomed(client: Client) -> socket.socket | None:
    """A further connection of this process, admitted; None if the supervisor hangs up."""
    with ExitStack() as stack:
        sock = stack.enter_context(raw_connection(client))
        challenge = hear(sock)
        if challenge is None or challenge[0] != Message.CHALLENGE:
            return None
        with suppress(BrokenPipeError):
            body = HELLO.pack(PROTOCOL, 0)
            sock.send(pack(Message.HELLO, os.getpid(), challenge[2], body), socket.MSG_NOSIGNAL)
        answer = hear(sock)
        if answer is None or answer[0] != Message.WELCOME:
            return None
        stack.pop_all()
        return sock
