"""Becoming the supervisor: locks, preload, segments, socket; then the loop; then nothing is left.

The supervisor imports what `preload` names and nothing else of the user's; it unpickles nothing.
"""

from __future__ import annotations

import base64
import gc
import importlib
import json
import logging
import os
import resource
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field

from pgbgw import _kernel, _log, _runtime, _slots
from pgbgw._cgroup import SupervisorCgroup
from pgbgw._connections import Connections
from pgbgw._domain import CrashDomain
from pgbgw._launch import BLOCKED_SIGNALS, Surroundings, fill_standard_descriptors
from pgbgw._launcher import Launcher
from pgbgw._loop import Loop
from pgbgw._poller import Poller, Timers
from pgbgw._workers import WorkerTable
from pgbgw.errors import PgbgwError, StartError
from pgbgw.worker import ShutdownMode

logger = logging.getLogger(__name__)

# Libraries read these when they are imported: threads in the supervisor could not be forked.
THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)
RELAY_PATIENCE = 1.0  # seconds for the last log lines; nobody may be reading them


@dataclass(slots=True)
class Settings:
    """All that a supervisor process needs to be told; plain values, so that it travels as JSON."""

    address: str
    max_worker_processes: int
    max_parallel_workers: int
    preload: list[str]
    startup: str | None
    start_method: str
    spares: int
    allow: list[str] | None
    shared_memory: int
    restart_after_crash: bool
    post_auth_delay: float
    cgroup: str | None = None
    log_level: int = logging.INFO
    static: list[bytes] = field(default_factory=list)  # record images
    notices: list[str] = field(default_factory=list)  # to be logged at the start
    skipped: list[str] = field(default_factory=list)  # static workers that cannot run, and why

    def to_json(self) -> bytes:
        values = asdict(self)
        values["static"] = [base64.b64encode(image).decode() for image in self.static]
        return json.dumps(values).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Settings:
        values = json.loads(data)
        values["static"] = [base64.b64decode(image) for image in values["static"]]
        return cls(**values)


def serve_started(settings_fd: str, ready_fd: str, owner_fd: str) -> None:
    """The main program of a supervisor that Supervisor.start() has exec'ed.

    Says on the ready socket that it accepts connections, or as JSON why it never will.
    """
    with open(int(settings_fd), "rb") as file:
        settings = Settings.from_json(file.read())
    ready = socket.socket(fileno=int(ready_fd))
    os.set_inheritable(ready.fileno(), False)
    os.set_inheritable(int(owner_fd), False)

    told = False

    def tell(answer: dict[str, str | None]) -> None:
        nonlocal told
        told = True
        try:
            ready.send(json.dumps(answer).encode(), socket.MSG_NOSIGNAL)
        except OSError:
            pass  # the starter is gone: its pidfd will say so
        # Not closed: below first_descriptor no number may become free, see _plug_holes().

    try:
        status = serve(settings, int(owner_fd), lambda: tell({}), own=[ready.fileno()])
    except BaseException as exc:
        if told:
            raise
        if isinstance(exc, PgbgwError):
            tell({"message": str(exc), "detail": exc.detail, "hint": exc.hint})
        else:
            import traceback

            text = traceback.format_exc()
            message = f"the supervisor failed at its start: {type(exc).__name__}: {exc}"
            tell({"message": message, "detail": text[-8000:], "hint": None})
        os._exit(1)
    sys.stdout.flush()
    os._exit(status)


