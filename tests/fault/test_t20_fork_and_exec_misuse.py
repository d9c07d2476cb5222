"""T20: clients and workers that fork, exec and close descriptors blindly hurt themselves at most.

A fork finds that the client is not its own, and may attach anew; the process that forked goes on
as if nothing had been.  Whatever was in flight, slots and tokens come back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import pytest

from fix_trials import Trial
from support.books import Books, check_log
from support.control import Log
from support.processes import GUARD
from support.supervisors import supervisor
from support.zygote import Fork, Zygote

pytestmark = [pytest.mark.xdist_group("live"), pytest.mark.timeout_s(900)]


def everything(fork: Fork) -> Iterator[tuple[object, ...]]:
    """What it and its forks say, up to the end of the last of them."""
    with suppress(EOFError):
        while True:
            yield fork.hear()


def misuse(trial: Trial, capfd: pytest.CaptureFixture[str], name: str) -> list[tuple[object, ...]]:
    """Let processes do it; what they said to the test."""
    said = []
    log = Log(capfd)
    with supervisor(max_worker_processes=16) as client:
        books = Books(client).open()
        with Zygote("support.misuse", "support.workers") as zygote:
            for _ in range(trial.pick(1, 10, 100)):
                times = trial.pick(3, 10, 10)
                fork = zygote.fork(f"support.misuse:{name}", client.address, times)
                heard = [*everything(fork)]
                if status := fork.end():
                    trial.violation(f"{name} ended with {status}: {heard}")
                if not heard or heard[-1][0] != "done":
                    trial.violation(f"{name} did not get to its end: {heard}")
                fork.pipe.close()
                said += heard
                trial.count()
        books.settle(trial)
        check_log(log.text, trial)
    return said


def test_T20_a_fork_in_the_middle_of_registrations_disturbs_neither_side(
    trial: Trial, capfd: pytest.CaptureFixture[str]
) -> None:
    misuse(trial, capfd, "forks_while_it_registers")


def test_T20_a_fork_in_the_middle_of_waits_takes_nobodys_wake_up(
    trial: Trial, capfd: pytest.CaptureFixture[str]
) -> None:
    misuse(trial, capfd, "forks_while_it_waits")


def test_T20_a_daemon_attaches_anew(trial: Trial, capfd: pytest.CaptureFixture[str]) -> None:
    misuse(trial, capfd, "daemonises")


def test_T20_an_exec_in_the_middle_of_registrations_leaves_nothing_claimed(
    trial: Trial, capfd: pytest.CaptureFixture[str]
) -> None:
    for _, inherited in misuse(trial, capfd, "executes_another_program"):
        if inherited:
            trial.violation(f"a program that was executed inherits {inherited}")


def test_T20_who_closes_all_descriptors_gets_errors_and_can_attach_anew(
    trial: Trial, capfd: pytest.CaptureFixture[str]
) -> None:
    misuse(trial, capfd, "closes_all_descriptors")


def test_T20_descriptors_closed_in_a_fork_are_the_forks_business(
    trial: Trial, capfd: pytest.CaptureFixture[str]
) -> None:
    misuse(trial, capfd, "closes_all_descriptors_in_a_fork")


@pytest.mark.parametrize(
    ("entry", "code"),
    [
        ("fork_and_return_twice", 7),
        ("close_all_and_exit", 7),
        ("close_all_and_fail", 1),
        ("close_all_and_talk", 7),
        ("close_all_and_sleep", 1),
    ],
)
def test_T20_a_worker_that_forks_or_closes_blindly_still_ends_as_itself(
    trial: Trial, entry: str, code: int
) -> None:
    with supervisor(max_worker_processes=16) as client:
        books = Books(client).open()
        for _ in range(trial.pick(1, 20, 500)):
            handle = client.register(f"support.misuse_workers:{entry}")
            if entry == "close_all_and_sleep":
                handle.wait_for_ready(GUARD)
                handle.terminate()
            outcome = handle.wait_until_gone(GUARD)
            if (outcome.kind, outcome.exitcode) != ("exited", code):
                trial.violation(f"{outcome}, not {code}")
            trial.count()
        books.settle(trial)
