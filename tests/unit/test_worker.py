"""The definition of a worker: what it fills in, what it refuses, and its record image.

The conformance cases A01 to A10, A12 and A23 are here as far as they concern it alone.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
import os.path
import pickle
import random
import signal
import struct
from collections import OrderedDict
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgbgw import worker as module
from pgbgw.errors import InvalidWorkerError, PayloadTooLargeError
from pgbgw.worker import (
    DEFAULT_RESTART_INTERVAL,
    ENTRY_MAXLEN,
    EXTRA_LEN,
    MAX_RESTART_TIME,
    NAME_MAXLEN,
    NEVER_RESTART,
    OUTCOME_KINDS,
    PAYLOAD_MAX,
    RECORD_ENTRY,
    RECORD_EXTRA,
    RECORD_HEADER,
    RECORD_NAME,
    RECORD_PAYLOAD,
    RECORD_SIZE,
    RECORD_TYPE,
    BackgroundWorker,
    Flags,
    HandleStatus,
    Outcome,
    Phase,
    ShutdownMode,
    StartTime,
    WorkerInfo,
)

ENTRY = "package.module:function"
FIELDS = (
    *("entry", "name", "type", "args", "kwargs", "main_arg", "extra", "flags", "start_time"),
    *("restart_time", "notify", "stop_timeout", "env"),
)


def make(**fields: Any) -> BackgroundWorker:
    return BackgroundWorker(**{"entry": ENTRY, **fields})


def refused(text: str, **fields: Any) -> InvalidWorkerError:
    """The error that check() raises for these fields; its message names the worker."""
    worker = make(**fields)
    with pytest.raises(InvalidWorkerError, match=text) as caught:
        worker.check()
    assert str(caught.value).startswith('background worker "')
    return caught.value


# --- PostgreSQL's checks -----------------------------------------------------------------------


def test_A01_a_database_connection_needs_shared_memory() -> None:
    refused("must attach to shared memory", flags=Flags.DATABASE_CONNECTION)
    make(flags=Flags.DATABASE_CONNECTION | Flags.SHMEM_ACCESS).check()


def test_A02_a_database_connection_needs_a_later_start() -> None:
    flags = Flags.DATABASE_CONNECTION | Flags.SHMEM_ACCESS
    refused("at supervisor start", flags=flags, start_time=StartTime.SUPERVISOR_START)
    make(flags=flags, start_time=StartTime.CONSISTENT_STATE).check()
    make(flags=Flags.SHMEM_ACCESS, start_time=StartTime.SUPERVISOR_START).check()


@pytest.mark.parametrize(
    "seconds", [NEVER_RESTART, 0, 0.0, 0.25, 1, DEFAULT_RESTART_INTERVAL, MAX_RESTART_TIME, 86.4e6]
)
def test_A03_a_restart_interval_in_range_is_accepted(seconds: float | None) -> None:
    make(restart_time=seconds).check()


@pytest.mark.parametrize(
    "seconds",
    [
        *(-1, -2, -0.001, MAX_RESTART_TIME + 1, 86_400_000.5, 10**5000),
        *(math.nan, math.inf, -math.inf, True, False, "5", "never", [1], 1j),
    ],
    ids=lambda value: "a large number" if isinstance(value, int) and value > 1 << 64 else None,
)
def test_A03_a_restart_interval_out_of_range_is_refused(seconds: Any) -> None:
    error = refused("invalid restart interval", restart_time=seconds)
    assert "restart_time is" in str(error.detail)


@pytest.mark.parametrize("seconds", [0, 1, 60.0, MAX_RESTART_TIME])
def test_A04_a_parallel_worker_is_never_restarted(seconds: float) -> None:
    refused("parallel workers may not", flags=Flags.CLASS_PARALLEL, restart_time=seconds)
    make(flags=Flags.CLASS_PARALLEL).check()


FAULTS: list[tuple[str, dict[str, Any]]] = [
    ("must attach to shared memory", {"flags": Flags.DATABASE_CONNECTION | Flags.CLASS_PARALLEL}),
    ("at supervisor start", {"start_time": StartTime.SUPERVISOR_START}),
    ("invalid restart interval", {"restart_time": -2}),
    ("parallel workers may not", {"restart_time": 5}),
    ("unknown flags", {"flags": 0x40}),
    ("start_time must be", {"start_time": 7}),
    ("is not the name of a function", {"entry": "nonsense"}),
    ("name is too long", {"name": "n" * 96}),
    ("type is too long", {"type": "t" * 96}),
    ("main_arg must be", {"main_arg": -1}),
    ("extra is too long", {"extra": bytes(129)}),
    ("invalid stop timeout", {"stop_timeout": -1}),
    ("notify must be", {"notify": "yes"}),
    ("env has", {"env": {"A=B": "C"}}),
]


def test_A05_of_all_faults_the_first_in_the_documented_order_is_reported() -> None:
    """Mend the faults of a thoroughly wrong worker one by one."""
    everything = Flags.DATABASE_CONNECTION | Flags.CLASS_PARALLEL | 0x40
    wrong: dict[str, Any] = {}
    for _, fault in reversed(FAULTS):
        wrong |= fault
    wrong |= {"flags": everything, "args": ("a" * 2000,), "start_time": 0}
    mendings: list[dict[str, Any]] = [
        {"flags": everything | Flags.SHMEM_ACCESS},
        {"start_time": 7},
        {"restart_time": 5},
        {"restart_time": None},
        {"flags": Flags.NONE},
        {"start_time": StartTime.CONSISTENT_STATE},
        {"entry": ENTRY},
        {"name": "n"},
        {"type": "t"},
        {"main_arg": 0},
        {"extra": b""},
        {"stop_timeout": None},
        {"notify": None},
        {"env": {}},
    ]
    for (text, _), mending in zip(FAULTS, mendings, strict=True):
        refused(text, **wrong)
        wrong |= mending
    with pytest.raises(PayloadTooLargeError):
        make(**wrong).check()
    make(**wrong | {"args": ()}).check()


@pytest.mark.parametrize("start_time", [0, 2, 3, -1, None, "recovery-finished", Phase.RUNNING])
def test_A10_a_phase_that_does_not_exist_is_refused(start_time: Any) -> None:
    refused("start_time must be a StartTime", start_time=start_time)


@pytest.mark.parametrize("flags", [0x4, 0x8, 0x20, 0x21, 1 << 31, 1 << 40, -1, Flags(0x40)])
def test_A10_an_unknown_flag_is_refused(flags: int) -> None:
    refused("unknown flags" if flags >= 0 else "must attach|unknown|parallel", flags=flags)


def test_flags_are_flags_or_plain_numbers() -> None:
    refused("flags must be Flags", flags="shmem-access")
    refused("flags must be Flags", flags=None)
    make(flags=1).check()


def test_A12_only_a_dynamic_worker_can_ask_for_notification() -> None:
    make(notify=True).check()
    with pytest.raises(InvalidWorkerError, match='"shard": only dynamic background workers'):
        make(name="shard", notify=True).check_static()
    with pytest.raises(InvalidWorkerError, match="only dynamic"):
        make(notify=True)._static_record()
    for notify in (None, False):
        make(notify=notify).check_static()


def test_a_static_worker_is_checked_like_any_other_first() -> None:
    with pytest.raises(InvalidWorkerError, match="invalid restart interval"):
        make(restart_time=-2, notify=True).check_static()


# --- our own checks ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "entry",
    [
        *("", ":", "module", "module:", ":function", "m:f:g", "m::f", "m.:f", ".m:f", "m..n:f"),
        *("m:f.", "m :f", "m:f()", "m:<lambda>", "m:f.<locals>.g", "1m:f", "m-n:f", "m:f\n"),
    ],
)
def test_an_entry_that_cannot_be_a_name_is_refused(entry: str) -> None:
    assert "package.module:function" in str(refused("is not the name", entry=entry).hint)


@pytest.mark.parametrize("entry", [None, 5, b"m:f", ("m", "f")])
def test_an_entry_that_is_neither_callable_nor_a_string_is_refused(entry: Any) -> None:
    refused("entry must be a string", entry=entry)


@pytest.mark.parametrize("entry", ["m:f", "a.b.c:D.e", "pgbgw.demo:run", "módulo:función", "_:_"])
def test_an_entry_that_may_be_a_name_is_accepted_unseen(entry: str) -> None:
    make(entry=entry).check()


def test_an_entry_in_main_is_refused_by_its_name_as_well() -> None:
    assert "Executor" in str(refused("__main__", entry="__main__:f").hint)


@pytest.mark.parametrize("key", ["name", "type"])
def test_A23_names_of_up_to_95_bytes_of_UTF_8_are_kept_and_longer_ones_refused(key: str) -> None:
    for text in ("n" * 95, "ñ" * 47, "\N{SNAKE}" * 23, "with blanks\tand\nlines"):
        worker = make(**{key: text})
        worker.check()
        assert getattr(BackgroundWorker._from_record(worker._record), key) == text
    for text in ("n" * 96, "ñ" * 48, "\N{SNAKE}" * 24):
        error = refused(f"{key} is too long", **{key: text})
        assert error.detail == "it takes 96 bytes in UTF-8; there is room for 95"


@pytest.mark.parametrize("key", ["name", "type", "entry"])
def test_A23_names_with_a_NUL_or_half_a_character_are_refused(key: str) -> None:
    refused(f"{key} contains a NUL character", **{key: "m:f\0"})
    refused(f"{key} cannot be encoded", **{key: "m:f\ud800"})


@pytest.mark.parametrize("key", ["name", "type"])
def test_a_name_that_is_no_string_is_refused(key: str) -> None:
    for value in (None, 5, b"name"):
        refused(f"{key} must be a string", **{key: value})


def test_an_entry_has_room_for_511_bytes() -> None:
    make(entry="m:" + "f" * 509).check()
    refused("entry is too long", entry="m:" + "f" * 510)
    refused("entry is too long", entry="m:" + "ñ" * 255)


@pytest.mark.parametrize("main_arg", [-1, 1 << 64, 1.0, "1", None])
def test_a_main_arg_that_is_no_64_bit_word_is_refused(main_arg: Any) -> None:
    refused("main_arg must be an unsigned 64-bit integer", main_arg=main_arg)
    make(main_arg=(1 << 64) - 1).check()


def test_extra_has_room_for_128_bytes() -> None:
    make(extra=bytes(EXTRA_LEN)).check()
    refused("extra is too long", extra=bytes(EXTRA_LEN + 1))
    refused("extra must be bytes", extra="text")


@pytest.mark.parametrize("seconds", [-1, math.nan, math.inf, MAX_RESTART_TIME + 1, True, "5s"])
def test_a_stop_timeout_out_of_range_is_refused(seconds: Any) -> None:
    refused("invalid stop timeout", stop_timeout=seconds)
    for good in (None, 0, 0.5, MAX_RESTART_TIME):
        make(stop_timeout=good).check()


@pytest.mark.parametrize(
    "env", [{"": "x"}, {"A=B": "x"}, {"A\0": "x"}, {"A": "x\0"}, {"A": "\ud800"}, {"\ud800": ""}]
)
def test_what_no_environment_can_hold_is_refused(env: dict[str, str]) -> None:
    refused("env has", env=env)


def test_values_of_the_environment_are_strings() -> None:
    refused("env must map strings to strings", env={"OMP_NUM_THREADS": 1})
    make(env={"A": "", "B": "x=y", "C": "\udcff"}).check()  # the last is a byte of no encoding


@pytest.mark.parametrize("notify", [0, 1, "yes", 5])
def test_notify_is_a_truth_value_or_None(notify: Any) -> None:
    refused("notify must be", notify=notify)


def test_arguments_have_room_for_1024_bytes_when_pickled() -> None:
    fits = max(n for n in range(1024) if len(make(args=(b"x" * n,))._payload) <= PAYLOAD_MAX)
    worker = make(name="big", args=(b"x" * fits,))
    worker.check()
    assert len(worker._record) <= RECORD_SIZE
    with pytest.raises(PayloadTooLargeError, match=r'"big".*too large') as caught:
        make(name="big", args=(b"x" * 1024,)).check()
    assert "1024" in str(caught.value.detail)
    assert "Executor" in str(caught.value.hint)
    with pytest.raises(PayloadTooLargeError):
        make(kwargs={"a": "x" * 1024}).check()
    with pytest.raises(PayloadTooLargeError):
        make(env={"A": "x" * 1024}).check()


def test_a_message_about_a_hostile_name_stays_on_one_line() -> None:
    error = refused("unknown flags", name="a\nFATAL: b\x1b[2J\u2028" + "c" * 200, flags=4)
    assert str(error).isprintable()
    assert len(str(error)) < 200


# --- what construction does --------------------------------------------------------------------


def test_the_fields_are_the_documented_ones_in_their_order_and_keyword_only() -> None:
    assert [field.name for field in dataclasses.fields(BackgroundWorker)] == list(FIELDS)
    with pytest.raises(TypeError):
        BackgroundWorker(ENTRY)  # type: ignore[call-arg]
    with pytest.raises(dataclasses.FrozenInstanceError):
        make().name = "other"  # type: ignore[misc]
    with pytest.raises((AttributeError, TypeError)):
        make().missing = "other"  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match="missing"):
        make().missing  # type: ignore[attr-defined]  # noqa: B018


def test_the_defaults_are_the_documented_ones() -> None:
    worker = make()
    assert (worker.args, worker.kwargs, worker.env) == ((), {}, {})
    assert (worker.main_arg, worker.extra, worker.flags) == (0, b"", Flags.NONE)
    assert worker.start_time is StartTime.RECOVERY_FINISHED
    assert worker.restart_time is worker.notify is worker.stop_timeout is None
    assert (worker.library_name, worker.function_name) == ("package.module", "function")


def test_A06_an_empty_type_is_the_name_and_a_given_one_is_kept() -> None:
    assert make(name="n").type == "n"
    assert make(name="n", type="t").type == "t"
    assert (make().name, make().type) == (ENTRY, ENTRY)
    recorded = BackgroundWorker._from_record(make(name="n")._record)
    assert (recorded.name, recorded.type) == ("n", "n")


def test_a_name_taken_from_a_long_entry_is_cut_between_characters() -> None:
    worker = make(entry="m:" + "f" * 200)
    assert worker.name == worker.type == "m:" + "f" * 93
    worker = make(entry="m:" + "ñ" * 100)
    assert worker.name == "m:" + "ñ" * 46
    worker.check()


def test_A07_checking_and_packing_change_nothing_that_the_caller_sees() -> None:
    args, kwargs, env = [1, [2]], {"a": {"b": 3}}, {"A": "B"}
    worker = make(args=args, kwargs=kwargs, env=env, extra=bytearray(b"x"))
    before = [getattr(worker, name) for name in FIELDS]
    worker.check()
    worker.check_static()
    assert worker._record
    assert [getattr(worker, name) for name in FIELDS] == before
    assert (args, kwargs, env) == ([1, [2]], {"a": {"b": 3}}, {"A": "B"})


def test_A08_what_the_caller_changes_afterwards_does_not_reach_the_worker() -> None:
    inner = [2]
    args, kwargs, env, extra = [1, inner], {"a": inner}, {"A": "B"}, bytearray(b"x")
    worker = make(args=args, kwargs=kwargs, env=env, extra=extra)
    inner.append(3)
    args.append(4)
    kwargs["b"] = []
    env["A"] = "C"
    extra[0] = 0
    received = BackgroundWorker._from_record(worker._record)
    assert received.args == (1, [2])
    assert received.kwargs == {"a": [2]}
    assert received.env == {"A": "B"}
    assert received.extra == b"x"


def test_A09_128_bytes_of_extra_arrive_bit_exact() -> None:
    for extra in (bytes(EXTRA_LEN), bytes(range(128)), b"\0a\0", random.randbytes(EXTRA_LEN)):
        assert BackgroundWorker._from_record(make(extra=extra)._record).extra == extra


@pytest.mark.parametrize(
    ("entry", "name"),
    [
        (json.dumps, "json:dumps"),
        (os.path.join, "posixpath:join"),
        (json.JSONDecoder.decode, "json.decoder:JSONDecoder.decode"),
        (OrderedDict, "collections:OrderedDict"),
        (random.Random, "random:Random"),
        (BackgroundWorker._from_record, "pgbgw.worker:BackgroundWorker._from_record"),
    ],
)
def test_a_callable_that_can_be_imported_becomes_its_name(entry: Any, name: str) -> None:
    worker = BackgroundWorker(entry=entry)
    assert worker.entry == worker.name == name
    worker.check()


def in_main() -> None: ...


in_main.__module__ = "__main__"


def impostor() -> None: ...


impostor.__qualname__ = "test_the_fields_are_the_documented_ones_in_their_order_and_keyword_only"


class Callable_:
    def __call__(self) -> None: ...

    def method(self) -> None: ...


def closure() -> Any:
    def inner() -> None: ...

    return inner


@pytest.mark.parametrize(
    "entry",
    [
        lambda: None,
        closure(),
        in_main,
        impostor,
        functools.partial(json.dumps, 1),
        Callable_(),
        Callable_().method,
        "".upper,
        random.random,  # of an instance that no name leads to
    ],
    # Names that are the same in every process: tests are shared out by them.
    ids=["lambda", "closure", "in-main", "impostor", "partial", "object", "method", "str", "C"],
)
def test_a_callable_that_cannot_be_imported_is_refused_with_advice(entry: Any) -> None:
    with pytest.raises(InvalidWorkerError, match=r'^background worker ".*": the entry ') as caught:
        BackgroundWorker(entry=entry)
    assert "module" in str(caught.value.hint)
    assert "Executor" in str(caught.value.hint)
    with pytest.raises(InvalidWorkerError, match='"mine"'):
        BackgroundWorker(entry=entry, name="mine")


@pytest.mark.parametrize(
    "fields", [{"args": (lambda: 1,)}, {"kwargs": {"a": closure()}}, {"args": (memoryview(b""),)}]
)
def test_what_cannot_be_pickled_is_refused_when_the_worker_is_made(fields: Any) -> None:
    with pytest.raises(InvalidWorkerError, match='"p": could not pickle') as caught:
        make(name="p", **fields)
    assert caught.value.__cause__ is not None
    assert "Executor" in str(caught.value.hint)


def test_arguments_of_the_wrong_kind_are_refused_when_the_worker_is_made() -> None:
    for args in ("text", 5, None, {1}, iter(())):
        with pytest.raises(InvalidWorkerError, match="args must be a tuple"):
            make(args=args)
    for key in ("kwargs", "env"):
        with pytest.raises(InvalidWorkerError, match=f"{key} must be a mapping"):
            make(**{key: [("a", 1)]})
        with pytest.raises(InvalidWorkerError, match=f"{key} must have strings as keys"):
            make(**{key: {1: "a"}})
    assert make(kwargs=MappingProxyType({"a": 1})).kwargs == {"a": 1}


def test_arguments_are_pickled_once() -> None:
    class Counted:
        pickled = 0

        def __reduce__(self) -> tuple[Any, ...]:
            Counted.pickled += 1
            return (str, ())

    worker = make(args=(Counted(),))
    worker.check()
    worker.check_static()
    assert len(worker._record) == len(worker._static_record())
    pickle.dumps(worker)
    assert Counted.pickled == 1


# --- the record image --------------------------------------------------------------------------


def test_the_record_has_the_layout_that_the_slots_expect() -> None:
    worker = make(
        name="näme",
        type="type",
        main_arg=0xFEDCBA9876543210,
        extra=b"\1\0\2",
        flags=Flags.SHMEM_ACCESS | Flags.DATABASE_CONNECTION,
        start_time=StartTime.CONSISTENT_STATE,
        restart_time=1.5,
        stop_timeout=0.25,
        args=(1,),
    )
    record, payload = worker._record, worker._payload
    assert RECORD_HEADER.size == RECORD_NAME == 96
    assert RECORD_TYPE == RECORD_NAME + NAME_MAXLEN
    assert RECORD_ENTRY == RECORD_TYPE + NAME_MAXLEN
    assert RECORD_EXTRA == RECORD_ENTRY + ENTRY_MAXLEN
    assert RECORD_PAYLOAD == RECORD_EXTRA + EXTRA_LEN
    assert RECORD_PAYLOAD + PAYLOAD_MAX <= RECORD_SIZE
    assert struct.unpack_from("<10I", record) == (1, 3, 1, 1, 5, 4, 23, 3, len(payload), 0)
    assert struct.unpack_from("<qqQQ", record, 40) == (
        1_500_000_000,
        250_000_000,
        0xFEDCBA9876543210,
        0,
    )
    assert record[72:96] == bytes(24)
    assert record[96:192] == "näme".encode().ljust(96, b"\0")
    assert record[192:288] == b"type".ljust(96, b"\0")
    assert record[288:800] == ENTRY.encode().ljust(512, b"\0")
    assert record[800:928] == b"\1\0\2".ljust(128, b"\0")
    assert len(record) % 8 == 0
    assert record[928:] == payload.ljust(len(record) - 928, b"\0")
    assert len(record) - 928 - len(payload) < 8


def test_a_worker_without_arguments_has_no_payload() -> None:
    worker = make()
    assert worker._payload == b""
    assert len(worker._record) == RECORD_PAYLOAD
    received = BackgroundWorker._from_record(worker._record)
    assert received._load_arguments() == ((), {})
    assert received._load_env() == {}


def test_never_is_minus_one_and_the_longest_interval_is_exact() -> None:
    assert struct.unpack_from("<qq", make()._record, 40) == (-1, -1)
    record = make(restart_time=MAX_RESTART_TIME, stop_timeout=MAX_RESTART_TIME)._record
    assert struct.unpack_from("<qq", record, 40) == (86_400_000 * 10**9, 86_400_000 * 10**9)


@pytest.mark.parametrize(("notify", "asked"), [(None, 1), (True, 1), (False, 0)])
def test_notify_defaults_to_yes_in_the_record_of_a_dynamic_worker(notify: Any, asked: int) -> None:
    assert RECORD_HEADER.unpack_from(make(notify=notify)._record)[3] == asked


@pytest.mark.parametrize("notify", [None, False])
def test_the_record_of_a_static_worker_differs_only_in_notifying_nobody(notify: Any) -> None:
    worker = make(name="s", args=(1, 2), notify=notify)
    static = worker._static_record()
    assert RECORD_HEADER.unpack_from(static)[3] == 0
    assert static[:12] + static[16:] == worker._record[:12] + worker._record[16:]


def test_the_record_is_packed_once_and_only_after_the_checks() -> None:
    worker = make()
    worker.check()
    assert worker._record is worker._record
    for name in ("_record", "_parallel"):
        with pytest.raises(InvalidWorkerError):
            getattr(make(restart_time=-2), name)
    assert make()._parallel is False
    assert make(flags=Flags.CLASS_PARALLEL | Flags.SHMEM_ACCESS)._parallel is True


texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=23)
seconds = st.none() | st.integers(0, MAX_RESTART_TIME) | st.floats(0, MAX_RESTART_TIME)
simple = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9)
)
workers = st.builds(
    make,
    name=texts,
    type=texts,
    args=st.lists(simple, max_size=4).map(tuple),
    kwargs=st.dictionaries(st.text(max_size=5), simple, max_size=4),
    main_arg=st.integers(0, (1 << 64) - 1),
    extra=st.binary(max_size=EXTRA_LEN),
    flags=st.sampled_from([Flags(0), Flags(1), Flags(3)]),
    start_time=st.sampled_from([StartTime.CONSISTENT_STATE, StartTime.RECOVERY_FINISHED]),
    restart_time=seconds,
    notify=st.booleans(),
    stop_timeout=seconds,
    env=st.dictionaries(st.from_regex(r"[A-Z_]+", fullmatch=True), texts, max_size=3),
)


@given(workers)
def test_a_worker_comes_out_of_its_record_as_it_went_in(worker: BackgroundWorker) -> None:
    received = BackgroundWorker._from_record(worker._record)
    for field in dataclasses.fields(worker):
        mine, other = getattr(worker, field.name), getattr(received, field.name)
        if field.name in ("restart_time", "stop_timeout") and mine is not None:
            assert other == pytest.approx(mine, rel=1e-12, abs=1e-9)
        else:
            assert other == mine
    assert received._load_arguments() == (worker.args, worker.kwargs)
    assert received._load_env() == worker.env
    assert received._record == worker._record  # it may be registered again


@given(workers)
def test_a_worker_survives_pickling_and_copying(worker: BackgroundWorker) -> None:
    for again in (
        pickle.loads(pickle.dumps(worker)),
        copy.copy(worker),
        copy.deepcopy(worker),
        dataclasses.replace(worker),
    ):
        assert again == worker
        assert again._record == worker._record
        assert hash(again) == hash(worker)


def test_a_worker_is_told_apart_by_its_arguments() -> None:
    assert make(args=(1,)) != make(args=(2,))
    assert make(args=(1,)) == make(args=[1])
    assert len({make(args=(1,)), make(args=(1,)), make(name="other")}) == 2


def test_a_worker_that_cannot_run_may_still_be_pickled() -> None:
    worker = make(restart_time=-2, flags=0x40, entry="nonsense")
    assert pickle.loads(pickle.dumps(worker)) == worker


def test_replacing_carries_names_over_unless_told_to_derive_them() -> None:
    worker = make(name="n", args=(1,))
    other = dataclasses.replace(worker, entry="m:f", args=(2,))
    assert (other.entry, other.name, other.type, other.args) == ("m:f", "n", "n", (2,))
    assert BackgroundWorker._from_record(other._record).args == (2,)
    other = dataclasses.replace(worker, entry="m:f", name="", type="")
    assert (other.name, other.type) == ("m:f", "m:f")


loaded: list[str] = []


def load(what: str) -> str:
    loaded.append(what)
    return what


class Loud:
    """Says so when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return load, ("arguments",)


