"""What has moved since the committed results?  A report, never a failure.

Runs the quick form of all questions, or of those that are named, and prints what is more than 20 %
better or worse than in results/*.json.  Where both runs have a ratio to a peer, that is compared:
it is worth more than a time on a machine that may be another one.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from _harness import HERE, OURS, RESULTS, parser

MOVED = 0.2

Key = tuple[str, str, Any]


def read(path: Path) -> dict[Key, dict[str, Any]]:
    """Our lines, by question, figure and point."""
    found = json.loads(path.read_text())
    return {
        (found["question"], line["name"], line.get("at")): line
        for line in found["figures"]
        if line["subject"] == OURS and "skipped" not in line
    }


def moves(before: dict[str, Any], now: dict[str, Any]) -> Iterator[tuple[float, float, float, str]]:
    """(how many times more, before, now, of what): by ratios if there are any, else by medians."""
    ratios = before.get("ratio_to", {}), now.get("ratio_to", {})
    pairs = [
        (old, ratios[1][peer], f"of {peer}'s")
        for peer, old in ratios[0].items()
        if peer in ratios[1]
    ]
    for old, new, what in pairs or [(before["median"], now["median"], before["unit"])]:
        if old > 0:
            yield new / old, old, new, what


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("names", metavar="NAME", nargs="*", help="questions; default: all")
    arguments.parse_args()  # run.py's own, passed on
    with tempfile.TemporaryDirectory() as where:
        run = [sys.executable, HERE / "run.py", "--quick", "--results", where]
        given = sys.argv[1:]
        subprocess.run([*run, *given], stdout=subprocess.DEVNULL, check=True)
        kept = {key: line for path in RESULTS.glob("*.json") for key, line in read(path).items()}
        found = {
            key: line for path in Path(where).glob("*.json") for key, line in read(path).items()
        }
    told = 0
    for key in sorted(kept.keys() & found.keys(), key=str):
        for times, old, new, what in moves(kept[key], found[key]):
            if abs(times - 1) <= MOVED:
                continue
            better = (times < 1) == (found[key]["better"] == "less")
            name = f"{key[1]}" + (
                f" at {key[2]} {found[key]['axis']}" if key[2] is not None else ""
            )
            word = "better" if better else "worse"
            print(f"{name:34} {old:12.4g} → {new:12.4g} {what:18} {times - 1:+.0%}  {word}")
            told += 1
    there = len(kept.keys() & found.keys())
    print(f"{there} figures compared, {told} moved by more than {MOVED:.0%}")


if __name__ == "__main__":
    main()
