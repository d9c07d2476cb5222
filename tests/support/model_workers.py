"""Workers and clients that do what the stateful model tells them."""

from __future__ import annotations

import os
import signal
import sys
from multiprocessing.connection import Connection
from typing import Any

from pgbgw import attach, current_worker

EXIT, FAIL, CRASH = b"0", b"1", b"9"


def obey(fifo: str) -> None:
    """Say ready, then end as the byte says that comes through the FIFO."""
    orders = os.open(fifo, os.O_RDWR)
    current_worker().ready()
    order = os.read(orders, 1)
    if order == CRASH:
        os.kill(os.getpid(), signal.SIGKILL)
    sys.exit(int(order))


def client(test: Connection, address: str) -> None:
    """Call methods of a Client, or of a handle, and send what comes out or is raised."""
    with attach(address) as mine:
        test.send("attached")
        while (order := test.recv()) is not None:
            handle, method, arguments = order
            try:
                answer: Any = getattr(handle or mine, method)
                if callable(answer):
                    answer = answer(*arguments)
            except Exception as exc:
                answer = exc
            test.send(answer)
