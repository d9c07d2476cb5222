"""The worker's side of the supervisor: from fork to exit, and current_worker().

StartBackgroundWorker: signal handlers first, then the surroundings, then (with SHMEM_ACCESS) the
shared memory, then the entry point is looked up and called.  Exit status: 0 when it returns, 1 when
it raises, SystemExit's own.  There is no interpreter finalisation: threads are joined, atexit
functions run, streams flushed, the supervisor told that the end was clean, and `_exit`.
"""

from __future__ import annotations

import _thread
import atexit
import gc
import importlib
import json
import logging
import math
import mmap
import os
import pickle  # noqa: F401  # never called here: a fork of the supervisor need not load it
import resource
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import IO, TYPE_CHECKING, Any, NoReturn

from pgbgw import _kernel, _log
from pgbgw._launch import BLOCKED_SIGNALS, Assignment, Surroundings
from pgbgw._wire import HEAD, Message, pack, receive
from pgbgw.errors import InvalidWorkerError, PgbgwError, WorkerTerminated, WrongProcessError
from pgbgw.worker import BackgroundWorker, Flags, Outcome

if TYPE_CHECKING:
    from pgbgw.client import Client
    from pgbgw.handle import WorkerHandle

logger = logging.getLogger(__name__)

# Signals that stay open in signals_blocked(): faults, and what must always get through.
_NEVER_BLOCKED = {
    signal.SIGQUIT,
    signal.SIGSEGV,
    signal.SIGBUS,
    signal.SIGFPE,
    signal.SIGILL,
    signal.SIGABRT,
    signal.SIGTRAP,
    signal.SIGSYS,
    signal.SIGCONT,
}
_CHANNEL_PATIENCE = 30.0  # seconds: a supervisor that lives takes a message long before

_current: Worker | None = None
_process = 0  # the worker's pid, or that of the fork of it that this process is


def current_worker() -> Worker:
    """The worker that this process is (MyBgworkerEntry); WrongProcessError elsewhere."""
    if _current is None or _current._pid != os.getpid():
        raise WrongProcessError(
            "this process is not a background worker",
            hint="Register the function with Client.register() and call it there.",
        )
    return _current


