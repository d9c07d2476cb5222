"""A process that is attached to a supervisor: register workers, watch, wait, terminate.

There is one Client per supervisor and process.  Registering, asking and terminating touch shared
memory alone; only waiting, and what cannot be said by a bit, goes over a connection.
"""

from __future__ import annotations

import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING

from pgbgw import _attachment, _runtime, _slots
from pgbgw._attachment import Attachment
from pgbgw._channels import Channels
from pgbgw._log import clean
from pgbgw._runtime import Address
from pgbgw._wire import Message, entry_allowed, pack
from pgbgw.errors import (
    AttachError,
    EntryNotAllowedError,
    InvalidWorkerError,
    NoFreeSlotError,
    ParallelLimitError,
    SupervisorDiedError,
    WaitTimeoutError,
)
from pgbgw.handle import CONDITIONS, WorkerHandle, attached, outcome_of
from pgbgw.latch import deadline_after
from pgbgw.worker import (
    BackgroundWorker,
    Flags,
    Phase,
    ShutdownMode,
    StartTime,
    WorkerInfo,
)

if TYPE_CHECKING:
    import subprocess
    from types import TracebackType
    from typing import Self

    from pgbgw.watch import Watch

REGISTER_PATIENCE = 0.005  # seconds of scanning while the supervisor frees slots all the while
REGISTER_PAUSE = 0.00005

_FIELDS = {f.name for f in fields(BackgroundWorker)} - {"entry", "args"}

_locks: dict[str, threading.RLock] = {}  # by address: who attaches or detaches there


@contextmanager
def _locked(address: Address, deadline: float = math.inf) -> Iterator[None]:
    """Alone with an address; AttachError if another thread attaches there until the deadline."""
    lock = _locks.setdefault(address.path, threading.RLock())
    patience = min(deadline - time.monotonic(), threading.TIMEOUT_MAX)
    if not lock.acquire(timeout=max(0.0, patience)):
        raise AttachError(
            f'could not attach to the supervisor at "{address}" in time',
            detail="another thread is attaching there",
        )
    try:
        yield
    finally:
        lock.release()


def attach(address: str | os.PathLike[str] | None = None, *, timeout: float = 10.0) -> Client:
    """Attach this process to a supervisor of the same user.

    address: a name in the runtime directory, or a path; None: $PGBGW_ADDRESS (set in workers), else
    "default".  Attaching twice gives the same client, which counts.  Raises AttachError at once if
    nobody is there, and after timeout seconds if a supervisor starts, or is full, for that long.
    """
    target = _runtime.resolve(address)
    deadline = time.monotonic() + timeout
    with _locked(target, deadline):
        client = _known(target)
        if client is None:
            client = Client(target, _attachment.connect(target, deadline, first=True))
            attached[target.path] = client
        client._references += 1
        return client


def join(address: str, answer: tuple[bytes, list[int]]) -> Client:
    """The client of a worker, over the connection that its supervisor made for it."""
    target = _runtime.resolve(address)
    data, fds = answer
    sock = socket.socket(fileno=fds[3])
    sock.setblocking(False)
    with _locked(target):
        client = _known(target)
        if client is None:
            client = Client(target, _attachment.welcome(sock, data, fds[:3], target))
            attached[target.path] = client
        else:  # it has attached by itself before
            sock.close()
            for fd in fds[:3]:
                os.close(fd)
        client._references += 1
        return client


def _known(target: Address) -> Client | None:
    """The client that is attached there, unless its supervisor has died meanwhile."""
    client = attached.get(target.path)
    if client is not None and client._view.usable:
        if client._channels.sleep(None, 0.0):
            return client
        client._view.note_death()
    attached.pop(target.path, None)
    return None


