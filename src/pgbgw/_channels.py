"""A client process's connections, and waiting on them.

The first connection is the client's own: doorbells and requests go out on it, and news of the
workers it registered come in.  Each thread that waits borrows one, the first if it is free, else
one of a pool: so no thread takes another's wake-up.  Final outcomes that come in on any of them are
remembered, since a slot keeps only those of its last two registrations.
"""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pgbgw import _attachment, _wire
from pgbgw._attachment import Attachment
from pgbgw._runtime import Address
from pgbgw._slots import ClientView
from pgbgw._wire import Message, pack
from pgbgw.errors import AttachError, SupervisorDiedError
from pgbgw.latch import LOOK_MS, Latch
from pgbgw.worker import OUTCOME_KINDS, Outcome

if TYPE_CHECKING:
    from pgbgw.handle import WorkerHandle

POOL = 64  # connections for waiting threads, the client's own counted
REMEMBERED = 4096  # final outcomes kept after their slots were reused


class Channels:
    """All connections of one client but those of its Watches."""

    def __init__(self, address: Address, view: ClientView, attachment: Attachment) -> None:
        """The attachment's first connection and pidfd are ours from here on."""
        sock, supervisor = attachment.sock, attachment.supervisor
        self._address = address
        self._view = view
        self._identity = (attachment.cid, attachment.identity)
        self._sock = sock
        self.supervisor = supervisor
        self.first = Latch(sock, supervisor)
        self._first_lock = threading.Lock()  # who holds it may read the first connection
        self._reading = threading.Lock()  # what was read is also noted when others look
        self._lock = threading.Lock()  # of what follows
        self._pool: list[tuple[socket.socket, Latch]] = []
        self._connections = 1  # lent, in the pool, or being made; the first one counts
        self.lent: set[socket.socket] = set()
        self.waiting = 0  # threads
        self._closed = False
        self._finals: dict[tuple[int, int], Outcome] = {}

    # --- waiting ----------------------------------------------------------------------------

    def wait(
        self,
        handles: set[WorkerHandle],
        satisfied: Callable[[WorkerHandle], object],
        deadline: float | None,
        any_is_enough: bool = False,
    ) -> set[WorkerHandle]:
        """Wait until all (or one) are satisfied or the supervisor is dead; those that are not."""

        def over() -> bool:
            return not pending or (any_is_enough and len(pending) < len(handles))

        pending = {h for h in handles if not satisfied(h)}
        if over():
            return pending
        with self._borrowed(deadline) as latch:
            listening = latch is not None and self._subscribe(latch, pending, deadline)
            unsure = True
            while True:
                # Drain, then look: what comes after the look ends the sleep below.
                heard, said = self.hear(latch)
                # Refused, or a connection that was closed: nothing more will come.
                if Message.CAPACITY in said or (latch is not None and latch.hung_up):
                    listening = False
                if unsure or Message.OVERFLOW in said:
                    check = pending
                else:
                    check = {h for h in pending if (h.slot, h.generation) in heard}
                pending = pending - {h for h in check if satisfied(h)}
                if over() or (deadline is not None and time.monotonic() >= deadline):
                    break
                # Where no message will come, look again soon: not subscribed, or the slot is said
                # to be free in the outbox alone (for a moment, or until damage is repaired).
                unsure = not listening or any(h._state == 0 for h in check & pending)
                if not self.sleep(latch, deadline, LOOK_MS / 1000 if unsure else None):
                    self._view.note_death()
                    pending = {h for h in pending if not satisfied(h)}
                    break
            if latch is not None and latch is not self.first:
                now = time.monotonic()
                farewell = (pack(Message.UNSUBSCRIBE, h.slot, h.generation) for h in handles)
                tidy = all(latch.send(message, now) for message in farewell)
                self.hear(latch)
                if not tidy:  # a supervisor that does not read: hang up instead of waiting for it
                    latch.hung_up = True
        return pending

    def _subscribe(self, latch: Latch, handles: set[WorkerHandle], deadline: float | None) -> bool:
        return all(
            latch.send(pack(Message.SUBSCRIBE, h.slot, h.generation), deadline) for h in handles
        )

    def sleep(self, latch: Latch | None, deadline: float | None, most: float | None = None) -> bool:
        """Wait for a message, the deadline, or most seconds; False if the supervisor is dead."""
        if most is not None:
            soon = time.monotonic() + most
            deadline = soon if deadline is None else min(deadline, soon)
        if latch is not None:
            return latch.wait(deadline)
        left = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
        poll = select.poll()
        poll.register(self.supervisor, select.POLLIN)
        return not poll.poll(left)

    @contextmanager
    def _borrowed(self, deadline: float | None) -> Iterator[Latch | None]:
        """A connection for one waiting thread: the client's own, one of the pool, or None."""
        with self._lock:
            self.check_open()
            self.waiting += 1
        own = self._first_lock.acquire(blocking=False)
        lent: tuple[socket.socket, Latch] | None = None
        try:
            if own:
                yield self.first
            else:
                lent = self._take_from_pool(deadline)
                yield None if lent is None else lent[1]
        finally:
            if own:
                self._first_lock.release()
            with self._lock:
                self.waiting -= 1
                if lent is not None:
                    self.lent.discard(lent[0])
                    if self._closed or lent[1].hung_up:
                        lent[0].close()
                        self._connections -= 1
                    else:
                        self._pool.append(lent)
                if self._closed and self.waiting == 0:
                    self._close_descriptors()

    def _take_from_pool(self, deadline: float | None) -> tuple[socket.socket, Latch] | None:
        with self._lock:
            if self._pool:
                lent = self._pool.pop()
                self.lent.add(lent[0])
                return lent
            if self._connections >= POOL:
                return None
            self._connections += 1
        soon = time.monotonic() + 1.0
        try:
            lent = self.connect(soon if deadline is None else min(deadline, soon))
        except BaseException as exc:
            with self._lock:
                self._connections -= 1
            if isinstance(exc, (AttachError, SupervisorDiedError, OSError)):
                return None  # the supervisor is dead, or full: look now and then
            raise
        with self._lock:
            self.lent.add(lent[0])
        return lent

    def connect(self, deadline: float) -> tuple[socket.socket, Latch]:
        """A further connection of this process; its client id is the same."""
        extra = _attachment.connect(self._address, deadline, first=False)
        ours = (extra.cid, extra.identity) == self._identity
        extra.close_segments()
        os.close(extra.supervisor)
        if not ours:  # another supervisor has taken the address
            extra.sock.close()
            raise SupervisorDiedError(f'the supervisor at "{self._address}" is dead')
        return extra.sock, Latch(extra.sock, self.supervisor)

    def hear(self, latch: Latch | None) -> tuple[set[tuple[int, int]], set[int]]:
        """Read and note what has come on a connection that this thread holds."""
        with self._reading:
            return self._note([] if latch is None else latch.drain())

    def _note(
        self, messages: list[tuple[int, int, int, bytes]]
    ) -> tuple[set[tuple[int, int]], set[int]]:
        """Which registrations messages are about, and their types; final outcomes are kept."""
        heard = set()
        said = set()
        for type, slot, generation, body in messages:
            heard.add((slot, generation))
            said.add(type)
            if type == Message.FINAL and len(body) >= _wire.FINAL.size:
                self._remember(slot, generation, body)
        return heard, said

    def _remember(self, slot: int, generation: int, body: bytes) -> None:
        kind, exitcode, signum, restarts, at = _wire.FINAL.unpack_from(body)
        if kind >= len(OUTCOME_KINDS):
            return
        name = OUTCOME_KINDS[kind]
        outcome = Outcome(
            kind=name,
            exitcode=exitcode if name == "exited" else None,
            signal=signum if name == "signaled" else None,
            error=None,
            at=at / 1e9,
            restarts=restarts,
            final=True,
        )
        self.keep(slot, generation, outcome)

    def keep(self, slot: int, generation: int, outcome: Outcome) -> None:
        """Remember a final outcome; the first that is heard may know more than a later one."""
        with self._lock:
            self._finals.setdefault((slot, generation), outcome)
            while len(self._finals) > REMEMBERED:
                del self._finals[next(iter(self._finals))]

    def listen(self, patience: float = 0.0) -> None:
        """Note what has come on the first connection.  If a thread waits there it does so itself:
        whatever comes wakes it.  patience: seconds it is given for that."""
        deadline = time.monotonic() + patience
        while not self._first_lock.acquire(blocking=False):
            with self._reading:
                unread = self.first.has_message()
            if not unread or time.monotonic() >= deadline:
                return
            time.sleep(0.0002)
        try:
            self.hear(self.first)
        finally:
            self._first_lock.release()

    def outcome(self, slot: int, generation: int) -> Outcome | None:
        """The final outcome of a registration, if it came in and is remembered."""
        return self._finals.get((slot, generation))

    # --- the end ----------------------------------------------------------------------------

    def send(self, message: bytes, deadline: float | None = None) -> bool:
        """Send a request, waiting for room; a dead supervisor is no error here.  Was it sent?"""
        self.check_open()
        return self.first.send(message, deadline)

    def check_open(self) -> None:
        """AttachError if the client is closed, WrongProcessError in a forked child."""
        _ = self._view.epoch

    def close(self) -> None:
        """Detach: from here on every operation raises, none is in flight, the mapping is gone.

        Threads that wait wake up to that; the last of them closes the descriptors.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._view.close()
            self.first.send(pack(Message.DETACH), time.monotonic())
            for sock, _ in self._pool:
                sock.close()
            self._pool.clear()
            if self.waiting == 0:
                self._close_descriptors()
                return
            for sock in (self._sock, *self.lent):
                try:
                    sock.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass

    def _close_descriptors(self) -> None:
        self._sock.close()
        os.close(self.supervisor)
        self.supervisor = -1

    def forget_parent(self) -> None:
        """In a forked child: let go of what is the parent's, without a word to the supervisor."""
        for sock in (self._sock, *self.lent, *(sock for sock, _ in self._pool)):
            sock.close()
        if self.supervisor >= 0:
            os.close(self.supervisor)
