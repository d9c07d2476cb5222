from pgbgw._child import (
    Worker as Worker,
)
from pgbgw._child import (
    current_worker as current_worker,
)
from pgbgw.client import (
    Client as Client,
)
from pgbgw.client import (
    WorkerHandle as WorkerHandle,
)
from pgbgw.client import (
    attach as attach,
)
from pgbgw.errors import (
    AttachError as AttachError,
)
from pgbgw.errors import (
    ConfigurationError as ConfigurationError,
)
from pgbgw.errors import (
    EntryNotAllowedError as EntryNotAllowedError,
)
from pgbgw.errors import (
    InvalidWorkerError as InvalidWorkerError,
)
from pgbgw.errors import (
    JobTimeoutError as JobTimeoutError,
)
from pgbgw.errors import (
    NoFreeSlotError as NoFreeSlotError,
)
from pgbgw.errors import (
    ParallelLimitError as ParallelLimitError,
)
from pgbgw.errors import (
    PayloadTooLargeError as PayloadTooLargeError,
)
from pgbgw.errors import (
    PgbgwError as PgbgwError,
)
from pgbgw.errors import (
    StartError as StartError,
)
from pgbgw.errors import (
    SupervisorDiedError as SupervisorDiedError,
)
from pgbgw.errors import (
    WaitTimeoutError as WaitTimeoutError,
)
from pgbgw.errors import (
    WorkerCrashedError as WorkerCrashedError,
)
from pgbgw.errors import (
    WorkerFailedError as WorkerFailedError,
)
from pgbgw.errors import (
    WorkerTerminated as WorkerTerminated,
)
from pgbgw.errors import (
    WrongProcessError as WrongProcessError,
)
from pgbgw.supervisor import (
    Supervisor as Supervisor,
)
from pgbgw.watch import (
    Watch as Watch,
)
from pgbgw.worker import (
    DEFAULT_RESTART_INTERVAL as DEFAULT_RESTART_INTERVAL,
)
from pgbgw.worker import (
    EXTRA_LEN as EXTRA_LEN,
)
from pgbgw.worker import (
    MAX_PARALLEL_WORKER_LIMIT as MAX_PARALLEL_WORKER_LIMIT,
)
from pgbgw.worker import (
    NAME_MAXLEN as NAME_MAXLEN,
)
from pgbgw.worker import (
    NEVER_RESTART as NEVER_RESTART,
)
from pgbgw.worker import (
    BackgroundWorker as BackgroundWorker,
)
from pgbgw.worker import (
    Flags as Flags,
)
from pgbgw.worker import (
    HandleStatus as HandleStatus,
)
from pgbgw.worker import (
    Outcome as Outcome,
)
from pgbgw.worker import (
    Phase as Phase,
)
from pgbgw.worker import (
    ShutdownMode as ShutdownMode,
)
from pgbgw.worker import (
    StartTime as StartTime,
)
from pgbgw.worker import (
    WorkerInfo as WorkerInfo,
)

__version__: str
__all__: list[str]
