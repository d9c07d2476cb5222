"""The command line, as a user has it: real processes, their output and their exit status."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pgbgw import AttachError, WorkerInfo, _show, attach, cli
from support import poll_until
from support.supervisors import lines, supervisor

TESTS = str(Path(__file__).parent.parent)
HANG = 60.0


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pgbgw", *arguments]


def environment(**changes: str) -> dict[str, str]:
    """Ours, with the tests importable: workers come from support.workers."""
    path = [TESTS, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    path = [os.path.abspath(directory) for directory in path if directory]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), **changes}


def pgbgw(*arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """Run one command to its end."""
    return subprocess.run(
        command(*arguments),
        env=environment(**changes),
        capture_output=True,
        text=True,
        timeout=HANG,
    )


def status_of(*arguments: str, **changes: str) -> int:
    return pgbgw(*arguments, **changes).returncode


def said(*arguments: str) -> str:
    """What a command that succeeds has to say."""
    done = pgbgw(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.rstrip("\n")


class Foreground:
    """A `pgbgw run` in the background of a test, and its log."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process = process
        self._log = log

    def log(self) -> str:
        return self._log.read_text()

    def ended(self) -> int:
        return self.process.wait(HANG)


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Any]:
    """`with run(options...) as foreground:`, from when `ps` works until it is stopped."""

    @contextmanager
    def running(
        *arguments: str,
        address: str = "default",
        program: list[str] | None = None,
        directory: Path | None = None,
        **changes: str,
    ) -> Iterator[Foreground]:
        log = tmp_path / "log"
        with log.open("wb") as stderr:
            process = subprocess.Popen(
                [*(program or command()), "run", *arguments],
                cwd=directory,
                env=environment(**changes),
                stdin=subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,
            )
        try:
            poll_until(lambda: accepts(address) or process.poll() is not None)
            assert process.poll() is None, log.read_text()
            yield Foreground(process, log)
            process.send_signal(signal.SIGINT)
            assert process.wait(HANG) in (0, -signal.SIGKILL)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGQUIT)
                process.wait(HANG)

    return running


@pytest.fixture
def toml(tmp_path: Path) -> Callable[[str], str]:
    def write(text: str) -> str:
        file = tmp_path / "pgbgw.toml"
        file.write_text(text)
        return str(file)

    return write


def accepts(address: str = "default") -> bool:
    """Does a supervisor take clients there?"""
    try:
        attach(address).close()
    except AttachError:
        return False
    return True


def workers() -> dict[str, WorkerInfo]:
    """The workers by name; seen without the command line, which takes its time."""
    with attach() as client:
        return {info.name: info for info in client.workers()}


def ready(*names: str) -> bool:
    """Are these the workers, and all of them ready?"""
    with attach() as client:
        found = client.workers()
    return sorted(info.name for info in found) == sorted(names) and all(i.ready for i in found)


def start(entry: str = "sleep_until_stopped", **fields: Any) -> None:
    """Register a worker, which does not go over the command line either."""
    with attach() as client:
        client.register(f"support.workers:{entry}", **fields)


def place(info: WorkerInfo) -> str:
    return f"{info.slot}/{info.generation}"


