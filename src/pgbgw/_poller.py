"""What the supervisor waits for: descriptors, and points in time.

Every descriptor has a callback that reads without blocking.  All times are CLOCK_MONOTONIC
nanoseconds.
"""

from __future__ import annotations

import heapq
import select
import time
from collections.abc import Callable
from itertools import count

EPOLLIN, EPOLLOUT = select.EPOLLIN, select.EPOLLOUT
Callback = Callable[[], None]
_DAY_NS = 86_400_000_000_000
# Called back in one pass.  The kernel gives the rest next time, before those that it gave now: all
# get their turn, and a pass does not grow with the number of those who want something.
MAX_EVENTS = 32


class Poller:
    """An epoll set.  A descriptor is removed before it is closed: a copy of it in a forked child
    would keep the entry alive otherwise."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._callbacks: dict[int, tuple[Callback, Callback | None]] = {}
        self.woke = 0  # when the latest wait was over

    def add(self, fd: int, readable: Callback, writable: Callback | None = None) -> None:
        """Watch fd for reading; `writable` is called only while want_write() asks for it."""
        self._epoll.register(fd, EPOLLIN)
        self._callbacks[fd] = (readable, writable)

    def set(self, fd: int, readable: Callback) -> None:
        """Call back somebody else for what is watched already."""
        self._callbacks[fd] = (readable, None)

    def want_write(self, fd: int, wanted: bool) -> None:
        self._epoll.modify(fd, EPOLLIN | EPOLLOUT if wanted else EPOLLIN)

    def remove(self, fd: int) -> None:
        del self._callbacks[fd]
        self._epoll.unregister(fd)

    def wait(self, timeout_ns: int | None) -> int:
        """Wait for at most timeout_ns (None: for ever), then call back for what is ready; how many
        were."""
        timeout = None
        if timeout_ns is not None:
            # Rounded up: a timer must not be met by a pass just before its time.  At most a day:
            # epoll takes no more than 24, and to wake up too early is harmless.
            timeout = max(0, -(-min(timeout_ns, _DAY_NS) // 1_000_000)) / 1000
        ready = self._epoll.poll(timeout, MAX_EVENTS)
        self.woke = time.monotonic_ns()
        batch = [(fd, events, self._callbacks.get(fd)) for fd, events in ready]
        for fd, events, callbacks in batch:
            if callbacks is None:
                continue
            readable, writable = callbacks
            # An earlier callback of this batch may have closed the descriptor, and the number may
            # be another one's by now: this event is not for that one.
            if events & EPOLLOUT and writable is not None and self._callbacks.get(fd) is callbacks:
                writable()
            if events & ~EPOLLOUT and self._callbacks.get(fd) is callbacks:
                readable()
        return len(ready)

    def fileno(self) -> int:
        return self._epoll.fileno()

    def close(self) -> None:
        self._epoll.close()


class Timer:
    """A callback that is due at a point in time, unless it is cancelled before."""

    __slots__ = ("_timers", "callback", "due")

    def __init__(self, timers: Timers, due: int, callback: Callback) -> None:
        self._timers = timers
        self.due = due
        self.callback: Callback | None = callback  # None: cancelled, or called

    def cancel(self) -> None:
        if self.callback is not None:
            self.callback = None
            self._timers.cancelled += 1


class Timers:
    """A heap of timers.  Cancelled ones go when they come up, or when they are most of the heap:
    an interval of years must not keep what was cancelled for years."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Timer]] = []
        self._order = count()
        self.cancelled = 0

    def after(self, delay_ns: int, callback: Callback) -> Timer:
        if self.cancelled > 64 and 2 * self.cancelled > len(self._heap):
            self._heap = [entry for entry in self._heap if entry[2].callback is not None]
            heapq.heapify(self._heap)
            self.cancelled = 0
        timer = Timer(self, time.monotonic_ns() + delay_ns, callback)
        heapq.heappush(self._heap, (timer.due, next(self._order), timer))
        return timer

    def next_due(self) -> int | None:
        while self._heap and self._heap[0][2].callback is None:
            heapq.heappop(self._heap)
            self.cancelled -= 1
        return self._heap[0][0] if self._heap else None

    def run(self, now: int) -> None:
        """Call back all that is due.  Timers set meanwhile wait for the next pass."""
        due = []
        while self._heap and self._heap[0][0] <= now:
            timer = heapq.heappop(self._heap)[2]
            if timer.callback is None:
                self.cancelled -= 1
            else:
                due.append(timer)
        for timer in due:
            callback, timer.callback = timer.callback, None
            if callback is not None:  # not cancelled by one before it
                callback()
            else:
                self.cancelled -= 1
