"""The form of log lines, the handlers, and the relay (which runs in a child: see run())."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgbgw import _log
from pgbgw._log import (
    LEVELS,
    LINE_BYTES,
    RateLimit,
    RelayHandler,
    StderrHandler,
    clean,
    describe,
    setup_supervisor,
    setup_worker,
)

LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} \[(\d+)\] ([A-Z0-9]+):  (.*)")


def record(
    message: object, *args: object, level: int = logging.INFO, error: BaseException | None = None
) -> logging.LogRecord:
    exc_info = None if error is None else (type(error), error, error.__traceback__)
    return logging.LogRecord("pgbgw.test", level, __file__, 1, message, args, exc_info)


@pytest.fixture
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        theirs.setblocking(False)
        yield ours, theirs


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    """The logger "pgbgw", as it was before when the test is over."""
    logger = logging.getLogger("pgbgw")
    before = logger.handlers[:], logger.level, logger.propagate
    logger.handlers = []
    yield logger
    for handler in logger.handlers[:]:
        logger.removeHandler(handler)
        handler.close()
    logger.handlers, logger.level, logger.propagate = before


def drain(sock: socket.socket) -> list[str]:
    """All that has arrived at a non-blocking socket, a string for each datagram."""
    messages = []
    while True:
        try:
            messages.append(sock.recv(1 << 20).decode())
        except BlockingIOError:
            return messages


def fill(handler: RelayHandler) -> int:
    """Send until there is no more room; return how many lines got through."""
    through = 0
    while not handler.dropped:
        handler.emit(record("x" * 10_000))
        through += not handler.dropped
    return through


# --- names ----------------------------------------------------------------------------------------


def test_a_worker_is_described_by_name_type_pid_slot_and_generation() -> None:
    assert describe("a", "t", 12, 3, 7) == 'worker "a" (type "t", pid 12, slot 3/7)'
    assert describe("a", "t", None, 3, 7) == 'worker "a" (type "t", slot 3/7)'


@pytest.mark.parametrize(
    "harmful",
    [
        *("\n", "\r", "\t", "\0", "\x1b", "\x7f", "\x85", "\x9b", "\u2028", "\u2029"),
        *("\u061c", "\u200e", "\u200f", "\u202a", "\u202e", "\u2066", "\u2069", "\udc80"),
    ],
)
def test_A23_what_could_forge_a_line_or_drive_a_terminal_becomes_a_question_mark(
    harmful: str,
) -> None:
    assert clean(f"a{harmful}b") == "a?b"
    assert describe(f"n{harmful}", f"{harmful}t", 1, 2, 3) == (
        'worker "n?" (type "?t", pid 1, slot 2/3)'
    )


def test_A23_other_characters_of_all_languages_are_left_alone() -> None:
    for name in ("größe", "作業", "ワーカー", "עובד", "emoji 🐘", 'a "quoted" name', "tab-less"):
        assert clean(name) == name


@given(st.text(st.characters()))
def test_A23_a_clean_name_is_one_line_that_every_encoding_of_unicode_takes(name: str) -> None:
    cleaned = clean(name)
    assert len(cleaned) == len(name)
    assert len(f"<{cleaned}>".splitlines()) == 1
    cleaned.encode()
    assert clean(cleaned) == cleaned


# --- lines ----------------------------------------------------------------------------------------


def line_of(record: logging.LogRecord) -> str:
    handler = StderrHandler()
    line = handler.format(record)
    handler.close()
    return line


@pytest.mark.parametrize(
    ("level", "word"),
    [
        *LEVELS.items(),
        *((1, "DEBUG1"), (15, "DEBUG1"), (25, "LOG"), (35, "WARNING"), (60, "FATAL")),
    ],
)
def test_levels_have_postgresql_s_words(level: int, word: str) -> None:
    match = LINE.fullmatch(line_of(record("%d of %d", 1, 2, level=level)))
    assert match is not None
    assert match.groups() == (str(os.getpid()), word, "1 of 2")


def test_the_words_are_postgresql_s() -> None:
    assert list(LEVELS.values()) == ["DEBUG1", "LOG", "WARNING", "ERROR", "FATAL"]


def test_further_lines_of_a_message_start_with_a_tab() -> None:
    first, *others = line_of(record("one\ntwo\nthree\n")).split("\n")
    assert LINE.fullmatch(first)
    assert others == ["\ttwo", "\tthree"]


def test_a_traceback_follows_its_line_with_tabs() -> None:
    try:
        raise ValueError("no\nsuch thing")
    except ValueError as exc:
        lines = line_of(record("failed", error=exc)).split("\n")
    assert LINE.fullmatch(lines[0])
    assert lines[1] == "\tTraceback (most recent call last):"
    assert lines[-2:] == ["\tValueError: no", "\tsuch thing"]
    assert all(line.startswith("\t") for line in lines[1:])


def test_a_message_cannot_forge_a_line_or_drive_a_terminal() -> None:
    line = line_of(record("%s", "evil\r2026-01-01 00:00:00.000 [1] FATAL:  \x1b[2Jforged\nnext"))
    first, second = line.split("\n")
    assert LINE.fullmatch(first)
    assert first.endswith("evil?2026-01-01 00:00:00.000 [1] FATAL:  ?[2Jforged")
    assert second == "\tnext"


def test_a_record_that_cannot_be_formatted_is_logged_all_the_same() -> None:
    class Unprintable:
        def __str__(self) -> str:
            raise RuntimeError

    assert "'%d workers' (its arguments" in line_of(record("%d workers", "no number"))
    assert "'%s'" in line_of(record("%s", Unprintable()))


# --- the handler of the supervisor ----------------------------------------------------------------


def test_each_record_is_one_datagram_that_ends_with_a_line_end(
    sockets: tuple[socket.socket, socket.socket],
) -> None:
    handler = RelayHandler(sockets[0])
    handler.emit(record("one"))
    handler.emit(record("two\nthree"))
    one, two = drain(sockets[1])
    assert one.endswith("LOG:  one\n")
    assert two.endswith("LOG:  two\n\tthree\n")


@pytest.mark.parametrize("letter", ["x", "ö", "作", "🐘"])
def test_a_long_line_is_cut_between_characters(
    sockets: tuple[socket.socket, socket.socket], letter: str
) -> None:
    handler = RelayHandler(sockets[0])
    handler.emit(record(letter * LINE_BYTES))
    (line,) = drain(sockets[1])
    assert LINE_BYTES - 4 < len(line.encode()) <= LINE_BYTES
    assert line.endswith(letter + " ... (cut)\n")


def test_a_full_socket_neither_blocks_nor_raises_and_the_next_line_tells_the_number_dropped(
    sockets: tuple[socket.socket, socket.socket],
) -> None:
    handler = RelayHandler(sockets[0])
    through = fill(handler)
    for _ in range(4):
        handler.emit(record("x" * 10_000))
    assert handler.dropped == 5
    assert len(drain(sockets[1])) == through
    handler.emit(record("first"))
    handler.emit(record("second"))
    first, second = drain(sockets[1])
    confession, line, _ = first.split("\n")
    match = LINE.fullmatch(confession)
    assert match is not None
    assert match.groups()[1:] == ("WARNING", "... 5 log lines were dropped")
    assert line.endswith("LOG:  first")
    assert second.count("\n") == 1
    assert handler.dropped == 0


def test_a_single_dropped_line_is_told_in_the_singular_and_a_long_one_after_it_is_still_cut(
    sockets: tuple[socket.socket, socket.socket],
) -> None:
    handler = RelayHandler(sockets[0])
    fill(handler)
    drain(sockets[1])
    handler.emit(record("x" * LINE_BYTES))
    (message,) = drain(sockets[1])
    assert "... 1 log line was dropped\n" in message
    assert len(message.encode()) == LINE_BYTES


def test_the_supervisor_goes_on_without_its_relay(
    sockets: tuple[socket.socket, socket.socket],
) -> None:
    handler = RelayHandler(sockets[0])
    sockets[1].close()
    handler.emit(record("one"))
    sockets[0].close()
    handler.emit(record("two"))
    assert handler.dropped == 2


# --- the handler of a worker ----------------------------------------------------------------------


def test_a_worker_writes_at_once_and_past_sys_stderr(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    StderrHandler().emit(record("one\ntwo"))
    monkeypatch.undo()
    assert capfd.readouterr().err.endswith("LOG:  one\n\ttwo\n")


def test_a_closed_stderr_is_not_a_worker_s_problem() -> None:
    read, write = os.pipe()
    os.close(read)
    handler = StderrHandler(write)
    handler.emit(record("one"))  # EPIPE
    os.close(write)
    handler.emit(record("two"))  # EBADF


def test_a_worker_s_line_is_written_whole_even_in_pieces_and_to_a_non_blocking_stderr(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written = bytearray()
    calls = 0
    real = os.write

    def write(fd: int, data: bytes) -> int:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise BlockingIOError
        written.extend(data[:10])
        return min(10, len(data))

    read_end, write_end = os.pipe()
    monkeypatch.setattr(os, "write", write)
    StderrHandler(write_end).emit(record("a line that is longer than ten bytes"))
    monkeypatch.setattr(os, "write", real)
    os.close(read_end)
    os.close(write_end)
    assert written.endswith(b"LOG:  a line that is longer than ten bytes\n")


def test_a_worker_does_not_hang_in_a_line_that_nobody_reads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_log, "STDERR_PATIENCE", 0.05)
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(write_end, bytes(4096))
    os.set_blocking(write_end, True)
    StderrHandler(write_end).emit(record("goodbye"))  # returns
    os.close(read_end)
    os.close(write_end)


# --- setting up -----------------------------------------------------------------------------------


def test_setting_up_touches_the_logger_pgbgw_alone(
    sockets: tuple[socket.socket, socket.socket], logger: logging.Logger
) -> None:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    setup_supervisor(sockets[0], logging.DEBUG)
    assert (root.handlers, root.level) == before
    assert not logger.propagate
    logging.getLogger("pgbgw._loop").debug("one %s", "line")
    (line,) = drain(sockets[1])
    assert line.endswith("DEBUG1:  one line\n")


def test_setting_up_a_worker_replaces_the_supervisor_s_handler_and_closes_its_socket(
    sockets: tuple[socket.socket, socket.socket],
    logger: logging.Logger,
    capfd: pytest.CaptureFixture[str],
) -> None:
    setup_supervisor(sockets[0])
    setup_worker("WARNING")
    assert sockets[0].fileno() == -1
    logger.info("not shown")
    logger.warning("shown")
    assert sockets[1].recv(64) == b""
    (line,) = capfd.readouterr().err.splitlines()
    assert line.endswith("WARNING:  shown")


# --- rate limits ----------------------------------------------------------------------------------


def test_a_burst_passes_and_then_the_rate_holds() -> None:
    limit = RateLimit(per_second=2, burst=3)
    assert [limit.allow(100.0) for _ in range(5)] == [True, True, True, False, False]
    assert limit.allow(100.4) is False
    assert limit.allow(100.5) is True
    assert limit.suppressed == 3
    assert limit.more == " (3 more before, not shown)"
    assert limit.allow(101.0) is True
    assert limit.suppressed == 0
    assert limit.more == ""
    assert [limit.allow(200.0) for _ in range(5)] == [True, True, True, False, False]


@given(
    st.floats(0.1, 100),
    st.integers(1, 20),
    st.lists(st.floats(0, 10), min_size=1, max_size=200),
)
def test_a_rate_limit_never_lets_more_pass_and_accounts_for_every_line(
    per_second: float, burst: int, gaps: list[float]
) -> None:
    limit = RateLimit(per_second, burst)
    now = passed = suppressed = refused_since = 0.0
    for gap in gaps:
        now += gap
        if limit.allow(now):
            passed += 1
            assert limit.suppressed == refused_since
            suppressed += limit.suppressed
            refused_since = 0
        else:
            refused_since += 1
    assert passed + suppressed + refused_since == len(gaps)
    assert passed <= burst + per_second * now + 1e-6


# --- the relay ------------------------------------------------------------------------------------


def run(code: str, pass_fds: tuple[int, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run `code` in another process and wait until nobody holds its stderr any more."""
    return subprocess.run(
        [sys.executable, "-c", "import os, signal, sys\n" + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        pass_fds=pass_fds,
    )


def test_the_relay_writes_what_it_gets_and_ends_with_the_supervisor() -> None:
    done = run("""
        from pgbgw import _log
        import logging
        sock, _ = _log.start_relay()
        assert not sock.getblocking() and not os.get_inheritable(sock.fileno())
        _log.setup_supervisor(sock, logging.INFO)
        logging.getLogger("pgbgw.x").info("one\\ntwo")
        sock.close()
        pid, status = os.wait()
        print(status)
    """)
    assert (done.returncode, done.stdout) == (0, "0\n")
    assert done.stderr.endswith("LOG:  one\n\ttwo\n")


def test_the_last_lines_of_a_killed_supervisor_come_out() -> None:
    done = run("""
        from pgbgw import _log
        sock, _ = _log.start_relay()
        for number in range(100):
            sock.send(b"line %d\\n" % number)
        os.kill(os.getpid(), signal.SIGKILL)
    """)
    assert done.returncode == -9
    assert done.stderr.splitlines() == [f"line {number}" for number in range(100)]


def test_the_relay_has_a_name_and_a_session_of_its_own_and_keeps_no_other_descriptor() -> None:
    done = run("""
        from pgbgw import _log
        spare = os.dup(0)
        sock, _ = _log.start_relay()
        me = os.getpid()
        (relay,) = [int(pid) for pid in open(f"/proc/{me}/task/{me}/children").read().split()]
        sock.send(b"up\\n")
        comm = ""
        while comm != "pgbgw: log":
            comm = open(f"/proc/{relay}/comm").read().rstrip()
        while len(kept := os.listdir(f"/proc/{relay}/fd")) > 2:
            pass
        assert "2" in kept, kept
        assert os.getsid(relay) == relay != os.getsid(me)
        print("right")
    """)
    assert (done.stdout, done.stderr) == ("right\n", "up\n")


def test_signals_that_stop_the_supervisor_do_not_stop_the_relay() -> None:
    done = run("""
        from pgbgw import _log
        sock, _ = _log.start_relay()
        me = os.getpid()
        (relay,) = [int(pid) for pid in open(f"/proc/{me}/task/{me}/children").read().split()]
        while open(f"/proc/{relay}/comm").read() != "pgbgw: log\\n":
            pass
        for name in ("HUP", "INT", "QUIT", "TERM", "USR1", "USR2", "PIPE"):
            os.kill(relay, getattr(signal, "SIG" + name))
        sock.send(b"still here\\n")
        sock.close()
        print(os.wait()[1])
    """)
    assert (done.stdout, done.stderr) == ("0\n", "still here\n")


def test_a_supervisor_whose_log_nobody_reads_is_not_held_up() -> None:
    read, write = os.pipe()
    done = run(
        f"""
        from pgbgw import _log
        import logging
        sock, _ = _log.start_relay({write})
        _log.setup_supervisor(sock, logging.INFO)
        (handler,) = logging.getLogger("pgbgw").handlers
        while handler.dropped < 100:
            logging.getLogger("pgbgw").info("x" * 1000)
        print("went on")
        """,
        pass_fds=(write,),
    )
    os.close(write)
    os.close(read)
    assert done.stdout == "went on\n"


def test_the_relay_may_write_elsewhere_and_the_supervisor_s_stderr_is_then_closed() -> None:
    read, write = os.pipe()
    done = run(
        f"""
        from pgbgw import _log
        sock, _ = _log.start_relay({write})
        sock.send(b"elsewhere\\n")
        """,
        pass_fds=(write,),
    )
    os.close(write)
    with open(read) as pipe:
        assert pipe.read() == "elsewhere\n"
    assert done.stderr == ""


def test_the_module_says_what_it_offers() -> None:
    assert all(hasattr(_log, name) for name in _log.__all__)
