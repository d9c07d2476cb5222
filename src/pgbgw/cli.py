"""The command line: `pgbgw COMMAND`, `python -m pgbgw COMMAND`.

Output is plain text, or JSON with --json; complaints go to stderr.  Exit status:

    0  done              3  no supervisor       5  nothing matched
    1  failed            4  no slot, or limit   6  timed out
    2  wrong usage

`wait` and `register --wait` exit as their worker did, with 128 + n for signal n.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import re
import select
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from math import isfinite
from typing import Any, TypeVar

from pgbgw import __version__, _log, _runtime, _show
from pgbgw.client import Client, attach
from pgbgw.errors import (
    AttachError,
    ConfigurationError,
    InvalidWorkerError,
    NoFreeSlotError,
    ParallelLimitError,
    PayloadTooLargeError,
    PgbgwError,
    SupervisorDiedError,
    WaitTimeoutError,
)
from pgbgw.handle import WorkerHandle
from pgbgw.worker import (
    MAX_PARALLEL_WORKER_LIMIT,
    MAX_WORKER_PROCESSES_LIMIT,
    BackgroundWorker,
    Flags,
    StartTime,
    WorkerInfo,
)

FAILED, USAGE, NO_SUPERVISOR, NO_SLOT, NO_MATCH, TIMED_OUT = range(1, 7)
_STATUS: dict[type[PgbgwError], int] = {
    AttachError: NO_SUPERVISOR,
    SupervisorDiedError: NO_SUPERVISOR,
    NoFreeSlotError: NO_SLOT,
    ParallelLimitError: NO_SLOT,
    WaitTimeoutError: TIMED_OUT,
    ConfigurationError: USAGE,
    InvalidWorkerError: USAGE,
    PayloadTooLargeError: USAGE,
}
STOP_SIGNALS = {"smart": signal.SIGTERM, "fast": signal.SIGINT, "immediate": signal.SIGQUIT}
STOP_TIMEOUT = 60.0  # seconds, as pg_ctl

T = TypeVar("T")
E = TypeVar("E", bound=Enum)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit status.  Wrong usage raises SystemExit(2), as argparse does."""
    options = _parser().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names may be in any language
    try:
        status: int = options.run(options)
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except PgbgwError as error:
        _complain(error)
        return _STATUS.get(type(error), FAILED)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        _discard_output()
        return 128 + signal.SIGPIPE
    except OSError as error:  # of the output: a full disk
        _discard_output()
        _say(f"pgbgw: {error.strerror or error}")
        return FAILED