def serve(
    settings: Settings,
    owner: int | None = None,
    accepts: Callable[[], None] = lambda: None,
    stops: Callable[[ShutdownMode], None] = lambda mode: None,
    own: Sequence[int] = (),
) -> int:
    """Be the supervisor until it is stopped; the exit status.

    owner: a pidfd, whose process we do not outlive by much.  accepts: called once connections are
    accepted; StartError says why they never will be.  Stop signals stay blocked afterwards: who is
    about to exit is not to be disturbed by one more.  stops: called when a shutdown begins, and
    again for a stronger one.  own: more descriptors that workers close.
    """
    with ExitStack() as stack:
        if threading.current_thread() is not threading.main_thread():
            raise StartError("the supervisor must run in the main thread")
        fill_standard_descriptors()
        # Ignored, as a daemon may hand it on, it would have the kernel reap our children.
        stack.callback(signal.signal, signal.SIGCHLD, signal.signal(signal.SIGCHLD, signal.SIG_DFL))
        _refuse_threads()  # before the relay is forked; again after the preload
        _start_logging(settings, stack)
        if missing := _kernel.missing_features():
            raise StartError(
                "this kernel lacks what the supervisor needs",
                detail=", ".join(missing),
                hint="pgbgw needs Linux 5.14 or later.",
            )
        address = _runtime.resolve(settings.address)
        dirfd = _runtime.open_directory(address, create=True)
        stack.callback(os.close, dirfd)
        # Before the locks are waited for: survivors in a dead supervisor's cgroup need no patience.
        cgroup = SupervisorCgroup.make(settings.cgroup) if settings.cgroup else None
        if cgroup is not None:
            stack.callback(cgroup.close)
        locks = _runtime.Locks.take(address, dirfd)
        stack.callback(locks.close)
        if locks.warning:
            logger.warning("%s", locks.warning)
        locks.sweep_private(dirfd)

        open_files = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (open_files[1], open_files[1]))
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, open_files)
        sys.path[:] = [os.path.abspath(p) for p in sys.path]
        environ = _preload(settings.preload)
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()  # or every worker would print it again
        if settings.start_method == "fork":
            _refuse_threads()
        plugs = _plug_holes()
        for plug in plugs:
            stack.callback(os.close, plug)
        signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED_SIGNALS)

        surroundings = Surroundings(
            address=address.path,
            path=list(sys.path),
            directory=os.getcwd(),
            environ=environ,
            open_files=open_files,
            workers_lock=locks.workers_fd,
            own_descriptors=(
                dirfd,
                locks.supervisor_fd,
                *plugs,
                *([] if owner is None else [owner]),
                *([] if cgroup is None else cgroup.descriptors),
                *own,
            ),
            first_descriptor=_highest_descriptor() + 1,
            log_level=settings.log_level,
            delay=settings.post_auth_delay,
        )
        loop = _build(settings, surroundings, cgroup, stack)
        loop.on_stop = stops
        listener = _runtime.listen(address, dirfd)
        inode = os.lstat(address.socket_name, dir_fd=dirfd).st_ino
        stack.callback(_runtime.unlink_socket, address, dirfd, inode)
        loop.connections.listen(listener)
        if owner is not None:
            loop.watch_owner(owner)
        gc.collect()
        gc.freeze()  # what is here now is here for ever; children need not copy it to look at it
        logger.info("supervisor ready to accept connections at %s", address.path)
        loop.domain.start()
        accepts()
        status = loop.run()
        logger.info("supervisor is shut down")
        return status


def _start_logging(settings: Settings, stack: ExitStack) -> None:
    """Log through the relay from here on; at the end wait for it, but not for ever."""
    relay, pid = _log.start_relay()
    _log.setup_supervisor(relay, settings.log_level)

    def finish() -> None:
        root = logging.getLogger("pgbgw")
        for handler in root.handlers[:]:
            root.removeHandler(handler)
            handler.close()
        pidfd = os.pidfd_open(pid)
        if select.select([pidfd], [], [], RELAY_PATIENCE)[0]:
            os.waitpid(pid, 0)
        os.close(pidfd)

    stack.callback(finish)


def _refuse_threads() -> None:
    tasks = os.listdir("/proc/self/task")
    if len(tasks) == 1 and threading.active_count() == 1:
        return
    names = [t.name for t in threading.enumerate() if t is not threading.main_thread()]
    if len(names) < len(tasks) - 1:  # some are none of Python's
        names += [_thread_name(t) for t in tasks if int(t) != os.getpid()]
    raise StartError(
        "the supervisor must not have threads, since workers are forked from it",
        detail="threads: " + ", ".join(sorted(set(names))),
        hint='Leave the module that starts them out of preload, or use start_method="spawn".',
    )


def _thread_name(task: str) -> str:
    try:
        with open(f"/proc/self/task/{task}/comm") as file:
            return file.read().strip()
    except OSError:
        return task


