"""docs/security.md: each row of its table names tests, and they exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "security.md").read_text()
TABLE = PAGE.partition("## Who can do what")[2].partition("\n## ")[0]
ROWS = [line.split(" | ") for line in TABLE.splitlines() if line.startswith("| ")][2:]


def test_each_promise_names_a_test_that_exists() -> None:
    assert len(ROWS) > 15
    for row in ROWS:
        assert len(row) == 5, row
        cited = re.findall(r"`([\w/]+\.py)(?::(test_\w+))?`", row[4])
        assert cited, f"{row[1]}: nothing shows it"
        for file, name in cited:
            text = (ROOT / "tests" / file).read_text()
            assert not name or f"def {name}(" in text, f"{file}:{name}"
