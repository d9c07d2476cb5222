"""The supervisor's decisions, as tables and as properties; no processes, clocks or signals."""

from __future__ import annotations

import ast
import inspect
from itertools import product, repeat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgbgw import _policy
from pgbgw._policy import (
    ExitVerdict,
    domain_may_start,
    failures_after,
    judge_exit,
    reset_delay,
    restart_delay,
    should_start_now,
    stronger,
)
from pgbgw.worker import MAX_RESTART_TIME, Phase, ShutdownMode, StartTime

MS = 1_000_000
SECOND = 1_000_000_000

STARTUP, CONSISTENT, RUNNING, STOPPING = Phase
SUPERVISOR_START, CONSISTENT_STATE, RECOVERY_FINISHED = StartTime
NONE, SMART, FAST, IMMEDIATE = ShutdownMode

phases = st.sampled_from(Phase)
start_times = st.sampled_from(StartTime)
modes = st.sampled_from(ShutdownMode)
counts = st.integers(1, 10**9)
jitters = st.floats(-1, 1)
intervals = st.integers(0, MAX_RESTART_TIME * SECOND)


def test_the_module_imports_nothing_that_could_make_it_impure() -> None:
    tree = ast.parse(inspect.getsource(_policy))
    imported = {
        name
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported == {"__future__", "dataclasses", "pgbgw.worker"}


# --- phases ---------------------------------------------------------------------------------------

PHASE_MATRIX = [
    # phase       SUPERVISOR_START  CONSISTENT_STATE  RECOVERY_FINISHED
    (STARTUP, (True, False, False)),
    (CONSISTENT, (True, True, False)),
    (RUNNING, (True, True, True)),
    (STOPPING, (False, False, False)),
]


@pytest.mark.parametrize(
    ("phase", "start_time", "starts"),
    [
        (phase, start_time, starts)
        for phase, row in PHASE_MATRIX
        for start_time, starts in zip(StartTime, row, strict=True)
    ],
)
def test_B04_each_cell_of_the_phase_matrix(
    phase: Phase, start_time: StartTime, starts: bool
) -> None:
    assert should_start_now(phase, start_time) is starts


def test_B04_the_matrix_above_is_complete() -> None:
    assert [phase for phase, _ in PHASE_MATRIX] == list(Phase)


@given(phases, phases, start_times)
def test_B05_what_may_start_in_a_phase_may_start_in_all_later_ones_up_to_running(
    one: Phase, other: Phase, start_time: StartTime
) -> None:
    earlier, later = sorted((one, other))
    if later != STOPPING and should_start_now(earlier, start_time):
        assert should_start_now(later, start_time)


@given(start_times)
def test_B06_H07_nothing_starts_while_stopping(start_time: StartTime) -> None:
    assert not should_start_now(STOPPING, start_time)


# --- the crash domain -----------------------------------------------------------------------------

DOMAIN_MATRIX = [
    # recovery    SUPERVISOR_START  CONSISTENT_STATE  RECOVERY_FINISHED
    (STARTUP, (False, False, False)),
    (CONSISTENT, (True, True, False)),
    (RUNNING, (True, True, True)),
    (STOPPING, (False, False, False)),
    (None, (True, True, True)),
]


@pytest.mark.parametrize(
    ("recovery", "start_time", "starts"),
    [
        (recovery, start_time, starts)
        for recovery, row in DOMAIN_MATRIX
        for start_time, starts in zip(StartTime, row, strict=True)
    ],
)
def test_G04_each_cell_of_the_domain_s_matrix_after_a_reset(
    recovery: Phase | None, start_time: StartTime, starts: bool
) -> None:
    assert domain_may_start(False, recovery, start_time) is starts


def test_G04_the_earliest_worker_starts_during_a_cold_startup_but_not_during_a_recovery() -> None:
    assert should_start_now(STARTUP, SUPERVISOR_START)
    assert not domain_may_start(False, STARTUP, SUPERVISOR_START)
    assert domain_may_start(False, CONSISTENT, SUPERVISOR_START)


@given(st.none() | phases, start_times)
def test_G01_nothing_of_the_domain_starts_while_it_is_wound_down(
    recovery: Phase | None, start_time: StartTime
) -> None:
    assert not domain_may_start(True, recovery, start_time)


@given(phases, start_times)
def test_G04_a_recovery_never_lets_start_what_a_cold_startup_would_hold_back(
    recovery: Phase, start_time: StartTime
) -> None:
    if domain_may_start(False, recovery, start_time):
        assert should_start_now(recovery, start_time)


# --- shutdown -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("current", "requested", "result"),
    [
        (NONE, SMART, SMART),
        (SMART, FAST, FAST),
        (SMART, IMMEDIATE, IMMEDIATE),
        (FAST, IMMEDIATE, IMMEDIATE),
        (FAST, SMART, FAST),
        (IMMEDIATE, SMART, IMMEDIATE),
        (IMMEDIATE, FAST, IMMEDIATE),
        (FAST, NONE, FAST),
    ],
)
def test_H06_a_stronger_stop_overrides_a_weaker_one_and_never_the_reverse(
    current: ShutdownMode, requested: ShutdownMode, result: ShutdownMode
) -> None:
    assert stronger(current, requested) is result


