"""Registering: what is refused and why, what arrives, and what is left alone (A01 to A24).

What a definition alone decides is tested without processes in unit/test_worker.py; here the same
faults meet a live supervisor, which must not notice.  A20 (changing a limit while running) is left
out: limits are fixed at the start.
"""

from __future__ import annotations

import copy
import pickle
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from pgbgw import (
    AttachError,
    BackgroundWorker,
    Client,
    Flags,
    HandleStatus,
    InvalidWorkerError,
    NoFreeSlotError,
    ParallelLimitError,
    PayloadTooLargeError,
    StartTime,
    Supervisor,
    SupervisorDiedError,
    WorkerHandle,
    WrongProcessError,
    attach,
)
from pgbgw import client as client_module
from support import observed_workers, poll_until, workers
from support.control import Log, paused
from support.processes import kill_supervisor
from support.supervisors import lines, supervisor

MAX_RESTART_TIME = 86_400_000


def definition(**fields: Any) -> BackgroundWorker:
    return BackgroundWorker(**{"entry": workers.noop, **fields})


def first_in_slot(client: Client) -> None:
    """Nobody has had the only slot before: the next registration is its first generation."""
    assert client.workers() == []
    handle = client.register(workers.noop)
    assert (handle.slot, handle.generation) == (0, 1)
    assert handle.wait_until_gone(30).exitcode == 0


@contextmanager
def unnoticed(client: Client) -> Iterator[None]:
    """Nothing in here wakes the supervisor."""
    process = psutil.Process(client.supervisor_pid)
    poll_until(lambda: client._view.sleeping)
    before = process.num_ctx_switches().voluntary
    yield
    # Were it woken, it would be within a millisecond.  Its own tick, once a second, may come just
    # now: whoever calls this tries again.
    time.sleep(0.03)
    assert client._view.sleeping
    assert process.num_ctx_switches().voluntary == before


def refused(
    text: str, *faulty: dict[str, Any], error: type[Exception] = InvalidWorkerError
) -> None:
    """Registering any of these raises; the supervisor is not woken and no slot was used."""
    with supervisor(max_worker_processes=1) as client:

        def quietly() -> bool:
            try:
                with unnoticed(client):
                    for fields in faulty:
                        with pytest.raises(error, match=text):
                            client.register(definition(**fields))
            except AssertionError:
                return False
            return True

        poll_until(quietly)
        first_in_slot(client)


def record_of(worker: BackgroundWorker, **words: int) -> bytes:
    """A record image with some words of its header overwritten, as a faulty client might."""
    places = {"flags": 4, "start_time": 8, "name_len": 16}
    image = bytearray(worker._record)
    for key, value in words.items():
        image[places[key] : places[key] + 4] = value.to_bytes(4, "little")
    return bytes(image)


def publish(client: Client, image: bytes) -> WorkerHandle:
    """Register past check()."""
    handle = client._view.register(image, False, WorkerHandle)
    assert isinstance(handle, WorkerHandle)
    return handle


def left_by(path: Path) -> Any:
    poll_until(path.exists)
    return pickle.loads(path.read_bytes())


# --- what the definition alone decides ----------------------------------------------------------


def test_A01_a_database_connection_without_shared_memory_is_refused_unnoticed() -> None:
    refused("must attach to shared memory", {"flags": Flags.DATABASE_CONNECTION})


def test_A02_a_database_connection_at_the_earliest_start_is_refused_unnoticed() -> None:
    flags = Flags.DATABASE_CONNECTION | Flags.SHMEM_ACCESS
    early = {"flags": flags, "start_time": StartTime.SUPERVISOR_START}
    refused("cannot request database access", early)


def test_A03_a_restart_time_out_of_range_is_refused_unnoticed() -> None:
    refused("invalid restart", *({"restart_time": t} for t in (-2, -1, MAX_RESTART_TIME + 1)))


def test_A03_every_restart_time_in_range_is_accepted_and_shown() -> None:
    with supervisor() as client:
        for interval in (None, 0, 1, MAX_RESTART_TIME):
            handle = client.register(workers.sleep_until_stopped, restart_time=interval)
            handle.wait_for_startup(30)
            assert handle.info().restart_time == interval


