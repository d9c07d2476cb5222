"""The crash domain: the workers that share memory, and what happens when one of them crashes.

A worker with SHMEM_ACCESS that dies in any way but a clean exit 0 or 1 may have left the shared
memory half written.  All others of the domain then get SIGQUIT, after 5 s SIGKILL; when the last is
gone the memory is replaced by a fresh one, the startup worker (if there is one) runs again, and the
restartable workers come back at once (HandleChildCrash and what PostmasterStateMachine does then).

Workers outside the domain, clients, handles, and requests not launched yet survive all this.
"""

from __future__ import annotations

import logging
import os
import random
import signal
import time
from collections.abc import Callable

from pgbgw import _kernel, _policy
from pgbgw._launch import Assignment, Child
from pgbgw._poller import Timer, Timers
from pgbgw._wire import Message
from pgbgw._workers import LAST_WORDS, WorkerTable, log_exit
from pgbgw.worker import BackgroundWorker, Flags, Phase, StartTime

logger = logging.getLogger(__name__)

KILL_AFTER_NS = 5_000_000_000  # SIGKILL_CHILDREN_AFTER_SECS


class CrashDomain:
    """The domain's memory, its reset, and the startup worker, which is part of it."""

    def __init__(
        self,
        table: WorkerTable,
        timers: Timers,
        epoch: int,
        memory_size: int,
        startup: str | None,
        restart_after_crash: bool,
        enter: Callable[[Phase], None],
        give_up: Callable[[str], None],
    ) -> None:
        """enter: a phase was reached.  give_up: the supervisor must stop, with status 1."""
        self._table = table
        self._timers = timers
        self._epoch = epoch
        self._memory_size = memory_size
        self._startup = startup
        self._restart_after_crash = restart_after_crash
        self._enter = enter
        self._give_up = give_up
        self.memory = self._new_memory()
        self.startup_child: Child | None = None
        self._winding_down = False
        self._recovery: Phase | None = None  # of the startup worker after a reset
        self._kill: Timer | None = None
        self._resets = 0  # in a row
        self._settled = 0  # when the last reset was over
        self.stopping = False
        self.unhealed = False  # a crash was not followed by a reset, since we are stopping
        self.immediate_stop = False  # all have got SIGQUIT: that they exit with 2 is no news

    def _new_memory(self) -> int:
        """A descriptor of zeroed memory that nobody can resize; -1 if there is to be none.

        The supervisor never maps it.
        """
        if not self._memory_size:
            return -1
        seals = _kernel.F_SEAL_SHRINK | _kernel.F_SEAL_GROW | _kernel.F_SEAL_SEAL
        return _kernel.memfd(b"pgbgw-memory", self._memory_size, seals)

    def close(self) -> None:
        if self.memory >= 0:
            os.close(self.memory)

    # --- may they start? --------------------------------------------------------------------

    def may_start(self, start_time: StartTime) -> bool:
        return _policy.domain_may_start(self._winding_down, self._recovery, start_time)

    # --- the startup worker -----------------------------------------------------------------

    def start(self) -> None:
        """Run the startup worker; without one the supervisor is RUNNING at once."""
        if self._startup is None:
            self._started()
            return
        worker = BackgroundWorker(entry=self._startup, name="startup", flags=Flags.SHMEM_ACCESS)
        assignment = Assignment(self._epoch, -1, 0, self.memory)
        try:
            self.startup_child = self._table.launcher.launch(
                assignment, worker._record, self._startup_exited, self._startup_heard
            )
        except OSError as exc:
            self._give_up(f"could not launch the startup worker: {exc}")

    def _started(self) -> None:
        if self._recovery is not None:
            self._recovery = None
            logger.info("the crash domain is in operation again")
        self._enter(Phase.RUNNING)

    def _startup_heard(self) -> None:
        if self.startup_child is None:
            return
        for type, _ in self._table.launcher.read(self.startup_child, 64):
            if type == Message.CONSISTENT:
                if self._recovery is not None:
                    self._recovery = Phase.CONSISTENT
                self._enter(Phase.CONSISTENT)
            elif type == Message.JOIN:
                self._table.join(self.startup_child, allowed=True)

    def _startup_exited(self) -> None:
        child = self.startup_child
        if child is None:
            return
        self._table.launcher.read(child, LAST_WORDS)
        status = child.reap(self._table.signal_for_leftovers(None))
        if status is None:
            return
        exitcode, signum = status
        self._table.launcher.unwatch(child)
        self.startup_child = None
        log_exit("startup worker", exitcode, signum)
        if self._winding_down or self.stopping:
            self.member_gone()
        elif exitcode == 0 and child.clean:
            self._started()
        else:
            self._give_up("aborting startup: the startup worker failed")

    # --- crash and reset --------------------------------------------------------------------

    def _members(self) -> list[Child]:
        children = [w.child for w in self._table.running() if w.shmem_access]
        return [c for c in (*children, self.startup_child) if c is not None]

    def crashed(self, what: str) -> None:
        """A member died and may have left the memory damaged; only the first death counts."""
        if self._winding_down or self.immediate_stop:
            return
        self._winding_down = True
        logger.info("%s: terminating the other workers with shared memory access", what)
        for child in self._members():
            child.signal_group(signal.SIGQUIT)
        self._kill = self._timers.after(KILL_AFTER_NS, self._kill_the_deaf)

    def _kill_the_deaf(self) -> None:
        for child in self._members():
            logger.info("process %d did not obey SIGQUIT: sending SIGKILL to its group", child.pid)
            child.signal_group(signal.SIGKILL)

    def member_gone(self) -> None:
        """A member was reaped: perhaps the last one that a reset waits for."""
        if not self._winding_down or self._members():
            return
        if self._kill is not None:
            self._kill.cancel()
            self._kill = None
        if self.stopping:
            self.unhealed = True
            return
        if not self._restart_after_crash:
            self._give_up("shutting down because restart_after_crash is off")
            return
        try:
            memory = self._new_memory()
        except OSError as exc:
            self._give_up(f"could not renew the shared memory after a crash: {exc}")
            return
        if self.memory >= 0:
            os.close(self.memory)
        self.memory = memory
        ran = time.monotonic_ns() - self._settled if self._settled else _policy.STEADY_RUN
        self._resets = _policy.failures_after(self._resets, ran)
        delay = _policy.reset_delay(self._resets, random.uniform(-1, 1))
        logger.info("all are gone; starting them again")
        if delay:
            self._timers.after(delay, self._recover)
        else:
            self._recover()

    def _recover(self) -> None:
        if self.stopping:
            return
        self._winding_down = False
        self._settled = time.monotonic_ns()
        self._table.reset_crash_times()
        if self._startup is not None:
            self._recovery = Phase.STARTUP
            self.start()
