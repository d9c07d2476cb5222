"""Waiting for a condition instead of sleeping and hoping."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def poll_until(condition: Callable[[], T], timeout: float = 30.0, *, message: str = "") -> T:
    """Call condition until it returns something true, and return that.

    AssertionError after timeout seconds.  Nothing that it raises is caught.
    """
    deadline = time.monotonic() + timeout
    pause = 0.001
    while True:
        if result := condition():
            return result
        if time.monotonic() >= deadline:
            what = message or getattr(condition, "__qualname__", repr(condition))
            raise AssertionError(f"not true within {timeout:g} s: {what} (last: {result!r})")
        time.sleep(pause)
        pause = min(pause * 2, 0.05)
