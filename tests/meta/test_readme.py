"""What README.md shows is what happens."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from support import poll_until

ROOT = Path(__file__).parents[2]


def environ() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}


def write_files(directory: Path) -> dict[str, str]:
    readme = (ROOT / "README.md").read_text()
    files = dict(re.findall(r"<!-- file: (\S+) -->\n```python\n(.*?)```", readme, re.DOTALL))
    for name, text in files.items():
        (directory / name).write_text(text)
    return files


def test_the_commands_of_the_readme_do_what_they_seem_to(tmp_path: Path) -> None:
    write_files(tmp_path)
    readme = (ROOT / "README.md").read_text()
    commands = [shlex.split(line) for line in re.findall(r"^\$ pgbgw (.+)$", readme, re.MULTILINE)]
    run, others = commands[0], commands[1:]
    assert run.pop() == "&"
    pgbgw = [sys.executable, "-m", "pgbgw"]
    with subprocess.Popen([*pgbgw, *run], cwd=tmp_path, env=environ()) as server:
        ps = [*pgbgw, "ps", "-a", "main"]
        poll_until(lambda: subprocess.run(ps, env=environ(), capture_output=True).returncode == 0)
        for command in others:
            done = subprocess.run([*pgbgw, *command], cwd=tmp_path, env=environ(), timeout=50)
            assert done.returncode == 0, command
        assert server.wait(50) == 0


def test_the_first_worker_of_the_readme_prints_what_its_comments_say(tmp_path: Path) -> None:
    files = write_files(tmp_path)
    done = subprocess.run(
        [sys.executable, "main.py"], cwd=tmp_path, env=environ(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    promised = re.findall(r"print\(.*\)\s+# (.+)", files["main.py"])
    assert done.stdout.splitlines() == ["hello world", "hello world", *promised]
