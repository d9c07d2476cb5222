"""The supervisor's workers: from acceptance over launches, exits and restarts to oblivion.

The table has an entry for every registration that the supervisor knows (PostgreSQL's list of
RegisteredBgWorker).  What is to happen is decided in _policy; here it is done.  Status is always
stored before anybody is notified, and a process is forgotten only when it is reaped.
"""

from __future__ import annotations

import heapq
import logging
import random
import signal
import socket
import time
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from pgbgw import _launch, _policy
from pgbgw._connections import Connections
from pgbgw._launch import Assignment, Child
from pgbgw._launcher import Launcher
from pgbgw._log import RateLimit, describe
from pgbgw._poller import Timer, Timers
from pgbgw._slots import SupervisorView
from pgbgw._wire import Message, entry_allowed, pack
from pgbgw.worker import OUTCOME_KINDS, Flags, Phase, StartTime

logger = logging.getLogger(__name__)

EXITED, SIGNALED, REJECTED, CANCELLED, LAUNCH_FAILED, LOST = range(1, len(OUTCOME_KINDS))
LAUNCH_NS = 2_000_000  # launches of one pass of the loop, about
LAST_WORDS = 4096  # messages read from a dead worker; a grandchild may go on sending for ever


class Domain(Protocol):
    """The crash domain, as the table sees it."""

    memory: int

    def may_start(self, start_time: StartTime) -> bool: ...
    def crashed(self, what: str) -> None: ...
    def member_gone(self) -> None: ...


class RegisteredWorker:
    """A registration and what has become of it (RegisteredBgWorker)."""

    __slots__ = (
        "child",
        "entry",
        "failures",
        "flags",
        "generation",
        "graced",
        "has_deadline",
        "launches",
        "name",
        "notify",
        "order",
        "outcome",
        "restart_ns",
        "slot",
        "start_time",
        "stop_timeout_ns",
        "terminated",
        "timer",
        "type",
        "woken",
    )

    def __init__(self, view: SupervisorView, slot: int) -> None:
        self.slot = slot
        self.generation = view.generation(slot)
        (
            self.name,
            self.type,
            self.entry,
            self.flags,
            start_time,
            self.notify,
            self.restart_ns,
            self.stop_timeout_ns,
            registered,
        ) = view.registration(slot)
        self.start_time = StartTime(start_time)
        # Launch order: first registered, first launched.  The client's word for it, which can at
        # most bring it to the front.
        self.order = min(registered, time.monotonic_ns())
        self.child: Child | None = None
        self.terminated = False  # never (re)start it (rw_terminate)
        self.graced = False  # a client said how long it may take to stop
        self.has_deadline = False  # it was told to stop, and has only so long
        self.launches = 0
        self.failures = 0  # in a row
        self.outcome: dict[str, Any] | None = None  # of the last run, for the next
        self.woken = False  # while it did not run
        self.timer: Timer | None = None  # until the restart, or until SIGKILL

    @property
    def shmem_access(self) -> bool:
        return bool(self.flags & Flags.SHMEM_ACCESS)

    @property
    def restarts(self) -> int:
        return max(0, self.launches - 1)

    def __str__(self) -> str:
        pid = self.child.pid if self.child is not None else None
        return describe(self.name, self.type, pid, self.slot, self.generation)

    def set_timer(self, timer: Timer | None) -> None:
        if self.timer is not None:
            self.timer.cancel()
        self.timer = timer


