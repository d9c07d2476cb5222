"""Preloaded into a supervisor: its wall clock is off by as many seconds as a file says.

The file is $PGBGW_TEST_CLOCK; it is read at every look at the clock, so that a test can step it.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

_file = Path(os.environ["PGBGW_TEST_CLOCK"])
_time, _time_ns = time.time, time.time_ns


def _offset() -> float:
    return float(_file.read_text())


time.time = lambda: _time() + _offset()
time.time_ns = lambda: _time_ns() + int(_offset() * 1e9)
