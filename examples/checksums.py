"""SHA-256 of every file of Python's standard library and site-packages, by background workers.

    python examples/checksums.py [--root DIRECTORY ...]

One supervisor, and:

    workers       one for each directory.  It hashes the files there and leaves the digests in the
                  spool: one file, which gets its name when it is complete.
    clients       four processes that attach to the supervisor.  Each asks for the workers of a
                  quarter of the directories; max_parallel_workers limits all four together.  A
                  directory whose worker has failed gets another one.
    coordinator   a static worker that moves what is in the spool into sqlite.  Storing twice does
                  no harm, and a file is removed only after the commit, so it may die at any point:
                  the supervisor restarts it, and it goes on.
    main          this script: shows progress, and in the middle kills a worker and the coordinator
                  with SIGKILL.

In the end every digest is compared with that of a plain sequential run.  The exit status is 1 if
one differs, if a process is left over, or if the slots of the table are not all free again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sqlite3
import sys
import sysconfig
import tempfile
import time
from collections import Counter, deque
from contextlib import ExitStack, closing
from itertools import accumulate
from pathlib import Path
from select import select
from signal import SIGKILL
from subprocess import PIPE, Popen

import psutil

import pgbgw
from pgbgw import BackgroundWorker, Client, Flags, WorkerHandle, current_worker

CLIENTS = 4
SLOTS = 16
PARALLEL = 6  # workers at once, of all clients together
ATTEMPTS = 3
TICK = 0.5  # seconds between two lines of progress
HANG = 120.0  # seconds; nothing here takes so long


# --- workers ----------------------------------------------------------------------------------


def hash_directory(number: int, directory: str, spool: str, get_stuck: bool) -> None:
    """The worker for one directory.  get_stuck: do not come to an end, as happens to the best."""
    started = time.monotonic()
    files = digests(directory)
    if get_stuck:
        current_worker().ready()  # to be killed
        current_worker().sleep(HANG)
    result = {"number": number, "files": files, "started": started, "ended": time.monotonic()}
    unfinished = Path(spool, f"{number}.{os.getpid()}.tmp")
    unfinished.write_text(json.dumps(result))
    unfinished.rename(Path(spool, f"{number}.json"))


def digests(directory: str) -> list[tuple[str, int, str]]:
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
    """Store what comes into the spool, until there is nothing but a file "finished"."""
    me = current_worker()
    connection = sqlite3.connect(database)
    connection.executescript(
        """
        PRAGMA synchronous = OFF;  -- we may be killed; the machine is not
        CREATE TABLE IF NOT EXISTS file (path BLOB PRIMARY KEY, bytes INTEGER, digest TEXT);
        CREATE TABLE IF NOT EXISTS directory (number INTEGER PRIMARY KEY, started REAL, ended REAL);
        """
    )
    me.ready()
    while True:
        finished = Path(spool, "finished").exists()  # looked for first: it is made last
        results = list(Path(spool).glob("*.json"))
        with connection:  # one transaction
            for result in map(json.loads, map(Path.read_text, results)):
                ran = (result["number"], result["started"], result["ended"])
                files = [(os.fsencode(path), *rest) for path, *rest in result["files"]]
                connection.execute("INSERT OR REPLACE INTO directory VALUES (?, ?, ?)", ran)
                connection.executemany("INSERT OR REPLACE INTO file VALUES (?, ?, ?)", files)
        for path in results:
            path.unlink()
        [stored] = connection.execute("SELECT count(*) FROM directory").fetchone()
        me.title(f"{stored} directories stored")
        if finished:
            connection.close()
            return  # exit code 0: not to be restarted
        me.wait()  # until a client has news for us


# --- clients ----------------------------------------------------------------------------------


def be_client(share: int, directories: list[str], spool: str) -> None:
    """Have our share of the directories hashed; print how many workers that took, and how many of
    them in vain."""
    todo = deque(range(share, len(directories), CLIENTS))
    running: dict[WorkerHandle, int] = {}
    attempts: Counter[int] = Counter()
    with pgbgw.attach() as client:  # $PGBGW_ADDRESS says where
        coordinator = client.find(name="coordinator")
        assert coordinator is not None
        while todo or running:
            while todo:
                number = todo[0]
                stuck = number == 0 and attempts[number] == 0
                handle = client.try_register(
                    "checksums:hash_directory",
                    *(number, directories[number], spool, stuck),
                    name=f"hash {number}",
                    type="hash",
                    flags=Flags.CLASS_PARALLEL,
                )
                if handle is None:
                    break  # no room now
                running[handle] = todo.popleft()
                attempts[number] += 1
            # Without a worker of our own, the others have all there may be: wait for one of theirs.
            others = [] if running else map(client.handle, client.workers(type="hash"))
            gone, _ = client.wait([*running, *others], return_when="ANY_GONE")
            for handle in gone & running.keys():
                number = running.pop(handle)
                outcome = handle.wait_until_gone()
                if outcome.status == 0:
                    coordinator.wake()
                elif attempts[number] < ATTEMPTS:
                    todo.append(number)
                else:
                    sys.exit(f"{directories[number]}: {outcome}, again and again")
    print(attempts.total(), attempts.total() - len(attempts))


# --- main -------------------------------------------------------------------------------------


def run(roots: list[str], scratch: Path) -> int:
    """The whole job; the exit status."""
    clock = scratch.stat().st_ctime_ns  # now, as file systems see it
    directories = directories_below(roots)
    spool, database, job = scratch / "spool", scratch / "results.db", scratch / "job.json"
    spool.mkdir()
    job.write_text(json.dumps({"directories": directories, "spool": str(spool)}))
    os.environ["PGBGW_ADDRESS"] = address = str(scratch / "supervisor")

    supervisor = pgbgw.Supervisor(
        address=address,
        max_worker_processes=SLOTS,
        max_parallel_workers=PARALLEL,
        preload=["checksums"],
    )
    supervisor.register(
        BackgroundWorker(
            entry="checksums:coordinate",
            name="coordinator",
            args=(str(spool), str(database)),
            flags=Flags.SHMEM_ACCESS,
            restart_time=0.1,
        )
    )
    begin = time.monotonic()
    with supervisor as client:
        coordinator = client.find(name="coordinator")
        assert coordinator is not None
        launched, in_vain, seen = run_clients(client, coordinator, job, len(directories))
        (spool / "finished").touch()
        coordinator.wake()
        outcome = coordinator.wait_until_gone(HANG)
        seconds = time.monotonic() - begin
        leaked = not every_slot_is_free(client)
    orphans = left_over(address)

    stored, overlap = results(database)
    expected = {path: (size, d) for one in directories for path, size, d in digests(one)}
    differences = {path for path, _ in stored.items() ^ expected.items()}
    foreign = {path for path in differences if changed_since(clock, path)}
    most = max(seen, overlap)
    table = {
        "directories": len(directories),
        "files": len(stored),
        "bytes": sum(size for size, _ in stored.values()),
        "workers launched": launched + 1 + outcome.restarts,
        "workers in vain": in_vain + outcome.restarts,
        "restarts": outcome.restarts,
        "most workers at once": most,
        "seconds": round(seconds, 1),
        "files changed by others": len(foreign),
        "files that differ": len(differences - foreign),
    }
    for name, value in table.items():
        print(f"{name:24}{value:>14,}")

    problems = [f"{path!r} differs" for path in sorted(differences - foreign)]
    problems += [f"process {pid} is left over" for pid in orphans]
    problems += ["a slot or token is leaked"] if leaked else []
    problems += [f"the parallel limit is {PARALLEL}"] if most > PARALLEL else []
    problems += [f"the coordinator {outcome}"] if outcome.status != 0 else []
    problems += ["nobody was killed"] if not (in_vain and outcome.restarts) else []
    for problem in problems:
        print(f"PROBLEM: {problem}")
    return 1 if problems else 0


def run_clients(
    client: Client, coordinator: WorkerHandle, job: Path, total: int
) -> tuple[int, int, int]:
    """Start the clients, show progress until all have ended, and do the killing in between.

    Returns how many workers they have launched, how many of them in vain, and the most that were
    seen at once.
    """
    begin = time.monotonic()
    killed = False
    stored = seen = 0
    with ExitStack() as stack:
        processes = []
        for share in range(CLIENTS):
            command = [sys.executable, __file__, "--client", str(share), str(job)]
            process = stack.enter_context(Popen(command, stdout=PIPE, text=True))
            stack.callback(process.kill)  # where we leave by an error, for the others nothing
            processes.append(process)
        ends = {os.pidfd_open(process.pid): process for process in processes}
        while ends:
            seconds = time.monotonic() - begin
            running = len(client.workers(type="hash"))
            seen = max(seen, running)
            said = coordinator.info().activity.partition(" ")[0]
            stored = int(said or stored)  # just restarted it says nothing yet
            show(f"{seconds:5.1f} s: {stored} of {total} directories, {running} workers")
            if not killed and stored >= total // 3:
                killed = kill_both(client, coordinator)
            for fd in select(ends, [], [], TICK)[0]:
                os.close(fd)
                if ends.pop(fd).wait() != 0:
                    raise SystemExit("a client has failed")
            if seconds > HANG:
                raise SystemExit("this takes too long")
        show("")
        figures = [process.stdout.read().split() for process in processes]
        return sum(int(f[0]) for f in figures), sum(int(f[1]) for f in figures), seen


def kill_both(client: Client, coordinator: WorkerHandle) -> bool:
    """SIGKILL the coordinator and the worker that is stuck, once there is one.

    Without the latter's directory no client is done, so both happen in the middle of the job.
    """
    stuck = client.find(name="hash 0")
    if stuck is None or stuck.wait_for_ready(HANG) is not pgbgw.HandleStatus.STARTED:
        return False
    for victim in (coordinator, stuck):
        assert victim.pid is not None
        os.kill(victim.pid, SIGKILL)
    return True


def every_slot_is_free(client: Client) -> bool:
    """Can the table be filled to the last slot, and the parallel limit be reached?"""
    parallel = BackgroundWorker(entry="checksums:hold_a_slot", flags=Flags.CLASS_PARALLEL)
    other = BackgroundWorker(entry="checksums:hold_a_slot")
    try:
        handles = client.register_many([parallel] * PARALLEL + [other] * (SLOTS - PARALLEL))
    except (pgbgw.NoFreeSlotError, pgbgw.ParallelLimitError):
        return False
    for handle in handles:
        handle.wait_for_ready(HANG)
        handle.terminate()
    return not client.wait(handles, HANG, "ALL_GONE")[1]


def hold_a_slot() -> None:
    me = current_worker()
    me.on_terminate(lambda: None)  # end the sleep, and so the worker, in peace
    me.ready()
    me.sleep(HANG)


def left_over(address: str) -> list[int]:
    """Processes with our address in their environment: supervisor, workers, clients."""
    ours = [
        process
        for process in psutil.process_iter(["environ"])
        if (process.info["environ"] or {}).get("PGBGW_ADDRESS") == address
    ]
    return [process.pid for process in psutil.wait_procs(ours, timeout=10)[1]]


def results(database: Path) -> tuple[dict[str, tuple[int, str]], int]:
    """What the coordinator has stored; how many workers ran at once, at most."""
    with closing(sqlite3.connect(database)) as connection:
        rows = connection.execute("SELECT path, bytes, digest FROM file")
        stored = {os.fsdecode(path): (size, digest) for path, size, digest in rows}
        spans = connection.execute("SELECT started, ended FROM directory").fetchall()
    steps = sorted(step for start, end in spans for step in ((start, 1), (end, -1)))
    return stored, max(accumulate(step for _, step in steps), default=0)


def changed_since(clock: int, path: str) -> bool:
    """Has somebody changed, made or removed this file while we ran?"""
    place = path if os.path.lexists(path) else os.path.dirname(path)
    return os.lstat(place).st_ctime_ns >= clock


def library() -> list[str]:
    """Where the running Python has its standard library and site-packages."""
    paths = sysconfig.get_paths()
    kinds = ("stdlib", "platstdlib", "purelib", "platlib")
    return sorted({os.path.realpath(paths[kind]) for kind in kinds})


def directories_below(roots: list[str]) -> list[str]:
    """All directories with files, without links; each once."""
    found = set()
    for root in map(os.path.realpath, roots):
        for path, names, files in os.walk(root):
            if path == root and "site-packages" in names:
                names.remove("site-packages")  # a root of its own, if this Python uses it
            if files:
                found.add(path)
    return sorted(found)


def show(progress: str) -> None:
    """One line: on a terminal over the one before."""
    if sys.stdout.isatty():
        print(f"\r{progress:78}\r", end="", flush=True)
    elif progress:
        print(progress, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--root", action="append", help="hash what is below this instead")
    parser.add_argument("--client", nargs=2, metavar=("SHARE", "JOB"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.client:
        share, job = options.client
        be_client(int(share), **json.loads(Path(job).read_text()))
        return 0
    with tempfile.TemporaryDirectory(prefix="checksums-") as scratch:
        return run(options.root or library(), Path(scratch))


if __name__ == "__main__":
    sys.exit(main())
