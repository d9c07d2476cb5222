"""What a waiting client waits for: its connection, the supervisor's death, a point in time.

The order that loses no wake-up is: subscribe, then { drain, look, wait }.  Drain before looking: a
message that comes after the look ends the wait.
"""

from __future__ import annotations

import select
import socket
import time

from pgbgw._wire import unpack

LOOK_MS = 10  # how often to look where no message will come
_STEP = 86_400_000  # ms: poll() takes no longer timeouts than 24 days


def deadline_after(timeout: float | None) -> float | None:
    """The point in monotonic time that is timeout seconds away; None for never."""
    return None if timeout is None else time.monotonic() + max(0.0, timeout)


class Latch:
    """One connection as something to wait on (WaitLatch, ResetLatch).  For one thread at a time."""

    def __init__(self, sock: socket.socket, supervisor: int) -> None:
        """supervisor: its pidfd.  Both stay the caller's to close."""
        self._sock = sock
        self._fd = sock.fileno()  # the socket may be closed by the time we notice
        self.hung_up = False
        self._poll = select.poll()
        self._poll.register(supervisor, select.POLLIN)
        self._poll.register(sock, select.POLLIN)
        self._supervisor = supervisor

    def drain(self) -> list[tuple[int, int, int, bytes]]:
        """All messages that are there: (type, slot, generation, body)."""
        found = []
        while not self.hung_up:
            try:
                data = self._sock.recv(4096, socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            if not data:  # the supervisor hangs up as it ends: its pidfd will follow
                self.hung_up = True
                self._poll.unregister(self._fd)
            elif (message := unpack(data)) is not None:
                found.append(message)
        return found

    def has_message(self) -> bool:
        """Would drain() find something?"""
        try:
            return bool(self._sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except OSError:
            return False

    def wait(self, deadline: float | None) -> bool:
        """Wait for a message, the supervisor's death or the deadline; False if the supervisor died.

        Signal handlers run as they come; what they raise ends the wait.
        """
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            # Rounded up: a wait must not end before its time.
            step = None if left is None else -(-min(left * 1000, _STEP) // 1)
            if self.hung_up:
                step = LOOK_MS if step is None else min(step, LOOK_MS)
            events = self._poll.poll(step)
            if any(fd == self._supervisor for fd, _ in events):
                return False
            if events or self.hung_up or left is None or left * 1000 <= _STEP:
                return True

    def send(self, message: bytes, deadline: float | None = None) -> bool:
        """Send, waiting for room if there is none; False if the supervisor died or time is up.

        Nothing is read meanwhile: the supervisor never waits for us, so it does not matter.
        """
        while True:
            try:
                self._sock.send(message, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
                return True
            except BlockingIOError:
                poll = select.poll()
                poll.register(self._sock, select.POLLOUT)
                poll.register(self._supervisor, select.POLLIN)
                left = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
                events = poll.poll(None if left is None else min(left, _STEP))
                if not events or any(fd == self._supervisor for fd, _ in events):
                    return False
            except OSError:
                return False
