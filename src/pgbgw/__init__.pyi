from pgbgw._child import (
    Worker,
    current_worker,
)
from pgbgw.client import (
    Client,
    attach,
)
from pgbgw.errors import (
    AttachError,
    ConfigurationError,
    EntryNotAllowedError,
    InvalidWorkerError,
    JobTimeoutError,
    NoFreeSlotError,
    ParallelLimitError,
    PayloadTooLargeError,
    PgbgwError,
    StartError,
    SupervisorDiedError,
    WaitTimeoutError,
    WorkerCrashedError,
    WorkerFailedError,
    WorkerTerminated,
    WrongProcessError,
)
from pgbgw.handle import WorkerHandle
from pgbgw.supervisor import (
    Supervisor,
)
from pgbgw.watch import (
    Watch,
)
from pgbgw.worker import (
    DEFAULT_RESTART_INTERVAL,
    EXTRA_LEN,
    MAX_PARALLEL_WORKER_LIMIT,
    NAME_MAXLEN,
    NEVER_RESTART,
    BackgroundWorker,
    Flags,
    HandleStatus,
    Outcome,
    Phase,
    ShutdownMode,
    StartTime,
    WorkerInfo,
)

__version__: str

__all__ = [
    "AttachError",
    "BackgroundWorker",
    "Client",
    "ConfigurationError",
    "DEFAULT_RESTART_INTERVAL",
    "EXTRA_LEN",
    "EntryNotAllowedError",
    "Flags",
    "HandleStatus",
    "InvalidWorkerError",
    "JobTimeoutError",
    "MAX_PARALLEL_WORKER_LIMIT",
    "NAME_MAXLEN",
    "NEVER_RESTART",
    "NoFreeSlotError",
    "Outcome",
    "ParallelLimitError",
    "PayloadTooLargeError",
    "PgbgwError",
    "Phase",
    "ShutdownMode",
    "StartError",
    "StartTime",
    "Supervisor",
    "SupervisorDiedError",
    "WaitTimeoutError",
    "Watch",
    "Worker",
    "WorkerCrashedError",
    "WorkerFailedError",
    "WorkerHandle",
    "WorkerInfo",
    "WorkerTerminated",
    "WrongProcessError",
    "attach",
    "current_worker",
]
