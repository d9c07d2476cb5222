"""The paths of control groups, in plain directories; process/test_grandchildren.py has real ones.

A plain directory has no cgroup.kill and no limits, and can be removed only when it is empty.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pgbgw import StartError, _cgroup
from pgbgw._cgroup import PREFIX, SupervisorCgroup


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that is taken for a cgroup."""
    path = tmp_path / "base"
    path.mkdir()
    (path / "cgroup.controllers").touch()
    monkeypatch.setattr(SupervisorCgroup, "_try_out", lambda self: None)
    monkeypatch.setattr(_cgroup, "PATIENCE", 0.05)
    return path


@pytest.fixture
def cgroup(base: Path) -> Iterator[SupervisorCgroup]:
    made = SupervisorCgroup.make(str(base))
    yield made
    made.close()


def groups(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.is_dir())


def own(base: Path) -> Path:
    (name,) = groups(base)
    return base / name


def test_a_supervisor_makes_a_group_of_its_own_and_takes_it_with_it(base: Path) -> None:
    made = SupervisorCgroup.make(str(base))
    assert own(base).name.startswith(f"{PREFIX}{os.getpid()}-")
    assert own(base).stat().st_mode & 0o777 == 0o700
    made.close()
    assert groups(base) == []


def test_each_process_has_a_group_and_no_name_comes_twice(
    base: Path, cgroup: SupervisorCgroup
) -> None:
    names = set()
    for _ in range(3):
        group = cgroup.new(5)
        names.add(group.name)
        group.remove()
    assert len(names) == 3
    assert groups(own(base)) == []


def test_what_cannot_be_removed_yet_is_removed_later(base: Path, cgroup: SupervisorCgroup) -> None:
    group = cgroup.new(0)
    busy = own(base) / group.name / "a process that has not ended"
    busy.touch()
    group.remove()
    assert groups(own(base)) == [group.name]
    busy.unlink()
    cgroup.new(1).remove()
    assert groups(own(base)) == []


def test_a_process_enters_by_its_own_doing(base: Path, cgroup: SupervisorCgroup) -> None:
    group = cgroup.new(0)
    procs = own(base) / group.name / "cgroup.procs"
    with pytest.raises(FileNotFoundError):
        group.enter()
    procs.touch()
    group.enter()
    assert procs.read_bytes() == b"0"
    procs.unlink()
    group.remove()


def test_groups_of_the_dead_go_and_those_of_the_living_and_of_others_stay(base: Path) -> None:
    living = SupervisorCgroup.make(str(base))
    (name,) = groups(base)
    (base / f"{PREFIX}1-dead" / "worker-0-1" / "of its own").mkdir(parents=True)
    (base / "somebody else's").mkdir()
    (base / f"{PREFIX}a file").touch()
    (base / f"{PREFIX}a link").symlink_to(base / "somebody else's")
    second = SupervisorCgroup.make(str(base))
    assert f"{PREFIX}1-dead" not in groups(base)
    assert name in groups(base)
    assert len(groups(base)) == 4  # the living one's, the second's, somebody's and the link to it
    second.close()
    living.close()
    assert groups(base) == [f"{PREFIX}a link", "somebody else's"]


def test_a_group_of_the_dead_that_cannot_be_removed_does_not_prevent_a_start(base: Path) -> None:
    stuck = base / f"{PREFIX}1-dead" / "worker-0-1"
    stuck.mkdir(parents=True)
    (stuck / "a process that does not end").touch()
    made = SupervisorCgroup.make(str(base))
    assert len(groups(base)) == 2
    made.close()


def test_a_group_that_was_swept_between_two_steps_is_made_anew(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mkdir, made = os.mkdir, []

    def swept(name: str, *args: int, **kwargs: int) -> None:
        mkdir(name, *args, **kwargs)
        made.append(name)
        if len(made) == 1:
            os.rmdir(base / name)

    monkeypatch.setattr(os, "mkdir", swept)
    cgroup = SupervisorCgroup.make(str(base))
    assert len(made) == 2
    assert groups(base) == [made[1]]
    cgroup.close()


@pytest.mark.parametrize("place", ["missing", "file", "plain", "version 1"])
def test_what_is_no_cgroup_of_version_2_is_a_clear_error(place: str, tmp_path: Path) -> None:
    path = tmp_path / "base"
    if place == "file":
        path.touch()
    elif place != "missing":
        path.mkdir()
    if place == "version 1":
        (path / "cgroup.procs").touch()
    with pytest.raises(StartError, match="control groups") as caught:
        SupervisorCgroup.make(str(path))
    assert caught.value.detail in ("No such file or directory", "Not a directory")
    assert "Delegate=yes" in str(caught.value.hint)


def test_a_group_that_no_process_can_enter_is_a_clear_error_and_leaves_nothing(
    tmp_path: Path,
) -> None:
    (tmp_path / "cgroup.controllers").touch()
    with pytest.raises(StartError, match="control groups") as caught:
        SupervisorCgroup.make(str(tmp_path))
    assert "no process can enter" in str(caught.value.detail)
    assert groups(tmp_path) == []