class ReadyQueue:
    """Workers to be launched, the first registered first.  A heap, and entries that are void since
    their worker is gone: those go when they come up, or when they are most of it."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, int]] = []  # order, slot, generation
        self._waiting: dict[int, int] = {}  # slot -> generation of those that still wait

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def push(self, worker: RegisteredWorker) -> None:
        if len(self._heap) > 64 and len(self._heap) > 2 * len(self._waiting):
            self._heap = [e for e in self._heap if self._waiting.get(e[1]) == e[2]]
            heapq.heapify(self._heap)
        self._waiting[worker.slot] = worker.generation
        heapq.heappush(self._heap, (worker.order, worker.slot, worker.generation))

    def discard(self, worker: RegisteredWorker) -> None:
        if self._waiting.get(worker.slot) == worker.generation:
            del self._waiting[worker.slot]

    def first(self) -> tuple[int, int, int]:
        """The entry to launch next; the queue is not empty."""
        while True:
            entry = self._heap[0]
            if self._waiting.get(entry[1]) == entry[2]:
                return entry
            heapq.heappop(self._heap)

    def pop(self) -> int:
        """The slot of the worker to launch next."""
        _, slot, _ = self.first()
        heapq.heappop(self._heap)
        del self._waiting[slot]
        return slot


class WorkerTable:
    """All registrations, the queue of those to be launched, and the processes that run."""

    connections: Connections
    domain: Domain

    def __init__(
        self,
        view: SupervisorView,
        timers: Timers,
        launcher: Launcher,
        allow: Iterable[str] | None,
    ) -> None:
        self.launcher = launcher
        self._view = view
        self._timers = timers
        self._allow = None if allow is None else tuple(allow)
        self._workers: dict[int, RegisteredWorker] = {}  # by slot
        self._by_pid: dict[int, RegisteredWorker] = {}  # those that run
        # Those to be launched, by what they wait for.
        self._queues = {
            (start_time, shmem): ReadyQueue() for start_time in StartTime for shmem in (False, True)
        }
        self._launch_noise = RateLimit(1, 10)
        self._refusal_noise = RateLimit(1, 100)
        self.stopping = False
        self.immediate = False

    def __iter__(self) -> Iterator[RegisteredWorker]:
        return iter(list(self._workers.values()))

    def running(self) -> list[RegisteredWorker]:
        return list(self._by_pid.values())

    def get(self, slot: int, generation: int) -> RegisteredWorker | None:
        worker = self._workers.get(slot)
        return worker if worker is not None and worker.generation == generation else None

    def has_pid(self, pid: int) -> bool:
        return pid in self._by_pid

    # --- coming and going -------------------------------------------------------------------

    def accepted(self, slot: int, cid: int) -> None:
        """A registration was taken over from the inbox."""
        worker = self._workers[slot] = RegisteredWorker(self._view, slot)
        logger.debug("registering %s", worker)
        if worker.notify:
            self.connections.subscribe_registrant(cid, slot)
        allow = self._allow
        if cid and allow is not None and not entry_allowed(worker.entry, allow):
            reason = f'entry point "{worker.entry}" is not allowed'
            if self._refusal_noise.allow(time.monotonic()):
                more = self._refusal_noise.more
                logger.warning("%s rejected: %s%s", worker, reason, more)
            self.forget(worker, REJECTED, error=reason.encode())
            return
        self._queue_of(worker).push(worker)

    def forget(
        self,
        worker: RegisteredWorker,
        kind: int,
        exitcode: int = 0,
        signum: int = 0,
        error: bytes = b"",
    ) -> None:
        """Unregister for good and tell whoever waits (ForgetBackgroundWorker)."""
        now = time.time_ns()
        slot, generation, restarts = worker.slot, worker.generation, worker.restarts
        logger.debug("unregistering %s", worker)
        worker.set_timer(None)
        self._queue_of(worker).discard(worker)
        del self._workers[slot]
        self._view.set_outcome(slot, kind, exitcode, signum, restarts, True, now, error)
        self._view.free(slot)
        self.connections.notify_final(slot, generation, (kind, exitcode, signum, restarts, now))

    def _forget_idle(self, worker: RegisteredWorker) -> None:
        """Unregister one that does not run: cancelled, or in a restart gap that will not end."""
        if worker.outcome is None:
            self.forget(worker, CANCELLED)
            return
        last = worker.outcome
        self.forget(
            worker,
            OUTCOME_KINDS.index(last["kind"]),
            last["exitcode"] or 0,
            last["signal"] or 0,
            (last["error"] or "").encode(),
        )

    def forget_unstarted(self) -> None:
        """At a stop: what does not run now never will (ForgetUnstartedBackgroundWorkers).

        Unlike PostgreSQL's this reaches every registration, waited for or not.
        """
        for worker in self:
            if worker.child is None:
                self._forget_idle(worker)

    # --- stopping ---------------------------------------------------------------------------

    def terminate(self, worker: RegisteredWorker, grace_ns: int = -1) -> None:
        """Never start it again; SIGTERM once if it runs, SIGKILL to its group after grace_ns (or
        its own stop_timeout; -1: never), or sooner when it has ended."""
        first, worker.terminated = not worker.terminated, True
        if worker.child is None:
            self._forget_idle(worker)
            return
        explicit = grace_ns >= 0
        if first:
            worker.child.signal(signal.SIGTERM)
            if grace_ns < 0:
                grace_ns = worker.stop_timeout_ns
        if explicit and not worker.graced:
            # The bit that says "terminate" may have been seen first; the caller's word counts.
            worker.graced = True
            if not self.stopping:
                worker.set_timer(None)
        self.kill_after(worker, grace_ns)

    def kill_after(self, worker: RegisteredWorker, grace_ns: int) -> None:
        """SIGKILL to its group after so long, unless that is due sooner already; -1: no."""
        child = worker.child
        if grace_ns < 0 or child is None:
            return
        worker.has_deadline = True
        due = time.monotonic_ns() + grace_ns
        if worker.timer is not None and worker.timer.callback and worker.timer.due <= due:
            return

        def kill() -> None:
            logger.info("%s did not stop in time: sending SIGKILL to its group", worker)
            child.signal_group(signal.SIGKILL)

        worker.set_timer(self._timers.after(grace_ns, kill))

    def signal_for_leftovers(self, worker: RegisteredWorker | None) -> int:
        """The signal for what a worker has left of its group when it ends; 0: PostgreSQL's way.

        SIGKILL if it had only so long to stop, or none at all.
        """
        return signal.SIGKILL if self.immediate or (worker and worker.has_deadline) else 0

    # --- launching --------------------------------------------------------------------------

    def _queue_of(self, worker: RegisteredWorker) -> ReadyQueue:
        return self._queues[worker.start_time, worker.shmem_access]

    def _open_queues(self, phase: Phase) -> list[ReadyQueue]:
        """The queues that phase and domain let start now and that are not empty."""
        return [
            queue
            for (start_time, shmem), queue in self._queues.items()
            if queue
            and _policy.should_start_now(phase, start_time)
            and not (shmem and not self.domain.may_start(start_time))
        ]

    def has_work(self, phase: Phase) -> bool:
        return bool(self._open_queues(phase))

    def launch_some(self, phase: Phase) -> None:
        """Launch what may start, for about 2 ms, the rest later (maybe_start_bgworkers)."""
        until = time.monotonic_ns() + LAUNCH_NS
        while queues := self._open_queues(phase):
            queue = min(queues, key=ReadyQueue.first)
            self._start(self._workers[queue.pop()])
            if time.monotonic_ns() >= until:
                return

    def _start(self, worker: RegisteredWorker) -> None:
        """Launch one (do_start_bgworker)."""
        memory = self.domain.memory if worker.shmem_access else -1
        assignment = Assignment(
            self._view.epoch, worker.slot, worker.generation, memory, worker.outcome
        )
        logger.debug("starting %s", worker)
        try:
            child = self.launcher.launch(
                assignment,
                self._view.record(worker.slot),
                lambda: self._exited(worker),
                lambda: self._heard(worker),
            )
        except OSError as exc:
            self._launch_failed(worker, exc)
            return
        worker.child = child
        worker.launches += 1
        self._by_pid[child.pid] = worker
        if worker.woken:  # by somebody who did not wait for it to start
            worker.woken = False
            self.wake(worker)
        self._view.set_running(worker.slot, child.pid, time.time_ns())
        self.connections.notify(worker.slot, worker.generation)

    def _launch_failed(self, worker: RegisteredWorker, exc: OSError) -> None:
        """No process could be had.  That is no crash, and nobody else waits for it."""
        if self._launch_noise.allow(time.monotonic()):
            logger.info("could not launch %s: %s%s", worker, exc, self._launch_noise.more)
        if worker.restart_ns < 0:
            self.forget(worker, LAUNCH_FAILED, error=str(exc).encode())
            return
        worker.failures += 1
        self._restart_after(worker)

    # --- running ----------------------------------------------------------------------------

    def _heard(self, worker: RegisteredWorker) -> None:
        child = worker.child
        if child is None:
            return
        for type, body in self.launcher.read(child, 64):
            if type == Message.READY:
                self._view.set_ready(worker.slot)
                self.connections.notify(worker.slot, worker.generation)
            elif type == Message.TITLE:
                self._view.set_activity(worker.slot, body)
            elif type == Message.JOIN:
                self.join(child, worker.shmem_access)

    def join(self, child: Child, allowed: bool) -> None:
        """A worker becomes a client, over a connection that we make for it."""
        answer = "only workers with SHMEM_ACCESS have a client of their own"
        joined = self.connections.join(child.pid) if allowed else answer
        try:
            if isinstance(joined, str):
                refusal = pack(Message.REFUSED, body=joined.encode())
                child.channel.send(refusal, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            else:
                message, fds, theirs = joined
                with theirs:
                    _launch.send_descriptors(child.channel, message, fds)
        except OSError as exc:
            if self._refusal_noise.allow(time.monotonic()):
                more = self._refusal_noise.more
                logger.warning("could not answer worker process %d: %s%s", child.pid, exc, more)

    def wake(self, worker: RegisteredWorker) -> None:
        """End its wait, or the first one of its next run.  A channel without room holds a wake-up
        already."""
        if worker.child is None:
            worker.woken = True
        else:
            try:
                flags = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
                worker.child.channel.send(pack(Message.AWAKE), flags)
            except OSError:
                pass

    # --- ending -----------------------------------------------------------------------------

    def _exited(self, worker: RegisteredWorker) -> None:
        """A worker's process is dead (CleanupBackgroundWorker)."""
        child = worker.child
        if child is None:
            return
        self.launcher.read(child, LAST_WORDS)
        status = child.reap(self.signal_for_leftovers(worker))
        if status is None:
            return
        exitcode, signum = status
        who = str(worker)
        worker.child = None
        worker.set_timer(None)
        del self._by_pid[child.pid]
        self.launcher.unwatch(child)
        log_exit(who, exitcode, signum)

        verdict = _policy.judge_exit(
            exitcode=exitcode,
            signal=signum,
            shmem_access=worker.shmem_access,
            attached=child.attached,
            clean=child.clean,
            terminated=worker.terminated,
            never_restart=worker.restart_ns < 0,
        )
        kind = EXITED if exitcode is not None else SIGNALED
        if verdict.forget or self.stopping:
            self.forget(worker, kind, exitcode or 0, signum or 0, child.error)
        else:
            self._stopped(worker, child, kind, exitcode, signum)
        if verdict.crash:
            self.domain.crashed(f"{who} crashed")
        if worker.shmem_access:
            self.domain.member_gone()

    def _stopped(
        self,
        worker: RegisteredWorker,
        child: Child,
        kind: int,
        exitcode: int | None,
        signum: int | None,
    ) -> None:
        """It will run again: report the stop and set its alarm (ReportBackgroundWorkerExit)."""
        now = time.time_ns()
        worker.outcome = {
            "kind": OUTCOME_KINDS[kind],
            "exitcode": exitcode,
            "signal": signum,
            "error": child.error.decode("utf-8", "replace") or None,
            "at": now / 1e9,
            "restarts": worker.restarts,
            "final": False,
        }
        self._view.set_outcome(
            worker.slot,
            kind,
            exitcode or 0,
            signum or 0,
            worker.restarts,
            False,
            now,
            child.error,
        )
        self._view.set_stopped(worker.slot)
        ran = time.monotonic_ns() - child.started
        worker.failures = _policy.failures_after(worker.failures, ran)
        self._restart_after(worker)
        self.connections.notify(worker.slot, worker.generation)

    def _restart_after(self, worker: RegisteredWorker) -> None:
        jitter = random.uniform(-1, 1)
        delay = _policy.restart_delay(worker.failures, worker.restart_ns, jitter)
        worker.set_timer(self._timers.after(delay, lambda: self._restart_due(worker)))

    def _restart_due(self, worker: RegisteredWorker) -> None:
        worker.set_timer(None)
        worker.order = time.monotonic_ns()
        self._queue_of(worker).push(worker)

    def reset_crash_times(self) -> None:
        """After a reset the domain's workers start at once, whatever their intervals
        (ResetBackgroundWorkerCrashTimes).  Those that never restart were forgotten as they died."""
        for worker in self:
            if worker.shmem_access and worker.child is None and worker.timer is not None:
                worker.failures = 0  # the resets have a backoff of their own
                self._restart_due(worker)
        self._view.request_sweep()  # they may have been clients, and damaged more than their memory


def log_exit(who: str, exitcode: int | None, signum: int | None) -> None:
    """LogChildExit: success at debug level, all else at LOG."""
    if exitcode == 0:
        logger.debug("%s exited with exit code 0", who)
    elif exitcode is not None:
        logger.info("%s exited with exit code %d", who, exitcode)
    elif signum is not None:
        logger.info("%s was terminated by signal %d: %s", who, signum, signal.strsignal(signum))
    else:
        logger.warning("%s is gone, and its exit status with it", who)