@contextmanager
def waiting(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A command that waits for a worker, from when it does so."""
    with subprocess.Popen(
        command(*arguments),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:

        def waits() -> bool:
            # Once it has the supervisor's pidfd it is attached, and only then falls asleep again.
            try:
                links = [os.readlink(link) for link in Path(f"/proc/{process.pid}/fd").iterdir()]
            except FileNotFoundError:  # closed while we looked
                return False
            stat = Path(f"/proc/{process.pid}/stat").read_text()
            return "anon_inode:[pidfd]" in links and stat.rpartition(")")[2].split()[0] == "S"

        try:
            poll_until(waits)
            yield process
        finally:
            process.kill()


# --- run --------------------------------------------------------------------------------------


def test_run_serves_in_the_foreground_until_stop_and_exits_with_0(run: Any) -> None:
    with run() as foreground:
        assert said("ps").split()[:2] == ["SLOT/GEN", "PID"]
        assert said("stop") == ""
        assert foreground.ended() == 0
        assert "supervisor ready to accept connections" in foreground.log()
        assert "received fast shutdown request" in foreground.log()
        assert status_of("ps") == 3


def test_run_stops_fast_when_the_terminal_sends_ctrl_c(run: Any) -> None:
    with run() as foreground:
        start()
        os.killpg(foreground.process.pid, signal.SIGINT)
        assert foreground.ended() == 0
        assert "received fast shutdown request" in foreground.log()
        assert "Traceback" not in foreground.log()


def test_run_takes_its_name_and_sizes_from_options_before_the_file(run: Any, toml: Any) -> None:
    file = toml('[supervisor]\naddress = "other"\nmax_worker_processes = 3\n')
    options = ("-c", file, "--name", "mine", "--max-worker-processes", "5", "-v")
    with run(*options, address="mine") as foreground:
        found = json.loads(said("ps", "--json", "--address", "mine"))
        assert found["max_worker_processes"] == 5
        assert found["max_parallel_workers"] == 8
        assert found["address"].endswith("/mine.sock")
        by_environment = pgbgw("ps", "--json", PGBGW_ADDRESS="mine")
        assert json.loads(by_environment.stdout)["epoch"] == found["epoch"]
        assert status_of("ps", "-a", "other") == 3
        assert "DEBUG1:" in foreground.log()


def test_run_exits_with_1_if_it_cannot_start(run: Any, toml: Any) -> None:
    with run():
        second = pgbgw("run")
        assert second.returncode == 1
        assert "pgbgw: another supervisor is running" in second.stderr
        assert "HINT:" in second.stderr
    broken = pgbgw("run", "-c", toml("[supervisor]\nmax_workers = 3\n"))
    assert broken.returncode == 1
    assert 'unknown key "max_workers"' in broken.stderr
    assert 'HINT:  did you mean "max_worker_processes"?' in broken.stderr
    assert status_of("run", "-c", "/nonexistent.toml") == 1
    assert status_of("run", "--preload", "no.such.module") == 1


def test_run_finds_modules_in_the_working_directory_unless_the_path_is_to_be_safe(
    run: Any, tmp_path: Path
) -> None:
    (tmp_path / "local_jobs.py").write_text("def job():\n    pass\n")
    # python -m has put the directory first already; the script `pgbgw` is found somewhere else.
    script = tmp_path / "bin" / "pgbgw"
    script.parent.mkdir()
    script.write_text("import sys\nfrom pgbgw.cli import main\nsys.exit(main())\n")
    start = {"program": [sys.executable, str(script)], "directory": tmp_path}
    with run(**start):
        assert status_of("register", "local_jobs:job", "--wait") == 0
    with run(PYTHONSAFEPATH="1", **start):
        assert status_of("register", "local_jobs:job", "--wait") == 1
    with run("--preload", "local_jobs", **start):
        assert status_of("register", "local_jobs:job", "--wait") == 0


def test_run_tells_systemd_and_nobody_else_does(run: Any, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        address = f"@pgbgw-{os.getpid()}-{tmp_path.name}"
        systemd.bind("\0" + address[1:])
        systemd.settimeout(HANG)
        with run(NOTIFY_SOCKET=address) as foreground:
            ready = systemd.recv(4096).decode().split("\n")
            assert ready[0] == "READY=1"
            assert ready[1].startswith("STATUS=accepting connections at ")
            seen = tmp_path / "environ"
            said("register", "support.cli_workers:environ_to", str(seen), "--wait")
            assert "NOTIFY_SOCKET" not in json.loads(seen.read_text())
            with attach():  # so that a smart shutdown has somebody to wait for
                assert status_of("stop", "-m", "smart", "-t", "0") == 6
                assert systemd.recv(4096) == b"STATUS=smart shutdown"
                assert status_of("stop") == 0
            assert systemd.recv(4096) == b"STOPPING=1\nSTATUS=fast shutdown"
            assert foreground.ended() == 0


# --- static workers ---------------------------------------------------------------------------


def test_A11_an_invalid_static_worker_of_the_file_is_logged_and_skipped_and_the_others_run(
    run: Any, toml: Any
) -> None:
    file = toml(
        """
        [[worker]]
        name = "first"
        entry = "support.workers:sleep_until_stopped"
        [[worker]]
        name = "broken"
        entry = "support.workers:sleep_until_stopped"
        flags = ["database-connection"]
        [[worker]]
        name = "shard-{i}"
        count = 2
        entry = "support.workers:sleep_until_stopped"
        restart_time = "5s"
        """
    )
    with run("-c", file) as foreground:
        poll_until(lambda: ready("first", "shard-0", "shard-1"))
        assert '[[worker]] 2 "broken"' in foreground.log()
        # It takes no part in what can be done with the rest.
        assert status_of("register", "support.workers:noop", "--wait") == 0


def test_A12_a_static_worker_of_the_file_that_asks_for_notification_is_logged_and_skipped(
    run: Any, toml: Any
) -> None:
    file = toml(
        """
        [[worker]]
        name = "told"
        entry = "support.workers:sleep_until_stopped"
        notify = true
        [[worker]]
        name = "other"
        entry = "support.workers:sleep_until_stopped"
        """
    )
    with run("-c", file) as foreground:
        poll_until(lambda: ready("other"))
        assert "only dynamic background workers can request notification" in foreground.log()


def test_A14_of_too_many_static_workers_the_first_run_and_invalid_ones_do_not_count(
    run: Any, toml: Any
) -> None:
    entry = 'entry = "support.workers:sleep_until_stopped"'
    file = toml(
        f"""
        [supervisor]
        max_worker_processes = 3
        [[worker]]
        name = "a"
        {entry}
        [[worker]]
        name = "invalid"
        {entry}
        notify = true
        [[worker]]
        name = "b"
        {entry}
        [[worker]]
        name = "c-{{i}}"
        count = 3
        {entry}
        """
    )
    with run("-c", file) as foreground:
        poll_until(lambda: ready("a", "b", "c-0"))
        log = foreground.log()
        for name in ("c-1", "c-2"):
            assert f'background worker "{name}": too many background workers' in log
        assert "up to 3 background workers can be registered" in log
        assert "Consider increasing max_worker_processes" in log
        assert status_of("register", "support.workers:noop") == 4


# --- check ------------------------------------------------------------------------------------


def test_check_accepts_what_run_would_run(toml: Any) -> None:
    file = toml('[[worker]]\nname = "w-{i}"\ncount = 2\nentry = "no.such:function"\n')
    assert said("check", file) == f"{file}: ok, 2 static workers"
    found = json.loads(said("check", "--json", file))
    assert found == {"file": file, "workers": 2, "problems": []}
    assert status_of("check", "/nonexistent.toml") == 2


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[supervisor", "not valid TOML"),
        ("[supervisor]\nspares = -3\n", "spares: -3 is not between"),
        ('[[worker]]\nentry = "m:f"\nrestart = "5s"\n', 'did you mean "restart_time"?'),
        ('[[worker]]\nentry = "m"\n', "is not the name of a function"),
        (
            '[supervisor]\nmax_worker_processes = 1\n[[worker]]\ncount = 2\nentry = "m:f"\n',
            "too many background workers",
        ),
    ],
)
def test_check_exits_with_2_and_says_what_is_wrong(
    toml: Any, capsys: pytest.CaptureFixture[str], text: str, problem: str
) -> None:
    file = toml(text)
    assert cli.main(["check", file]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("pgbgw: ")) == ("", 1)
    assert problem in err
    assert cli.main(["check", "--json", file]) == 2
    assert problem in "".join(json.loads(capsys.readouterr().out)["problems"])


# --- register and wait ------------------------------------------------------------------------


def test_register_starts_a_worker_with_strings_or_json_and_prints_its_place(
    run: Any, tmp_path: Path
) -> None:
    file = tmp_path / "arguments"
    with run():
        worker = "support.cli_workers:arguments_to"
        place = said("register", worker, str(file), "1", "--name", "n", "--type", "t", "two")
        assert place.count("/") == 1
        poll_until(lambda: lines(file) == ['["1", "two"]'])
        poll_until(lambda: not workers())
        found = json.loads(said("register", "--json", worker, str(file), "--", "--wait"))
        assert set(found) == {"slot", "generation", "epoch", "name"}
        assert found["name"] == worker
        poll_until(lambda: len(lines(file)) == 2)
        assert lines(file)[1] == '["--wait"]'
        said("register", "--json-args", worker, json.dumps(str(file)), "1", "[null]", "--wait")
        assert lines(file)[2] == "[1, [null]]"
        assert status_of("register", "--json-args", worker, "{") == 2


@pytest.mark.parametrize("json_too", [False, True])
def test_register_with_wait_tells_how_it_ended_and_exits_as_the_worker_did(
    run: Any, json_too: bool
) -> None:
    with run():
        for entry, argument, status, words in (
            ("noop", None, 0, "exited with code 0"),
            ("exit_with", 7, 7, "exited with code 7"),
            ("kill_self", int(signal.SIGKILL), 137, "killed by SIGKILL"),
            ("fail", "kaput", 1, "exited with code 1"),
        ):
            given = [] if argument is None else [json.dumps(argument)]
            options = ["--json-args", "--wait", *(["--json"] if json_too else [])]
            done = pgbgw("register", f"support.workers:{entry}", *options, *given)
            assert done.returncode == status, done.stderr
            if json_too:
                outcome = json.loads(done.stdout)["outcome"]
                assert (outcome["text"], outcome["status"]) == (words, status)
                assert outcome["final"]
                assert ("kaput" in (outcome["error"] or "")) == (entry == "fail")
            else:
                assert done.stdout == f"{words}\n"
                assert ("ValueError: kaput" in done.stderr) == (entry == "fail")


def test_register_exits_with_4_without_a_slot_or_beyond_the_parallel_limit(run: Any) -> None:
    sleeper = "support.workers:sleep_until_stopped"
    with run("--max-worker-processes", "2", "--max-parallel-workers", "1"):
        said("register", sleeper, "--parallel")
        limit = pgbgw("register", sleeper, "--parallel")
        assert limit.returncode == 4
        assert limit.stderr.startswith("pgbgw: ")
        assert "\nDETAIL:  " in limit.stderr
        assert "\nHINT:  " in limit.stderr
        said("register", sleeper, "--flag", "shmem-access", "--restart", "1h")
        full = pgbgw("register", sleeper)
        assert full.returncode == 4
        assert "no free slot" in full.stderr
        usage = json.loads(said("ps", "--json"))
        assert (usage["used_worker_processes"], usage["used_parallel_workers"]) == (2, 1)
        kinds = sorted((one["flags"], one["restart_time"]) for one in usage["workers"])
        assert kinds == [(["class-parallel"], None), (["shmem-access"], 3600.0)]


def test_register_of_what_can_never_run_exits_with_2_and_of_what_is_not_allowed_with_1(
    run: Any, toml: Any
) -> None:
    with run("-c", toml('[supervisor]\nallow = ["support.*"]\n')):
        assert status_of("register", "nonsense") == 2
        assert status_of("register", "support.workers:noop", "--name", "n" * 96) == 2
        assert status_of("register", "support.workers:noop", "x" * 2000) == 2
        assert status_of("register", "support.workers:noop", "--parallel", "--restart", "1") == 2
        refused = pgbgw("register", "os:getcwd")
        assert refused.returncode == 1
        assert "is not allowed" in refused.stderr


def test_wait_ends_with_the_worker_and_exits_as_it_did(run: Any) -> None:
    with run():
        start(name="one")
        late = pgbgw("wait", "one", "-t", "0")
        assert late.returncode == 6
        assert "did not end in time" in late.stderr
        with waiting("wait", "one") as in_words, waiting("wait", "one", "--json") as in_json:
            poll_until(lambda: ready("one"))
            pid = workers()["one"].pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            assert in_words.communicate(timeout=HANG) == ("killed by SIGKILL\n", "")
            outcome = json.loads(in_json.communicate(timeout=HANG)[0])["outcome"]
            assert outcome["signal"] == signal.SIGKILL
            assert (in_words.returncode, in_json.returncode) == (137, 137)
        assert status_of("wait", "one") == 5


def test_wait_refuses_a_name_that_several_workers_have(run: Any) -> None:
    with run():
        start(name="twin")
        start(name="twin")
        poll_until(lambda: ready("twin", "twin"))
        with attach() as client:
            places = [place(info) for info in client.workers()]
        ambiguous = pgbgw("wait", "twin")
        assert ambiguous.returncode == 2
        assert f"HINT:  name one of them: {', '.join(places)}" in ambiguous.stderr


# --- terminate and cancel ---------------------------------------------------------------------


def test_terminate_takes_a_name_a_pid_a_place_or_a_type(run: Any) -> None:
    with run():
        names = {"a": "t", "b": "t", "c": "u", "d": "u", "0": "v", "e": "v"}
        for name, type in names.items():
            start(name=name, type=type)
        poll_until(lambda: ready(*names))
        c, d, e = (workers()[name] for name in "cde")
        assert said("terminate", "c") == f"{place(c)} c"
        assert said("terminate", str(d.pid)) == f"{place(d)} d"
        assert said("terminate", place(e)) == f"{place(e)} e"
        assert said("terminate", "0").endswith(" 0")  # no pid, so a name
        poll_until(lambda: ready("a", "b"))
        assert said("terminate", "type:t").count("\n") == 1  # two lines
        poll_until(lambda: not workers())


def test_terminate_exits_with_5_if_nothing_matches_and_does_what_it_can(run: Any) -> None:
    with run():
        start(name="one")
        poll_until(lambda: ready("one"))
        one = workers()["one"]
        targets = ("nobody", "type:none", "7/0")
        done = pgbgw("terminate", *targets, "--grace", "60", "one")
        assert (done.returncode, done.stdout) == (5, f"{place(one)} one\n")
        for target in targets:
            assert f'pgbgw: no worker matches "{target}"' in done.stderr
        poll_until(lambda: not workers())
        assert status_of("terminate", str(one.pid)) == 5
        assert status_of("cancel", "nobody") == 5


def test_terminate_with_grace_kills_what_takes_no_notice(run: Any) -> None:
    with run():
        start("ignore_sigterm", name="deaf")
        poll_until(lambda: ready("deaf"))
        with waiting("wait", "deaf") as waiter:
            assert said("terminate", "deaf", "--grace", "0.01").endswith(" deaf")
            assert waiter.communicate(timeout=HANG) == ("killed by SIGKILL\n", "")
            assert waiter.returncode == 137


def test_cancel_interrupts_only_workers_with_a_database_connection(run: Any) -> None:
    with run():
        start(name="one")
        poll_until(lambda: ready("one"))
        before = workers()["one"]
        assert said("cancel", "one") == f"{place(before)} one"
        # SIGINT was sent before this, and would have ended a process that does not ignore it.
        assert status_of("register", "support.workers:noop", "--wait") == 0
        assert workers()["one"] == before


# --- ps ---------------------------------------------------------------------------------------


def test_ps_shows_every_worker_with_its_figures(run: Any) -> None:
    with run():
        said("register", "support.cli_workers:busy_with", "café\x1b[31m", "--name", "busy")
        arguments = ("--json-args", "3", "--name", "again", "--type", "u", "--restart", "1h")
        said("register", "support.workers:exit_with", *arguments)
        poll_until(lambda: workers()["busy"].ready and workers()["again"].outcome)
        whole = json.loads(said("ps", "--json"))
        assert whole["phase"] == "running"
        assert whole["epoch"] > 0
        assert whole["supervisor_pid"] > 0
        assert (whole["used_worker_processes"], whole["used_parallel_workers"]) == (2, 0)
        loop = whole["loop"]
        assert loop["passes"] > 0
        assert 0 < loop["p99_pause"] <= loop["longest_pause"] < 60
        by_name = {worker["name"]: worker for worker in whole["workers"]}
        busy, again = by_name["busy"], by_name["again"]
        assert (busy["state"], busy["ready"], busy["outcome"]) == ("started", True, None)
        assert busy["pid"] == workers()["busy"].pid
        assert busy["rss"] > 1 << 20
        assert busy["cpu_seconds"] >= 0
        assert busy["uptime"] >= 0
        assert (again["pid"], again["rss"], again["state"]) == (None, None, "stopped")
        assert (again["outcome"]["exitcode"], again["outcome"]["final"]) == (3, False)

        head, *rows = said("ps").split("\n")
        columns = "SLOT/GEN PID TYPE NAME STATE RESTARTS CPU RSS UPTIME ACTIVITY LAST OUTCOME"
        assert " ".join(head.split()) == columns
        [row] = [row for row in rows if "busy" in row]
        assert row.split()[1:6] == [str(busy["pid"]), "busy", "busy", "started", "0"]
        assert row.split()[6].endswith("%")
        assert row.split()[7].endswith("M")
        assert "café?[31m" in row  # what is no letter does not get to the terminal
        _, row = said("ps", "--type", "u").split("\n")
        slot = f"{again['slot']}/{again['generation']}"
        assert row.split() == f"{slot} - u again stopped 0 - - - - exited with code 3".split()


def test_ps_takes_no_notice_of_a_worker_that_vanishes_meanwhile() -> None:
    with supervisor() as client:
        handle = client.register("support.workers:sleep_until_stopped", name="ghost")
        handle.wait_for_ready(HANG)
        info = handle.info()
        handle.terminate()
        handle.wait_until_gone(HANG)
        assert _show.figures(info) is None
        assert list(_show.table([(info, None)]))[1].split()[3] == "ghost"
        assert _show.worker_json(dataclasses.replace(info, pid=None), None)["uptime"] is None


def test_a_reader_that_goes_away_is_no_error(run: Any) -> None:
    with run():
        for arguments in (["ps"], ["ps", "--json"]):
            reader, writer = os.pipe()
            os.close(reader)
            with open(writer, "wb") as pipe:
                done = subprocess.run(
                    command(*arguments),
                    env=environment(),
                    stdout=pipe,
                    stderr=subprocess.PIPE,
                    timeout=HANG,
                )
            assert done.returncode == 128 + signal.SIGPIPE
            assert done.stderr == b""


# --- stop -------------------------------------------------------------------------------------


def test_stop_times_out_with_6_and_a_stronger_mode_overrides(run: Any) -> None:
    with run() as foreground:
        start("ignore_sigterm", name="deaf")
        poll_until(lambda: ready("deaf"))
        late = pgbgw("stop", "-t", "0.1")
        assert late.returncode == 6
        assert "did not stop in time" in late.stderr
        assert "HINT:  a stronger mode overrides" in late.stderr
        assert said("stop", "-m", "immediate") == ""
        assert foreground.ended() == 0


def test_stop_overrides_a_smart_shutdown_that_turns_new_clients_away(run: Any) -> None:
    with run() as foreground, attach():
        assert status_of("stop", "-m", "smart", "-t", "0") == 6
        poll_until(lambda: "received smart shutdown request" in foreground.log())
        assert status_of("ps") == 3
        assert status_of("stop", "-m", "fast") == 0
        assert foreground.ended() == 0


# --- exit status ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["ps"],
        ["ps", "--json"],
        ["register", "support.workers:noop"],
        ["terminate", "x"],
        ["cancel", "x"],
        ["wait", "x"],
        ["stop"],
        ["stop", "-a", "/nonexistent/x"],
    ],
    ids=" ".join,
)
def test_without_a_supervisor_the_exit_status_is_3(arguments: list[str]) -> None:
    done = pgbgw(*arguments)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith("pgbgw: no supervisor is running at ")
    assert "HINT:" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["ps", "--bogus"],
        ["ps", "extra"],
        ["register"],
        ["register", "m:f", "--restart", "soon"],
        ["register", "m:f", "--env", "X"],
        ["register", "m:f", "--flag", "none"],
        ["register", "m:f", "--start-time", "noon"],
        ["terminate"],
        ["terminate", "x", "--grace", "-1"],
        ["wait"],
        ["wait", "a", "b"],
        ["stop", "-m", "gentle"],
        ["stop", "-t", "nan"],
        ["stop", "-a", ".."],
        ["check"],
        ["run", "extra"],
        ["run", "--max-worker-processes", "0"],
        ["run", "--max-worker-processes", "262144"],
        ["run", "--max-parallel-workers", "1025"],
        ["run", "--start-method", "forkserver"],
        ["run", "--name", "x\ny"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(arguments)
    assert exit.value.code == 2
    assert capsys.readouterr().err.startswith("usage: pgbgw")


def test_wrong_usage_is_2_for_a_real_process_too() -> None:
    assert status_of("ps", "--bogus") == 2
    assert status_of("ps", PGBGW_ADDRESS="..") == 2
    assert pgbgw("--version").stdout.startswith("pgbgw ")


@pytest.mark.leaves_sockets
def test_a_supervisor_that_dies_while_a_command_waits_for_a_worker_is_3(run: Any) -> None:
    with run() as foreground:
        start(name="one")
        with waiting("wait", "one") as waiter:
            foreground.process.kill()
            foreground.ended()
            assert waiter.communicate(timeout=HANG)[1].startswith("pgbgw: the supervisor at ")
            assert waiter.returncode == 3
