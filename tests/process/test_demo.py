"""examples/checksums.py on a small tree: the whole job, with both kills, in a second or two."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "checksums.py"
HANG = 100.0

# The script, but its own sequential run reads other digests than the workers.
LIAR = f"""
import sys
sys.path.insert(0, {str(SCRIPT.parent)!r})
import checksums
truth = checksums.digests
checksums.digests = lambda directory: [(path, size, "x") for path, size, _ in truth(directory)]
sys.exit(checksums.main())
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Directories with files of all kinds, hard to name some of them."""
    root = tmp_path / "tree"
    for number in range(8):
        directory = root / f"directory {number}" / "below"
        directory.mkdir(parents=True)
        for size in (0, 1, 4096, 100_000):
            (directory / f"{size}.bin").write_bytes(bytes(range(256)) * (size // 256) + b"x" * size)
    (root / "in the root").write_text("one file\n")
    (root / "empty").mkdir()
    (root / "link").symlink_to(root / "in the root")
    (root / "line\nend").write_text("another one\n")
    with open(os.fsencode(root) + b"/\xff\xfe", "wb") as file:
        file.write(b"no UTF-8\n")
    return root


def demo(*command: str, root: Path, scratch: Path) -> subprocess.CompletedProcess[str]:
    scratch.mkdir()
    return subprocess.run(
        [sys.executable, *command, "--root", str(root)],
        env={**os.environ, "TMPDIR": str(scratch)},
        capture_output=True,
        text=True,
        timeout=HANG,
    )


def table_of(output: str) -> dict[str, str]:
    return dict(line.rsplit(None, 1) for line in output.splitlines() if line)


@pytest.mark.timeout_s(120)
def test_the_demo_is_exact_although_a_worker_and_the_coordinator_are_killed(
    tree: Path, tmp_path: Path
) -> None:
    done = demo(str(SCRIPT), root=tree, scratch=tmp_path / "scratch")
    assert done.returncode == 0, done.stdout + done.stderr
    table = table_of(done.stdout)
    assert table["directories"] == "9"
    assert table["files"] == str(8 * 4 + 3)
    assert table["files that differ"] == "0"
    # One for each directory, the killed one's successor, the coordinator twice.
    assert table["workers launched"] == str(9 + 1 + 2)
    assert (table["workers in vain"], table["restarts"]) == ("2", "1")
    assert done.stderr.count("was terminated by signal 9") == 2
    assert list((tmp_path / "scratch").iterdir()) == []


@pytest.mark.timeout_s(120)
def test_the_demo_fails_if_a_digest_differs(tree: Path, tmp_path: Path) -> None:
    done = demo("-c", LIAR, root=tree, scratch=tmp_path / "scratch")
    assert done.returncode == 1, done.stdout + done.stderr
    assert table_of(done.stdout.partition("PROBLEM")[0])["files that differ"] == "35"
    assert done.stdout.count("PROBLEM: ") == 35
    assert list((tmp_path / "scratch").iterdir()) == []
