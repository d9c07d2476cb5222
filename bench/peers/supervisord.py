"""supervisord: a daemon that is asked by XML-RPC over a Unix socket."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
import xmlrpc.client
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

from supervisor.xmlrpc import SupervisorTransport

from _subject import per_second, serve
from pgbgw._bench import Options, Round, cpu_ns, in_processes, memory, overall

CONFIGURATION = """
[supervisord]
nodaemon = true
silent = true
logfile = {0}/log
pidfile = {0}/pid
[unix_http_server]
file = {0}/socket
[rpcinterface:supervisor]
supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface
[program:resident]
command = sleep 3600
autorestart = true
startsecs = 0
[program:one]
command = true
autostart = false
autorestart = false
startsecs = 0
"""


def client(where: str) -> Any:
    transport = SupervisorTransport(None, None, f"unix://{where}/socket")
    return xmlrpc.client.ServerProxy("http://127.0.0.1", transport).supervisor


@contextmanager
def daemon() -> Iterator[tuple[int, str]]:
    """Its pid and its directory."""
    with tempfile.TemporaryDirectory() as where:
        with open(f"{where}/supervisord.conf", "w") as file:
            file.write(CONFIGURATION.format(where))
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "supervisor.supervisord", "-c", file.name],
        )
        try:
            while not (os.path.exists(f"{where}/socket") and running(client(where))):
                if process.poll() is not None:
                    raise RuntimeError(f"supervisord ended with status {process.returncode}")
                time.sleep(0.01)
            yield process.pid, where
        finally:
            process.terminate()
            process.wait()


def running(asked: Any) -> int:
    """The pid of the resident program, or 0."""
    try:
        return int(asked.getProcessInfo("resident")["pid"])
    except OSError:
        return 0


def status(options: Options) -> Iterator[Round]:
    calls = min(options["calls"] // 1000, 200)
    with daemon() as (_, where):

        def asking() -> Iterator[Any]:
            asked = client(where)
            running(asked)
            yield
            begun = time.perf_counter_ns()
            for _ in range(calls):
                asked.getProcessInfo("resident")
            yield begun, time.perf_counter_ns()

        while True:
            yield {
                "status": {
                    n: overall(in_processes(n, asking)) / calls for n in options["processes"]
                }
            }


def cycle(options: Options) -> Iterator[Round]:
    with daemon() as (_, where):
        asked = client(where)

        def one() -> None:
            asked.startProcess("one", False)  # returns when it was forked
            while asked.getProcessInfo("one")["statename"] != "EXITED":
                pass

        while True:
            yield {"cycle": per_second(options, one)}


def restart(options: Options) -> Iterator[Round]:
    with daemon() as (_, where):
        asked = client(where)

        def one() -> float:
            pid = running(asked)
            before = time.monotonic_ns()
            os.kill(pid, signal.SIGKILL)
            while running(asked) in (0, pid):
                pass
            return (time.monotonic_ns() - before) / 1000

        while True:
            yield {"restart": median(one() for _ in range(min(options["calls"], 5)))}


def idle(options: Options) -> Iterator[Round]:
    with daemon() as (pid, _):
        while True:
            before = cpu_ns(pid)
            time.sleep(options["seconds"])
            yield {
                "idle_cpu": (cpu_ns(pid) - before) / options["seconds"] / 1e7,
                "resident": memory(pid, "Rss") / (1 << 20),
            }


if __name__ == "__main__":
    serve({"status": status, "cycle": cycle, "restart": restart, "idle": idle})
