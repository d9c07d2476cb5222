"""Builds of the extensions for one test alone, away from the tree: sanitized, or with a bug."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def build_extensions(target: Path, **switches: str) -> Path:
    """Copy the package to target and build it there; return what belongs on PYTHONPATH.

    Switches are those of setup.py.  What is in target already is built as it is, so that a test can
    change it first: see copy_package().
    """
    if not target.exists():
        copy_package(target)
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
        cwd=target,
        env=os.environ | switches,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return target / "src"


def copy_package(target: Path) -> Path:
    """Copy what setup.py needs to target; return the folder of the package."""
    built = shutil.ignore_patterns("*.so", "_*.c", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "src", target / "src", ignore=built)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, target / name)
    return target / "src" / "pgbgw"
