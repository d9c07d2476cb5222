"""The supervisor's end of every connection: who is attached, and who wants to hear what.

A client is a process: one client id (cid), bound to a pidfd, however many connections it has.  Its
cid lives until that pidfd is readable, or until it says DETACH; end-of-file on a connection frees
nothing but the connection (a forked child may hold the other end, or a live process have closed it
with an operation in flight).

Nothing here can block: all calls are MSG_DONTWAIT, reading is bounded, and a client that does not
read loses notifications, never our time.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import resource
import socket
import struct
import time
from collections import Counter
from collections.abc import Sequence
from typing import Protocol

from pgbgw import _kernel, _wire
from pgbgw._launch import send_descriptors
from pgbgw._log import RateLimit
from pgbgw._poller import Poller
from pgbgw._slots import SupervisorView
from pgbgw._wire import Message, pack, unpack
from pgbgw.worker import ShutdownMode

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 16_384  # in all
MAX_CONNECTIONS_PER_PROCESS = 256
MAX_SUBSCRIPTIONS = 1 << 20
ACCEPTS_PER_PASS = 64
FULL, LATER = "too many processes are attached", "no memory to ask whether it lives"
_NONBLOCKING = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
_UCRED = struct.Struct("3i")

Final = tuple[int, int, int, int, int]  # kind, exit code, signal, restarts, Unix time in ns


class Requests(Protocol):
    """What clients may ask of the supervisor besides being told."""

    def terminate(self, slot: int, generation: int, grace_ns: int) -> None: ...
    def cancel(self, slot: int, generation: int) -> None: ...
    def wake(self, slot: int, generation: int) -> None: ...
    def stop(self, mode: ShutdownMode, requester: ClientProcess) -> None: ...
    def is_worker(self, pid: int) -> bool: ...


class ClientProcess:
    """A process that is attached."""

    __slots__ = ("cid", "connections", "is_worker", "pid", "pidfd")

    def __init__(self, pid: int, pidfd: int, cid: int, is_worker: bool) -> None:
        self.pid = pid
        self.pidfd = pidfd
        self.cid = cid
        self.is_worker = is_worker
        self.connections: list[Connection] = []  # the first is its own: it hears of its workers


class Connection:
    """One SEQPACKET connection; `process` is None until it has said who it is."""

    __slots__ = ("fd", "nonce", "overflowed", "pid", "pidfd", "process", "slots", "sock")

    def __init__(self, sock: socket.socket, pid: int, pidfd: int) -> None:
        self.sock = sock
        self.fd = sock.fileno()
        self.pid = pid
        self.pidfd = pidfd  # until the process has it
        self.nonce = int.from_bytes(os.urandom(8), "little")
        self.process: ClientProcess | None = None
        self.slots: set[int] = set()  # subscribed to
        self.overflowed = False


class Connections:
    def __init__(
        self,
        poller: Poller,
        view: SupervisorView,
        descriptors: Sequence[int],
        allow: Sequence[str] | None,
        requests: Requests,
    ) -> None:
        """descriptors: outbox, inbox and our own pidfd, for every client."""
        self._poller = poller
        self._view = view
        self._descriptors = list(descriptors)
        self._allow = b"" if allow is None else json.dumps(list(allow)).encode()
        self._requests = requests
        self._connections: dict[int, Connection] = {}
        self._processes: dict[int, list[ClientProcess]] = {}  # by pid, as they attached
        self._by_cid: dict[int, ClientProcess] = {}
        self._subscribers: dict[int, set[Connection]] = {}  # by slot; of its present generation
        self._subscriptions = 0
        self._accepting = True
        self._noise = RateLimit(1, 10)
        self._listener: socket.socket | None = None
        self._per_pid: Counter[int] = Counter()  # connections
        # Two descriptors each, and two for each worker there may be; a quarter in any case.
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._most = min(MAX_CONNECTIONS, max(files // 8, (files - 2 * view.nslots - 64) // 2))
        self._spare_fd = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)  # see _shed()

    def listen(self, listener: socket.socket) -> None:
        """Accept connections from here on.  The listener is ours to close."""
        self._listener = listener
        self._poller.add(listener.fileno(), self._accept)

    # --- who is there -----------------------------------------------------------------------

    @property
    def attached(self) -> bool:
        """Is any process attached?  Without one nobody can damage or lose anything."""
        return bool(self._by_cid)

    def clients_left(self, requesters: set[ClientProcess]) -> int:
        """How many processes a smart shutdown waits for."""
        return sum(
            1
            for p in self._by_cid.values()
            if p not in requesters and not p.is_worker and p.connections
        )

    def refuse_new(self) -> None:
        """A smart shutdown has begun: only further connections of those who are here."""
        self._accepting = False

    # --- coming -----------------------------------------------------------------------------

    def _accept(self) -> None:
        assert self._listener is not None
        if self._spare_fd < 0:
            self._take_spare()
        for _ in range(ACCEPTS_PER_PASS):
            try:
                sock, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as exc:
                if exc.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                    self._shed()
                    return
                continue  # that one has gone away already
            self._greet(sock)

    def _shed(self) -> None:
        """Out of descriptors: turn one away with the spare, lest the listener stays readable."""
        self._complain("out of file descriptors: a connection was turned away")
        if self._spare_fd < 0 or self._listener is None:
            return
        os.close(self._spare_fd)
        self._spare_fd = -1
        try:
            self._listener.accept()[0].close()
        except OSError:
            pass
        self._take_spare()

    def _take_spare(self) -> None:
        try:
            self._spare_fd = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            pass  # somebody else took it, if it is the system that has no more; see _accept()

    def _greet(self, sock: socket.socket) -> None:
        """Bind the connection to a pidfd, then ask the peer to speak: a process with that pid was
        alive before and after, hence it is the one (where the kernel cannot simply tell)."""
        try:
            sock.setblocking(False)
            raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
            pid, uid, _ = _UCRED.unpack(raw)
            if uid != os.geteuid() or pid <= 0:
                raise PermissionError(f"connection from another user ({uid})")
            if len(self._connections) >= self._most:
                raise OSError("too many connections")
            if self._per_pid[pid] >= MAX_CONNECTIONS_PER_PROCESS:
                refusal = pack(Message.REFUSED, body=b"this process has too many connections")
                sock.send(refusal, _NONBLOCKING)
                raise OSError(f"process {pid} has too many connections")
            connection = self._watch(sock, pid, _kernel.peer_pidfd(sock.fileno()))
        except OSError as exc:
            self._complain("a connection was refused: %s", exc)
            sock.close()
            return
        self._send(connection, pack(Message.CHALLENGE, generation=connection.nonce))

    def join(self, pid: int) -> tuple[bytes, list[int], socket.socket] | str:
        """A worker's own connection: WELCOME, its descriptors and its end, or why not.

        The caller sends them over the worker's channel and closes the end.
        """
        if self._per_pid[pid] >= MAX_CONNECTIONS_PER_PROCESS:
            return "this process has too many connections"
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError as exc:
            return str(exc)
        try:
            _kernel.refuse_rights(ours.fileno())
            ours.setblocking(False)
            connection = self._watch(ours, pid, -1)
        except OSError as exc:
            ours.close()
            theirs.close()
            return str(exc)
        admitted = self._admit(connection, first=True)
        if isinstance(admitted, str):
            theirs.close()
            self._drop(connection)
            return admitted
        return self._welcome(admitted), [*self._descriptors, theirs.fileno()], theirs

    def _watch(self, sock: socket.socket, pid: int, pidfd: int) -> Connection:
        """A connection that we read from now on; pidfd: -1 to open one.  May raise OSError."""
        if pidfd < 0:
            pidfd = os.pidfd_open(pid)
        connection = Connection(sock, pid, pidfd)
        try:
            self._poller.add(
                connection.fd,
                lambda: self._read(connection),
                lambda: self._writable(connection),
            )
        except OSError:  # the kernel's limit of watches
            os.close(pidfd)
            raise
        self._connections[connection.fd] = connection
        self._per_pid[pid] += 1
        return connection

    def _hello(self, connection: Connection, pid: int, nonce: int, body: bytes) -> None:
        if connection.process is not None:
            return
        admitted: ClientProcess | str
        if pid != connection.pid or nonce != connection.nonce:
            admitted = "the connection is not that process's own"
        elif len(body) < _wire.HELLO.size or _wire.HELLO.unpack_from(body)[0] != _wire.PROTOCOL:
            admitted = "the supervisor speaks another version of the protocol"
        else:
            admitted = self._admit(connection, first=bool(_wire.HELLO.unpack_from(body)[1]))
        if isinstance(admitted, str):
            if admitted not in (FULL, LATER):  # soon, perhaps: who is hung up on tries again
                self._send(connection, pack(Message.REFUSED, body=admitted.encode()))
            self._drop(connection)
            return
        message = self._welcome(admitted)
        try:
            send_descriptors(connection.sock, message, self._descriptors)
        except OSError as exc:
            self._complain("could not welcome process %d: %s", connection.pid, exc)
            self._drop(connection)

    def _welcome(self, process: ClientProcess) -> bytes:
        body = _wire.WELCOME.pack(process.cid, 1 if self._allow else 0) + self._allow
        return pack(Message.WELCOME, body=body)

    def _admit(self, connection: Connection, first: bool) -> ClientProcess | str:
        """Bind the connection to its process's client; or say why not.

        A first connection makes a new client even where the process has one: that one has detached,
        and we have not come to read it; or it could not say so (no room, or an exec), and then it
        has no connection any more.
        """
        try:
            if _is_dead(connection.pidfd):
                return "its process is dead"
            for earlier in self._processes.get(connection.pid, [])[:]:
                # A dead one: the number is another process's by now.
                if (first and not earlier.connections) or _is_dead(earlier.pidfd):
                    self._process_gone(earlier)
        except OSError:  # no memory to ask
            return LATER
        same = self._processes.get(connection.pid)
        known = same[-1] if same else None
        if known is None or first:
            is_worker = self._requests.is_worker(connection.pid)
            if known is None and not self._accepting and not is_worker:
                return "the supervisor is shutting down"
            admitted = self._new_client(connection, is_worker)
            if isinstance(admitted, str):
                return admitted
            known = admitted
        if connection.pidfd >= 0:
            os.close(connection.pidfd)
            connection.pidfd = -1
        connection.process = known
        known.connections.append(connection)
        return known

    def _new_client(self, connection: Connection, is_worker: bool) -> ClientProcess | str:
        cid = self._view.new_client()
        if cid == 0:
            return FULL
        process = ClientProcess(connection.pid, connection.pidfd, cid, is_worker)
        try:
            self._poller.add(process.pidfd, lambda: self._process_gone(process))
        except OSError as exc:
            self._view.client_gone(cid)
            return str(exc)
        connection.pidfd = -1
        self._processes.setdefault(process.pid, []).append(process)
        self._by_cid[cid] = process
        return process

    # --- going ------------------------------------------------------------------------------

    def _drop(self, connection: Connection) -> None:
        """The connection is over; its process may live on."""
        if self._connections.pop(connection.fd, None) is None:
            return
        self._per_pid[connection.pid] -= 1
        if not self._per_pid[connection.pid]:
            del self._per_pid[connection.pid]
        for slot in connection.slots:
            self._unsubscribed(connection, slot)
        connection.slots = set()
        self._poller.remove(connection.fd)
        connection.sock.close()
        if connection.pidfd >= 0:
            os.close(connection.pidfd)
            connection.pidfd = -1
        if connection.process is not None:
            connection.process.connections.remove(connection)

    def _process_gone(self, process: ClientProcess) -> None:
        """Dead, or detached: its cid may be reused after a round of the sweep."""
        if self._by_cid.pop(process.cid, None) is None:
            return
        same = self._processes[process.pid]
        same.remove(process)
        if not same:
            del self._processes[process.pid]
        for connection in list(process.connections):
            self._drop(connection)
        self._poller.remove(process.pidfd)
        os.close(process.pidfd)
        self._view.client_gone(process.cid)

    def close(self) -> None:
        """Stop listening, and hang up.  Clients learn of our end by our pidfd."""
        if self._listener is not None:
            self._poller.remove(self._listener.fileno())
            self._listener.close()
        if self._spare_fd >= 0:
            os.close(self._spare_fd)
        for connection in list(self._connections.values()):
            self._drop(connection)
        for process in self._by_cid.values():
            self._poller.remove(process.pidfd)
            os.close(process.pidfd)

    # --- reading ----------------------------------------------------------------------------

    def _read(self, connection: Connection) -> None:
        for _ in range(_wire.MAX_READS):
            try:
                data = connection.sock.recv(_wire.MAX_MESSAGE, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self._drop(connection)
                return
            self._obey(connection, data)
            if connection.fd not in self._connections:
                return

    def _obey(self, connection: Connection, data: bytes) -> None:
        message = unpack(data)
        if message is None:
            self._complain("a malformed message from process %d was ignored", connection.pid)
            return
        type, slot, generation, body = message
        if type == Message.KICK:  # it woke us; the bitmap says where to look
            return
        if type == Message.HELLO:
            self._hello(connection, slot, generation, body)
            return
        process = connection.process
        if process is None:
            self._complain("process %d sends before it has said who it is", connection.pid)
            return
        if type == Message.SUBSCRIBE:
            self.subscribe(connection, slot, generation)
        elif type == Message.UNSUBSCRIBE:
            self._unsubscribe(connection, slot, generation)
        elif type == Message.TERMINATE and len(body) >= _wire.GRACE.size:
            grace = max(-1, _wire.GRACE.unpack_from(body)[0])
            self._requests.terminate(slot, generation, grace)
        elif type == Message.CANCEL:
            self._requests.cancel(slot, generation)
        elif type == Message.WAKE:
            self._requests.wake(slot, generation)
        elif type == Message.STOP and slot in list(ShutdownMode)[1:]:
            self._requests.stop(ShutdownMode(slot), process)
        elif type == Message.DETACH:
            self._process_gone(process)
        else:
            self._complain("an unknown message from process %d was ignored", connection.pid)

    def _complain(self, message: str, *args: object) -> None:
        """Log what a client did wrong, at a bounded rate."""
        if self._noise.allow(time.monotonic()):
            logger.warning("%s%s", message % args, self._noise.more)

    # --- telling ----------------------------------------------------------------------------

    def subscribe_registrant(self, cid: int, slot: int) -> None:
        """A new registration asked for notification: its registrant's first connection hears."""
        process = self._by_cid.get(cid)
        if process is not None and process.connections:
            connection = process.connections[0]
            if slot not in connection.slots and self._subscriptions < MAX_SUBSCRIPTIONS:
                self._add(connection, slot)

    def tell_registrant(self, cid: int, slot: int, generation: int, outcome: Final) -> None:
        """A registration ended before it was known: its registrant hears, besides subscribers."""
        self.notify_final(slot, generation, outcome)
        process = self._by_cid.get(cid)
        if process is not None and process.connections:
            message = pack(Message.FINAL, slot, generation, _wire.FINAL.pack(*outcome))
            self._send(process.connections[0], message)

    def subscribe(self, connection: Connection, slot: int, generation: int) -> None:
        """From now on tell of every change; and tell once now, so that nothing falls between."""
        current = self._view.generation(slot)
        if current == 0:
            self._complain("process %d subscribes to what does not exist", connection.pid)
            return
        if generation == current and slot not in connection.slots:
            if self._subscriptions >= MAX_SUBSCRIPTIONS:
                self._send(connection, pack(Message.CAPACITY, slot, generation))
                return
            self._add(connection, slot)
        self._send(connection, pack(Message.NOTIFY, slot, generation))

    def _add(self, connection: Connection, slot: int) -> None:
        connection.slots.add(slot)
        self._subscribers.setdefault(slot, set()).add(connection)
        self._subscriptions += 1

    def _unsubscribe(self, connection: Connection, slot: int, generation: int) -> None:
        if generation == self._view.generation(slot) and slot in connection.slots:
            connection.slots.remove(slot)
            self._unsubscribed(connection, slot)

    def _unsubscribed(self, connection: Connection, slot: int) -> None:
        subscribers = self._subscribers[slot]
        subscribers.remove(connection)
        self._subscriptions -= 1
        if not subscribers:
            del self._subscribers[slot]

    def notify(self, slot: int, generation: int) -> None:
        """Something changed, and the outbox says what: always store first, then notify."""
        subscribers = self._subscribers.get(slot)
        if subscribers:
            message = pack(Message.NOTIFY, slot, generation)
            for connection in subscribers:
                self._send(connection, message)

    def notify_final(self, slot: int, generation: int, outcome: Final) -> None:
        """The slot is free again; the outcome goes along, since the slot's detail may be reused
        before the client looks."""
        subscribers = self._subscribers.pop(slot, None)
        if subscribers:
            message = pack(Message.FINAL, slot, generation, _wire.FINAL.pack(*outcome))
            self._subscriptions -= len(subscribers)
            for connection in subscribers:
                connection.slots.discard(slot)
                self._send(connection, message)

    def _send(self, connection: Connection, message: bytes) -> None:
        """Send if there is room.  If not, one OVERFLOW follows when there is: messages carry no
        state that is not in the outbox, or that "lost" does not cover."""
        if connection.overflowed:
            return
        try:
            connection.sock.send(message, _NONBLOCKING)
        except BlockingIOError:
            connection.overflowed = True
            self._poller.want_write(connection.fd, True)
        except (BrokenPipeError, ConnectionError):
            pass  # broken: reading it will say so
        except OSError:  # no memory for it just now
            connection.overflowed = True
            self._poller.want_write(connection.fd, True)

    def _writable(self, connection: Connection) -> None:
        try:
            connection.sock.send(pack(Message.OVERFLOW), _NONBLOCKING)
        except (BrokenPipeError, ConnectionError):
            pass  # broken: reading it will say so
        except OSError:  # no room, or no memory, still: the client must not miss it
            return
        connection.overflowed = False
        if connection.fd in self._connections:
            self._poller.want_write(connection.fd, False)


def _is_dead(pidfd: int) -> bool:
    import select

    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))