def test_A04_a_restartable_parallel_worker_is_refused_unnoticed() -> None:
    parallel = {"flags": Flags.CLASS_PARALLEL}
    refused("parallel workers", *({**parallel, "restart_time": t} for t in (0, 60)))


def test_A05_of_two_faults_the_first_in_the_order_of_the_checks_is_reported() -> None:
    no_memory = {"flags": Flags.DATABASE_CONNECTION}
    refused(
        "must attach to shared memory",
        {**no_memory, "restart_time": -2},
        {**no_memory, "start_time": StartTime.SUPERVISOR_START},
        {"flags": Flags.DATABASE_CONNECTION | Flags.CLASS_PARALLEL, "restart_time": 1},
    )
    refused("invalid restart", {"flags": Flags.CLASS_PARALLEL, "restart_time": -2})


def test_A06_observers_see_the_name_as_type_if_none_was_given() -> None:
    with supervisor() as client:
        nameless = client.register(workers.sleep_until_stopped, name="shard 7")
        typed = client.register(workers.sleep_until_stopped, name="shard 8", type="shard")
        client.wait([nameless, typed], 30, "ALL_STARTED")
        assert nameless.info().type == "shard 7"
        assert client.worker_type(nameless.pid or 0) == "shard 7"
        assert typed.info().type == "shard"
        assert client.worker_type(typed.pid or 0) == "shard"
        assert [info.name for info in client.workers(type="shard")] == ["shard 8"]


def test_A07_registering_leaves_the_callers_own_record_as_it_is() -> None:
    worker = definition(name="mine", args=([1, 2],), extra=b"\0x", env={"KEY": "value"})
    before, image = copy.deepcopy(worker), pickle.dumps(worker)
    with supervisor() as client:
        first, second = client.register(worker), client.register(worker)
        assert worker == before
        assert pickle.dumps(worker) == image
        assert first != second
        assert client.wait([first, second], 30, "ALL_GONE")[1] == set()


def test_A08_the_worker_sees_what_was_registered_however_the_caller_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "arguments"
    numbers, words = [1, 2], {"a": 1}
    with supervisor() as client:
        with paused(client):
            handle = client.register(
                observed_workers.leave_arguments, str(path), numbers, kwargs={"words": words}
            )
            numbers.append(3)
            words["b"] = 2
        assert handle.wait_until_gone(30).exitcode == 0
    assert left_by(path) == (([1, 2],), {"words": {"a": 1}})


def test_A09_up_to_128_bytes_of_extra_arrive_bit_by_bit(tmp_path: Path) -> None:
    given = [bytes(range(128)), bytes(128), b"\0\xff" * 64, b"", b"a\0\0"]
    with supervisor() as client:
        for i, extra in enumerate(given):
            path = tmp_path / f"record {i}"
            handle = client.register(
                observed_workers.leave_record, str(path), extra=extra, main_arg=2**64 - 1
            )
            assert handle.wait_until_gone(30).exitcode == 0
            seen = left_by(path)
            assert seen["extra"] == extra
            assert seen["main_arg"] == 2**64 - 1


def test_A10_an_unknown_start_time_or_flag_is_refused_unnoticed() -> None:
    refused("start_time|unknown flags", {"start_time": 3}, {"start_time": -1}, {"flags": 4})


