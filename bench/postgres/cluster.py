"""A scratch PostgreSQL whose background workers are measured: built, started, asked, and gone.

    with Cluster(slots=64) as pg:
        pg.rows("SELECT * FROM bench_launches(10, 1, 0)")

Everything lives in a temporary directory: the cluster, its socket (there is no TCP), the extension
(found there by dynamic_library_path), the log.  Nothing is installed.  If this process dies the
server stops, by its parent-death signal; only the directory stays then.

PostgreSQL is configured to be as fast as it can be here: no fsync, no autovacuum, nothing logged,
nothing but our own in its table of background workers.
"""

from __future__ import annotations

import os
import pwd
import re
import select
import shutil
import signal
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCE = Path(__file__).parent
OLDEST = 15  # shmem_request_hook
USER = "postgres"  # the server refuses to be root
TITLE = "postgres: bench_"  # of all workers of the extension, once they run
BUILT_BY = ("make", "gcc", "setpriv")
PATIENCE = 120  # seconds to start, or to stop

SETTINGS = {
    "autovacuum": "off",
    "dynamic_library_path": "{home}",
    "dynamic_shared_memory_type": "mmap",  # stays in the directory, whatever happens
    "fsync": "off",
    "full_page_writes": "off",
    "hot_standby": "on",
    "jit": "off",
    "listen_addresses": "",
    "log_min_messages": "panic",
    "max_connections": "64",
    "max_logical_replication_workers": "0",  # its launcher would take a slot
    "max_wal_senders": "0",
    "shared_buffers": "16MB",
    "shared_preload_libraries": "pgbgw_bench",
    "unix_socket_directories": "{home}",
}


def pg_config(option: str) -> str:
    program = os.environ.get("PG_CONFIG", "pg_config")
    return subprocess.run(
        [program, option], check=True, capture_output=True, text=True
    ).stdout.strip()


def why_not() -> str | None:
    """Why PostgreSQL cannot be measured here, or None."""
    try:
        version = pg_config("--version")
        headers = Path(pg_config("--includedir-server"))
        binaries = Path(pg_config("--bindir"))
    except (OSError, subprocess.CalledProcessError) as exc:
        return f"PostgreSQL is not installed: {exc}"
    major = re.search(r"\d+", version)
    if major is None or int(major[0]) < OLDEST:
        return f"{version} is older than {OLDEST}"
    if not (headers / "postgres.h").exists():
        return f"the server headers of {version} are not installed ({headers})"
    for program in ("initdb", "postgres", "psql"):
        if not (binaries / program).exists():
            return f"{program} of {version} is not installed ({binaries})"
    for program in BUILT_BY:
        if shutil.which(program) is None:
            return f"{program} is not installed"
    if os.geteuid() == 0:
        try:
            pwd.getpwnam(USER)
        except KeyError:
            return f'run as root, and there is no user "{USER}" for the server'
    return None


