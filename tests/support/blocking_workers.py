"""Workers that try to block their supervisor."""

from __future__ import annotations

import os
import socket
import sys
from contextlib import suppress

from pgbgw import current_worker


def descriptors() -> list[int]:
    return [int(name) for name in os.listdir("/proc/self/fd")]


def clear_nonblocking_everywhere() -> None:
    """Make all that it has inherited blocking, the channel above all, and never read it."""
    current_worker().ready()
    for fd in descriptors():
        with suppress(OSError):
            os.set_blocking(fd, True)
    while True:
        current_worker().sleep(3600)


def send_a_descriptor() -> None:
    """Send a file along on the channel to the supervisor; exit 3 if it is taken."""
    tried = 0
    for fd in descriptors():
        with suppress(OSError), socket.socket(fileno=os.dup(fd)) as sock:
            if sock.type == socket.SOCK_SEQPACKET:
                tried += 1
                socket.send_fds(sock, [b"x"], [0])
                sys.exit(3)
    sys.exit(0 if tried else 4)
