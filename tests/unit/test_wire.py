"""The allow list."""

from __future__ import annotations

import pytest

from pgbgw._wire import entry_allowed


@pytest.mark.parametrize(
    ("entry", "pattern", "allowed"),
    [
        ("mylib:f", "mylib.*", True),
        ("mylib.jobs:f", "mylib.*", True),
        ("mylib:f", "mylib:*", True),
        ("mylib.jobs:f", "mylib:*", False),
        ("mylib:f", "mylib:f", True),
        ("mylib:g", "mylib:f", False),
        ("mylibrary:f", "mylib.*", False),
        ("os:system", "*", True),
        # What a module has imported is not all of mylib's.
        ("mylib:os.system", "mylib.*", False),
        ("mylib.jobs:os.system", "mylib.*", False),
        ("mylib:os.system", "mylib:*", False),
        ("mylib:os.system", "*", True),
        ("mylib:Class.run", "mylib:Class.*", True),
        ("mylib:Class.run", "mylib:Class.run", True),
        ("mylib:Other.run", "mylib:Class.*", False),
    ],
)
def test_a_pattern_allows_what_it_seems_to(entry: str, pattern: str, allowed: bool) -> None:
    assert entry_allowed(entry, [pattern]) is allowed
    assert entry_allowed(entry, ["other:*", pattern]) is allowed
    assert not entry_allowed(entry, [])
