"""TOML files: what they may say, and how an error names the place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgbgw.config import load, parse_duration, parse_size
from pgbgw.errors import ConfigurationError
from pgbgw.worker import BackgroundWorker, Flags, StartTime

Loader = Callable[[str], tuple[dict[str, Any], list[tuple[BackgroundWorker | None, str]]]]

EXAMPLE = """
[supervisor]
max_worker_processes = 64
max_parallel_workers = 16
address = "main"                 # a name in the runtime directory, or a path
shared_memory = "1MiB"
preload = ["numpy", "mylib"]
spares = 4
allow = ["mylib.*", "pgbgw.*"]   # entry points that clients may ask for; left out: any
[[worker]]
name = "shard-{i}"
count = 4
entry = "mylib.jobs:shard"
kwargs = { shard = "{i}" }
start_time = "recovery-finished" # supervisor-start | consistent-state
restart_time = "5s"              # a duration, a number of seconds, or "never"
flags = ["shmem-access"]
env = { OMP_NUM_THREADS = "1" }
"""


@pytest.fixture
def loaded(tmp_path: Path) -> Loader:
    """What a file with the given text means; it is called pgbgw.toml."""

    def load_text(text: str) -> Any:
        file = tmp_path / "pgbgw.toml"
        file.write_text(text, encoding="utf-8")
        return load(file)

    return load_text


@pytest.fixture
def one(loaded: Loader) -> Callable[[str], BackgroundWorker]:
    """The one worker, which can run, of a file with these lines in its [[worker]] table."""

    def load_worker(lines: str) -> BackgroundWorker:
        arguments, [(worker, problem)] = loaded(f'[[worker]]\nentry = "m:f"\n{lines}')
        assert (arguments, problem) == ({}, "")
        assert worker is not None
        return worker

    return load_worker


def test_the_documented_example_means_what_it_says(loaded: Loader) -> None:
    arguments, workers = loaded(EXAMPLE)
    assert arguments == {
        "max_worker_processes": 64,
        "max_parallel_workers": 16,
        "address": "main",
        "shared_memory": 1 << 20,
        "preload": ("numpy", "mylib"),
        "spares": 4,
        "allow": ("mylib.*", "pgbgw.*"),
    }
    assert workers == [
        (
            BackgroundWorker(
                entry="mylib.jobs:shard",
                name=f"shard-{i}",
                kwargs={"shard": str(i)},
                flags=Flags.SHMEM_ACCESS,
                start_time=StartTime.RECOVERY_FINISHED,
                restart_time=5.0,
                env={"OMP_NUM_THREADS": "1"},
            ),
            "",
        )
        for i in range(4)
    ]


def test_an_empty_file_asks_for_nothing(loaded: Loader) -> None:
    assert loaded("") == ({}, [])
    assert loaded("[supervisor]\n") == ({}, [])


def test_every_argument_of_the_supervisor_can_be_given(loaded: Loader) -> None:
    arguments, _ = loaded(
        "[supervisor]\n"
        'startup = "m:f"\nstart_method = "spawn"\nrestart_after_crash = false\n'
        'post_auth_delay = "250ms"\nshared_memory = 4096\nallow = []\n'
        'cgroup = "/sys/fs/cgroup/mine"\n'
    )
    assert arguments == {
        "startup": "m:f",
        "start_method": "spawn",
        "restart_after_crash": False,
        "post_auth_delay": 0.25,
        "cgroup": "/sys/fs/cgroup/mine",
        "shared_memory": 4096,
        "allow": (),
    }


def test_every_field_of_a_worker_can_be_given(one: Callable[[str], BackgroundWorker]) -> None:
    worker = one(
        'name = "n"\ntype = "t"\nargs = [1, "a", [2.5, true]]\nkwargs = { a = { b = [1] } }\n'
        'main_arg = 7\nextra = "aé\\u0000"\nflags = ["shmem-access", "database-connection"]\n'
        'start_time = "consistent-state"\nrestart_time = "never"\nnotify = false\n'
        'stop_timeout = "1.5s"\n[worker.env]\nA = "b"\n'
    )
    assert worker == BackgroundWorker(
        entry="m:f",
        name="n",
        type="t",
        args=(1, "a", [2.5, True]),
        kwargs={"a": {"b": [1]}},
        main_arg=7,
        extra="aé\0".encode(),
        flags=Flags.SHMEM_ACCESS | Flags.DATABASE_CONNECTION,
        start_time=StartTime.CONSISTENT_STATE,
        restart_time=None,
        notify=False,
        stop_timeout=1.5,
        env={"A": "b"},
    )


def test_flags_may_be_none_and_parallel(one: Callable[[str], BackgroundWorker]) -> None:
    assert one("flags = []").flags == Flags.NONE
    assert one('flags = ["class-parallel"]').flags == Flags.CLASS_PARALLEL


def test_the_number_of_a_worker_is_filled_in_wherever_there_is_text(loaded: Loader) -> None:
    _, workers = loaded(
        '[[worker]]\ncount = 2\nentry = "m:f{i}"\nname = "n-{i}-{i}"\ntype = "t{i}"\n'
        'args = ["{i}", 5, ["a{i}", { k = "{i}" }]]\nkwargs = { a = ["{i}"], "{i}" = "{j}" }\n'
        'env = { A = "x{i}", B = "{}" }\n'
    )
    assert [problem for _, problem in workers] == ["", ""]
    for i, (worker, _) in enumerate(workers):
        assert worker is not None
        assert (worker.entry, worker.name, worker.type) == (f"m:f{i}", f"n-{i}-{i}", f"t{i}")
        assert worker.args == (str(i), 5, [f"a{i}", {"k": str(i)}])
        assert worker.kwargs == {"a": [str(i)], "{i}": "{j}"}
        assert worker.env == {"A": f"x{i}", "B": "{}"}


def test_without_a_count_there_is_one_worker_and_nothing_is_filled_in(
    loaded: Loader, one: Callable[[str], BackgroundWorker]
) -> None:
    assert one('name = "n-{i}"').name == "n-{i}"
    assert loaded('[[worker]]\nentry = "m:f"\ncount = 0\n')[1] == []
    assert len(loaded('[[worker]]\nentry = "m:f"\ncount = 1\n')[1]) == 1


def test_A11_a_worker_that_can_never_run_is_a_problem_and_no_error(loaded: Loader) -> None:
    """The others, before and after it, are not affected."""
    _, workers = loaded(
        '[[worker]]\nentry = "m:f"\n'
        '[[worker]]\nentry = "m:f"\nname = "shard-{i}"\ncount = 2\nrestart_time = -5\n'
        '[[worker]]\nentry = "no name"\n'
        '[[worker]]\nentry = "m:g"\nflags = ["database-connection"]\n'
        '[[worker]]\nentry = "m:h"\n'
    )
    names = [worker and worker.name for worker, _ in workers]
    assert names == ["m:f", None, None, None, None, "m:h"]
    problems = [problem for _, problem in workers]
    assert problems[0] == problems[-1] == ""
    for number, problem in enumerate(problems[1:3]):
        assert 'pgbgw.toml: [[worker]] 2 "shard-{i}": ' in problem
        assert f'"shard-{number}": invalid restart interval (restart_time is -5' in problem
    assert '[[worker]] 3 "no name": ' in problems[3]
    assert "must attach to shared memory" in problems[4]


@pytest.mark.parametrize(
    "lines",
    [
        *("notify = true", "restart_time = nan", "stop_timeout = -1", "main_arg = -1"),
        *('name = "\\u0000"', f'name = "{"n" * 96}"', f'args = ["{"a" * 2000}"]'),
        *('env = { "A=B" = "c" }', 'flags = ["class-parallel"]\nrestart_time = 5'),
    ],
)
def test_A12_what_the_checks_of_a_static_worker_refuse_is_a_problem(
    loaded: Loader, lines: str
) -> None:
    _, [(worker, problem)] = loaded(f'[[worker]]\nentry = "m:f"\n{lines}\n')
    assert worker is None
    assert "pgbgw.toml: [[worker]] 1" in problem


ERRORS = [
    ("[superviser]", 'unknown table "superviser"', "supervisor"),
    ("[workers]", 'unknown table "workers"', "worker"),
    ("x = 1", 'unknown table "x"', "there are supervisor, worker"),
    ("supervisor = 1", "supervisor is no table", "[supervisor]"),
    ("[worker]\nentry = 'm:f'", "worker is no array of tables", "[[worker]]"),
    ("worker = [1]", "worker is no array of tables", "[[worker]]"),
    ("S max_workers_processes = 8", 'unknown key "max_workers_processes"', "max_worker_processes"),
    ("S max_worker_processes = 0", "max_worker_processes: 0 is not between 1 and 262143", None),
    ("S max_worker_processes = 262144", "max_worker_processes: 262144 is not between", None),
    ("S max_parallel_workers = 1025", "max_parallel_workers: 1025 is not between 0 and 1024", None),
    ("S max_worker_processes = true", "max_worker_processes: true is no integer", None),
    ("S max_worker_processes = 8.0", "max_worker_processes: 8.0 is no integer", None),
    ("S spares = -1", "spares: -1 is not between", None),
    ("S address = 5", "address: 5 is no string", None),
    ("S preload = 'numpy'", "preload: 'numpy' is no array", "['numpy']"),
    ("S preload = ['numpy', 5]", "preload: 5 is no string", None),
    ("S allow = { a = 1 }", "is no array", None),
    ("S shared_memory = '1 MOB'", "shared_memory: '1 MOB' is no size", "64KiB"),
    ("S shared_memory = -1", "shared_memory: -1 is no size", "64KiB"),
    ("S restart_after_crash = 'yes'", "restart_after_crash: 'yes' is neither true nor false", None),
    ("S post_auth_delay = -1", "post_auth_delay: -1 is not between 0 and", None),
    ("S post_auth_delay = 'never'", "post_auth_delay: 'never' is not between 0 and", None),
    ("S post_auth_delay = nan", "post_auth_delay: nan is not between 0 and", None),
    ("S start_method = 'frok'", "start_method: unknown value 'frok'", 'did you mean "fork"?'),
    ("W restart = 5", 'unknown key "restart"', "restart_time"),
    ("W restart_time = '5 parsecs'", "restart_time: '5 parsecs' is no duration", "5s"),
    ("W restart_time = true", "restart_time: true is no duration", "5s"),
    ("W stop_timeout = []", "stop_timeout: [] is no duration", "5s"),
    ("W start_time = 'consistent'", "start_time: unknown value 'consistent'", "consistent-state"),
    ("W start_time = 2", "start_time: 2 is no string", None),
    ("W flags = ['SHMEM_ACCESS']", "flags: unknown value 'SHMEM_ACCESS'", '"shmem-access"'),
    ("W flags = ['xyz']", "flags: unknown value 'xyz'", "there are shmem-access, "),
    ("W flags = 'shmem-access'", "flags: 'shmem-access' is no array", "['shmem-access']"),
    ("W flags = [1]", "flags: 1 is no string", None),
    ("W count = -1", "count: -1 is not between", None),
    ("W count = '4'", "count: '4' is no integer", None),
    ("W args = 'a'", "args: 'a' is no array", "['a']"),
    ("W kwargs = [1]", "kwargs: [1] is no table", "{ key = value }"),
    ("W env = { A = 'b', C = 1 }", "env: C: 1 is no string", 'C = "1"'),
    ("W env = { C = true }", "env: C: true is no string", 'C = "true"'),
    ("W env = { C = [] }", "env: C: [] is no string", None),
    ("W name = 5", "name: 5 is no string", None),
    ("W main_arg = '5'", "main_arg: '5' is no integer", None),
    ("W extra = [1]", "extra: [1] is no string", None),
    ("W notify = 1", "notify: 1 is neither true nor false", None),
]


@pytest.mark.parametrize(("text", "message", "hint"), ERRORS, ids=[text for text, _, _ in ERRORS])
def test_an_error_names_file_table_and_key_and_gives_advice(
    loaded: Loader, text: str, message: str, hint: str | None
) -> None:
    place = ""
    if text.startswith("S "):
        text, place = f"[supervisor]\n{text[2:]}", "[supervisor]: "
    elif text.startswith("W "):
        text = f'[[worker]]\nentry = "m:f"\n[[worker]]\nentry = "m:g"\n{text[2:]}'
        place = "[[worker]] 2"
    with pytest.raises(ConfigurationError) as caught:
        loaded(text)
    assert f"pgbgw.toml: {place}" in str(caught.value)
    assert message in str(caught.value)
    if hint is None:
        assert caught.value.hint is None
    else:
        assert hint in (caught.value.hint or "")


def test_a_worker_needs_an_entry(loaded: Loader) -> None:
    with pytest.raises(ConfigurationError, match=r'\[\[worker\]\] 1 "n": entry: missing') as caught:
        loaded('[[worker]]\nname = "n"\n')
    assert "package.module:function" in (caught.value.hint or "")
    with pytest.raises(ConfigurationError, match=r"\[\[worker\]\] 1: entry: missing"):
        loaded("[[worker]]\n")


def test_a_worker_is_called_by_the_name_it_has_in_the_file(loaded: Loader) -> None:
    with pytest.raises(ConfigurationError, match=r'toml: \[\[worker\]\] 1 "a-\{i\}": count: '):
        loaded('[[worker]]\nentry = "m:f"\nname = "a-{i}"\ncount = -1\n')


def test_what_is_not_TOML_is_an_error_that_names_file_and_line(
    loaded: Loader, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match=r"pgbgw.toml: not valid TOML: .*line 2") as caught:
        loaded("[supervisor]\nx = = 1\n")
    assert isinstance(caught.value.__cause__, ValueError)
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigurationError, match=r"binary.toml: not valid TOML"):
        load(str(binary))
    with pytest.raises(ConfigurationError, match="not valid TOML"):
        loaded("x = " + "[" * 100_000)


def test_a_file_that_cannot_be_read_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"none.toml: No such file") as caught:
        load(tmp_path / "none.toml")
    assert isinstance(caught.value.__cause__, FileNotFoundError)
    with pytest.raises(ConfigurationError, match="Is a directory"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("250ms", 0.25),
        ("5s", 5.0),
        ("5 s", 5.0),
        ("2m", 120.0),
        ("2min", 120.0),
        ("1.5h", 5400.0),
        ("1d", 86400.0),
        ("5S", 5.0),
        ("7", 7.0),
        ("-1s", -1.0),
        (5, 5),
        (0.5, 0.5),
        ("never", None),
    ],
)
def test_a_duration_is_seconds(text: object, seconds: float | None) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text",
    ["", "s", "5x", "5s5s", "1h30m", "Never", "nan", "infs", "1e999s", "--5s", True, None, [5]],
)
def test_what_is_no_duration_is_refused(text: object) -> None:
    with pytest.raises(ConfigurationError, match="is no duration"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (0, 0),
        (1 << 40, 1 << 40),
        ("4096", 4096),
        ("64B", 64),
        ("64KiB", 64 << 10),
        ("1MiB", 1 << 20),
        ("1.5 GiB", 3 << 29),
        ("1TiB", 1 << 40),
        ("64kB", 64_000),
        ("1MB", 1_000_000),
        ("1GB", 1_000_000_000),
        ("1gb", 1_000_000_000),
    ],
)
def test_a_size_is_bytes(text: object, size: int) -> None:
    assert parse_size(text) == size
    assert isinstance(parse_size(text), int)


@pytest.mark.parametrize(
    "text",
    ["", "MiB", "1Mi", "1XB", "-1KB", "0.1B", "1.0001KB", "nanB", "1e308GB", -1, 1.5, True, None],
)
def test_what_is_no_size_is_refused(text: object) -> None:
    with pytest.raises(ConfigurationError, match="is no size"):
        parse_size(text)


@given(st.text(max_size=12) | st.integers() | st.floats() | st.booleans())
def test_whatever_a_duration_or_size_looks_like_there_is_an_answer(value: object) -> None:
    for parse in (parse_duration, parse_size):
        try:
            answer = parse(value)
        except ConfigurationError as error:
            assert len(str(error)) < 100  # noqa: PT017
        else:
            assert answer is None or isinstance(answer, (int, float))