def _discard_output() -> None:
    """What is still buffered must not fail again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _complain(error: PgbgwError) -> None:
    _say(f"pgbgw: {error}")
    if error.detail:
        _say(f"DETAIL:  {error.detail}")
    if error.hint:
        _say(f"HINT:  {error.hint}")


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=2))


def _say(text: str) -> None:
    print(text, file=sys.stderr)


# --- commands ---------------------------------------------------------------------------------


def _run(options: argparse.Namespace) -> int:
    from pgbgw.supervisor import Supervisor

    if options.verbose:
        logging.getLogger("pgbgw").setLevel(logging.DEBUG)
    if not sys.flags.safe_path:  # modules in the working directory are found, as by python -m
        directory = os.getcwd()
        if directory not in sys.path[:1]:
            sys.path.insert(0, directory)
    names = ("address", "max_worker_processes", "max_parallel_workers", "start_method", "preload")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    try:
        if options.config is None:
            supervisor = Supervisor(**given)
        else:
            supervisor = Supervisor.from_toml(options.config, overrides=given)
        return supervisor._run()
    except PgbgwError as error:  # also what is wrong with the file: this usage was right
        _complain(error)
        return FAILED


def _check(options: argparse.Namespace) -> int:
    from pgbgw.supervisor import Supervisor

    workers, problems = 0, []
    try:
        supervisor = Supervisor.from_toml(options.file)
        workers, problems = supervisor.static_workers, supervisor.skipped
    except PgbgwError as error:
        problems = [": ".join(filter(None, (str(error), error.detail)))]
        problems[0] += f" ({error.hint})" if error.hint else ""
    if options.json:
        _print_json({"file": options.file, "workers": workers, "problems": problems})
    else:
        for problem in problems:
            _say(f"pgbgw: {problem}")
        if not problems:
            print(f"{options.file}: ok, {workers} static worker{'' if workers == 1 else 's'}")
    return USAGE if problems else 0


def _ps(options: argparse.Namespace) -> int:
    with attach(options.address) as client:
        workers = client.workers()
        shown = [
            (info, _show.figures(info))
            for info in workers
            if options.type is None or info.type == options.type
        ]
        if options.json:
            _print_json(
                _show.supervisor_json(client, workers)
                | {"workers": [_show.worker_json(*one) for one in shown]}
            )
        else:
            print("\n".join(_show.table(shown)))
    return 0


def _register(options: argparse.Namespace) -> int:
    arguments = options.arguments
    if options.json_args:
        arguments = [_json_argument(text) for text in arguments]
    flags = Flags.NONE
    for flag in options.flag:
        flags |= flag
    worker = BackgroundWorker(
        entry=options.entry,
        name=options.name,
        type=options.type,
        args=tuple(arguments),
        flags=flags | Flags.CLASS_PARALLEL if options.parallel else flags,
        start_time=options.start_time,
        restart_time=options.restart,
        stop_timeout=options.stop_timeout,
        env=dict(options.env),
    )
    with attach(options.address) as client:
        handle = client.register(worker)
        if options.wait:
            return _wait_for(handle, worker.name, options)
        if options.json:
            _print_json(_show.handle_json(handle, worker.name))
        else:
            print(_show.place(handle))
    return 0


def _wait(options: argparse.Namespace) -> int:
    with attach(options.address) as client:
        found = _matching(client, options.target)
        if len(found) > 1:
            places = ", ".join(_show.place(info) for info in found)
            _complain(
                PgbgwError(
                    f'"{options.target}" names {len(found)} workers',
                    hint=f"name one of them: {places}",
                )
            )
            return USAGE
        if not found:
            return _no_match(options.target)
        return _wait_for(client.handle(found[0]), found[0].name, options)


def _wait_for(handle: WorkerHandle, name: str, options: argparse.Namespace) -> int:
    """Wait until it is gone, say how it ended; the exit status."""
    outcome = handle.wait_until_gone(options.timeout)
    if options.json:
        _print_json(_show.handle_json(handle, name) | {"outcome": _show.outcome_json(outcome)})
    else:
        print(_log.clean(str(outcome)))
        if outcome.kind == "exited" and outcome.error:
            for line in outcome.error.splitlines():
                _say(_log.clean(line))
    return outcome.status


def _terminate(options: argparse.Namespace) -> int:
    return _for_each(options, lambda handle: handle.terminate(grace=options.grace))


def _cancel(options: argparse.Namespace) -> int:
    return _for_each(options, WorkerHandle.cancel)


def _for_each(options: argparse.Namespace, act: Callable[[WorkerHandle], None]) -> int:
    """Do something to all workers that match, and name them; NO_MATCH if a target has none."""
    status = 0
    with attach(options.address) as client:
        for target in options.targets:
            found = _matching(client, target)
            for info in found:
                act(client.handle(info))
                print(f"{_show.place(info)} {_log.clean(info.name)}")
            if not found:
                status = _no_match(target)
    return status


def _stop(options: argparse.Namespace) -> int:
    """As pg_ctl: find the supervisor by its lock and signal it.

    A new client would be turned away by one that shuts down already, or is full.
    """
    address = _runtime.resolve(options.address)
    supervisor = _supervisor_pidfd(address)
    try:
        signal.pidfd_send_signal(supervisor, STOP_SIGNALS[options.mode])
        if not select.select([supervisor], [], [], options.timeout)[0]:
            raise WaitTimeoutError(
                f'the supervisor at "{address}" did not stop in time',
                detail=f"{options.mode} shutdown, {options.timeout:g} seconds; it goes on",
                hint="a stronger mode overrides: `pgbgw stop -m immediate`",
            )
    except ProcessLookupError:
        pass  # it has just ended
    finally:
        os.close(supervisor)
    return 0


def _supervisor_pidfd(address: _runtime.Address) -> int:
    """A pidfd of the process that holds the address's lock; AttachError if there is none."""
    directory = _runtime.open_directory(address, create=False)
    try:
        while (pid := _runtime.supervisor_locked(address, directory)) is not None:
            if pid == 0:
                raise PgbgwError(
                    f'the supervisor at "{address}" cannot be signalled',
                    detail="it lives in another pid namespace",
                )
            try:
                pidfd = os.pidfd_open(pid)
            except ProcessLookupError:
                continue
            # It held the lock before and after, so the pid has been its own all the time.
            if _runtime.supervisor_locked(address, directory) == pid:
                return pidfd
            os.close(pidfd)
    finally:
        os.close(directory)
    raise AttachError(
        f'no supervisor is running at "{address}"',
        hint="start one with `pgbgw run`, or check the address",
    )


