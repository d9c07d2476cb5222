"""What a background worker is: its definition, its states, and how it ended.

A `BackgroundWorker` is PostgreSQL's struct of that name.  It is a value: frozen, with its arguments
pickled when it is made, so that nothing the caller does later can change what will run.  `check()`
is SanityCheckBackgroundWorker; what passes it is packed once into the *record image*, the bytes
that a client copies into a slot:

    offset  size  field
         0    96  header: RECORD_HEADER, little endian
        96    96  name     UTF-8, padded with NULs, at least one
       192    96  type     likewise
       288   512  entry    likewise
       800   128  extra    as given, padded with NULs
       928  1024  payload  cut off after its length, made a multiple of 8

The payload is empty, or pickle((env, pickle((args, kwargs)))): a worker can so apply env before it
imports anything that its arguments need.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from enum import Enum, IntEnum, IntFlag
from sys import modules
from types import MethodType

from pgbgw.errors import InvalidWorkerError, PayloadTooLargeError

# Named like typing's, which type checkers accept: importing typing would only cost time.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

__all__ = [
    "DEFAULT_RESTART_INTERVAL",
    "ENTRY_MAXLEN",
    "EXTRA_LEN",
    "MAX_PARALLEL_WORKER_LIMIT",
    "MAX_RESTART_TIME",
    "MAX_WORKER_PROCESSES_LIMIT",
    "NAME_MAXLEN",
    "NEVER_RESTART",
    "OUTCOME_KINDS",
    "PAYLOAD_MAX",
    "BackgroundWorker",
    "Flags",
    "HandleStatus",
    "Outcome",
    "Phase",
    "ShutdownMode",
    "StartTime",
    "WorkerInfo",
]

NEVER_RESTART: Final = None  # BGW_NEVER_RESTART
DEFAULT_RESTART_INTERVAL: Final = 60  # seconds: a suggestion for callers, never applied
NAME_MAXLEN: Final = 96  # BGW_MAXLEN: UTF-8 bytes of a name or type, the final NUL counted
EXTRA_LEN: Final = 128  # BGW_EXTRALEN
ENTRY_MAXLEN: Final = 512  # UTF-8 bytes, the final NUL counted
PAYLOAD_MAX: Final = 1024
MAX_RESTART_TIME: Final = 86_400_000  # seconds; PostgreSQL's USECS_PER_DAY / 1000, so 1000 days
MAX_WORKER_PROCESSES_LIMIT: Final = 262_143
MAX_PARALLEL_WORKER_LIMIT: Final = 1024


class Flags(IntFlag):
    """What a worker needs, and how it is counted."""

    NONE = 0
    SHMEM_ACCESS = 1
    """It has the domain's shared memory; its crash resets all workers that have it."""
    DATABASE_CONNECTION = 2
    """It may connect to a database; needs SHMEM_ACCESS."""
    CLASS_PARALLEL = 0x10
    """It counts against max_parallel_workers, and is never restarted."""


class StartTime(IntEnum):
    """The earliest phase in which a worker may be launched."""

    SUPERVISOR_START = 0
    CONSISTENT_STATE = 1
    RECOVERY_FINISHED = 2


class HandleStatus(Enum):
    """What a handle can say of its worker (BgwHandleStatus)."""

    STARTED = "started"
    NOT_YET_STARTED = "not_yet_started"
    STOPPED = "stopped"
    SUPERVISOR_DIED = "supervisor_died"


class Phase(IntEnum):
    """Where the supervisor is in its life."""

    STARTUP = 0
    CONSISTENT = 1
    RUNNING = 2
    STOPPING = 3


class ShutdownMode(IntEnum):
    """How the supervisor was asked to stop; a larger one overrides a smaller one."""

    NONE = 0
    SMART = 1
    FAST = 2
    IMMEDIATE = 3