def _preload(modules: Sequence[str]) -> dict[str, str]:
    """Import what all workers need, once; they share the memory.

    Search path, directory and environment are afterwards as they were before: that is what workers
    find.  Returns the environment.
    """
    path, directory, environ = list(sys.path), os.getcwd(), dict(os.environ)
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, "1"))
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as exc:
            raise StartError(
                f'could not preload module "{module}"', detail=f"{type(exc).__name__}: {exc}"
            ) from exc
    sys.path[:] = path
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environ)
    return environ


def _open_descriptors() -> list[int]:
    return sorted(fd for fd in map(int, os.listdir("/proc/self/fd")) if _is_open(fd))


def _is_open(fd: int) -> bool:
    """The listing itself took a descriptor, the lowest that was free, which is closed again."""
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def _highest_descriptor() -> int:
    return _open_descriptors()[-1]


def _plug_holes() -> list[int]:
    """Fill the gaps between open descriptors, so that all we open from now on lies above them:
    a worker closes ours by one range, and keeps what preload has opened."""
    opened = _open_descriptors()
    plugs = []
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    for fd in range(opened[-1]):
        if fd not in opened and fd != null:
            os.dup2(null, fd, inheritable=False)
            plugs.append(fd)
    if null < opened[-1]:
        plugs.append(null)
    else:
        os.close(null)
    return plugs


def _build(
    settings: Settings,
    surroundings: Surroundings,
    cgroup: SupervisorCgroup | None,
    stack: ExitStack,
) -> Loop:
    """The segments, and everything that works on them."""
    nslots, ntokens = settings.max_worker_processes, settings.max_parallel_workers
    try:
        sizes = _slots.segment_sizes(nslots, ntokens)
        outbox = _kernel.memfd(b"pgbgw-outbox", sizes[0])
        stack.callback(os.close, outbox)
        inbox = _kernel.memfd(b"pgbgw-inbox", sizes[1])
        stack.callback(os.close, inbox)
        epoch = int.from_bytes(os.urandom(8), "little") or 1
        view = _slots.SupervisorView(outbox, inbox, nslots, ntokens, epoch)
        fixed = _kernel.F_SEAL_SHRINK | _kernel.F_SEAL_GROW | _kernel.F_SEAL_SEAL
        _kernel.add_seals(outbox, fixed | _kernel.F_SEAL_FUTURE_WRITE)
        _kernel.add_seals(inbox, fixed)
    except (OSError, MemoryError) as exc:
        raise StartError(
            f"could not allocate a table of {nslots} slots",
            detail=str(exc) or "out of memory",
            hint="Lower max_worker_processes.",
        ) from exc

    poller = Poller()
    stack.callback(poller.close)
    timers = Timers()
    launcher = Launcher(poller, timers, surroundings, epoch, settings.start_method, settings.spares)
    launcher.cgroup = cgroup
    table = WorkerTable(view, timers, launcher, settings.allow)
    loop = Loop(view, poller, timers, table)
    own_pidfd = os.pidfd_open(os.getpid())
    stack.callback(os.close, own_pidfd)
    loop.connections = table.connections = Connections(
        poller, view, (outbox, inbox, own_pidfd), settings.allow, loop
    )
    stack.callback(loop.connections.close)
    loop.domain = table.domain = CrashDomain(
        table,
        timers,
        epoch,
        settings.shared_memory,
        settings.startup,
        settings.restart_after_crash,
        loop.enter,
        loop.give_up,
    )
    stack.callback(loop.domain.close)
    signals = _kernel.signalfd(BLOCKED_SIGNALS)
    stack.callback(os.close, signals)
    stack.callback(_kernel.read_signals, signals)  # a last ^C must not meet the old handlers
    loop.watch_signals(signals)
    for notice in (*settings.notices, *settings.skipped):
        logger.info("%s", notice)
    for image in settings.static:
        slot = view.register(image, time.time_ns())
        if slot < 0:  # Supervisor.register() has counted them; what is left is memory
            logger.error("no memory for a static worker")
        else:
            table.accepted(slot, 0)
    return loop
