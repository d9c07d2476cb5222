"""A process that is attached to a supervisor: register workers, watch, wait, terminate.

There is one Client per supervisor and process.  Registering, asking and terminating touch shared
memory alone; only waiting, and what cannot be said by a bit, goes over a connection.
"""

from __future__ import annotations

import math
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from pgbgw import _attachment, _runtime, _slots, _wire
from pgbgw._attachment import Attachment
from pgbgw._runtime import Address
from pgbgw._wire import Message, pack
from pgbgw.errors import (
    AttachError,
    EntryNotAllowedError,
    NoFreeSlotError,
    ParallelLimitError,
    PgbgwError,
    SupervisorDiedError,
    WaitTimeoutError,
)
from pgbgw.latch import LOOK_MS, Latch, deadline_after
from pgbgw.worker import (
    OUTCOME_KINDS,
    BackgroundWorker,
    Flags,
    HandleStatus,
    Outcome,
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

POOL = 64  # connections for waiting threads, the client's own counted
REMEMBERED = 4096  # final outcomes kept after their slots were reused
REGISTER_PATIENCE = 0.005  # seconds of scanning while the supervisor frees slots all the while
REGISTER_PAUSE = 0.00005

_FIELDS = {f.name for f in fields(BackgroundWorker)} - {"entry", "args"}

_clients: dict[str, Client] = {}  # by address
_owners: WeakValueDictionary[_slots.ClientView, Client] = WeakValueDictionary()
_clients_lock = threading.RLock()


def attach(address: str | os.PathLike[str] | None = None, *, timeout: float = 10.0) -> Client:
    """Attach this process to a supervisor of the same user.

    address: a name in the runtime directory, or a path; None: $PGBGW_ADDRESS (set in workers), else
    "default".  Attaching twice gives the same client, which counts.  Raises AttachError at once if
    nobody is there, and after timeout seconds if a supervisor starts, or is full, for that long.
    """
    target = _runtime.resolve(address)
    with _clients_lock:
        client = _known(target)
        if client is None:
            client = Client(target, _attachment.connect(target, time.monotonic() + timeout))
            _clients[target.path] = client
        client._references += 1
        return client


def join(address: str, answer: tuple[bytes, list[int]]) -> Client:
    """The client of a worker, over the connection that its supervisor made for it."""
    target = _runtime.resolve(address)
    data, fds = answer
    sock = socket.socket(fileno=fds[3])
    sock.setblocking(False)
    with _clients_lock:
        client = _known(target)
        if client is None:
            client = Client(target, _attachment.welcome(sock, data, fds[:3], target))
            _clients[target.path] = client
        else:  # it has attached by itself before
            sock.close()
            for fd in fds[:3]:
                os.close(fd)
        client._references += 1
        return client


def _known(target: Address) -> Client | None:
    """The client that is attached there, unless its supervisor has died meanwhile."""
    client = _clients.get(target.path)
    if client is not None and client._view.usable:
        if client._sleep(None, 0.0, None):
            return client
        client._view.note_death()
    _clients.pop(target.path, None)
    return None


class Client:
    """This process's attachment to one supervisor.  Made by attach() or Supervisor.start().

    Thread-safe.  Not for forked children: they attach anew, and this one raises WrongProcessError.
    """

    def __init__(self, address: Address, attachment: Attachment) -> None:
        self._address = address
        self._sock = attachment.sock
        self._supervisor = attachment.supervisor
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
        _owners[self._view] = self
        self._references = 0
        self._latch = Latch(self._sock, self._supervisor)
        self._latch_lock = threading.Lock()  # who holds it may read the first connection
        self._lock = threading.Lock()  # of what follows
        self._reading = threading.Lock()  # what was read is also noted when others look
        self._pool: list[tuple[socket.socket, Latch]] = []
        self._connections = 1  # lent, in the pool, or being made; the first one counts
        self._lent: set[socket.socket] = set()
        self._waiting = 0
        self._closed = False
        self._finals: dict[tuple[int, int], Outcome] = {}
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
        return self._register(self._definition(worker_or_entry, args, keywords))

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

        What register() raises carries `.handles` where it is about room: those made so far, which
        run.
        """
        handles: list[WorkerHandle] = []
        try:
            for worker in workers:
                handles.append(self._register(worker))  # noqa: PERF401
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

    def _register(self, worker: BackgroundWorker) -> WorkerHandle:
        self._check_alive()
        image = worker._record
        if self._allow is not None:
            entry = str(worker.entry)
            if not any(fnmatchcase(entry, pattern) for pattern in self._allow):
                raise EntryNotAllowedError(
                    f'background worker "{worker.name}": entry point "{entry}" is not allowed',
                    detail=f"the supervisor allows {', '.join(self._allow) or 'none'}",
                    hint='Add it to "allow" of the supervisor.',
                )
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
            if info is not None and (type is None or info.type == type):
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
            if info.name == name:
                return self._view.handle(info.slot, info.generation, WorkerHandle)
        return None

    def worker_type(self, pid: int) -> str | None:
        """The type of the running worker with that pid, or None (GetBackgroundWorkerTypeByPid)."""
        place = self._place(pid)
        detail = None if place is None else self._view.detail(*place)
        return None if detail is None else detail[12]

    def _place(self, pid: int) -> tuple[int, int] | None:
        """Slot and generation of the worker that runs as this pid; None for any other number."""
        return self._view.slot_of_pid(pid if 0 < pid < 1 << 32 else 0)

    def handle(self, info: WorkerInfo) -> WorkerHandle:
        """The handle on a worker of workers()."""
        return self._view.handle(info.slot, info.generation, WorkerHandle)

    def _view_info(self, slot: int, generation: int) -> WorkerInfo | None:
        detail = self._view.detail(slot, generation)
        if detail is None:
            return None
        now_generation, _, ready, pid = self._view.status(slot)
        here = now_generation == generation
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
            outcome=_outcome(detail),
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
        if how not in ("ALL", "ANY") or what not in _CONDITIONS:
            raise ValueError(f"invalid return_when: {return_when!r}")
        self._check_open()
        wanted = set(handles)
        for handle in wanted:
            if handle.address != self._address.path:
                raise ValueError(f"{handle!r} is a handle of another supervisor")
        pending = self._wait(wanted, _CONDITIONS[what], deadline_after(timeout), how == "ANY")
        return wanted - pending, pending

    def watch(self, *handles: WorkerHandle) -> Watch:
        """A Watch on these handles, for an event loop: a descriptor that says when to look."""
        from pgbgw.watch import Watch

        self._check_open()
        return Watch(self, handles)

    def _wait(
        self,
        handles: set[WorkerHandle],
        satisfied: Callable[[Client, WorkerHandle], object],
        deadline: float | None,
        any_is_enough: bool = False,
    ) -> set[WorkerHandle]:
        """Wait until all (or one) are satisfied or the supervisor is dead; those that are not."""

        def over() -> bool:
            return not pending or (any_is_enough and len(pending) < len(handles))

        pending = {h for h in handles if not satisfied(self, h)}
        if over():
            return pending
        with self._borrow(deadline) as latch:
            listening = latch is not None and self._subscribe(latch, pending, deadline)
            unsure = True
            while True:
                # Drain, then look: what comes after the look ends the sleep below.
                heard, said = self._hear(latch)
                # Refused, or a connection that was closed: nothing more will come.
                if Message.CAPACITY in said or (latch is not None and latch.hung_up):
                    listening = False
                if unsure or Message.OVERFLOW in said:
                    check = pending
                else:
                    check = {h for h in pending if (h.slot, h.generation) in heard}
                pending = pending - {h for h in check if satisfied(self, h)}
                if over() or (deadline is not None and time.monotonic() >= deadline):
                    break
                # Where no message will come, look again soon: not subscribed, or the slot is said
                # to be free in the outbox alone (for a moment, or until damage is repaired).
                unsure = not listening or any(h._state == 0 for h in check & pending)
                if not self._sleep(latch, deadline, LOOK_MS / 1000 if unsure else None):
                    self._view.note_death()
                    pending = {h for h in pending if not satisfied(self, h)}
                    break
            if latch is not None and latch is not self._latch:
                now = time.monotonic()
                farewell = (pack(Message.UNSUBSCRIBE, h.slot, h.generation) for h in handles)
                tidy = all(latch.send(message, now) for message in farewell)
                self._hear(latch)
                if not tidy:  # a supervisor that does not read: hang up instead of waiting for it
                    latch.hung_up = True
        return pending

    def _subscribe(self, latch: Latch, handles: set[WorkerHandle], deadline: float | None) -> bool:
        return all(
            latch.send(pack(Message.SUBSCRIBE, h.slot, h.generation), deadline) for h in handles
        )

    def _sleep(self, latch: Latch | None, deadline: float | None, most: float | None) -> bool:
        """Wait for a message, the deadline, or most seconds; False if the supervisor is dead."""
        if most is not None:
            soon = time.monotonic() + most
            deadline = soon if deadline is None else min(deadline, soon)
        if latch is not None:
            return latch.wait(deadline)
        left = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
        poll = select.poll()
        poll.register(self._supervisor, select.POLLIN)
        return not poll.poll(left)

    @contextmanager
    def _borrow(self, deadline: float | None) -> Iterator[Latch | None]:
        """A connection for one waiting thread: the client's own, one of the pool, or None."""
        with self._lock:
            self._check_open()
            self._waiting += 1
        own = self._latch_lock.acquire(blocking=False)
        lent: tuple[socket.socket, Latch] | None = None
        try:
            if own:
                yield self._latch
            else:
                lent = self._take_from_pool(deadline)
                yield None if lent is None else lent[1]
        finally:
            if own:
                self._latch_lock.release()
            with self._lock:
                self._waiting -= 1
                if lent is not None:
                    self._lent.discard(lent[0])
                    if self._closed or lent[1].hung_up:
                        lent[0].close()
                        self._connections -= 1
                    else:
                        self._pool.append(lent)
                if self._closed and self._waiting == 0:
                    self._close_descriptors()

    def _take_from_pool(self, deadline: float | None) -> tuple[socket.socket, Latch] | None:
        with self._lock:
            if self._pool:
                lent = self._pool.pop()
                self._lent.add(lent[0])
                return lent
            if self._connections >= POOL:
                return None
            self._connections += 1
        soon = time.monotonic() + 1.0
        try:
            lent = self._connect(soon if deadline is None else min(deadline, soon))
        except BaseException as exc:
            with self._lock:
                self._connections -= 1
            if isinstance(exc, (AttachError, OSError)):
                return None  # the supervisor is dead, or full: look now and then
            raise
        with self._lock:
            self._lent.add(lent[0])
        return lent

    def _connect(self, deadline: float) -> tuple[socket.socket, Latch]:
        """A further connection of this process; its client id is the same."""
        extra = _attachment.connect(self._address, deadline)
        extra.close_segments()
        os.close(extra.supervisor)
        return extra.sock, Latch(extra.sock, self._supervisor)

    def _hear(self, latch: Latch | None) -> tuple[set[tuple[int, int]], set[int]]:
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
        self._keep(slot, generation, outcome)

    def _keep(self, slot: int, generation: int, outcome: Outcome) -> None:
        """Remember a final outcome; the first that is heard may know more than a later one."""
        with self._lock:
            self._finals.setdefault((slot, generation), outcome)
            while len(self._finals) > REMEMBERED:
                del self._finals[next(iter(self._finals))]

    def _listen(self, patience: float = 0.0) -> None:
        """Note what has come on the first connection.  If a thread waits there it does so itself:
        whatever comes wakes it.  patience: seconds it is given for that."""
        deadline = time.monotonic() + patience
        while not self._latch_lock.acquire(blocking=False):
            with self._reading:
                unread = self._latch.has_message()
            if not unread or time.monotonic() >= deadline:
                return
            time.sleep(0.0002)
        try:
            self._hear(self._latch)
        finally:
            self._latch_lock.release()

    def _tell(self, message: bytes) -> None:
        """Send a request, waiting for room; a dead supervisor is no error here."""
        self._check_open()
        self._latch.send(message)

    def _check_open(self) -> None:
        """AttachError if this client is closed, WrongProcessError in a forked child."""
        _ = self._view.epoch

    # --- the end ----------------------------------------------------------------------------

    def stop(self, mode: str = "fast", timeout: float | None = None) -> None:
        """Ask the supervisor to stop, wait until it is gone, and reap it if it is our child.

        mode: "smart" (serve until the last other client has gone, then fast), "fast" (SIGTERM to
        all workers) or "immediate" (SIGQUIT).  A stronger request overrides a weaker one.  Raises
        WaitTimeoutError after timeout seconds; the request stands.
        """
        try:
            shutdown = ShutdownMode[mode.upper()]
        except KeyError:
            shutdown = ShutdownMode.NONE
        if shutdown == ShutdownMode.NONE:
            raise ValueError(f"mode must be 'smart', 'fast' or 'immediate', not {mode!r}")
        deadline = deadline_after(timeout)
        self._tell(pack(Message.STOP, shutdown))
        while self._sleep(None, deadline, 3600.0):
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
        with _clients_lock:
            self._references -= 1
            if self._references > 0:
                return
            if _clients.get(self._address.path) is self:
                del _clients[self._address.path]
            # Still under the lock: who attaches anew must not come before our DETACH.
            self._detach()

    def _detach(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            # From here on every operation raises; none is in flight, and the mapping is gone.
            self._view.close()
            self._latch.send(pack(Message.DETACH), time.monotonic())
            for sock, _ in self._pool:
                sock.close()
            self._pool.clear()
            if self._waiting == 0:
                self._close_descriptors()
            else:  # waiting threads wake up, see that we are closed, and the last one cleans up
                for sock in (self._sock, *self._lent):
                    try:
                        sock.shutdown(socket.SHUT_RDWR)
                    except OSError:
                        pass

    def _close_descriptors(self) -> None:
        self._sock.close()
        os.close(self._supervisor)
        self._supervisor = -1

    def _forget_parent(self) -> None:
        """In a forked child: let go of what is the parent's, without a word to the supervisor."""
        for sock in (self._sock, *self._lent, *(sock for sock, _ in self._pool)):
            sock.close()
        if self._supervisor >= 0:
            os.close(self._supervisor)
        if self._process is not None:
            self._process.returncode = 0  # not this process's child: nothing to warn about


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
        client = _owners.get(self._view)
        if client is None:
            raise AttachError(
                f'this process is not attached to the supervisor at "{self.address}"',
                hint=f"attach({self.address!r}) before using the handle.",
            )
        return client

    def _find_view(self) -> _slots.ClientView:
        client = _clients.get(self.address)
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
            client._listen()
            detail = client._view.detail(self.slot, self.generation)
            if detail is not None:
                return _outcome(detail)
            if self._state != 0:
                return None
            key = (self.slot, self.generation)
            if key not in client._finals:
                client._listen(patience=1.0)  # the slot was used on: its end has been told since
            if (outcome := client._finals.get(key)) is not None:
                return outcome
        return Outcome(
            kind="lost", exitcode=None, signal=None, error=None, at=0.0, restarts=0, final=True
        )

    def info(self) -> WorkerInfo:
        """What `pgbgw ps` shows of it.

        PgbgwError until the supervisor has taken it over, and once its slot was used by others.
        """
        client = self._find_client()
        info = None
        if self._view.epoch == self.epoch:
            info = client._view_info(self.slot, self.generation)
        if info is None:
            early = self.status() is HandleStatus.NOT_YET_STARTED
            raise PgbgwError(
                f"nothing is known {'yet' if early else 'any more'} of the worker"
                f" {self.slot}/{self.generation}"
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
        outcome = self.outcome
        assert outcome is not None
        return outcome

    def _wait(
        self,
        condition: Callable[[Client, WorkerHandle], HandleStatus | None],
        timeout: float | None,
        what: str,
    ) -> HandleStatus:
        client = self._find_client()
        seen: HandleStatus | None = None

        def satisfied(client: Client, handle: WorkerHandle) -> bool:
            nonlocal seen  # what ended the wait; the worker may run again by now
            seen = condition(client, handle)
            return seen is not None

        if client._wait({self}, satisfied, deadline_after(timeout)) or seen is None:
            raise WaitTimeoutError(
                f"the worker in slot {self.slot}/{self.generation} did not {what} in time",
                detail=f"waited {timeout} seconds; the worker is not affected",
            )
        return seen

    def terminate(self, *, grace: float | None = None) -> None:
        """Ask that it stops and is never started again (TerminateBackgroundWorker).

        Returns at once.  A running worker gets SIGTERM, once.  grace: seconds until its process
        group gets SIGKILL; None: its own stop_timeout, if any.  No effect if it is gone already.
        """
        if grace is not None and not (math.isfinite(grace) and grace >= 0):
            raise ValueError(f"grace must be a number of seconds, not {grace!r}")
        if self._set_terminate() and grace is not None:
            body = _wire.GRACE.pack(min(int(grace * 1e9), (1 << 62)))
            self._request(Message.TERMINATE, body)

    def cancel(self) -> None:
        """SIGINT: cancel the statement that its database connection runs.  Others ignore it."""
        self._request(Message.CANCEL)

    def wake(self) -> None:
        """End its current_worker().wait(), or the next one if it is not waiting (SetLatch)."""
        self._request(Message.WAKE)

    def _request(self, type: Message, body: bytes = b"") -> None:
        self._find_client()._tell(pack(type, self.slot, self.generation, body))


def _outcome(detail: tuple[object, ...]) -> Outcome | None:
    """The Outcome in a slot's detail; None if nothing has ended yet."""
    kind, exitcode, signum, restarts, final = detail[:5]
    if not isinstance(kind, int) or not 0 < kind < len(OUTCOME_KINDS):
        return None
    name = OUTCOME_KINDS[kind]
    return Outcome(
        kind=name,
        exitcode=exitcode if name == "exited" else None,  # type: ignore[arg-type]
        signal=signum if name == "signaled" else None,  # type: ignore[arg-type]
        error=detail[14] or None,  # type: ignore[arg-type]
        at=detail[10] / 1e9,  # type: ignore[operator]
        restarts=restarts,  # type: ignore[arg-type]
        final=bool(final),
    )


# --- conditions -------------------------------------------------------------------------------
# Each gives the status that ends a wait, or None.  A registration that is gone counts only once its
# slot can be registered anew.


def _is_gone(client: Client, handle: WorkerHandle) -> HandleStatus | None:
    if handle._state != 0:
        died = handle.status() is HandleStatus.SUPERVISOR_DIED
        return HandleStatus.SUPERVISOR_DIED if died else None
    if (handle.slot, handle.generation) not in client._finals:
        if not handle._freed:
            return None
        if handle.epoch == client.epoch:
            # Keep what its detail says: others may use the slot before we look again.
            detail = client._view.detail(handle.slot, handle.generation)
            outcome = None if detail is None else _outcome(detail)
            if outcome is not None:
                client._keep(handle.slot, handle.generation, outcome)
    return HandleStatus.STOPPED


def _is_stopped(client: Client, handle: WorkerHandle) -> HandleStatus | None:
    status = handle.status()
    if status is HandleStatus.STOPPED and handle._state == 0:
        return _is_gone(client, handle)
    return status if status in (HandleStatus.STOPPED, HandleStatus.SUPERVISOR_DIED) else None


def _is_started(client: Client, handle: WorkerHandle) -> HandleStatus | None:
    if handle.status() is HandleStatus.STARTED:
        return HandleStatus.STARTED
    return _is_stopped(client, handle)


def _is_ready(client: Client, handle: WorkerHandle) -> HandleStatus | None:
    return HandleStatus.STARTED if handle.ready else _is_stopped(client, handle)


_CONDITIONS = {"STARTED": _is_started, "STOPPED": _is_stopped, "GONE": _is_gone}


def _after_fork() -> None:
    global _clients_lock
    _clients_lock = threading.RLock()
    for client in _clients.values():
        client._forget_parent()
    _clients.clear()


os.register_at_fork(after_in_child=_after_fork)
