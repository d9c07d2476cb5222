"""Watch: a set of workers as one descriptor, for event loops."""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Iterable
from contextlib import ExitStack
from typing import TYPE_CHECKING

from pgbgw._wire import Message, pack
from pgbgw.errors import AttachError, SupervisorDiedError
from pgbgw.worker import HandleStatus

NOT_LAUNCHED = -1

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from pgbgw.client import Client
    from pgbgw.handle import WorkerHandle


class Watch:
    """Tells which of its workers changed.  For one event loop or thread at a time.

    It has a connection of its own.  A worker that was launched, or has ended, before it was added
    is reported once by the next changes().
    """

    def __init__(self, client: Client, handles: Iterable[WorkerHandle] = ()) -> None:
        self._client = client
        self._handles: dict[tuple[int, int], WorkerHandle] = {}
        self._states: dict[tuple[int, int], int] = {}
        self._lock = threading.Lock()
        self._refused = False  # some are not subscribed: look at all, whenever asked
        self._hung_up = False
        with ExitStack() as undo:  # there may be no descriptor left for us
            self._sock, self._latch = client._channels.connect(time.monotonic() + 10.0)
            undo.callback(self._sock.close)
            self._supervisor = os.dup(client._channels.supervisor)
            undo.callback(os.close, self._supervisor)
            self._epoll = select.epoll()
            undo.callback(self._epoll.close)
            self._epoll.register(self._sock, select.EPOLLIN)
            self._epoll.register(self._supervisor, select.EPOLLIN)
            self.add(*handles)
            undo.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def fileno(self) -> int:
        """A descriptor that is readable when it is time to call changes(); it may tell nothing."""
        return self._epoll.fileno()

    def add(self, *handles: WorkerHandle) -> None:
        """Watch these, too."""
        self._check_open()
        for handle in handles:
            if handle.address != self._client.address:
                raise ValueError(f"{handle!r} is a handle of another supervisor")
            key = (handle.slot, handle.generation)
            with self._lock:
                self._handles[key] = handle
                self._states.setdefault(key, NOT_LAUNCHED)
            self._latch.send(pack(Message.SUBSCRIBE, *key))

    def remove(self, *handles: WorkerHandle) -> None:
        """Watch these no longer; those that are not watched are no error."""
        self._check_open()
        for handle in handles:
            key = (handle.slot, handle.generation)
            with self._lock:
                known = self._handles.pop(key, None)
                self._states.pop(key, None)
            if known is not None:
                self._latch.send(pack(Message.UNSUBSCRIBE, *key))

    def changes(self) -> list[WorkerHandle]:
        """The workers whose status changed since the last call; never waits.

        Reads the descriptor empty.  A worker that is gone is reported a last time and no longer
        watched.  Raises SupervisorDiedError when there is nothing to tell and never will be.
        """
        self._check_open()  # in a forked child what comes is the parent's
        heard, said = self._client._channels.hear(self._latch)
        if self._latch.hung_up and not self._hung_up:
            # The supervisor ends, and its pidfd will follow.  Until then an event loop is not to
            # turn round and round, least of all in the time that the supervisor needs to die.
            self._epoll.unregister(self._sock)
            self._hung_up = self._refused = True
        changed = []
        with self._lock:
            self._refused = self._refused or Message.CAPACITY in said
            for key in list(self._handles if Message.OVERFLOW in said or self._refused else heard):
                handle = self._handles.get(key)
                if handle is None:
                    continue
                state = _observe(handle)
                if state != self._states[key]:
                    self._states[key] = state
                    changed.append(handle)
                if state == 0:
                    del self._handles[key], self._states[key]
        if not changed and self._dead():
            if self._client._view.usable:
                self._client._view.note_death()
            raise SupervisorDiedError(f'the supervisor at "{self._client.address}" is dead')
        return changed

    def _check_open(self) -> None:
        self._client._channels.check_open()
        if self._epoll.closed:
            raise AttachError("this watch is closed", hint="Make another one: client.watch().")

    def _dead(self) -> bool:
        poll = select.poll()
        poll.register(self._supervisor, select.POLLIN)
        return bool(poll.poll(0))

    def close(self) -> None:
        """Give the connection back.  The workers are not affected."""
        if not self._epoll.closed:
            self._epoll.close()
            self._sock.close()
            os.close(self._supervisor)


def _observe(handle: WorkerHandle) -> int:
    """A number that changes when the handle's status or pid does."""
    state = handle._state
    return (
        state if state == 0 or handle.status() is not HandleStatus.NOT_YET_STARTED else NOT_LAUNCHED
    )
