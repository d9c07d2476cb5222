"""No room for shared memory: a clear refusal, at the start or of a request, and never SIGBUS."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from fix_trials import Trial
from support.failing_calls import FailingCalls
from support.processes import Script
from support.supervisors import supervisor

pytestmark = pytest.mark.xdist_group("live")

MIB = 1 << 20

_SMALL_DEV_SHM = """
import ctypes, os
from pgbgw import Supervisor
libc = ctypes.CDLL(None, use_errno=True)
NEWNS, PRIVATE_AND_ALL = 0x00020000, 1 << 18 | 1 << 14

def checked(result):
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

try:
    checked(libc.unshare(NEWNS))
    checked(libc.mount(b"none", b"/", None, PRIVATE_AND_ALL, None))
    checked(libc.mount(b"none", b"/dev/shm", b"tmpfs", 0, b"size=64k"))
except OSError as exc:
    test.send(("skip", str(exc)))
else:
    with open("/dev/shm/full", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
    client = Supervisor(max_worker_processes=1000, shared_memory=1 << 20).start()
    worker = client.register("support.workers:noop", flags=1)
    test.send(("exit", worker.wait_until_gone(30).exitcode))
    client.stop("fast", timeout=30)
    client.close()
"""


def test_T08_a_full_dev_shm_does_not_matter(trial: Trial) -> None:
    with Script(_SMALL_DEV_SHM) as script:
        kind, what = script.hear()
        if kind == "skip":
            pytest.skip(f"no mount namespace: {what}")
        trial.count()
        if what != 0:
            trial.violation(f"a worker with shared memory exited with {what}")


_UNDER_A_LIMIT = """
import resource
from pgbgw import PgbgwError, StartError, Supervisor
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    client = Supervisor(max_worker_processes=nslots).start()
except StartError as exc:
    test.send(("refused", str(exc), exc.detail))
except PgbgwError as exc:
    test.send(("not attached", str(exc), exc.detail))
except BaseException as exc:
    test.send(("wrong", repr(exc), None))
else:
    try:
        worker = client.register("support.workers:noop")
        test.send(("started", str(worker.wait_until_gone(30)), None))
    except PgbgwError as exc:
        test.send(("started", str(exc), exc.detail))
    client.stop("fast", timeout=30)
    client.close()
"""


@pytest.mark.timeout_s(600)
def test_T08_a_table_that_memory_does_not_hold_is_refused_in_words(trial: Trial) -> None:
    """Under limits of address space from too little for anything to enough."""
    sizes = trial.pick([262_143], [1000, 20_000, 262_143], [1000, 20_000, 100_000, 262_143])
    limits = trial.pick([300], range(60, 2800, 700), range(40, 3000, 50))
    seen: dict[str, int] = {}
    for nslots in sizes:
        for limit in limits:
            with Script(_UNDER_A_LIMIT, nslots=nslots, limit=limit * MIB) as script:
                kind, what, detail = script.hear()
            trial.count()
            seen[kind] = seen.get(kind, 0) + 1
            if kind == "wrong" or (kind != "started" and not detail):
                trial.violation(f"{nslots} slots in {limit} MiB: {kind}: {what}")
    trial.note(", ".join(f"{count} {kind}" for kind, count in seen.items()))


_REGISTER = """
from pgbgw import NoFreeSlotError, attach
client = attach(address)
test.send("attached")
while test.recv():
    try:
        test.send(client.register("support.workers:noop").wait_until_gone(30).kind)
    except NoFreeSlotError as exc:
        test.send(exc.detail)
client.close()
"""


def test_T08_a_record_that_finds_no_page_is_refused_and_nothing_else(
    trial: Trial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a large table the pages of records and details are had as they are needed: a client's for
    the record, the supervisor's for the detail."""
    error = trial.random.choice([errno.ENOMEM, errno.EFAULT, errno.EAGAIN])
    with (
        FailingCalls.preloaded(tmp_path, monkeypatch) as calls,
        supervisor(max_worker_processes=262_143) as client,
        Script(_REGISTER, address=client.address) as first,
        Script(_REGISTER, address=client.address) as second,
    ):
        # Each begins at another slot, whose pages neither of them nor the supervisor has had yet.
        cases = ((first, first.pid, "no memory"), (second, client.supervisor_pid, "rejected"))
        for other, pid, refusal in cases:
            assert other.hear() == "attached"

            def register(other: Script = other) -> str | None:
                other.say(True)
                answer = other.hear()
                trial.count()
                return answer

            calls.watch(pid)
            calls.fail("madvise", error, times=10_000)
            answers = [register() for _ in range(trial.pick(10, 200, 2000))]
            if refusal not in answers or set(answers) - {refusal, "exited"}:
                trial.violation(f"without memory: {set(answers)}")
            calls.stop()
            if register() != "exited":
                trial.violation("with memory again it is refused, too")
            other.say(False)