def test_arguments_are_unpickled_only_when_asked_for_and_after_the_environment() -> None:
    worker = make(args=(Loud(),), kwargs={"a": 1}, env={"A": "B"})
    loaded.clear()
    for received in (
        BackgroundWorker._from_record(worker._record),
        pickle.loads(pickle.dumps(worker)),
    ):
        assert received.name
        assert repr(received)
        assert hash(received)
        assert received._load_env() == {"A": "B"}
        assert received.env == {"A": "B"}
        assert loaded == []
        assert received._load_arguments() == (("arguments",), {"a": 1})
        assert received.args == ("arguments",)
        assert received.kwargs == {"a": 1}
        assert loaded == ["arguments"]
        loaded.clear()


def test_a_failure_to_unpickle_arguments_is_raised_where_they_are_asked_for() -> None:
    worker = make(args=(Loud(),))
    record = worker._record.replace(b"Loud", b"Lout").replace(b"load", b"lost")
    received = BackgroundWorker._from_record(record)
    with pytest.raises(AttributeError, match="lost"):
        received._load_arguments()
    assert received._load_env() == {}


def test_names_of_a_record_that_are_not_UTF_8_are_still_names() -> None:
    record = bytearray(make(name="abc")._record)
    record[96:99] = b"a\xff\xfe"
    assert BackgroundWorker._from_record(bytes(record)).name == "a\ufffd\ufffd"


