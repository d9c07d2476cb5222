"""What `pgbgw ps` shows of workers: a table, or JSON.  psutil knows what the kernel counts."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from enum import Enum
from itertools import accumulate
from typing import Any

from pgbgw import _log
from pgbgw.client import Client
from pgbgw.handle import WorkerHandle
from pgbgw.worker import Flags, Outcome, WorkerInfo

Figures = tuple[float, int] | None  # CPU seconds, resident bytes; None: no process


def place(worker: WorkerInfo | WorkerHandle) -> str:
    """How the command line names a registration: SLOT/GEN."""
    return f"{worker.slot}/{worker.generation}"


# --- figures ----------------------------------------------------------------------------------


def figures(info: WorkerInfo) -> Figures:
    """CPU seconds and resident bytes of a worker's process; None if it has none (any more)."""
    if info.pid is None:
        return None
    import psutil

    try:
        process = psutil.Process(info.pid)
        with process.oneshot():
            cpu = process.cpu_times()
            return cpu.user + cpu.system, process.memory_info().rss
    except psutil.Error:
        return None


def supervisor_json(client: Client, workers: Sequence[WorkerInfo]) -> dict[str, Any]:
    """The supervisor, and how full its table is."""
    return {
        "address": client.address,
        "supervisor_pid": client.supervisor_pid,
        "epoch": client.epoch,
        "phase": words(client.phase),
        "max_worker_processes": client.max_worker_processes,
        "max_parallel_workers": client.max_parallel_workers,
        "used_worker_processes": len(workers),
        "used_parallel_workers": sum(bool(w.flags & Flags.CLASS_PARALLEL) for w in workers),
        "loop": loop_json(*client._view.pauses),
    }


def loop_json(longest: int, pauses: Sequence[int]) -> dict[str, Any]:
    """How long the supervisor could not answer, in seconds: the longest time ever, and one that 99
    of 100 passes of its loop stayed below (a power of two in microseconds)."""
    passes = sum(pauses)
    i = next(i for i, below in enumerate(accumulate(pauses)) if 100 * below >= 99 * passes)
    return {
        "passes": passes,
        "longest_pause": longest / 1e9,
        # The last count has no bound but the longest of all.
        "p99_pause": min((1 << i) * 1000 if i < len(pauses) - 1 else longest, longest) / 1e9,
    }


def _uptime(info: WorkerInfo) -> float | None:
    """Seconds since the present process was launched; None if there is none."""
    if info.pid is None or info.started_at is None:
        return None
    return max(0.0, time.time() - info.started_at)


def _cpu_percent(seconds: float, uptime: float | None) -> float:
    """Of one CPU, over the life of the process, as ps(1)."""
    return 100 * seconds / max(uptime or 0.0, 0.01)


# --- output -----------------------------------------------------------------------------------


def words(member: Enum) -> str:
    """A constant as TOML spells it."""
    return member.name.lower().replace("_", "-")


def handle_json(handle: WorkerHandle, name: str) -> dict[str, Any]:
    return {
        "slot": handle.slot,
        "generation": handle.generation,
        "epoch": handle.epoch,
        "name": name,
    }


def outcome_json(outcome: Outcome | None) -> dict[str, Any] | None:
    if outcome is None:
        return None
    return {
        "kind": outcome.kind,
        "exitcode": outcome.exitcode,
        "signal": outcome.signal,
        "status": outcome.status,
        "text": str(outcome),
        "error": outcome.error,
        "at": outcome.at,
        "restarts": outcome.restarts,
        "final": outcome.final,
    }


def worker_json(info: WorkerInfo, figures: Figures) -> dict[str, Any]:
    uptime = _uptime(info)
    cpu, rss = figures or (None, None)
    return {
        "slot": info.slot,
        "generation": info.generation,
        "pid": info.pid,
        "type": info.type,
        "name": info.name,
        "state": info.status.value,
        "ready": info.ready,
        "restarts": info.restarts,
        "cpu_seconds": cpu,
        "cpu_percent": None if cpu is None else round(_cpu_percent(cpu, uptime), 1),
        "rss": rss,
        "uptime": uptime,
        "activity": info.activity,
        "outcome": outcome_json(info.outcome),
        "flags": [words(flag) for flag in Flags if flag and flag in info.flags],
        "start_time": words(info.start_time),
        "restart_time": info.restart_time,
        "registered_at": info.registered_at,
        "started_at": info.started_at,
    }


_COLUMNS = {  # a name and how it is aligned
    "SLOT/GEN": "<",
    "PID": ">",
    "TYPE": "<",
    "NAME": "<",
    "STATE": "<",
    "RESTARTS": ">",
    "CPU": ">",
    "RSS": ">",
    "UPTIME": ">",
    "ACTIVITY": "<",
    "LAST OUTCOME": "<",
}


def table(workers: Iterable[tuple[WorkerInfo, Figures]]) -> Iterator[str]:
    """The lines of the table, its head first."""
    rows = [list(_COLUMNS), *(_row(info, figures) for info, figures in workers)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = zip(row, _COLUMNS.values(), widths, strict=True)
        yield "  ".join(f"{cell:{align}{width}}" for cell, align, width in cells).rstrip()


def _row(info: WorkerInfo, figures: Figures) -> list[str]:
    uptime = _uptime(info)
    cpu = "-" if figures is None else f"{_cpu_percent(figures[0], uptime):.1f}%"
    return [
        place(info),
        "-" if info.pid is None else str(info.pid),
        _log.clean(info.type),
        _log.clean(info.name),
        info.status.value,
        str(info.restarts),
        cpu,
        "-" if figures is None else f"{figures[1] / (1 << 20):.1f}M",
        "-" if uptime is None else _duration(uptime),
        _log.clean(info.activity) or "-",
        "-" if info.outcome is None else _log.clean(str(info.outcome)),
    ]


def _duration(seconds: float) -> str:
    """ "3.2s", "5:07", "1:05:07", "2d 1:05:07"."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if not (days or hours):
        return f"{minutes}:{seconds:02}"
    return (f"{days}d " if days else "") + f"{hours}:{minutes:02}:{seconds:02}"
