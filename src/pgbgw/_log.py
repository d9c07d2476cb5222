"""Log lines as PostgreSQL writes them, and how they reach stderr without holding up the supervisor.

    2026-11-21 17:00:00.123 [4711] LOG:  worker "reports" (type "etl", pid 4712, slot 3/7) started

The supervisor sends each line to the relay, a process of its own that does nothing but write
stderr: if nobody reads there, the relay waits and the supervisor counts what it had to drop.
Workers write stderr themselves.  Only the logger "pgbgw" is touched; the rest is its user's.
"""

from __future__ import annotations

import logging
import os
import re
import select
import signal
import socket

from pgbgw import _kernel

__all__ = [
    "LEVELS",
    "RateLimit",
    "RelayHandler",
    "StderrHandler",
    "clean",
    "describe",
    "setup_supervisor",
    "setup_worker",
    "start_relay",
]

LEVELS = {
    logging.DEBUG: "DEBUG1",
    logging.INFO: "LOG",
    logging.WARNING: "WARNING",
    logging.ERROR: "ERROR",
    logging.CRITICAL: "FATAL",
}
"""Python's levels and PostgreSQL's words for them."""
LINE_BYTES = 16 * 1024
"""What is longer is cut."""
STDERR_PATIENCE = 1.0
"""Seconds that a worker waits for a reader of stderr."""

# What could forge a line, drive a terminal or turn the reading direction: C0 and C1 controls, the
# line and paragraph separators, bidi marks; and lone surrogates, which no encoding takes.
_HARMFUL = "\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
_IN_NAMES = re.compile(f"[{_HARMFUL}]")
_IN_LINES = re.compile(f"(?![\t\n])[{_HARMFUL}]")


# --- text -----------------------------------------------------------------------------------------


def clean(text: str) -> str:
    """Return `text` fit for one line of a log: what is no plain character becomes "?"."""
    return _IN_NAMES.sub("?", text)


def describe(name: str, type: str, pid: int | None, slot: int, generation: int) -> str:
    """Return how log lines name a worker: `worker "name" (type "t", pid 12, slot 3/7)`.

    Without a process (`pid` None) the pid is left out.  Name and type come from clients: see clean.
    """
    process = "" if pid is None else f"pid {pid}, "
    return f'worker "{clean(name)}" (type "{clean(type)}", {process}slot {slot}/{generation})'


class _Formatter(logging.Formatter):
    """PostgreSQL's line: time, pid, level; further lines of the same record start with a tab."""

    default_msec_format = "%s.%03d"

    def format(self, record: logging.LogRecord) -> str:
        try:
            text = record.getMessage()
        except Exception:  # arguments that do not fit, or that cannot be printed
            text = f"{record.msg!r} (its arguments could not be formatted)"
        if record.exc_info and not record.exc_text:
            record.exc_text = self.formatException(record.exc_info)
        for more in (record.exc_text, record.stack_info):
            if more:
                text += "\n" + more
        text = _IN_LINES.sub("?", text).rstrip("\n").replace("\n", "\n\t")
        return f"{self.formatTime(record)} [{record.process}] {_word(record.levelno)}:  {text}"


def _word(level: int) -> str:
    """Return the word for a level, for one in between that of the level below it."""
    return LEVELS[max((known for known in LEVELS if known <= level), default=logging.DEBUG)]


def _encode(text: str) -> bytes:
    """Return the bytes of a line, with its line end, at most LINE_BYTES of them."""
    line = text.encode(errors="replace") + b"\n"
    if len(line) <= LINE_BYTES:
        return line
    end = b" ... (cut)\n"
    return line[: LINE_BYTES - len(end)].decode(errors="ignore").encode() + end


class RateLimit:
    """Lets `burst` lines pass at once and `per_second` in the long run.

        if limit.allow(now):
            log.warning("...%s", limit.more)

    After a call that returned True, `suppressed` says how many were refused since the one before,
    and `more` says so in words.
    """

    def __init__(self, per_second: float, burst: int) -> None:
        self.suppressed = 0
        self._per_second = per_second
        self._burst = burst
        self._refused = 0
        self._credit = float(burst)
        self._last: float | None = None

    @property
    def more(self) -> str:
        """To add to the line that was allowed: nothing, or how many are missing before it."""
        return f" ({self.suppressed} more before, not shown)" if self.suppressed else ""

    def allow(self, now: float) -> bool:
        """Tell whether one more line may be written; `now` is a monotonic time in seconds."""
        if self._last is not None:
            earned = (now - self._last) * self._per_second
            self._credit = min(self._burst, self._credit + earned)
        self._last = now
        if self._credit < 1:
            self._refused += 1
            return False
        self._credit -= 1
        self.suppressed, self._refused = self._refused, 0
        return True


