"""A supervisor whose system calls and allocations fail when the test says so.

with FailingCalls.preloaded(tmp_path, monkeypatch) as calls, supervisor() as client:
    calls.watch(client.supervisor_pid)
    calls.fail("fork", errno.EAGAIN, after=2)  # the third from here on
"""

from __future__ import annotations

import mmap
import platform
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.builds import build_library

# In the order of failing_calls.c.
NAMES = (
    "fork",
    "pidfd_open",
    "accept4",
    "epoll_ctl",
    "epoll_wait",
    "send",
    "sendmsg",
    "recv",
    "waitid",
    "mmap",
    "madvise",
    "socketpair",
    "memfd_create",
    "open",
    "read",
    "poll",
    "ioctl",
    "getsockopt",
    "setsockopt",
    "pidfd_send_signal",
    "malloc",
)
_HEAD = struct.Struct("<iIiIII")  # pid, call, error, passes, fails, failed
_PID, _CALL, _ERROR, _PASSES, _FAILS, _FAILED = range(0, 24, 4)
NEXT = -1  # the next process that starts with it


class FailingCalls:
    """The plan that the library obeys."""

    def __init__(self, plan: mmap.mmap) -> None:
        self._plan = plan

    @classmethod
    @contextmanager
    def preloaded(
        cls, directory: Path, monkeypatch: pytest.MonkeyPatch, *, malloc: bool = False
    ) -> Iterator[FailingCalls]:
        """Processes that start in this block have the library.

        malloc: every allocation of Python's counts, the small ones too.
        """
        if platform.libc_ver()[0] != "glibc":
            pytest.skip("needs the GNU C library")
        library, plan = build_library("failing_calls.c", directory), directory / "plan"
        plan.write_bytes(bytes(4096))
        with (
            plan.open("r+b") as file,
            mmap.mmap(file.fileno(), 4096) as memory,
            monkeypatch.context() as patch,
        ):
            patch.setenv("LD_PRELOAD", str(library))
            patch.setenv("PGBGW_TEST_PLAN", str(plan))
            if malloc:
                patch.setenv("PYTHONMALLOC", "malloc")
            yield cls(memory)

    def _put(self, at: int, value: int) -> None:
        self._plan[at : at + 4] = value.to_bytes(4, "little", signed=value < 0)

    def _get(self, at: int) -> int:
        return int.from_bytes(self._plan[at : at + 4], "little")

    def watch(self, pid: int) -> None:
        """The process whose calls count, and fail; 0: none, NEXT: the next to start."""
        self._put(_PID, pid)

    def fail(self, name: str, error: int, *, after: int = 0, times: int = 1) -> None:
        """After so many more calls that go well let so many fail."""
        self.stop()
        self._put(_CALL, NAMES.index(name))
        self._put(_ERROR, error)
        self._put(_FAILED, 0)
        self._put(_PASSES, after)
        self._put(_FAILS, times)

    def stop(self) -> None:
        self._put(_FAILS, 0)

    @property
    def failed(self) -> int:
        """How many calls have failed since fail()."""
        return self._get(_FAILED)

    def count(self, name: str) -> int:
        """How many calls there were."""
        at = _HEAD.size + 8 * NAMES.index(name)
        return int.from_bytes(self._plan[at : at + 8], "little")
