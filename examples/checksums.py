"""SHA-256 of every file of Python's standard library and site-packages, by background workers.

    python examples/checksums.py [--root DIRECTORY ...]

One supervisor, and who takes part:

    clients       four processes that attach to it.  Each has a quarter of the directories and asks
                  for a dynamic worker per directory, as far as max_parallel_workers, which all four
                  share, lets it.  A directory whose worker did not end well is tried again.
    workers       hash the files of one directory and leave the digests in the spool: one file,
                  renamed into place when it is complete.
    coordinator   a static worker.  Moves what is in the spool into sqlite.  Storing twice does no
                  harm, and what is stored is removed after the commit, so it may die at any point:
                  the supervisor restarts it, and it goes on.
    main          shows progress, and kills a worker and the coordinator half-way (SIGKILL).

At the end every digest is compared with those of a plain sequential run.  Exit status 1 if one
differs, if a process is left over, or if a slot of the table cannot be had again.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import select
import signal
import sqlite3
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path

import psutil

import pgbgw
from pgbgw import BackgroundWorker, Client, Flags, Supervisor, WorkerHandle, current_worker

CLIENTS = 4
SLOTS = 16
PARALLEL = 6  # workers at once, of all clients together
ATTEMPTS = 3
TICK = 0.5  # seconds between two lines of progress
HANG = 120.0  # seconds; nothing here takes so long


# --- workers ----------------------------------------------------------------------------------


def hash_directory(number: int, directory: str, spool: str, get_stuck: bool) -> None:
    """The worker for one directory: leave its digests in the spool, complete or not at all.

    get_stuck: work, but never come to an end, as real workers sometimes do.
    """
    started = time.monotonic()
    files = digests(Path(directory))
    if get_stuck:
        current_worker().ready()  # says: now you can kill me
        current_worker().sleep(HANG)
    result = {"number": number, "files": files, "started": started, "ended": time.monotonic()}
    unfinished = Path(spool, f"{number}.{os.getpid()}.tmp")
    unfinished.write_text(json.dumps(result))
    unfinished.rename(Path(spool, f"{number}.json"))


def digests(directory: Path) -> list[tuple[str, int, str]]:
    """Path, size and digest of each regular file in a directory."""
    found = []
    with os.scandir(directory) as entries:
        files = sorted(e.path for e in entries if e.is_file(follow_symlinks=False))
    for path in files:
        try:
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                found.append((path, file.tell(), digest))
        except OSError as error:
            found.append((path, 0, error.strerror or "unreadable"))
    return found


# --- the coordinator --------------------------------------------------------------------------


def coordinate(spool: str, database: str) -> None:
    """Store what comes into the spool, until there is a file "finished" and nothing else."""
    me = current_worker()
    connection = sqlite3.connect(database)
    connection.executescript(
        """
        CREATE TABLE IF NOT EXISTS file (path BLOB PRIMARY KEY, bytes INTEGER, digest TEXT);
        CREATE TABLE IF NOT EXISTS directory (number INTEGER PRIMARY KEY, started REAL, ended REAL);
        """
    )
    me.ready()
    while True:
        finished = Path(spool, "finished").exists()  # before we look: nothing comes after it
        results = list(Path(spool).glob("*.json"))
        with connection:  # one transaction
            for result in results:
                store(connection, json.loads(result.read_text()))
        for result in results:
            result.unlink()
        [stored] = connection.execute("SELECT count(*) FROM directory").fetchone()
        me.title(f"{stored} directories stored")
        if finished:
            return  # exit code 0: not to be restarted
        me.wait()  # until a client has news for us


def store(connection: sqlite3.Connection, result: dict) -> None:
    connection.execute(
        "INSERT OR REPLACE INTO directory VALUES (:number, :started, :ended)", result
    )
    connection.executemany(
        "INSERT OR REPLACE INTO file VALUES (?, ?, ?)",
        [(os.fsencode(path), size, digest) for path, size, digest in result["files"]],
    )


# --- clients ----------------------------------------------------------------------------------


def be_client(share: int, directories: list[str], spool: str) -> None:
    """Have our share of the directories hashed; print how many workers that took."""
    todo = deque(range(share, len(directories), CLIENTS))
    running: dict[WorkerHandle, int] = {}
    attempts: Counter[int] = Counter()
    with pgbgw.attach() as client:  # to $PGBGW_ADDRESS
        coordinator = client.find(name="coordinator")
        assert coordinator is not None
        while todo or running:
            while todo and (handle := ask_for_worker(client, todo[0], directories, spool, attempts)):
                running[handle] = todo.popleft()
            # Without a worker of our own the others have all there are: wait for one of theirs.
            others = [] if running else map(client.handle, client.workers(type="hash"))
            done, _ = client.wait([*running, *others], HANG, "ANY_GONE")
            for handle in done & running.keys():
                number = running.pop(handle)
                if handle.wait_until_gone().status != 0:
                    if attempts[number] == ATTEMPTS:
                        sys.exit(f"{directories[number]}: {handle.outcome}, again and again")
                    todo.append(number)
            coordinator.wake()
    print(attempts.total(), attempts.total() - len(attempts))


def ask_for_worker(
    client: Client, number: int, directories: list[str], spool: str, attempts: Counter[int]
) -> WorkerHandle | None:
    """A worker for one directory, or None if there is no room for one now."""
    first = attempts[number] == 0
    handle = client.try_register(
        "checksums:hash_directory",
        *(number, directories[number], spool),
        number == 0 and first,
        name=f"hash {number}",
        type="hash",
        flags=Flags.CLASS_PARALLEL,
    )
    attempts[number] += handle is not None
    return handle


# --- main -------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--root", action="append", help="hash these directories instead")
    parser.add_argument("--client", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.client:
        share, job = options.client
        be_client(int(share), **json.loads(Path(job).read_text()))
        return 0
    with tempfile.TemporaryDirectory(prefix="checksums-") as directory:
        return run(options.root or library(), directory)
