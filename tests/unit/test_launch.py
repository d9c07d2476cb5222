"""Reaping: a process group is signalled while its leader's number cannot be anybody else's."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

import psutil
import pytest

from pgbgw._launch import Child, signal_groups_but_leaders
from support.processes import is_alive
from support.waiting import poll_until


def _sleep() -> NoReturn:
    while True:
        time.sleep(3600)


@contextmanager
def leader_with_straggler(*, ended: bool = True) -> Iterator[tuple[Child, int]]:
    """The leader of a group, which has ended or stays, and a member of the group that stays."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        member = os.fork()
        if member == 0:
            _sleep()
        os.write(write, str(member).encode())
        if not ended:
            _sleep()
        os._exit(7)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.close()
    child = Child(pid, os.pidfd_open(pid), ours, None)
    member = int(os.read(read, 32))
    os.close(read)
    os.close(write)
    try:
        if ended:
            poll_until(lambda: psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
        yield child, member
    finally:
        for one in (pid, member):
            with suppress(ProcessLookupError):
                os.kill(one, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(pid, 0)
        poll_until(lambda: not is_alive(member))
        child.close()


def test_stragglers_are_signalled_after_the_death_and_before_the_reaping(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    states = []
    killpg = os.killpg

    def watched(pgid: int, signum: int) -> None:
        # A zombie is dead and not reaped: its number is not free.
        states.append((pgid, signum, psutil.Process(pgid).status()))
        killpg(pgid, signum)

    monkeypatch.setattr(os, "killpg", watched)
    with leader_with_straggler() as (child, member):
        assert child.reap(signal.SIGKILL) == (7, None)
        assert states == [(child.pid, signal.SIGKILL, psutil.STATUS_ZOMBIE)]
        poll_until(lambda: not is_alive(member))


def test_without_a_signal_stragglers_are_left_alone() -> None:
    with leader_with_straggler() as (child, member):
        assert child.reap() == (7, None)
        assert is_alive(member)
        assert os.getpgid(member) == child.pid


def test_nobody_is_signalled_while_the_leader_lives() -> None:
    with leader_with_straggler(ended=False) as (child, member):
        assert child.reap(signal.SIGKILL) is None
        assert is_alive(member)
        assert is_alive(child.pid)


def test_nobody_is_signalled_once_somebody_else_has_reaped_the_leader(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "killpg", lambda *_: pytest.fail("a number that may be another's"))
    with leader_with_straggler() as (child, member):
        os.waitpid(child.pid, 0)
        assert child.reap(signal.SIGKILL) == (None, None)
        assert is_alive(member)


def test_a_group_can_be_signalled_without_its_leader() -> None:
    with (
        leader_with_straggler(ended=False) as (one, member),
        leader_with_straggler(ended=False) as (other, others),
    ):
        signal_groups_but_leaders({one.pid}, signal.SIGKILL)
        poll_until(lambda: not is_alive(member))
        assert is_alive(one.pid)
        assert is_alive(other.pid)
        assert is_alive(others)
