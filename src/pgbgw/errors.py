"""Every exception of pgbgw.

PgbgwError                  .detail, .hint; picklable; message in lower case, without a full stop
├─ InvalidWorkerError       also ValueError: a definition that can never run
├─ PayloadTooLargeError     args, kwargs and env do not fit into the record
├─ NoFreeSlotError          .handles; try later, or raise the setting that the hint names
├─ ParallelLimitError       .handles; likewise
├─ EntryNotAllowedError     the supervisor's allow list does not have this entry
├─ ConfigurationError       also ValueError: arguments of the supervisor, or its TOML file
├─ StartError               the supervisor failed before it accepted connections
├─ AttachError              no supervisor to talk to
├─ WrongProcessError        also RuntimeError: called where or when it cannot work
├─ SupervisorDiedError      also BrokenExecutor: what was waited for will never come
├─ WaitTimeoutError         also TimeoutError: the wait ended, not what was waited for
├─ JobTimeoutError          also TimeoutError: a job ran longer than it was given
└─ WorkerFailedError        .exitcode, .signal; a remote traceback is __cause__
   └─ WorkerCrashedError    also BrokenProcessPool: died of a signal, or without a word

WorkerTerminated stands apart: a SystemExit, raised in a worker that is asked to stop.

A running supervisor raises none of these: it logs.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import BrokenExecutor

# Named like typing's, which type checkers accept: importing typing would only cost time.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from concurrent.futures.process import BrokenProcessPool

__all__ = [
    "AttachError",
    "ConfigurationError",
    "EntryNotAllowedError",
    "InvalidWorkerError",
    "JobTimeoutError",
    "NoFreeSlotError",
    "ParallelLimitError",
    "PayloadTooLargeError",
    "PgbgwError",
    "StartError",
    "SupervisorDiedError",
    "WaitTimeoutError",
    "WorkerCrashedError",
    "WorkerFailedError",
    "WorkerTerminated",
    "WrongProcessError",
]


class PgbgwError(Exception):
    """What every error of pgbgw is: a message, perhaps with the numbers and with advice.

    The detail and the hint are notes as well, so that a traceback shows them.  Guaranteed to be
    picklable, subclasses and their attributes included: Exception's own pickling calls the class
    with the message alone and then restores the attributes, the notes among them, so nothing is
    noted twice.  A subclass must therefore be callable with just a message.
    """

    def __init__(self, message: str, *, detail: str | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.detail = detail
        self.hint = hint
        if detail is not None:
            self.add_note(f"detail: {detail}")
        if hint is not None:
            self.add_note(f"hint: {hint}")


class InvalidWorkerError(PgbgwError, ValueError):
    """A worker is defined in a way that can never run."""


class PayloadTooLargeError(PgbgwError):
    """A worker's args, kwargs and env, pickled, do not fit into its record."""


class NoFreeSlotError(PgbgwError):
    """All slots of the table are taken; `handles` are those that register_many() did make."""

    def __init__(
        self,
        message: str,
        *,
        handles: Iterable[object] = (),
        detail: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message, detail=detail, hint=hint)
        self.handles = list(handles)


class ParallelLimitError(PgbgwError):
    """max_parallel_workers is reached; `handles` are those that register_many() did make."""

    def __init__(
        self,
        message: str,
        *,
        handles: Iterable[object] = (),
        detail: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message, detail=detail, hint=hint)
        self.handles = list(handles)


class EntryNotAllowedError(PgbgwError):
    """The supervisor's allow list does not have the entry that was asked for."""


class ConfigurationError(PgbgwError, ValueError):
    """An argument of the supervisor, or a key of its TOML file, is wrong."""


class StartError(PgbgwError):
    """The supervisor failed before it accepted connections."""


class AttachError(PgbgwError):
    """There is no supervisor to talk to, or no client of it in this process."""


class WrongProcessError(PgbgwError, RuntimeError):
    """Called in a process, or at a time, where it cannot work."""


class SupervisorDiedError(PgbgwError, BrokenExecutor):
    """The supervisor is dead: what was waited for will never come."""


class WaitTimeoutError(PgbgwError, TimeoutError):
    """The time given to a wait is over."""


class JobTimeoutError(PgbgwError, TimeoutError):
    """A job ran longer than the time it was given, and was stopped."""


class WorkerFailedError(PgbgwError):
    """A worker ended in failure: with `exitcode`, or by `signal`; the other one is None."""

    def __init__(
        self,
        message: str,
        *,
        exitcode: int | None = None,
        signal: int | None = None,
        detail: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message, detail=detail, hint=hint)
        self.exitcode = exitcode
        self.signal = signal


if TYPE_CHECKING:

    class WorkerCrashedError(WorkerFailedError, BrokenProcessPool):
        """A worker died of a signal, or without a word."""


class WorkerTerminated(SystemExit):
    """Raised in a worker by SIGTERM, at the next safe point: its exit code will be 1.

    Not an error: code that cleans up in `finally` or `with` runs, `except Exception` does not
    swallow it.  It is raised once: a worker that swallows it all the same (`except BaseException`)
    goes on until it ends by itself, or is killed after a grace.
    """

    __module__ = "pgbgw"

    def __init__(self, message: str = "terminated") -> None:
        super().__init__(message)
        self.code = 1


def __getattr__(name: str) -> object:
    # WorkerCrashedError is made when it is first asked for: its second base costs the import of
    # multiprocessing, which hardly any user of this package needs.
    if name != "WorkerCrashedError":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from concurrent.futures.process import BrokenProcessPool

    made = type(
        name,
        (WorkerFailedError, BrokenProcessPool),
        {"__doc__": "A worker died of a signal, or without a word.", "__module__": _PUBLIC},
    )
    # Whoever asks first wins, so that two threads never see two classes.
    return globals().setdefault(name, made)


# Tracebacks and pickles name the place that users import from.
_PUBLIC = "pgbgw"
for _name in __all__:
    if _name in globals():
        globals()[_name].__module__ = _PUBLIC
del _name