class Worker:
    """What a worker knows of itself, and what it can ask of the supervisor."""

    worker: BackgroundWorker
    """The registration (MyBgworkerEntry); its arguments are those the entry was called with."""

    _assignment: Assignment

    def __init__(self, surroundings: Surroundings, channel: socket.socket) -> None:
        self._surroundings = surroundings
        self._channel = channel
        self._pid = os.getpid()
        self._main_thread = threading.get_ident()
        self._stopping = False
        self._stop_ignored = False  # WorkerTerminated was raised, and lost
        self._finishing = False
        self._awake = False  # a WAKE came that no wait() has answered
        self._on_terminate: Callable[[], object] | None = None
        self._on_reload: Callable[[], object] | None = None
        self._memory: memoryview | None = None
        self._client: Client | None = None
        self._answers: list[tuple[int, bytes, list[int]]] = []
        self._channel_lock = threading.Lock()
        self._connection: Any = None
        # The C signal handler writes here, so that a signal ends every wait.
        self._signalled, self._wakeup = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        for end in (self._signalled, self._wakeup):
            end.setblocking(False)

    # --- who am I ---------------------------------------------------------------------------

    @property
    def main_arg(self) -> int:
        return self.worker.main_arg

    @property
    def extra(self) -> bytes:
        """The opaque bytes of the registration, at most 128."""
        return self.worker.extra

    @property
    def handle(self) -> WorkerHandle:
        """A handle on this very worker, for others: picklable.  The startup worker has none."""
        from pgbgw.handle import WorkerHandle

        a = self._assignment
        if a.slot < 0:
            raise WrongProcessError("the startup worker has no slot and no handle")
        return WorkerHandle(a.epoch, a.slot, a.generation, self._surroundings.address)

    @property
    def stopping(self) -> bool:
        """True once a stop was asked for (SIGTERM)."""
        return self._stopping

    @property
    def last_outcome(self) -> Outcome | None:
        """How the previous run of this registration ended; None in the first."""
        last = self._assignment.last_outcome
        return None if last is None else Outcome(**last)

    # --- shared memory, clients -------------------------------------------------------------

    def _need(self, flag: Flags, what: str) -> None:
        if not self.worker.flags & flag:
            raise WrongProcessError(
                f'worker "{self.worker.name}" has no {what}',
                hint=f"Register it with Flags.{flag.name}.",
            )

    @property
    def shared_memory(self) -> memoryview:
        """The memory of the crash domain: the same bytes in every worker with SHMEM_ACCESS.

        Zero at the start of the supervisor and after every reset; as large as it was told to be.
        """
        self._need(Flags.SHMEM_ACCESS, "access to shared memory")
        if self._memory is None:
            fd = self._assignment.memory
            size = os.fstat(fd).st_size if fd >= 0 else 0
            self._memory = memoryview(mmap.mmap(fd, size) if size else b"")
        return self._memory

    @property
    def client(self) -> Client:
        """A client of this worker's supervisor, over the channel it was born with."""
        self._need(Flags.SHMEM_ACCESS, "client of its own")
        if self._client is None:
            from pgbgw.client import join

            self._client = join(self._surroundings.address, self._join())
        return self._client

    def _join(self) -> tuple[bytes, list[int]]:
        """Ask for a client connection; its WELCOME and descriptors."""
        self._tell(Message.JOIN)
        deadline = time.monotonic() + _CHANNEL_PATIENCE
        while not self._answers:
            if time.monotonic() >= deadline:
                raise PgbgwError("the supervisor does not answer", hint="See its log.")
            _await_channel(self._channel, select.POLLIN, 0.1)  # another thread may have read it
            self._read_channel()
        type, data, fds = self._answers.pop(0)
        if type != Message.WELCOME:
            raise PgbgwError("the supervisor refused a client", detail=data[HEAD.size :].decode())
        return data, fds

    # --- waiting ----------------------------------------------------------------------------

    def wait(self, fds: Iterable[int] = (), timeout: float | None = None) -> list[int]:
        """Wait until one of fds is readable, WorkerHandle.wake() was called, a stop was asked for,
        or timeout seconds have passed (None: for ever).  Returns the readable ones (WaitLatch).

        A wake-up that came since the last wait() ends this one at once.
        """
        wanted = set(fds)
        ready = self._poll(wanted, None if timeout is None else time.monotonic() + timeout, True)
        self._awake = False
        return ready

    def sleep(self, seconds: float) -> bool:
        """Wait so many seconds; False as soon as a stop is asked for.  wake() does not end it."""
        self._poll(set(), time.monotonic() + seconds, False)
        return not self._stopping

    def _poll(self, fds: set[int], deadline: float | None, wakeable: bool) -> list[int]:
        poll = select.poll()
        for fd in fds | {self._channel.fileno()}:
            poll.register(fd, select.POLLIN)
        main = threading.get_ident() == self._main_thread
        if main:  # signal handlers run in the main thread alone, so only its wait can end by one
            poll.register(self._signalled, select.POLLIN)
        while True:
            self._read_channel()
            if self._stopping or (wakeable and self._awake):
                timeout = 0.0
            elif deadline is None:
                timeout = math.inf
            else:
                timeout = max(0.0, deadline - time.monotonic())
            # In steps, so that no timeout is too long for poll(); rounded up, never early.  Threads
            # that no signal wakes look ten times a second whether a stop was asked for.
            forever = main and timeout == math.inf
            longest = 86_400.0 if main else 0.1
            step = None if forever else math.ceil(min(timeout, longest) * 1000)
            events = {fd for fd, _ in poll.poll(step)}
            if main and self._signalled.fileno() in events:
                _drain(self._signalled)
                if wakeable and not self._stopping:
                    self._awake = True  # as SetLatch in a handler: the caller looks around
            if (
                events & fds
                or self._stopping
                or (deadline is not None and time.monotonic() >= deadline)
                or (wakeable and self._awake)
            ):
                self._read_channel()
                return sorted(events & fds)

    def _read_channel(self) -> None:
        """Note wake-ups and answers.  Threads may meet here; none waits for another."""
        if not self._channel_lock.acquire(blocking=False):
            return
        try:
            while True:
                try:
                    data, fds = receive(self._channel, socket.MSG_DONTWAIT)
                except OSError:
                    return
                if len(data) < HEAD.size:
                    self._die_with_the_supervisor()
                type = HEAD.unpack_from(data)[0]
                if type == Message.AWAKE:
                    self._awake = True
                elif type in (Message.WELCOME, Message.REFUSED):
                    self._answers.append((type, data, fds))
        finally:
            self._channel_lock.release()

    def _die_with_the_supervisor(self) -> NoReturn:
        """The channel's other end is closed: the supervisor is about to be gone.  The signal for
        that kills us, unless we have changed our user since, which takes it away."""
        while os.getppid() == self._surroundings.supervisor:
            time.sleep(0.001)
        os._exit(1)

    # --- telling ----------------------------------------------------------------------------

    def _tell(self, type: Message, body: bytes = b"") -> None:
        """Send to the supervisor; wait for room.  The supervisor's death is ours, so no error."""
        if os.getpid() != self._pid:
            return  # a fork of the worker that has come back to our frames: not its to tell
        a = self._assignment
        message = pack(type, max(a.slot, 0), a.generation, body)
        while True:
            try:
                self._channel.send(message, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
                return
            except BlockingIOError:
                _await_channel(self._channel, select.POLLOUT, 1.0)
            except OSError:
                return

    def ready(self) -> None:
        """Say that initialisation is over: ends wait_for_ready().  Good for this run only."""
        self._tell(Message.READY)

    def title(self, activity: str) -> None:
        """Say what the worker does now, for `pgbgw ps` and the process title; 63 bytes are kept."""
        self._tell(Message.TITLE, activity.encode("utf-8", "replace")[:256])
        _set_title(self.worker.name, activity)

    def consistent(self) -> None:
        """Report a consistent state: workers of CONSISTENT_STATE start.  The startup worker's."""
        if self._assignment.slot >= 0:
            raise WrongProcessError(
                "only the startup worker may report consistency",
                hint='It is named by Supervisor(startup="module:function").',
            )
        self._tell(Message.CONSISTENT)

    # --- signals ----------------------------------------------------------------------------

    def on_terminate(self, callback: Callable[[], object] | None) -> None:
        """Call back, in the main thread at a safe point, when a stop is asked for.

        The default (None) raises WorkerTerminated there.  With a callback, `stopping` becomes True
        and sleep() and wait() return; the worker is to end by itself.
        """
        self._on_terminate = callback

    def on_reload(self, callback: Callable[[], object] | None) -> None:
        """Call back on SIGHUP, which is ignored otherwise."""
        self._on_reload = callback
        signal.signal(signal.SIGHUP, self._handle_reload if callback else signal.SIG_IGN)

    @contextmanager
    def signals_blocked(self) -> Iterator[None]:
        """Hold all signals back but faults, SIGQUIT and SIGCONT; they are delivered afterwards
        (BackgroundWorkerBlockSignals, BackgroundWorkerUnblockSignals).  May be nested."""
        blocked = set(signal.valid_signals()) - _NEVER_BLOCKED
        before = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _handle_terminate(self, signum: int, frame: FrameType | None) -> None:
        first, self._stopping = not self._stopping, True
        if self._finishing:
            return
        if self._on_terminate is not None:
            self._on_terminate()
        elif first or self._stop_ignored:  # a second one must not break into the first's cleanup
            self._stop_ignored = False
            raise WorkerTerminated("terminated on request")

    def _handle_ignored(self, unraisable: sys.UnraisableHookArgs) -> None:
        """An exception came up where none can: in __del__, or in a callback of the garbage
        collector or of the import system.  If it was to stop the worker, do it again elsewhere."""
        if isinstance(unraisable.exc_value, WorkerTerminated):
            self._stop_ignored = True
            _thread.start_new_thread(_stop_again, ())
        else:
            sys.__unraisablehook__(unraisable)

    def _ends_by_sigterm(self) -> bool:
        """Would SIGTERM raise WorkerTerminated?"""
        handler = signal.getsignal(signal.SIGTERM)
        return handler == self._handle_terminate and self._on_terminate is None

    def _handle_reload(self, signum: int, frame: FrameType | None) -> None:
        if self._on_reload is not None:
            self._on_reload()

    def _install_handlers(self) -> None:
        """The table of signals.  What is held back since the fork comes in later: _set_up()."""
        _kernel.install_quit_handler()
        signal.signal(signal.SIGTERM, self._handle_terminate)
        sys.unraisablehook = self._handle_ignored
        for ignored in (
            signal.SIGINT,
            signal.SIGHUP,
            signal.SIGUSR1,
            signal.SIGUSR2,
            signal.SIGPIPE,
        ):
            signal.signal(ignored, signal.SIG_IGN)
        signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)

    # --- databases --------------------------------------------------------------------------

    def connect(self, dsn: str, **options: Any) -> Any:
        """One DB-API connection for this process (BackgroundWorkerInitializeConnection).

        `sqlite:///path` (or `sqlite://` for memory), or `postgresql://...` with psycopg installed.
        SIGINT (WorkerHandle.cancel()) from then on cancels the running statement, and SIGTERM does
        so as well unless on_terminate() was told what to do.  In the main thread only.
        """
        self._need(Flags.DATABASE_CONNECTION, "database connection")
        if self._connection is not None:
            raise WrongProcessError(
                "this worker is already connected",
                hint="A worker connects once; register another worker for another database.",
            )
        from pgbgw._database import connect

        self._connection = connect(dsn, options, self._wakeup, self._ends_by_sigterm)
        return self._connection


