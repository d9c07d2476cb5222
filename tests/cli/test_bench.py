"""`pgbgw bench`, in its smallest form: that it measures and what it says, never how fast."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from pgbgw import _bench

HANG = 120.0


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(os.path.abspath(directory) for directory in sys.path if directory)
    return subprocess.run(
        [sys.executable, "-m", "pgbgw", "bench", "--quick", *arguments],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=HANG,
    )


@pytest.mark.timeout_s(150)
def test_figures_come_as_json() -> None:
    done = bench("--json", "terminate", "status")
    assert (done.returncode, done.stderr) == (0, "")
    lines = json.loads(done.stdout)["figures"]
    assert [line["name"] for line in lines if "at" not in line] == ["terminate"]
    assert {line["at"] for line in lines if line["name"] == "status"} == {1, 8}
    for line in lines:
        assert line["subject"] == "pgbgw"
        assert line["rounds"] == 3
        assert 0 < line["q1"] <= line["median"] <= line["q3"]


@pytest.mark.timeout_s(150)
def test_figures_come_as_a_table() -> None:
    done = bench("cycle")
    assert done.returncode == 0
    assert [line.split()[0] for line in done.stdout.splitlines()] == [
        "FIGURE",
        "cycle",
        "cycle_spares",
    ]


def test_what_is_no_benchmark_is_wrong_usage() -> None:
    done = bench("speed")
    assert done.returncode == 2
    assert "there is no benchmark 'speed'" in done.stderr


def test_figures_are_medians_and_ratios_are_taken_round_by_round() -> None:
    question = _bench.Question(
        "made_up",
        lambda options: iter(()),
        {
            "one": _bench.Figure("F0", "ns", ""),
            "many": _bench.Figure("F0", "ns", "", "less", "one"),
        },
        axis="processes",
    )
    ours: list[_bench.Round] = [
        {"one": 2.0, "many": {1: 10.0, 8: 20.0}},
        {"one": 4.0},
        {"one": 8.0},
    ]
    theirs: list[_bench.Round] = [{"one": 1.0}, {"one": 8.0}, {"one": 4.0}]
    lines = _bench.figures(question, "ours", ours, {"theirs": theirs})
    assert [(line["name"], line.get("at"), line["median"]) for line in lines] == [
        ("one", None, 4.0),
        ("many", 1, 10.0),
        ("many", 8, 20.0),
    ]
    assert lines[0]["ratio_to"] == {"theirs": 2.0}
    assert (lines[0]["q1"], lines[0]["q3"], lines[0]["rounds"]) == (3.0, 6.0, 3)
