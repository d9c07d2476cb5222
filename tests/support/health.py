"""What a supervisor holds, to be compared before and after."""

from __future__ import annotations

import psutil

from pgbgw import Client
from support.rogues import Rogue


class Health:
    """What a supervisor holds: descriptors, children, memory."""

    def __init__(self, client: Client) -> None:
        self.process = psutil.Process(client.supervisor_pid)

    @property
    def descriptors(self) -> int:
        return self.process.num_fds()

    @property
    def children(self) -> int:
        """The log's relay is one."""
        return len(self.process.children())

    @property
    def memory(self) -> int:
        """Bytes that are its alone, so that what it shares with workers does not count."""
        return self.process.memory_full_info().uss


def states(client: Client) -> set[int]:
    """Of all slots and tokens."""
    with Rogue.of(client) as observer:
        return set(observer.states())
