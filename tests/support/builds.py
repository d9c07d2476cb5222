"""What tests compile: C that they run or load, and builds of the extensions for one test alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "tests" / "support"
WARNINGS = ("-Wall", "-Wextra", "-Werror")


def compile_c(source: Path, target: Path, *flags: str) -> Path:
    """Compile one file, without a warning; skip the test without a compiler."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    command = [compiler, *WARNINGS, str(source), "-o", str(target), *flags]
    done = subprocess.run(command, timeout=120, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


def build_library(source: str, directory: Path) -> Path:
    """Compile tests/support/`source` to a shared library, to be loaded into processes."""
    target = (directory / source).with_suffix(".so")
    return compile_c(SOURCES / source, target, "-std=gnu11", "-O2", "-shared", "-fPIC", "-ldl")


# --- the extensions, away from the tree: sanitized, or with a bug ---------------------------------


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
