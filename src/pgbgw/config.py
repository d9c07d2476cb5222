"""A TOML file -> the arguments of a Supervisor, and its static workers.

    [supervisor]                 every key an argument of Supervisor
    [[worker]]                   every key a field of BackgroundWorker, and `count`

With `count = N` a [[worker]] table stands for N workers, and "{i}" in the strings of its name,
type, entry, args, kwargs and env for the number of each, 0 to N - 1.  What replaces it is text: a
string of TOML stays a string.  Without `count` a "{i}" is what it is.

A file that does not have this shape (not TOML, an unknown key, a wrong type, a misspelt word) is a
ConfigurationError that names the file, the table and the key.  A worker that has the shape but can
never run is none: PostgreSQL logs it and goes on without it, and so does the supervisor.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterable, Mapping
from math import isfinite
from os import PathLike, fsdecode
from typing import Any

from pgbgw.errors import ConfigurationError, PgbgwError
from pgbgw.worker import (
    MAX_PARALLEL_WORKER_LIMIT,
    MAX_RESTART_TIME,
    MAX_WORKER_PROCESSES_LIMIT,
    BackgroundWorker,
    Flags,
    StartTime,
)

__all__ = ["load", "parse_duration", "parse_size"]

_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0, "": 1.0}
_BYTES = {"": 1, "b": 1} | {
    prefix + unit: base**power
    for unit, base in (("b", 1000), ("ib", 1024))
    for power, prefix in enumerate("kmgt", 1)
}


def load(
    path: str | PathLike[str],
) -> tuple[dict[str, Any], list[tuple[BackgroundWorker | None, str]]]:
    """Read a file: (arguments of Supervisor, its static workers in the order of the file).

    A worker that can run comes as (worker, ""), another one as (None, what is wrong with it).
    Raises ConfigurationError if anything else is wrong.
    """
    file = fsdecode(path)
    document = _read(file)
    for key in document:
        if key not in ("supervisor", "worker"):
            raise _unknown(f'{file}: unknown table "{key}"', key, ("supervisor", "worker"))
    settings, tables = document.get("supervisor", {}), document.get("worker", [])
    if not isinstance(settings, dict):
        raise ConfigurationError(f"{file}: supervisor is no table", hint="write [supervisor]")
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise ConfigurationError(f"{file}: worker is no array of tables", hint="write [[worker]]")
    arguments = _parse(settings, _SUPERVISOR, f"{file}: [supervisor]")
    workers: list[tuple[BackgroundWorker | None, str]] = []
    for number, table in enumerate(tables, 1):
        name = table.get("name") or table.get("entry")
        label = f'[[worker]] {number} "{name}"' if isinstance(name, str) else f"[[worker]] {number}"
        workers += _workers(table, f"{file}: {label}")
    return arguments, workers


def parse_duration(value: object) -> float | None:
    """Seconds: a number, "250ms", "5s", "2m" (or "2min"), "1.5h", "1d"; None for "never".

    Whether the number makes sense is for the caller to say.  Raises ConfigurationError.
    """
    if value == "never":
        return None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value
    if isinstance(value, str):
        number, unit = _split(value)
        if number is not None and unit in _SECONDS:
            return number * _SECONDS[unit]
    hint = 'write "250ms", "5s", "2m", "1h", "never", or a number of seconds'
    raise ConfigurationError(f"{_toml(value)} is no duration", hint=hint)


def parse_size(value: object) -> int:
    """Bytes: an integer, "64KiB" or "1MiB" (of 1024), "64KB" or "1GB" (of 1000).

    Raises ConfigurationError.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if isinstance(value, str):
        number, unit = _split(value)
        if number is not None and unit in _BYTES:
            size = number * _BYTES[unit]
            if 0 <= size < 1 << 64 and size == int(size):
                return int(size)
    hint = 'write "64KiB", "1MiB", "1GB", or a number of bytes'
    raise ConfigurationError(f"{_toml(value)} is no size", hint=hint)


def _split(text: str) -> tuple[float | None, str]:
    """("1.5 MiB") -> (1.5, "mib"); (None, ...) if it does not begin with a finite number."""
    digits = text.strip().rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
    unit = text.strip()[len(digits) :].lower()
    try:
        number = float(digits)
    except ValueError:
        return None, unit
    return (number if isfinite(number) else None), unit


