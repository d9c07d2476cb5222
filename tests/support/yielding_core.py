"""The slot core with its windows widened: it gives way between any two accesses to shared memory.

A client or a supervisor in the midst of its few instructions is met by others once in a million
times; in such a build, all the time.  It can be given a bug as well.
"""

from __future__ import annotations

import re
from pathlib import Path

from support.builds import build_extensions, copy_package
from support.core_bugs import Bug

_GIVE_WAY = """
static inline void
give_way(void)
{
    static __thread uint32_t state;

    if (state == 0)
        state = (uint32_t) getpid() * 2654435761u | 1;
    state = state * 1664525 + 1013904223;
    if (state >> 29 == 0)
        sched_yield();
    else if (state >> 24 == 255)
        usleep(20);
}

typedef _Atomic uint64_t word_t;
"""
_ACCESS = re.compile(r"^#define ((?:load|store|exchange|or|and)_\w+\(p(?:, v)?\))\s+(.*)$", re.M)


def build_yielding_core(directory: Path, bug: Bug | None = None) -> Path:
    """Build a copy, with a seeded bug or none; what belongs on PYTHONPATH."""
    package = copy_package(directory)
    header = package / "_slots.h"
    text = header.read_text()
    text = text.replace("typedef _Atomic uint64_t word_t;\n", _GIVE_WAY, 1)
    text, accesses = _ACCESS.subn(r"#define \1 (give_way(), \2)", text)
    assert accesses >= 10, "_slots.h has changed its shape"
    text = text.replace(
        "    return atomic_compare_exchange_strong_explicit(",
        "    give_way();\n    return atomic_compare_exchange_strong_explicit(",
        1,
    )
    assert text.count("give_way();") == 1
    header.write_text(text)
    if bug is not None:
        header = package / bug.header
        header.write_text(bug.seed(header.read_text()))
    return build_extensions(directory)