class Client:
    """This process's attachment to one supervisor.  Made by attach() or Supervisor.start().

    Thread-safe.  Not for forked children: they attach anew, and this one raises WrongProcessError.
    """

    def __init__(self, address: Address, attachment: Attachment) -> None:
        self._address = address
        self._allow = attachment.allow
        try:
            self._view = _slots.ClientView(
                attachment.outbox,
                attachment.inbox,
                attachment.supervisor,
                attachment.sock.fileno(),
                attachment.cid,
                address.path,
            )
        except BaseException:
            os.close(attachment.supervisor)
            attachment.sock.close()
            raise
        finally:
            attachment.close_segments()
        self._view.owner = self
        self._channels = Channels(address, self._view, attachment)
        self._references = 0
        self._process: subprocess.Popen[bytes] | None = None

    def __repr__(self) -> str:
        return f"<pgbgw.Client of {self._address.path!r}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # --- what it is attached to -------------------------------------------------------------

    @property
    def address(self) -> str:
        """The path of the supervisor's socket; attach() takes it in any process."""
        return self._address.path

    @property
    def epoch(self) -> int:
        """Random, new with every start of a supervisor."""
        return self._view.epoch

    @property
    def supervisor_pid(self) -> int:
        """To show; the supervisor may be dead and the number somebody else's."""
        return self._view.supervisor_pid

    @property
    def max_worker_processes(self) -> int:
        return self._view.nslots

    @property
    def max_parallel_workers(self) -> int:
        return self._view.ntokens

    @property
    def phase(self) -> Phase:
        return Phase(self._view.phase & 0xFF)

    # --- registering ------------------------------------------------------------------------

    def register(
        self,
        worker_or_entry: BackgroundWorker | str | Callable[..., object],
        /,
        *args: object,
        **keywords: object,
    ) -> WorkerHandle:
        """Ask for a worker and return at once (RegisterDynamicBackgroundWorker).

        Either a BackgroundWorker, or an entry point with its arguments and the fields of one by
        keyword.  Raises NoFreeSlotError, ParallelLimitError, InvalidWorkerError,
        EntryNotAllowedError, SupervisorDiedError: then nothing is registered.
        """
        worker = worker_or_entry
        if type(worker) is not BackgroundWorker or args or keywords:
            worker = self._definition(worker_or_entry, args, keywords)
        if self._allow is None:  # the short way: nothing is made but the handle
            try:
                result = self._view.register(worker._record, worker._parallel, WorkerHandle)
            except InvalidWorkerError:
                self._check_alive()
                raise
            if type(result) is WorkerHandle:
                return result
        return self._register(worker)

    def try_register(
        self,
        worker_or_entry: BackgroundWorker | str | Callable[..., object],
        /,
        *args: object,
        **keywords: object,
    ) -> WorkerHandle | None:
        """register(), but None if there is no free slot or the parallel limit is reached."""
        try:
            return self._register(self._definition(worker_or_entry, args, keywords))
        except (NoFreeSlotError, ParallelLimitError):
            return None

    def register_many(self, workers: Iterable[BackgroundWorker]) -> list[WorkerHandle]:
        """Register all; the supervisor is woken once at most.

        All are checked before the first is registered.  NoFreeSlotError and ParallelLimitError
        carry `.handles`: those made so far, which run.
        """
        workers = list(workers)
        self._check_alive()
        for worker in workers:
            if not isinstance(worker, BackgroundWorker):
                raise TypeError(f"register_many() takes BackgroundWorkers, not {worker!r}")
            _ = worker._record if self._allow is None else self._check(worker)
        handles = self._view.register_many(workers, WorkerHandle)
        try:
            while len(handles) < len(workers):  # one found no place
                handles.append(self._register(workers[len(handles)]))
                handles += self._view.register_many(workers[len(handles) :], WorkerHandle)
        except (NoFreeSlotError, ParallelLimitError) as exc:
            exc.handles = list(handles)
            raise
        return handles

    def _definition(
        self,
        given: BackgroundWorker | str | Callable[..., object],
        args: tuple[object, ...],
        keywords: dict[str, object],
    ) -> BackgroundWorker:
        self._check_alive()  # first, as PostgreSQL: nothing is validated where nobody could run it
        if isinstance(given, BackgroundWorker):
            if args or keywords:
                raise TypeError("register() takes arguments and fields only with an entry point")
            return given
        unknown = sorted(keywords.keys() - _FIELDS)
        if unknown:
            raise TypeError(
                f"register() got the unknown field {unknown[0]!r}; keyword arguments of the entry "
                "point go into kwargs={...}"
            )
        return BackgroundWorker(entry=given, args=args, **keywords)  # type: ignore[arg-type]

    def _check_alive(self) -> None:
        if self._view.supervisor_gone():
            raise SupervisorDiedError(
                f'the supervisor at "{self._address}" is dead',
                hint="attach() again once another one runs.",
            )

    def _check(self, worker: BackgroundWorker) -> bytes:
        """The record of a worker that may be registered here."""
        self._check_alive()
        image = worker._record
        if self._allow is not None and not entry_allowed(str(worker.entry), self._allow):
            raise EntryNotAllowedError(
                f'background worker "{worker.name}": entry point "{worker.entry}" is not allowed',
                detail=f"the supervisor allows {', '.join(self._allow) or 'none'}",
                hint='Add it to "allow" of the supervisor.',
            )
        return image

    def _register(self, worker: BackgroundWorker) -> WorkerHandle:
        image = self._check(worker)
        result = self._view.register(image, worker._parallel, WorkerHandle)
        if not isinstance(result, int):
            return result
        if result == _slots.AGAIN:
            deadline = time.monotonic() + REGISTER_PATIENCE
            while time.monotonic() < deadline:
                time.sleep(REGISTER_PAUSE)
                result = self._view.register(image, worker._parallel, WorkerHandle)
                if not isinstance(result, int):
                    return result
                if result != _slots.AGAIN:
                    break
        if result == _slots.DIED:
            self._check_alive()  # raises
        if result == _slots.LIMIT:
            raise ParallelLimitError(
                f'background worker "{worker.name}": no parallel worker can be registered now',
                detail=f"all {self.max_parallel_workers} of max_parallel_workers are in use",
                hint="Wait for one to end, or increase max_parallel_workers.",
            )
        detail = f"all {self.max_worker_processes} of max_worker_processes are in use"
        if result == _slots.NO_MEMORY:
            detail = "no memory"
        raise NoFreeSlotError(
            f'background worker "{worker.name}": no free slot',
            detail=detail,
            hint="Wait for a worker to end, or increase max_worker_processes.",
        )

    # --- looking ----------------------------------------------------------------------------

    def workers(self, *, type: str | None = None) -> list[WorkerInfo]:
        """All workers that the supervisor knows now, by slot; of one type if that is given."""
        found = []
        for slot, generation in self._view.occupied():
            info = self._view_info(slot, generation)
            if info is not None and (type is None or info.type == clean(type)):
                found.append(info)
        return found

    def find(self, *, name: str | None = None, pid: int | None = None) -> WorkerHandle | None:
        """A handle on the worker with that name (in the first slot) or pid; None if none has it."""
        if (name is None) == (pid is None):
            raise TypeError("find() takes either name or pid")
        if pid is not None:
            place = self._place(pid)
            return None if place is None else self._view.handle(*place, WorkerHandle)
        for info in self.workers():
            if info.name == clean(name or ""):
                return self._view.handle(info.slot, info.generation, WorkerHandle)
        return None

    def worker_type(self, pid: int) -> str | None:
        """The type of the running worker with that pid, or None (GetBackgroundWorkerTypeByPid)."""
        place = self._place(pid)
        detail = None if place is None else self._view.detail(*place)
        return None if detail is None else detail[12]

    def _place(self, pid: int) -> tuple[int, int] | None:
        """Slot and generation of the worker that runs as this pid; None for any other number."""
        if self._view.supervisor_gone():  # and all workers with it
            return None
        return self._view.slot_of_pid(pid if 0 < pid < 1 << 32 else 0)

    def handle(self, info: WorkerInfo) -> WorkerHandle:
        """The handle on a worker of workers()."""
        return self._view.handle(info.slot, info.generation, WorkerHandle)

    def _view_info(self, slot: int, generation: int) -> WorkerInfo | None:
        detail = self._view.detail(slot, generation)
        if detail is None:
            return None
        now_generation, _, ready, pid = self._view.status(slot)
        here = now_generation == generation and not self._view.supervisor_gone()
        running = here and pid != 0
        handle = self._view.handle(slot, generation, WorkerHandle)
        return WorkerInfo(
            slot=slot,
            generation=generation,
            pid=pid if running else None,
            name=detail[11],
            type=detail[12],
            status=handle.status(),
            ready=here and ready,
            # The detail counts those before its last stop (kind 0: none yet); it runs again.
            restarts=detail[3] + (running and detail[0] != 0),
            flags=Flags(detail[5]),
            start_time=StartTime(detail[6]),
            restart_time=None if detail[7] < 0 else detail[7] / 1e9,
            registered_at=detail[8] / 1e9,
            started_at=detail[9] / 1e9 if detail[9] else None,
            activity=detail[13],
            outcome=outcome_of(detail),
        )

    # --- waiting ----------------------------------------------------------------------------

    def wait(
        self,
        handles: Iterable[WorkerHandle],
        timeout: float | None = None,
        return_when: str = "ALL_STOPPED",
    ) -> tuple[set[WorkerHandle], set[WorkerHandle]]:
        """Wait for several workers; (done, not done), also when timeout seconds are over.

        return_when: ALL_ or ANY_, then STARTED, STOPPED (a restart gap counts) or GONE (for good).
        A dead supervisor ends the wait: all are done then.
        """
        how, _, what = return_when.partition("_")
        if how not in ("ALL", "ANY") or what not in CONDITIONS:
            raise ValueError(f"invalid return_when: {return_when!r}")
        self._channels.check_open()
        wanted = set(handles)
        for handle in wanted:
            if handle.address != self._address.path:
                raise ValueError(f"{handle!r} is a handle of another supervisor")
        pending = self._channels.wait(
            wanted, CONDITIONS[what], deadline_after(timeout), how == "ANY"
        )
        return wanted - pending, pending

    def watch(self, *handles: WorkerHandle) -> Watch:
        """A Watch on these handles, for an event loop: a descriptor that says when to look."""
        from pgbgw.watch import Watch

        self._channels.check_open()
        return Watch(self, handles)

    # --- the end ----------------------------------------------------------------------------

    def stop(self, mode: str = "fast", timeout: float | None = None) -> None:
        """Ask the supervisor to stop, wait until it is gone, and reap it if it is our child.

        mode: "smart" (serve until the last other client has gone, then fast), "fast" (SIGTERM to
        all workers and their process groups, and SIGKILL after a worker's stop_timeout) or
        "immediate" (SIGQUIT, and SIGKILL to what is left of a group as its worker ends, at the
        latest after 5 seconds).  A stronger request overrides a weaker one.  Raises
        WaitTimeoutError after timeout seconds; the request stands.
        """
        try:
            shutdown = ShutdownMode[mode.upper()]
        except KeyError:
            shutdown = ShutdownMode.NONE
        if shutdown == ShutdownMode.NONE:
            raise ValueError(f"mode must be 'smart', 'fast' or 'immediate', not {mode!r}")
        deadline = deadline_after(timeout)
        self._channels.send(pack(Message.STOP, shutdown), deadline)
        while self._channels.sleep(None, deadline, 3600.0):
            if deadline is not None and time.monotonic() >= deadline:
                raise WaitTimeoutError(
                    f'the supervisor at "{self._address}" did not stop in time',
                    detail=f"{shutdown.name.lower()} shutdown, {timeout} seconds",
                    hint='A stronger mode overrides: client.stop("immediate").',
                )
        if self._view.usable:
            self._view.note_death()
        if self._process is not None:
            self._process.wait()

    def _own(self, process: subprocess.Popen[bytes]) -> None:
        """The supervisor is our child: stop() reaps it."""
        self._process = process

    def close(self) -> None:
        """Drop one reference; with the last one this process detaches.  Its workers go on."""
        if not self._view.usable:
            return
        with _locked(self._address):
            self._references -= 1
            if self._references > 0:
                return
            if attached.get(self._address.path) is self:
                del attached[self._address.path]
            # Still under the lock: who attaches anew must not come before our DETACH.
            self._channels.close()

    def _forget_parent(self) -> None:
        """In a forked child: let go of what is the parent's, without a word to the supervisor."""
        self._channels.forget_parent()
        if self._process is not None:
            self._process.returncode = 0  # not this process's child: nothing to warn about


def _after_fork() -> None:
    _locks.clear()
    for client in attached.values():
        client._forget_parent()
    attached.clear()


os.register_at_fork(after_in_child=_after_fork)