def _await_channel(channel: socket.socket, event: int, seconds: float) -> None:
    poll = select.poll()
    poll.register(channel, event)
    poll.poll(seconds * 1000)


def _stop_again() -> None:
    time.sleep(0.01)  # the main thread is out of what ignores exceptions by then, or comes again
    os.kill(os.getpid(), signal.SIGTERM)


def _drain(end: socket.socket) -> None:
    try:
        while end.recv(4096):
            pass
    except BlockingIOError:
        pass


# --- the process ------------------------------------------------------------------------------


def run_forked(
    surroundings: Surroundings, assignment: Assignment, record: bytes, channel: socket.socket
) -> NoReturn:
    """StartBackgroundWorker in a fork of the supervisor.  Never returns."""
    atexit._clear()  # those of the supervisor are none of ours
    _start(_prepare(surroundings, channel), assignment, record)


def run_spare(surroundings: Surroundings, epoch: int, channel: socket.socket) -> NoReturn:
    """Get ready in a fork of the supervisor, and wait for a worker to be.  Never returns."""
    atexit._clear()
    _await_launch(_prepare(surroundings, channel), epoch)


def background_worker_entry(channel_fd: str) -> NoReturn:
    """BackgroundWorkerEntry: a fresh interpreter finds its surroundings and then its worker."""
    channel = socket.socket(fileno=int(channel_fd))
    os.set_inheritable(channel.fileno(), False)
    told = json.loads(channel.recv(1 << 20)[HEAD.size :])
    surroundings = Surroundings(**{**told["surroundings"], "environ": dict(os.environ)})
    os.set_inheritable(surroundings.workers_lock, False)
    _await_launch(_prepare(surroundings, channel), told["epoch"])


