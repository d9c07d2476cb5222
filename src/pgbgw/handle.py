"""Handles: one registration each, for whoever holds them.

What a handle asks costs a load or a compare-and-swap in shared memory (SlotHandle); what it waits
for goes over the connections of the client that is attached in this process.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from pgbgw import _slots, _wire
from pgbgw._wire import Message, pack
from pgbgw.errors import AttachError, PgbgwError, SupervisorDiedError, WaitTimeoutError
from pgbgw.latch import deadline_after
from pgbgw.worker import OUTCOME_KINDS, HandleStatus, Outcome, WorkerInfo

if TYPE_CHECKING:
    from typing import Self

    from pgbgw.client import Client

# Who is attached, by address: where a handle that came from elsewhere finds its table.
attached: dict[str, Client] = {}

_LOST = Outcome(kind="lost", exitcode=None, signal=None, error=None, at=0.0, restarts=0, final=True)


class WorkerHandle(_slots.SlotHandle):
    """One registration, for ever: (epoch, slot, generation).  Immutable, hashable, picklable.

    In another process it finds the client that is attached to its address at first use: AttachError
    if there is none, STOPPED if the supervisor there is another one.
    """

    __slots__ = ()

    def __repr__(self) -> str:
        return f"<pgbgw.WorkerHandle {self.slot}/{self.generation} at {self.address!r}>"

    def __reduce__(self) -> tuple[type[Self], tuple[int, int, int, str]]:
        return type(self), (self.epoch, self.slot, self.generation, self.address)

    def _find_client(self) -> Client:
        # Not the client at its address: a dead supervisor may have had a successor there.
        client: Client = self._view.owner
        return client

    def _find_view(self) -> _slots.ClientView:
        client = attached.get(self.address)
        if client is None or not client._view.usable:
            raise AttachError(
                f'this process is not attached to the supervisor at "{self.address}"',
                hint=f"attach({self.address!r}) before using the handle.",
            )
        return client._view

    @property
    def outcome(self) -> Outcome | None:
        """How the worker ended the last time; None if it has not ended yet.

        `final` tells whether it will never run again.  What ended so long ago that its slot was
        used twice since, unheard by this client, is "lost".
        """
        client = self._find_client()
        if self._view.epoch == self.epoch:
            client._channels.listen()
            detail = client._view.detail(self.slot, self.generation)
            if detail is not None:
                return outcome_of(detail)
            if self._state != 0:
                return None
            detail = client._view.detail(self.slot, self.generation)  # it may have ended just now
            if detail is not None:
                return outcome_of(detail)
            outcome = client._channels.outcome(self.slot, self.generation)
            if outcome is None:  # the slot was used on: its end has been told since
                client._channels.listen(patience=1.0)
                outcome = client._channels.outcome(self.slot, self.generation)
            if outcome is not None:
                return outcome
        return _LOST

    def info(self) -> WorkerInfo:
        """What `pgbgw ps` shows of it.  PgbgwError once its slot was used by others."""
        client = self._find_client()
        info = None
        if self._view.epoch == self.epoch:
            info = client._view_info(self.slot, self.generation)
        if info is None:
            raise PgbgwError(
                f"nothing is known any more of the worker {self.slot}/{self.generation}"
            )
        return info

    def wait_for_startup(self, timeout: float | None = None) -> HandleStatus:
        """Wait until it was launched (WaitForBackgroundWorkerStartup).

        STARTED; or STOPPED if it has run and ended already, or never will run; or SUPERVISOR_DIED.
        Raises WaitTimeoutError after timeout seconds; the worker is not affected.
        """
        return self._wait(_is_started, timeout, "start")

    def wait_for_ready(self, timeout: float | None = None) -> HandleStatus:
        """Wait until it called current_worker().ready(): STARTED; STOPPED if it ended first."""
        return self._wait(_is_ready, timeout, "get ready")

    def wait_for_shutdown(self, timeout: float | None = None) -> HandleStatus:
        """Wait until it does not run, or SUPERVISOR_DIED (WaitForBackgroundWorkerShutdown).

        Like PostgreSQL's this may end in the gap before a restart; wait_until_gone() does not.
        """
        return self._wait(_is_stopped, timeout, "stop")

    def wait_until_gone(self, timeout: float | None = None) -> Outcome:
        """Wait until it will never run again, and tell how it ended.

        Raises SupervisorDiedError, and WaitTimeoutError after timeout seconds.
        """
        if self._wait(_is_gone, timeout, "end") is HandleStatus.SUPERVISOR_DIED:
            raise SupervisorDiedError(
                f'the supervisor at "{self.address}" is dead',
                detail="its workers died with it",
            )
        # None after damage to the slot's word alone: the generation it showed was yet to come.
        return self.outcome or _LOST

    def _wait(
        self,
        condition: Callable[[WorkerHandle], HandleStatus | None],
        timeout: float | None,
        what: str,
    ) -> HandleStatus:
        client = self._find_client()
        seen: HandleStatus | None = None

        def satisfied(handle: WorkerHandle) -> bool:
            nonlocal seen  # what ended the wait; the worker may run again by now
            seen = condition(handle)
            return seen is not None

        if client._channels.wait({self}, satisfied, deadline_after(timeout)) or seen is None:
            raise WaitTimeoutError(
                f"the worker in slot {self.slot}/{self.generation} did not {what} in time",
                detail=f"waited {timeout} seconds; the worker is not affected",
            )
        return seen

    def terminate(self, *, grace: float | None = None) -> None:
        """Ask that it stops and is never started again (TerminateBackgroundWorker).

        Returns at once (with a grace, once there is room on the connection, which a supervisor that
        is stopped does not make).  A running worker gets SIGTERM, once, and nobody else does.  No
        effect if it is gone already.

        grace: seconds until SIGKILL to the worker and its process group, the programs that it has
        started among them; what is left of the group when the worker ends sooner is killed then.
        None: its own stop_timeout, if any; otherwise what it has started is left alone, but for
        its forks (docs/security.md tells who dies with whom).
        """
        if grace is None:
            self._set_terminate()
            return
        if not (math.isfinite(grace) and grace >= 0):
            raise ValueError(f"grace must be a number of seconds, not {grace!r}")
        body = _wire.GRACE.pack(int(min(grace * 1e9, 1e18)))  # at most some thirty years
        message = pack(Message.TERMINATE, self.slot, self.generation, body)
        channels = self._find_client()._channels
        # First, since a worker that obeys the bit may be gone before a later message is read, and
        # what it leaves with it.  Where there is no room for it the bit must not wait.
        sent = self._view.epoch == self.epoch and channels.send(message, time.monotonic())
        if self._set_terminate() and not sent:
            channels.send(message)

    def cancel(self) -> None:
        """SIGINT: cancel the statement that its database connection runs.  Others ignore it."""
        self._request(Message.CANCEL)

    def wake(self) -> None:
        """End its current_worker().wait(), or the next one if it is not waiting (SetLatch)."""
        self._request(Message.WAKE)

    def _request(self, type: Message, body: bytes = b"") -> None:
        self._find_client()._channels.send(pack(type, self.slot, self.generation, body))


def outcome_of(detail: _slots._Detail) -> Outcome | None:
    """The Outcome in a slot's detail; None if nothing has ended yet."""
    kind, exitcode, signum, restarts, final = detail[:5]
    if not 0 < kind < len(OUTCOME_KINDS):
        return None
    name = OUTCOME_KINDS[kind]
    return Outcome(
        kind=name,
        exitcode=exitcode if name == "exited" else None,
        signal=signum if name == "signaled" else None,
        error=detail[14] or None,
        at=detail[10] / 1e9,
        restarts=restarts,
        final=bool(final),
    )