@given(st.lists(modes, min_size=1).flatmap(lambda m: st.tuples(st.just(m), st.permutations(m))))
def test_H06_of_several_requests_the_strongest_wins_in_whatever_order_they_come(
    requests: tuple[list[ShutdownMode], list[ShutdownMode]],
) -> None:
    for order in requests:
        mode = NONE
        for request in order:
            mode = stronger(mode, request)
        assert mode is max(requests[0])


# --- exit status ----------------------------------------------------------------------------------


def judge(
    exitcode: int | None,
    signal: int | None = None,
    *,
    shmem: bool,
    attached: bool = False,
    clean: bool = False,
    terminated: bool = False,
    never: bool = False,
) -> ExitVerdict:
    return judge_exit(
        exitcode=exitcode,
        signal=signal,
        shmem_access=shmem,
        attached=attached,
        clean=clean,
        terminated=terminated,
        never_restart=never,
    )


DONE = ExitVerdict(crash=False, forget=True)
AGAIN = ExitVerdict(crash=False, forget=False)
CRASH = ExitVerdict(crash=True, forget=False)
CRASH_DONE = ExitVerdict(crash=True, forget=True)

# The exit-status decision table, for a worker with a restart interval that nobody terminated.
EXITS = [
    # exit code, signal, clean end of the dead-man switch, SHMEM_ACCESS
    (0, None, True, True, DONE),
    (0, None, True, False, DONE),
    (0, None, False, True, CRASH_DONE),
    (0, None, False, False, DONE),
    (1, None, True, True, AGAIN),
    (1, None, True, False, AGAIN),
    (1, None, False, True, CRASH),
    (1, None, False, False, AGAIN),
    (2, None, True, True, CRASH),
    (2, None, False, True, CRASH),
    (255, None, True, True, CRASH),
    (57, None, True, False, AGAIN),
    (57, None, False, False, AGAIN),
    (None, 9, True, True, CRASH),
    (None, 9, False, True, CRASH),
    (None, 15, True, True, CRASH),
    (None, 9, True, False, AGAIN),
    (None, 11, False, False, AGAIN),
]


@pytest.mark.parametrize(("exitcode", "signal", "clean", "shmem", "verdict"), EXITS)
def test_each_row_of_the_exit_status_table_for_a_restartable_worker(
    exitcode: int | None, signal: int | None, clean: bool, shmem: bool, verdict: ExitVerdict
) -> None:
    assert judge(exitcode, signal, shmem=shmem, attached=shmem, clean=clean) == verdict


@pytest.mark.parametrize(("exitcode", "signal", "clean", "shmem", "verdict"), EXITS)
@pytest.mark.parametrize(("terminated", "never"), [(True, False), (False, True), (True, True)])
def test_F01_F08_terminated_or_never_restart_changes_whether_it_is_forgotten_and_nothing_else(
    exitcode: int | None,
    signal: int | None,
    clean: bool,
    shmem: bool,
    verdict: ExitVerdict,
    terminated: bool,
    never: bool,
) -> None:
    judged = judge(
        exitcode,
        signal,
        shmem=shmem,
        attached=shmem,
        clean=clean,
        terminated=terminated,
        never=never,
    )
    assert judged == ExitVerdict(crash=verdict.crash, forget=True)


