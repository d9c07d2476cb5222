"""Preloaded into a supervisor: what it needs to launch a worker fails, or is slow, on demand.

A fault is a file of $PGBGW_TEST_FAULTS, see support.control.Faults.  Only the supervisor is
affected, not the workers that are forked from it.
"""

from __future__ import annotations

import errno
import functools
import os
import time
from collections.abc import Callable
from pathlib import Path

from pgbgw import _kernel

_directory = Path(os.environ["PGBGW_TEST_FAULTS"])
_supervisor = os.getpid()
_ERRORS = {"fork": errno.EAGAIN, "pidfd_open": errno.EMFILE, "memfd": errno.ENOMEM}


def _order(name: str) -> str | None:
    """What the fault's file says; None without one."""
    try:
        return (_directory / name).read_text()
    except FileNotFoundError:
        return None


def _failing(name: str, function: Callable[..., object]) -> Callable[..., object]:
    @functools.wraps(function)
    def wrapper(*args: object) -> object:
        order = _order(name) if os.getpid() == _supervisor else None
        if order is not None:
            with (_directory / f"{name}.attempts").open("a") as file:
                file.write(f"{time.monotonic_ns()}\n")
            if order == "1":
                (_directory / name).unlink()
            elif order:
                (_directory / name).write_text(str(int(order) - 1))
            raise OSError(_ERRORS[name], os.strerror(_ERRORS[name]))
        if name == "fork" and os.getpid() == _supervisor:
            time.sleep(float(_order("slow_fork") or 0))
        return function(*args)

    return wrapper


def _in_child() -> None:
    """Runs in os.fork(), before any of pgbgw's code in the new process."""
    if os.getppid() != _supervisor:
        return
    time.sleep(float(_order("slow_child") or 0))
    code = _order("exit_after_fork")
    if code is not None:
        (_directory / "exit_after_fork").unlink()  # this one alone
        os._exit(int(code))


os.fork = _failing("fork", os.fork)
os.pidfd_open = _failing("pidfd_open", os.pidfd_open)
_kernel.memfd = _failing("memfd", _kernel.memfd)
os.register_at_fork(after_in_child=_in_child)