def _bench(options: argparse.Namespace) -> int:
    from pgbgw import _bench

    unknown = sorted(set(options.names) - _bench.QUESTIONS.keys())
    if unknown:
        raise ConfigurationError(
            f"there is no benchmark {unknown[0]!r}", hint=f"one of {', '.join(_bench.QUESTIONS)}"
        )
    lines = []
    for name in options.names or _bench.QUESTIONS:
        if not options.json:
            _say(f"pgbgw: measuring {name}")
        lines += _bench.measure(_bench.QUESTIONS[name], options.quick)
    if options.json:
        _print_json({"figures": lines})
    else:
        print("\n".join(_bench.table(lines)))
    return 0


# --- which workers ----------------------------------------------------------------------------


def _matching(client: Client, target: str) -> list[WorkerInfo]:
    """The workers that NAME, PID, SLOT/GEN or type:T means; what looks like a number may be a
    name as well, if it is nothing else."""
    workers = client.workers()
    found: list[WorkerInfo] = []
    if target.startswith("type:"):
        found = [info for info in workers if info.type == target.removeprefix("type:")]
    elif re.fullmatch(r"[0-9]+/[0-9]+", target):
        found = [info for info in workers if _show.place(info) == target]
    elif re.fullmatch(r"[0-9]{1,10}", target):
        found = [info for info in workers if info.pid == int(target)]
    return found or [info for info in workers if info.name == target]


def _no_match(target: str) -> int:
    _say(f'pgbgw: no worker matches "{target}"')
    return NO_MATCH


# --- usage ------------------------------------------------------------------------------------


