"""Check the slot protocol: the models with Spin, every seeded bug, the memory orders.

    python3 tests/model/check.py              small configurations, seeded bugs, litmus: 1 minute
    python3 tests/model/check.py --full       large configurations as well: some minutes more
    python3 tests/model/check.py --only X     those whose name contains X
    python3 tests/model/check.py --reviewed   the models have been compared with the C (see below)

A configuration must be verified, a seeded bug must be caught by the property that is there for it:
the exit status is 0 if so.  Needs spin and gcc, and nothing of pgbgw.

The models follow the C step by step, by hand.  So reviewed.json keeps a digest of every function
and type that they know; a test fails when one has changed since (tests/meta).  Compare it with the
steps of the model that bear its name, change the model first if they differ, run this, and then
--reviewed notes that you have looked.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
if str(HERE.parent) not in sys.path:
    sys.path.insert(0, str(HERE.parent))  # run by hand: as pytest has it

from model import litmus  # noqa: E402

# --------------------------------------------------------------------------------------------
# The models
# --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Configuration:
    name: str
    model: str
    values: str  # NC=2 NS=1 ...
    endless: bool = False  # look for executions that never end, not for broken assertions
    bug: str = ""
    broken: str = ""  # the property that must catch the bug

    @property
    def defines(self) -> list[str]:
        return [f"-D{v}" for v in [*self.values.split(), *([f"BUG_{self.bug}"] * bool(self.bug))]]


def configurations(model: str, rows: Iterable[tuple[str, str]]) -> list[Configuration]:
    return [Configuration(f"{model}: {name}", model, values) for name, values in rows]


def bugs(model: str, rows: Iterable[tuple[str, str, str]]) -> list[Configuration]:
    return [
        Configuration(f"{model}: {bug}", model, values, bug=bug, broken=broken)
        for bug, broken, values in rows
    ]


# Defaults: slots NS=2 NT=1 NC=2 OPS=1 CRASHES=1, hints NS=2 NC=2 OPS=1 CRASHES=1.
SMALL = [
    *configurations("orphan", [("fork, arm, compare", "")]),
    *configurations(
        "slots",
        [
            ("2 clients, 1 slot", "NS=1"),
            ("2 clients, 2 slots", ""),
            ("3 operations, 2 kills", "NC=1 NS=1 OPS=3 CRASHES=2"),
            ("generations used up", "NC=1 NS=1 OPS=3 GENERATION_MAX=2"),
            ("workers end on TERM only", "NS=1 STUBBORN=1"),
            ("workers restart", "NC=1 NS=1 OPS=2 RESTARTS=1"),
            ("a waiter", "NC=1 NS=1 OPS=2 WAITERS=1"),
            ("a waiter, TERM", "NC=1 NS=1 OPS=3 STUBBORN=1 WAITERS=1"),
            ("supervisor killed", "NC=1 NS=1 OPS=2 WAITERS=1 SUPERVISOR_CRASHES=1"),
            ("inbox overwritten", "NC=1 NS=1 OPS=2 CORRUPT=1"),
        ],
    ),
    Configuration("slots: it ends", "slots", "NS=1", endless=True),
    Configuration("slots: waits end", "slots", "NC=1 NS=1 OPS=2 WAITERS=1", endless=True),
    *configurations(
        "hints",
        [
            ("1 client, 2 slots, 2 operations", "NC=1 OPS=2"),
            ("2 clients, 1 slot", "NS=1"),
            ("2 threads, 1 slot", "NS=1 THREADS"),
            ("detach", "NC=1 OPS=2 DETACHES=1"),
        ],
    ),
    Configuration("hints: it ends", "hints", "NC=1 OPS=2", endless=True),
]

LARGE = [
    *configurations(
        "slots",
        [
            ("2 clients, 1 slot, 2 operations", "NS=1 OPS=2"),
            ("the same, 2 kills, ordinary", "NS=1 OPS=2 CRASHES=2 PARALLEL=0"),
            ("2 slots, 2 operations", "OPS=2 PARALLEL=0"),
            ("the same, parallel", "OPS=2 PARALLEL=1"),
            ("3 clients, 1 slot", "NC=3 NS=1"),
            ("3 clients, 2 slots, parallel", "NC=3 PARALLEL=1"),
            ("2 clients, a waiter", "NS=1 WAITERS=1"),
            ("the same, supervisor killed", "NS=1 WAITERS=1 SUPERVISOR_CRASHES=1"),
            ("overwritten twice", "NC=1 NS=1 OPS=2 CORRUPT=2"),
            ("2 clients, overwritten", "NS=1 CORRUPT=1"),
        ],
    ),
    Configuration("slots: it ends, 2 slots", "slots", "", endless=True),
    *configurations(
        "hints",
        [
            ("2 clients, 2 slots", "CRASHES=0"),
            ("2 clients, 2 slots, a kill", "TERMINATES=0"),
            ("2 clients, 1 slot, 2 operations", "NS=1 OPS=2 CRASHES=0 TERMINATES=0"),
            ("2 clients, 1 slot, detach", "NS=1 DETACHES=1 CRASHES=0"),
            ("3 clients, 1 slot", "NC=3 NS=1 CRASHES=0 TERMINATES=0"),
        ],
    ),
]

BUGS = [
    *bugs("orphan", [("CHECK_FIRST", "", ""), ("NO_CHECK", "", "")]),
    *bugs(
        "slots",
        [
            ("PUBLISH_RELAXED", "P4", "NC=1 NS=1"),
            ("COPY_FIRST", "P4", "NS=1"),
            ("EOF_IS_DEATH", "P4", "NS=1"),
            ("BLIND_CLAIM", "P1", "NS=1"),
            ("CID_EARLY", "P2", "NC=1 NS=1 OPS=2"),
            ("LIVE_CLAIM", "P1", "NS=1"),
            ("NO_RECLAIM", "P2", "NC=1 NS=1"),
            ("NO_COLLECT", "P2", "NC=1 NS=1"),
            ("NO_ROUND", "P7", "NC=1 NS=1"),
            ("TOKENS_FIRST", "P5", ""),
            ("NO_BIND", "P2", ""),
            ("NO_GENERATION", "P3", "NC=1 NS=1 OPS=3"),
            ("WRAP", "P3", "NC=1 NS=1 OPS=3 GENERATION_MAX=1"),
            ("ACK_STORE", "P7", "NC=1 NS=1 OPS=2 STUBBORN=1"),
            ("INBOX_FIRST", "P8", "NC=1 NS=1 OPS=3"),
            ("TOKEN_LAST", "P9", "NC=1 NS=1 WAITERS=1"),
            ("WAIT_OUTBOX", "P9", "NC=1 NS=1 WAITERS=1"),
            ("NOTIFY_FIRST", "P6", "NC=1 NS=1 WAITERS=1 STUBBORN=1"),
            ("LOOK_FIRST", "P6", "NC=1 NS=1 WAITERS=1 STUBBORN=1"),
        ],
    ),
    *bugs(
        "hints",
        [
            ("SLEEP_EARLY", "H1", "NC=1 NS=1"),
            ("CHECK_FIRST", "H1", "NC=1 NS=1"),
            ("RELAXED_SLEEP", "H1", "NC=1 NS=1"),
            ("RING_FLAG", "H1", "NC=1 NS=1 OPS=2"),
            ("FORGET_PENDING", "H1", "NC=1 OPS=2"),
            ("CLEAR_AFTER", "H1", "NC=1 NS=1 OPS=2"),
            ("HALF_ROUND", "H1", "CRASHES=2"),
            ("CLEAR_LATE", "H2", "NC=1 NS=1"),
            ("NO_RECHECK", "H2", "CRASHES=0"),
            ("SWEEP_NO_HINT", "H2", "NS=1"),
            ("HINT_FIRST", "H2", "NS=1"),
            ("NO_FREE_SEQ", "H3", "CRASHES=0 TERMINATES=0 OPS=3 FIRST_OPS=1"),
            ("COUNT_LATE", "H3", "NS=1"),
            ("DETACH_EARLY", "H4", "NC=1 NS=1 OPS=2 DETACHES=1"),
            ("COUNT_CLAIMED", "H5", "NC=1 NS=1"),
        ],
    ),
]

# --------------------------------------------------------------------------------------------
# Running them
# --------------------------------------------------------------------------------------------

MEMORY_MB = 6000
DEPTH = 2_000_000


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    name: str
    verdict: str
    states: int
    seconds: float
    as_expected: bool


class BuildError(Exception):
    """A model, or what Spin made of it, does not compile."""


def verify(configuration: Configuration) -> Row:
    """Build and run one configuration.  If it goes wrong its directory is kept, with the trail."""
    directory = Path(tempfile.mkdtemp(prefix="pgbgw-model-"))
    began = time.monotonic()
    try:
        build(configuration, directory)
        limits = ["-l"] * configuration.endless + [f"-m{DEPTH}"]
        output = run(["./pan", *limits], directory)
        verdict, good = judge(configuration, output, directory)
    except BuildError as error:
        verdict, good = str(error), False
    stored = re.search(r"(\S+) states, stored", "" if verdict.startswith("build") else output)
    row = Row(
        configuration.name,
        verdict,
        int(float(stored[1])) if stored else 0,
        time.monotonic() - began,
        good,
    )
    if good:
        shutil.rmtree(directory)
        return row
    hint = f"{verdict}; see {directory}: spin -p -g -l -t {' '.join(configuration.defines)} m.pml"
    return Row(row.name, hint, row.states, row.seconds, good)


def build(configuration: Configuration, directory: Path) -> None:
    shutil.copyfile(HERE / f"{configuration.model}.pml", directory / "m.pml")
    output = run(["spin", *configuration.defines, "-a", "m.pml"], directory)
    if not (directory / "pan.c").exists() or "rror" in output:
        raise BuildError(f"build: {output.strip()[:200]}")
    kind = ["-DNP"] if configuration.endless else ["-DSAFETY"]
    options = ["-O1", "-w", "-DCOLLAPSE", "-DVECTORSZ=2048", f"-DMEMLIM={MEMORY_MB}", *kind]
    output = run(["gcc", *options, "-o", "pan", "pan.c"], directory)
    if not (directory / "pan").exists():
        raise BuildError(f"build: {output.strip()[:200]}")


def run(command: list[str], directory: Path) -> str:
    process = subprocess.run(
        command,
        cwd=directory,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return process.stdout


def judge(configuration: Configuration, output: str, directory: Path) -> tuple[str, bool]:
    """The verdict in words, and whether it is the one that must be."""
    errors = re.search(r"errors: (\d+)", output)
    complaint = re.search(r"^pan:\s?\d+: (.*?)\s*\(at depth", output, re.MULTILINE)
    if complaint is None:
        incomplete = (
            errors is None
            or errors[1] != "0"
            or re.search(r"Search not completed|depth too small|out of memory|-DMEMLIM", output)
        )
        if incomplete:
            return "incomplete", False
        return ("not caught", False) if configuration.bug else ("verified", True)
    if not configuration.bug:
        return f"broken: {complaint[1]}", False
    found = broken_properties(configuration, directory)
    good = not configuration.broken or configuration.broken in found
    return "caught" + (f" by {', '.join(found)}" if found else ""), good


def broken_properties(configuration: Configuration, directory: Path) -> list[str]:
    """Those that the comment beside the failing assertion names."""
    output = run(["spin", *configuration.defines, "-t", "m.pml"], directory)
    where = re.search(r"m\.pml:(\d+), Error: assertion violated", output)
    if where is None:
        return []
    lines = (directory / "m.pml").read_text().splitlines()
    # An assertion of several lines is known by its last one.
    for line in lines[int(where[1]) - 1 : int(where[1]) - 4 : -1]:
        named = re.findall(r"\b[PH]\d", line.partition("/*")[2])
        if named or "assert" in line:
            return named
    return []


def verify_all(chosen: Iterable[Configuration], lanes: int = 2) -> Iterator[Row]:
    with ThreadPoolExecutor(lanes) as pool:
        yield from pool.map(verify, chosen)


def litmus_rows() -> Iterator[Row]:
    for result in litmus.results():
        name = f"litmus: {result.name}" + (f", {result.weakened}" if result.weakened else "")
        verdict = f"caught: {result.found}" if result.found else "verified"
        yield Row(name, verdict, result.states, result.seconds, result.as_expected)


# --------------------------------------------------------------------------------------------
# Has the C changed since somebody compared it with the models?
# --------------------------------------------------------------------------------------------

SOURCES = HERE.parents[1] / "src" / "pgbgw"
HEADERS = ("_slots.h", "_slots_client.h", "_slots_supervisor.h")
REVIEWED = HERE / "reviewed.json"

# Not of the protocol: layout and mapping, text, validation, memory to be had.  What is not named
# here the models must know.
APART = {
    *("ABI_MAJOR", "ABI_MINOR", "OUTBOX_MAGIC", "ENDIAN_TAG", "RECORD_VERSION", "FNV1A_START"),
    *("PGBGW_SLOTS_H", "PGBGW_SLOTS_CLIENT_H", "PGBGW_SLOTS_SUPERVISOR_H", "MADV_POPULATE_WRITE"),
    *("PAGE", "POPULATE_LIMIT", "CHUNK_SLOTS", "HEADROOM", "HEADROOM_PER_SLOT"),
    *("page_align", "geometry_t", "geometry_of", "fnv1a", "layout_hash", "_Static_assert"),
    *("map_segment", "map_close", "monotonic_ns", "utf8_step", "sanitise", "record_problem"),
    *("client_check", "client_open", "client_close", "client_populate"),
    *("supervisor_populate", "supervisor_close", "supervisor_has_memory"),
}


def digests() -> dict[str, dict[str, str]]:
    """By header and name: a digest of each function, type and macro; comments do not count."""
    return {
        header: {
            name: hashlib.sha256("".join(text.split()).encode()).hexdigest()[:16]
            for name, text in sorted(declarations((SOURCES / header).read_text()).items())
            if name not in APART
        }
        for header in HEADERS
    }


def declarations(source: str) -> dict[str, str]:
    """The top level of a C header: names and texts."""
    source = re.sub(r"/\*.*?\*/|//[^\n]*", " ", source, flags=re.DOTALL)
    source = source.replace("\\\n", " ")
    found: dict[str, str] = {}

    def add(name: str, text: str) -> None:
        found[name] = found.get(name, "") + text

    for macro in re.finditer(r"^[ \t]*#[ \t]*define[ \t]+(\w+)[^\n]*", source, re.MULTILINE):
        add(macro[1], macro[0])
    depth, text = 0, ""
    # Conditions are part of the text that they stand in; other directives are not.
    for token in re.findall(r"[ \t]*#[^\n]*|[{};]|[^{};#]+|#", source):
        if token.lstrip().startswith("#"):
            if depth and not re.match(r"\s*#\s*define", token):
                text += token
            continue
        text += token
        depth += {"{": 1, "}": -1}.get(token, 0)
        function = token == "}" and re.match(r"(?!\s*(?:typedef|enum|struct)\b)[^{=]*\)\s*\{", text)
        if depth == 0 and (token == ";" or function):
            if text.strip(" \n;"):
                add(name_of(text), text)
            text = ""
    return found


def name_of(declaration: str) -> str:
    """What a top-level declaration declares."""
    head, brace, _ = declaration.partition("{")
    if head.strip().startswith("typedef"):
        return str(re.findall(r"\w+", declaration)[-1])
    if head.strip().startswith("enum") and brace:
        return " ".join(re.findall(r"\w+", declaration)[:2])
    return str(re.findall(r"(\w+)\s*(?=[(\[=;]|$)", head.strip())[0])


def unreviewed() -> list[str]:
    """What has changed in the C since it was last compared with the models."""
    known = json.loads(REVIEWED.read_text()) if REVIEWED.exists() else {}
    changes = []
    for header, present in digests().items():
        before = known.get(header, {})
        for name in sorted(before.keys() | present.keys()):
            if name not in before:
                changes.append(f"{header}: {name} is new")
            elif name not in present:
                changes.append(f"{header}: {name} is gone")
            elif before[name] != present[name]:
                changes.append(f"{header}: {name} has changed")
    return changes


def note_reviewed() -> None:
    REVIEWED.write_text(json.dumps(digests(), indent=1) + "\n")


# --------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description="Check the models of the slot protocol.")
    parser.add_argument("--full", action="store_true", help="large configurations as well")
    parser.add_argument("--only", default="", metavar="X", help="those whose name contains X")
    parser.add_argument("--reviewed", action="store_true", help="note: C and models are compared")
    options = parser.parse_args()
    if options.reviewed:
        for change in unreviewed():
            print(change)
        note_reviewed()
        return 0
    began = time.monotonic()
    # Large ones use all the memory that there may be: one at a time, and last.
    small = [c for c in [*SMALL, *BUGS] if options.only in c.name]
    large = [c for c in LARGE if options.full and options.only in c.name]
    bad = 0
    print(f"{'configuration':58} {'states':>11} {'seconds':>8}  result")
    for rows in (litmus_rows(), verify_all(small), verify_all(large, lanes=1)):
        for row in rows:
            if options.only not in row.name:
                continue
            bad += not row.as_expected
            mark = "" if row.as_expected else "UNEXPECTED: "
            line = f"{row.name:58} {row.states:>11,} {row.seconds:>8.1f}  {mark}{row.verdict}"
            print(line, flush=True)
    for change in unreviewed():
        print(f"not compared with the models yet: {change}")
    print(
        f"{'all as expected' if not bad else f'{bad} UNEXPECTED'}: {time.monotonic() - began:.0f} s"
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
