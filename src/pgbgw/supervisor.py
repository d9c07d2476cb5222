"""The supervisor, as its user sees it: configure it, register static workers, start or be it."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from math import isfinite
from typing import TYPE_CHECKING, Any

from pgbgw import _runtime
from pgbgw._launch import fill_standard_descriptors, interpreter_command
from pgbgw._serve import Settings, serve
from pgbgw._systemd import Systemd
from pgbgw.errors import (
    AttachError,
    ConfigurationError,
    InvalidWorkerError,
    NoFreeSlotError,
    ParallelLimitError,
    PgbgwError,
    StartError,
    WrongProcessError,
)
from pgbgw.worker import (
    MAX_PARALLEL_WORKER_LIMIT,
    MAX_WORKER_PROCESSES_LIMIT,
    BackgroundWorker,
    Flags,
    ShutdownMode,
)

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from pgbgw.client import Client

MAX_SHARED_MEMORY = 1 << 46
_NO_OVERRIDES: Mapping[str, Any] = {}


class Supervisor:
    """A supervisor to be: PostgreSQL's postmaster, without the database.

    max_worker_processes
        slots of the table, 1 to 262 143; fixed while it runs
    max_parallel_workers
        how many registrations of Flags.CLASS_PARALLEL there may be at once, 0 to 1024
    address
        a name in the runtime directory or the path of a socket; None: a private one with start(),
        "default" with run()
    preload
        modules to import before anything is forked; all workers share their memory
    startup
        "module:function", run as the startup worker: RUNNING is reached when it returns
    start_method
        "fork", or "spawn" for a fresh interpreter per worker
    spares
        how many processes to start ahead, each for one worker: a launch is then one message
    allow
        patterns of the entry points that clients may ask for ("mylib.*"); None: any
    shared_memory
        bytes of memory that all workers with Flags.SHMEM_ACCESS share
    restart_after_crash
        False: the crash of a worker with SHMEM_ACCESS ends the supervisor, with status 1
    post_auth_delay
        seconds that a worker sleeps before it does anything: time to attach a debugger
    cgroup
        a cgroup v2 directory that this user may write to: whatever a worker has started then ends
        with it, and with the supervisor; None: see docs/security.md for what may stay
    """

    def __init__(
        self,
        *,
        max_worker_processes: int = 8,
        max_parallel_workers: int = 8,
        address: str | os.PathLike[str] | None = None,
        preload: Sequence[str] = (),
        startup: str | Callable[..., object] | None = None,
        start_method: str = "fork",
        spares: int = 0,
        allow: Sequence[str] | None = None,
        shared_memory: int = 0,
        restart_after_crash: bool = True,
        post_auth_delay: float = 0.0,
        cgroup: str | os.PathLike[str] | None = None,
    ) -> None:
        _check_integer("max_worker_processes", max_worker_processes, 1, MAX_WORKER_PROCESSES_LIMIT)
        _check_integer("max_parallel_workers", max_parallel_workers, 0, MAX_PARALLEL_WORKER_LIMIT)
        _check_integer("shared_memory", shared_memory, 0, MAX_SHARED_MEMORY)
        _check_integer("spares", spares, 0, MAX_WORKER_PROCESSES_LIMIT)
        if start_method not in ("fork", "spawn"):
            raise ConfigurationError(
                f"start_method must be 'fork' or 'spawn', not {start_method!r}"
            )
        if not _is_delay(post_auth_delay):
            raise ConfigurationError(
                f"post_auth_delay must be 0 to 3600 seconds, not {post_auth_delay!r}"
            )
        if startup is not None:
            worker = BackgroundWorker(entry=startup)
            worker.check()
            startup = str(worker.entry)
        if cgroup is not None and not os.fspath(cgroup):
            raise ConfigurationError("cgroup must name a directory")
        self._address = None if address is None else _runtime.resolve(address)
        self._settings = Settings(
            address="",
            max_worker_processes=max_worker_processes,
            max_parallel_workers=max_parallel_workers,
            preload=_strings("preload", preload),
            startup=startup,
            start_method=start_method,
            spares=spares,
            allow=None if allow is None else _strings("allow", allow),
            shared_memory=shared_memory,
            restart_after_crash=bool(restart_after_crash),
            post_auth_delay=float(post_auth_delay),
            cgroup=None if cgroup is None else os.path.abspath(cgroup),
        )
        self._parallel = 0
        self._started = False
        self._client: Client | None = None

    @classmethod
    def from_toml(
        cls, path: str | os.PathLike[str], *, overrides: Mapping[str, Any] = _NO_OVERRIDES
    ) -> Self:
        """The supervisor that a TOML file describes.

        overrides: arguments of Supervisor that win over the file's.  ConfigurationError for a file
        that cannot be understood.  A worker in it that cannot run, or is one too many, is logged at
        the start and skipped.
        """
        from pgbgw import config

        arguments, workers = config.load(path)
        try:
            supervisor = cls(**{**arguments, **overrides})
        except (ConfigurationError, InvalidWorkerError) as exc:
            place = f"{os.fsdecode(path)}: [supervisor]"
            raise ConfigurationError(f"{place}: {exc}", detail=exc.detail, hint=exc.hint) from exc
        for worker, problem in workers:
            if worker is None:
                supervisor._settings.skipped.append(problem)
                continue
            try:
                supervisor.register(worker)
            except PgbgwError as exc:
                why = ": ".join(filter(None, (str(exc), exc.detail)))
                hint = f" ({exc.hint})" if exc.hint else ""
                supervisor._settings.skipped.append(f"{why}{hint}")
        return supervisor

    def register(self, worker: BackgroundWorker) -> None:
        """Add a static worker, launched in the order of these calls (RegisterBackgroundWorker).

        Only before the start.  Raises InvalidWorkerError, NoFreeSlotError beyond
        max_worker_processes, ParallelLimitError beyond max_parallel_workers.
        """
        if self._started:
            raise WrongProcessError(
                f'background worker "{worker.name}": must be registered before the start',
                hint="Use Client.register() for a dynamic worker.",
            )
        if not isinstance(worker, BackgroundWorker):
            raise TypeError(f"register() takes a BackgroundWorker, not {worker!r}")
        image = worker._static_record()
        limit = self._settings.max_worker_processes
        if len(self._settings.static) >= limit:
            raise NoFreeSlotError(
                f'background worker "{worker.name}": too many background workers',
                detail=f"up to {limit} background workers can be registered with these settings",
                hint="Consider increasing max_worker_processes.",
            )
        if worker.flags & Flags.CLASS_PARALLEL:
            if self._parallel >= self._settings.max_parallel_workers:
                raise ParallelLimitError(
                    f'background worker "{worker.name}": too many parallel workers',
                    detail=f"up to {self._settings.max_parallel_workers} may be registered",
                    hint="Consider increasing max_parallel_workers.",
                )
            self._parallel += 1
        self._settings.static.append(image)

    @property
    def static_workers(self) -> int:
        """How many static workers are registered."""
        return len(self._settings.static)

    @property
    def skipped(self) -> list[str]:
        """What is wrong with each worker of the TOML file that will not run."""
        return list(self._settings.skipped)

    def run(self) -> int:
        """Become the supervisor, in this process and its main thread; the exit status.

        Raises StartError if it cannot: an address in use, threads, a module that does not preload.
        """
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        try:
            return self._run()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def _run(self) -> int:
        """run(), for who exits afterwards: stop signals stay blocked."""
        self._begin()
        address = self._address or _runtime.resolve("default")
        self._settings.address = address.path
        self._settings.log_level = _log_level()
        systemd = Systemd()

        def accepts() -> None:
            systemd.tell("READY=1", f"STATUS=accepting connections at {address}")

        def stops(mode: ShutdownMode) -> None:
            # A smart shutdown serves on, for any length of time; from STOPPING on systemd's
            # TimeoutStopSec runs.
            begun = [] if mode == ShutdownMode.SMART else ["STOPPING=1"]
            systemd.tell(*begun, f"STATUS={mode.name.lower()} shutdown")

        return serve(self._settings, accepts=accepts, stops=stops)

    def start(self) -> Client:
        """Start a supervisor that this process owns, and attach to it.

        It is a fresh interpreter in a session of its own, with this process's sys.path, working
        directory and environment; nobody's `__main__` is run again.  It stops when this process
        ends.  Returns once it accepts connections; raises StartError if it never will.
        """
        from pgbgw.client import attach

        self._begin()
        address = self._address or _runtime.private()
        self._settings.address = address.path
        process = _start_process(self._settings)
        try:
            client = attach(address.path)
        except AttachError as exc:  # its startup worker has failed already, above all
            status = _wait_or_kill(process)
            raise StartError(
                "the supervisor stopped as soon as it had started",
                detail=f"its exit status is {status}",
                hint="Its messages are on stderr.",
            ) from exc
        except BaseException:
            process.kill()
            process.wait()
            raise
        client._own(process)
        return client

    def _begin(self) -> None:
        if self._started:
            raise WrongProcessError(
                "this supervisor was started already", hint="Make a new Supervisor."
            )
        self._started = True

    def __enter__(self) -> Client:
        self._client = self.start()
        return self._client

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        client, self._client = self._client, None
        if client is not None:
            if client._view.usable:
                client.stop("fast")
                client.close()
            elif client._process is not None:  # closed in the block: SIGINT means fast, too
                client._process.send_signal(signal.SIGINT)
                client._process.wait()


def _start_process(settings: Settings) -> subprocess.Popen[bytes]:
    """Exec the supervisor; return when it accepts connections.  StartError otherwise."""
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    path = [os.path.abspath(p) for p in sys.path]
    if package not in path:  # found by an import hook, as in an editable install
        path.append(package)
    filled = fill_standard_descriptors()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ExitStack() as stack:
        for fd in filled:
            stack.callback(os.close, fd)
        file = stack.enter_context(tempfile.TemporaryFile())
        for end in (ours, theirs):
            stack.enter_context(end)
        settings.log_level = _log_level()
        file.write(settings.to_json())
        file.seek(0)
        myself = os.pidfd_open(os.getpid())
        try:
            fds = (file.fileno(), theirs.fileno(), myself)
            process = subprocess.Popen(
                interpreter_command("pgbgw._serve", "serve_started", path, *map(str, fds)),
                stdin=subprocess.DEVNULL,
                pass_fds=fds,
                start_new_session=True,
            )
        finally:
            os.close(myself)
        theirs.close()
        try:
            answer = ours.recv(65536)
        except BaseException:
            process.kill()
            process.wait()
            raise
    if not answer:
        raise StartError(
            "the supervisor ended before it accepted connections",
            detail=f"its exit status is {process.wait()}",
            hint="Its messages are on stderr.",
        )
    problem: dict[str, Any] = json.loads(answer)
    if problem:
        process.wait()
        raise StartError(problem["message"], detail=problem["detail"], hint=problem["hint"])
    return process


def _wait_or_kill(process: subprocess.Popen[bytes]) -> int:
    """The exit status of a supervisor that stops by itself, or is made to."""
    try:
        return process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _log_level() -> int:
    """The level of the logger "pgbgw"; a logger that nobody configured has WARNING: too little."""
    return min(logging.getLogger("pgbgw").getEffectiveLevel(), logging.INFO)


def _check_integer(name: str, value: object, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ConfigurationError(f"{name} must be {least} to {most}, not {value!r}")


def _is_delay(value: object) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and isfinite(value) and 0 <= value <= 3600  # type: ignore[arg-type, operator]


def _strings(name: str, given: object) -> list[str]:
    values = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else [given]
    if isinstance(given, str) or any(not isinstance(v, str) or not v for v in values):
        raise ConfigurationError(f"{name} must be a sequence of names, not {given!r}")
    return [str(value) for value in values]