def test_C01_B10_a_restartable_worker_that_exits_0_is_done_for_good() -> None:
    assert judge(0, shmem=False) == DONE
    assert judge(0, shmem=True, attached=True, clean=True) == DONE


def test_C02_a_never_restart_worker_that_exits_1_is_done_for_good() -> None:
    assert judge(1, shmem=False, never=True) == DONE


def test_C03_C04_a_restartable_worker_that_exits_1_runs_again() -> None:
    assert judge(1, shmem=False) == AGAIN
    assert judge(1, shmem=True, attached=True, clean=True) == AGAIN


def test_C11_G09_leaving_with_0_but_without_detaching_is_a_crash_and_is_not_relaunched() -> None:
    assert judge(0, shmem=True, attached=True, clean=False) == CRASH_DONE


@pytest.mark.parametrize(("exitcode", "signal"), [(57, None), (2, None), (None, 9), (None, 11)])
def test_C12_a_worker_without_shared_memory_affects_only_itself(
    exitcode: int | None, signal: int | None
) -> None:
    assert judge(exitcode, signal, shmem=False) == AGAIN
    assert judge(exitcode, signal, shmem=False, never=True) == DONE


@pytest.mark.parametrize(
    ("exitcode", "signal", "verdict"),
    [(0, None, DONE), (1, None, AGAIN), (2, None, CRASH), (None, 9, CRASH)],
)
def test_C14_before_it_touched_shared_memory_only_the_status_of_a_worker_decides(
    exitcode: int | None, signal: int | None, verdict: ExitVerdict
) -> None:
    assert judge(exitcode, signal, shmem=True, attached=False, clean=False) == verdict


def test_a_lost_exit_status_counts_as_a_death_by_signal() -> None:
    assert judge(None, None, shmem=True, attached=True, clean=True) == CRASH
    assert judge(None, None, shmem=False) == AGAIN


def test_every_possible_exit_of_a_worker_obeys_the_rules() -> None:
    statuses: list[tuple[int | None, int | None]] = [
        *zip(range(256), repeat(None)),
        *zip(repeat(None), range(1, 65)),
    ]
    switches = (False, True)
    for (code, signal), shmem, attached, clean, terminated, never in product(
        statuses, switches, switches, switches, switches, switches
    ):
        verdict = judge(
            code,
            signal,
            shmem=shmem,
            attached=attached,
            clean=clean,
            terminated=terminated,
            never=never,
        )
        inside = attached and not clean
        assert verdict.crash == (shmem and (inside or code not in (0, 1)))
        assert verdict.forget == (code == 0 or terminated or never)


# --- restarts -------------------------------------------------------------------------------------

BACKOFF = [(1, 10), (2, 10), (3, 20), (4, 40), (5, 80), (6, 160), (7, 320), (8, 640), (9, 1280)]
BACKOFF += [(10, 2560), (11, 5120), (12, 10_240), (13, 20_480), (14, 40_960), (15, 60_000)]
BACKOFF += [(16, 60_000), (100, 60_000), (10**9, 60_000)]


@pytest.mark.parametrize(("failures", "milliseconds"), BACKOFF)
def test_C05_restarts_without_an_interval_are_prompt_at_first_and_then_back_off(
    failures: int, milliseconds: int
) -> None:
    assert restart_delay(failures, 0, 0.0) == milliseconds * MS


@pytest.mark.parametrize(("failures", "milliseconds"), BACKOFF)
def test_the_jitter_moves_the_backoff_by_twenty_percent_and_the_first_two_restarts_not_at_all(
    failures: int, milliseconds: int
) -> None:
    spread = 0 if failures <= 2 else milliseconds * MS // 5
    assert restart_delay(failures, 0, 1.0) == milliseconds * MS + spread
    assert restart_delay(failures, 0, -1.0) == milliseconds * MS - spread


@pytest.mark.parametrize(
    "seconds", [0.5, 1, 2_147_483, 2_147_484, 4_294_968, 86_400, MAX_RESTART_TIME]
)
@pytest.mark.parametrize("failures", [1, 2])
def test_C03_C08_the_first_restarts_come_after_exactly_the_interval_asked_for(
    failures: int, seconds: float
) -> None:
    assert restart_delay(failures, int(seconds * SECOND), 1.0) == int(seconds * SECOND)


