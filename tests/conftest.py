"""Fixtures of all tests are plugins, one file per concern."""

from __future__ import annotations

pytest_plugins = ["fix_leaks", "fix_trials"]