# --- conditions -------------------------------------------------------------------------------
# Each gives the status that ends a wait, or None.  A registration that is gone counts only once its
# slot can be registered anew.


def _is_gone(handle: WorkerHandle) -> HandleStatus | None:
    if handle._state != 0:
        died = handle.status() is HandleStatus.SUPERVISOR_DIED
        return HandleStatus.SUPERVISOR_DIED if died else None
    client = handle._find_client()
    if client._channels.outcome(handle.slot, handle.generation) is None:
        if not handle._freed and not client._view.supervisor_gone():
            return None  # a supervisor that died just here will not give the slot back
        if handle.epoch == client.epoch:
            # Keep what its detail says: others may use the slot before we look again.
            detail = client._view.detail(handle.slot, handle.generation)
            outcome = None if detail is None else outcome_of(detail)
            if outcome is not None:
                client._channels.keep(handle.slot, handle.generation, outcome)
    return HandleStatus.STOPPED


def _is_stopped(handle: WorkerHandle) -> HandleStatus | None:
    status = handle.status()
    if status is HandleStatus.STOPPED and handle._state == 0:
        return _is_gone(handle)
    return status if status in (HandleStatus.STOPPED, HandleStatus.SUPERVISOR_DIED) else None


def _is_started(handle: WorkerHandle) -> HandleStatus | None:
    if handle.status() is HandleStatus.STARTED:
        return HandleStatus.STARTED
    return _is_stopped(handle)


def _is_ready(handle: WorkerHandle) -> HandleStatus | None:
    return HandleStatus.STARTED if handle.ready else _is_stopped(handle)


CONDITIONS = {"STARTED": _is_started, "STOPPED": _is_stopped, "GONE": _is_gone}
