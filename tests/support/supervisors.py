"""Supervisors for tests, and their log."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pgbgw import Client, Supervisor


@contextmanager
def supervisor(**settings: object) -> Iterator[Client]:
    """A private supervisor that is stopped fast, or at once if the test fails.

    PGBGW_TEST_SPARES: how many spares it keeps, unless the test says, or preloads what disturbs
    launches.
    """
    spares = "0" if "preload" in settings else os.environ.get("PGBGW_TEST_SPARES", "0")
    settings.setdefault("spares", int(spares))
    client = Supervisor(**settings).start()  # type: ignore[arg-type]
    try:
        yield client
    except BaseException:
        client.stop("immediate", timeout=30)
        raise
    else:
        client.stop("fast", timeout=30)
    finally:
        client.close()


def noticed(client: Client) -> set[tuple[int, int]]:
    """The registrations that the supervisor has taken over; clients see all that there are."""
    view = client._view
    return {place for place in view.occupied() if view.status(place[0])[1]}


def lines(path: str | Path) -> list[str]:
    """The lines that workers have left in a file so far."""
    file = Path(path)
    return file.read_text().split("\n")[:-1] if file.exists() else []
