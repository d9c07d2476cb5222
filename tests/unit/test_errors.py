"""The exceptions: their tree, what a traceback shows of them, and pickling."""

from __future__ import annotations

import concurrent.futures
import copy
import pickle
import re
import runpy
import sys
import traceback

import pytest

import pgbgw
from pgbgw import errors
from pgbgw.errors import (
    InvalidWorkerError,
    NoFreeSlotError,
    ParallelLimitError,
    PgbgwError,
    SupervisorDiedError,
    WaitTimeoutError,
    WorkerFailedError,
)

BASES = {
    "PgbgwError": (Exception,),
    "InvalidWorkerError": (PgbgwError, ValueError),
    "PayloadTooLargeError": (PgbgwError,),
    "NoFreeSlotError": (PgbgwError,),
    "ParallelLimitError": (PgbgwError,),
    "EntryNotAllowedError": (PgbgwError,),
    "ConfigurationError": (PgbgwError, ValueError),
    "StartError": (PgbgwError,),
    "AttachError": (PgbgwError,),
    "WrongProcessError": (PgbgwError, RuntimeError),
    "SupervisorDiedError": (PgbgwError, concurrent.futures.BrokenExecutor),
    "WaitTimeoutError": (PgbgwError, TimeoutError),
    "JobTimeoutError": (PgbgwError, TimeoutError),
    "WorkerFailedError": (PgbgwError,),
}
NAMES = [*BASES, "WorkerCrashedError"]


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> None:
    """pgbgw has all errors by name, as pickle looks them up."""
    for name in NAMES:
        if not hasattr(pgbgw, name):
            monkeypatch.setattr(pgbgw, name, getattr(errors, name), raising=False)


@pytest.mark.parametrize("name", BASES)
def test_each_error_has_its_bases_and_the_public_module(name: str) -> None:
    error = getattr(errors, name)
    assert error.__bases__ == BASES[name]
    assert error.__module__ == "pgbgw"
    assert error.__qualname__ == name
    assert error.__doc__


def test_the_public_names_are_the_tree_and_the_request_to_stop() -> None:
    assert sorted(errors.__all__) == sorted([*NAMES, "WorkerTerminated"])
    for name in NAMES:
        assert re.search(rf"^(.*─ )?{name}  ", errors.__doc__ or "", re.M), f"{name} is not drawn"


def test_the_request_to_stop_is_no_error() -> None:
    stop = errors.WorkerTerminated()
    assert isinstance(stop, SystemExit)
    assert not isinstance(stop, Exception)
    assert stop.code == 1


def test_the_crash_of_a_worker_is_made_on_first_use_and_once() -> None:
    crashed = errors.WorkerCrashedError
    assert crashed is errors.WorkerCrashedError
    assert crashed.__module__ == "pgbgw"
    assert issubclass(crashed, WorkerFailedError)
    assert issubclass(crashed, concurrent.futures.process.BrokenProcessPool)
    assert crashed("m", signal=9).signal == 9


def test_the_errors_do_without_multiprocessing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "multiprocessing"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "concurrent.futures.process", raising=False)
    monkeypatch.setitem(sys.modules, "multiprocessing", None)
    fresh = runpy.run_path(errors.__file__)
    assert fresh["WorkerFailedError"]("m").exitcode is None
    with pytest.raises(ImportError):
        fresh["__getattr__"]("WorkerCrashedError")


def test_a_name_that_is_no_error_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'NoSuchError'"):
        errors.NoSuchError  # noqa: B018


def test_the_message_is_the_text_and_detail_and_hint_are_notes() -> None:
    error = PgbgwError("no free slot", detail="8 of 8 are taken", hint="raise it")
    assert str(error) == "no free slot"
    assert (error.detail, error.hint) == ("8 of 8 are taken", "raise it")
    shown = "".join(traceback.format_exception(error)).splitlines()
    assert shown == [
        "pgbgw.PgbgwError: no free slot",
        "detail: 8 of 8 are taken",
        "hint: raise it",
    ]


def test_without_detail_and_hint_there_are_no_notes() -> None:
    error = PgbgwError("m")
    assert (error.detail, error.hint) == (None, None)
    assert not hasattr(error, "__notes__")


@pytest.mark.usefixtures("exported")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
def test_each_error_survives_pickling_and_copying(name: str, protocol: int) -> None:
    error = getattr(errors, name)("what", detail="numbers", hint="advice")
    error.add_note("a note of somebody else")
    for again in (
        pickle.loads(pickle.dumps(error, protocol)),
        pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(error, protocol)), protocol)),
        copy.copy(error),
    ):
        assert type(again) is type(error)
        assert again.args == ("what",)
        assert again.__dict__ == error.__dict__
        assert again.__notes__ == ["detail: numbers", "hint: advice", "a note of somebody else"]


@pytest.mark.usefixtures("exported")
@pytest.mark.parametrize("name", ["NoFreeSlotError", "ParallelLimitError"])
def test_a_refusal_carries_the_handles_of_those_that_were_made(name: str) -> None:
    error = getattr(errors, name)("full", handles=("h1", "h2"))
    assert error.handles == ["h1", "h2"]
    assert pickle.loads(pickle.dumps(error)).handles == ["h1", "h2"]
    assert NoFreeSlotError("full").handles == ParallelLimitError("full").handles == []
    assert NoFreeSlotError("full").handles is not NoFreeSlotError("full").handles


@pytest.mark.usefixtures("exported")
@pytest.mark.parametrize("name", ["WorkerFailedError", "WorkerCrashedError"])
def test_a_failure_carries_exit_code_and_signal(name: str) -> None:
    error = getattr(errors, name)("died", exitcode=3)
    assert (error.exitcode, error.signal) == (3, None)
    again = pickle.loads(pickle.dumps(getattr(errors, name)("died", signal=9, hint="look")))
    assert (again.exitcode, again.signal, again.hint) == (None, 9, "look")


def test_users_can_catch_what_they_know_already() -> None:
    with pytest.raises(ValueError, match="bad"):
        raise InvalidWorkerError("bad", hint="mend it")
    with pytest.raises(TimeoutError, match="late"):
        raise WaitTimeoutError("late", detail="2 s")
    with pytest.raises(concurrent.futures.BrokenExecutor):
        raise SupervisorDiedError("gone")
