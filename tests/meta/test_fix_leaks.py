"""The fixtures that watch all other tests: they must cry, and cry once."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

CONFTEST = """
pytest_plugins = ["fix_leaks"]
def pytest_configure():
    import fix_leaks, os
    fix_leaks.STRAGGLERS = 0.5
    fix_leaks.RUNTIME_ROOT = os.getcwd()  # the watchdog leaves no time to remove it
"""

LEAKY = """
import mmap, os, signal, socket, subprocess, sys, threading, time
import pytest

kept = []

def test_child():
    if os.fork() == 0:
        signal.pause()

def test_zombie():
    if os.fork() == 0:
        os._exit(0)

def test_orphan():
    # Its parent is gone, it is in a session of its own, and nothing but its environment tells.
    code = "import os, time\\nif os.fork() == 0:\\n os.setsid()\\n time.sleep(300)"
    subprocess.run([sys.executable, "-c", code], check=True)

def test_descriptor():
    kept.append(socket.socket())

def test_mapping():
    fd = os.memfd_create("pgbgw-test")
    os.ftruncate(fd, mmap.PAGESIZE)
    kept.append(mmap.mmap(fd, mmap.PAGESIZE))
    os.close(fd)

def test_thread():
    threading.Thread(target=time.sleep, args=[2], daemon=True).start()

def test_socket_file(runtime_dir):
    (runtime_dir / "default.sock").touch()

@pytest.mark.leaves_sockets
def test_excused_socket_file(runtime_dir):
    (runtime_dir / "default.sock").touch()

def test_failed_anyway():
    if os.fork() == 0:
        signal.pause()
    raise ArithmeticError

def test_straggler():
    child = os.fork()
    if child == 0:
        time.sleep(0.1)
        os._exit(0)
    threading.Thread(target=os.waitpid, args=[child, 0]).start()

def test_nothing(runtime_dir):
    assert os.environ["PGBGW_RUNTIME_DIR"] == str(runtime_dir)
    assert "PGBGW_ADDRESS" not in os.environ
"""


@pytest.fixture
def inner(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    monkeypatch.setenv("PGBGW_ADDRESS", "somewhere")
    pytester.makeconftest(CONFTEST)
    pytester.makeini("[pytest]\nmarkers =\n  timeout_s(seconds): x\n  leaves_sockets: x")
    return pytester


def test_every_leak_is_named_and_spares_the_next_test(inner: pytest.Pytester) -> None:
    inner.makepyfile(LEAKY)
    result = inner.runpytest_subprocess()
    result.assert_outcomes(passed=10, errors=7, failed=1)
    for test, said in {
        "child": "*process * of * (sleeping)*",
        "zombie": "*process * (zombie)*",
        "orphan": "*process * of * (sleeping): *time.sleep*",
        "descriptor": "*descriptor socket:*",
        "mapping": "*mapping of /memfd:pgbgw-test*",
        "thread": "*thread Thread-*",
        "socket_file": "*left in the runtime directory: default.sock*",
    }.items():
        result.stdout.fnmatch_lines([f"*ERROR at teardown of test_{test} *", said])


@pytest.mark.parametrize("mark", ["", "@pytest.mark.timeout_s(0.5)"])
def test_the_watchdog_shows_where_a_test_hangs_and_ends_it(
    inner: pytest.Pytester, mark: str
) -> None:
    inner.makepyfile(f"import pytest, time\n{mark}\ndef test_hangs():\n    time.sleep(300)\n")
    result = inner.runpytest_subprocess("-o", f"faulthandler_timeout={30 if mark else 0.5}")
    assert result.ret == 1
    result.stderr.fnmatch_lines(["Timeout (0:00:00.5*", "*in test_hangs"])