# --- handlers -------------------------------------------------------------------------------------


class RelayHandler(logging.Handler):
    """Sends each record to the relay as one datagram; never waits and never raises.

    What finds no room is counted in `dropped`, and the next line that gets through says so.
    """

    def __init__(self, sock: socket.socket) -> None:
        super().__init__()
        self.setFormatter(_Formatter())
        self.dropped = 0
        self._socket = sock

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record)
            if self.dropped:
                text = self._confession() + "\n" + text
            self._socket.send(_encode(text), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except Exception:  # no room (EAGAIN), or no relay any more: in both cases go on without
            self.dropped += 1
        else:
            self.dropped = 0

    def close(self) -> None:
        """Close this process's end of the socket: the relay ends with the last copy of it."""
        self._socket.close()
        super().close()

    def _confession(self) -> str:
        count = f"{self.dropped} log lines were" if self.dropped > 1 else "1 log line was"
        text = f"... {count} dropped"
        return self.format(
            logging.LogRecord(__name__, logging.WARNING, __file__, 0, text, None, None)
        )


class StderrHandler(logging.Handler):
    """Writes each record to stderr at once, past sys.stderr and its buffer.

    A reader who has stopped reading costs a second a line, and then the rest of the line: a worker
    that says goodbye must not hang in it for ever.
    """

    def __init__(self, fd: int = 2) -> None:
        super().__init__()
        self.setFormatter(_Formatter())
        self._fd = fd

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = _encode(self.format(record))
            poll = select.poll()
            poll.register(self._fd, select.POLLOUT)
            while line and poll.poll(STDERR_PATIENCE * 1000):
                try:  # what poll promises room for; in one piece if it can be
                    line = line[os.write(self._fd, line[: select.PIPE_BUF]) :]
                except BlockingIOError:  # non-blocking, and another writer was faster
                    continue
        except Exception:  # stderr is closed: there is nobody to tell
            pass


def setup_supervisor(sock: socket.socket, level: int | str = logging.INFO) -> None:
    """Send what this process logs under "pgbgw" to the relay at the other end of `sock`."""
    _setup(RelayHandler(sock), level)


def setup_worker(level: int | str = logging.INFO) -> None:
    """Write what this process logs under "pgbgw" to stderr, and close its copy of the socket."""
    _setup(StderrHandler(), level)


def _setup(handler: logging.Handler, level: int | str) -> None:
    logger = logging.getLogger("pgbgw")
    for old in logger.handlers[:]:
        logger.removeHandler(old)
        old.close()
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False


# --- the relay ------------------------------------------------------------------------------------

# Whatever ends the supervisor and its workers, the relay stays until it has written the last line.
_IGNORED = (
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGPIPE,
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGUSR2,
)


def start_relay(err_fd: int = 2) -> tuple[socket.socket, int]:
    """Fork the relay, which writes what it receives to `err_fd`; return (socket to send to, pid).

    To be called first, before there are threads, or descriptors that the relay could keep open.  It
    is a child of the caller and ends when all copies of the returned socket are closed: processes
    forked later close theirs.  The socket is non-blocking and closed on exec.
    """
    # SEQPACKET and not DGRAM: only there the reader gets an end-of-file.
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        try:
            _be_relay(theirs.fileno(), err_fd)
        finally:
            os._exit(1)
    theirs.close()
    ours.setblocking(False)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)  # as much as the kernel grants
    return ours, pid


def _be_relay(fd: int, err_fd: int) -> None:
    os.setsid()  # away from the terminal: its ^C and its hang-up are not for us
    for signum in _IGNORED:
        signal.signal(signum, signal.SIG_IGN)
    _kernel.set_thread_name(b"pgbgw: log")
    first = 0
    for kept in sorted({fd, err_fd}):
        if first < kept:
            _kernel.close_range(first, kept - 1)
        first = kept + 1
    _kernel.close_range(first)
    _kernel.relay(fd, err_fd)
