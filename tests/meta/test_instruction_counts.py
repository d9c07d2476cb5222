"""The hot path does not get longer unnoticed: instructions per call, counted by valgrind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fix_trials import Trial

PROGRAM = Path(__file__).parents[2] / "bench" / "instructions.py"
CANNOT = 77


@pytest.mark.at_least("fault")
@pytest.mark.timeout_s(300)
def test_register_status_and_terminate_take_as_many_instructions_as_before(trial: Trial) -> None:
    done = subprocess.run([sys.executable, PROGRAM], capture_output=True, text=True, timeout=240)
    if done.returncode == CANNOT:
        pytest.skip(done.stdout.strip())
    lines = done.stdout.splitlines()
    trial.count(len(lines))
    trial.note(", ".join(" ".join(line.split()) for line in lines))
    assert done.returncode == 0, done.stdout + done.stderr
