"""A startup worker that has time: the supervisor stays in STARTUP until the test says otherwise."""

from __future__ import annotations

import os
from pathlib import Path

from pgbgw import current_worker

RELEASE = "PGBGW_TEST_RELEASE"


def wait_for_release() -> None:
    """Return, so that RUNNING is reached, when the file $PGBGW_TEST_RELEASE is there."""
    release = Path(os.environ[RELEASE])
    while not release.exists():
        current_worker().sleep(0.05)
