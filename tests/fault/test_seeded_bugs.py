"""The tests of the package's Python can fail: each seeded bug is found by the test that must.

The test runs as it always does, in its quick form, with a copy of the package that has the bug.
(Bugs of the C core are found in T02, T04, T09, T11, T12 and T13.)
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fix_trials import Trial
from support.builds import ROOT
from support.package_bugs import PACKAGE_BUGS

pytestmark = [pytest.mark.xdist_group("core"), pytest.mark.at_least("fault")]

HANG = 200.0  # seconds

# What never comes need not be waited for as long as on a day without bugs.
_RUN = """
import sys, pytest

package, test = sys.argv[1:]

class Impatient:
    def pytest_sessionstart(self):
        import pgbgw, support.books, support.processes, support.waiting
        assert pgbgw.__file__.startswith(package), pgbgw.__file__
        support.processes.GUARD = support.books.PATIENCE = 8.0
        support.waiting.poll_until.__defaults__ = (8.0,)

options = ["-q", "-x", "-p", "no:cacheprovider", "--form=quick"]
sys.exit(pytest.main([*options, test], [Impatient()]))
"""


@pytest.mark.timeout_s(300)
@pytest.mark.parametrize("name", PACKAGE_BUGS)
def test_a_seeded_bug_of_the_package_is_found(trial: Trial, name: str, tmp_path: Path) -> None:
    bug = PACKAGE_BUGS[name]
    package = tmp_path / "src" / "pgbgw"
    shutil.copytree(ROOT / "src" / "pgbgw", package, ignore=shutil.ignore_patterns("__pycache__"))
    seeded = package / bug.file
    seeded.write_text(bug.seed(seeded.read_text()))
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "COV"))}
    environ["PYTHONPATH"] = os.pathsep.join([str(package.parent), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, "-c", _RUN, str(package), str(ROOT / "tests" / bug.found_by)],
        cwd=ROOT, env=environ, capture_output=True, text=True, errors="replace", timeout=HANG,
        check=False,
    )  # fmt: skip
    trial.count()
    if "1 failed" not in done.stdout or bug.says not in done.stdout:
        trial.violation(
            f"no failure that says {bug.says!r}: {done.stdout[-6000:]}{done.stderr[-3000:]}"
        )
