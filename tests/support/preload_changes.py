"""A module to preload that changes what workers must not inherit, and opens what they may."""

from __future__ import annotations

import atexit
import os
import sys
from pathlib import Path

os.environ["PGBGW_TEST_PRELOADED"] = "yes"
os.environ.pop("PGBGW_TEST_KEPT", None)
sys.path.append("/added/by/preload")
os.chdir("/")

# What preload opens, workers keep; the numbers below it that are free here must not become theirs.
with Path(__file__).open() as file:
    descriptor = os.dup2(file.fileno(), 20, inheritable=False)


def left_behind(path: str) -> None:
    with Path(path).open("a") as file:
        file.write(f"function of preload in {os.getpid()}\n")


if "PGBGW_TEST_ATEXIT" in os.environ:
    atexit.register(left_behind, os.environ["PGBGW_TEST_ATEXIT"])