def _await_launch(worker: Worker, epoch: int) -> NoReturn:
    _rehearse(worker)
    data, fds = receive(worker._channel)
    if not data:
        os._exit(0)  # the supervisor has gone
    _start(worker, *Assignment.from_message(epoch, data, fds))


def _rehearse(worker: Worker) -> None:
    """Do in vain what a launch does: what it writes to is this process's own memory then, and no
    copy of the supervisor's has to be made when somebody waits for it."""
    record = BackgroundWorker(entry="pgbgw:current_worker", args=("",), env={"A": ""})._record
    _, record = Assignment.from_message(0, Assignment(0, 0, 0, -1).message(record), ())
    rehearsed = BackgroundWorker._from_record(record)
    rehearsed._load_env()
    lookup_function(str(rehearsed.entry))
    rehearsed._load_arguments()
    _set_title(rehearsed.name, "")


def _start(worker: Worker, assignment: Assignment, record: bytes) -> NoReturn:
    global _current
    worker.worker = BackgroundWorker._from_record(record)
    worker._assignment = assignment
    _current = worker
    os._exit(_run(worker))


def _run(worker: Worker) -> int:
    """Do the worker's work and end cleanly; the exit code."""
    try:
        code = _call_entry(worker)
        threading._shutdown()  # type: ignore[attr-defined]
    except BaseException as exc:  # a stop that came while we reported, or joined threads
        code = _report(worker, exc)
    worker._finishing = True  # one that comes from here on changes nothing
    return _finish(worker, code)


def _call_entry(worker: Worker) -> int:
    try:
        _set_up(worker)
        entry = lookup_function(str(worker.worker.entry))
        args, kwargs = worker.worker._load_arguments()
        entry(*args, **kwargs)
        return 0
    except BaseException as exc:
        return _report(worker, exc)


def _prepare(surroundings: Surroundings, channel: socket.socket) -> Worker:
    """What a process needs whatever worker it is to be.  Stop signals stay blocked."""
    global _process
    _log.setup_worker(surroundings.log_level)
    resource.setrlimit(resource.RLIMIT_NOFILE, surroundings.open_files)
    os.register_at_fork(after_in_child=_bind_to_parent)
    os.environ["PGBGW_ADDRESS"] = surroundings.address
    gc.freeze()  # what came with the fork need not be looked at, and so copied, again
    worker = Worker(surroundings, channel)
    _process = worker._pid
    worker._install_handlers()
    return worker