class _CommandParser(argparse.ArgumentParser):
    """Lets options stand between positional arguments: register ENTRY --wait ARG."""

    _inner = False

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        if self._inner:  # the intermixed parsing is made of several of the other kind
            return super().parse_known_args(args, namespace)
        self._inner = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._inner = False


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pgbgw",
        description="PostgreSQL's background workers for Python.",
        epilog="exit status: 0 done, 1 failed, 2 wrong usage, 3 no supervisor, 4 no slot or limit "
        "reached, 5 nothing matched, 6 timed out",
    )
    parser.add_argument("-V", "--version", action="version", version=f"pgbgw {__version__}")
    commands = parser.add_subparsers(
        required=True, metavar="COMMAND", title="commands", parser_class=_CommandParser
    )
    to_json = _CommandParser(add_help=False)
    to_json.add_argument("--json", action="store_true", help="write JSON")
    client = _CommandParser(add_help=False)
    client.add_argument(
        "-a",
        "--address",
        type=_address,
        help='name or path of the supervisor\'s socket (default: $PGBGW_ADDRESS, else "default")',
    )

    def command(
        name: str,
        run: Callable[[argparse.Namespace], int],
        *parents: _CommandParser,
        help: str,
        description: str = "",
    ) -> argparse.ArgumentParser:
        description = description or f"{help.capitalize()}."
        found = commands.add_parser(name, parents=parents, help=help, description=description)
        found.set_defaults(run=run)
        return found

    c = command("run", _run, help="be a supervisor in the foreground, until ^C")
    c.add_argument("-c", "--config", metavar="FILE", help="TOML file with settings and workers")
    c.add_argument(
        "--name", "-a", "--address", dest="address", type=_address, help='default: "default"'
    )
    c.add_argument(
        "--max-worker-processes", metavar="N", type=_between(1, MAX_WORKER_PROCESSES_LIMIT)
    )
    c.add_argument(
        "--max-parallel-workers", metavar="N", type=_between(0, MAX_PARALLEL_WORKER_LIMIT)
    )
    c.add_argument("--start-method", choices=("fork", "spawn"))
    c.add_argument("--preload", metavar="MODULE", action="append", help="may be repeated")
    c.add_argument("-v", "--verbose", action="store_true", help="log at debug level")

    c = command("check", _check, to_json, help="validate a TOML file")
    c.add_argument("file", metavar="FILE")

    c = command("ps", _ps, client, to_json, help="list the workers")
    c.add_argument("--type", help="only workers of this type")

    c = command(
        "register",
        _register,
        client,
        to_json,
        help="start a dynamic worker",
        description="Start a dynamic worker; print its slot and generation, or with --wait how it "
        "ended.",
    )
    c.add_argument("entry", metavar="ENTRY", help="package.module:function")
    c.add_argument("arguments", metavar="ARG", nargs="*", help="strings that it is called with")
    c.add_argument("--json-args", action="store_true", help="each ARG is a JSON value")
    c.add_argument("--name", default="", help="default: ENTRY")
    c.add_argument("--type", default="", help="default: the name")
    c.add_argument(
        "--restart",
        metavar="DURATION",
        type=_duration,
        help='restart it so long after a failure: "5s", "never" (the default)',
    )
    c.add_argument("--parallel", action="store_true", help="count it against max_parallel_workers")
    c.add_argument(
        "--flag",
        metavar="FLAG",
        action="append",
        default=[],
        type=_word(Flags),
        help="shmem-access, database-connection or class-parallel; may be repeated",
    )
    c.add_argument(
        "--start-time",
        metavar="TIME",
        default=StartTime.RECOVERY_FINISHED,
        type=_word(StartTime),
        help="supervisor-start, consistent-state or recovery-finished (the default)",
    )
    c.add_argument(
        "--stop-timeout",
        metavar="DURATION",
        type=_duration,
        help='SIGKILL so long after SIGTERM: "5s", "never" (the default)',
    )
    c.add_argument("--env", metavar="NAME=VALUE", action="append", default=[], type=_assignment)
    c.add_argument("--wait", action="store_true", help="wait until it is gone; exit as it did")
    c.add_argument("-t", "--timeout", metavar="SECONDS", type=_seconds, help="of --wait")

    targets = "NAME, PID, SLOT/GEN or type:TYPE"
    c = command("terminate", _terminate, client, help="stop workers for good")
    c.add_argument("targets", metavar="TARGET", nargs="+", help=targets)
    c.add_argument(
        "--grace", metavar="SECONDS", type=_seconds, help="SIGKILL so long after SIGTERM"
    )
    c = command("cancel", _cancel, client, help="cancel the statements that workers execute")
    c.add_argument("targets", metavar="TARGET", nargs="+", help=targets)

    c = command(
        "wait",
        _wait,
        client,
        to_json,
        help="wait until a worker is gone",
        description="Wait until a worker will never run again; say how it ended and exit as it "
        "did, with 128 + n for signal n.",
    )
    c.add_argument("target", metavar="NAME", help=f"{targets}: one worker")
    c.add_argument("-t", "--timeout", metavar="SECONDS", type=_seconds)

    c = command(
        "stop",
        _stop,
        client,
        help="stop the supervisor",
        description="Stop the supervisor and wait until it is gone.  smart: serve until the last "
        "client has gone, then as fast; fast: SIGTERM to all workers; immediate: SIGQUIT.  A "
        "stronger mode overrides.",
    )
    c.add_argument("-m", "--mode", choices=tuple(STOP_SIGNALS), default="fast")
    c.add_argument(
        "-t",
        "--timeout",
        metavar="SECONDS",
        type=_seconds,
        default=STOP_TIMEOUT,
        help="default: %(default)g",
    )

    c = command(
        "bench",
        _bench,
        to_json,
        help="measure this machine",
        description="Measure what pgbgw's calls, workers and supervisor cost on this machine, with "
        "supervisors of its own: a minute or two, in quiet surroundings.",
    )
    c.add_argument("names", metavar="NAME", nargs="*", help="what to measure (default: all)")
    c.add_argument("--quick", action="store_true", help="less often: some seconds")
    return parser


# What an option's text may be.  argparse makes wrong usage of what these raise.


def _typed(parse: Callable[[object], T]) -> Callable[[str], T]:
    def convert(text: str) -> T:
        try:
            return parse(text)
        except PgbgwError as error:
            raise argparse.ArgumentTypeError(
                "; ".join(filter(None, (str(error), error.detail, error.hint)))
            ) from None

    return convert


def _duration(text: str) -> float | None:
    from pgbgw.config import parse_duration

    return _typed(parse_duration)(text)


def _address(text: str) -> str:
    return _typed(lambda value: _runtime.resolve(str(value)).path)(text)


def _between(least: int, most: int) -> Callable[[str], int]:
    def convert(text: str) -> int:
        digits = text.isascii() and text.isdigit() and len(text) < 20
        if not digits or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not between {least} and {most}")
        return int(text)

    return convert


def _seconds(text: str) -> float:
    seconds = float(text) if re.fullmatch(r"[0-9.]+", text) else -1.0
    if not (isfinite(seconds) and seconds >= 0):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds")
    return seconds


def _word(members: Iterable[E]) -> Callable[[str], E]:
    words = {_show.words(member): member for member in members}

    def convert(text: str) -> E:
        if text not in words:
            raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(words)}")
        return words[text]

    return convert


def _assignment(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def _json_argument(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ConfigurationError(f"{text!r} is no JSON", detail=str(error)) from None