@given(counts, st.integers(2_147_484, MAX_RESTART_TIME), jitters)
def test_C08_an_interval_that_overflows_in_postgresql_is_honoured(
    failures: int, seconds: int, jitter: float
) -> None:
    assert restart_delay(failures, seconds * SECOND, jitter) == seconds * SECOND


@given(counts, intervals, jitters)
def test_C03_a_restart_never_comes_before_the_interval_and_waits_ten_milliseconds_at_least(
    failures: int, restart_ns: int, jitter: float
) -> None:
    delay = restart_delay(failures, restart_ns, jitter)
    assert isinstance(delay, int)
    assert delay >= max(restart_ns, 10 * MS)
    assert delay <= max(restart_ns, 72 * SECOND)
    assert delay < 2**63


@given(counts, st.integers(72 * SECOND, MAX_RESTART_TIME * SECOND), jitters)
def test_C06_above_the_longest_backoff_the_interval_alone_decides(
    failures: int, restart_ns: int, jitter: float
) -> None:
    assert restart_delay(failures, restart_ns, jitter) == restart_ns


@given(counts, counts, intervals, jitters)
def test_one_more_failure_never_shortens_the_delay(
    one: int, other: int, restart_ns: int, jitter: float
) -> None:
    fewer, more = sorted((one, other))
    shorter, longer = (restart_delay(n, restart_ns, jitter) for n in (fewer, more))
    # From the second to the third the jitter comes in: 20 ms less 20 % is still more than 10 ms.
    assert shorter <= longer


@given(counts, intervals, jitters, jitters)
def test_the_jitter_never_moves_a_delay_by_more_than_twenty_percent(
    failures: int, restart_ns: int, one: float, other: float
) -> None:
    plain = restart_delay(failures, restart_ns, 0.0)
    for jitter in (one, other):
        assert abs(restart_delay(failures, restart_ns, jitter) - plain) <= plain // 5


@pytest.mark.parametrize(
    ("failures", "ran_ns", "result"),
    [
        (0, 0, 1),
        (1, 0, 2),
        (7, 10 * SECOND - 1, 8),
        (7, 10 * SECOND, 1),
        (7, 3600 * SECOND, 1),
        (0, 3600 * SECOND, 1),
    ],
)
def test_a_run_of_ten_seconds_starts_the_count_of_failures_anew(
    failures: int, ran_ns: int, result: int
) -> None:
    assert failures_after(failures, ran_ns) == result


@given(st.lists(st.integers(0, 20 * SECOND), min_size=1))
def test_the_count_is_the_number_of_failures_since_the_last_long_run(runs: list[int]) -> None:
    failures = 0
    for ran_ns in runs:
        failures = failures_after(failures, ran_ns)
    short = 0
    for ran_ns in reversed(runs):
        if ran_ns >= 10 * SECOND:
            break
        short += 1
    # The long run itself ended by a failure, which counts as the first.
    assert failures == short + (short < len(runs))


@given(jitters)
def test_B16_C05_a_worker_that_fails_at_once_settles_at_one_attempt_a_minute(jitter: float) -> None:
    failures, now, attempts = 0, 0, 0
    while now < 3600 * SECOND:
        failures = failures_after(failures, 0)
        now += restart_delay(failures, 0, jitter)
        attempts += 1
    assert attempts < 100  # an hour of it; PostgreSQL makes 60 000 attempts a second


# --- resets ---------------------------------------------------------------------------------------


@given(jitters)
def test_G02_the_first_two_resets_relaunch_at_once(jitter: float) -> None:
    assert reset_delay(1, jitter) == 0
    assert reset_delay(2, jitter) == 0


@given(st.integers(3, 10**9), jitters)
def test_G10_from_the_third_in_a_row_resets_back_off_as_restarts_do(
    resets: int, jitter: float
) -> None:
    assert reset_delay(resets, jitter) == restart_delay(resets, 0, jitter)
    assert reset_delay(resets, jitter) >= 16 * MS


@given(st.lists(jitters, min_size=30, max_size=30))
def test_G10_a_worker_that_crashes_at_every_start_resets_the_domain_less_than_20_times_a_minute(
    luck: list[float],
) -> None:
    resets, now = 0, 0
    for jitter in luck:
        resets = failures_after(resets, 0)
        now += reset_delay(resets, jitter)
        if now >= 60 * SECOND:
            break
    assert resets < 20
