"""The tables of seeded bugs fit the sources as they are: no bug is seeded into nothing."""

from __future__ import annotations

import pytest

from support.builds import ROOT
from support.core_bugs import BUGS
from support.core_programs import HEADERS, PROGRAMS, VARIANTS
from support.package_bugs import PACKAGE_BUGS

TESTS = ROOT / "tests"


@pytest.mark.parametrize("name", BUGS)
def test_a_seeded_bug_changes_the_header_that_it_names(name: str) -> None:
    bug = BUGS[name]
    text = (HEADERS / bug.header).read_text()
    assert bug.seed(text) != text
    assert bug.found_by
    assert all((PROGRAMS / f"{program}.c").exists() for program in bug.found_by)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_changes_the_header_that_it_names(name: str) -> None:
    header, old, _ = VARIANTS[name]
    assert (HEADERS / header).read_text().count(old) == 1


@pytest.mark.parametrize("name", PACKAGE_BUGS)
def test_a_seeded_bug_changes_the_module_that_it_names(name: str) -> None:
    bug = PACKAGE_BUGS[name]
    text = (HEADERS / bug.file).read_text()
    assert bug.seed(text) != text
    file, _, test = bug.found_by.partition("::")
    assert f"def {test}(" in (TESTS / file).read_text()


def test_the_shipped_headers_have_no_switches_for_tests() -> None:
    for header in HEADERS.glob("_slots*.h"):
        assert "PGBGW_BUG" not in header.read_text()