def test_the_repr_shows_neither_arguments_nor_environment() -> None:
    worker = make(args=("secret",), kwargs={"k": "secret"}, env={"PASSWORD": "secret"})
    assert "secret" not in repr(worker)
    assert ENTRY in repr(worker)


# --- states and outcomes -----------------------------------------------------------------------


def test_the_numbers_and_words_are_the_documented_ones() -> None:
    assert [int(flag) for flag in Flags] == [1, 2, 0x10]
    assert [(time.name, int(time)) for time in StartTime] == [
        ("SUPERVISOR_START", 0),
        ("CONSISTENT_STATE", 1),
        ("RECOVERY_FINISHED", 2),
    ]
    assert [status.value for status in HandleStatus] == [
        status.name.lower() for status in HandleStatus
    ]
    assert [phase.name for phase in sorted(Phase)] == [
        "STARTUP",
        "CONSISTENT",
        "RUNNING",
        "STOPPING",
    ]
    assert [mode.name for mode in sorted(ShutdownMode)] == ["NONE", "SMART", "FAST", "IMMEDIATE"]
    assert OUTCOME_KINDS.index("lost") == 6
    assert NEVER_RESTART is None
    assert (module.MAX_WORKER_PROCESSES_LIMIT, module.MAX_PARALLEL_WORKER_LIMIT) == (262_143, 1024)