OUTCOME_KINDS: Final = (  # the index is the code in shared memory
    "none",
    "exited",
    "signaled",
    "rejected",
    "cancelled",
    "launch_failed",
    "lost",
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Why a worker stopped the last time, and whether that was for good."""

    kind: str  # one of OUTCOME_KINDS
    exitcode: int | None
    signal: int | None
    error: str | None  # the tail of a traceback, or why it was rejected or not launched
    at: float  # Unix time
    restarts: int
    final: bool  # it will never run again

    @property
    def status(self) -> int:
        """The exit status that a shell would report: the exit code, 128 + signal, or else 1."""
        if self.exitcode is not None:
            return self.exitcode
        return 1 if self.signal is None else 128 + self.signal

    def __str__(self) -> str:
        why = f": {self.error}" if self.error else ""
        match self.kind:
            case "exited":
                return f"exited with code {self.exitcode}"
            case "signaled":
                return f"killed by {_signal_name(self.signal)}"
            case "rejected":
                return f"rejected{why}"
            case "cancelled":
                return "cancelled before it started"
            case "launch_failed":
                return f"could not be launched{why}"
            case "lost":
                return "outcome lost"
            case _:
                return "has not stopped yet"


def _signal_name(signum: int | None) -> str:
    import signal

    try:
        return signal.Signals(signum or 0).name
    except ValueError:  # most real-time signals have no name
        return f"signal {signum}"


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """One worker as an observer sees it; all times are Unix times."""

    slot: int
    generation: int
    pid: int | None
    name: str
    type: str
    status: HandleStatus
    ready: bool
    restarts: int
    flags: Flags
    start_time: StartTime
    restart_time: float | None  # seconds
    registered_at: float
    started_at: float | None
    activity: str
    outcome: Outcome | None


# version, flags, start_time, notify, the lengths of name, type, entry, extra, payload;
# restart interval and stop timeout in ns (-1: never), main_arg, registered (ns, by the client)
RECORD_HEADER = struct.Struct("<9I4xqqQQ24x")
RECORD_NAME: Final = 96
RECORD_TYPE: Final = 192
RECORD_ENTRY: Final = 288
RECORD_EXTRA: Final = 800
RECORD_PAYLOAD: Final = 928
RECORD_SIZE: Final = 2048  # what a slot has room for

_RECORD_VERSION: Final = 1
_RECORD = struct.Struct(
    f"{RECORD_HEADER.format}{NAME_MAXLEN}s{NAME_MAXLEN}s{ENTRY_MAXLEN}s{EXTRA_LEN}s"
)
_NOTIFY_END: Final = 16  # of the header's fourth word


class _Prepared:
    """What a worker carries besides its fields; kept apart so that they stay no fields.

    All but the payload are made when first asked for, by BackgroundWorker.__getattr__.
    """

    __slots__ = ("_parallel", "_payload", "_record")
    _payload: bytes
    _record: bytes
    _parallel: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class BackgroundWorker(_Prepared):
    """The definition of a worker, as one registers it.

    `entry` is the callable that the worker runs, or its name "package.module:function"; a callable
    must be importable by name and becomes that name.  `name` defaults to the entry, cut to what a
    name has room for, and `type` to the name.  These are filled in here, so that registering
    changes nothing; dataclasses.replace() carries them over as any other value, unless it is told
    name="" or type="".  `args`, `kwargs` and `env` are pickled here, once.

    Raises InvalidWorkerError for what cannot be named or pickled; all else is left to check().
    """

    entry: str | Callable[..., object]
    name: str = ""
    type: str = ""
    # No repr: these may be large, secret, or not unpickled yet.  No hash: they seldom have one.
    args: tuple[object, ...] = field(default=(), repr=False, hash=False)
    kwargs: Mapping[str, object] = field(default_factory=dict, repr=False, hash=False)
    main_arg: int = 0
    extra: bytes = b""
    flags: Flags = Flags.NONE
    start_time: StartTime = StartTime.RECOVERY_FINISHED
    restart_time: float | None = NEVER_RESTART
    notify: bool | None = None
    stop_timeout: float | None = None
    env: Mapping[str, str] = field(default_factory=dict, repr=False, hash=False)

    def __post_init__(self) -> None:
        if callable(self.entry):
            _store(self, "entry", _name_of(self.entry, self.name))
        if self.name == "":
            _store(self, "name", _cut(str(self.entry)))
        if self.type == "":
            _store(self, "type", self.name)
        # What is mutable becomes a copy of our own: the caller may go on with his.
        extra: object = self.extra
        if isinstance(extra, (bytearray, memoryview)):
            _store(self, "extra", bytes(extra))
        _store(self, "args", _as_tuple(self, self.args))
        _store(self, "kwargs", _as_dict(self, "kwargs", self.kwargs))
        _store(self, "env", _as_dict(self, "env", self.env))
        payload = _pickled(self) if self.args or self.kwargs or self.env else b""
        _store(self, "_payload", payload)

    def check(self) -> None:
        """Refuse a definition that can never run (SanityCheckBackgroundWorker).

        The first fault found is the one reported, in PostgreSQL's order and then ours.  Raises
        InvalidWorkerError, or PayloadTooLargeError if only the arguments are too large.
        """
        record = _pack(self)
        _store(self, "_parallel", int(self.flags) & _PARALLEL != 0)
        _store(self, "_record", record)

    def check_static(self) -> None:
        """check(), and refuse what only a dynamic worker can have: somebody to notify."""
        self.check()
        if self.notify:
            what = "only dynamic background workers can request notification"
            raise _invalid(self, what, hint="leave notify out; anybody attached may wait for it")

    @property
    def library_name(self) -> str:
        """The module that has the entry (bgw_library_name)."""
        return str(self.entry).partition(":")[0]

    @property
    def function_name(self) -> str:
        """What the entry is called in its module (bgw_function_name)."""
        return str(self.entry).partition(":")[2]

    if not TYPE_CHECKING:  # a checker would take any misspelt attribute for one of these

        def __getattr__(self, name: str) -> object:
            # Python asks here only for a slot that is still empty.
            if name in ("_record", "_parallel"):
                self.check()
            elif name in _PICKLED:
                _unpickle(self, name)
            else:
                raise AttributeError(f"a BackgroundWorker has no attribute {name!r}")
            return object.__getattribute__(self, name)

    def __reduce__(self) -> tuple[object, ...]:
        # The arguments travel as they are, pickled: only who asks for them needs their modules.
        return _restore, (self._payload, {key: getattr(self, key) for key in _PLAIN})

    def _static_record(self) -> bytes:
        """The record image of a static worker, which notifies nobody; checked."""
        self.check_static()
        record = self._record
        return record[: _NOTIFY_END - 4] + bytes(4) + record[_NOTIFY_END:]

    @classmethod
    def _from_record(cls, record: bytes) -> BackgroundWorker:
        """The worker that a record image describes, for the worker itself; checks nothing.

        The arguments stay pickled until somebody asks for them.
        """
        header = RECORD_HEADER.unpack_from(record)
        _, flags, start_time, notify = header[:4]
        name_len, type_len, entry_len, extra_len, payload_len = header[4:9]
        restart_ns, stop_timeout_ns, main_arg, _ = header[9:]

        def text(start: int, length: int) -> str:
            return record[start : start + length].decode("utf-8", "replace")

        values: dict[str, object] = {
            "entry": text(RECORD_ENTRY, entry_len),
            "name": text(RECORD_NAME, name_len),
            "type": text(RECORD_TYPE, type_len),
            "main_arg": main_arg,
            "extra": record[RECORD_EXTRA : RECORD_EXTRA + extra_len],
            "flags": Flags(flags),
            "start_time": StartTime(start_time),
            "restart_time": _seconds(restart_ns),
            "notify": bool(notify),
            "stop_timeout": _seconds(stop_timeout_ns),
        }
        return _restore(record[RECORD_PAYLOAD : RECORD_PAYLOAD + payload_len], values)

    def _load_arguments(self) -> tuple[tuple[object, ...], Mapping[str, object]]:
        """(args, kwargs), unpickled if need be, with whatever errors that raises."""
        return self.args, self.kwargs

    def _load_env(self) -> dict[str, str]:
        """The environment's additions, without unpickling the arguments."""
        return dict(self.env)


_store = object.__setattr__  # past the frozen dataclass's own
_PICKLED: Final = ("args", "kwargs", "env")
_PLAIN: Final = tuple(f.name for f in fields(BackgroundWorker) if f.name not in _PICKLED)

# Plain integers: an IntFlag's operators are Python functions.
_SHMEM: Final = int(Flags.SHMEM_ACCESS)
_DATABASE: Final = int(Flags.DATABASE_CONNECTION)
_PARALLEL: Final = int(Flags.CLASS_PARALLEL)
_KNOWN_FLAGS: Final = _SHMEM | _DATABASE | _PARALLEL


def _restore(payload: bytes, values: dict[str, object]) -> BackgroundWorker:
    """A worker from a pickle or a record; its args, kwargs and env are still to be unpickled."""
    worker = BackgroundWorker.__new__(BackgroundWorker)
    for key, value in values.items():
        _store(worker, key, value)
    _store(worker, "_payload", payload)
    return worker


def _as_tuple(worker: BackgroundWorker, given: object) -> tuple[object, ...]:
    if not isinstance(given, (tuple, list)):  # a string is a sequence, too, and a slip here
        raise _invalid(worker, f"args must be a tuple, not {_kind(given)}")
    return tuple(given)


def _as_dict(worker: BackgroundWorker, key: str, given: object) -> dict[object, object]:
    if not isinstance(given, (dict, Mapping)):  # Mapping alone is slow to ask
        raise _invalid(worker, f"{key} must be a mapping, not {_kind(given)}")
    for word in given:
        if not isinstance(word, str):
            raise _invalid(worker, f"{key} must have strings as keys, not {_kind(word)}")
    return dict(given)


def _pickled(worker: BackgroundWorker) -> bytes:
    from pickle import dumps

    try:
        return dumps((worker.env, dumps((worker.args, worker.kwargs), -1)), -1)
    except Exception as error:  # whatever a __reduce__ may raise
        what = f"could not pickle its arguments: {error}"
        raise _invalid(worker, what, hint="pass plain data, or use Executor") from error


def _unpickle(worker: BackgroundWorker, wanted: str) -> None:
    """Fill the slot of `wanted`, and no more than that needs: env must do without the arguments."""
    env: dict[str, str] = {}
    args: tuple[object, ...] = ()
    kwargs: dict[str, object] = {}
    if worker._payload:
        from pickle import loads

        env, arguments = loads(worker._payload)
        if wanted != "env":
            args, kwargs = loads(arguments)
    if wanted == "env":
        _store(worker, "env", env)
    else:
        _store(worker, "args", args)
        _store(worker, "kwargs", kwargs)


def _name_of(entry: Callable[..., object], name: str) -> str:
    """The "module:qualname" by which a worker will find this callable, or InvalidWorkerError."""
    module = getattr(entry, "__module__", None)
    qualname = getattr(entry, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(qualname, str):
        why = "has no name that a worker could import"
    elif "<" in qualname:  # <lambda>, f.<locals>.g
        why = "is a lambda, or is defined inside a function"
    elif module == "__main__":
        why = "is defined in __main__, which a worker does not run"
    else:
        found: object = modules.get(module)
        for part in qualname.split("."):
            found = getattr(found, part, None)
        # A bound class method is made anew at each look.
        if found is entry or (isinstance(found, MethodType) and found == entry):
            return f"{module}:{qualname}"
        why = f'is not what "{module}:{qualname}" names'
    raise InvalidWorkerError(f"{_quoted(name or _value(entry))}: the entry {why}", hint=_MOVE)


def _cut(text: str) -> str:
    """As much of the text as a name has room for; a character is never split."""
    raw = text.encode("utf-8", "replace")
    return text if len(raw) < NAME_MAXLEN else raw[: NAME_MAXLEN - 1].decode("utf-8", "ignore")


def _shown(text: object) -> str:
    """Something fit for a message: not too long, and on one line."""
    return "".join(c if c.isprintable() else "?" for c in str(text)[: NAME_MAXLEN - 1])


def _value(value: object) -> str:
    """The repr of a wrong value, or its class: an integer of 5000 digits has no repr."""
    try:
        return _shown(repr(value))
    except Exception:
        return f"some {_kind(value)}"


def _quoted(name: object) -> str:
    return f'background worker "{_shown(name)}"'


def _kind(value: object) -> str:
    return value.__class__.__name__


def _invalid(
    worker: BackgroundWorker, what: str, *, detail: str | None = None, hint: str | None = None
) -> InvalidWorkerError:
    return InvalidWorkerError(f"{_quoted(worker.name)}: {what}", detail=detail, hint=hint)


def _pack(worker: BackgroundWorker) -> bytes:
    """The record image of a definition, or the first fault found in it."""
    _check_as_postgres(worker)
    _check_flags_and_start(worker)
    entry = _text(worker, "entry", ENTRY_MAXLEN)
    _check_entry(worker)
    name = _text(worker, "name", NAME_MAXLEN)
    type_ = _text(worker, "type", NAME_MAXLEN)
    _check_numbers_and_extra(worker)
    _check_env(worker)
    extra, payload = worker.extra, worker._payload
    if len(payload) > PAYLOAD_MAX:
        raise PayloadTooLargeError(
            f"{_quoted(worker.name)}: args, kwargs and env are too large",
            detail=f"pickled they take {len(payload)} bytes; there is room for {PAYLOAD_MAX}",
            hint="pass a reference to the data, such as a path, or use Executor",
        )
    lengths = len(name), len(type_), len(entry), len(extra), len(payload)
    restart, timeout = _nanoseconds(worker.restart_time), _nanoseconds(worker.stop_timeout)
    head = _RECORD.pack(
        _RECORD_VERSION, worker.flags, worker.start_time, worker.notify is not False, *lengths,
        restart, timeout, worker.main_arg, 0, name, type_, entry, extra,
    )  # fmt: skip
    return head + payload + bytes(-len(payload) % 8)


def _check_as_postgres(worker: BackgroundWorker) -> None:
    """SanityCheckBackgroundWorker: its order and, nearly, its words."""
    given: object = worker.flags
    flags = int(given) if isinstance(given, int) else 0  # other kinds: the next function
    if flags & _DATABASE:
        if not flags & _SHMEM:
            what = "must attach to shared memory in order to request a database connection"
            raise _invalid(worker, what, hint="add Flags.SHMEM_ACCESS")
        if worker.start_time == StartTime.SUPERVISOR_START:
            what = "cannot request database access if starting at supervisor start"
            raise _invalid(worker, what, hint="use StartTime.CONSISTENT_STATE or later")
    if not _is_interval(worker.restart_time):
        detail = f"restart_time is {_value(worker.restart_time)}; {_INTERVALS}"
        raise _invalid(worker, "invalid restart interval", detail=detail)
    if flags & _PARALLEL and worker.restart_time is not NEVER_RESTART:
        what = "parallel workers may not be configured for restart"
        raise _invalid(worker, what, hint="drop restart_time, or Flags.CLASS_PARALLEL")


def _check_flags_and_start(worker: BackgroundWorker) -> None:
    flags: object = worker.flags
    start_time: object = worker.start_time
    if not isinstance(flags, int):
        raise _invalid(worker, f"flags must be Flags, not {_kind(flags)}")
    if unknown := int(flags) & ~_KNOWN_FLAGS:
        raise _invalid(worker, f"unknown flags {unknown:#x}")
    if not isinstance(start_time, StartTime):
        raise _invalid(worker, f"start_time must be a StartTime, not {_value(start_time)}")


def _text(worker: BackgroundWorker, key: str, limit: int) -> bytes:
    """The UTF-8 bytes of the field `key`; the limit counts a final NUL."""
    text = getattr(worker, key)
    if not isinstance(text, str):
        raise _invalid(worker, f"{key} must be a string, not {_kind(text)}")
    try:
        raw = text.encode()
    except UnicodeEncodeError as error:
        raise _invalid(worker, f"{key} cannot be encoded as UTF-8", detail=str(error)) from None
    if 0 in raw:
        raise _invalid(worker, f"{key} contains a NUL character")
    if len(raw) >= limit:
        detail = f"it takes {len(raw)} bytes in UTF-8; there is room for {limit - 1}"
        raise _invalid(worker, f"{key} is too long", detail=detail)
    return raw


def _check_entry(worker: BackgroundWorker) -> None:
    for half in (worker.library_name, worker.function_name):
        if not all(part.isidentifier() for part in half.split(".")):
            what = f'entry "{_shown(worker.entry)}" is not the name of a function'
            raise _invalid(worker, what, hint='write it as "package.module:function"')
    if worker.library_name == "__main__":
        raise _invalid(worker, "the entry is in __main__, which a worker does not run", hint=_MOVE)


def _check_numbers_and_extra(worker: BackgroundWorker) -> None:
    main_arg: object = worker.main_arg
    extra: object = worker.extra
    notify: object = worker.notify
    timeout = worker.stop_timeout
    if not isinstance(main_arg, int) or not 0 <= main_arg < 1 << 64:
        what = f"main_arg must be an unsigned 64-bit integer, not {_value(main_arg)}"
        raise _invalid(worker, what)
    if not isinstance(extra, bytes):
        raise _invalid(worker, f"extra must be bytes, not {_kind(extra)}")
    if len(extra) > EXTRA_LEN:
        detail = f"it has {len(extra)} bytes; there is room for {EXTRA_LEN}"
        raise _invalid(worker, "extra is too long", detail=detail)
    if not _is_interval(timeout):
        detail = f"stop_timeout is {_value(timeout)}; {_INTERVALS}"
        raise _invalid(worker, "invalid stop timeout", detail=detail)
    if notify is not None and not isinstance(notify, bool):
        raise _invalid(worker, f"notify must be True, False or None, not {_kind(notify)}")


def _check_env(worker: BackgroundWorker) -> None:
    env: Mapping[str, object] = worker.env
    for key, value in env.items():
        if not isinstance(value, str):
            what = f"env must map strings to strings, not {_value(key)} to {_kind(value)}"
            raise _invalid(worker, what)
        if not key or "=" in key or "\0" in key or "\0" in value:
            raise _invalid(worker, f"env has {_value(key)}, which no environment can hold")
        try:
            (key + value).encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:
            what = f"env has {_value(key)}, which cannot be encoded"
            raise _invalid(worker, what) from None


_INTERVALS: Final = f"it may be None (never) or 0 to {MAX_RESTART_TIME} seconds"
_MOVE: Final = "put it into a module, as a function, or use Executor"


def _is_interval(value: object) -> bool:
    """Whether this is None or a number of seconds that PostgreSQL would take; not so NaN."""
    if value is None:
        return True
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return 0 <= value <= MAX_RESTART_TIME


def _nanoseconds(seconds: float | None) -> int:
    return -1 if seconds is None else round(seconds * 1_000_000_000)


def _seconds(nanoseconds: int) -> float | None:
    return None if nanoseconds < 0 else nanoseconds / 1_000_000_000
