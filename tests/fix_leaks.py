"""What every test gets without asking: a watchdog, a runtime directory, a search for leaks.

After a test no process, descriptor, memory file, thread or socket may be left that was not there
before.  Stragglers get ten seconds; what is left then fails the test, and processes are killed so
that the next test starts clean.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import os
import re
import shutil
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path

import psutil
import pytest

STRAGGLERS = 10.0  # seconds
RUNTIME_ROOT = "/tmp"  # not tmp_path: the path of a socket may have 107 bytes
TEST_ID = "PGBGW_TEST_ID"

_stderr = pytest.StashKey[int]()
_failed = pytest.StashKey[bool]()


# -- the watchdog ----------------------------------------------------------------------------------


def pytest_configure(config: pytest.Config) -> None:
    # Capturing has taken descriptor 2 by now, and what is captured is lost when the watchdog exits.
    capture = config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled() if capture else contextlib.nullcontext():
        config.stash[_stderr] = os.dup(2)


def pytest_unconfigure(config: pytest.Config) -> None:
    os.close(config.stash[_stderr])


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Dump the traceback of all threads and exit if a test, with its fixtures, takes too long.

    pytest's own faulthandler_timeout is the limit in seconds, unless timeout_s(n) overrides it; but
    pytest would only dump and wait on.  Being the innermost wrapper, we replace its timer.
    """
    marker = item.get_closest_marker("timeout_s")
    limit = float(marker.args[0] if marker else item.config.getini("faulthandler_timeout"))
    # A debugger is in no hurry.
    if limit > 0 and not item.config.getoption("usepdb"):
        faulthandler.dump_traceback_later(limit, exit=True, file=item.config.stash[_stderr])
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    item.stash[_failed] = item.stash.get(_failed, False) or report.failed
    return report


# -- the runtime directory -------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def runtime_dir(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A runtime directory for this test alone, in the environment, with a short path.

    A supervisor takes its socket with it when it ends.  A test that kills one is marked
    leaves_sockets.
    """
    directory = Path(tempfile.mkdtemp(prefix="pgbgw-", dir=RUNTIME_ROOT))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PGBGW_RUNTIME_DIR", str(directory))
        patch.delenv("PGBGW_ADDRESS", raising=False)
        try:
            yield directory
            sockets = sorted(path.name for path in directory.rglob("*.sock"))
        finally:
            shutil.rmtree(directory, ignore_errors=True)
    excused = request.node.get_closest_marker("leaves_sockets") or request.node.stash[_failed]
    if sockets and not excused:
        pytest.fail(f"left in the runtime directory: {', '.join(sockets)}", pytrace=False)


# -- leaks -----------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def leak_check(runtime_dir: Path, request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves something behind; what a failed one leaves is killed without a word.

    It is set up before the fixtures that a test asks for, hence looks when they have been torn
    down, and after runtime_dir, so that the processes are gone before their sockets are looked
    for.
    """
    test_id = uuid.uuid4().hex
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(TEST_ID, test_id)
        before = Belongings(test_id)
        yield
        deadline = time.monotonic() + (0.5 if request.node.stash[_failed] else STRAGGLERS)
        leaks = Belongings(test_id) - before
        while leaks and time.monotonic() < deadline:
            time.sleep(0.02)
            gc.collect()
            leaks = Belongings(test_id) - before
    report = leaks.describe()
    while leaks.kill_processes():  # a supervisor may have started more before it was hit
        leaks = Belongings(test_id) - before
    # The traceback of a failure holds on to descriptors, and one complaint is enough.
    if report and not request.node.stash[_failed]:
        pytest.fail(f"left behind:\n{report}", pytrace=False)


class Belongings:
    """What this process and its descendants hold at this moment."""

    def __init__(self, test_id: str) -> None:
        self.processes = set(psutil.Process().children(recursive=True)) | marked_processes(test_id)
        self.threads = set(threading.enumerate())
        # By target, not by number: a test may close one and open another of the same kind.
        self.files = Counter(open_files()) + Counter(mapped_memory_files())

    def __sub__(self, before: Belongings) -> Belongings:
        self.processes -= before.processes
        self.threads -= before.threads
        self.files -= before.files
        return self

    def __bool__(self) -> bool:
        return bool(self.processes or self.threads or self.files)

    def describe(self) -> str:
        lines = [f"  process {describe_process(process)}" for process in self.processes]
        lines += [f"  thread {thread.name}" for thread in self.threads]
        lines += [f"  {target}, {count} times" for target, count in self.files.items()]
        return "\n".join(lines)

    def kill_processes(self) -> bool:
        """Kill and, if they are children of ours, reap; return whether there were any."""
        for process in self.processes:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(self.processes, timeout=5)
        return bool(self.processes)


def marked_processes(test_id: str) -> set[psutil.Process]:
    """Processes with the test's id in their environment, whoever their parent is.

    The environment is the one that was given to exec, and forks share it, so this finds the
    orphaned workers of a supervisor; a mere fork of the test process itself is found as its child
    only.
    """
    mark = f"{TEST_ID}={test_id}".encode()
    found = set()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        # Gone by now, or somebody else's.
        with contextlib.suppress(OSError, psutil.Error):
            if mark in Path("/proc", pid, "environ").read_bytes():
                found.add(psutil.Process(int(pid)))
    return found


def open_files() -> Iterator[str]:
    for fd in os.listdir("/proc/self/fd"):
        # The descriptor of the listing itself is in the list.
        with contextlib.suppress(FileNotFoundError):
            yield f"descriptor {os.readlink(f'/proc/self/fd/{fd}')}"


def mapped_memory_files() -> Iterator[str]:
    """Name each mapping of a memory file; its descriptor may be closed long since."""
    with open("/proc/self/maps") as maps:
        for line in maps:
            if match := re.search(r"/memfd:\S*", line):
                yield f"mapping of {match[0]}"


def describe_process(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.NoSuchProcess):
        command = [process.name()]
        with contextlib.suppress(psutil.ZombieProcess):
            command = process.cmdline()
        text = " ".join(command).replace("\n", " ")[:200]
        return f"{process.pid} of {process.ppid()} ({process.status()}): {text}"
    return f"{process.pid}, gone meanwhile"
