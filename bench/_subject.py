"""One side of a comparison, in a process of its own: the protocol of README.md.

A subject's questions are generators: they prepare, measure one round whenever they are asked for
the next, and clear up when they are closed.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pgbgw._bench import Options, Round


class Skip(Exception):
    """This subject cannot be asked here; the text says why."""


def repeat(options: Options) -> Iterator[None]:
    """options["calls"] times, but no longer than half a second: some are slow."""
    deadline = time.monotonic() + 0.5
    yield
    for _ in range(options["calls"] - 1):
        if time.monotonic() >= deadline:
            return
        yield


def per_second(options: Options, act: Callable[[], object]) -> float:
    """How often something can be done, one after another."""
    done, before = 0, time.perf_counter()
    for _ in repeat(options):
        act()
        done += 1
    return done / (time.perf_counter() - before)


def serve(
    questions: Mapping[str, Callable[[Options], Iterator[Round]]],
    arguments: list[str] | None = None,
) -> None:
    """Answer QUESTION [OPTIONS]: a line for each line of standard input, until that ends."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] not in questions:
        sys.exit(f"usage: QUESTION [OPTIONS], QUESTION is one of {', '.join(questions)}")
    # What a child prints must not get between the answers, nor a child read the commands.
    commands, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)

    def say(line: object) -> None:
        print(json.dumps(line), file=answers, flush=True)

    options: dict[str, Any] = json.loads(arguments[1]) if arguments[1:] else {}
    rounds = questions[arguments[0]](options)
    try:
        next(rounds)  # part of the preparation: warms up, and finds out what is missing
        say({"ready": True})
        for _ in commands:
            say(next(rounds))
    except (Skip, ImportError) as reason:
        say({"skip": str(reason)})
    finally:
        rounds.close()  # type: ignore[attr-defined]
