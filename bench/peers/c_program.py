"""The slot tables in C: variant "slot_contention" is pgbgw's own core, "locked_table" one lock."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import bursts
from _subject import Skip, serve
from pgbgw._bench import Options, Round

SOURCES = Path(__file__).parents[1]
FLAGS = ("-std=c11", "-D_GNU_SOURCE", "-O2", "-pthread")


def slot_contention(options: Options) -> Iterator[Round]:
    if (compiler := shutil.which("cc") or shutil.which("gcc")) is None:
        raise Skip("no C compiler")
    source = SOURCES / f"{options['variant']}.c"
    with tempfile.TemporaryDirectory(prefix="pgbgw-bench-") as directory:
        program = f"{directory}/{source.stem}"
        subprocess.run([compiler, *FLAGS, "-o", program, source], check=True)

        def measure(slots: int, processes: int, size: int) -> dict[str, float]:
            numbers = (slots, processes, size, options["beats"])
            command = [program, *map(str, numbers)]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
            return bursts.figures(json.loads(output), size)

        while True:
            yield bursts.by_table(options, measure)


if __name__ == "__main__":
    serve({"slot_contention": slot_contention})
