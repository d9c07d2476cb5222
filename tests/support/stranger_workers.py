"""Workers, arguments and preloaded code that would show if something ran where it must not."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from pgbgw import current_worker


def note_process(path: str) -> str:
    with open(path, "a") as file:
        file.write(f"{os.getpid()}\n")
    return path


class Bomb:
    """Whoever unpickles this leaves his pid in a file."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return note_process, (self._path,)


def leave_pid(path: str, *bombs: object) -> None:
    Path(path).write_text(f"{os.getpid()}")


HARMFUL = "\x1b[2J\x07\n\u2028\u202e\u009b"


def behave_badly() -> None:
    """Say what would drive a terminal, wherever a worker can say something."""
    worker = current_worker()
    worker.title(f"busy {HARMFUL} titled")
    worker.on_terminate(lambda: None)
    worker.ready()
    while worker.sleep(3600):
        pass
    raise ValueError(f"bad {HARMFUL} news")


# Preloaded: at each fork of the supervisor say which modules it has.
if path := os.environ.get("PGBGW_TEST_MODULES"):
    os.register_at_fork(before=lambda: Path(path).write_text("\n".join(sys.modules)))
