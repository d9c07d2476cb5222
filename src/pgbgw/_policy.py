"""What the supervisor decides: pure functions, without processes, clocks or signals.

Two tables, the order of the shutdown modes, and one delay rule.  The supervisor collects facts (a
phase, an exit status, a time, a random number), asks here, and acts.  All times are integers in
nanoseconds: even the longest interval (86 400 000 s) fits into 64 signed bits ninety times.
"""

from __future__ import annotations

from dataclasses import dataclass

from pgbgw.worker import Phase, ShutdownMode, StartTime

__all__ = [
    "ExitVerdict",
    "domain_may_start",
    "failures_after",
    "judge_exit",
    "reset_delay",
    "restart_delay",
    "should_start_now",
    "stronger",
]

_MS = 1_000_000
_SECOND = 1_000_000_000

FIRST_DELAY = 10 * _MS
"""The least time between an exit and a restart, and the first step of the backoff."""
LONGEST_BACKOFF = 60 * _SECOND
"""Where the backoff stops growing; an interval that the worker asked for may be longer."""
STEADY_RUN = 10 * _SECOND
"""A worker that ran this long has recovered: its next failure counts as the first."""
PATIENCE = 2
"""So many restarts (or resets) in a row come without backoff."""


# --- may it start? --------------------------------------------------------------------------------


def should_start_now(phase: Phase, start_time: StartTime) -> bool:
    """Tell whether a worker of `start_time` may be launched in `phase` (bgworker_should_start_now).

    Phases and start times are numbered alike, each start time by the first phase that satisfies it.
    STOPPING satisfies none: nothing new starts, due restarts included.
    """
    return phase != Phase.STOPPING and start_time <= phase


def domain_may_start(winding_down: bool, recovery: Phase | None, start_time: StartTime) -> bool:
    """Tell whether a reset of the crash domain lets a SHMEM_ACCESS worker start (FatalError).

    The supervisor's own phase never goes back, since workers outside the domain are not held back:
    the domain has a phase of its own while it recovers.  `winding_down`: the old workers are not
    all gone yet, nothing starts.  `recovery`: the phase that the startup worker, which runs again,
    has reached; None if none runs.  Unlike at a cold start even SUPERVISOR_START waits for it.

    The caller asks `should_start_now` with the supervisor's own phase as well.
    """
    if winding_down:
        return False
    if recovery is None:
        return True
    return recovery != Phase.STARTUP and should_start_now(recovery, start_time)


# --- how to stop ----------------------------------------------------------------------------------


def stronger(current: ShutdownMode, requested: ShutdownMode) -> ShutdownMode:
    """Return the shutdown to go on with: a stronger request overrides, a weaker never (pmdie)."""
    return max(current, requested)


# --- what an exit means ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ExitVerdict:
    """What follows from a worker's exit."""

    crash: bool
    """The memory of the crash domain may be damaged: all that map it must be reset."""
    forget: bool
    """It never runs again: unregister it, at once or (after a crash) when the reset is done."""


def judge_exit(
    *,
    exitcode: int | None,
    signal: int | None,
    shmem_access: bool,
    attached: bool,
    clean: bool,
    terminated: bool,
    never_restart: bool,
) -> ExitVerdict:
    """Judge the exit of a worker (CleanupBackgroundWorker and the dead-man switch of pmsignal.c).

    Either `exitcode` or `signal` is given; neither means that the status was lost, which counts as
    a death by signal.  `attached` and `clean` are the two ends of the dead-man switch: the worker
    said that it is about to map the domain's memory, and that it no longer does.  Having died in
    between, it may have left that memory half written, whatever its exit status says; having died
    before, only the status decides.  Without `shmem_access` no exit is a crash: it follows the
    restart policy like exit 1.

    Exit 0 is final even for a worker that left by `_exit(0)` without a clean end: that is a crash,
    and it is not launched again.
    """
    died_inside = attached and not clean
    unexpected = signal is not None or exitcode not in (0, 1)
    finished = signal is None and exitcode == 0
    return ExitVerdict(
        crash=shmem_access and (died_inside or unexpected),
        forget=finished or terminated or never_restart,
    )


# --- when to try again ----------------------------------------------------------------------------


def restart_delay(failures: int, restart_ns: int, jitter: float) -> int:
    """Return the nanoseconds between a worker's exit and its next launch.

    `failures` says which restart in a row this is (1, 2, ...), `restart_ns` is the interval that
    the worker asked for: the delay is never shorter.  The first two restarts come after at least
    10 ms, the following ones back off: 20 ms, 40 ms, ... 60 s, each scaled by up to 20 % as
    `jitter` goes from -1 to 1, so that workers which failed together do not come back together.

    The same rule holds for a fork that fails.
    """
    if failures <= PATIENCE:
        return max(restart_ns, FIRST_DELAY)
    # Doubled 13 times it is beyond the limit; a worker may fail more often than a shift can bear.
    backoff = min(FIRST_DELAY << min(failures - PATIENCE, 13), LONGEST_BACKOFF)
    return max(restart_ns, backoff + int(backoff * 0.2 * jitter))


def failures_after(failures: int, ran_ns: int) -> int:
    """Count the failure that ended a run of `ran_ns` nanoseconds; `failures` came right before it.

    The result is what `restart_delay` takes.  A run of 10 s or more starts the count anew.
    """
    return 1 if ran_ns >= STEADY_RUN else failures + 1


def reset_delay(resets: int, jitter: float) -> int:
    """Return the nanoseconds before the domain is launched again after a crash.

    `resets` says which reset in a row this is (1, 2, ...; counted as restarts are, by
    `failures_after`).  The first two are immediate (ResetBackgroundWorkerCrashTimes), then they
    back off like restarts, so that a worker that crashes at every start cannot keep the others
    from their work.
    """
    return 0 if resets <= PATIENCE else restart_delay(resets, 0, jitter)