def outcome(kind: str, exitcode: Any = None, signum: Any = None, error: Any = None) -> Outcome:
    return Outcome(kind, exitcode, signum, error, at=1.0, restarts=0, final=True)


@pytest.mark.parametrize(
    ("ended", "words", "status"),
    [
        (outcome("exited", 0), "exited with code 0", 0),
        (outcome("exited", 3, error="Traceback ..."), "exited with code 3", 3),
        (outcome("signaled", signum=signal.SIGKILL), "killed by SIGKILL", 137),
        (outcome("signaled", signum=40), "killed by signal 40", 168),
        (outcome("rejected", error="no memory"), "rejected: no memory", 1),
        (outcome("rejected"), "rejected", 1),
        (outcome("cancelled"), "cancelled before it started", 1),
        (outcome("launch_failed", error="fork: no"), "could not be launched: fork: no", 1),
        (outcome("lost"), "outcome lost", 1),
        (outcome("none"), "has not stopped yet", 1),
    ],
)
def test_an_outcome_has_words_for_people_and_a_status_for_shells(
    ended: Outcome, words: str, status: int
) -> None:
    assert str(ended) == words
    assert ended.status == status
    assert pickle.loads(pickle.dumps(ended)) == ended


def test_the_view_of_a_worker_is_a_frozen_value() -> None:
    info = WorkerInfo(
        slot=3,
        generation=7,
        pid=None,
        name="n",
        type="t",
        status=HandleStatus.STOPPED,
        ready=False,
        restarts=2,
        flags=Flags.NONE,
        start_time=StartTime.RECOVERY_FINISHED,
        restart_time=None,
        registered_at=1.0,
        started_at=None,
        activity="",
        outcome=outcome("exited", 0),
    )
    assert pickle.loads(pickle.dumps(info)) == info
    with pytest.raises(dataclasses.FrozenInstanceError):
        info.pid = 5  # type: ignore[misc]
