"""Where a worker's process comes from: a cold fork, a fresh interpreter, or a warm spare.

A spare is a process that was started before anybody needed it.  It has done all that does not
depend on the worker and waits on its channel, in the kernel; to hand a worker over costs one
message.  It is used once, so that workers are as far from each other as with a fork.  It is no
worker before: it has no slot, no share in the crash domain, and it may not attach.
"""

from __future__ import annotations

import logging
import signal
from collections import deque

from pgbgw import _launch
from pgbgw._cgroup import SupervisorCgroup, WorkerCgroup
from pgbgw._child import run_forked, run_spare
from pgbgw._launch import Assignment, Child, Surroundings
from pgbgw._poller import Callback, Poller, Timers

logger = logging.getLogger(__name__)

ENTRY = "background_worker_entry"
PAUSE_NS = 1_000_000_000  # before the next try, when a spare could not be had or has died


class Launcher:
    """Starts processes, watches them, and keeps spares."""

    cgroup: SupervisorCgroup | None = None  # where processes are launched into

    def __init__(
        self,
        poller: Poller,
        timers: Timers,
        surroundings: Surroundings,
        epoch: int,
        start_method: str,
        spares: int,
    ) -> None:
        self._poller = poller
        self._timers = timers
        self._surroundings = surroundings
        self._epoch = epoch
        self._spawn = start_method == "spawn"
        self._wanted = spares
        self._spares: deque[Child] = deque()
        self._pausing = False

    def launch(
        self, assignment: Assignment, record: bytes, exited: Callback, heard: Callback
    ) -> Child:
        """A process with that record, watched.  OSError: there is none."""
        while self._spares:
            child = self._spares.popleft()
            try:
                child.hand_over(assignment, record)
            except OSError:  # it has died just now
                self._end(child)
                continue
            self._poller.set(child.pidfd, exited)
            self._poller.set(child.channel.fileno(), heard)
            return child
        if self._spawn:
            child = self._start(assignment, None, exited, heard)
            try:
                child.hand_over(assignment, record)
            except OSError as exc:  # dead already: its end will be noticed
                child.error = f"could not send the launch data: {exc}".encode()
            return child
        return self._start(assignment, record, exited, heard)

    def _start(
        self, assignment: Assignment | None, record: bytes | None, exited: Callback, heard: Callback
    ) -> Child:
        """A new process, watched: with a record its worker, else one that waits for it."""
        surroundings, epoch = self._surroundings, self._epoch
        slot = -1 if assignment is None else assignment.slot
        cgroup: WorkerCgroup | None = None if self.cgroup is None else self.cgroup.new(slot)
        try:
            if self._spawn:
                child = _launch.spawn(surroundings, epoch, ENTRY, cgroup)
            elif assignment is not None and record is not None:
                child = _launch.fork(
                    surroundings,
                    assignment.memory,
                    lambda channel: run_forked(surroundings, assignment, record, channel),
                    cgroup,
                )
            else:
                child = _launch.fork(
                    surroundings,
                    -1,
                    lambda channel: run_spare(surroundings, epoch, channel),
                    cgroup,
                )
        except OSError:
            if cgroup is not None:
                cgroup.remove()
            raise
        try:
            self._poller.add(child.pidfd, exited)
            try:
                self._poller.add(child.channel.fileno(), heard)
            except OSError:
                self._poller.remove(child.pidfd)
                raise
        except OSError:  # the kernel's limit of watches: as if the fork had failed
            child.abandon()
            raise
        return child

    def unwatch(self, child: Child) -> None:
        """Stop watching and close; the child is reaped."""
        self._poller.remove(child.pidfd)
        if not child.hung_up:
            self._poller.remove(child.channel.fileno())
        child.close()

    def read(self, child: Child, limit: int) -> list[tuple[int, bytes]]:
        """Its messages; a channel that has nothing more to say is no longer watched."""
        before = child.hung_up
        messages = child.messages(limit)
        if child.hung_up and not before:
            self._poller.remove(child.channel.fileno())
        return messages

    # --- spares -----------------------------------------------------------------------------

    @property
    def short(self) -> bool:
        """Is there a spare to be started, once there is nothing better to do?"""
        return len(self._spares) < self._wanted and not self._pausing

    def refill(self) -> None:
        """Start one spare."""
        child: Child

        def stirred() -> None:  # it has nothing to say, so it has died
            if child in self._spares:
                self._spares.remove(child)
                self._end(child)
                self._pause(f"a spare (pid {child.pid}) has died")

        try:
            child = self._start(None, None, stirred, stirred)
        except OSError as exc:
            self._pause(f"could not start a spare: {exc}")
        else:
            self._spares.append(child)

    def _pause(self, why: str) -> None:
        """What has gone wrong would go wrong again at once."""
        logger.info("%s", why)
        self._pausing = True

        def go_on() -> None:
            self._pausing = False

        self._timers.after(PAUSE_NS, go_on)

    def _end(self, child: Child) -> None:
        self._poller.remove(child.pidfd)
        self._poller.remove(child.channel.fileno())
        child.abandon()

    def dismiss(self) -> None:
        """Spares are not needed any more: end them."""
        self._wanted = 0
        for child in self._spares:
            child.signal(signal.SIGKILL)
        while self._spares:
            self._end(self._spares.popleft())
