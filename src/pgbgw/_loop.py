"""The supervisor's loop: wait, drain, decide, act (ServerLoop).

One thread, one epoll set.  A pass takes over a bounded number of changes, launches for about 2 ms,
does one slice of a sweep if one is due, and sleeps only if nothing is left.  Nothing blocks but the
wait itself, and nothing a client does raises: what is wrong is logged.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable

from pgbgw import _kernel, _policy, _slots
from pgbgw._connections import ClientProcess, Connections
from pgbgw._domain import KILL_AFTER_NS, CrashDomain
from pgbgw._launch import signal_groups_but_leaders
from pgbgw._log import RateLimit
from pgbgw._poller import Poller, Timer, Timers
from pgbgw._slots import SupervisorView
from pgbgw._workers import CANCELLED, LOST, REJECTED, RegisteredWorker, WorkerTable
from pgbgw.worker import Phase, ShutdownMode

logger = logging.getLogger(__name__)

TICK_NS = 1_000_000_000  # while clients are attached: repairs damage, nothing waits for it
OWNER_GRACE_NS = 500_000_000  # between fast and immediate when the owner has died

# SIGTERM, SIGINT, SIGQUIT to the supervisor, as to the postmaster.
SHUTDOWN_SIGNALS: dict[int, ShutdownMode] = {
    signal.SIGTERM: ShutdownMode.SMART,
    signal.SIGINT: ShutdownMode.FAST,
    signal.SIGQUIT: ShutdownMode.IMMEDIATE,
}


class Loop:
    """The state of a running supervisor, and its one loop."""

    connections: Connections
    domain: CrashDomain

    def __init__(
        self, view: SupervisorView, poller: Poller, timers: Timers, table: WorkerTable
    ) -> None:
        self.phase = Phase.STARTUP
        self.on_stop: Callable[[ShutdownMode], None] = lambda mode: None
        self._view = view
        self._poller = poller
        self._timers = timers
        self._table = table
        self._launcher = table.launcher
        self._mode = ShutdownMode.NONE
        self._requesters: set[ClientProcess] = set()  # of a smart shutdown
        self._exit_status = 0
        self._kill: Timer | None = None
        self._tick: Timer | None = None
        self._rejection_noise = RateLimit(1, 100)
        self._repair_noise = RateLimit(1, 10)
        self._publish_phase()

    def watch_signals(self, fd: int) -> None:
        def read() -> None:
            for signum, pid, uid in _kernel.read_signals(fd):
                mode = SHUTDOWN_SIGNALS.get(signum)
                if mode is not None and _policy.stronger(self._mode, mode) != self._mode:
                    logger.info(
                        "received %s from process %d of user %d",
                        signal.Signals(signum).name,
                        pid,
                        uid,
                    )
                    self.stop(mode, None)

        self._poller.add(fd, read)

    def watch_owner(self, pidfd: int) -> None:
        """Stop when the process that started us is gone."""

        def gone() -> None:
            self._poller.remove(pidfd)
            logger.info("the owner of this supervisor is gone")
            self.stop(ShutdownMode.FAST, None)
            self._timers.after(OWNER_GRACE_NS, lambda: self.stop(ShutdownMode.IMMEDIATE, None))

        self._poller.add(pidfd, gone)

    # --- the loop ---------------------------------------------------------------------------

    def run(self) -> int:
        """Serve until stopped; the exit status."""
        self._poller.woke = time.monotonic_ns()
        while not self._finished():
            nothing_due = not self._view.sweep_due and not self._table.has_work(self.phase)
            short = self._launcher.short
            idle = nothing_due and not short and self._view.prepare_sleep()
            timeout = self._sleep_time() if idle else 0
            self._view.note_pass(time.monotonic_ns() - self._poller.woke)
            ready = self._poller.wait(timeout)
            self._view.awake()
            self._timers.run(time.monotonic_ns())
            events = self._view.drain(time.time_ns())
            self._act(events)
            if short and nothing_due and not ready and not events:
                self._launcher.refill()  # a spare is in nobody's way: nobody wanted anything
            if self._view.sweep_due:
                self._act(self._view.sweep(time.time_ns()))
            self._table.launch_some(self.phase)
            if self._tick is None and self.connections.attached:
                self._tick = self._timers.after(TICK_NS, self._sweep_tick)
            if self._mode == ShutdownMode.SMART and not self.connections.clients_left(
                self._requesters
            ):
                logger.info("the last client is gone")
                self.stop(ShutdownMode.FAST, None)
        if self.domain.unhealed and not self._exit_status:
            logger.info("abnormal shutdown: a worker with shared memory access had crashed")
            self._exit_status = 1
        return self._exit_status

    def _sleep_time(self) -> int | None:
        due = self._timers.next_due()
        return None if due is None else max(0, due - time.monotonic_ns())

    def _sweep_tick(self) -> None:
        self._tick = None
        self._act(self._view.sweep(time.time_ns()))

    def _act(self, events: list[tuple[int, int, int, int, str | None]]) -> None:
        """BackgroundWorkerStateChange, the part that is not in the core."""
        for action, slot, generation, cid, reason in events:
            if action == _slots.EVENT_ACCEPTED:
                self._table.accepted(slot, cid)
            elif action == _slots.EVENT_TERMINATED:
                worker = self._table.get(slot, generation)
                if worker is not None:
                    self._table.terminate(worker)
            elif action == _slots.EVENT_CANCELLED:
                outcome = (CANCELLED, 0, 0, 0, time.time_ns())
                self.connections.tell_registrant(cid, slot, generation, outcome)
            elif action == _slots.EVENT_REJECTED:
                if self._rejection_noise.allow(time.monotonic()):
                    logger.warning(
                        "registration in slot %d/%d rejected: %s%s",
                        *(slot, generation, reason, self._rejection_noise.more),
                    )
                outcome = (REJECTED, 0, 0, 0, time.time_ns())
                self.connections.tell_registrant(cid, slot, generation, outcome)
            elif action == _slots.EVENT_REPAIRED:
                if self._repair_noise.allow(time.monotonic()):
                    logger.warning(
                        "slot %d/%d was damaged and is repaired%s",
                        *(slot, generation, self._repair_noise.more),
                    )
                if not self._view.in_use(slot, generation):
                    lost = (LOST, 0, 0, 0, time.time_ns())
                    self.connections.notify_final(slot, generation, lost)

    # --- phases -----------------------------------------------------------------------------

    def enter(self, phase: Phase) -> None:
        """Advance; never back, and never out of STOPPING."""
        if phase > self.phase:
            self.phase = phase
            logger.debug("entering phase %s", phase.name)
            self._publish_phase()

    def _publish_phase(self) -> None:
        self._view.set_phase(self.phase | self._mode << 8)

    # --- requests of clients ----------------------------------------------------------------

    def _find(self, slot: int, generation: int) -> RegisteredWorker | None:
        """The worker that a message is about; a message may come before the slot was looked at."""
        worker = self._table.get(slot, generation)
        if worker is None and self._view.generation(slot) == generation:
            self._act(self._view.look(slot, time.time_ns()))
            worker = self._table.get(slot, generation)
        return worker

    def terminate(self, slot: int, generation: int, grace_ns: int) -> None:
        worker = self._find(slot, generation)
        if worker is not None:
            self._table.terminate(worker, grace_ns)

    def cancel(self, slot: int, generation: int) -> None:
        worker = self._find(slot, generation)
        if worker is not None and worker.child is not None:
            worker.child.signal(signal.SIGINT)

    def wake(self, slot: int, generation: int) -> None:
        worker = self._find(slot, generation)
        if worker is not None:
            self._table.wake(worker)

    def is_worker(self, pid: int) -> bool:
        startup = self.domain.startup_child
        return self._table.has_pid(pid) or (startup is not None and startup.pid == pid)

    # --- stopping ---------------------------------------------------------------------------

    def give_up(self, why: str) -> None:
        """Something without which the supervisor cannot go on has failed."""
        logger.critical("%s", why)
        self._exit_status = 1
        self.stop(ShutdownMode.IMMEDIATE, None)

    def stop(self, mode: ShutdownMode, requester: ClientProcess | None) -> None:
        """A shutdown request; a stronger one overrides, a weaker one changes nothing (pmdie)."""
        if mode == ShutdownMode.SMART and requester is not None:
            self._requesters.add(requester)
        if _policy.stronger(self._mode, mode) == self._mode:
            return
        self._mode = mode
        logger.info("received %s shutdown request", mode.name.lower())
        self._publish_phase()
        self.on_stop(mode)
        self.connections.refuse_new()
        if mode == ShutdownMode.SMART:
            return
        self.enter(Phase.STOPPING)
        self._table.stopping = self.domain.stopping = True
        self._view.accepting = False
        self._table.forget_unstarted()
        self._launcher.dismiss()
        if mode == ShutdownMode.FAST:
            self._signal_children(signal.SIGTERM)
            for worker in self._table.running():
                worker.terminated = True
                self._table.kill_after(worker, worker.stop_timeout_ns)
        else:
            self._table.immediate = self.domain.immediate_stop = True
            self._signal_children(signal.SIGQUIT)
            self._kill = self._timers.after(
                KILL_AFTER_NS, lambda: self._signal_children(signal.SIGKILL)
            )

    def _signal_children(self, signum: int) -> None:
        """To each worker and its process group; but SIGTERM only to those that had none yet: to
        the group alone of a worker that was terminated before."""
        asked = set()
        for worker in self._table.running():
            if worker.child is None:
                continue
            if signum == signal.SIGTERM and worker.terminated:
                asked.add(worker.child.pid)
            else:
                worker.child.signal_group(signum)
        if asked:
            try:
                signal_groups_but_leaders(asked, signum)
            except OSError as exc:
                logger.warning("could not signal what %d workers have started: %s", len(asked), exc)
        if self.domain.startup_child is not None:
            self.domain.startup_child.signal_group(signum)

    def _finished(self) -> bool:
        """Are we to stop, and is everything that was published in a final state?"""
        if self.phase != Phase.STOPPING or self._table.running() or self.domain.startup_child:
            return False
        # Once round the table at most: who goes on registering, or damaging, does not hold us up.
        for _ in range(self._view.nslots // _slots.LOOKS + 1):
            self._act(self._view.drain(time.time_ns()))
            if self._view.pending == 0:
                break
        return True