def _set_up(worker: Worker) -> None:
    """The surroundings; stop signals, held back since the fork, come in from here on."""
    os.environ.update(worker.worker._load_env())
    _set_title(worker.worker.name, "")
    if worker._surroundings.delay > 0:
        time.sleep(worker._surroundings.delay)  # post_auth_delay: time to attach a debugger
    _kernel.unblock_signals(BLOCKED_SIGNALS)
    if worker.worker.flags & Flags.SHMEM_ACCESS:
        worker._tell(Message.ATTACHED)


def _finish(worker: Worker, code: int) -> int:
    """The clean end: run atexit functions, flush, and say so."""
    try:
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            if stream is not None and not _is_closed(stream):
                stream.flush()
    except BaseException as exc:
        code = _report(worker, exc) or code or 1
    if worker.worker.flags & Flags.SHMEM_ACCESS:
        worker._tell(Message.CLEAN)
    return code


def _is_closed(stream: IO[str]) -> bool:
    try:
        return stream.closed
    except ValueError:  # detached
        return True


def _report(worker: Worker, exc: BaseException) -> int:
    """Log what ended the worker, send its last lines to the supervisor; the exit code."""
    if isinstance(exc, SystemExit) and not isinstance(exc, WorkerTerminated):
        if exc.code is None:
            return 0
        if isinstance(exc.code, int):
            return exc.code & 0xFF
        sys.stderr.write(f"{exc.code}\n")
        return 1
    a = worker._assignment
    who = _log.describe(worker.worker.name, worker.worker.type, worker._pid, a.slot, a.generation)
    # Code on the way out may have made another error of it; the import of a class does.
    cause: BaseException | None = exc
    while cause is not None and not isinstance(cause, WorkerTerminated):
        cause = cause.__cause__
    if cause is not None:
        logger.info("%s: %s", who, cause)
        return 1
    import traceback

    logger.error("%s failed", who, exc_info=exc)
    text = "".join(traceback.format_exception(exc)).encode("utf-8", "replace")
    tail = text[-511:]
    if len(text) > 511 and b"\n" in tail[:-1]:
        tail = tail[tail.index(b"\n") + 1 :]  # whole lines
    worker._tell(Message.ERROR, tail)
    return 1


def lookup_function(entry: str) -> Callable[..., object]:
    """LookupBackgroundWorkerFunction: import "module:function".  Built-in ones are pgbgw's own."""
    module, _, name = entry.partition(":")
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as exc:
        if exc.name is None or not (module + ".").startswith(exc.name + "."):
            raise  # the module is there, something that it imports is not
        raise InvalidWorkerError(
            f'could not find module "{module}" of entry point "{entry}"',
            detail=str(exc),
            hint="Workers use the supervisor's sys.path as it was at its start.",
        ) from exc
    for attribute in name.split("."):
        try:
            found = getattr(found, attribute)
        except AttributeError as exc:
            raise InvalidWorkerError(
                f'could not find function "{name}" in module "{module}"', detail=str(exc)
            ) from exc
    if not callable(found):
        raise InvalidWorkerError(f'entry point "{entry}" is not callable')
    return found  # type: ignore[no-any-return]


def _bind_to_parent() -> None:
    """In a process that the worker forks, or one of its forks: die with it, as it dies with the
    supervisor; and leave the worker's waits alone when a signal comes.

    Only from the main thread: the kernel binds the signal to the thread that forked, and would
    send it when that thread ends.
    """
    global _process
    parent, _process = _process, os.getpid()
    signal.set_wakeup_fd(-1)  # shared with the worker
    worker = _current
    if worker is None or threading.get_ident() != worker._main_thread:
        return
    _kernel.set_parent_death_signal(signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _set_title(name: str, activity: str) -> None:
    """The thread's name (15 bytes) always, the process title where setproctitle is installed."""
    _kernel.set_thread_name(name.encode("ascii", "replace")[:15])
    if _setproctitle is not None:
        title = f"pgbgw: {name}" + (f" ({_log.clean(activity)})" if activity else "")
        _setproctitle(title.encode("ascii", "replace").decode())


try:
    from setproctitle import setproctitle as _setproctitle
except ImportError:
    _setproctitle = None
