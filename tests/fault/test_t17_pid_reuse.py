"""T17: pids are used again at once, and no stranger is ever sent a signal.

In a pid namespace with some twenty pids workers and strangers come and go, and all the time
terminate, cancel and wake are asked for through handles of workers that are gone.  See
`support.pid_reuse`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fix_trials import Trial

pytestmark = pytest.mark.xdist_group("core")

PID_MAX = Path("/proc/sys/kernel/pid_max")


def kernel() -> tuple[int, ...]:
    return tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2])


@pytest.mark.timeout_s(1800)
def test_T17_no_signal_meets_a_stranger_when_pids_are_used_again(trial: Trial) -> None:
    if kernel() < (6, 14):
        pytest.skip("before Linux 6.14 pid_max is everybody's")
    unshare = shutil.which("unshare")
    if unshare is None or os.geteuid() != 0:
        pytest.skip("needs root and unshare, for a pid namespace")
    enter = [unshare, "--pid", "--fork", "--mount-proc", "--kill-child"]
    if subprocess.run([*enter, "true"], capture_output=True).returncode != 0:
        pytest.skip("a pid namespace is not permitted here")
    everybodys = PID_MAX.read_text()
    rounds = trial.pick(10, 250, 5000)
    command = [sys.executable, "-P", "-m", "support.pid_reuse", str(trial.seed), str(rounds)]
    done = subprocess.run(
        [*enter, *command],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert PID_MAX.read_text() == everybodys
    told = json.loads(done.stdout)
    trial.count(told["rounds"])
    for violation in told["violations"]:
        trial.violation(violation)
    assert told["shared"], "no stranger had a worker's number"
    trial.note(
        f"rounds of pids; {told['met']} strangers, {told['shared']} of them with the pid that a "
        f"worker had before; {told['asked']} requests through stale handles"
    )