def _read(file: str) -> dict[str, Any]:
    try:
        with open(file, "rb") as stream:
            return tomllib.load(stream)
    except OSError as error:
        raise ConfigurationError(f"{file}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # TOMLDecodeError, UnicodeDecodeError
        raise ConfigurationError(f"{file}: not valid TOML: {error}") from error


def _parse(
    table: Mapping[str, object], parsers: Mapping[str, Callable[[object], object]], where: str
) -> dict[str, Any]:
    """The table with each value parsed; an error gets the place it was found in."""
    for key in table:
        if key not in parsers:
            raise _unknown(f'{where}: unknown key "{key}"', key, parsers)
    parsed = {}
    for key, value in table.items():
        try:
            parsed[key] = parsers[key](value)
        except ConfigurationError as error:
            raise ConfigurationError(f"{where}: {key}: {error}", hint=error.hint) from None
    return parsed


def _unknown(message: str, word: str, known: Iterable[str]) -> ConfigurationError:
    """The error for a word that is not known, with the nearest one as the hint."""
    from difflib import get_close_matches

    # Words of keys are joined by _, those of values by -; either may be what was got wrong.
    alike = {one.replace("_", "-"): one for one in known}
    nearest = get_close_matches(word.lower().replace("_", "-"), alike, n=1)
    if nearest:
        return ConfigurationError(message, hint=f'did you mean "{alike[nearest[0]]}"?')
    return ConfigurationError(message, hint=f"there are {', '.join(alike.values())}")


# What a value may be.  These raise a ConfigurationError that _parse() completes.


def _toml(value: object) -> str:
    """A value as the file has it, roughly; at most a line of it."""
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _string(value: object) -> str:
    if not isinstance(value, str):
        raise ConfigurationError(f"{_toml(value)} is no string")
    return value


def _array(value: object) -> tuple[object, ...]:
    if not isinstance(value, list):
        hint = f"write [{_toml(value)}]" if isinstance(value, str) else None
        raise ConfigurationError(f"{_toml(value)} is no array", hint=hint)
    return tuple(value)


def _strings(value: object) -> tuple[str, ...]:
    return tuple(_string(one) for one in _array(value))


def _table(value: object) -> dict[str, object]:
    if not isinstance(value, dict):
        raise ConfigurationError(f"{_toml(value)} is no table", hint="write { key = value }")
    return value


def _environment(value: object) -> dict[str, str]:
    table = _table(value)
    for key, one in table.items():
        if not isinstance(one, str):
            hint = f'write {key} = "{_toml(one)}"' if isinstance(one, (int, float)) else None
            raise ConfigurationError(f"{key}: {_toml(one)} is no string", hint=hint)
    return {key: str(one) for key, one in table.items()}


def _boolean(value: object) -> bool:
    if not isinstance(value, bool):
        raise ConfigurationError(f"{_toml(value)} is neither true nor false")
    return value


def _integer(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigurationError(f"{_toml(value)} is no integer")
    return value


def _between(least: int, most: int) -> Callable[[object], int]:
    def parse(value: object) -> int:
        number = _integer(value)
        if not least <= number <= most:
            raise ConfigurationError(f"{number} is not between {least} and {most}")
        return number

    return parse


def _delay(value: object) -> float:
    seconds = parse_duration(value)
    if seconds is None or not 0 <= seconds <= MAX_RESTART_TIME:
        raise ConfigurationError(f"{_toml(value)} is not between 0 and {MAX_RESTART_TIME} seconds")
    return seconds


def _one_of(words: Mapping[str, Any]) -> Callable[[object], Any]:
    def parse(value: object) -> Any:
        word = _string(value)
        if word not in words:
            raise _unknown(f"unknown value {_toml(word)}", word, words)
        return words[word]

    return parse


def _flags(value: object) -> Flags:
    flags = Flags.NONE
    for word in _array(value):
        flags |= _flag(word)
    return flags


def _spelling(member: Flags | StartTime) -> str:
    return str(member.name).lower().replace("_", "-")


_flag = _one_of({_spelling(flag): flag for flag in Flags})

_SUPERVISOR: dict[str, Callable[[object], object]] = {
    "max_worker_processes": _between(1, MAX_WORKER_PROCESSES_LIMIT),
    "max_parallel_workers": _between(0, MAX_PARALLEL_WORKER_LIMIT),
    "address": _string,
    "preload": _strings,
    "startup": _string,
    "start_method": _one_of({"fork": "fork", "spawn": "spawn"}),
    "spares": _between(0, MAX_WORKER_PROCESSES_LIMIT),
    "allow": _strings,
    "shared_memory": parse_size,
    "restart_after_crash": _boolean,
    "post_auth_delay": _delay,
    "cgroup": _string,
}

_WORKER: dict[str, Callable[[object], object]] = {
    "name": _string,
    "type": _string,
    "count": _between(0, MAX_WORKER_PROCESSES_LIMIT),
    "entry": _string,
    "args": _array,
    "kwargs": _table,
    "main_arg": _integer,
    "extra": lambda value: _string(value).encode(),
    "flags": _flags,
    "start_time": _one_of({_spelling(time): time for time in StartTime}),
    "restart_time": parse_duration,
    "notify": _boolean,
    "stop_timeout": parse_duration,
    "env": _environment,
}
_EXPANDED = ("name", "type", "entry", "args", "kwargs", "env")


def _workers(
    table: Mapping[str, object], where: str
) -> Iterable[tuple[BackgroundWorker | None, str]]:
    """The workers of one [[worker]] table, each with what is wrong with it."""
    fields = _parse(table, _WORKER, where)
    if "entry" not in fields:
        hint = 'write entry = "package.module:function"'
        raise ConfigurationError(f"{where}: entry: missing", hint=hint)
    count = fields.pop("count", None)
    for number in range(1 if count is None else count):
        if count is None:
            mine = fields
        else:
            mine = fields | {
                key: _expand(fields[key], str(number)) for key in _EXPANDED if key in fields
            }
        try:
            worker = BackgroundWorker(**mine)
            worker.check_static()
        except PgbgwError as error:
            detail = f" ({error.detail})" if error.detail else ""
            hint = f"; {error.hint}" if error.hint else ""
            yield None, f"{where}: {error}{detail}{hint}"
        else:
            yield worker, ""


def _expand(value: object, number: str) -> object:
    """The value with each "{i}" in its strings replaced; keys stay as they are."""
    if isinstance(value, str):
        return value.replace("{i}", number)
    if isinstance(value, (list, tuple)):
        return [_expand(one, number) for one in value]
    if isinstance(value, dict):
        return {key: _expand(one, number) for key, one in value.items()}
    return value
