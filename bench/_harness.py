"""Paired rounds: asks pgbgw and its peers in turn, and says how they compare.  See README.md."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import pgbgw
from _subject import serve
from pgbgw._bench import Question, Round, figures

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
ROUNDS = {"quick": 3, "full": 7}
OURS = "pgbgw"
PATIENCE = 120.0  # seconds for a round, or for clearing up
QUICK_PEERS = ("postgresql", "floor", "multiprocessing:fork")

# Subjects cache bytecode, whatever is said here: an import should not compile.
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}


class Subject:
    """A process that measures one round whenever it is told to; `skipped` says why it does not.

    A subject "library:variant" is peers/library.py with options["variant"].
    """

    def __init__(self, name: str, command: list[str], question: str, options: dict[str, Any]):
        self.name = name
        self.skipped: str | None = None
        self.rounds: list[Round] = []
        self._process = subprocess.Popen(
            [sys.executable, *command, question, json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=HERE,
            env=ENVIRONMENT,
            process_group=0,
        )

    def __enter__(self) -> Subject:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End of input: it clears up."""
        self._process.stdin.close()
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._kill()
        self._process.stdout.close()

    def prepared(self) -> None:
        if self.skipped is None:
            self._answer()

    def ask(self) -> None:
        if self.skipped is None:
            try:
                print(file=self._process.stdin, flush=True)
            except BrokenPipeError:
                pass
            answer = self._answer()
            if answer is not None:
                self.rounds.append(answer)

    def _answer(self) -> Round | None:
        # What it has forked may hold the pipe open when it has died: look at both.
        deadline = time.monotonic() + PATIENCE
        readable: list[object] = []
        while not readable and self._process.poll() is None and time.monotonic() < deadline:
            readable = select.select([self._process.stdout], [], [], 0.2)[0]
        if not readable:
            readable = select.select([self._process.stdout], [], [], 0)[0]
        line = self._process.stdout.readline() if readable else ""
        try:
            answer: Round = json.loads(line)
        except ValueError:
            slow = self._process.poll() is None and not readable
            self._kill()
            status = self._process.returncode
            self.skipped = "took too long" if slow else f"failed, with status {status}"
            return None
        if "skip" in answer:
            self.skipped = str(answer["skip"])
            return None
        return answer

    def _kill(self) -> None:
        """It, and what it has left in its process group."""
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):
            self._process.wait(1)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def compare(question: Question, file: str, peers: Iterable[str], form: str) -> list[dict[str, Any]]:
    """All lines of one question: A B C A B C ..."""
    options = dict(question.full if form == "full" else question.quick)
    with ExitStack() as stack:
        subjects = [Subject(OURS, [file, "--serve"], question.name, options)]
        for peer in peers:
            library, _, variant = peer.partition(":")
            given = options | ({"variant": variant} if variant else {})
            subjects.append(Subject(peer, ["-m", f"peers.{library}"], question.name, given))
        for subject in subjects:
            stack.enter_context(subject)
        for subject in subjects:
            subject.prepared()
        for _ in range(ROUNDS[form]):
            for subject in subjects:
                subject.ask()
    measured = {subject.name: subject.rounds for subject in subjects[1:] if subject.rounds}
    lines = figures(question, OURS, subjects[0].rounds, measured)
    for name, rounds in measured.items():
        lines += figures(question, name, rounds)
    lines += [
        {"subject": subject.name, "question": question.name, "skipped": subject.skipped}
        for subject in subjects
        if subject.skipped is not None
    ]
    return lines


def header(form: str) -> dict[str, Any]:
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "kernel": platform.release(),
        "cpus": os.cpu_count(),
        "load": [round(load, 2) for load in os.getloadavg()],
        "pgbgw": pgbgw.__version__,
        "form": form,
    }


def run(
    question: Question, file: str, peers: Iterable[str], form: str, path: Path | None
) -> list[dict[str, Any]]:
    """compare(), each line printed, and all of them written to a file."""
    before = header(form)
    lines = compare(question, file, peers, form)
    for line in lines:
        print(json.dumps(line, ensure_ascii=False), flush=True)
    if path is not None:
        head = {"question": question.name, "header": before}
        text = ",\n".join(f"    {json.dumps(line, ensure_ascii=False)}" for line in lines)
        # A line per figure, so that a diff shows what moved.
        path.write_text(json.dumps(head)[:-1] + f', "figures": [\n{text}\n]}}\n')
    return lines


def parser(description: str | None) -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--quick", action="store_true", help="small, 3 rounds, few peers")
    found.add_argument("--peer", action="append", help="this one (again: and this), in any form")
    found.add_argument("--alone", action="store_true", help="no peers")
    return found


def chosen(peers: Iterable[str], options: argparse.Namespace) -> list[str]:
    """Those of the peers that are wanted."""
    if options.alone:
        return []
    wanted = options.peer or (QUICK_PEERS if options.quick else None)
    return [p for p in peers if wanted is None or p in wanted or p.partition(":")[0] in wanted]


def main(question: Question, peers: Iterable[str], doc: str | None) -> None:
    """What bench_<question>.py does when it is run, by a user or as the subject that pgbgw is."""
    file = sys.argv[0]
    if sys.argv[1:2] == ["--serve"]:
        serve({question.name: question.ask}, sys.argv[2:])
        return
    arguments = parser(doc)
    arguments.add_argument("--json", type=Path, metavar="FILE", help="write it to a file, too")
    options = arguments.parse_args()
    form = "quick" if options.quick else "full"
    run(question, os.path.abspath(file), chosen(peers, options), form, options.json)
