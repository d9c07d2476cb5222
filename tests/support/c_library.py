"""C that tests load into processes: compiled when it is needed, into the test's own directory."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).parent


def build_library(source: str, directory: Path) -> Path:
    """Compile tests/support/`source` to a shared library; skip the test without a compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    target = (directory / source).with_suffix(".so")
    command = [compiler, "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([*command, str(SOURCES / source), "-o", str(target), "-ldl"], check=True)
    return target
