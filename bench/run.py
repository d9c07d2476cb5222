"""Runs bench_*.py, all or those that are named, and writes results/<question>.json."""

from __future__ import annotations

import sys
import time
from importlib import import_module
from pathlib import Path

from _harness import HERE, RESULTS, chosen, parser, run


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("names", metavar="NAME", nargs="*", help="questions; default: all")
    arguments.add_argument("--results", type=Path, default=RESULTS, help="directory to write to")
    options = arguments.parse_args()
    there = sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))
    unknown = set(options.names) - set(there)
    if unknown:
        arguments.error(f"{', '.join(sorted(unknown))}: not among {', '.join(there)}")
    options.results.mkdir(exist_ok=True)
    form = "quick" if options.quick else "full"
    for name in options.names or there:
        before = time.monotonic()
        bench = import_module(f"bench_{name}")
        file = str(HERE / f"bench_{name}.py")
        path = options.results / f"{name}.json"
        run(bench.QUESTION, file, chosen(bench.PEERS, options), form, path)
        print(f"{name}: {time.monotonic() - before:.1f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
