"""circus: a daemon that is asked over ZeroMQ."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from circus.client import CircusClient

from _subject import per_second, serve
from pgbgw._bench import Options, Round, cpu_ns, in_processes, memory, overall

CONFIGURATION = """
[circus]
endpoint = ipc://{0}/endpoint
pubsub_endpoint = ipc://{0}/pubsub
statsd = False
[watcher:resident]
cmd = sleep 3600
"""


def call(client: CircusClient, command: str, **properties: Any) -> Any:
    answer = client.call({"command": command, "properties": properties})
    if answer["status"] == "error":
        raise RuntimeError(answer["reason"])
    return answer


@contextmanager
def daemon() -> Iterator[tuple[int, str]]:
    """Its pid and its endpoint."""
    with tempfile.TemporaryDirectory() as where:
        with open(f"{where}/circus.ini", "w") as file:
            file.write(CONFIGURATION.format(where))
        command = [sys.executable, "-m", "circus.circusd", "--log-level", "CRITICAL", file.name]
        process = subprocess.Popen(command)
        try:
            endpoint = f"ipc://{where}/endpoint"
            client = CircusClient(endpoint=endpoint, timeout=30)
            while call(client, "status", name="resident")["status"] != "active":
                time.sleep(0.01)
            client.stop()
            yield process.pid, endpoint
        finally:
            process.terminate()
            process.wait()


def status(options: Options) -> Iterator[Round]:
    calls = min(options["calls"] // 1000, 200)
    with daemon() as (_, endpoint):

        def asking() -> Iterator[Any]:
            client = CircusClient(endpoint=endpoint, timeout=60)
            call(client, "status", name="resident")
            yield
            begun = time.perf_counter_ns()
            for _ in range(calls):
                call(client, "status", name="resident")
            yield begun, time.perf_counter_ns()

        while True:
            yield {
                "status": {
                    n: overall(in_processes(n, asking)) / calls for n in options["processes"]
                },
            }


def cycle(options: Options) -> Iterator[Round]:
    with daemon() as (_, endpoint):
        client = CircusClient(endpoint=endpoint, timeout=30)

        def one() -> None:
            call(client, "add", name="one", cmd="sleep 3600", start=True, waiting=True)
            call(client, "rm", name="one", waiting=True)

        while True:
            yield {"cycle": per_second(options, one)}


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
    serve({"status": status, "cycle": cycle, "idle": idle})
