"""Entry points for the tests of the command line."""

from __future__ import annotations

import json
import os

from pgbgw import current_worker
from support.workers import append, sleep_until_stopped


def arguments_to(path: str, *arguments: object) -> None:
    """Add a line with the arguments, as JSON, to a file."""
    append(path, json.dumps(arguments))


def environ_to(path: str) -> None:
    """Leave the environment in a file, as JSON."""
    with open(path, "w") as file:
        json.dump(dict(os.environ), file)


def busy_with(activity: str) -> None:
    """Say what we do, then sleep until stopped."""
    current_worker().title(activity)
    sleep_until_stopped()