class Cluster:
    """slots: max_worker_processes, all of them free.  standby: a hot standby, which accepts what
    bench_pairs registers and launches none of it."""

    def __init__(self, slots: int, *, standby: bool = False, **settings: str) -> None:
        self._standby = standby
        self._settings = {**SETTINGS, "max_worker_processes": str(slots), **settings}
        self._bindir = Path(pg_config("--bindir"))
        self._server: subprocess.Popen[bytes] | None = None
        self._as_server = ["setpriv", "--pdeathsig=QUIT"]
        if os.geteuid() == 0:
            self._as_server += [f"--reuid={USER}", f"--regid={USER}", "--clear-groups"]

    def __enter__(self) -> Cluster:
        self._home = Path(tempfile.mkdtemp(prefix="pgbgw-postgres-"))
        try:
            if os.geteuid() == 0:
                shutil.chown(self._home, USER)
            self._build()
            self._run("initdb", "-D", self._data, "-U", USER, "-A", "trust", "-N", "-E", "UTF8")
            self._start()
            script = (SOURCE / "pgbgw_bench--1.0.sql").read_text()
            self.rows(script.replace("MODULE_PATHNAME", "pgbgw_bench"))
            if self._standby:
                self._stop(signal.SIGINT)  # fast: with a checkpoint, from which it goes on
                (self._data / "standby.signal").touch()
                self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Stop the server, at once, and remove everything."""
        self._stop(signal.SIGQUIT)
        shutil.rmtree(self._home, ignore_errors=True)

    @property
    def _data(self) -> Path:
        return self._home / "data"

    def _build(self) -> None:
        command = ["make", "-s", "-f", SOURCE / "Makefile", "with_llvm=no"]
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
        _check(command, cwd=self._home, env=environment)

    def _run(self, program: str, *arguments: object) -> None:
        _check([*self._as_server, self._bindir / program, *arguments], cwd=self._home)

    # --- the server -------------------------------------------------------------------------

    def _start(self) -> None:
        options = []
        for name, value in self._settings.items():
            options += ["-c", f"{name}={value.format(home=self._home)}"]
        with (self._home / "log").open("ab") as log:
            self._server = subprocess.Popen(
                [*self._as_server, self._bindir / "postgres", "-D", self._data, *options],
                cwd=self._home,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # ^C is for the bench, which stops it
            )
        deadline = time.monotonic() + PATIENCE
        while self._status() != "ready":
            if self._server.poll() is not None or time.monotonic() > deadline:
                log_text = (self._home / "log").read_text(errors="replace")
                raise RuntimeError(f"PostgreSQL did not start:\n{log_text[-2000:]}")
            time.sleep(0.01)

    def _lock_file(self) -> list[str]:
        try:
            return (self._data / "postmaster.pid").read_text().splitlines()
        except OSError:
            return []

    def _status(self) -> str:
        """The last line of the lock file of this very server."""
        lines = self._lock_file()
        return lines[7].strip() if len(lines) > 7 and lines[0] == str(self.pid) else ""

    def _stop(self, signum: int) -> None:
        if self._server is None:
            return
        lines = self._lock_file()
        self._server.send_signal(signum)
        self._server.send_signal(signal.SIGCONT)  # if bench_refusals was interrupted
        try:
            self._server.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()
        if self._server.returncode == -signal.SIGKILL and len(lines) > 6:
            # It could not remove its System V segment, "key id" in the lock file.
            subprocess.run(["ipcrm", "-m", lines[6].split()[1]], check=False, capture_output=True)
        self._server = None

    @property
    def pid(self) -> int:
        """Of the postmaster."""
        assert self._server is not None
        return self._server.pid

    def cpu_ns(self) -> int:
        """CPU time that the postmaster itself has used."""
        return int(Path(f"/proc/{self.pid}/schedstat").read_text().split()[0])

    def settle(self) -> None:
        """Wait until the postmaster has nothing to do."""
        before = -1
        while (now := self.cpu_ns()) != before:
            before = now
            time.sleep(0.05)

    def residents(self, n: int) -> list[int]:
        """Start that many idle workers, which stay; the pids of all there are.  On a standby they
        only take slots."""
        before = len(self.workers())
        [[running]] = self.rows(f"SELECT bench_residents({n})")
        while len(self.workers()) < before + running:  # a worker's title comes after its start
            time.sleep(0.01)
        return self.workers()

    def workers(self) -> list[int]:
        """The pids of the extension's workers."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        return [pid for pid in map(int, children) if _title(pid).startswith(TITLE)]

    def crash(self, workers: list[int]) -> float:
        """SIGKILL the postmaster; seconds until the last of these workers is gone.  Then start
        anew."""
        waiting = {os.pidfd_open(pid) for pid in workers}
        poll = select.poll()
        for descriptor in waiting:
            poll.register(descriptor, select.POLLIN)
        begun = time.monotonic()
        os.kill(self.pid, signal.SIGKILL)
        while waiting:
            for descriptor, _ in poll.poll():
                poll.unregister(descriptor)
                os.close(descriptor)
                waiting.remove(descriptor)
        took = time.monotonic() - begun
        self._stop(signal.SIGKILL)
        self._start()
        return took

    # --- SQL --------------------------------------------------------------------------------

    def rows(self, sql: str) -> list[list[int]]:
        """Run it in a backend of its own; the rows, all of integers."""
        command = [self._bindir / "psql", "-XAtq", "-F", " ", "-v", "ON_ERROR_STOP=1"]
        command += ["-h", self._home, "-U", USER, "-d", "postgres", "-f", "-"]
        output = _check(command, input=f"SET work_mem = '256MB';\n{sql}")
        return [[int(column) for column in line.split()] for line in output.splitlines()]

    def rows_at_once(self, statements: list[str]) -> list[list[list[int]]]:
        """Run each in a backend of its own, all at the same time."""
        with ThreadPoolExecutor(len(statements)) as pool:
            return list(pool.map(self.rows, statements))


def _check(command: list[object], **options: object) -> str:
    """Its output; an error with all of it."""
    done = subprocess.run(  # type: ignore[call-overload]
        [str(word) for word in command],
        text=True,
        capture_output=True,
        **({} if "input" in options else {"stdin": subprocess.DEVNULL}),
        **options,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]}: {done.stdout[-1000:]}{done.stderr[-2000:]}")
    return done.stdout


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    except OSError:
        return ""