@pytest.mark.parametrize(
    ("words", "reason"),
    [({"start_time": 3}, "invalid start time"), ({"flags": 1 << 30}, "unknown flags")],
)
def test_A10_a_client_that_does_not_check_is_rejected_by_the_supervisor(
    words: dict[str, int], reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with supervisor(max_worker_processes=1) as client:
        handle = publish(client, record_of(definition(), **words))
        outcome = handle.wait_until_gone(30)
        assert (outcome.kind, outcome.final) == ("rejected", True)
        assert handle.outcome is not None
        assert handle.outcome.error == reason
        assert client.register(workers.noop).wait_until_gone(30).exitcode == 0
        Log(capfd).wait_for("rejected", reason)


def test_arguments_that_do_not_fit_are_refused_unnoticed() -> None:
    refused("too large", {"args": ("x" * 2000,)}, error=PayloadTooLargeError)


# --- static workers -----------------------------------------------------------------------------


def toml(path: Path, text: str) -> Supervisor:
    file = path / "supervisor.toml"
    file.write_text(text)
    return Supervisor.from_toml(file)


def test_A11_an_invalid_static_worker_is_logged_and_skipped_and_the_others_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    configured = toml(
        tmp_path,
        """
        [[worker]]
        name = "before"
        entry = "support.workers:sleep_until_stopped"
        [[worker]]
        name = "invalid"
        entry = "support.workers:sleep_until_stopped"
        flags = ["database-connection"]
        [[worker]]
        name = "after"
        entry = "support.workers:sleep_until_stopped"
        """,
    )
    with configured as client:
        names = [info.name for info in client.workers()]
        assert names == ["before", "after"]
        for name in names:
            handle = client.find(name=name)
            assert handle is not None
            assert handle.wait_for_ready(30) is HandleStatus.STARTED
        Log(capfd).wait_for('"invalid"', "must attach to shared memory")


def test_A12_a_static_worker_that_asks_for_notification_is_logged_and_skipped(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace"
    configured = toml(
        tmp_path,
        f"""
        [[worker]]
        name = "wants to notify"
        entry = "support.workers:append"
        args = ["{trace}"]
        notify = true
        [[worker]]
        name = "does not"
        entry = "support.workers:sleep_until_stopped"
        notify = false
        """,
    )
    with configured as client:
        assert [info.name for info in client.workers()] == ["does not"]
        handle = client.find(name="does not")
        assert handle is not None
        # Launched in order: had there been another one before it, it would have run.
        assert handle.wait_for_ready(30) is HandleStatus.STARTED
        assert lines(trace) == []
        Log(capfd).wait_for('"wants to notify"', "notification")


def test_A12_the_programs_own_static_worker_must_not_ask_for_notification() -> None:
    with pytest.raises(InvalidWorkerError, match="only dynamic background workers"):
        Supervisor().register(definition(notify=True))


def test_A13_a_static_worker_is_refused_once_the_supervisor_was_started() -> None:
    to_be = Supervisor(max_worker_processes=1)
    with to_be as client:
        with pytest.raises(WrongProcessError, match="before the start") as caught:
            to_be.register(definition(name="late"))
        assert "late" in str(caught.value)
        assert "Client.register" in (caught.value.hint or "")
        first_in_slot(client)


def test_A14_of_too_many_static_workers_the_first_run_and_the_rest_are_logged(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    configured = toml(
        tmp_path,
        """
        [supervisor]
        max_worker_processes = 3
        [[worker]]
        name = "invalid {i}"
        count = 2
        entry = "support.workers:noop"
        flags = ["database-connection"]
        [[worker]]
        name = "worker {i}"
        count = 5
        entry = "support.workers:sleep_until_stopped"
        """,
    )
    with configured as client:
        assert [info.name for info in client.workers()] == ["worker 0", "worker 1", "worker 2"]
        log = Log(capfd)
        for i in range(2):
            log.wait_for(f'"invalid {i}"', "shared memory")
        for i in (3, 4):
            log.wait_for(f'"worker {i}"', "too many background workers", "max_worker_processes")


def test_A14_static_workers_are_counted_in_the_order_of_the_calls() -> None:
    to_be = Supervisor(max_worker_processes=2)
    with pytest.raises(InvalidWorkerError):
        to_be.register(definition(name="invalid", restart_time=-1))
    to_be.register(definition(name="first", entry=workers.sleep_until_stopped))
    to_be.register(definition(name="second", entry=workers.sleep_until_stopped))
    with pytest.raises(NoFreeSlotError, match='"third": too many background workers'):
        to_be.register(definition(name="third"))
    with to_be as client:
        assert [info.name for info in client.workers()] == ["first", "second"]


# --- room ---------------------------------------------------------------------------------------


def test_A15_where_no_supervisor_is_there_is_no_client_to_register_with() -> None:
    with pytest.raises(AttachError, match="no supervisor is running"):
        attach("nobody")


@pytest.mark.leaves_sockets
def test_A15_a_dead_supervisor_is_reported_before_anything_is_validated() -> None:
    with supervisor() as client:
        kill_supervisor(client)
        for attempt in (
            lambda: client.register(definition(restart_time=-2)),
            lambda: client.register("no entry point at all"),
            lambda: client.try_register("no entry point at all"),
            lambda: client.register_many([definition(restart_time=-2)]),
        ):
            with pytest.raises(SupervisorDiedError):
                attempt()


def test_A16_a_full_table_refuses_and_leaves_those_in_it_alone() -> None:
    with supervisor(max_worker_processes=2) as client:
        handles = [client.register(workers.sleep_until_stopped) for _ in range(2)]
        client.wait(handles, 30, "ALL_STARTED")
        pids = [h.pid for h in handles]
        with pytest.raises(NoFreeSlotError):
            client.register(workers.noop)
        assert client.try_register(workers.noop) is None
        assert [h.status() for h in handles] == [HandleStatus.STARTED] * 2
        assert [h.pid for h in handles] == pids
        assert len(client.workers()) == 2
        handles[0].terminate()
        handles[0].wait_until_gone(30)
        assert client.register(workers.noop).wait_until_gone(30).exitcode == 0


def test_A16_registering_many_says_which_were_made_before_the_table_was_full() -> None:
    with supervisor(max_worker_processes=3) as client:
        four = [definition(entry=workers.sleep_until_stopped, name=f"{i}") for i in range(4)]
        with pytest.raises(NoFreeSlotError) as caught:
            client.register_many(four)
        made = caught.value.handles
        assert client.wait(made, 30, "ALL_STARTED") == (set(made), set())
        assert [h.info().name for h in made] == ["0", "1", "2"]
        for handle in made:
            handle.terminate()
        client.wait(made, 30, "ALL_GONE")
        assert len(client.register_many(four[:3])) == 3


def test_A17_a_refusal_tells_whether_slots_or_the_limit_or_the_supervisor_are_missing() -> None:
    parallel = definition(entry=workers.sleep_until_stopped, flags=Flags.CLASS_PARALLEL)
    with supervisor(max_worker_processes=2, max_parallel_workers=1) as client:
        client.register(parallel)
        with pytest.raises(ParallelLimitError) as limit:
            client.register(parallel)
        assert "max_parallel_workers" in (limit.value.hint or "")
        assert "1" in (limit.value.detail or "")
        client.register(workers.sleep_until_stopped)
        with pytest.raises(NoFreeSlotError) as full:
            client.register(definition(name="one too many"))
        assert "one too many" in str(full.value)
        assert "max_worker_processes" in (full.value.hint or "")
        assert "2" in (full.value.detail or "")


def test_A18_the_class_limit_refuses_its_class_alone() -> None:
    parallel = definition(entry=workers.sleep_until_stopped, flags=Flags.CLASS_PARALLEL)
    with supervisor(max_worker_processes=4, max_parallel_workers=2) as client:
        handles = [client.register(parallel) for _ in range(2)]
        assert client.try_register(parallel) is None
        assert client.register(workers.noop).wait_until_gone(30).exitcode == 0
        handles[0].terminate()
        handles[0].wait_until_gone(30)
        third = client.register(parallel)
        assert third.wait_for_ready(30) is HandleStatus.STARTED
        assert client.try_register(parallel) is None


def test_A18_a_registration_that_finds_no_slot_gives_its_place_in_the_class_back() -> None:
    parallel = definition(entry=workers.sleep_until_stopped, flags=Flags.CLASS_PARALLEL)
    with supervisor(max_worker_processes=1, max_parallel_workers=1) as client:
        other = client.register(workers.sleep_until_stopped)
        for _ in range(3):
            with pytest.raises(NoFreeSlotError):
                client.register(parallel)
        other.terminate()
        other.wait_until_gone(30)
        assert client.register(parallel).wait_for_ready(30) is HandleStatus.STARTED


def test_A18_static_workers_of_the_class_count_too() -> None:
    parallel = definition(entry=workers.sleep_until_stopped, flags=Flags.CLASS_PARALLEL)
    to_be = Supervisor(max_worker_processes=3, max_parallel_workers=1)
    to_be.register(parallel)
    with pytest.raises(ParallelLimitError):
        to_be.register(parallel)
    with to_be as client:
        assert client.try_register(parallel) is None
        static = client.handle(client.workers()[0])
        static.terminate()
        static.wait_until_gone(30)
        assert client.register(parallel).wait_for_ready(30) is HandleStatus.STARTED


def test_A19_a_limit_of_zero_refuses_every_registration_of_the_class() -> None:
    with supervisor(max_parallel_workers=0) as client:
        for _ in range(3):
            with pytest.raises(ParallelLimitError):
                client.register(workers.noop, flags=Flags.CLASS_PARALLEL)
        assert client.register(workers.noop).wait_until_gone(30).exitcode == 0


# --- what comes of it ---------------------------------------------------------------------------


def test_A21_registering_returns_before_the_worker_runs(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    with supervisor() as client:
        with paused(client):
            handle = client.register(workers.append, str(trace))
            assert handle.status() is HandleStatus.NOT_YET_STARTED
            assert handle.pid is None
            assert handle.outcome is None
            assert lines(trace) == []
        assert handle.wait_until_gone(30).exitcode == 0
        assert lines(trace) == ["x"]


def test_A22_a_worker_whose_handle_nobody_keeps_runs_all_the_same(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    with supervisor() as client:
        client.register(workers.append, str(trace))
        poll_until(lambda: lines(trace) == ["x"])
        poll_until(lambda: client.workers() == [])


def test_A23_names_beyond_ascii_arrive_as_they_are(tmp_path: Path) -> None:
    name, kind = "päckchen ☃ 包", "ärger"
    path = tmp_path / "record"
    with supervisor() as client:
        handle = client.register(observed_workers.leave_record, str(path), name=name, type=kind)
        assert handle.wait_until_gone(30).exitcode == 0
        seen = left_by(path)
        assert (seen["name"], seen["type"]) == (name, kind)
        waiting = client.register(workers.sleep_until_stopped, name=name, type=kind)
        waiting.wait_for_startup(30)
        assert client.find(name=name) == waiting
        assert client.worker_type(waiting.pid or 0) == kind


def test_A23_a_name_that_does_not_fit_is_refused_unnoticed() -> None:
    refused("name", {"name": "x" * 96}, {"name": "ä" * 48}, {"name": "nul\0"})


def test_A23_the_longest_name_is_95_bytes() -> None:
    with supervisor() as client:
        handle = client.register(workers.sleep_until_stopped, name="ä" * 47 + "x")
        handle.wait_for_startup(30)
        assert handle.info().name == "ä" * 47 + "x"


def test_A23_a_name_that_a_client_forged_cannot_confuse_the_supervisor(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with supervisor(max_worker_processes=2) as client:
        image = bytearray(definition(entry=workers.sleep_until_stopped, name="x" * 20)._record)
        image[96:116] = b"\xff\xfeforged\n\x1b[2Jok\xe2\x80\xa8\xc3!"
        forged = publish(client, bytes(image))
        assert forged.wait_for_ready(30) is HandleStatus.STARTED
        name = forged.info().name
        assert name.isprintable()
        assert "forged?" in name
        too_long = record_of(definition(), name_len=96)
        assert publish(client, too_long).wait_until_gone(30).kind == "rejected"
        forged.terminate()
        forged.wait_until_gone(30)
        log = Log(capfd)
        log.wait_for("forged?", "exited with exit code 1")
        assert "\x1b" not in log.text


def test_A24_no_worker_runs_if_there_is_no_memory_for_its_handle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Unaffordable(WorkerHandle):
        def __new__(cls, *args: object) -> Unaffordable:
            raise MemoryError

    trace = tmp_path / "trace"
    with supervisor(max_worker_processes=1) as client:
        with monkeypatch.context() as patch:
            patch.setattr(client_module, "WorkerHandle", Unaffordable)
            with pytest.raises(MemoryError):
                client.register(workers.append, str(trace))
        first_in_slot(client)
        assert lines(trace) == []
