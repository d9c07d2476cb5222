"""PostgreSQL's background workers for Python.

One supervisor process, a fixed table of worker slots in shared memory; any process of the same user
registers workers, watches them, waits for them and terminates them.
"""

from __future__ import annotations

__version__ = "0.1.0"

# Where each public name lives; __init__.pyi says the same to type checkers.  Imported on first use:
# a worker does not need the client, and nobody needs all of it.
_HOMES = {
    "_child": ("Worker", "current_worker"),
    "client": ("Client", "attach"),
    "errors": (
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
    ),
    "handle": ("WorkerHandle",),
    "supervisor": ("Supervisor",),
    "watch": ("Watch",),
    "worker": (
        "DEFAULT_RESTART_INTERVAL",
        "EXTRA_LEN",
        "MAX_PARALLEL_WORKER_LIMIT",
        "NAME_MAXLEN",
        "NEVER_RESTART",
        "BackgroundWorker",
        "Flags",
        "HandleStatus",
        "Outcome",
        "Phase",
        "ShutdownMode",
        "StartTime",
        "WorkerInfo",
    ),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(f"{__name__}.{home}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
