"""Entry points for the tests of robustness."""

from __future__ import annotations

import ctypes
import hashlib
import os
import resource
import sys
import time
from pathlib import Path

from pgbgw import current_worker
from support.workers import append


def expected_of(seed: int) -> dict[str, object]:
    """What the fields of the registration with that seed must be; of many different lengths."""
    digest = hashlib.sha256(str(seed).encode()).digest()
    return {
        "name": f"worker {seed} " + "n" * (seed % 60),
        "type": "t" * (seed % 90 + 1),
        "extra": (digest * 4)[: seed % 129],
        "main_arg": int.from_bytes(digest[:8], "little"),
    }


def blob_of(seed: int) -> bytes:
    return hashlib.sha256(str(seed).encode()).digest() * (seed % 24)


def code_of(seed: int) -> int:
    return 2 + seed % 200


def exit_as_expected(seed: int, blob: bytes) -> None:
    """Exit with the seed's code if this registration is whole, and with 1 if it is not."""
    worker = current_worker().worker
    whole = all(getattr(worker, key) == value for key, value in expected_of(seed).items())
    sys.exit(code_of(seed) if whole and blob == blob_of(seed) else 1)


def count_each_other(directory: str) -> None:
    """Note how many such workers there are at this moment, this one counted."""
    mine = Path(directory, f"here.{os.getpid()}")
    mine.touch()
    append(f"{directory}/counts", str(len(list(Path(directory).glob("here.*")))))
    time.sleep(0.005)  # so that others may come
    mine.unlink()


def segfault(path: str) -> None:
    """Note the time, then die of a real SIGSEGV, without leaving a core file."""
    append(path, str(time.monotonic_ns()))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ctypes.string_at(0)


def make_another_error_of_the_stop() -> None:
    """What happens in __set_name__ if it is interrupted, and in code that wraps what it meets."""
    current_worker().ready()
    try:
        while True:
            current_worker().sleep(3600)
    except BaseException as exc:
        raise RuntimeError("something went wrong") from exc
