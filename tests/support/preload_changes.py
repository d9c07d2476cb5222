"""A module to preload that changes what workers must not inherit, and opens what they may."""

from __future__ import annotations

import atexit
import os
import sys
from pathlib import Path

MARK = "PGBGW_TEST_PRELOADED"

os.environ[MARK] = "changed by preload"
os.environ.pop("PGBGW_TEST_KEPT", None)
sys.path.append("/added/by/preload")
os.chdir("/")

# What preload opens, workers keep, and with it the numbers that were free below.
reader = os.dup2(os.open(__file__, os.O_RDONLY), 20)

if leaves := os.environ.get("PGBGW_TEST_ATEXIT"):

    def left_behind() -> None:
        with Path(leaves).open("a") as file:
            file.write(f"preloaded function in {os.getpid()}\n")

    atexit.register(left_behind)
