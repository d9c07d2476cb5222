"""The table of seeded bugs fits the headers as they are: no bug is seeded into nothing."""

from __future__ import annotations

import pytest

from support.core_bugs import BUGS
from support.core_programs import HEADERS, PROGRAMS


@pytest.mark.parametrize("name", BUGS)
def test_a_seeded_bug_changes_the_header_that_it_names(name: str) -> None:
    bug = BUGS[name]
    text = (HEADERS / bug.header).read_text()
    assert bug.seed(text) != text
    assert bug.found_by
    assert all((PROGRAMS / f"{program}.c").exists() for program in bug.found_by)


def test_the_shipped_headers_have_no_switches_for_tests() -> None:
    for header in HEADERS.glob("_slots*.h"):
        assert "PGBGW_BUG" not in header.read_text()
