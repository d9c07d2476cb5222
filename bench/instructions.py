"""Counts the instructions of the C core's register, status and terminate, under valgrind.

Time depends on the machine and its load, this does not: a change that makes the hot path longer is
seen here at once.  Compares with instructions.json, of the same compiler; `--update` rewrites it.
Exit status: 0 within 5 %, 1 moved, 77 cannot be told here.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
KEPT = HERE / "instructions.json"
CALLS = ("register", "status", "terminate")
TOLERANCE = 0.05
FEW, MANY = 1000, 3000
CANNOT = 77


def counts() -> dict[str, float]:
    """Instructions per call."""
    with tempfile.TemporaryDirectory() as where:
        program = Path(where) / "instructions"
        command = ["gcc", "-std=c11", "-D_GNU_SOURCE", "-O2", "-Wall", "-Wno-unused-function"]
        subprocess.run([*command, "-o", program, HERE / "instructions.c"], check=True)
        return {
            call: (_collected(program, call, MANY) - _collected(program, call, FEW)) / (MANY - FEW)
            for call in CALLS
        }


def _collected(program: Path, call: str, count: int) -> int:
    done = subprocess.run(
        [
            "valgrind",
            "--tool=callgrind",
            "--callgrind-out-file=/dev/null",
            program,
            call,
            str(count),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    found = re.search(r"Collected : (\d+)", done.stderr)
    assert found, done.stderr
    return int(found[1])


def compiler() -> str:
    done = subprocess.run(
        ["gcc", "-dumpfullversion", "-dumpmachine"], capture_output=True, text=True
    )
    return "gcc " + " ".join(done.stdout.split())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--update", action="store_true", help="keep what is counted now")
    options = parser.parse_args()
    for program in ("gcc", "valgrind"):
        if shutil.which(program) is None:
            print(f"{program} is not installed")
            return CANNOT
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    if not options.update and kept.get("compiler") != compiler():
        print(f"counted with {kept.get('compiler')}, and this is {compiler()}")
        return CANNOT
    found = counts()
    if options.update:
        KEPT.write_text(
            json.dumps({"compiler": compiler(), "instructions": found}, indent=2) + "\n"
        )
    before = json.loads(KEPT.read_text())["instructions"]
    moved = 0
    for call, count in found.items():
        change = count / before[call] - 1
        moved += abs(change) > TOLERANCE
        print(f"{call:10} {count:8.1f} instructions, {change:+.1%}")
    if moved:
        print("if that is meant: python bench/instructions.py --update")
    return 1 if moved else 0


if __name__ == "__main__":
    sys.exit(main())
